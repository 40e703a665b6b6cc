"""Adapters of a training checkpoint: added to their weights, or written for peft or diffusers."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hunyuan_train.checkpoint.convertible import Layout
from hunyuan_train.checkpoint.storage import Manifest
from hunyuan_train.checkpoint.tensor_files import CheckpointSource, ShardedWriter
from hunyuan_train.checkpoint.tensor_source import TensorInfo, TensorSource, in_dtype
from hunyuan_train.models.lora import PEFT_PREFIX, adapters_of, is_adapter, merged, peft_settings
from hunyuan_train.models.lora_config import LoraConfig
from hunyuan_train.models.spec import KeyLink

SETTINGS_NAME = "adapter_config.json"
STEM = "adapter_model"
"""Name of peft's weights, before ``.safetensors``."""
PIPELINE_STEM = "pytorch_lora_weights"
"""The same for a pipeline of diffusers."""
PIPELINE_PREFIX = "transformer."
"""Begin of the keys in a file for a pipeline of diffusers."""


class MergedSource:
    """The weights of a run with adapters as one set: what each linear and its adapter do."""

    def __init__(self, source: TensorSource, lora: Mapping[str, Any]) -> None:
        """Read ``source``, whose adapters are those of a section ``lora``."""
        self._source, self._scale = source, LoraConfig(**lora).scale
        self.infos: Mapping[str, TensorInfo] = {
            name: info for name, info in source.infos.items() if not is_adapter(name)
        }

    def read(self, key: str) -> Tensor:
        """Return one tensor on the CPU."""
        weight, (down, up) = self._source.read(key), _halves(key)
        if down not in self._source.infos:
            return weight
        return merged(weight, self._source.read(down), self._source.read(up), self._scale)


def adapter_section(source: TensorSource) -> dict[str, Any] | None:
    """Return the section ``lora`` of the run whose checkpoint this is; None without adapters."""
    if not isinstance(source, CheckpointSource):
        return None
    return Manifest.read(source.folder).identity.get("lora")


def write_for_peft(
    source: TensorSource, output: Path, max_shard_bytes: int, dtype: torch.dtype | None = None
) -> list[Path]:
    """Write the adapters of a checkpoint as ``PeftModel.from_pretrained`` reads them.

    Args:
        source: A training checkpoint.
        output: Folder to fill; created if missing.
        max_shard_bytes: Size at which a new file is begun.
        dtype: Type to write; None keeps theirs.

    Raises:
        ValueError: it has no adapters, or the folder already holds weights.
    """
    lora = _needed_section(source, Layout.PEFT)
    if dtype is not None:
        source = in_dtype(source, dtype)
    names = adapters_of(source.infos)
    infos = {PEFT_PREFIX + name: source.infos[name] for name in names}
    writer = ShardedWriter(output, STEM, infos, max_shard_bytes)
    for name in names:
        writer.write(PEFT_PREFIX + name, source.read(name))
    settings = peft_settings(lora, names)
    (output / SETTINGS_NAME).write_text(json.dumps(settings, indent=2) + "\n")
    return writer.finish()


def write_for_pipeline(
    source: TensorSource,
    links: Iterable[KeyLink],
    output: Path,
    dtype: torch.dtype | None = None,
) -> list[Path]:
    """Write the adapters of a checkpoint for ``load_lora_weights`` of a diffusers pipeline.

    Where one of our linears is several of theirs, each has the whole A and its rows of B. B carries
    the strength, alpha over rank, for which the file has no place.

    Args:
        source: A training checkpoint.
        links: Every tensor of the model.
        output: Folder to fill; created if missing.
        dtype: Type to write; None keeps theirs.

    Raises:
        ValueError: it has no adapters, one of no linear of the model, or the folder already holds
            weights.
    """
    scale = LoraConfig(**_needed_section(source, Layout.PIPELINE_LORA)).scale
    if dtype is not None:
        source = in_dtype(source, dtype)
    halves = {link: _halves(link.ours) for link in links}
    adapted = {link: ab for link, ab in halves.items() if ab[0] in source.infos}
    known = {name for ab in adapted.values() for name in ab}
    if unknown := [name for name in adapters_of(source.infos) if name not in known]:
        raise ValueError(f"the input has the adapter {unknown[0]}, and the model no such linear")
    infos: dict[str, TensorInfo] = {}
    for link, (down, up) in adapted.items():
        for theirs, rows in zip(link.diffusers, link.rows, strict=True):
            names = [PIPELINE_PREFIX + name for name in _halves(theirs)]
            infos[names[0]] = source.infos[down]
            rank = source.infos[up].shape[1]
            infos[names[1]] = TensorInfo((rows, rank), source.infos[up].dtype)
    writer = ShardedWriter(output, PIPELINE_STEM, infos, sum(i.num_bytes for i in infos.values()))
    for link, (down, up) in adapted.items():
        shared, whole = source.read(down), source.read(up)
        for theirs, rows in zip(link.diffusers, link.to_diffusers(whole * scale), strict=True):
            for name, tensor in zip(_halves(theirs), (shared, rows), strict=True):
                writer.write(PIPELINE_PREFIX + name, tensor)
    return writer.finish()


def _needed_section(source: TensorSource, target: str) -> dict[str, Any]:
    lora = adapter_section(source)
    if lora is None:
        raise ValueError(
            f"to={target} writes adapters, and the input has none; train with lora.rank"
        )
    return lora


def _halves(weight: str) -> tuple[str, str]:
    """Return the names of A and B beside a weight's."""
    module = weight.removesuffix(".weight")
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"

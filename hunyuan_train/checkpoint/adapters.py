"""Adapters of a training checkpoint: added to the weights they belong to, or written for peft."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hunyuan_train.checkpoint.storage import Manifest
from hunyuan_train.checkpoint.tensor_files import CheckpointSource, ShardedWriter
from hunyuan_train.checkpoint.tensor_source import TensorInfo, TensorSource, in_dtype
from hunyuan_train.models.lora import PEFT_PREFIX, adapters_of, is_adapter, merged, peft_settings
from hunyuan_train.models.lora_config import LoraConfig

SETTINGS_NAME = "adapter_config.json"
STEM = "adapter_model"
"""Name of peft's weights, before ``.safetensors``."""


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
        weight, module = self._source.read(key), key.removesuffix(".weight")
        down, up = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
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
    lora = adapter_section(source)
    if lora is None:
        raise ValueError("to=peft writes adapters, and the input has none; train with lora.rank")
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

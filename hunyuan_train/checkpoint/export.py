"""Convert weights between the official, our and the diffusers layout, tensor by tensor.

Everything that can be wrong with the input is found from names, shapes and types before a byte is
written. Then one group of tensors (a fused qkv and its parts, at most) is in memory at a time:
0.4 GiB for the 13B model in bfloat16, whose file has 24 GiB.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch

from hunyuan_train.checkpoint.adapters import MergedSource, adapter_section, write_for_peft
from hunyuan_train.checkpoint.load import check_identity
from hunyuan_train.checkpoint.storage import Manifest
from hunyuan_train.checkpoint.tensor_files import (
    DTYPE_NAMES,
    CheckpointSource,
    ShardedWriter,
    TensorInfo,
    TensorSource,
    open_source,
    renamed,
)
from hunyuan_train.models.hunyuan.config import HunyuanConfig
from hunyuan_train.models.hunyuan.state_dict import (
    common_prefix,
    diffusers_config,
    hunyuan_links,
)
from hunyuan_train.models.spec import KeyLink, identity_link
from hunyuan_train.models.vae.build import build_vae
from hunyuan_train.models.vae.config import VaeConfig
from hunyuan_train.models.vae.state_dict import RELEASED_CLASSES, config_to_released

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
MAX_SHARD_BYTES = 4 << 30
VAE_PREFIX = "vae."


class Layout(StrEnum):
    """Names and shapes that weights are stored under."""

    OFFICIAL = "official"
    OURS = "ours"
    DIFFUSERS = "diffusers"
    PEFT = "peft"
    """The adapters of a run alone; written, not read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Convertible:
    """A model whose weights can be converted."""

    links: Sequence[KeyLink]
    """Every tensor."""
    config: HunyuanConfig | VaeConfig
    """Our config, stored beside weights in our layout."""

    def stored_config(self, layout: Layout) -> dict[str, Any] | None:
        """Return what ``config.json`` says in a layout, None if it has none."""
        if layout is Layout.OURS:
            return dataclasses.asdict(self.config)
        if isinstance(self.config, VaeConfig):
            name = RELEASED_CLASSES[self.config.kind]
            return {"_class_name": name, **config_to_released(self.config)}
        return diffusers_config(self.config) if layout is Layout.DIFFUSERS else None


def convertible(cfg: HunyuanConfig | VaeConfig) -> Convertible:
    """Return what is to be known of a model to convert it; nothing is allocated."""
    if isinstance(cfg, HunyuanConfig):
        return Convertible(links=hunyuan_links(cfg), config=cfg)
    with torch.device("meta"):
        state = build_vae(cfg).state_dict()
    # The VAE has one set of names everywhere.
    links = [identity_link(key, tuple(tensor.shape)) for key, tensor in state.items()]
    return Convertible(links=links, config=cfg)


def convert(
    model: Convertible,
    source_path: Path,
    output: Path,
    *,
    source: Layout,
    target: Layout,
    ema: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """Convert weights on disk to safetensors and return the files written.

    The adapters of a run (section ``lora``) are added to its weights, or written alone for peft.

    Args:
        model: What to convert.
        source_path: File, folder or training checkpoint; see ``open_source``.
        output: Folder to fill; created if missing.
        source: Layout of the input.
        target: Layout to write.
        ema: Take the moving average where the input has both.
        max_shard_bytes: Size at which a new file is begun.

    Raises:
        ValueError: one line naming the key that is missing, unknown or of another shape (with the
            found and the expected shape), or what else does not fit.
    """
    config = model.stored_config(target)
    opened = open_source(source_path, ema=ema)
    check_config(opened, source_path, model, source)
    if target is Layout.PEFT:
        return write_for_peft(opened, output, max_shard_bytes)
    if (lora := adapter_section(opened)) is not None:
        opened = MergedSource(opened, lora)
    weights = without_prefix(opened, model.config)
    check_source(weights, model.links, source, source_path)
    plan = _target_infos(weights, model.links, source, target)
    stem = "diffusion_pytorch_model" if target is Layout.DIFFUSERS else "model"
    writer = ShardedWriter(output, stem, plan, max_shard_bytes)
    for link in _widest_first(weights, model.links, source):
        for key, tensor in _converted(weights, link, source, target):
            writer.write(key, tensor)
    if config is not None:
        (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return writer.finish()


def check_config(source: TensorSource, path: Path, model: Convertible, layout: Layout) -> None:
    """Compare the config stored with the weights, if any, with the model's.

    Names and shapes do not show everything: a rotary base or a scaling factor is only there.

    Raises:
        ValueError: naming the fields that differ.
    """
    ours = model.stored_config(layout) or {}
    if isinstance(source, CheckpointSource):
        stored = Manifest.read(source.folder).identity
        check_identity(source.folder, {k: v for k, v in stored.items() if k != "lora"}, ours)
    elif (path / "config.json").is_file():
        stored = json.loads((path / "config.json").read_text())
        shared = stored.keys() & ours.keys()
        check_identity(path, {k: stored[k] for k in shared}, {k: ours[k] for k in shared})


def without_prefix(source: TensorSource, cfg: HunyuanConfig | VaeConfig) -> TensorSource:
    """Return ``source`` without the prefix its saver put before the keys.

    A released VAE may sit beside other networks under "vae."; only its tensors are taken then.
    """
    if isinstance(cfg, VaeConfig) and any(key.startswith(VAE_PREFIX) for key in source.infos):
        pattern = re.compile(re.escape(VAE_PREFIX) + "(.*)")
        return renamed(source, lambda key: m.group(1) if (m := pattern.fullmatch(key)) else None)
    prefix = common_prefix(source.infos)
    return renamed(source, lambda key: key.removeprefix(prefix))


def check_source(
    source: TensorSource, links: Sequence[KeyLink], layout: Layout, path: Path
) -> None:
    """Compare names, shapes and types with what the model has.

    Raises:
        ValueError: naming the first key that is missing, of another shape, unknown, or of a type
            that cannot be converted.
    """
    expected: dict[str, tuple[int, ...]] = {}
    for link in links:
        expected |= dict(_parts(link, layout))
    for key, shape in expected.items():
        if key not in source.infos:
            raise ValueError(
                f"{path} lacks {key}, expected with shape {list(shape)}; "
                f"is it really in the {layout} layout?"
            )
        found = source.infos[key]
        if found.shape != shape:
            raise ValueError(
                f"{path}: {key} has shape {list(found.shape)}, expected {list(shape)}; "
                "is it another model?"
            )
        if found.dtype in FLOAT8:
            raise ValueError(
                f"{path}: {key} is stored as {DTYPE_NAMES[found.dtype]} with its scale in another "
                "file; convert the bfloat16 weights instead"
            )
    for key in source.infos:
        if key not in expected:
            raise ValueError(
                f"{path} has the unexpected key {key} of shape {list(source.infos[key].shape)}; "
                "expected is no tensor of that name"
            )
    for link in links:
        dtypes = {key: source.infos[key].dtype for key, _ in _parts(link, layout)}
        if len(set(dtypes.values())) > 1:
            raise ValueError(f"{path}: {' and '.join(dtypes)} differ in type, expected one type")


def _parts(link: KeyLink, layout: Layout) -> list[tuple[str, tuple[int, ...]]]:
    """Return keys and shapes of a link in a layout."""
    if layout is Layout.DIFFUSERS:
        return list(zip(link.diffusers, link.diffusers_shapes(), strict=True))
    return [(link.ours, link.shape)]


def _widest_first(source: TensorSource, links: Sequence[KeyLink], layout: Layout) -> list[KeyLink]:
    """Order links by element size, so that every tensor in a file is aligned to its own."""

    def width(link: KeyLink) -> int:
        key, _ = _parts(link, layout)[0]
        return source.infos[key].dtype.itemsize

    return sorted(links, key=width, reverse=True)


def _target_infos(
    weights: TensorSource, links: Sequence[KeyLink], source: Layout, target: Layout
) -> dict[str, TensorInfo]:
    """Return what will be written, in order."""
    infos: dict[str, TensorInfo] = {}
    for link in _widest_first(weights, links, source):
        key, _ = _parts(link, source)[0]
        dtype = weights.infos[key].dtype
        infos |= {name: TensorInfo(shape, dtype) for name, shape in _parts(link, target)}
    return infos


def _converted(
    weights: TensorSource, link: KeyLink, source: Layout, target: Layout
) -> list[tuple[str, torch.Tensor]]:
    """Read the tensors of one link and return them in the target layout."""
    tensors = [weights.read(key) for key, _ in _parts(link, source)]
    if (source is Layout.DIFFUSERS) != (target is Layout.DIFFUSERS):
        if source is Layout.DIFFUSERS:
            tensors = [link.from_diffusers(tensors)]
        else:
            tensors = link.to_diffusers(tensors[0])
    return [(key, t) for (key, _), t in zip(_parts(link, target), tensors, strict=True)]

"""Convert weights between the official, our and the diffusers layout, tensor by tensor.

Everything that can be wrong with the input is found from names, shapes and types before a byte is
written. Then one group of tensors (a fused qkv and its parts, at most) is in memory at a time:
0.4 GiB for the 13B model in bfloat16, whose file has 24 GiB.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hunyuan_train.checkpoint.adapters import (
    MergedSource,
    adapter_section,
    write_for_peft,
    write_for_pipeline,
)
from hunyuan_train.checkpoint.convertible import ADAPTERS, Convertible, Layout
from hunyuan_train.checkpoint.load import check_identity
from hunyuan_train.checkpoint.storage import Manifest
from hunyuan_train.checkpoint.tensor_files import CheckpointSource, ShardedWriter, open_source
from hunyuan_train.checkpoint.tensor_source import (
    DTYPE_NAMES,
    TensorInfo,
    TensorSource,
    in_dtype,
    renamed,
)
from hunyuan_train.models.hunyuan.config import HunyuanConfig
from hunyuan_train.models.hunyuan.state_dict import common_prefix
from hunyuan_train.models.spec import KeyLink
from hunyuan_train.models.vae.config import VaeConfig

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
MAX_SHARD_BYTES = 4 << 30
VAE_PREFIX = "vae."
CONFIG_NAME = "config.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """Weights found fit to be converted, of which no value is read yet."""

    model: Convertible
    weights: TensorSource
    source: Layout
    target: Layout
    infos: dict[str, TensorInfo]
    """What will be written, in order."""

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Read, convert and yield the tensors of ``infos``, one group in memory at a time."""
        for link in _widest_first(self.weights, self.model.links, self.source):
            yield from _converted(self.weights, link, self.source, self.target)

    def write(self, output: Path, max_shard_bytes: int) -> list[Path]:
        """Write safetensors and, if the layout has one, ``config.json`` into a folder.

        Raises:
            ValueError: it holds weights already, or its disk is too small.
        """
        stem = "diffusion_pytorch_model" if self.target is Layout.DIFFUSERS else "model"
        if isinstance(self.model.config, VaeConfig) and self.target is Layout.OURS:
            max_shard_bytes = sum(info.num_bytes for info in self.infos.values())  # one file
        writer = ShardedWriter(output, stem, self.infos, max_shard_bytes)
        for key, tensor in self.tensors():
            writer.write(key, tensor)
        config = self.model.stored_config(self.target)
        if config is not None:
            (output / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
        return writer.finish()


def convert(
    model: Convertible,
    source_path: Path,
    output: Path,
    *,
    source: Layout,
    target: Layout,
    ema: bool = False,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """Convert weights on disk to safetensors and return the files written.

    The adapters of a run (section ``lora``) are added to its weights, or written alone for peft or
    a pipeline of diffusers.

    Args:
        model: What to convert.
        source_path: File, folder or training checkpoint; see ``open_source``.
        output: Folder to fill; created if missing.
        source: Layout of the input.
        target: Layout to write.
        ema: Take the moving average where the input has both.
        dtype: Type to write; None keeps the types there are, and makes float8 bfloat16.
        max_shard_bytes: Size at which a new file is begun.

    Raises:
        ValueError: one line naming the key that is missing, unknown or of another shape (with the
            found and the expected shape), or what else does not fit.
    """
    if target in ADAPTERS:
        opened = open_source(source_path, ema=ema)
        check_config(opened, source_path, model, source)
        if target is Layout.PEFT:
            return write_for_peft(opened, output, max_shard_bytes, dtype)
        return write_for_pipeline(opened, model.links, output, dtype)
    conversion = prepare(model, source_path, source=source, target=target, ema=ema, dtype=dtype)
    return conversion.write(output, max_shard_bytes)


def prepare(
    model: Convertible,
    source_path: Path,
    *,
    source: Layout,
    target: Layout,
    ema: bool = False,
    dtype: torch.dtype | None = None,
) -> Conversion:
    """Find everything that can be wrong with the input, from names, shapes and types.

    Args are those of :func:`convert`.

    Raises:
        ValueError: one line naming what does not fit.
    """
    model.stored_config(target)  # says what the target cannot express
    opened = open_source(source_path, ema=ema, float8_as=dtype or torch.bfloat16)
    check_config(opened, source_path, model, source)
    if (lora := adapter_section(opened)) is not None:
        opened = MergedSource(opened, lora)
    weights = without_prefix(opened, model.config)
    if dtype is not None:
        weights = in_dtype(weights, dtype)
    check_source(weights, model.links, source, source_path)
    infos = _target_infos(weights, model.links, source, target)
    return Conversion(model=model, weights=weights, source=source, target=target, infos=infos)


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
    elif (path / CONFIG_NAME).is_file():
        stored = json.loads((path / CONFIG_NAME).read_text())
        # A class has another name in each code base, and tiles may be chosen freely.
        shared = {k for k in stored.keys() & ours.keys() if not k.startswith(("_", "sample_"))}
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
                f"{path}: {key} is stored as {DTYPE_NAMES[found.dtype]}, which is no released "
                "form; convert the bfloat16 weights instead"
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

"""``torch.save`` files of released names and nesting, with one tensor in memory at a time."""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from hunyuan_train.checkpoint.tensor_files import SafetensorsSource, ShardedWriter
from hunyuan_train.checkpoint.tensor_source import TensorInfo

SCRATCH_SUFFIX = ".scratch"


def write_pickle(
    path: Path,
    infos: Mapping[str, Mapping[str, TensorInfo]],
    tensors: Mapping[str, Iterable[tuple[str, Tensor]]],
) -> Path:
    """Write {section: {key: tensor}} as ``torch.load`` reads it, also with ``weights_only``.

    ``torch.save`` wants all tensors at once. So they go to a scratch file first, and it gets them
    mapped from there: that takes disk for a second copy, and no memory. The file has its final name
    when it is whole.

    Args:
        path: File to write; its folder is created.
        infos: What comes, by section.
        tensors: The tensors of each section, in the order of ``infos``.
    """
    scratch = path.with_name(path.name + SCRATCH_SUFFIX)
    shutil.rmtree(scratch, ignore_errors=True)
    flat = {f"{name}/{key}": info for name, part in infos.items() for key, info in part.items()}
    writer = ShardedWriter(scratch, "tensors", flat, sum(info.num_bytes for info in flat.values()))
    for name in infos:
        for key, tensor in tensors[name]:
            writer.write(f"{name}/{key}", tensor)
    mapped = SafetensorsSource(writer.finish())
    nested = {name: {key: mapped.read(f"{name}/{key}") for key in infos[name]} for name in infos}
    incomplete = path.with_name(path.name + ".incomplete")
    torch.save(nested, incomplete)
    incomplete.replace(path)
    shutil.rmtree(scratch)
    return path

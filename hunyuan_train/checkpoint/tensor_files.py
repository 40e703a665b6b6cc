"""Tensors on disk, one at a time: where weights are read from and how safetensors are written."""

import json
import shutil
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hunyuan_train.checkpoint.float8 import FLOAT8_SUFFIX, MAP_SUFFIX, dequantised
from hunyuan_train.checkpoint.load import (
    find_checkpoint,
    members,
    read_tensors,
    section_to_read,
    stored_tensors,
)
from hunyuan_train.checkpoint.ranks import Ranks
from hunyuan_train.checkpoint.tensor_source import DTYPE_NAMES, DTYPES, TensorInfo, TensorSource

GIB = 1 << 30


class SafetensorsSource:
    """One or several safetensors files, memory-mapped."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.infos: dict[str, TensorInfo] = {}
        self._opened: dict[str, Any] = {}
        stack = ExitStack()
        for path in files:
            try:
                file = cast(Any, stack.enter_context(safe_open(path, framework="pt")))
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged ({error}); copy it again") from error
            for key in file.keys():  # noqa: SIM118 - not a dict
                if key in self._opened:
                    raise ValueError(f"{path} has {key}, which another file of the folder has too")
                view = file.get_slice(key)
                if view.get_dtype() not in DTYPES:
                    raise ValueError(f"{path}: {key} has the unknown type {view.get_dtype()}")
                self._opened[key] = file
                self.infos[key] = TensorInfo(tuple(view.get_shape()), DTYPES[view.get_dtype()])

    def read(self, key: str) -> Tensor:
        """Return one tensor on the CPU."""
        return self._opened[key].get_tensor(key)


class PickleSource:
    """A ``torch.save`` file; memory-mapped, so a tensor is read when it is used."""

    def __init__(self, path: Path, *, ema: bool) -> None:
        state = _unwrapped(read_pickle(path), path, ema=ema)
        self._tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)}
        self.infos = {k: TensorInfo(tuple(v.shape), v.dtype) for k, v in self._tensors.items()}

    def read(self, key: str) -> Tensor:
        """Return one tensor, still backed by the file."""
        return self._tensors[key]


class CheckpointSource:
    """The weights in a training checkpoint, whatever number of ranks wrote it."""

    def __init__(self, folder: Path, *, ema: bool) -> None:
        self.folder = find_checkpoint(folder)
        stored = stored_tensors(self.folder)
        section = section_to_read(self.folder, stored, "ema" if ema else "model")
        self._keys = members(stored, section)
        self.infos = {
            name: TensorInfo(tuple(stored[key].size), stored[key].properties.dtype)
            for name, key in self._keys.items()
        }

    def read(self, key: str) -> Tensor:
        """Return one tensor, assembled from the shards."""
        info = self.infos[key]
        tensor = torch.empty(info.shape, dtype=info.dtype)
        read_tensors(self.folder, {self._keys[key]: tensor}, Ranks(alone=True))
        return tensor


def read_pickle(path: Path) -> Any:
    """Return what a ``torch.save`` file holds, its tensors mapped; it cannot run code.

    Raises:
        ValueError: it is damaged, or holds objects that are no plain data.
    """
    # Files of the format before torch 1.6 are no zip archives and cannot be mapped.
    mapped = zipfile.is_zipfile(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (RuntimeError, EOFError, UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is damaged or holds more than tensors ({reason})") from error


def _unwrapped(loaded: Any, path: Path, *, ema: bool) -> dict[str, Any]:
    """Return the state dict in a pickle: bare, or under module, ema or state_dict."""
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, not a dict of tensors")
    entries = [k for k in ("module", "ema", "state_dict") if isinstance(loaded.get(k), dict)]
    if ema and "ema" not in entries:
        raise ValueError(f"{path} has no ema weights; leave out ema=true")
    state = loaded["ema" if ema else entries[0]] if entries else loaded
    if not any(isinstance(value, Tensor) for value in state.values()):
        found = ", ".join(map(str, state)) or "nothing"
        raise ValueError(
            f"{path} holds no tensors, bare or under module, ema or state_dict; it has {found}"
        )
    return state


def open_source(path: Path, *, ema: bool, float8_as: torch.dtype = torch.bfloat16) -> TensorSource:
    """Open weights: a .safetensors or torch.save file, a folder of either, or a run's checkpoint.

    Args:
        path: File or folder.
        ema: Take the moving average, where a file or checkpoint has both.
        float8_as: Type that weights of the released float8 form are multiplied out in.

    Raises:
        ValueError: nothing to read there, it is damaged, or float8 weights have no scales.
    """
    if path.is_file():
        files = [path]
    elif not path.is_dir():
        raise ValueError(f"input={path} does not exist")
    elif is_checkpoint(path):
        return CheckpointSource(path, ema=ema)
    else:
        files = _weight_files(path)
    if files[0].suffix != ".safetensors":
        source = PickleSource(files[0], ema=ema)
    elif ema:
        raise ValueError(f"{path} holds one set of weights; leave out ema=true")
    else:
        source = SafetensorsSource(files)
    return dequantised(source, files[0], read_pickle, float8_as)


def is_checkpoint(path: Path) -> bool:
    """Whether a path is a training checkpoint or the folder of a run that has some."""
    return (path / "checkpoints").is_dir() or path.name.startswith("step-")


def _weight_files(folder: Path) -> list[Path]:
    """Return what an index lists, else every safetensors file, else the one .pt or .bin.

    The released folder has the weights in bfloat16 and in float8; then the former are taken.
    """
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        files = [folder / name for name in sorted(set(_weight_map(indices[0]).values()))]
        for path in files:
            if not path.is_file():
                raise ValueError(f"{path} is missing, but {indices[0].name} lists it")
        return files
    for pattern in ("*.safetensors", "*.pt", "*.bin"):
        files = [p for p in sorted(folder.glob(pattern)) if not p.stem.endswith(MAP_SUFFIX)]
        if len(files) == 2 and files[1].stem == files[0].stem + FLOAT8_SUFFIX:
            files = files[:1]
        if len(files) == 1 or (files and pattern == "*.safetensors"):
            return files
        if files:
            raise ValueError(f"{folder} has {len(files)} {pattern} files; name one as input")
    raise ValueError(f"{folder} holds no .safetensors, .pt or .bin file and no checkpoint")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return json.loads(index.read_text())["weight_map"]
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{index} is not a safetensors index ({error}); copy it again") from error


class ShardedWriter:
    """Write safetensors shards tensor by tensor; nothing but the current tensor is in memory.

    Every shape is known in advance, so headers come first and values are appended. Files get their
    final names in ``finish``: an interrupted conversion leaves only ``*.incomplete``.

    Args:
        folder: Created if missing; must hold no safetensors yet.
        stem: Name of the files before ``.safetensors`` or ``-00001-of-00003.safetensors``.
        infos: Every tensor, in the order it will be written.
        max_shard_bytes: A file is closed before it exceeds this, unless one tensor alone does.

    Raises:
        ValueError: the folder already holds weights, or the disk is too small.
    """

    def __init__(
        self, folder: Path, stem: str, infos: Mapping[str, TensorInfo], max_shard_bytes: int
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.glob("*.safetensors")):
            raise ValueError(f"output={folder} already holds safetensors; choose a new folder")
        total = sum(info.num_bytes for info in infos.values())
        if (free := shutil.disk_usage(folder).free) < total:
            raise ValueError(
                f"output={folder} needs {total / GIB:.1f} GiB, but its disk has "
                f"{free / GIB:.1f} GiB free"
            )
        self._folder, self._stem, self._infos, self._total = folder, stem, infos, total
        self._shards = _plan_shards(infos, max_shard_bytes)
        self._shard_of = {key: i for i, shard in enumerate(self._shards) for key in shard}
        self._current = -1
        self._file: Any = None
        self._pending = iter(infos)

    def write(self, key: str, tensor: Tensor) -> None:
        """Append the next tensor of ``infos``."""
        assert key == next(self._pending), "tensors must come in the planned order"
        info = self._infos[key]
        assert (tuple(tensor.shape), tensor.dtype) == (info.shape, info.dtype), key
        if self._shard_of[key] != self._current:
            self._open(self._shard_of[key])
        tensor.contiguous().view(-1).view(torch.uint8).numpy().tofile(self._file)

    def finish(self) -> list[Path]:
        """Close and rename the files, write the index if there are several, return the paths."""
        assert next(self._pending, None) is None, "not every planned tensor was written"
        self._close()
        paths = [self._folder / self._name(i) for i in range(len(self._shards))]
        for path in paths:
            path.with_name(path.name + ".incomplete").replace(path)
        if len(paths) > 1:
            names = {key: paths[shard].name for key, shard in self._shard_of.items()}
            index = {"metadata": {"total_size": self._total}, "weight_map": names}
            path = self._folder / f"{self._stem}.safetensors.index.json"
            path.write_text(json.dumps(index, indent=2) + "\n")
        return paths

    def _name(self, shard: int) -> str:
        count = len(self._shards)
        part = "" if count == 1 else f"-{shard + 1:05}-of-{count:05}"
        return f"{self._stem}{part}.safetensors"

    def _open(self, shard: int) -> None:
        self._close()
        self._current = shard
        self._file = (self._folder / (self._name(shard) + ".incomplete")).open("wb")
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        begin = 0
        for key in self._shards[shard]:
            info = self._infos[key]
            offsets = [begin, begin + info.num_bytes]
            header[key] = {
                "dtype": DTYPE_NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": offsets,
            }
            begin = offsets[1]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the format aligns values to 8 bytes
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.flush()  # ndarray.tofile writes past Python's buffer

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _plan_shards(infos: Mapping[str, TensorInfo], max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = []
    filled = 0
    for key, info in infos.items():
        if not shards or filled + info.num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += info.num_bytes
    return shards

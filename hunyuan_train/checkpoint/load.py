"""Reading a checkpoint folder: all tensors, one section, or into another model's."""

import json
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from hunyuan_train.checkpoint.ranks import Ranks, without_dist_warning
from hunyuan_train.checkpoint.storage import (
    METADATA,
    Damage,
    DamagedCheckpointError,
    Manifest,
    find_damage,
    list_steps,
    step_folder,
    step_of,
)
from hunyuan_train.models.hunyuan.config import HunyuanConfig
from hunyuan_train.models.lora import is_adapter

log = logging.getLogger(__name__)

NestedTensors = Mapping[str, Any]
"""Tensors, plain or DTensor, in nested mappings; the first level is called a section (model, ema,
optimizer)."""

FlatTensors = Mapping[str, Tensor]
"""The same as {"section/name": tensor}."""

_MAX_NAMED = 5


def flatten(tensors: NestedTensors, prefix: str = "") -> dict[str, Tensor]:
    """Return {"section/name": tensor}, detached but sharing memory.

    Raises:
        ValueError: A leaf is not a tensor.
    """
    flat: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}/"))
        elif isinstance(value, Tensor):
            flat[f"{prefix}{name}"] = value.detach()
        else:
            raise ValueError(
                f"checkpoint entry {prefix}{name} is a {type(value).__name__}, not a tensor; "
                "plain values belong into extra"
            )
    return flat


def _identity_fields(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _identity_fields(inner, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value


def check_identity(folder: Path, stored: dict[str, Any], ours: dict[str, Any]) -> None:
    """Compare two model configurations; a field that one of them lacks has its default.

    So a checkpoint written before a field existed is that of a model without what it adds.

    Raises:
        ValueError: They differ; the message names every differing field with both values.
    """
    theirs, mine = dict(_identity_fields(stored)), dict(_identity_fields(ours))
    default = dict(_identity_fields(json.loads(json.dumps(asdict(HunyuanConfig())))))
    names = sorted(theirs.keys() | mine.keys())
    pairs = [(name, default.get(name, "(absent)")) for name in names]
    differing = [
        f"{name} is {theirs.get(name, usual)!r} there and {mine.get(name, usual)!r} here"
        for name, usual in pairs
        if theirs.get(name, usual) != mine.get(name, usual)
    ]
    if differing:
        raise ValueError(f"{folder} is a checkpoint of another model: {'; '.join(differing)}")


def _named(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more


def check_tensors(
    folder: Path, stored: Mapping[str, Any], flat: Mapping[str, Tensor], *, dtypes: bool
) -> None:
    """Compare names, shapes and (if ``dtypes``) types of stored tensors with those to fill.

    Raises:
        ValueError: They differ; the message names the tensors.
    """
    problems: list[str] = []
    if missing := sorted(flat.keys() - stored.keys()):
        problems.append(f"{len(missing)} missing there: {_named(missing)}")
    if unknown := sorted(stored.keys() - flat.keys()):
        problems.append(f"{len(unknown)} unknown here: {_named(unknown)}")
    unlike: list[str] = []
    for name in sorted(flat.keys() & stored.keys()):
        theirs, ours = stored[name], flat[name]
        if tuple(theirs.size) != tuple(ours.shape):
            unlike.append(f"{name} is {list(theirs.size)} there and {list(ours.shape)} here")
        elif dtypes and theirs.properties.dtype != ours.dtype:
            unlike.append(f"{name} is {theirs.properties.dtype} there and {ours.dtype} here")
    if unlike:
        problems.append(f"{len(unlike)} of another shape or type: {_named(unlike)}")
    if problems:
        raise ValueError(f"the tensors of {folder} do not fit the model: {'; '.join(problems)}")


def stored_tensors(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Return shape and type of every tensor in a checkpoint, by flat name."""
    metadata = FileSystemReader(folder).read_metadata()
    return {
        name: entry
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def first_cause(error: CheckpointException) -> str:
    """Return rank, type and message of the first failure behind torch's collective exception."""
    rank, (cause, _) = next(iter(error.failures.items()))
    return f"rank {rank}: {type(cause).__name__}: {cause}"


def read_tensors(folder: Path, flat: dict[str, Tensor], ranks: Ranks) -> None:
    """Fill ``flat`` (stored name -> tensor) in place; every rank reads only the parts it holds.

    Raises:
        DamagedCheckpointError: Some rank cannot read the files; raised on every rank.
    """
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with without_dist_warning():
            load(
                flat,
                storage_reader=FileSystemReader(folder),
                planner=planner,
                process_group=ranks.group,
                no_dist=not ranks.active,
            )
    except CheckpointException as error:  # A BaseException that no caller expects.
        raise DamagedCheckpointError(f"{folder} cannot be read: {first_cause(error)}") from error


def inspect(folder: Path, ranks: Ranks, *, hashes: bool) -> tuple[Manifest | None, list[Damage]]:
    """Read the manifest and check all files of a checkpoint, the ranks sharing the files.

    Every rank gets the same answer. The manifest is None if it cannot be read.
    """
    manifest: Manifest | None = None
    problem: Damage | None = None
    if ranks.is_first:
        try:
            manifest = Manifest.read(folder)
        except DamagedCheckpointError as error:
            problem = Damage(file=folder.name, reason=f"has no usable manifest: {error}")
        except (OSError, ValueError) as error:  # Not raised: the other ranks wait for the answer.
            problem = Damage(file=folder.name, reason=f"cannot be read: {error}", certain=False)
    manifest, problem = ranks.from_first((manifest, problem))
    if manifest is None:
        assert problem is not None
        return None, [problem]
    if re.fullmatch(r"step-\d+", folder.name) and step_of(folder) != manifest.step:
        reason = f"holds step {manifest.step}: it was copied or renamed"
        return manifest, [Damage(file=folder.name, reason=reason)]
    names = sorted(manifest.files)
    if METADATA not in names:
        return manifest, [Damage(file=METADATA, reason="is not in the manifest")]
    mine = find_damage(folder, manifest, names[ranks.rank :: ranks.world_size], hashes=hashes)
    return manifest, [damage for part in ranks.gather(mine) for damage in part]


def describe(damage: list[Damage]) -> str:
    """Return one line naming the damaged files with their reasons."""
    return _named([str(entry) for entry in damage])


def find_checkpoint(folder: str | Path) -> Path:
    """Return the checkpoint meant by a run folder, its checkpoints folder or a ``step-...`` folder.

    Of several the newest with a readable manifest and files of the right size is taken.

    Raises:
        ValueError: There is none.
    """
    folder = Path(folder)
    if (folder / METADATA).exists() or folder.name.startswith("step-"):
        return folder
    root = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    for step in reversed(list_steps(root)):
        candidate = step_folder(root, step)
        _, damage = inspect(candidate, Ranks(alone=True), hashes=False)
        if not damage:
            return candidate
        log.warning("%s is damaged and skipped: %s", candidate, describe(damage))
    raise ValueError(f"{folder} holds no checkpoint: give a run folder or a step-... folder")


def _inspected(folder: Path, ranks: Ranks, *, hashes: bool) -> Manifest:
    manifest, damage = inspect(folder, ranks, hashes=hashes)
    if manifest is None or damage:
        raise ValueError(f"{folder} is damaged: {describe(damage)}")
    return manifest


def read_manifest(folder: str | Path) -> Manifest:
    """Return the manifest of a checkpoint: its step, model identity and counters."""
    return Manifest.read(find_checkpoint(folder))


def section_to_read(path: Path, stored: Mapping[str, Any], wanted: str) -> str:
    """Return the section to read for ``wanted``: of a run with memory.ema=off its weights."""
    if wanted == "ema" and stored and not any(name.startswith("ema/") for name in stored):
        log.info("%s was trained without a moving average: its weights are taken", path)
        return "model"
    return wanted


def members(
    stored: Mapping[str, Any], section: str, wanted: Collection[str] | None = None
) -> dict[str, str]:
    """Return where the tensors of a section are, as {name in the section: stored name}.

    The average of a run with adapters holds these alone. Where more is wanted, or nothing said, the
    frozen weights are its other tensors.
    """
    inside = {n.removeprefix(f"{section}/"): n for n in stored if n.startswith(f"{section}/")}
    if section != "ema" or not inside or not all(map(is_adapter, inside)):
        return inside
    if wanted is not None and inside.keys() >= set(wanted):
        return inside
    return members(stored, "model") | inside


def open_checkpoint(
    folder: str | Path, ranks: Ranks, *, verify: bool = True
) -> tuple[Path, Manifest]:
    """Find the checkpoint that a folder means, the same on all ranks, and check its files.

    Raises:
        ValueError: There is none, or it is damaged; raised on every rank.
    """
    path, problem = Path(folder), ""
    if ranks.is_first:
        try:
            path = find_checkpoint(folder)
        except ValueError as error:  # The other ranks wait for the answer.
            problem = str(error)
    path, problem = ranks.from_first((path, problem))
    if problem:
        raise ValueError(problem)
    return path, _inspected(path, ranks, hashes=verify)


def load_weights(
    folder: str | Path, which: str = "ema", *, verify: bool = True
) -> dict[str, Tensor]:
    """Read one section of a checkpoint into ordinary CPU tensors, in this process alone.

    Args:
        folder: Run folder, checkpoints folder or ``step-...`` folder.
        which: Section to read, "ema" or "model"; the weights stand in for an average that a run
            did not keep.
        verify: Compare the files with their hashes first.

    Raises:
        ValueError: There is no checkpoint, it is damaged, or it has no such section.
    """
    path, ranks = find_checkpoint(folder), Ranks(alone=True)
    _inspected(path, ranks, hashes=verify)
    stored = stored_tensors(path)
    which = section_to_read(path, stored, which)
    found = members(stored, which)
    flat = {
        key: torch.empty(stored[key].size, dtype=stored[key].properties.dtype)
        for key in found.values()
    }
    if not flat:
        sections = sorted({name.split("/")[0] for name in stored})
        raise ValueError(f"{path} has no section {which!r}; it has {', '.join(sections)}")
    read_tensors(path, flat, ranks)
    return {name: flat[key] for name, key in found.items()}


def restore_into(
    folder: str | Path,
    tensors: NestedTensors,
    *,
    sections: Mapping[str, str] | None = None,
    identity: dict[str, Any] | None = None,
    group: dist.ProcessGroup | None = None,
    verify: bool = True,
) -> Manifest:
    """Fill tensors in place from some sections of a checkpoint.

    Every rank calls it. Types are converted, shapes must agree. It serves the step from one stage
    to the next, where only weights are carried over. For an average that the run did not keep its
    weights are taken.

    Args:
        folder: Run folder, checkpoints folder or ``step-...`` folder.
        tensors: {section: {name: tensor}} to fill, plain or DTensor.
        sections: Section to read for a section of ``tensors``, e.g. {"model": "ema"}; the same name
            by default.
        identity: The model's configuration, compared with the stored one if given.
        group: Group of the ranks that load together.
        verify: Compare the files with their hashes first.

    Raises:
        ValueError: No checkpoint, a damaged one, one of another model, or names or shapes that do
            not fit.
    """
    ranks = Ranks(group)
    path, manifest = open_checkpoint(folder, ranks, verify=verify)
    if identity is not None:
        check_identity(path, manifest.identity, identity)
    stored = stored_tensors(path)
    for name, value in tensors.items():
        source = section_to_read(path, stored, (sections or {}).get(name, name))
        live = flatten(value)
        found = members(stored, source, live)
        flat = {found.get(n, f"{source}/{n}"): tensor for n, tensor in live.items()}
        chosen = {key: stored[key] for key in found.values()}
        check_tensors(path, chosen, flat, dtypes=False)
        read_tensors(path, flat, ranks)
    return manifest

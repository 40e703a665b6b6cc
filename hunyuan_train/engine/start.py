"""What a stage takes over from another run: weights, average, moments, schedule, place in the data.

Every rank reads the parts it holds, whatever layout and engine wrote them. Where the model is
larger than the one before, ``stage.transform`` says how: the few tensors that differ are read whole
by every rank, changed, and cut again.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hunyuan_train.checkpoint.load import (
    check_tensors,
    flatten,
    members,
    open_checkpoint,
    read_tensors,
    section_to_read,
    stored_tensors,
)
from hunyuan_train.checkpoint.ranks import Ranks
from hunyuan_train.checkpoint.storage import Manifest
from hunyuan_train.checkpoint.tensor_files import open_source
from hunyuan_train.config.compose import config_dict
from hunyuan_train.config.curriculum import Carried, Transform
from hunyuan_train.config.model_changes import model_identity, unexplained
from hunyuan_train.config.root import RunConfig
from hunyuan_train.config.run import Trains
from hunyuan_train.engine.state import TrainState, scheduled_rate
from hunyuan_train.engine.task import Task
from hunyuan_train.memory.config import StateType
from hunyuan_train.models.lora import is_adapter
from hunyuan_train.parallel.view import fill_part

log = logging.getLogger(__name__)

INPUT_WEIGHT = "img_in.proj.weight"
"""[D, C, pt, ph, pw]: what ``input_channels`` widens, in its second dim."""
_EMBEDDER = "guidance_in."
"""Begin of the names that ``guidance_embed`` adds."""
_LAST = "guidance_in.mlp.2."
"""Those of them that begin at zero."""


def start_from(state: TrainState, cfg: RunConfig) -> None:
    """Take over from ``stage.init_from`` what ``stage.carry`` names, as ``stage.transform`` says.

    The state holds what a fresh run does; what is not carried stays so. A run gives all of it, a
    folder that ``convert`` wrote one set of weights, which is also the average.

    Raises:
        ValueError: naming what is missing, damaged, of another shape, or of another model.
    """
    source = Path(cfg.stage.init_from)
    if any(source.glob("*.safetensors")):
        _take_folder(state, cfg, source)
    else:
        _take_run(state, cfg, source)
    state.updates.weights_changed()


def _take_run(state: TrainState, cfg: RunConfig, source: Path) -> None:
    stage, carried = cfg.stage, set(cfg.stage.carry)
    path, manifest = open_checkpoint(source, Ranks())
    if "lora" in manifest.identity and not cfg.lora.rank:
        raise ValueError(
            f"{path} has adapters beside its weights, and this stage has none; add them up with "
            "`hunyuan-train convert` and start from that folder, or set lora.rank"
        )
    new = "lora" not in manifest.identity
    whole = cfg.stage.trains is Trains.vae or not new
    now = model_identity(cfg) if whole else config_dict(cfg.model)
    if reasons := unexplained(manifest.identity, now, stage.transform):
        raise ValueError(f"{path} is a checkpoint of another model: {'; '.join(reasons)}")
    reading = _Reading(path, frozenset(stage.transform), bool(cfg.lora.rank) and new)
    weights = state.weights()
    reading.fill("model" if Carried.weights in carried else "ema", weights["model"])
    if Carried.ema not in carried:
        state.ema.reset()
    elif "ema" in weights:
        reading.fill("ema", weights["ema"])
    if Carried.optimizer in carried:
        int8 = cfg.memory.optimizer_states is StateType.int8
        if int8 and Transform.input_channels in stage.transform:
            raise ValueError(
                "stage.carry has optimizer and stage.transform has input_channels, but 8-bit "
                "moments cannot be widened; leave optimizer out or set "
                "memory.optimizer_states=float32"
            )
        reading.fill("optimizer", state.tensors()["optimizer"])
    if state.task is not None:
        _take_others(state.task, path, reading, Carried.optimizer in carried)
    _take_counters(state, cfg, manifest)


def _take_others(task: Task, path: Path, reading: "_Reading", moments: bool) -> None:
    """Take over what learns beside the model, where the run before had it."""
    there = {name.partition("/")[0] for name in stored_tensors(path)}
    for section, tensors in task.tensors().items():
        if section in there and (moments or not section.endswith("_optimizer")):
            reading.fill(section, tensors)


def _take_counters(state: TrainState, cfg: RunConfig, manifest: Manifest) -> None:
    """Go on with average, schedule and data where the checkpoint's run was, as far as asked."""
    carried, then = cfg.stage.carry, manifest.extra
    if Carried.ema in carried and (not cfg.lora.rank or "lora" in manifest.identity):
        state.averaged_before = then.get("averaged_before", 0) + then["step"]
    if Carried.schedule in carried:
        state.scheduled_before = then.get("scheduled_before", 0) + then["step"]
        rate, old = scheduled_rate(state, cfg), then.get("lr")
        level = logging.INFO
        if old and abs(rate - old) > 0.05 * old:
            level = logging.WARNING
        log.log(
            level,
            "the schedule goes on after %d updates: the learning rate was %s and is %g",
            state.scheduled_before, f"{old:g}" if old else "unknown", rate,
        )  # fmt: skip
    if Carried.loader in carried:
        state.loader.load_state_dict(then["loader"])


@dataclass(frozen=True)
class _Reading:
    """A checkpoint of which some sections are read."""

    path: Path
    transforms: frozenset[Transform]
    new_adapters: bool = False
    """Whether the model's adapters begin here, so that nothing of them is in the checkpoint."""

    def fill(self, section: str, live: Mapping[str, Any]) -> None:
        """Fill tensors by parameter name, or {parameter: {key: tensor}}, from a section.

        Raises:
            ValueError: names or shapes differ by more than the transforms explain.
        """
        stored = stored_tensors(self.path)
        section = section_to_read(self.path, stored, section)
        parts = flatten(live)
        found = members(stored, section, parts)
        chosen = {key: stored[key] for key in found.values()}
        reads: dict[str, Tensor] = {}
        wider: list[tuple[Tensor, Tensor]] = []
        for inside, part in parts.items():
            name, parameter = found.get(inside, f"{section}/{inside}"), inside.split("/")[0]
            if self.new_adapters and is_adapter(parameter):
                continue
            if Transform.guidance_embed in self.transforms and parameter.startswith(_EMBEDDER):
                if section != "optimizer":
                    fill_new(parameter, part)
                continue
            reads[name] = part
            if self._widens(parameter) and part.ndim and name in chosen:
                entry = chosen[name]
                reads[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
                wider.append((part, reads[name]))
        if self.new_adapters and not reads:
            return
        check_tensors(self.path, chosen, reads, dtypes=False)
        read_tensors(self.path, reads, Ranks())
        for part, whole in wider:
            fill_part(part, widened(whole, part.shape, str(self.path)))

    def _widens(self, parameter: str) -> bool:
        return Transform.input_channels in self.transforms and parameter == INPUT_WEIGHT


def _take_folder(state: TrainState, cfg: RunConfig, source: Path) -> None:
    """Take weights from safetensors, tensor by tensor."""
    stage, transforms = cfg.stage, cfg.stage.transform
    if more := set(stage.carry) - {Carried.weights, Carried.ema}:
        raise ValueError(
            f"stage.init_from={source} holds weights alone, but stage.carry names "
            f"{', '.join(sorted(more))}; leave that out, or start from a run"
        )
    tensors = open_source(source, ema=False)
    views = state.weights()["model"]
    added = _EMBEDDER if Transform.guidance_embed in transforms else None
    for name, view in views.items():
        if added and name.startswith(added) and name not in tensors.infos:
            continue
        if is_adapter(name):
            continue
        if name not in tensors.infos:
            raise ValueError(f"stage.init_from={source} lacks the tensor {name} of this model")
        found, wanted = tuple(tensors.infos[name].shape), tuple(view.shape)
        if name == INPUT_WEIGHT and Transform.input_channels in transforms:
            found = (found[0], max(found[1], wanted[1]), *found[2:])
        if found != wanted:
            raise ValueError(
                f"stage.init_from={source}: {name} is {list(tensors.infos[name].shape)} there and "
                f"{list(wanted)} in this model; choose the model config it was made with"
            )
    for name, view in views.items():
        if is_adapter(name):
            continue
        if name not in tensors.infos:
            fill_new(name, view)
        elif name == INPUT_WEIGHT:
            fill_part(view, widened(tensors.read(name), view.shape, str(source)))
        else:
            fill_part(view, tensors.read(name))
    state.updates.weights_changed()
    state.ema.reset()


@torch.no_grad()
def fill_new(name: str, part: Tensor) -> None:
    """Set the last projection of a new guidance embedder to zero; the rest is drawn already."""
    if name.startswith(_LAST):
        fill_part(part, torch.zeros(()).expand(part.shape))


@torch.no_grad()
def widened(weight: Tensor, shape: torch.Size, where: str) -> Tensor:
    """Return a patch projection [D, C, ...], or a moment of it, with more channels that are zero.

    Raises:
        ValueError: more differs than the channels, or there are fewer.
    """
    if len(weight.shape) != len(shape) or weight.shape[1] > shape[1] or (
        (weight.shape[0], *weight.shape[2:]) != (shape[0], *shape[2:])
    ):  # fmt: skip
        raise ValueError(
            f"{where}: {INPUT_WEIGHT} is {list(weight.shape)} there and {list(shape)} here, "
            "which input_channels does not explain"
        )
    wide = torch.zeros(shape, dtype=weight.dtype)
    wide[:, : weight.shape[1]] = weight
    return wide

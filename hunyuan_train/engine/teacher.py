"""The frozen teacher of a guidance distillation: built, filled, and asked for targets.

It is a second model on the student's ranks with the student's tensor and context parallelism. With
``parallel.zero_stage=3`` its weights are sharded like the student's; below, every rank has them
whole. They are kept in the compute dtype, for nothing is ever added to them.
"""

import json
import logging
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from hunyuan_train.checkpoint.load import find_checkpoint, read_manifest, restore_into
from hunyuan_train.checkpoint.tensor_files import open_source
from hunyuan_train.config.compose import config_dict
from hunyuan_train.config.root import RunConfig
from hunyuan_train.engine.inputs import ModelInputs
from hunyuan_train.memory.config import MemoryConfig, Switch, WeightType
from hunyuan_train.models.hunyuan.config import HunyuanConfig
from hunyuan_train.models.registry import build_model, sharding_plan
from hunyuan_train.objectives.distillation import guided_velocity
from hunyuan_train.objectives.flow_matching import TIME_SCALE
from hunyuan_train.parallel.apply import ParallelModel, parallelize
from hunyuan_train.parallel.config import Offload, ParallelConfig, ReduceEvery, ZeroEngine
from hunyuan_train.parallel.mesh import Axes
from hunyuan_train.parallel.view import fill_part
from hunyuan_train.runtime.dist import World, gather_objects

TEACHER_NAME = "teacher.json"
"""File in the run's folder that names the teacher's weights, so that a restart takes the same."""

log = logging.getLogger(__name__)


class Teacher:
    """Predicts the guided velocity that a student learns."""

    def __init__(self, module: nn.Module) -> None:
        """Freeze ``module``, a laid-out model without guidance embedder whose weights are set."""
        self.module = module.eval().requires_grad_(False)

    @torch.no_grad()
    def target(self, x: ModelInputs) -> Tensor:
        """Return ``uncond + w * (cond - uncond)``, shaped like ``x.target``, in float32 at least.

        Both predictions are of the latents and time that the student gets.

        Args:
            x: The student's inputs, with its scales as guidance and the empty caption.
        """
        assert x.guidance is not None, "a student is told its scale"
        assert x.empty is not None
        cond = replace(x, guidance=None)
        uncond = replace(
            cond, text=x.empty.text, text_mask=x.empty.text_mask, pooled=x.empty.pooled
        )
        velocities = [self.module(*inputs.arguments()) for inputs in (cond, uncond)]
        return guided_velocity(*velocities, scale=x.guidance / TIME_SCALE)


def teacher_model(student: HunyuanConfig) -> HunyuanConfig:
    """Return the model whose weights a student can learn from: its own, not told any scale."""
    return replace(student, guidance_embed=False)


def build_teacher(cfg: RunConfig, axes: Axes, world: World) -> Teacher:
    """Lay the teacher of ``cfg`` out on the student's ranks and read its weights.

    Every rank calls it. Of a run the moving average is taken.

    Raises:
        ValueError: there is no teacher, it is told a scale itself, or another model than the
            student.
    """
    source = find_teacher(cfg, world)
    model = lay_out_teacher(cfg, axes, world.device)
    views = {n: model.view(n, p.detach()) for n, p in model.module.named_parameters()}
    if any(source.glob("*.safetensors")):
        tensors = open_source(source, ema=False)
        missing = sorted(views.keys() - tensors.infos.keys())
        if missing:
            raise ValueError(
                f"objective.teacher={source} lacks the tensor {missing[0]} of this model; choose "
                "the model config it was made with"
            )
        for name, view in views.items():
            fill_part(view, tensors.read(name))
    else:
        restore_into(source, {"model": views}, sections={"model": "ema"})
    log.info("distilling the guidance of %s", source)
    return Teacher(model.module)


def lay_out_teacher(cfg: RunConfig, axes: Axes, device: torch.device) -> ParallelModel:
    """Return the teacher's model on ``axes``, its weights not set.

    Args:
        cfg: The student's config.
        axes: The student's place.
        device: Of this rank.
    """
    wanted, layout = teacher_model(cfg.model), cfg.parallel
    with torch.device("meta"):
        module = build_model(wanted)
    if layout.compute_dtype == "float64":
        module = module.double()
    narrow = layout.compute_dtype == "bfloat16"
    memory = MemoryConfig(
        weights=WeightType.bfloat16 if narrow else WeightType.float32, offload=Switch.off
    )
    model = parallelize(module, sharding_plan(wanted), axes, teacher_layout(layout), memory)
    model.module.to_empty(device=device)
    return model


def teacher_layout(layout: ParallelConfig) -> ParallelConfig:
    """Return the layout of the teacher beside a student in ``layout``.

    There is no gradient or optimizer to shard, so below stage 3 nothing is.
    """
    torch_only = {
        "zero_engine": ZeroEngine.torch,
        "offload_optimizer": Offload.none,
        "reduce_every": ReduceEvery.auto,
    }
    if layout.zero_stage == 3:
        return replace(layout, **torch_only)
    # compute_dtype is what fully_shard casts to, and it has nothing to do.
    return replace(layout, **torch_only, zero_stage=0, compute_dtype="float32")


def find_teacher(cfg: RunConfig, world: World) -> Path:
    """Return the checkpoint, or folder of weights, of the teacher: at a restart the same one.

    Raises:
        ValueError: there is none, or it does not fit the student.
    """
    found, problem = Path(), ""
    if world.rank == 0:
        try:
            found = _find(cfg)
        except ValueError as error:  # The other ranks wait for the answer.
            problem = str(error)
    found, problem = gather_objects((found, problem))[0]
    if problem:
        raise ValueError(problem)
    return found


def _find(cfg: RunConfig) -> Path:
    named = cfg.objective.teacher or cfg.stage.init_from
    if not named:
        raise ValueError(
            "objective.distill=true needs a teacher; set objective.teacher, or stage.init_from, to "
            "the run whose guidance is distilled"
        )
    note = Path(cfg.run.dir) / TEACHER_NAME
    noted = json.loads(note.read_text()) if note.is_file() else {}
    if noted.get("named") == named:
        found = Path(noted["weights"])
        if not found.is_dir():
            raise ValueError(
                f"{found} is gone, the teacher this run was started with ({note}); bring it back, "
                "or distill from the beginning in a new run.dir"
            )
    else:
        found = Path(named) if any(Path(named).glob("*.safetensors")) else find_checkpoint(named)
    check_teacher(cfg.model, found)
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps({"named": named, "weights": str(found)}, indent=1) + "\n")
    return found


def check_teacher(student: HunyuanConfig, source: Path) -> None:
    """Compare the model of a teacher's weights with what the student needs.

    Raises:
        ValueError: naming the fields that differ.
    """
    if any(source.glob("*.safetensors")):
        beside = source / "config.json"
        theirs = json.loads(beside.read_text()) if beside.is_file() else {}
    else:
        theirs = read_manifest(source).identity
    if theirs.get("guidance_embed"):
        raise ValueError(
            f"objective.teacher={source} takes a guidance scale itself, so it has nothing left to "
            "distill; choose the run before its distillation (model.guidance_embed=false)"
        )
    mine = config_dict(teacher_model(student))
    differing = [
        f"model.{name} is {theirs[name]} there and {mine[name]} here"
        for name in sorted(theirs.keys() & mine.keys())
        if theirs[name] != mine[name]
    ]
    if differing:
        raise ValueError(
            f"objective.teacher={source} is another model than the student: "
            f"{', '.join(differing)}; give the student the teacher's sizes"
        )

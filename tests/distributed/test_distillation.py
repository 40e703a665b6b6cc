"""Guidance distillation: every layout learns what one process learns, and restarts are exact."""

from pathlib import Path

import pytest
import torch
from distributed import run_distributed
from tiny_run import make_data, overrides, rows
from train_all import train_all

from hunyuan_train.checkpoint.load import load_weights

pytestmark = pytest.mark.dist

SIZES = ["model.num_double_blocks=2", "model.num_single_blocks=2", "model.mlp_ratio=2",
         "model.num_heads=4", "model.hidden_size=32", "model.rope_axes=[2,2,4]"]  # fmt: skip
STUDENT = [*SIZES, "model.guidance_embed=true", "objective.distill=true"]
TWO = {
    "zero0": "zero_stage=0",
    "zero2": "zero_stage=2",
    "zero2 reducing every micro-step": "zero_stage=2 reduce_every=micro_step",
    "zero3": "zero_stage=3",
    "tp2+sp": "tp=2 sp=true",
    "ring2": "cp_ring=2",
    "ulysses2, zero3": "cp_ulysses=2 zero_stage=3",
    "deepspeed3": "zero_engine=deepspeed zero_stage=3",
}


def write_teacher(folder: Path) -> Path:
    """Write weights of a model without a guidance embedder, none of them zero."""
    from safetensors.torch import save_file

    from hunyuan_train.config.compose import compose_config
    from hunyuan_train.models.registry import build_model
    from hunyuan_train.runtime.seed import keyed_normal

    model = build_model(compose_config(SIZES).model)
    weights = {n: 0.1 * keyed_normal(tuple(p.shape), 1, n) for n, p in model.named_parameters()}
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    return folder


def distil(
    rank: int, world: int, layouts: dict[str, str], dtype: str, folder: str
) -> dict[str, list[float]]:
    """Return losses and norms of two updates of each layout, "" for one process alone."""
    from hunyuan_train.config.compose import compose_config
    from hunyuan_train.data.buckets import Bucket
    from hunyuan_train.engine.build import init_weights, lay_out
    from hunyuan_train.engine.state import TrainState
    from hunyuan_train.engine.step import train_step
    from hunyuan_train.engine.teacher import build_teacher
    from hunyuan_train.engine.trial import MicroBatch, make_batch
    from hunyuan_train.models.spec import InitKind, InitRule
    from hunyuan_train.optim.ema import Ema
    from hunyuan_train.optim.updates import build_updates
    from hunyuan_train.parallel.mesh import Axes, build_axes
    from hunyuan_train.resilience.guard import Guard
    from hunyuan_train.runtime.dist import World

    shapes = [
        MicroBatch(Bucket(9, 64, 64), (8, 4)),
        MicroBatch(Bucket(1, 80, 112), (3,)),
        MicroBatch(Bucket(1, 64, 64), (6, 6, 2)),
        MicroBatch(Bucket(9, 64, 64), (5,)),
    ]
    found = {}
    for name, fields in layouts.items():
        cfg = compose_config(
            [
                *STUDENT,
                "optimizer.warmup_steps=0",
                f"objective.teacher={folder}/teacher",
                f"parallel.compute_dtype={dtype}",
                *(f"parallel.{field}" for field in fields.split()),
            ]
        )
        cfg.run.dir = f"{folder}/{name}-{world}"
        here = World(rank=rank, local_rank=rank, size=world, device=torch.device("cpu"))
        alone = world == 1
        axes = Axes.alone() if alone else build_axes(cfg.parallel, "cpu", world)
        model, rules = lay_out(cfg, axes, here.device)
        updates = build_updates(model, cfg.parallel, cfg.optimizer)
        init_weights(updates, dict.fromkeys(rules, InitRule(InitKind.NORMAL, 0.05)), 0)
        state = TrainState(
            model=model,
            updates=updates,
            ema=Ema(model.module, cfg.optimizer, updates.local_weights()),
            loader=None,  # pyright: ignore[reportArgumentType]
            guard=Guard(cfg.resilience),
            skipped_updates=torch.zeros(()),
            teacher=build_teacher(cfg, axes, here),
        )
        assert state.teacher is not None
        assert not any(p.requires_grad for p in state.teacher.module.parameters())
        numbers = []
        for step in range(2):
            batches = [
                make_batch(cfg, shapes[i], 4 * step + i, 10)
                for i in range(axes.rank("dp"), 4, axes.size("dp"))
            ]
            metrics = train_step(state, batches, cfg, here, 1.0)
            numbers += [metrics.loss.item(), metrics.grad_norm.item()]
        found[name] = numbers
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_layout_learns_what_one_process_learns(tmp_path: Path, dtype: str) -> None:
    write_teacher(tmp_path / "teacher")
    layouts = TWO
    if dtype == "bfloat16":
        layouts = {name: TWO[name] for name in ("zero2", "ulysses2, zero3")}
    (alone,) = run_distributed(distil, 1, {"": "zero_stage=0"}, "float32", str(tmp_path))
    tolerance = 2e-2 if dtype == "bfloat16" else 1e-5
    for ranks in run_distributed(distil, 2, layouts, dtype, str(tmp_path), timeout_s=200):
        for name, numbers in ranks.items():
            assert numbers == pytest.approx(alone[""], rel=tolerance), name


@pytest.mark.slow
def test_a_resumed_distillation_is_bitwise_the_straight_one(tmp_path: Path) -> None:
    data = make_data(tmp_path, num_clips=4, num_images=2)
    source, straight, broken = (tmp_path / name for name in ("source", "straight", "broken"))

    def student(run: Path, *extra: str) -> list[str]:
        return overrides(
            data, run, "model.guidance_embed=true", "objective.distill=true",
            f"stage.init_from={source}", "stage.transform=[guidance_embed]", "stage.carry=[ema]",
            "parallel.zero_stage=3", *extra,
        )  # fmt: skip

    runs = [
        overrides(data, source, "stage.steps=4", "optimizer.lr=1e-2"),
        student(straight),
        student(broken, "stage.steps=3"),
        # The teacher's run goes on meanwhile; what is distilled stays.
        overrides(
            data, source, "stage.steps=8", "optimizer.lr=1e-2", "run.accept_changes=true"
        ),
        student(broken, "run.accept_changes=true"),
    ]  # fmt: skip
    runs = [[*fields, "certify.at_start=false"] for fields in runs]
    for ends in run_distributed(train_all, 2, runs, timeout_s=280):
        assert ends == ["done"] * 5
    assert [r["loss"] for r in rows(straight)] == [r["loss"] for r in rows(broken)]
    for which in ("model", "ema"):
        one, two = load_weights(straight, which), load_weights(broken, which)
        assert all(torch.equal(one[name], two[name]) for name in one), which

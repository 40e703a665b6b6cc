"""Held-out losses and samples on every layout are those of one process."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from distributed import run_distributed
from tiny_run import make_data, overrides

pytestmark = pytest.mark.dist

TWO = {
    "zero0": "zero_stage=0",
    "zero2": "zero_stage=2",
    "zero3": "zero_stage=3",
    "tp2+sp": "tp=2 sp=true",
    "ring2": "cp_ring=2",
    "ulysses2+zero3": "cp_ulysses=2 zero_stage=3",
}
ENGINES = {
    "deepspeed2": "zero_engine=deepspeed zero_stage=2",
    "deepspeed3": "zero_engine=deepspeed zero_stage=3",
}
FOUR = {
    "dp_replicate2 x dp_shard2": "dp_replicate=2",
    "tp2 x dp_shard2": "tp=2",
    "ring2 x dp_shard2": "cp_ring=2",
}
LAYOUTS = {"two": (2, TWO), "engines": (2, ENGINES), "four": (4, FOUR)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def evaluate(cfg: Any, axes: Any, world: Any) -> dict[str, Any]:
    """Return losses, pixels of this rank, and whether the weights are what they were."""
    import torch

    from hunyuan_train.engine.build import init_weights, lay_out
    from hunyuan_train.engine.held_out import HeldOut, averaged
    from hunyuan_train.engine.showing import Showing
    from hunyuan_train.engine.state import TrainState
    from hunyuan_train.engine.trial import _nowhere_zero
    from hunyuan_train.optim.clip import local_part
    from hunyuan_train.optim.ema import Ema
    from hunyuan_train.optim.updates import build_updates
    from hunyuan_train.resilience.guard import Guard

    model, rules = lay_out(cfg, axes, world.device)
    updates = build_updates(model, cfg.parallel, cfg.optimizer, cfg.memory, cfg.run.seed)
    init_weights(updates, _nowhere_zero(rules), cfg.run.seed)
    state = TrainState(
        model=model,
        updates=updates,
        ema=Ema(model.module, cfg.optimizer, updates.local_weights(), cfg.memory.ema),
        loader=None,
        guard=Guard(cfg.resilience),
        skipped_updates=torch.zeros(()),
    )
    for shadow in state.ema.state_dict().values():
        local_part(shadow).mul_(0.9)
    run = SimpleNamespace(
        cfg=cfg, world=world, state=state, scaling_factor=0.476986, folder=Path(cfg.run.dir)
    )
    held_out, forwards = HeldOut(run), []
    model.module.register_forward_hook(lambda *call: forwards.append(1))
    before = {n: local_part(w).clone() for n, w in updates.local_weights().items()}
    raw = held_out.measure(state, lambda bucket: None)
    with averaged(state):
        ema = held_out.measure(state, lambda bucket: None)
    again = held_out.measure(state, lambda bucket: None)
    kept = all(torch.equal(local_part(w), before[n]) for n, w in updates.local_weights().items())
    pixels: dict[str, Any] = {}
    showing, media = Showing(run), []
    meter = SimpleNamespace(media=lambda step, items: media.extend(items))
    showing.sample(4, lambda: None, meter)()
    if world.rank == 0:
        from hunyuan_train.evaluation.video import read_video

        folder = run.folder / "samples" / "step-00000004"
        pixels = {path.name: read_video(path) for path in folder.glob("*.mp4")}
        assert (folder / "contact_sheet.png").is_file()
    return {
        "rows": raw.row() | ema.row("ema/"),
        "same again": torch.equal(raw.sums, again.sums),
        "kept": kept,
        "forwards": len(forwards),
        "pixels": pixels,
        "media": [item.name for item in media],
    }


def on_ranks(rank: int, world: int, layouts: dict[str, str], data: str, folder: str) -> Any:
    import torch

    from hunyuan_train.config.compose import compose_config
    from hunyuan_train.parallel.mesh import Axes, build_axes
    from hunyuan_train.runtime.dist import World

    fields = (
        f"evaluation.latents={data}/latents", "evaluation.every_steps=2",
        "evaluation.sample_every=4", "evaluation.samples_per_bucket=2",
        "sample.frames=5", "sample.height=64", "sample.width=64",
        "sample.steps=2", "sample.cfg_scale=2", "sample.crf=0",
        'evaluation.prompts=["a red circle", "a blue square", "a green star"]',
    )  # fmt: skip
    here = World(rank=rank, local_rank=rank, size=world, device=torch.device("cpu"))
    results = {}
    if rank == 0:
        cfg = compose_config(overrides(Path(data), Path(folder) / "alone", *fields))
        cfg.parallel.zero_stage = 0
        lone = World(rank=0, local_rank=0, size=1, device=here.device)
        results["alone"] = _alone(cfg, Axes.alone(), lone)
    for name, layout in layouts.items():
        chosen = [f"parallel.{field}" for field in layout.split()]
        cfg = compose_config(overrides(Path(data), Path(folder) / name, *fields, *chosen))
        results[name] = evaluate(cfg, build_axes(cfg.parallel, "cpu", world), here)
    return results


def _alone(cfg: Any, axes: Any, world: Any) -> dict[str, Any]:
    """Evaluate in one process of a group: what is sent to all ranks stays here."""
    from unittest.mock import patch

    with (
        patch("hunyuan_train.engine.held_out.broadcast_from_first", lambda values: values),
        patch("hunyuan_train.engine.showing.gather_objects", lambda value: [value]),
    ):
        return evaluate(cfg, axes, world)


@pytest.mark.parametrize("which", ["two", "engines", pytest.param("four", marks=pytest.mark.again)])
def test_every_layout_measures_and_samples_what_one_process_does(
    data: Path, tmp_path: Path, which: str
) -> None:
    world, layouts = LAYOUTS[which]
    ranks = run_distributed(on_ranks, world, layouts, str(data), str(tmp_path), timeout_s=240)
    alone = ranks[0]["alone"]
    assert alone["rows"]["ema/loss"] != pytest.approx(alone["rows"]["loss"], rel=1e-3)
    assert sorted(alone["pixels"]) == ["000-0.mp4", "001-0.mp4", "002-0.mp4"]
    for name in layouts:
        results = [rank[name] for rank in ranks]
        first = results[0]
        assert all(r["rows"] == first["rows"] for r in results), f"{name}: ranks disagree"
        assert len({r["forwards"] for r in results}) == 1, name
        assert all(r["kept"] and r["same again"] for r in results), name
        assert first["rows"] == pytest.approx(alone["rows"], rel=2e-5), name
        assert first["media"] == ["samples/all", *(f"samples/00{n}-0" for n in range(3))]
        for file, pixels in alone["pixels"].items():
            assert (first["pixels"][file] - pixels).abs().max() < 0.05, (name, file)

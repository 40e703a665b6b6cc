"""A checkpoint of any layout is resumed under any other, and by the other engines.

Every layout trains an update, saves, and trains two more, of which the first is its replay token.
Then every layout resumes from every one of these checkpoints; moments are compared by their digests
and, under the same layout, by the second update. One job per number of ranks and
phase; importing the other engines takes seconds.
"""

from pathlib import Path

import pytest
from distributed import run_distributed

pytestmark = [pytest.mark.dist, pytest.mark.slow]

LAYOUTS = {
    1: {"1": "zero_stage=0"},
    2: {
        "tp2": "tp=2",
        "ring2": "cp_ring=2",
        "zero3 x 2": "zero_stage=3",
        "deepspeed2": "zero_engine=deepspeed zero_stage=2",
        "megatron tp2": "tensor_engine=megatron tp=2",
    },
    4: {"tp2 x zero2": "tp=2 zero_stage=2", "ring2 x zero2": "cp_ring=2 zero_stage=2"},
    8: {"tp2+sp x ring2 x zero2": "tp=2 sp=true cp_ring=2 zero_stage=2"},
}
ENGINES = ("deepspeed2", "megatron tp2")
"""To and from one process and themselves only."""
MODEL = [
    *("model.num_double_blocks=1", "model.num_single_blocks=1", "model.mlp_ratio=2"),
    *("model.num_heads=4", "model.hidden_size=32", "model.rope_axes=[2,2,4]"),
]


def meet(saved: str, loaded: str) -> bool:
    """Whether the matrix has this pair."""
    engine = saved in ENGINES or loaded in ENGINES
    return not engine or saved == loaded or "1" in (saved, loaded)


class Trial:
    """A small training state under one layout, with batches made up by number."""

    def __init__(self, rank: int, world: int, name: str, fields: str, folder: str) -> None:
        import torch

        from hunyuan_train.checkpoint.config import CheckpointConfig
        from hunyuan_train.checkpoint.manager import CheckpointManager
        from hunyuan_train.config.compose import compose_config
        from hunyuan_train.data.buckets import Bucket
        from hunyuan_train.engine.build import init_weights, lay_out
        from hunyuan_train.engine.state import TrainState
        from hunyuan_train.engine.trial import MicroBatch, _nowhere_zero
        from hunyuan_train.optim.ema import Ema
        from hunyuan_train.optim.updates import build_updates
        from hunyuan_train.parallel.mesh import Axes, build_axes
        from hunyuan_train.resilience.guard import Guard
        from hunyuan_train.runtime.dist import World

        overrides = [f"parallel.{field}" for field in fields.split()]
        shared = ["optimizer.warmup_steps=0", "run.device=cpu", "parallel.compute_dtype=float32"]
        self.cfg = compose_config([*MODEL, *shared, *overrides])
        self.axes = Axes.alone() if world == 1 else build_axes(self.cfg.parallel, "cpu", world)
        self.world = World(rank=rank, local_rank=rank, size=world, device=torch.device("cpu"))
        model, rules = lay_out(self.cfg, self.axes, self.world.device)
        updates = build_updates(model, self.cfg.parallel, self.cfg.optimizer)
        init_weights(updates, _nowhere_zero(rules), self.cfg.run.seed)
        self.state = TrainState(
            model=model,
            updates=updates,
            ema=Ema(model.module, self.cfg.optimizer, updates.local_weights()),
            loader=None,
            guard=Guard(self.cfg.resilience),
            skipped_updates=torch.zeros(()),
        )
        self.name = f"{name} on {world}"
        self.shapes = [
            MicroBatch(Bucket(9, 64, 64), (8, 4)),
            MicroBatch(Bucket(1, 64, 64), (8,)),
        ]
        settings = CheckpointConfig(replay_tolerance=1e-6)
        self.checkpoints = CheckpointManager(Path(folder) / name, settings, {"model": "small"})

    def update(self):
        """Train one update and return what it came to."""
        from hunyuan_train.checkpoint.replay import ReplayToken
        from hunyuan_train.engine.step import train_step
        from hunyuan_train.engine.trial import make_batch

        first = self.state.step * len(self.shapes)
        mine = range(self.axes.rank("dp"), len(self.shapes), self.axes.size("dp"))
        batches = [make_batch(self.cfg, self.shapes[i], first + i, 10) for i in mine]
        metrics = train_step(self.state, batches, self.cfg, self.world, 1.0)
        return ReplayToken(
            samples=f"{self.state.step}",
            num_samples=metrics.samples,
            loss=metrics.loss.item(),
            grad_norm=metrics.grad_norm.item(),
            dealing="",  # All layouts have the same samples.
            layout=self.name,
            versions="cpu",
            exact=True,
        )


def prepare(names: list[str]) -> None:
    if "megatron tp2" in names:
        from megatron_shim import run_megatron_on_cpu

        run_megatron_on_cpu()


def save_all(rank: int, world: int, folder: str) -> dict[str, list]:
    """Save under every layout of this many ranks and go on for two updates."""
    layouts = LAYOUTS[world]
    prepare(list(layouts))
    after = {}
    for name, fields in layouts.items():
        trial = Trial(rank, world, name, fields, folder)
        trial.update()
        assert trial.checkpoints.save(1, trial.state.tensors(), {"step": 1})
        token = trial.update()
        trial.checkpoints.record_replay(1, token)
        after[name] = [token, trial.update()]
    return after


def load_all(rank: int, world: int, folder: str, sources: list[str]) -> dict[tuple[str, str], list]:
    """Resume under every layout of this many ranks from every checkpoint.

    Restoring compares the digest of every live tensor on every rank with the saved one, and the
    replay check compares loss and norm.
    """
    from hunyuan_train.resilience.guard import Guard

    layouts = LAYOUTS[world]
    prepare(list(layouts))
    found = {}
    for name, fields in layouts.items():
        trial = Trial(rank, world, name, fields, folder)
        for source in sources:
            if not meet(source, name):
                continue
            checkpoints = trial.checkpoints
            checkpoints.folder = Path(folder) / source
            checkpoints._replay._folder = checkpoints.folder
            restored = checkpoints.restore(trial.state.tensors())
            assert restored is not None
            trial.state.updates.weights_changed()
            trial.state.guard = Guard(trial.cfg.resilience)
            trial.state.step = restored.step
            assert checkpoints.replay_due(2)
            first = trial.update()
            checkpoints.check_replay(first)
            found[source, name] = [first, trial.update()] if source == name else [first]
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict, Path]:
    """What followed each checkpoint where it was made, where it was resumed, and where they are."""
    folder = str(tmp_path_factory.mktemp("matrix"))
    made: dict = {}
    resumed: dict = {}
    for world in LAYOUTS:
        made |= run_distributed(save_all, world, folder, timeout_s=240)[0]
    for world in LAYOUTS:
        resumed |= run_distributed(load_all, world, folder, list(made), timeout_s=240)[0]
    return made, resumed, Path(folder)


def off(one: float, other: float) -> float:
    return abs(one - other) / max(abs(one), abs(other))


@pytest.mark.timeout(600)
def test_every_layout_resumes_from_every_other(results: tuple[dict, dict, Path]):
    made, resumed, _ = results
    names = [name for layouts in LAYOUTS.values() for name in layouts]
    expected = {(one, other) for one in names for other in names if meet(one, other)}
    assert resumed.keys() == expected
    assert len(expected) == 7 * 7 + 3 * len(ENGINES)
    for (source, name), after in resumed.items():
        where = f"{source} -> {name}"
        if source == name:
            assert after == made[source], where
            continue
        before = made[source][0]
        assert off(after[0].loss, before.loss) <= 1e-6, where
        assert off(after[0].grad_norm, before.grad_norm) <= 1e-6, where


def test_every_tensor_has_a_digest_in_every_layout(results: tuple[dict, dict, Path]):
    from hunyuan_train.checkpoint.load import read_manifest, stored_tensors

    made, _, folder = results
    keys = None
    for name in made:
        checkpoint = folder / name / "step-00000001"
        digests = read_manifest(checkpoint).digests
        assert digests.keys() == stored_tensors(checkpoint).keys()
        assert (checkpoint / "replay.json").is_file()
        keys = keys or digests.keys()
        assert digests.keys() == keys

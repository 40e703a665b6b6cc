"""Every way to keep weights, moments and average resumes to the bit, on one rank and on two."""

from pathlib import Path

import pytest
from distributed import run_distributed

pytestmark = pytest.mark.dist

MODES = {
    "float32 on the host, no average": "optimizer_device=host ema=off",
    "all": "weights=bfloat16 optimizer_states=int8 optimizer_device=host ema=host",
}
INSIDE = {"one GPU": "fused_backward=true weights=bfloat16 optimizer_states=int8"}
MODEL = [
    *("model.num_double_blocks=1", "model.num_single_blocks=1", "model.mlp_ratio=2"),
    *("model.num_heads=4", "model.hidden_size=32", "model.rope_axes=[2,2,4]"),
]


class Trial:
    """A small training state with batches made up by number."""

    def __init__(self, rank: int, world: int, fields: str, folder: Path) -> None:
        import torch

        from hunyuan_train.checkpoint.config import CheckpointConfig
        from hunyuan_train.checkpoint.manager import CheckpointManager
        from hunyuan_train.config.compose import compose_config
        from hunyuan_train.engine.build import init_weights, lay_out
        from hunyuan_train.engine.state import TrainState
        from hunyuan_train.engine.trial import _nowhere_zero
        from hunyuan_train.optim.ema import Ema
        from hunyuan_train.optim.updates import build_updates
        from hunyuan_train.parallel.mesh import build_axes
        from hunyuan_train.resilience.guard import Guard
        from hunyuan_train.runtime.dist import World

        fixed = ["optimizer.warmup_steps=0", "optimizer.clip_norm=0", "run.device=cpu"]
        fixed += ["parallel.compute_dtype=bfloat16", "memory.recompute=none"]
        self.cfg = compose_config([*MODEL, *fixed, *(f"memory.{f}" for f in fields.split())])
        self.axes = build_axes(self.cfg.parallel, "cpu", world)
        self.world = World(rank=rank, local_rank=rank, size=world, device=torch.device("cpu"))
        model, rules = lay_out(self.cfg, self.axes, self.world.device)
        cfg = self.cfg
        updates = build_updates(model, cfg.parallel, cfg.optimizer, cfg.memory, cfg.run.seed)
        init_weights(updates, _nowhere_zero(rules), self.cfg.run.seed)
        weights = updates.local_weights()
        self.state = TrainState(
            model=model,
            updates=updates,
            ema=Ema(model.module, self.cfg.optimizer, weights, self.cfg.memory.ema),
            loader=None,
            guard=Guard(self.cfg.resilience),
            skipped_updates=torch.zeros(()),
        )
        settings = CheckpointConfig(replay_tolerance=1e-6)
        self.checkpoints = CheckpointManager(folder, settings, {"model": "small"})

    def update(self) -> tuple[float, float]:
        """Train one update."""
        from hunyuan_train.data.buckets import Bucket
        from hunyuan_train.engine.step import train_step
        from hunyuan_train.engine.trial import MicroBatch, make_batch

        share = self.axes.rank("dp")
        shape = MicroBatch(Bucket(1, 64, 64), (8,))
        batch = make_batch(self.cfg, shape, 2 * self.state.step + share, 10)
        metrics = train_step(self.state, [batch], self.cfg, self.world, 1.0)
        return metrics.loss.item(), metrics.grad_norm.item()

    def digests(self) -> dict[str, list[int]]:
        """Return the digest of everything that is saved, over all ranks."""
        from hunyuan_train.checkpoint.load import flatten
        from hunyuan_train.checkpoint.tensor_digest import boxes, digest_boxes

        flat = flatten(self.state.tensors())
        return {name: digest_boxes(boxes(tensor)).tolist() for name, tensor in flat.items()}


def save_and_resume(rank: int, world: int, folder: str, modes: dict[str, str]) -> dict:
    found = {}
    for name, fields in modes.items():
        at = Path(folder) / f"{world}-{name}"
        trial = Trial(rank, world, fields, at)
        before = [trial.update() for _ in range(2)]
        assert trial.checkpoints.save(2, trial.state.tensors(), {"step": 2})
        went_on = [trial.update() for _ in range(2)]
        resumed = Trial(rank, world, fields, at)
        assert resumed.checkpoints.restore(resumed.state.tensors()).step == 2
        resumed.state.step = 2
        again = [resumed.update() for _ in range(2)]
        found[name] = {
            "losses": [before, went_on, again],
            "digests": [trial.digests(), resumed.digests()],
            "skipped": trial.state.skipped_updates.item(),
        }
    return found


def load_elsewhere(rank: int, world: int, folder: str, modes: dict[str, str]) -> dict:
    """Load what one rank saved; restoring compares the digests of all live tensors."""
    found = {}
    for name, fields in modes.items():
        trial = Trial(rank, world, fields, Path(folder) / f"1-{name}")
        assert trial.checkpoints.restore(trial.state.tensors()).step == 2
        trial.state.step = 2
        found[name] = trial.update()
    return found


def test_resume_is_exact_and_changes_ranks(tmp_path):
    one = run_distributed(save_and_resume, 1, str(tmp_path), MODES | INSIDE, timeout_s=500)
    two = run_distributed(save_and_resume, 2, str(tmp_path), MODES, timeout_s=500)
    for ranks in (one, two):
        for results in ranks:
            for name, result in results.items():
                before, went_on, again = result["losses"]
                assert went_on == again, name
                assert result["digests"][0] == result["digests"][1], name
                assert len({*before, *went_on}) == 4, name
                assert result["skipped"] == 0
    kept = one[0]["all"]["digests"][0]
    assert any(name.endswith("exp_avg_codes") for name in kept)
    bare = one[0]["float32 on the host, no average"]["digests"][0]
    assert not any(name.startswith("ema/") for name in bare)
    run_distributed(load_elsewhere, 2, str(tmp_path), MODES, timeout_s=500)


def rounding(rank: int, world: int, folder: str) -> dict[str, list[int]]:
    import torch
    import torch.distributed as dist

    trial = Trial(rank, world, "weights=bfloat16", Path(folder))
    for param in trial.state.updates.local_weights().values():
        param.fill_(0.37)
    for name, param in trial.state.model.module.named_parameters():
        param.grad = torch.full_like(param, 1e-3 * len(name))
    trial.state.updates.step(torch.ones(()))
    sums = {name: torch.tensor(value) for name, value in trial.digests().items()}
    weights = {n: s for n, s in sums.items() if n.startswith("model/")}
    for value in weights.values():
        dist.all_reduce(value)
    return {name: value.tolist() for name, value in weights.items()}


def test_rounding_does_not_depend_on_the_number_of_ranks(tmp_path):
    (one,) = run_distributed(rounding, 1, str(tmp_path / "1"))
    assert run_distributed(rounding, 2, str(tmp_path / "2"))[0] == one

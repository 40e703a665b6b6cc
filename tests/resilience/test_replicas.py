"""Corruption of one replica is found and named, and nothing else is."""

from typing import Any

import pytest
import torch
from distributed import run_distributed
from tiny_run import MODEL

from hunyuan_train.checkpoint.tensor_digest import boxes, digest_boxes
from hunyuan_train.config.compose import compose_config
from hunyuan_train.engine.build import init_weights, lay_out
from hunyuan_train.engine.certify import trial_shapes
from hunyuan_train.engine.state import TrainState
from hunyuan_train.engine.step import train_step
from hunyuan_train.engine.trial import make_batch
from hunyuan_train.optim.ema import Ema
from hunyuan_train.optim.updates import build_updates
from hunyuan_train.parallel.mesh import Axes, build_axes
from hunyuan_train.resilience.config import ResilienceConfig
from hunyuan_train.resilience.guard import Guard
from hunyuan_train.resilience.replicas import Replicas, Verdict, judge
from hunyuan_train.resilience.state_copy import local_parts
from hunyuan_train.runtime.dist import World

NORM = "single_blocks.0.k_norm.weight"
FUSED = "single_blocks.0.linear1.weight"
EXACT = ResilienceConfig(replica_every=2)


def digest(tensor: torch.Tensor) -> torch.Tensor:
    return digest_boxes(boxes(tensor))


class Trainer:
    """Real updates of a tiny model, in a layout."""

    def __init__(self, rank: int, world: int, layout: list[str]) -> None:
        self.cfg = compose_config([*MODEL, "optimizer.lr=1e-2", *layout])
        self.world = World(rank=rank, local_rank=rank, size=world, device=torch.device("cpu"))
        self.axes = build_axes(self.cfg.parallel, "cpu", world)
        model, rules = lay_out(self.cfg, self.axes, self.world.device)
        updates = build_updates(model, self.cfg.parallel, self.cfg.optimizer)
        init_weights(updates, rules, 0)
        self.state = TrainState(
            model=model,
            updates=updates,
            ema=Ema(model.module, self.cfg.optimizer, updates.local_weights()),
            loader=None,  # pyright: ignore[reportArgumentType]
            guard=Guard(self.cfg.resilience),
            skipped_updates=torch.zeros(()),
        )
        self.shapes = trial_shapes(self.cfg, world)

    def update(self) -> None:
        mine = range(self.axes.rank("dp"), len(self.shapes), self.axes.size("dp"))
        first = self.state.step * len(self.shapes)
        batches = [make_batch(self.cfg, self.shapes[i], first + i, 16) for i in mine]
        train_step(self.state, batches, self.cfg, self.world, 1.0)

    def live(self, name: str) -> torch.Tensor:
        """Return what this rank stores of a tensor that is in one piece."""
        parts = local_parts(self.state.tensors())
        return next(part for found, part in parts if found.partition("@")[0] == name)


def flip(tensor: torch.Tensor, bit: int = 3) -> None:
    if tensor.numel():
        bits = tensor.view(torch.int32)
        bits[(-1,) * bits.ndim] ^= 1 << bit


def _drill(
    rank: int, world: int, layout: list[str], faults: list[tuple[str, int]]
) -> tuple[list[Verdict | None], list[Verdict | None]]:
    """Train, compare, then flip one bit at a time (tensor, rank), compare, and flip it back."""
    trainer = Trainer(rank, world, layout)
    replicas = Replicas(EXACT, trainer.axes, digest)
    clean: list[Verdict | None] = []
    for _ in range(3):
        trainer.update()
        clean.append(replicas.check(trainer.state.step, trainer.state.tensors()))
    verdicts = []
    for name, culprit in faults:
        if rank == culprit:
            flip(trainer.live(name))
        verdicts.append(replicas.check(trainer.state.step, trainer.state.tensors()))
        if rank == culprit:
            flip(trainer.live(name))
    return clean, verdicts


def drill(world: int, layout: list[str], faults: list[tuple[str, int]]) -> list[Any]:
    results = run_distributed(_drill, world, layout, faults)
    assert all(result == results[0] for result in results), "one verdict on all ranks"
    clean, verdicts = results[0]
    assert clean == [None] * 3, "false alarm"
    return verdicts


@pytest.mark.dist
def test_four_whole_replicas_name_the_odd_rank() -> None:
    faults = [
        (f"model/{NORM}", 3),
        (f"optimizer/{NORM}/exp_avg", 0),
        (f"optimizer/{FUSED}/exp_avg_sq", 2),
        (f"ema/{FUSED}", 1),
        ("counters/skipped_updates", 1),
    ]
    verdicts = drill(4, ["parallel.zero_stage=0"], faults)
    assert [(v.ranks, v.certain, v.tensors) for v in verdicts] == [
        ((rank,), True, (name,)) for name, rank in faults
    ]
    assert [v.sentence for v in verdicts[:4]] == [
        f"rank 3 differs from ranks 0 1 2 in {NORM} at step 3: silent corruption",
        f"rank 0 differs from ranks 1 2 3 in exp_avg of {NORM} at step 3: silent corruption",
        f"rank 2 differs from ranks 0 1 3 in exp_avg_sq of {FUSED} at step 3: silent corruption",
        f"rank 1 differs from ranks 0 2 3 in the EMA of {FUSED} at step 3: silent corruption",
    ]


@pytest.mark.dist
def test_two_whole_replicas_cannot_say_which_is_wrong() -> None:
    (verdict,) = drill(2, ["parallel.zero_stage=0"], [(f"model/{FUSED}", 1)])
    assert (verdict.ranks, verdict.certain) == ((0, 1), False)
    assert verdict.sentence == (
        f"rank 1 differs from rank 0 in {FUSED} at step 3, "
        "and no majority says which is right: silent corruption"
    )


@pytest.mark.dist
def test_tensor_parallel_ranks_share_what_is_not_cut() -> None:
    """With tp=2 and two whole copies, a norm weight is held four times, a cut weight twice."""
    faults = [(f"model/{NORM}", 2), (f"optimizer/{FUSED}/exp_avg", 1)]
    layout = ["parallel.tp=2", "parallel.sp=true", "parallel.zero_stage=0"]
    norm, cut = drill(4, layout, faults)
    assert (norm.ranks, norm.certain, norm.tensors) == ((2,), True, (f"model/{NORM}",))
    assert (cut.ranks, cut.certain) == ((1, 3), False), "ranks 1 and 3 hold the same half"


@pytest.mark.dist
def test_sharded_replicas_compare_shard_by_shard() -> None:
    """Ranks 0 1 and 2 3 hold one sharded copy each; shards of one copy are no replicas."""
    faults = [(f"model/{FUSED}", 3), (f"ema/{NORM}", 0), (f"optimizer/{NORM}/step", 2)]
    layout = ["parallel.dp_replicate=2", "parallel.zero_stage=2"]
    shard, average, count = drill(4, layout, faults)
    assert (shard.ranks, shard.certain) == ((1, 3), False)
    assert (average.ranks, average.certain) == ((0, 2), False)
    assert (count.ranks, count.certain) == ((2,), True), "the step count is whole on all ranks"


def test_a_lone_process_compares_nothing() -> None:
    replicas = Replicas(EXACT, Axes.alone(), digest)
    assert not replicas.due(2)
    assert replicas.check(2, {"model": {"w": torch.ones(3)}}) is None


def test_a_judge_prefers_what_a_majority_says() -> None:
    a, b = (1, 1), (2, 2)
    gathered = [[(7, a), (9, a)], [(8, a), (9, a)], [(7, b), (9, b)], [(8, a), (9, a)]]
    verdict = judge(400, ["model/cut", "model/norm"], gathered)
    assert verdict is not None
    assert (verdict.ranks, verdict.certain, verdict.tensors) == ((2,), True, ("model/norm",))
    many = judge(5, ["model/x", "model/y"], [[(1, a), (2, a)]] * 2 + [[(1, b), (2, b)]])
    assert many is not None
    assert many.sentence == (
        "rank 2 differs from ranks 0 1 in x and 1 more tensor at step 5: silent corruption"
    )
    torn = judge(5, ["model/x"], [[(1, a)], [(1, a)], [(1, b)], [(1, b)]])
    assert torn is not None
    assert (torn.ranks, torn.certain) == ((0, 1, 2, 3), False)
    assert judge(5, ["model/x"], [[(1, a)], [(2, b)]]) is None

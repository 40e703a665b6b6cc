"""Parameters that are left alone, for ever or at first: nothing of them moves but their average."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hunyuan_train.config.compose import compose_config
from hunyuan_train.engine.footprint import footprint
from hunyuan_train.memory.config import MemoryConfig, StateType, WeightType
from hunyuan_train.models.registry import build_model
from hunyuan_train.optim.config import Implementation, OptimizerConfig
from hunyuan_train.optim.ema import Ema
from hunyuan_train.optim.unfreezing import Unfreezing
from hunyuan_train.optim.updates import TorchUpdates, build_updates, update_weights
from hunyuan_train.parallel.apply import ParallelModel
from hunyuan_train.parallel.config import ParallelConfig, ZeroEngine
from hunyuan_train.parallel.mesh import Axes

LATE = {"0.*": 3}
"""The first layer is trained from the third update on."""


def options(**changes: object) -> OptimizerConfig:
    return OptimizerConfig(lr=1e-2, weight_decay=0.2, ema_decay=0.9, **changes)  # pyright: ignore[reportArgumentType]


class Trial:
    """A small model under the trainer's updates."""

    def __init__(self, cfg: OptimizerConfig, memory: MemoryConfig | None = None) -> None:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(24, 33), nn.LayerNorm(33), nn.Linear(33, 7))
        for param in module.parameters():
            nn.init.normal_(param, std=0.3)
        if memory is not None and memory.weights is WeightType.bfloat16:
            module.bfloat16()
        model = ParallelModel(module, Axes.alone(), {}, frozenset())
        layout = ParallelConfig(zero_stage=0)
        if memory is not None and memory.weights is WeightType.bfloat16:
            layout = ParallelConfig(zero_stage=2, compute_dtype="bfloat16")
        self.updates = build_updates(model, layout, cfg, memory)
        weights = self.updates.local_weights()
        # An average of its own, as of a stage before.
        self.ema = Ema(module, cfg, weights)
        for shadow in self.ema.state_dict().values():
            shadow.mul_(2.0)

    def train(self, first: int, last: int, max_norm: float = 0.1) -> list[Tensor]:
        """Do the updates from ``first`` to ``last``, counted from 1; return their norms."""
        norms = []
        for number in range(first - 1, last):
            self.updates.start_update(number)
            self.updates.start_micro_step(last=True)
            x = torch.randn(5, 24, generator=torch.Generator().manual_seed(number))
            dtype = next(self.updates.module.parameters()).dtype
            self.updates.backward(self.updates.module(x.to(dtype)).square().sum(), last=True)
            norms.append(self.updates.clip(max_norm).clone())
            update_weights(self.updates, self.ema, norms[-1], number)
        return norms

    def state(self) -> dict[str, dict]:
        return copy.deepcopy(
            {
                "weights": self.updates.local_weights(),
                "ema": self.ema.state_dict(),
                "moments": self.updates.local_moments(),
            }
        )


def frozen(state: dict[str, dict], part: str) -> dict[str, Any]:
    return {name: t for name, t in state[part].items() if name.startswith("0.")}


def same(one: object, two: object) -> None:
    torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_late_parameters_and_their_moments_wait_and_their_average_follows() -> None:
    trial = Trial(options(unfreeze=LATE))
    before = trial.state()
    trial.train(1, 2)
    waiting = trial.state()
    for part in ("weights", "moments"):
        same(frozen(waiting, part), frozen(before, part))
    assert all(m["step"] == 0 for m in frozen(waiting, "moments").values())
    for name, weight in frozen(waiting, "weights").items():
        # (1 + n) / (10 + n) of the average is kept: 1/10, then 2/11.
        wanted = weight + (2 * weight - weight) * (0.1 * 2 / 11)
        torch.testing.assert_close(waiting["ema"][name], wanted)
    moved = waiting["weights"].keys() - frozen(waiting, "weights").keys()
    assert all(not torch.equal(waiting["weights"][n], before["weights"][n]) for n in moved)
    trial.train(3, 3)
    started = trial.state()
    for name, moments in frozen(started, "moments").items():
        assert moments["step"] == 1, "bias correction begins with its own first update"
        assert not torch.equal(started["weights"][name], before["weights"][name])


def test_the_norm_that_is_clipped_leaves_them_out() -> None:
    whole, late = Trial(options()), Trial(options(unfreeze=LATE))
    never = Trial(options(trainable=["1.*", "2.*"]))
    norms = {}
    for name, trial in (("whole", whole), ("late", late), ("never", never)):
        (norms[name],) = trial.train(1, 1)
    assert norms["late"] < 0.99 * norms["whole"]
    same(norms["late"], norms["never"])
    # So the others are clipped as if there were nothing else.
    names = [name for name in never.updates.local_moments() if not name.startswith("0.")]
    for name in names:
        same(late.updates.local_weights()[name], never.updates.local_weights()[name])


def test_what_is_never_trained_costs_no_gradient_and_no_moments() -> None:
    trial = Trial(options(trainable=["2.*", "1.bias"]))
    trial.updates.backward(trial.updates.module(torch.ones(2, 24)).sum(), last=True)
    params = dict(trial.updates.module.named_parameters())
    assert {name for name, p in params.items() if p.grad is not None} == {
        "1.bias", "2.weight", "2.bias",
    }  # fmt: skip
    assert set(trial.updates.local_moments()) == {"1.bias", "2.weight", "2.bias"}
    assert set(trial.updates.local_weights()) == set(params), "a checkpoint has them all"


MEMORIES = {
    "float32": MemoryConfig(),
    "bfloat16, int8": MemoryConfig(
        weights=WeightType.bfloat16, optimizer_states=StateType.int8
    ),
    "in the backward": MemoryConfig(fused_backward=True),
}  # fmt: skip


@pytest.mark.parametrize("kind", MEMORIES)
def test_a_restart_in_the_middle_goes_on_to_the_bit(kind: str) -> None:
    memory = MEMORIES[kind]
    cfg = options(unfreeze=LATE | {"2.bias": 5}, trainable=["0.*", "2.*"])
    max_norm = 0.1
    if memory.fused_backward:
        cfg.clip_norm = max_norm = 0.0
    straight, broken = Trial(cfg, memory), Trial(cfg, memory)
    start = straight.state()
    straight.train(1, 6, max_norm)
    broken.train(1, 2, max_norm)
    saved = broken.state()
    same(frozen(saved, "weights"), frozen(start, "weights"))
    resumed = Trial(cfg, memory)
    for part, live in (
        ("weights", resumed.updates.local_weights()),
        ("ema", resumed.ema.state_dict()),
        ("moments", resumed.updates.local_moments()),
    ):
        flat, theirs = (tree_leaves(tree) for tree in (live, saved[part]))
        for mine, other in zip(flat, theirs, strict=True):
            mine.copy_(other)
    resumed.train(3, 6, max_norm)
    same(resumed.state(), straight.state())
    steps = {name: int(m["step"]) for name, m in straight.updates.local_moments().items()}
    assert steps == {"0.weight": 4, "0.bias": 4, "2.weight": 6, "2.bias": 2}


def test_of_several_patterns_the_latest_counts_and_updates_are_counted_from_one() -> None:
    cfg = options(unfreeze={"a.*": 2, "*.x": 4}, trainable=["a.*", "b.*"])
    found = Unfreezing(["a.x", "a.y", "b.x", "b.y", "c.x"], cfg)
    assert found.never == {"c.x"}
    assert [sorted(found.frozen(done)) for done in range(4)] == [
        ["a.x", "a.y", "b.x"], ["a.x", "b.x"], ["a.x", "b.x"], [],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainable": ["3.*"]}, r"optimizer\.trainable has the pattern '3\.\*', which is no para"),
        ({"unfreeze": {"0": 3}}, r"optimizer\.unfreeze has the pattern '0', .* like 0\.weight"),
        ({"unfreeze": {"*": 2}}, r"optimizer\.unfreeze=.* leaves nothing to train in the first"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trial(options(**changes))


def test_updates_are_counted_from_one() -> None:
    with pytest.raises(ValueError, match=r"optimizer\.unfreeze\.0\.\*=0 must be at least 1"):
        options(unfreeze={"0.*": 0})


def test_engines_that_update_everything_refuse() -> None:
    model = ParallelModel(nn.Linear(2, 2), Axes.alone(), {}, frozenset())
    with pytest.raises(ValueError, match=r"optimizer\.trainable=.*set parallel\.zero_engine=torch"):
        build_updates(
            model, ParallelConfig(zero_engine=ZeroEngine.deepspeed), options(trainable=["*"])
        )
    with pytest.raises(ValueError, match=r"optimizer\.unfreeze=.*implementation=apex counts one"):
        build_updates(
            model,
            ParallelConfig(zero_stage=0),
            options(unfreeze={"bias": 2}, implementation=Implementation.apex),
        )


def test_patterns_are_written_on_the_command_line() -> None:
    given = ["optimizer.trainable=[single_blocks.*]", "optimizer.unfreeze={single_blocks.0.*: 10}"]
    cfg = compose_config(given)
    assert cfg.optimizer.trainable == ["single_blocks.*"]
    assert cfg.optimizer.unfreeze == {"single_blocks.0.*": 10}


def test_an_update_only_starts_what_is_due() -> None:
    updates = Trial(options(unfreeze=LATE)).updates
    assert isinstance(updates, TorchUpdates)
    updates.module(torch.ones(2, 24)).sum().backward()
    updates.start_update(1)
    updates.clip(1.0)
    assert "0.weight" not in updates.local_gradients()
    updates.module(torch.ones(2, 24)).sum().backward()
    updates.start_update(2)
    updates.clip(1.0)
    assert "0.weight" in updates.local_gradients()


def test_the_estimate_leaves_out_gradients_and_moments_of_what_is_never_trained() -> None:
    cfg = compose_config(["model=tiny", "optimizer.trainable=[single_blocks.*]"])
    with torch.device("meta"):
        sizes = {n: p.numel() for n, p in build_model(cfg.model).named_parameters()}
    single = sum(size for name, size in sizes.items() if name.startswith("single_blocks."))
    share = single / sum(sizes.values())
    found = footprint(cfg)
    assert 0.1 < share < 0.9
    assert (found.weight, found.average) == (4, 4)
    assert found.gradient == pytest.approx(4 * share)
    assert found.moments == pytest.approx(8 * share)
    assert footprint(compose_config(["model=tiny"])).total == 20

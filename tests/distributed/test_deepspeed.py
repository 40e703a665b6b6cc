"""Updates by DeepSpeed equal those of one process, for every stage, layout and place of the state.

Importing DeepSpeed takes seconds, so each number of ranks runs all its cases in one job.
"""

import gc
import math
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from distributed import run_distributed
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.optim import AdamW

from hunyuan_train.parallel.config import Offload, ParallelConfig, ZeroEngine
from hunyuan_train.parallel.engines.deepspeed import DeepSpeedUpdates
from hunyuan_train.parallel.engines.deepspeed_build import build_deepspeed
from hunyuan_train.parallel.layout import Slices, fused_slices
from hunyuan_train.parallel.mesh import build_axes
from hunyuan_train.parallel.tensor import ColumnLinear, RowLinear

pytestmark = pytest.mark.dist

SAMPLES, UPDATES, MAX_NORM, LR = 16, 3, 0.05, 0.03


@dataclass(frozen=True)
class Case:
    stage: int
    tp: int = 1
    offload: bool = False
    dtype: str = "float32"
    micro_steps: int = 1
    meta: bool = False

    def __str__(self) -> str:
        extras = ["offload"] * self.offload + ["bf16"] * (self.dtype != "float32")
        extras += ["meta"] * self.meta
        return "-".join([f"z{self.stage}", f"tp{self.tp}", f"micro{self.micro_steps}", *extras])


class Tiny(nn.Module):
    """A fused column linear, a bare parameter and a row linear, none of a round size."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(7, 14)
        self.norm = nn.LayerNorm(7)
        self.down = nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


def make_model() -> Tiny:
    torch.manual_seed(0)
    model = Tiny()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * 0.3)
    return model


def make_adam(model: nn.Module) -> AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)


def batch(update: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(update)
    return (
        torch.randn(SAMPLES, 7, generator=generator),
        torch.randn(SAMPLES, 5, generator=generator),
    )


def loss_of(predicted: Tensor, target: Tensor) -> Tensor:
    """This part's share of the mean over the global batch."""
    return (predicted.float() - target).square().sum() / (SAMPLES * 5)


@cache
def reference() -> list[dict]:
    """Loss, gradients, norm and weights of every update in one process."""
    model = make_model()
    adam = make_adam(model)
    updates = []
    for update in range(UPDATES):
        x, y = batch(update)
        loss = loss_of(model(x), y)
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters()}
        norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        for group in adam.param_groups:
            group["lr"] = LR / (update + 1)
        adam.step()
        adam.zero_grad()
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        moments = {n: adam.state[p]["exp_avg_sq"].clone() for n, p in model.named_parameters()}
        updates.append(
            {
                "loss": loss.item(),
                "grads": grads,
                "norm": norm.item(),
                "weights": weights,
                "moments": moments,
            }
        )
    return updates


def cut(model: Tiny, axes) -> dict[str, Slices]:
    if axes.size("tp") == 1:
        return {}
    rank, size, group = axes.rank("tp"), axes.size("tp"), axes.group("tp")
    up = fused_slices((14, 7), 0, (6, 8), rank, size)
    down = fused_slices((5, 14), 1, (6, 8), rank, size)
    model.up = ColumnLinear(model.up, up, group)
    model.down = RowLinear(model.down, down, group)
    bias = Slices((14,), 0, up.runs)
    return {"up.weight": up, "up.bias": bias, "down.weight": down}


def build(case: Case, world: int, partial: tuple[str, ...] = ()):
    cfg = ParallelConfig(
        tp=case.tp,
        zero_stage=case.stage,
        zero_engine=ZeroEngine.deepspeed,
        compute_dtype=case.dtype,
        offload_optimizer=Offload.cpu if case.offload else Offload.none,
    )
    axes = build_axes(cfg, "cpu", world)
    model = make_model()
    slices = cut(model, axes)
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    if case.meta:
        model.to("meta")
    updates = build_deepspeed(
        model, make_adam, cfg, axes, slices, partial=partial, persistent_below=8
    )
    if case.meta:
        updates.fill(values.__getitem__)
    return updates, axes, slices


def fragments(updates: DeepSpeedUpdates, tensors: dict[str, Tensor]) -> dict:
    starts = {n: fragment.start for n, fragment in updates.fragments.items()}
    return {n: (starts.get(n, 0), t.clone()) for n, t in tensors.items()}


def accumulate(updates: DeepSpeedUpdates, case: Case, axes, update: int, spoil: float = 0.0):
    """Back-propagate this rank's samples in ``micro_steps`` parts."""
    x, y = batch(update)
    size, rank = axes.size("grads"), axes.rank("grads")
    total = torch.zeros(())
    for part in range(case.micro_steps):
        last = part == case.micro_steps - 1
        updates.start_micro_step(last=last)
        mine = slice(rank * case.micro_steps + part, None, size * case.micro_steps)
        loss = loss_of(updates.module(x[mine].to(getattr(torch, case.dtype))), y[mine])
        updates.backward(loss * (1.0 + spoil), last=last)
        total += loss.detach()
    return total


def train(case: Case, world: int) -> dict:
    updates, axes, slices = build(case, world)
    result: dict = {"slices": slices, "updates": []}
    result["first"] = fragments(updates, updates.local_weights())
    for update in range(UPDATES):
        loss = accumulate(updates, case, axes, update)
        torch.distributed.all_reduce(loss, group=axes.group("grads"))
        grads = updates.whole_gradients()
        norm = updates.clip(MAX_NORM)
        updates.set_learning_rate(LR / (update + 1))
        skipped = updates.step(norm)
        moments = updates.local_moments()
        result["updates"].append(
            {
                "loss": loss.item(),
                "grads": grads,
                "norm": norm.item(),
                "skipped": skipped.item(),
                "weights": fragments(updates, updates.local_weights()),
                "moments": fragments(updates, {n: m["exp_avg_sq"] for n, m in moments.items()}),
                "step": {m["step"].item() for m in moments.values()},
            }
        )
    return result


def _train_all(rank: int, world: int, cases: list[Case]) -> dict[Case, dict]:
    gc.freeze()  # DeepSpeed collects garbage for every engine
    return {case: train(case, world) for case in cases}


STAGES = (1, 2, 3)
TWO = [Case(stage, micro_steps=n) for stage in STAGES for n in (1, 2)]
TWO += [Case(stage, offload=True, micro_steps=n) for stage in STAGES for n in (1, 2)]
TWO += [Case(stage, dtype="bfloat16", micro_steps=2) for stage in STAGES]
TWO += [Case(stage, dtype="bfloat16", offload=True) for stage in STAGES]
FOUR = [Case(stage, micro_steps=2) for stage in STAGES]
FOUR += [Case(stage, tp=2) for stage in STAGES]
FOUR += [Case(3, tp=2, offload=True, micro_steps=2), Case(1, tp=2, dtype="bfloat16")]
FOUR += [Case(stage, dtype="bfloat16", meta=True) for stage in STAGES]


@cache
def results(world: int) -> list[dict[Case, dict]]:
    return run_distributed(_train_all, world, {2: TWO, 4: FOUR}[world])


def taken(slices: dict[str, Slices], name: str, whole: Tensor) -> Tensor:
    return slices[name].take(whole) if name in slices else whole


def check_fragments(case: Case, ranks: list[dict], key: str, update: int) -> None:
    """Compare what the ranks own with the reference, and that every element has one owner."""
    expected, owned = reference()[update][key], dict.fromkeys(reference()[update][key], 0)
    for result in ranks:
        for name, (start, fragment) in result["updates"][update][key].items():
            flat = taken(result["slices"], name, expected[name]).flatten()
            part = flat[start : start + fragment.numel()]
            torch.testing.assert_close(fragment, part, rtol=1e-5, atol=1e-5)
            owned[name] += fragment.numel()
    for name, whole in expected.items():  # The first ranks are those of one tp group.
        local = [taken(ranks[tp]["slices"], name, whole).numel() for tp in range(case.tp)]
        assert owned[name] == sum(local)


@pytest.mark.parametrize(("world", "case"), [(2, c) for c in TWO] + [(4, c) for c in FOUR], ids=str)
def test_updates_equal_one_process(world: int, case: Case):
    ranks = [result[case] for result in results(world)]
    exact = case.dtype == "float32"
    tolerance = 1e-5 if exact else 2e-2
    for update, expected in enumerate(reference()):
        for result in ranks:
            found = result["updates"][update]
            assert found["loss"] == pytest.approx(expected["loss"], rel=tolerance)
            assert found["norm"] == pytest.approx(expected["norm"], rel=tolerance)
            assert found["norm"] == ranks[0]["updates"][update]["norm"]
            assert found["skipped"] == 0.0
            assert found["step"] <= {update + 1.0}
            for name, whole in expected["grads"].items():
                part = taken(result["slices"], name, whole)
                error = (found["grads"][name] - part).norm() / part.norm()
                assert error < tolerance, f"gradient of {name}: {error:.1e}"
        if exact:
            check_fragments(case, ranks, "weights", update)
            check_fragments(case, ranks, "moments", update)


@pytest.mark.parametrize("case", [c for c in TWO + FOUR if c.dtype != "float32"], ids=str)
def test_masters_start_unrounded(case: Case):
    initial = dict(make_model().named_parameters())
    for result in (r[case] for r in results(2 if case in TWO else 4)):
        for name, (start, fragment) in result["first"].items():
            flat = taken(result["slices"], name, initial[name].detach()).flatten()
            assert torch.equal(fragment, flat[start : start + fragment.numel()])


def skip_and_overwrite(case: Case, world: int) -> dict:
    """An update with a NaN in the gradients of one rank, a good one, and then new weights."""
    updates, axes, slices = build(case, world)
    before = fragments(updates, updates.local_weights())
    spoil = float("nan") if axes.rank("grads") == 0 else 0.0
    accumulate(updates, case, axes, 0, spoil)
    norm = updates.clip(MAX_NORM)
    skipped = updates.step(norm).item()
    untouched = all(
        torch.equal(before[n][1], w) for n, w in updates.local_weights().items()
    ) and not any(t.any() for m in updates.local_moments().values() for t in m.values())
    accumulate(updates, case, axes, 0)
    updates.set_learning_rate(LR)
    again = updates.step(updates.clip(MAX_NORM)).item()
    weights = fragments(updates, updates.local_weights())
    wanted = reference()[1]["weights"]
    for name, weight in updates.local_weights().items():
        if fragment := updates.fragments.get(name):
            flat = taken(slices, name, wanted[name]).flatten()
            weight.copy_(flat[fragment.start : fragment.start + weight.numel()])
        else:
            assert weight.numel() == 0
    updates.weights_changed()
    with torch.no_grad():
        predicted = updates.module(batch(2)[0].to(getattr(torch, case.dtype)))
    return {
        "norm": norm.item(),
        "skipped": (skipped, again),
        "untouched": untouched,
        "weights": weights,
        "predicted": predicted.float(),
    }


def sum_partial(case: Case, world: int) -> dict:
    updates, axes, _ = build(case, world, partial=("norm.weight",))
    accumulate(updates, case, axes, 0)
    return {"grads": updates.whole_gradients(), "norm": updates.clip(0.0).item()}


def save(case: Case, world: int, folder: str) -> None:
    updates, axes, _ = build(case, world)
    accumulate(updates, case, axes, 0)
    updates.set_learning_rate(LR)
    updates.step(updates.clip(MAX_NORM))
    weights, moments = updates.local_weights(), updates.local_moments()
    state = {f"weights/{n}": updates.view(n, w) for n, w in weights.items()}
    for name, moment in moments.items():
        state[f"moments/{name}"] = updates.view(name, moment["exp_avg_sq"])
    checkpoint.save(state, checkpoint_id=folder)


SKIPS = [Case(stage, offload=offload) for stage in STAGES for offload in (False, True)]
NARROW_SKIPS = [replace(case, dtype="bfloat16") for case in SKIPS]


def _other_jobs(rank: int, world: int, folder: str) -> dict[str, dict[Case, dict]]:
    gc.freeze()
    for stage in STAGES:
        save(Case(stage), world, f"{folder}/z{stage}")
    return {
        "skip": {case: skip_and_overwrite(case, world) for case in SKIPS + NARROW_SKIPS},
        "partial": {Case(s, tp=2): sum_partial(Case(s, tp=2), world) for s in STAGES},
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def others(saved: Path) -> list[dict[str, dict[Case, dict]]]:
    return run_distributed(_other_jobs, 2, str(saved))


@pytest.mark.parametrize("case", SKIPS + NARROW_SKIPS, ids=str)
def test_an_update_that_is_not_finite_is_skipped(others, case: Case):
    expected = reference()[0]["weights"]
    for result in (r["skip"][case] for r in others):
        assert not math.isfinite(result["norm"])
        assert result["skipped"] == (1.0, 0.0)
        assert result["untouched"]
        for name, (start, fragment) in result["weights"].items():
            part = expected[name].flatten()[start : start + fragment.numel()]
            if case.dtype == "float32":
                torch.testing.assert_close(fragment, part, rtol=1e-5, atol=1e-5)
            else:
                assert fragment.isfinite().all()


@pytest.mark.parametrize("case", SKIPS + NARROW_SKIPS, ids=str)
def test_overwritten_weights_reach_the_module(others, case: Case):
    model = make_model()
    model.load_state_dict(reference()[1]["weights"])
    expected = model(batch(2)[0]).detach()
    tolerance = 1e-5 if case.dtype == "float32" else 3e-2
    for result in (r["skip"][case] for r in others):
        torch.testing.assert_close(result["predicted"], expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("stage", STAGES)
def test_partial_gradients_are_summed_over_tp(others, stage: int):
    """Each rank's gradient of this parameter is whole here, so the sum over two doubles it."""
    grads = {name: g.clone() for name, g in reference()[0]["grads"].items()}
    grads["norm.weight"] *= 2
    norm = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt().item()
    for result in (r["partial"][Case(stage, tp=2)] for r in others):
        for name in ("norm.weight", "norm.bias"):
            torch.testing.assert_close(result["grads"][name], grads[name], rtol=1e-5, atol=1e-6)
        assert result["norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.usefixtures("others")
def test_checkpoints_hold_whole_tensors(saved: Path, stage: int):
    expected = {
        f"{key}/{n}": t for key in ("weights", "moments") for n, t in reference()[0][key].items()
    }
    loaded = {name: torch.zeros_like(t) for name, t in expected.items()}
    checkpoint.load(loaded, checkpoint_id=saved / f"z{stage}", no_dist=True)
    torch.testing.assert_close(loaded, expected, rtol=1e-5, atol=1e-5)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    axes = SimpleNamespace(mesh=SimpleNamespace(device_type="cpu"))
    with pytest.raises(ValueError, match=r"pip install hunyuan_train\[deepspeed\]"):
        build_deepspeed(make_model(), make_adam, ParallelConfig(), axes, {})

"""Refused updates leave no trace in the weights, and only bad ones are refused."""

import json
import math
import random

import pytest
import torch
from torch import nn

from hunyuan_train.optim.groups import step_if_finite
from hunyuan_train.resilience.config import GuardAction, ResilienceConfig
from hunyuan_train.resilience.guard import Guard, Judgement, Outcome

LEVELS = {"1x256x256": 0.9, "65x256x256": 0.35, "129x544x960": 0.08}


def guard_of(action: GuardAction = GuardAction.skip, **changes: int) -> Guard:
    return Guard(ResilienceConfig(guard=action, **changes))


def show(
    guard: Guard, step: int, loss: float, norm: float = 1.0, kind: str = ""
) -> tuple[Judgement, bool]:
    """Return the judgement of the step before and whether this update was left out."""
    tensors = torch.tensor(loss), torch.tensor(norm)
    left_out = not math.isfinite(guard.screen(*tensors, kind).item())
    return guard.check(step, *tensors, [f"clip-{step}"], kind), left_out


def warmed(guard: Guard, steps: int = 30) -> Guard:
    for step in range(1, steps + 1):
        assert show(guard, step, 0.5 + 0.01 * math.sin(step))[0].outcome is Outcome.ok
    return guard


@pytest.mark.parametrize("action", [GuardAction.skip, GuardAction.rewind, GuardAction.stop])
@pytest.mark.parametrize(
    ("loss", "norm", "said"),
    [
        (math.nan, 1.0, "step 31: loss nan is not finite"),
        (math.inf, 1.0, "step 31: loss inf is not finite"),
        (0.5, math.inf, "step 31: gradient norm inf is not finite"),
        (5.0, 1.0, "step 31: loss 5 is above the limit of 0.7"),
    ],
)
def test_bad_updates_are_left_out_and_named_one_step_later(
    action: GuardAction, loss: float, norm: float, said: str
) -> None:
    guard = warmed(guard_of(action))
    judged, left_out = show(guard, 31, loss, norm)
    assert (judged.outcome, left_out) == (Outcome.ok, True)
    judged, left_out = show(guard, 32, 0.5)
    wanted = {"skip": Outcome.skipped, "rewind": Outcome.rewind, "stop": Outcome.stop}[action]
    assert (judged.outcome, judged.step, judged.samples) == (wanted, 31, ("clip-31",))
    assert judged.sentence.startswith(said)
    assert "clip-31" in judged.sentence
    assert not left_out
    assert show(guard, 33, 0.5)[0].outcome is Outcome.ok


def test_a_refused_update_does_not_touch_the_weights() -> None:
    guard, model = warmed(guard_of()), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.weight.detach().clone()
    for loss, skipped in ((5.0, 1.0), (0.5, 0.0)):
        model(torch.ones(1, 2)).sum().backward()
        norm = guard.screen(torch.tensor(loss), torch.tensor(1.0))
        assert step_if_finite(optimizer, norm).item() == skipped
        assert torch.equal(model.weight, before) == bool(skipped)


def test_ten_thousand_clean_steps_of_a_mixture_are_all_accepted() -> None:
    """Levels that differ tenfold, a falling loss, and noise that few samples make."""
    draw, guard = random.Random(0), guard_of()
    for step in range(1, 10_001):
        kind = draw.choices(list(LEVELS), weights=[90, 9, 1])[0]
        noise = {"1x256x256": 0.05, "65x256x256": 0.15, "129x544x960": 0.3}[kind]
        loss = LEVELS[kind] * (1 + 4 * math.exp(-step / 300)) * draw.lognormvariate(0, noise)
        judged, left_out = show(guard, step, loss, draw.lognormvariate(0, 1), kind)
        assert judged.outcome is Outcome.ok, judged.sentence
        assert not left_out


def test_a_long_tail_of_the_losses_is_no_spike() -> None:
    """Few samples per update: mostly alike, now and then an update of hard ones."""
    draw, guard = random.Random(0), guard_of()
    for step in range(1, 10_001):
        hard = 0.33 if draw.random() < 0.001 else 0.0
        loss = 0.58 * math.exp(draw.gauss(hard, 0.02))
        judged, left_out = show(guard, step, loss)
        assert judged.outcome is Outcome.ok, judged.sentence
        assert not left_out


def test_a_mixture_needs_its_kinds() -> None:
    """What the kind is for: without it a rare bucket of another level looks like a spike."""
    guard = warmed(guard_of())
    assert show(guard, 31, 1.5)[1]
    assert not show(guard, 32, 1.5, kind="rare")[1]


def test_a_kind_has_its_own_limit() -> None:
    guard = guard_of()
    for step in range(1, 61):
        show(guard, step, 1.0 if step % 2 else 0.1, kind="high" if step % 2 else "low")
    assert not show(guard, 61, 1.0, kind="high")[1]
    assert show(guard, 62, 0.3, kind="low")[1]


def test_spikes_do_not_move_the_level_and_too_many_in_a_row_stop_the_run() -> None:
    guard = warmed(guard_of(max_skipped=5))
    limit = guard.limit()
    outcomes = [show(guard, step, 5.0)[0] for step in range(31, 37)]
    assert guard.limit() == pytest.approx(limit, rel=0.05)
    assert [judged.outcome for judged in outcomes[:5]] == [Outcome.ok, *[Outcome.skipped] * 4]
    assert outcomes[5].outcome is Outcome.stop
    assert outcomes[5].sentence.endswith("(loss 5, gradient norm 1, samples clip-35); "
                                         "5 updates were refused in a row")  # fmt: skip
    guard = warmed(guard_of(max_skipped=5))
    for step in range(31, 100):
        assert show(guard, step, 5.0 if step % 5 else 0.5)[0].outcome is not Outcome.stop


def test_a_spike_that_comes_back_after_every_rewind_stops_the_run() -> None:
    guard = warmed(guard_of(GuardAction.rewind, max_skipped=3))
    saved = json.loads(json.dumps(guard.state_dict()))
    outcomes = []
    for _ in range(4):
        for step in range(31, 36):
            judged, _ = show(guard, step, 5.0 if step == 34 else 0.5)
            if judged.outcome is not Outcome.ok:
                outcomes.append(judged.outcome)
                guard.load_state_dict(saved)
                break
        if outcomes[-1] is Outcome.stop:
            break
    assert outcomes == [Outcome.rewind, Outcome.rewind, Outcome.stop]


@pytest.mark.parametrize("action", list(GuardAction))
def test_before_a_state_is_kept_only_an_update_to_go_back_from_is_judged(
    action: GuardAction,
) -> None:
    kept, straight = warmed(guard_of(action)), warmed(guard_of(action))
    show(kept, 31, 0.51), show(straight, 31, 0.51)
    assert kept.settle().outcome is Outcome.ok
    assert kept.state_dict() == straight.state_dict(), "limits must not depend on saves"
    show(kept, 32, 5.0)
    judged = kept.settle()
    if action is not GuardAction.rewind:
        assert judged.outcome is Outcome.ok
        return
    assert (judged.outcome, judged.step, judged.samples) == (Outcome.rewind, 32, ("clip-32",))
    assert (judged.loss, judged.norm) == (5.0, 1.0)
    assert judged.reason.startswith("loss 5 is above the limit of 0.7")
    assert kept.settle().outcome is Outcome.ok
    assert show(kept, 33, 0.5)[0].outcome is Outcome.ok, "it is not judged again"


@pytest.mark.parametrize("last", [0.5, 5.0, math.nan])
def test_a_restored_guard_goes_on_as_the_straight_one(last: float) -> None:
    def run(guard: Guard, first: int, end: int) -> list[Judgement]:
        return [
            show(guard, s, last if s == 40 else 0.5 + 0.01 * math.sin(s))[0]
            for s in range(first, end)
        ]

    straight, broken = warmed(guard_of()), warmed(guard_of())
    wanted = run(straight, 31, 60)
    got = run(broken, 31, 41)
    state = json.loads(json.dumps(broken.state_dict(), allow_nan=False))
    resumed = guard_of()
    resumed.load_state_dict(state)
    got += run(resumed, 41, 60)
    assert got == wanted
    assert resumed.limit() == straight.limit()
    assert len(json.dumps(resumed.state_dict())) < 2000


def test_off_does_nothing() -> None:
    guard = guard_of(GuardAction.off)
    for step in range(1, 50):
        judged, left_out = show(guard, step, math.nan if step > 20 else 0.5)
        assert (judged.outcome, left_out) == (Outcome.ok, False)

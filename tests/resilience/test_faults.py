"""The entries of ``resilience.faults``."""

import pytest

from hunyuan_train.resilience.config import ResilienceConfig
from hunyuan_train.resilience.drill import _ENDS, _OTHERS, _STORAGE
from hunyuan_train.resilience.faults import FaultKind, parse_faults


def test_an_entry_says_kind_rank_step_and_what_else() -> None:
    entries = ["sigkill@2:40:phase=backward:attempt=3", "slow@*:10:factor=3:attempt=*", "nan@0:7"]
    kill, slow, nan = parse_faults(entries)
    assert (kill.kind, kill.rank, kill.step, kill.phase) == (FaultKind.sigkill, 2, 40, "backward")
    assert kill.concerns(2, 3)
    assert not kill.concerns(2, 0)
    assert not kill.concerns(1, 3)
    assert (slow.factor, slow.phase) == (3.0, "forward")
    assert slow.concerns(7, 5)
    assert nan.concerns(0, 0)
    assert not nan.concerns(0, 1), "only the first attempt unless it says so"


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ("sigkill", "write kind@rank:step"),
        ("meteor@1:2", "choose as kind one of sigkill sigsegv"),
        ("nan@one:2", r"rank one must be a whole number from 0 on or \*"),
        ("nan@1:0", "step 0 must be a whole number from 1 on"),
        ("nan@1:*", "step"),
        ("nan@1:2:when=now", "'when=now' is not one of attempt= phase= seconds= factor="),
        ("sigkill@1:2:phase=lunch", "phase=lunch must be one of data forward"),
        ("nan@1:2:phase=data", "nan has its own moment"),
        ("slow@1:2:factor=0.5", "factor=0.5 must be a number from 1 on"),
        ("slow@1:2:seconds=soon", "seconds=soon must be a number"),
        ("nan@1:2:attempt=first", "attempt first must be"),
    ],
)
def test_a_wrong_entry_is_refused_when_the_config_is_made(entry: str, told: str) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        ResilienceConfig(faults=[entry])
    assert repr(entry) in str(caught.value)


def test_every_kind_can_strike_in_exactly_one_way() -> None:
    ways = [*_ENDS, *_STORAGE, *_OTHERS]
    assert sorted(ways) == sorted(FaultKind)

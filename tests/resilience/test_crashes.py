"""What the end of a rank means, the choice of a layout, and what a leader decides."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from hunyuan_train.parallel.config import ParallelConfig
from hunyuan_train.resilience.board import Attempt, Member, Plan, Report
from hunyuan_train.resilience.config import LaunchConfig
from hunyuan_train.resilience.crashes import (
    CRASH_FILE,
    Failure,
    Kind,
    crash_path,
    culprits,
    read_failure,
    record_crash,
    repeated,
)
from hunyuan_train.resilience.decisions import (
    Alarm,
    Begin,
    Facts,
    Resize,
    Stop,
    Wait,
    backoff_s,
    decide,
    place,
)
from hunyuan_train.resilience.layouts import Job, choose


def test_an_exception_is_left_for_the_launcher_once_and_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_crash(ValueError("nobody asked"))
    path = crash_path(tmp_path, 3, 1)
    monkeypatch.setenv(CRASH_FILE, str(path))
    try:
        raise KeyError("lost")
    except KeyError as error:
        record_crash(error)
    record_crash(RuntimeError("while tearing down"))
    record_crash(SystemExit(2))
    failure = read_failure(tmp_path, 3, 1, node=0, code=1, step=17)
    assert (failure.type, failure.message, failure.step) == ("KeyError", "'lost'", 17)
    assert failure.kind is Kind.exception
    assert 'raise KeyError("lost")' in failure.trace
    assert failure.sentence() == "rank 1 on node 0 raised KeyError at step 17: 'lost'"
    assert json.loads(path.read_text()).keys() == {"type", "message", "step", "trace"}


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        ({"code": -9}, Kind.signal),
        ({"code": 3}, Kind.exit),
        ({"code": 2, "type": "ValueError", "message": "no NCCL here"}, Kind.refused),
        ({"code": -9, "hung": True, "message": "behind"}, Kind.hang),
        ({"code": 1, "type": "KeyError", "message": "x"}, Kind.exception),
        (
            {
                "code": 1,
                "type": "RuntimeError",
                "message": "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:5325",
            },
            Kind.peer,
        ),
        ({"code": 1, "type": "DistBackendError", "message": "NCCL error"}, Kind.peer),
        ({"code": 1, "type": "RuntimeError", "message": "CUDA out of memory"}, Kind.exception),
    ],
)
def test_kinds(failure: dict[str, Any], kind: Kind) -> None:
    assert Failure(rank=0, node=0, **failure).kind is kind


def raised(rank: int = 0, step: int = 5, message: str = "bad at 0x7f00", **more: Any) -> Failure:
    return Failure(rank=rank, node=0, code=1, step=step, type="E", message=message, **more)


def test_who_only_lost_a_peer_is_no_culprit_unless_all_did() -> None:
    lost = raised(message="Connection reset by peer")
    killed = Failure(rank=1, node=0, code=-9)
    assert culprits([lost, killed]) == [killed]
    assert culprits([lost]) == [lost]


def test_only_the_same_rank_step_and_exception_repeat() -> None:
    first = [raised()]
    assert repeated([first, [raised(message="bad at 0x7fff")]], 2) is not None
    assert repeated([first, [raised(step=6)]], 2) is None
    assert repeated([first, [raised(rank=1)]], 2) is None
    assert repeated([first, [raised(message="worse")]], 2) is None
    assert repeated([first, [raised()]], 3) is None
    assert repeated([first, [Failure(rank=0, node=0, code=-9)], [raised()]], 2) is not None
    killed = [Failure(rank=0, node=0, code=-9)]
    assert repeated([killed] * 5, 2) is None


JOB = Job(parallel=ParallelConfig(tp=2, dp_replicate=2), world_size=16, num_heads=24)


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (16, []),
        (8, ["data.planned_ranks=8"]),
        (2, ["parallel.dp_replicate=1", "data.planned_ranks=8"]),
        (12, ["data.planned_ranks=8"]),
        (10, ["parallel.dp_replicate=1", "data.planned_ranks=8"]),
        (3, None),
    ],
)
def test_fewer_ranks_keep_the_layout_and_the_update(ranks: int, overrides: list[str]) -> None:
    assert choose(JOB, ranks) == overrides


def test_allowed_layouts_are_tried_in_their_order() -> None:
    job = dataclasses.replace(JOB, planned_ranks=5)
    allowed = ["tp=5", "tp=4,sp=true", "cp_ring=3", "tp=1"]
    four = ["parallel.tp=4", "parallel.dp_replicate=1", "parallel.sp=true"]
    assert choose(job, 8, allowed) == four
    assert choose(job, 5, ["tp=5"]) is None, "24 heads"
    ring = ["parallel.tp=1", "parallel.cp_ring=3", "parallel.dp_replicate=1"]
    assert choose(job, 3, allowed) == ring
    assert choose(job, 7, allowed) == ["parallel.tp=1", "parallel.dp_replicate=1"]


@pytest.mark.parametrize("text", ["pp=2", "tp=x", "tp=0", "sp=true", "tp"])
def test_a_layout_that_is_none_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=r"launch\.layouts has"):
        choose(JOB, 8, [text])


def members(*tickets: int, **more: Any) -> dict[int, Member]:
    return {t: Member(ticket=t, host=f"h{t}", **more) for t in tickets}


def attempt(
    number: int, tickets: list[int], codes: dict[int, list[int]], *failures: Failure, **more: Any
) -> Attempt:
    progress = more.pop("progress", ["", -1, -1])
    seconds = more.pop("seconds", 10.0)
    reports = {
        node: Report(
            attempt=number,
            node=node,
            codes={str(i): code for i, code in enumerate(told)},
            failures=[f for f in failures if f.node == node],
            seconds=seconds,
            progress=progress,
        )
        for node, told in codes.items()
    }
    plan = Plan(attempt=number, tickets=tickets, hosts=[f"h{t}" for t in tickets])
    return Attempt(plan=plan, reports=reports, **more)


def facts(here: dict[int, Member], *attempts: Attempt, patient: bool = True, **cfg: Any) -> Facts:
    config = LaunchConfig(**{"nodes": 2, **cfg})
    job = Job(parallel=ParallelConfig(), world_size=config.nodes, planned_ranks=2)
    return Facts(
        cfg=config,
        job=job,
        attempts=attempts,
        members=here,
        next_attempt=len(attempts),
        patient=patient,
    )


def killed(node: int) -> Failure:
    return Failure(rank=node, node=node, code=-9)


def test_a_job_begins_when_its_machines_are_here_and_with_fewer_only_after_patience() -> None:
    assert isinstance(decide(facts(members(1))), Wait)
    begin = decide(facts(members(1, 2, 3)))
    assert isinstance(begin, Begin)
    assert begin.plan.tickets == [1, 2]
    assert isinstance(decide(facts(members(1), min_nodes=1)), Wait)
    begin = decide(facts(members(1), min_nodes=1, patient=False))
    assert isinstance(begin, Begin)
    assert begin.plan.tickets == [1]


def test_machines_that_only_know_themselves_are_refused_unless_they_are_one() -> None:
    here = members(1, 2, address="127.0.0.1", network="one")
    assert isinstance(decide(facts(here)), Begin)
    here[2] = dataclasses.replace(here[2], network="two")
    stop = decide(facts(here))
    assert isinstance(stop, Stop)
    assert stop.code == 2
    assert "h1 has no address that other machines reach, only 127.0.0.1" in stop.why
    apart = {t: dataclasses.replace(m, address=f"10.0.0.{t}") for t, m in here.items()}
    assert isinstance(decide(facts(apart)), Begin)


def test_a_sick_machine_is_left_out_and_stops_the_job_only_where_nobody_can_replace_it() -> None:
    sick = {2: dataclasses.replace(members(2)[2], healthy=False, why="disk full")}
    begin = decide(facts(members(1, 3) | sick, spares=1))
    assert isinstance(begin, Begin)
    assert begin.plan.tickets == [1, 3]
    stop = decide(facts(members(1) | sick))
    assert isinstance(stop, Stop)
    assert "h2: disk full" in stop.why


def test_the_ends_of_an_attempt() -> None:
    here = members(1, 2)
    assert decide(facts(here, attempt(0, [1, 2], {0: [0]}))) == Wait()
    assert decide(facts(here, attempt(0, [1, 2], {0: [0], 1: [0]}))) == Stop(0, "done")
    stop = decide(facts(here, attempt(0, [1, 2], {0: [75], 1: [0]})))
    assert isinstance(stop, Stop)
    assert stop.code == 75
    grown = decide(facts(here, attempt(0, [1], {0: [75]}, resize=True), min_nodes=1))
    assert isinstance(grown, Begin)
    assert grown.plan.tickets == [1, 2]
    assert [kind for kind, _ in grown.events] == ["grow"]


def test_an_input_that_one_rank_refuses_stops_the_job_whatever_became_of_the_others() -> None:
    refused = Failure(rank=1, node=0, code=2, type="ValueError", message="data.x=1 is odd")
    others = [killed(1), raised(0, message="Connection closed by peer"), raised(2)]
    over = attempt(0, [1, 2], {0: [2, 1], 1: [-9]}, *others, refused)
    for here in (members(1, 2), members(1)):
        assert decide(facts(here, over)) == Stop(2, "data.x=1 is odd")
    silent = attempt(0, [1], {0: [2]}, dataclasses.replace(refused, type="", message=""))
    assert decide(facts(members(1), silent, nodes=1)) == Stop(
        2, "rank 1 on node 0 ended with exit code 2"
    )


def test_a_job_keeps_its_plan_while_it_is_smaller() -> None:
    over = attempt(0, [1, 2], {0: [-9]}, alarm={"why": "x"})
    counted = dataclasses.replace(facts(members(1), over, min_nodes=1).job, planned_ranks=0)
    shrunk = decide(dataclasses.replace(facts(members(1), over, min_nodes=1), job=counted))
    assert isinstance(shrunk, Begin)
    assert shrunk.plan.overrides == ["data.planned_ranks=2"]
    asked = attempt(1, [1], {0: [75]}, resize=True)
    asked.plan = shrunk.plan
    grown = decide(dataclasses.replace(facts(members(1, 3), over, asked), job=counted))
    assert isinstance(grown, Begin)
    assert grown.plan.overrides == []


def test_a_lost_machine_alarms_the_others_and_is_replaced_or_left_out() -> None:
    running = attempt(0, [1, 2], {})
    assert isinstance(decide(facts(members(1, 3), running)), Alarm)
    over = attempt(0, [1, 2], {0: [-9]}, alarm={"why": "x"})
    begin = decide(facts(members(1, 3), over))
    assert isinstance(begin, Begin)
    assert begin.plan.tickets == [1, 3]
    assert [kind for kind, _ in begin.events] == ["replaced"]
    assert isinstance(decide(facts(members(1), over)), Wait)
    begin = decide(facts(members(1), over, min_nodes=1))
    assert isinstance(begin, Begin)
    assert [kind for kind, _ in begin.events] == ["shrink"]
    assert decide(facts(members(1, 2), attempt(0, [1], {}), min_nodes=1)) == Resize()


def test_a_machine_is_excluded_after_two_failures_in_a_row_of_its_own() -> None:
    def ended(number: int, *nodes: int, seconds: float = 10.0) -> Attempt:
        codes = {0: [-9], 1: [-9]}
        return attempt(number, [1, 2], codes, *map(killed, nodes), seconds=seconds)

    begin = decide(facts(members(1, 2, 3), ended(0, 1), ended(1, 1)))
    assert isinstance(begin, Begin)
    assert begin.plan.tickets == [1, 3]
    assert list(begin.plan.excluded) == ["2"]
    for history in (
        [ended(0, 1)],
        [ended(0, 0), ended(1, 1)],
        [ended(0, 0, 1), ended(1, 0, 1)],
        [ended(0, 1, seconds=9000), ended(1, 1, seconds=9000)],
    ):
        begin = decide(facts(members(1, 2, 3), *history))
        assert isinstance(begin, Begin)
        assert begin.plan.tickets == [1, 2]
    begin = decide(facts(members(1, 2), ended(0, 1), ended(1, 1)))
    assert isinstance(begin, Begin), "nobody else is there"
    assert begin.plan.tickets == [1, 2]


def test_the_wait_doubles_without_progress_and_is_none_after_progress() -> None:
    cfg = LaunchConfig(backoff_s=1, max_backoff_s=5)

    def waits(*steps: int) -> float:
        tried = [attempt(n, [1], {0: [1]}, progress=["", s, s]) for n, s in enumerate(steps)]
        return backoff_s(cfg, tried)

    assert [waits(-1), waits(-1, -1), waits(-1, -1, -1), waits(*[-1] * 9)] == [1, 2, 4, 5]
    assert waits(20) == 0
    assert waits(20, 20) == 1
    assert waits(20, 20, 15) == 2
    assert waits(20, 20, 40) == 0
    assert waits(20, 20, 40, 40) == 1


def test_numbers_stay_and_wishes_count() -> None:
    wishing = {4: dataclasses.replace(members(4)[4], node_rank=0)}
    here = [*members(1, 2, 3).values(), *wishing.values()]
    assert place(here, [], 3) == [4, 1, 2]
    assert place(here, [1, 9, 3], 3) == [1, 2, 3]
    assert place(here, [9, 2, 3], 3) == [4, 2, 3]
    assert place(here[1:3], [1, 2, 3], 2) == [2, 3]

"""Where machines meet: tickets, plans that only one can write, and silence by one's own clock."""

import json
import os
import threading
from pathlib import Path

import pytest

from hunyuan_train.resilience import board as module
from hunyuan_train.resilience.board import Board, interface_of, newest_checkpoint, own_address


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 5.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def join(run_dir: Path) -> Board:
    return Board(run_dir, lease_s=10, address="127.0.0.1")


def test_tickets_are_unique_and_the_lowest_living_leads(tmp_path: Path) -> None:
    boards: list[Board] = []
    threads = [threading.Thread(target=lambda: boards.append(join(tmp_path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(board.me.ticket for board in boards) == list(range(1, 9))
    for board in boards:
        board.scan()
    assert [board.me.ticket for board in boards if board.leads] == [1]


def test_silence_counts_by_the_clock_of_who_listens(tmp_path: Path, clock: Clock) -> None:
    one, two = join(tmp_path), join(tmp_path)
    for _ in range(30):
        clock.now += 1
        one.beat()
        two.scan()
    assert not two.leads
    one.me.wall = 1e12  # a clock that is far off changes nothing
    one.beat()
    two.scan()
    assert sorted(two.members) == [1, 2]
    for _ in range(12):
        clock.now += 1
        two.beat()
        two.scan()
    assert two.leads, "the first has been silent for longer than the lease"
    one.beat()
    two.scan()
    assert sorted(two.members) == [2], "who was given up does not come back under its ticket"


def test_who_was_given_up_and_lives_joins_anew(tmp_path: Path) -> None:
    one, two = join(tmp_path), join(tmp_path)
    one.rejoin()
    assert one.me.ticket == 1
    two.give_up(1)
    assert two.leads
    one.scan()
    one.rejoin()
    assert one.me.ticket == 3
    two.scan()
    assert sorted(two.members) == sorted(one.members) == [2, 3]


def test_nobody_is_blamed_for_a_while_in_which_the_listener_stood_still(
    tmp_path: Path, clock: Clock
) -> None:
    one, two = join(tmp_path), join(tmp_path)
    clock.now += 60
    two.scan()
    assert sorted(two.members) == [1, 2]
    one.beat(left=True)
    two.scan()
    assert sorted(two.members) == [2]


def test_a_dead_process_of_this_machine_is_gone_at_once(tmp_path: Path) -> None:
    one = join(tmp_path)
    path = tmp_path / "launch/members/000001.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps(told | {"started": told["started"] - 1}))
    two = join(tmp_path)
    assert sorted(two.members) == [two.me.ticket]
    path.write_text(json.dumps(told | {"started": 1, "machine": "another"}))
    assert sorted(join(tmp_path).members) == [1, 2, 3], "a pid says nothing about another machine"
    assert one.me.pid == os.getpid()


def test_only_the_first_plan_of_an_attempt_counts(tmp_path: Path) -> None:
    one, two = join(tmp_path), join(tmp_path)
    plan = {"attempt": 0, "tickets": [1], "hosts": ["a"], "overrides": [], "excluded": {}}
    assert one.put("plan-0", plan)
    assert not two.put("plan-0", plan | {"tickets": [2]})
    two.scan()
    assert two.attempts[0].plan.tickets == [1]
    assert two.next_attempt == 1
    assert not list((tmp_path / "launch").glob(".*"))


def test_a_stop_ends_a_job_and_attempts_go_on_counting(tmp_path: Path) -> None:
    one = join(tmp_path)
    for number in range(2):
        one.put(f"plan-{number}", {"attempt": number, "tickets": [1], "hosts": ["a"]})
        one.put(f"alarm-{number}", {"why": "x"})
    one.put("stop-1", {"code": 1, "why": "x"})
    assert one.attempts == {}
    two = join(tmp_path)
    assert (two.joined, two.next_attempt, two.attempts) == (1, 2, {})
    two.put("plan-2", {"attempt": 2, "tickets": [2], "hosts": ["a"]})
    assert list(two.attempts) == [2]
    assert two.attempts[2].alarm is None


def test_progress_is_the_newest_checkpoint_of_the_last_stage(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) == ["", -1]
    (tmp_path / "checkpoints/step-00000007").mkdir(parents=True)
    (tmp_path / "checkpoints/step-00000009.incomplete").mkdir(parents=True)
    assert newest_checkpoint(tmp_path) == ["", 7]
    (tmp_path / "stages/01-image/checkpoints/step-00000100").mkdir(parents=True)
    (tmp_path / "stages/02-video/checkpoints/step-00000002").mkdir(parents=True)
    assert newest_checkpoint(tmp_path) == ["02-video", 2]


def test_the_address_is_that_of_the_interface_towards_the_rendezvous() -> None:
    assert own_address("", alone=True) == "127.0.0.1"
    assert own_address("127.0.0.1:29500", alone=False) == "127.0.0.1"
    assert own_address("localhost", alone=False) == "127.0.0.1"
    with pytest.raises(ValueError, match=r"launch\.rendezvous=no-such-host\.invalid"):
        own_address("no-such-host.invalid", alone=False)


def test_a_name_that_leads_to_the_machine_itself_gives_way_to_the_default_route(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on Debian, where the machine's own name is 127.0.1.1."""
    routes = {"8.8.8.8": "10.0.0.7", "me": "127.0.0.1", "other": "10.1.0.7"}

    def towards(host: str) -> str:
        if host not in routes:
            raise OSError("no route")
        return routes[host]

    monkeypatch.setattr(module, "_address_towards", towards)
    monkeypatch.setattr(module.socket, "gethostname", lambda: "me")
    assert own_address("", alone=False) == "10.0.0.7"
    assert own_address("me:29500", alone=False) == "10.0.0.7"
    assert own_address("other", alone=False) == "10.1.0.7"
    del routes["8.8.8.8"]
    assert own_address("", alone=False) == "127.0.0.1"
    routes["me"] = "10.2.0.7"
    assert own_address("", alone=False) == "10.2.0.7"
    del routes["me"]
    assert own_address("", alone=False) == "127.0.0.1"


def test_the_interface_of_an_address_is_found() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.9") == ""

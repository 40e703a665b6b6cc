"""The supervisor with fake ranks: restarts, crash loops, its own death, lost machines."""

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from fake_job import descendants, events, finish, launch, notes, poll, run, runs

from hunyuan_train.resilience.agent import Agent, Order
from hunyuan_train.resilience.standby import Standby

CRASH_ONCE = """
note("argv", json.dumps([sys.argv, os.environ["MASTER_PORT"], world]))
if attempt == 0:
    if rank == 1:
        {crash}
    time.sleep(100)
"""


@pytest.mark.parametrize(
    ("crash", "told"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "was ended by SIGKILL"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "was ended by SIGSEGV"),
        ("os.abort()", "was ended by SIGABRT"),
        ("raise KeyError('boo')", "raised KeyError: 'boo'"),
        ("os._exit(3)", "ended with exit code 3"),
    ],
)
def test_any_death_of_a_rank_restarts_all_with_the_same_command(
    tmp_path: Path, crash: str, told: str
) -> None:
    began = time.monotonic()
    code, text = run(tmp_path, CRASH_ONCE.format(crash=crash), "ranks_per_node=3")
    assert code == 0, text
    assert f"rank 1 on node 0 {told}" in text
    seen = notes(tmp_path, "argv")
    assert sorted(seen) == [(attempt, rank) for attempt in (0, 1) for rank in range(3)]
    first, second = (
        {tuple(map(str, eval(seen[attempt, rank]))) for rank in range(3)} for attempt in (0, 1)
    )
    assert len(first) == len(second) == 1, "all ranks of an attempt meet at the same place"
    (argv, port, world), (again, other_port, same_world) = *first, *second
    assert (argv, world) == (again, same_world)
    assert port != other_port, "a port of its own for every attempt"
    (end, _) = events(tmp_path, "attempt_end")
    assert len(end["failures"]) == 1
    assert time.monotonic() - began < 20


def test_output_is_shown_with_the_rank_and_kept_per_rank_and_attempt(tmp_path: Path) -> None:
    body = "print('here', rank, attempt)\nif attempt == 0 and rank == 1: os._exit(1)"
    code, text = run(tmp_path, body, "ranks_per_node=2")
    assert code == 0
    assert "[1] here 1 1" in text
    for attempt in (0, 1):
        log = tmp_path / "logs" / f"attempt-{attempt}" / "rank-1.log"
        assert log.read_text() == f"here 1 {attempt}\n"


def test_the_same_exception_at_the_same_step_twice_is_called_an_error_of_the_code(
    tmp_path: Path,
) -> None:
    body = "if rank == 0: raise ValueError(f'at {object()}: bad width')\ntime.sleep(100)"
    code, _ = run(tmp_path, body, "ranks_per_node=2")
    assert code == 1
    assert len(events(tmp_path, "attempt_start")) == 2
    (stop,) = events(tmp_path, "stop")
    assert "second time, so it is an error of the code or the data" in stop["why"]
    assert "bad width" in stop["why"].splitlines()[-1]


def test_an_input_that_is_refused_ends_the_job_with_2_and_one_sentence(tmp_path: Path) -> None:
    """One rank refuses it; the other one loses its peer first, and is not to blame."""
    body = """
if rank == 1:
    from hunyuan_train.cli import main
    def refuse(argv):
        note("refuses")
        time.sleep(0.3)
        raise ValueError("data.width=7 is odd; take 8")
    import types
    sys.modules["hunyuan_train.cli.train"] = types.SimpleNamespace(main=refuse)
    sys.exit(main.main(["train"]))
wait_for(lambda: (run_dir / f"refuses-{attempt}-1").exists())
raise RuntimeError("Connection closed by peer")
"""
    code, text = run(tmp_path, body, "ranks_per_node=2")
    assert code == 2, text
    assert text.count("data.width=7 is odd; take 8") == 1
    assert len(events(tmp_path, "attempt_start")) == 1
    (found,) = events(tmp_path, "detected")
    assert (found["rank"], found["fault"]) == (1, "refused")


def test_exceptions_of_different_ranks_and_signals_are_restarted_until_the_limit(
    tmp_path: Path,
) -> None:
    body = "if rank == attempt % 2: raise ValueError(f'{attempt}')\ntime.sleep(100)"
    fields = ("ranks_per_node=2", "max_restarts=3", "backoff_s=0.01")
    code, _ = run(tmp_path / "exceptions", body, *fields)
    assert code == 1
    (stop,) = events(tmp_path / "exceptions", "stop")
    assert "launch.max_restarts=3 restarts are used up" in stop["why"]
    assert len(events(tmp_path / "exceptions", "attempt_start")) == 4

    body = "os.kill(os.getpid(), signal.SIGKILL)"
    code, _ = run(tmp_path / "signals", body, *fields)
    assert code == 1
    assert len(events(tmp_path / "signals", "attempt_start")) == 4


def test_ranks_that_only_lost_a_peer_are_not_blamed(tmp_path: Path) -> None:
    body = """
if attempt == 0:
    if rank == 0:
        raise RuntimeError("Connection closed by peer [127.0.0.1]:1234")
    time.sleep(0.2)
    raise KeyError("the cause")
"""
    code, _ = run(tmp_path, body, "ranks_per_node=2")
    assert code == 0
    assert events(tmp_path, "attempt_end")[0]["failures"] == [
        "rank 1 on node 0 raised KeyError: 'the cause'"
    ]


def test_a_signal_reaches_the_ranks_and_75_ends_the_job(tmp_path: Path) -> None:
    process = launch(tmp_path, "serve_until_asked()", "ranks_per_node=2")
    poll(lambda: len(notes(tmp_path, "up")) == 2, "two ranks")
    process.send_signal(signal.SIGTERM)
    code, text = finish(process)
    assert code == 75, text
    assert len(events(tmp_path, "attempt_start")) == 1
    # The next start is a job of its own, with attempts that go on counting.
    process = launch(tmp_path, "serve_until_asked()", "ranks_per_node=2")
    poll(lambda: (1, 1) in notes(tmp_path, "up"), "the second job")
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 75


def test_a_rank_that_is_asked_before_it_listens_is_asked_again(tmp_path: Path) -> None:
    body = "note('early')\ntime.sleep(1.5)\nserve_until_asked()"
    process = launch(tmp_path, body)
    poll(lambda: notes(tmp_path, "early"), "the rank")
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 75


def test_killed_supervisor_leaves_no_process_and_goes_on_when_started_again(
    tmp_path: Path,
) -> None:
    body = """
import subprocess
child = subprocess.Popen(["sleep", "300"])
note("child", child.pid)
note("up")
time.sleep(300 if attempt == 0 else 0)
"""
    process = launch(tmp_path, body, "ranks_per_node=2")
    poll(lambda: len(notes(tmp_path, "up")) == 2, "two ranks")
    tree = descendants(process.pid)
    assert len(tree) >= 5, "the forking process, two ranks and a child of each"
    process.kill()
    process.wait()
    poll(lambda: not any(map(runs, tree)), "the end of the whole tree", 5)
    code, text = run(tmp_path, "", "ranks_per_node=2", timeout_s=30)
    assert code == 0, text
    assert {attempt for attempt, _ in notes(tmp_path, "up")} == {0, 1}


def test_ranks_end_with_the_process_that_forked_them_and_the_job_goes_on(tmp_path: Path) -> None:
    body = "note('parent', os.getppid())\nnote('up')\ntime.sleep(300 if attempt == 0 else 0)"
    process = launch(tmp_path, body, "ranks_per_node=2")
    poll(lambda: len(notes(tmp_path, "up")) == 2, "two ranks")
    pids = [int(pid) for pid in notes(tmp_path, "up").values()]
    os.kill(int(notes(tmp_path, "parent")[0, 0]), signal.SIGKILL)
    code, text = finish(process)
    assert code == 0, text
    assert not any(map(runs, pids))


NODES = """
note("up", f"{os.getpid()} {node} {world}")
if not (run_dir / "finish").exists():
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    wait_for(lambda: asked or (run_dir / "finish").exists(), 120)
    if asked:
        sys.exit(75)
"""
TWO = ("nodes=2", "ranks_per_node=2")


def ranks_up(run_dir: Path, attempt: int, count: int) -> None:
    poll(lambda: len([k for k in notes(run_dir, "up") if k[0] == attempt]) == count,
         f"{count} ranks in attempt {attempt}")  # fmt: skip


def kill_node(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()


def end_all(run_dir: Path, *processes: subprocess.Popen[str]) -> None:
    (run_dir / "finish").touch()
    for process in processes:
        code, text = finish(process)
        assert code == 0, text


@pytest.mark.parametrize("victim", [0, 1])
def test_a_spare_takes_the_place_of_a_lost_node_also_of_the_one_that_led(
    tmp_path: Path, victim: int
) -> None:
    fields = (*TWO, "spares=1")
    nodes = [launch(tmp_path, NODES, *fields)]
    poll((tmp_path / "launch/members/000001.json").exists, "the first node")
    nodes += [launch(tmp_path, NODES, *fields) for _ in range(2)]
    ranks_up(tmp_path, 0, 4)
    poll((tmp_path / "launch/members/000003.json").exists, "the spare")
    planned = (tmp_path / "launch/plan-0.json").read_text()
    tickets = json.loads(planned)["tickets"]
    by_pid = {process.pid: process for process in nodes}
    kill_node(by_pid.pop(member_pid(tmp_path, tickets[victim])))
    ranks_up(tmp_path, 1, 4)
    (replaced,) = poll(lambda: events(tmp_path, "replaced"), "the event")
    assert replaced["node"] == victim
    up = notes(tmp_path, "up")
    assert {up[1, rank].split()[1:] == [str(rank // 2), "4"] for rank in range(4)} == {True}
    end_all(tmp_path, *by_pid.values())


def member_pid(run_dir: Path, ticket: int) -> int:
    return json.loads((run_dir / f"launch/members/{ticket:06d}.json").read_text())["pid"]


def test_without_a_spare_the_job_shrinks_and_grows_when_the_node_returns(tmp_path: Path) -> None:
    fields = (*TWO, "min_nodes=1")
    first = launch(tmp_path, NODES, *fields)
    poll((tmp_path / "launch/members/000001.json").exists, "the first node")
    second = launch(tmp_path, NODES, *fields)
    ranks_up(tmp_path, 0, 4)
    kill_node(second)
    ranks_up(tmp_path, 1, 2)
    assert [e["nodes"] for e in poll(lambda: events(tmp_path, "shrink"), "the event")] == [1]
    again = launch(tmp_path, NODES, *fields)
    ranks_up(tmp_path, 2, 4)
    assert [e["nodes"] for e in poll(lambda: events(tmp_path, "grow"), "the event")] == [2]
    assert not events(tmp_path, "stop"), "the 75 of a grown job does not end it"
    end_all(tmp_path, first, again)


def test_two_nodes_lost_at_once_and_both_back(tmp_path: Path) -> None:
    fields = ("nodes=3", "ranks_per_node=1")
    nodes = [launch(tmp_path, NODES, *fields) for _ in range(3)]
    ranks_up(tmp_path, 0, 3)
    for process in nodes[:2]:
        process.kill()
    for process in nodes[:2]:
        process.wait()
    back = [launch(tmp_path, NODES, *fields) for _ in range(2)]
    ranks_up(tmp_path, 1, 3)
    end_all(tmp_path, nodes[2], *back)


def test_a_node_that_fails_again_and_again_is_excluded_when_a_spare_is_there(
    tmp_path: Path,
) -> None:
    body = """
note("up", f"{os.getpid()} {node} {world}")
bad = run_dir / "bad"
wait_for(lambda: bad.exists())
if os.getppid() in [int(p) for p in bad.read_text().split()]:
    os.kill(os.getpid(), signal.SIGSEGV)
serve_until_asked() if attempt < 2 else None
"""
    fields = ("nodes=2", "ranks_per_node=1", "spares=1", "backoff_s=0.01")
    nodes = [launch(tmp_path, body, *fields) for _ in range(3)]
    ranks_up(tmp_path, 0, 2)
    poll((tmp_path / "launch/members/000003.json").exists, "the spare")
    victim = int(notes(tmp_path, "up")[0, 1].split()[0])
    parent = Path(f"/proc/{victim}/stat").read_text().rpartition(")")[2].split()[1]
    (tmp_path / "bad.new").write_text(parent)
    (tmp_path / "bad.new").replace(tmp_path / "bad")
    for process in nodes:
        assert finish(process)[0] == 0
    (excluded,) = events(tmp_path, "excluded")
    assert "SIGSEGV" in excluded["why"]
    assert [e["node"] for e in events(tmp_path, "replaced")] == [1]
    assert len(events(tmp_path, "attempt_start")) == 3


def test_a_node_that_stood_still_is_replaced_and_comes_back_as_a_spare(tmp_path: Path) -> None:
    """Also where its process can be seen to live, silence for ``lease_s`` counts."""
    fields = (*TWO, "spares=1", "lease_s=1")
    nodes = [launch(tmp_path, NODES, *fields) for _ in range(3)]
    ranks_up(tmp_path, 0, 4)
    tickets = json.loads((tmp_path / "launch/plan-0.json").read_text())["tickets"]
    still = member_pid(tmp_path, tickets[0])
    os.kill(still, signal.SIGSTOP)
    try:
        ranks_up(tmp_path, 1, 4)
    finally:
        os.kill(still, signal.SIGCONT)
    poll((tmp_path / "launch/members/000004.json").exists, "the one that woke up")
    pids = [int(up.split()[0]) for (n, _), up in notes(tmp_path, "up").items() if n == 0]
    poll(lambda: not any(map(runs, pids)), "the end of the old attempt everywhere")
    assert len(events(tmp_path, "attempt_start")) == 2
    end_all(tmp_path, *nodes)


HANG = """
from hunyuan_train.resilience.heartbeat import Heartbeat
heart = Heartbeat(run_dir, attempt, rank, node=node).__enter__()
note("up", os.getpid())
for step in range(1, 40):
    for phase in ("data", "forward", "backward", "update"):
        heart.phase(phase, "1x8x8")
        time.sleep(0.005)
        if attempt == 0 and rank == 1 and step == 20 and phase == "forward":
            time.sleep(300)
    heart.phase("backward", "1x8x8")
    while attempt == 0 and step == 20:  # as in a collective that rank 1 never joins
        time.sleep(0.01)
    heart.beat(step, 0.02)
heart.__exit__(None, None, None)
"""


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_rank_that_hangs_is_killed_and_all_start_again(tmp_path: Path, nodes: int) -> None:
    fields = (f"nodes={nodes}", f"ranks_per_node={2 // nodes}", "watchdog_s=2")
    code, text = 0, ""
    for process in [launch(tmp_path, HANG, *fields) for _ in range(nodes)]:
        code, text = finish(process)
        assert code == 0, text
    (end, _) = events(tmp_path, "attempt_end")
    (failure,) = end["failures"]
    assert failure.startswith(f"rank 1 on node {nodes - 1} hung at step 19: rank 1"), failure
    kinds = {(e["fault"], e["rank"]) for e in events(tmp_path, "detected")}
    assert ("hang", 1) in kinds


SLOW = """
from hunyuan_train.resilience.heartbeat import Heartbeat
with Heartbeat(run_dir, attempt, rank, node=node, stacks=False) as heart:
    for step in range(1, 401):
        for phase in ("data", "forward", "backward", "update"):
            heart.phase(phase, "1x8x8")
        time.sleep(0.01)
        heart.beat(step, 0.01, busy_s=0.02 if rank == 1 else 0.01)
"""


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_slow_rank_is_told_once_and_goes_on(tmp_path: Path, nodes: int) -> None:
    fields = (f"nodes={nodes}", f"ranks_per_node={2 // nodes}", "watchdog_s=5")
    jobs = [launch(tmp_path, SLOW, *fields) for _ in range(nodes)]
    ended = [finish(job) for job in jobs]
    assert [code for code, _ in ended] == [0] * nodes, ended
    (found,) = events(tmp_path, "detected")
    assert (found["fault"], found["rank"], found["node"]) == ("straggler", 1, nodes - 1)
    assert found["slowness"] == pytest.approx(2, rel=0.05)
    assert len(events(tmp_path, "attempt_start")) == 1
    advice = [f"run `kill -9 {job.pid}` on" in text for job in jobs for _, text in ended]
    assert sum(advice) == (nodes == 2), "the machine of the slow rank"


def test_ranks_that_wait_for_an_import_that_hangs_can_be_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hanging_import.py").write_text("import time\ntime.sleep(300)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    standby = Standby(["hanging_import"])
    order = Order(
        attempt=0, node=0, nodes=1, ranks=2, address="127.0.0.1", port=1, argv=("nothing.py",)
    )  # fmt: skip
    agent = Agent(order, tmp_path, standby)
    try:
        assert agent.poll() == []
        for rank in range(2):
            agent.kill(rank, "It has not shown up.")
        poll(lambda: agent.poll() or agent.ended, "the end", 20)
        assert [failure.kind for failure in agent.failures] == ["hang", "hang"]
        assert not standby.alive
    finally:
        standby.close()


def test_a_preempted_node_ends_the_job_on_all_with_75(tmp_path: Path) -> None:
    body = NODES.replace("if asked:", "(run_dir / 'agreed').touch()\n    if True:").replace(
        "wait_for(lambda: asked", "wait_for(lambda: asked or (run_dir / 'agreed').exists()"
    )
    nodes = [launch(tmp_path, body, *TWO) for _ in range(2)]
    ranks_up(tmp_path, 0, 4)
    nodes[1].send_signal(signal.SIGTERM)
    assert [finish(process)[0] for process in nodes] == [75, 75]


def test_ports_are_free_and_outside_the_range_of_the_kernel() -> None:
    from hunyuan_train.resilience.board import free_port

    port = free_port(3)
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert port < low
    with socket.socket() as taken:
        taken.bind(("", port))
        assert free_port(3) != port

"""``launch/torchrun.sh``: two agents on one machine, one killed with its ranks and returning."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from fake_job import ROOT, descendants, poll

RANK = """
import os, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from hunyuan_train.runtime.dist import init_world
world = init_world("cpu", 30.0)
folder = Path(sys.argv[1])
while not (folder / "finish").exists():
    total = torch.ones(1)
    dist.all_reduce(total)
    if world.rank == 0:
        seen = folder / f"{os.environ['TORCHELASTIC_RUN_ID']}-{world.size}-{os.getpid()}"
        seen.write_text(str(total.item()))
    time.sleep(0.05)
os._exit(0)
"""


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    for pid in [process.pid, *descendants(process.pid)]:
        os.kill(pid, signal.SIGKILL)
    process.wait()


@pytest.mark.dist
@pytest.mark.slow
def test_an_agent_that_is_killed_leaves_the_other_running_and_may_return(tmp_path: Path) -> None:
    (tmp_path / "rank_of_test.py").write_text(RANK)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {
        **os.environ,
        "PYTHON": sys.executable,
        "PYTHONPATH": f"{ROOT}:{tmp_path}",
        "NODES": "1:2",
        "RENDEZVOUS": f"127.0.0.1:{port}",
        "MODULE": "rank_of_test",
    }

    def agent() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            ["bash", str(ROOT / "launch/torchrun.sh"), "1", str(tmp_path)], env=env
        )

    def meetings(size: int) -> set[str]:
        return {path.name for path in tmp_path.glob(f"*-{size}-*")}

    host = agent()  # holds the rendezvous, which is why the other one is killed
    poll(lambda: meetings(1) or meetings(2), "the first agent", 90)
    other = agent()
    poll(lambda: meetings(2), "two ranks", 90)
    kill_tree(other)
    alone = len(meetings(1))
    poll(lambda: len(meetings(1)) > alone, "one rank alone", 90)
    together = len(meetings(2))
    other = agent()
    poll(lambda: len(meetings(2)) > together, "two ranks again", 90)
    (tmp_path / "finish").touch()
    for process in (host, other):
        assert process.wait(timeout=60) == 0

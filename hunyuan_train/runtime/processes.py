"""Starting our own command line in child processes, one or several ranks of it."""

import subprocess
import sys
from collections.abc import Sequence

from hunyuan_train.runtime.env import child_environment


def rank_command(verb: str, arguments: Sequence[str], ranks: int) -> list[str]:
    """Return the command line that runs ``verb`` on ``ranks`` local processes under torchrun."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*command, "-m", "hunyuan_train", verb, *arguments]


def run_ranks(verb: str, arguments: Sequence[str], ranks: int) -> None:
    """Run ``verb`` to its end, its output going where ours goes; one thread per rank.

    Raises:
        ValueError: if it fails; what it printed says why.
    """
    done = subprocess.run(
        rank_command(verb, arguments, ranks),
        env=child_environment(OMP_NUM_THREADS="1"),
        check=False,
    )
    if done.returncode:
        raise ValueError(
            f"`hunyuan-train {verb}` ended with exit code {done.returncode}; its message is above"
        )

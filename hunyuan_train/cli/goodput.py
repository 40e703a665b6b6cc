"""``hunyuan-train goodput``: where the wall-clock time of a run went."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from hunyuan_train.cli.launching import run_folder
from hunyuan_train.engine.goodput import goodput_of, goodput_text, write_goodput


def main(argv: Sequence[str]) -> int:
    """Print the account of the run in ``run.dir``, and write it there as JSON and as a chart."""
    folder = Path(run_folder(argv))
    found = goodput_of(folder)
    console = Console()
    goodput_text(found, console)
    for path in write_goodput(folder, found):
        console.print(str(path), highlight=False, soft_wrap=True)
    return 0

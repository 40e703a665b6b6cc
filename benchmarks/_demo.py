"""What the scripts that measure the full demo share: where it is, and how it is made small."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

RECIPE = "recipe=demo_full"
QUICK = [
    "demo.num_clips=12", "demo.num_images=6", "demo.num_prompts=1", "demo.num_held_out=6",
    "demo.ranks=1", "model.hidden_size=32", "model.num_heads=1",
    "model.num_double_blocks=1", "model.num_single_blocks=1", "optimizer.warmup_steps=0",
    "optimizer.unfreeze={}", "stage.steps=2", "sample.steps=2", "certify.at_start=false",
    "checkpoint.asynchronous=false", "logging.progress=off",
]  # fmt: skip


def parse(what: str) -> Namespace:
    """Read the command line: where the demo is, or a tiny one of its own."""
    parser = ArgumentParser(description=what)
    parser.add_argument("--run", default="runs/demo-full", type=Path)
    parser.add_argument("--quick", action="store_true", help="a demo of a few updates, made anew")
    return parser.parse_args()


@contextmanager
def demo_fields(options: Namespace) -> Iterator[tuple[Path, list[str]]]:
    """Give the folder of the demo and the overrides that make it."""
    if not options.quick:
        yield options.run, [RECIPE, f"run.dir={options.run}"]
        return
    with TemporaryDirectory() as folder:
        yield Path(folder), [RECIPE, *QUICK, f"run.dir={folder}"]

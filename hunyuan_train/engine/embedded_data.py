"""Data to train on that nothing has to be downloaded for: moving shapes, a VAE, their latents."""

import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hunyuan_train.config.root import RunConfig
from hunyuan_train.data.shapes import write_shapes_dataset
from hunyuan_train.runtime.processes import run_ranks

log = logging.getLogger(__name__)

VAE_RUN = "vae-training"
"""Folder of the VAE's training below ``run.dir``."""
_UNSEEN = 4
"""Clips, and as many images, on which the VAE is measured and shown."""
_AT_END = 1_000_000_000
"""Updates between two measurements: there is one, after the last update."""


class Stopwatch:
    """Seconds each named part took, kept on disk so that a restart reports them all."""

    def __init__(self, path: Path) -> None:
        """Read the times of an earlier start, if there was one."""
        self._path = path
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}

    def run(self, name: str, part: Callable[[], None]) -> None:
        """Run ``part`` unless it has finished before, and note its seconds."""
        if name in self.seconds:
            log.info("%s: done already", name)
            return
        log.info("%s", name)
        started = time.monotonic()
        part()
        self.seconds[name] = time.monotonic() - started
        self._path.write_text(json.dumps(self.seconds, indent=2))


def make_data(cfg: RunConfig, arguments: Sequence[str], watch: Stopwatch) -> list[str]:
    """Draw clips, train a VAE on them and encode them, all in ``run.dir``; skip what is done.

    Args:
        cfg: Sizes of the data and of the VAE's training.
        arguments: The overrides it was composed from, handed on to every verb.
        watch: What times the parts.

    Returns:
        The overrides that make a run use the data.

    Raises:
        ValueError: if a part fails.
    """
    folder, demo = Path(cfg.run.dir), cfg.demo
    clips = folder / "clips"
    found = [f"data.source={clips}", f"data.latents={folder / 'latents'}"]
    found.append(f"run.vae={folder / 'vae'}")
    fields = [*arguments, *found]

    unseen = folder / "vae-held-out"

    def draw() -> None:
        write_shapes_dataset(clips, demo.num_clips, demo.num_images, cfg.run.seed)
        write_shapes_dataset(unseen, _UNSEEN, _UNSEEN, cfg.run.seed + 1)

    watch.run("draw clips", draw)
    own = [
        *fields,
        "stage=demo_vae",
        f"run.dir={folder / VAE_RUN}",
        f"run.name={VAE_RUN}",
        f"evaluation.clips={unseen}",
        f"evaluation.every_steps={_AT_END}",
        f"evaluation.sample_every={_AT_END}",
        "evaluation.samples_per_bucket=2",
    ]
    watch.run("train the VAE", lambda: run_ranks("train", [*own, "run.threads=1"], 1))
    watch.run("precompute", lambda: run_ranks("precompute", fields, demo.ranks))
    return found

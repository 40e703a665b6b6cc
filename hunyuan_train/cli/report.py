"""``hunyuan-train report``: curves, samples and figures of a run as one HTML page."""

from collections.abc import Sequence
from pathlib import Path

from hunyuan_train.cli.launching import run_folder
from hunyuan_train.config.compose import load_config
from hunyuan_train.engine.reporting import report_run
from hunyuan_train.engine.sampling import newest_weights


def main(argv: Sequence[str]) -> int:
    """Write the report of the run in ``run.dir`` and print its path."""
    folder = Path(run_folder(argv))
    cfg = load_config(newest_weights(folder).config, argv)
    samples = Path(cfg.sample.output) if cfg.sample.output else folder / "samples"
    print(report_run(folder, samples))
    return 0

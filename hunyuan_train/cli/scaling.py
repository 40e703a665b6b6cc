"""``hunyuan-train scaling``: the best model size and tokens for a compute, from real runs."""

from collections.abc import Sequence
from pathlib import Path

from hunyuan_train.cli.launching import composed
from hunyuan_train.engine.embedded_data import Stopwatch, make_data
from hunyuan_train.engine.scaling import CHART_NAME, JSON_NAME, fit_scaling, sweep
from hunyuan_train.observability.logging import setup_logging


def main(argv: Sequence[str]) -> int:
    """Fit a law to ``scaling.runs``; with the word ``sweep`` first, train the runs."""
    sweeping = bool(argv) and argv[0] == "sweep"
    arguments = list(argv[1:] if sweeping else argv)
    cfg = composed(arguments)
    if cfg is None:
        return 0
    setup_logging(cfg.logging)
    folder = Path(cfg.run.dir)
    if sweeping:
        if not cfg.data.latents:
            folder.mkdir(parents=True, exist_ok=True)
            arguments += make_data(cfg, arguments, Stopwatch(folder / "seconds.json"))
        cfg.scaling.runs = sweep(cfg, arguments)
    result = fit_scaling(cfg)
    result.write(folder)
    print(f"{result}\n\n{folder / CHART_NAME}\n{folder / JSON_NAME}")
    return 0

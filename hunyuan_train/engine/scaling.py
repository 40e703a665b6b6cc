"""Scaling laws of real runs: read their curves, fit, draw; and what a budget is best spent on."""

import dataclasses
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hunyuan_train.config.compose import CONFIG_NAME, compose_config, load_config
from hunyuan_train.config.root import RunConfig
from hunyuan_train.engine.build import build_on_meta
from hunyuan_train.evaluation.report import StageCurves
from hunyuan_train.evaluation.scaling import (
    BILLION,
    FLOPS_PER_TOKEN,
    PETA,
    PUBLISHED,
    Curve,
    Optimum,
    PowerLaw,
    ScalingFit,
    ScalingLaw,
    fit_curves,
    fit_optima,
)
from hunyuan_train.evaluation.scaling_chart import scaling_chart
from hunyuan_train.runtime.processes import run_ranks

JSON_NAME = "scaling.json"
CHART_NAME = "scaling.png"
_BASE_WIDTH = 128
_COLUMNS = ("compute", "size", "tokens")
_SECONDS_PER_DAY = 86_400


def count_parameters(cfg: RunConfig) -> int:
    """Return the parameters of the model of ``cfg``."""
    return sum(parameter.numel() for parameter in build_on_meta(cfg).parameters())


def read_curve(folder: Path, skip: float) -> Curve:
    """Return the training loss of a run over its tokens.

    Args:
        folder: ``run.dir`` of a run.
        skip: share of its tokens to leave out at the start.

    Raises:
        ValueError: if the folder is not a run's or holds too few rows of metrics.
    """
    cfg = load_config(folder / CONFIG_NAME)
    rows = StageCurves.read(folder.name, folder / "metrics.jsonl").rows
    pairs = [(row["tokens"], row["loss"]) for row in rows if row.get("loss") is not None]
    tokens, loss = np.array(pairs, dtype=float).reshape(-1, 2).T
    kept = tokens >= skip * tokens.max(initial=0.0)
    if kept.sum() < 10:
        raise ValueError(
            f"{folder} has {int(kept.sum())} rows of metrics after the first {skip:.0%}; train it "
            "longer, or lower logging.every_steps"
        )
    return Curve(float(count_parameters(cfg)), tokens[kept], loss[kept])


def read_points(path: Path) -> list[Optimum]:
    """Read optima from a JSON file.

    Raises:
        ValueError: if the file is missing or a row lacks a number.
    """
    try:
        rows = json.loads(path.read_text())
        return [Optimum(*(float(row[name]) for name in _COLUMNS)) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"scaling.points={path} is not a list of rows like "
            f'{{"compute": 1e6, "size": 1.3, "tokens": 127}} (petaFLOP, billions): {error}'
        ) from error


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingResult:
    """A fitted law and what it says."""

    law: ScalingLaw
    fit: ScalingFit | None
    """None for a law through given points."""
    curves: list[Curve]
    optima: list[Optimum]

    def write(self, folder: Path) -> None:
        """Write ``scaling.json`` and ``scaling.png``."""
        folder.mkdir(parents=True, exist_ok=True)
        figures = {
            "law": dataclasses.asdict(self.law),
            "sizes": [curve.params for curve in self.curves],
            "optima": [dataclasses.asdict(point) for point in self.optima],
        }
        if self.fit is not None:
            figures["size_exponent_95"] = dataclasses.asdict(self.fit.size_exponent)
            figures["tokens_exponent_95"] = dataclasses.asdict(self.fit.tokens_exponent)
        (folder / JSON_NAME).write_text(json.dumps(figures, indent=2))
        (folder / CHART_NAME).write_bytes(scaling_chart(self.curves, self.optima, self.law))

    def __str__(self) -> str:
        """Return the laws in one line each."""
        lines = []
        for name, law, interval in (
            ("N", self.law.size, self.fit and self.fit.size_exponent),
            ("D", self.law.tokens, self.fit and self.fit.tokens_exponent),
        ):
            sure = f"  (95 %: {interval.low:.3f} to {interval.high:.3f})" if interval else ""
            lines.append(f"{name}_opt = {law.factor:.3g} * C^{law.exponent:.4f}{sure}")
        return "\n".join([*lines, "N and D in billions, C in petaFLOP = 6 N D"])


def fit_scaling(cfg: RunConfig) -> ScalingResult:
    """Fit a law to the runs or points that ``scaling`` names.

    Raises:
        ValueError: if there are none, or they do not decide a law.
    """
    scaling = cfg.scaling
    if scaling.points:
        optima = read_points(Path(scaling.points))
        return ScalingResult(law=fit_optima(optima), fit=None, curves=[], optima=optima)
    if not scaling.runs:
        raise ValueError(
            "scaling.runs is empty; name the folders of runs of several model sizes, or let "
            "`hunyuan-train scaling sweep` train some"
        )
    curves = [read_curve(Path(folder), scaling.skip) for folder in scaling.runs]
    fit = fit_curves(curves, repetitions=scaling.repetitions, seed=cfg.run.seed)
    return ScalingResult(law=fit.law, fit=fit, curves=curves, optima=fit.optima)


def sweep(cfg: RunConfig, arguments: Sequence[str]) -> list[str]:
    """Train one model per width of ``scaling.widths`` on the same compute; return their folders.

    Depth and head size are those of the model of ``cfg``, the learning rate falls with the width
    and stays constant, so that every point of a curve is a run that could have ended there. As many
    run at once as there are cores; what is finished is left as it is.

    Args:
        cfg: The sweep's config; ``data.latents`` is trained on.
        arguments: The overrides it was composed from.

    Raises:
        ValueError: a width does not fit the heads, or a run fails.
    """
    head = cfg.model.head_dim
    jobs: list[tuple[str, list[str]]] = []
    for width in cfg.scaling.widths:
        if width % head:
            raise ValueError(
                f"scaling.widths holds {width}, which is not a multiple of the head size {head}"
            )
        folder = str(Path(cfg.run.dir) / f"width-{width:04d}")
        fields = [
            *arguments,
            f"run.dir={folder}",
            f"run.name=width-{width}",
            f"model.hidden_size={width}",
            f"model.num_heads={width // head}",
            f"optimizer.lr={cfg.optimizer.lr * _BASE_WIDTH / width}",
            "optimizer.schedule=constant",
            "resilience.guard=off",
        ]
        tokens = cfg.scaling.sweep_pflop * PETA / FLOPS_PER_TOKEN
        tokens /= count_parameters(compose_config(fields))
        jobs.append((folder, [*fields, f"stage.tokens={int(tokens)}", "stage.steps=1000000"]))
    # The largest budget of tokens first: the smallest model takes longest.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in [pool.submit(run_ranks, "train", fields, 1) for _, fields in jobs]:
            done.result()
    return [folder for folder, _ in jobs]


def named_law(name: str) -> ScalingLaw:
    """Return a published law, or that of a ``scaling.json``.

    Raises:
        ValueError: if there is none of that name.
    """
    if name in PUBLISHED:
        return PUBLISHED[name]
    try:
        law = json.loads(Path(name).read_text())["law"]
        return ScalingLaw(PowerLaw(**law["size"]), PowerLaw(**law["tokens"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"scaling.law={name} is neither of {', '.join(PUBLISHED)} nor a {JSON_NAME} that "
            f"`hunyuan-train scaling` wrote ({error})"
        ) from error


def plan_budget(cfg: RunConfig) -> str:
    """Say what the budget ``scaling.budget`` is best spent on, and what it costs on the cluster.

    Raises:
        ValueError: if the law is unknown.
    """
    scaling, cluster = cfg.scaling, cfg.cluster
    law = named_law(scaling.law)
    mine = count_parameters(cfg) / BILLION
    budget = scaling.budget or law.budget_of(mine)
    size, tokens = law.size(budget), law.tokens(budget)
    rate = cluster.peak_tflops * scaling.mfu / 1000  # petaFLOP/s of one GPU
    days = budget / rate / _SECONDS_PER_DAY
    gpus = cluster.nodes * cluster.gpus_per_node
    rows = [
        ("budget", f"{budget:.3g} petaFLOP by 6 N D, law `{scaling.law}`"),
        ("model", f"{size:.3g} billion parameters (this config: {mine:.3g})"),
        ("tokens", f"{tokens:.4g} billion"),
        (
            f"{cluster.gpu} days",
            f"{days:,.1f} at {scaling.mfu:.0%} of {cluster.peak_tflops:g} TFLOP/s; "
            f"{days / gpus:,.2f} days on {gpus} of them",
        ),
    ]
    lines = [f"{name:<12} {text}" for name, text in rows]
    lines.append(
        "6 N D leaves attention out: little at 256 px, 87 % of a step at 720p and 129 frames; "
        "`plan` counts it for a stage."
    )
    return "\n".join(lines)

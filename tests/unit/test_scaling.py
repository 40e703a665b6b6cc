"""Scaling laws: planted exponents come back, published constants reproduce, runs are read."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hunyuan_train.config.compose import compose_config, save_config
from hunyuan_train.engine.scaling import (
    CHART_NAME,
    JSON_NAME,
    count_parameters,
    fit_scaling,
    named_law,
    plan_budget,
    read_curve,
)
from hunyuan_train.evaluation.scaling import (
    PUBLISHED,
    Curve,
    Optimum,
    envelope,
    fit_curves,
    fit_optima,
)

SIZES = np.geomspace(3e7, 3e9, 7)


def planted(alpha: float, beta: float, noise: float, seed: int = 1) -> list[Curve]:
    """Loss curves of ``0.4 + A N^-alpha + B D^-beta``, whose best N grows as C^(beta/(a+b))."""
    generator = np.random.default_rng(seed)
    curves = []
    for size in SIZES:
        tokens = np.geomspace(0.003, 1, 400) * SIZES[-1] * 2e10 / size
        loss = 0.4 + 0.3 * (1e8 / size) ** alpha + 0.3 * (2e9 / tokens) ** beta
        loss = loss * (1 + noise * generator.standard_normal(len(tokens)))
        curves.append(Curve(float(size), tokens, loss))
    return curves


@pytest.mark.parametrize(("alpha", "beta"), [(0.34, 0.28), (0.4, 0.5), (0.5, 0.3)])
@pytest.mark.parametrize("noise", [0.0, 0.003, 0.01])
def test_planted_exponents_are_recovered_within_two_percent(
    alpha: float, beta: float, noise: float
) -> None:
    law = fit_optima(envelope(planted(alpha, beta, noise)))
    expected = beta / (alpha + beta)
    assert law.size.exponent == pytest.approx(expected, rel=0.02)
    assert law.tokens.exponent == pytest.approx(1 - expected, rel=0.02)


def test_the_intervals_hold_the_planted_exponents_and_widen_with_noise() -> None:
    quiet = fit_curves(planted(0.34, 0.28, 0.001), repetitions=40)
    noisy = fit_curves(planted(0.34, 0.28, 0.01), repetitions=40)
    expected = 0.28 / 0.62
    assert noisy.size_exponent.low < expected < noisy.size_exponent.high
    assert noisy.tokens_exponent.low < 1 - expected < noisy.tokens_exponent.high
    width = [fit.size_exponent.high - fit.size_exponent.low for fit in (quiet, noisy)]
    assert 0 < width[0] < width[1]


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_constants_come_back_from_their_own_predictions(
    name: str, tmp_path: Path
) -> None:
    law = PUBLISHED[name]
    rows = [
        {"compute": c, "size": law.size(c), "tokens": law.tokens(c)} for c in (1e4, 1e6, 7e7, 1e9)
    ]
    path = tmp_path / "points.json"
    path.write_text(json.dumps(rows))
    found = fit_scaling(compose_config([f"scaling.points={path}"])).law
    assert found.size.factor == pytest.approx(law.size.factor, rel=1e-6)
    assert found.size.exponent == pytest.approx(law.size.exponent, rel=1e-6)
    assert found.tokens.factor == pytest.approx(law.tokens.factor, rel=1e-6)
    assert found.tokens.exponent == pytest.approx(law.tokens.exponent, rel=1e-6)


def test_the_published_laws_say_what_the_report_says_of_13_billion() -> None:
    """Inverting the published constants by hand: 5.83e7 and 6.96e7 petaFLOP, 740 and 924 B."""
    for name, compute, tokens in (("image", 5.83e7, 740), ("video", 6.96e7, 924)):
        budget = PUBLISHED[name].budget_of(13)
        assert budget == pytest.approx(compute, rel=0.01)
        assert PUBLISHED[name].tokens(budget) == pytest.approx(tokens, rel=0.01)


def test_two_sizes_or_curves_that_never_cross_are_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"scaling\.runs hold 2 model sizes"):
        envelope(planted(0.34, 0.28, 0.0)[:2])
    better = [
        Curve(size, np.geomspace(1e6, 1e8, 50), np.full(50, 1.0 / number))
        for number, size in enumerate((1e6, 2e6, 4e6), start=1)
    ]
    with pytest.raises(ValueError, match="cross at 0 of"):
        envelope(better)


def run_folder(folder: Path, width: int, rows: int = 60) -> Path:
    fields = [f"model.hidden_size={width}", f"model.num_heads={width // 32}", "model=tiny"]
    cfg = compose_config(fields)
    save_config(cfg, folder / "config.yaml")
    params = count_parameters(cfg)
    lines = []
    for number in range(1, rows + 1):
        tokens = number * 3e13 / params
        loss = 0.4 + 0.3 * (1e6 / params) ** 0.4 + 0.3 * (1e7 / tokens) ** 0.4
        lines.append(json.dumps({"step": number, "tokens": tokens, "loss": loss}))
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    return folder


def test_runs_are_read_fitted_and_drawn(tmp_path: Path) -> None:
    folders = [run_folder(tmp_path / str(w), w) for w in (32, 64, 96, 160, 256)]
    curve = read_curve(folders[0], skip=0.5)
    assert len(curve.tokens) == 31  # half of 60 rows, and the one at the half
    names = ",".join(str(folder) for folder in folders)
    fields = [f"scaling.runs=[{names}]", "scaling.repetitions=20", "scaling.skip=0.02"]
    result = fit_scaling(compose_config(fields))
    result.write(tmp_path)
    assert result.law.size.exponent == pytest.approx(0.5, rel=0.05)
    assert (tmp_path / CHART_NAME).read_bytes().startswith(b"\x89PNG")
    assert named_law(str(tmp_path / JSON_NAME)) == result.law
    assert "95 %" in str(result)


def test_a_short_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has 5 rows of metrics after the first 10%"):
        read_curve(run_folder(tmp_path / "short", 32, rows=5), skip=0.1)


def test_a_budget_is_divided_by_the_law_and_priced_on_the_cluster() -> None:
    text = plan_budget(compose_config(["scaling.budget=1e7", "cluster=h100", "scaling.mfu=0.5"]))
    assert "6.44 billion parameters" in text  # 0.0189 * 1e7^0.3618
    assert "272.7 billion" in text  # 0.0108 * 1e7^0.6289
    assert "234.0 at 50%" in text  # 1e7 petaFLOP at 0.4947 petaFLOP/s
    assert "29.25 days on 8" in text


def test_an_unknown_law_is_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"scaling\.law=colour is neither of image, video nor"):
        plan_budget(compose_config(["scaling.law=colour"]))


def test_optimum_splits_compute_between_size_and_tokens() -> None:
    point = Optimum.of(6e3, 1e9)
    assert point.size == 1.0
    assert point.tokens == pytest.approx(1.0)
    assert torch.isfinite(torch.tensor(point.tokens))

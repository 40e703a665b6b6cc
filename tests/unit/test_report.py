"""The report: every figure in the JSON, everything embedded in the HTML."""

import base64
import io
import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

from hunyuan_train.evaluation.charts import bar_chart, curve_chart
from hunyuan_train.evaluation.report import Report, SampleGrid, StageCurves, write_report


def rows(count: int, first: float) -> list[dict]:
    return [
        {
            "step": 10 * (i + 1),
            "loss": first / (i + 1),
            "tokens_per_s": 1000.0 + i,
            "step_s": 0.5,
            "samples": 40 * (i + 1),
            "peak_gib": 0.5,
        }
        for i in range(count)
    ]


def demo_report() -> Report:
    clip = torch.linspace(-1, 1, 3 * 5 * 32 * 48).reshape(3, 5, 32, 48)
    return Report(
        title="Shapes & colours",
        intro="What < this run did.",
        figures={
            "seconds": 512.5,
            "peak_gib": 2.25,
            "prompt_following": {"colour": 0.97, "shape": 0.8, "direction": 0.9},
            "untrained": {"colour": 0.1, "shape": 0.0, "direction": math.nan},
            "chance": {"colour": 1 / 6, "shape": 0.25, "direction": 0.25},
            "ceiling": {"colour": 1.0, "shape": 1.0, "direction": 1.0},
        },
        targets={"colour": 0.9, "shape": 0.7, "direction": 0.85},
        stages=[
            StageCurves(name="image", rows=rows(60, 2.0)),
            StageCurves(name="video", rows=rows(1, 1.0)),
        ],
        grids=[
            SampleGrid(
                title="Held-out prompts",
                videos=[clip, clip[:, :1]],
                captions=["a red circle moving left", "a <b>bold</b> image"],
                verdicts=[{"colour": True, "direction": False}, {"colour": True}],
                note="Never seen in training.",
            )
        ],
        extra_curves={"VAE training": {"absolute": [(0, 1.0), (1, 0.5)]}},
        settings={"model": "1.5M parameters"},
    )


def test_json_holds_every_figure_and_null_for_what_was_not_measured(tmp_path):
    write_report(tmp_path, demo_report())
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["seconds"] == 512.5
    assert data["prompt_following"] == {"colour": 0.97, "shape": 0.8, "direction": 0.9}
    assert data["untrained"]["direction"] is None
    image, video = data["stages"]
    assert image["name"] == "image"
    assert image["steps"] == 600
    assert image["samples"] == 2400
    assert image["seconds"] == pytest.approx(300)
    assert image["tokens_per_s"] == pytest.approx(1029.5)
    assert image["loss_start"] == 2.0
    assert image["loss"] == pytest.approx(np.mean([2.0 / i for i in range(55, 61)]))
    assert video["loss"] == 1.0


def test_html_stands_alone_and_escapes_text(tmp_path):
    page = write_report(tmp_path / "new", demo_report()).read_text()
    sources = re.findall(r'src="([^"]*)"', page)
    assert sources
    assert all(source.startswith("data:") for source in sources)
    assert not re.findall(r"https?://", page)
    assert "<!--" not in page
    assert "Shapes &amp; colours" in page
    assert "What &lt; this run did." in page
    assert "a &lt;b&gt;bold&lt;/b&gt; image" in page
    assert "<span class=no>direction</span>" in page
    assert page.count("<video ") == 1
    # bars, loss, throughput, the image sample, the VAE's curve
    assert len([s for s in sources if s.startswith("data:image/png")]) == 5


def test_embedded_media_can_be_decoded(tmp_path):
    av = pytest.importorskip("av")
    page = write_report(tmp_path, demo_report()).read_text()
    for kind, data in re.findall(r'src="data:([^;]*);base64,([^"]*)"', page):
        raw = io.BytesIO(base64.b64decode(data, validate=True))
        if kind == "image/png":
            Image.open(raw).verify()
        else:
            with av.open(raw) as container:
                frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
            assert np.shape(frames) == (5, 32, 48, 3)


def test_run_without_scores_or_samples_still_reports(tmp_path):
    report = Report(title="Real clips", stages=[StageCurves(name="one", rows=rows(3, 1.0))])
    page = write_report(tmp_path, report).read_text()
    assert "Prompt following" not in page
    assert "Training, stage after stage" in page
    assert "Settings" not in page
    assert set(json.loads((tmp_path / "report.json").read_text())) == {"stages"}


def test_rows_without_a_value_are_left_out():
    stage = StageCurves(
        name="s",
        rows=[{"step": 1, "loss": None}, {"step": 2, "loss": 0.5}, {"step": 3}],
    )
    assert stage.points("loss") == [(2, 0.5)]
    assert stage.figures() == {"name": "s", "loss_start": 0.5, "loss": 0.5, "steps": 3}
    assert StageCurves(name="empty", rows=[]).figures() == {"name": "empty"}


def test_metrics_file_is_read_and_a_bad_one_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(ValueError, match=r"stage image has no metrics at .*metrics.jsonl"):
        StageCurves.read("image", path)
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n')
    assert StageCurves.read("image", path).points("loss") == [(1, 2.0), (2, 1.5)]
    path.write_text('{"step": 1}\n{"step": \n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is not JSON"):
        StageCurves.read("image", path)


def test_grid_with_missing_captions_is_refused(tmp_path):
    grid = SampleGrid(title="g", videos=[torch.zeros(3, 1, 16, 16)], captions=[])
    with pytest.raises(ValueError, match="'g' has 1 clips, 0 captions and 0 verdicts"):
        write_report(tmp_path, Report(title="t", grids=[grid]))


def test_charts_are_pictures_of_what_they_are_given():
    high = curve_chart({"a": [(0, 1.0), (1, 1.0)]}, x_label="x", y_label="y")
    low = curve_chart({"a": [(0, 1.0), (1, 0.0)]}, x_label="x", y_label="y")
    assert Image.open(io.BytesIO(high)).size == Image.open(io.BytesIO(low)).size
    assert high != low
    empty = curve_chart({"a": [], "b": []}, x_label="x", y_label="y", log_y=True)
    assert Image.open(io.BytesIO(empty)).format == "PNG"
    bars = bar_chart(["c"], {"one": [0.5], "none": [math.nan]}, y_label="y", targets=[0.9])
    assert bars != bar_chart(["c"], {"one": [0.6], "none": [math.nan]}, y_label="y", targets=[0.9])

"""The report's story of a curriculum: from what its folders hold to one page."""

import json
import re
from pathlib import Path

import pytest
import torch

from hunyuan_train.config.compose import compose_config, save_config
from hunyuan_train.engine.ledger import Ledger, StageRecord, Status
from hunyuan_train.engine.story import (
    evaluation_tables,
    opening_tables,
    progress_grids,
    stage_folders,
)
from hunyuan_train.evaluation.report import Report, Table, write_report
from hunyuan_train.evaluation.story import loss_table, spread
from hunyuan_train.evaluation.timeline import StageBar, stages_chart
from hunyuan_train.evaluation.video import write_mp4, write_png

ZERO = 1_700_000_000.0


def lines(path: Path, *rows: dict) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A curriculum of two finished stages, a running branch and one that waits."""
    records = {
        "image": StageRecord(
            folder="stages/01-image", state=Status.done, steps=20, samples=80, tokens=5000,
            ended_by="plateau", started=ZERO, attempts=[[ZERO, ZERO + 60], [ZERO + 70, ZERO + 100]],
        ),
        "later": StageRecord(folder="stages/04-later", after="video"),
        "branch": StageRecord(
            folder="stages/03-branch", after="image", state=Status.running, started=ZERO + 300,
            attempts=[[ZERO + 300, ZERO + 310]],
        ),
        "video": StageRecord(
            folder="stages/02-video", after="image", state=Status.done, steps=10, samples=30,
            tokens=9000, ended_by="steps", started=ZERO + 100, attempts=[[ZERO + 100, ZERO + 300]],
        ),
    }  # fmt: skip
    Ledger(identity="x", stages=records).write(tmp_path)
    for name in ("image", "video", "branch"):
        path = tmp_path / records[name].folder
        save_config(compose_config([f"run.dir={path}"]), path / "config.yaml")
    image, video = tmp_path / "stages/01-image", tmp_path / "stages/02-video"
    lines(
        image / "evaluation.jsonl",
        {"step": 10, "loss": 1.0, "ema/loss": 1.1, "q0.5": 1.0, "ema/q0.5": 1.1},
        {
            "step": 20, "loss": 0.5, "q0.5": 0.5, "1x64x64": 0.5, "1x64x64/q0.5": 0.5,
            "ema/loss": 0.6, "ema/q0.5": 0.6, "ema/1x64x64": 0.61, "ema/1x64x64/q0.5": 0.62,
            "seconds": 1.0,
        },
    )  # fmt: skip
    with (image / "evaluation.jsonl").open("a") as file:
        file.write('{"step": 3')
    early = {"films/1x64x64/q0.1/loss": 9.0, "films/1x64x64/q0.1/tokens": 1000}
    late = {
        "films/1x64x64/q0.1/loss": 2.0, "films/1x64x64/q0.1/tokens": 10,
        "films/1x64x64/q0.9/loss": 1.0, "films/1x64x64/q0.9/tokens": 10,
        "a/b/5x64x64/q0.9/loss": 3.0, "a/b/5x64x64/q0.9/tokens": 10,
    }  # fmt: skip
    more = {"films/1x64x64/q0.1/loss": 5.0, "films/1x64x64/q0.1/tokens": 20}
    rows = [{"step": s, **early} for s in range(18)]
    lines(image / "loss_table.jsonl", *rows, {"step": 18, **late}, {"step": 19, **more})
    bucket = {"samples": 4, "tokens": 64, "loss": 1.0, "seconds": 1.0}
    for path, name in ((image, "1x64x64"), (video, "5x64x64")):
        row = {f"{name}/{key}": value for key, value in bucket.items()}
        lines(path / "buckets.jsonl", {"step": 1, **row}, {"step": 2, **row})
    for path, step, value in ((image, 10, -1.0), (image, 20, 0.0), (video, 10, 1.0)):
        place = path / "samples" / f"step-{step:08d}"
        place.mkdir(parents=True)
        (place / "prompts.json").write_text('["a fox", "a cat"]')
        write_png(place / "000-0.png", torch.full((3, 1, 16, 16), value))
        write_mp4(place / "001-0.mp4", torch.full((3, 5, 16, 16), value), 8)
    (video / "samples" / "step-00000099").mkdir()  # not complete
    return tmp_path


def test_stages_come_in_the_order_they_ran(folder: Path) -> None:
    assert list(stage_folders(folder)) == ["image", "video", "branch"]
    assert stage_folders(folder / "stages/01-image") == {"01-image": folder / "stages/01-image"}


def test_the_page_opens_with_stages_over_time_and_data_seen(folder: Path) -> None:
    stages, seen = opening_tables(folder)
    assert [row[0] for row in stages.rows] == ["image", "video", "branch", "later", "all"]
    assert stages.rows[0] == [
        "image", "nothing", "done, by its plateau", "2023-11-14 22:13:20", "1m30s", "2", "20",
        "80", "5,000",
    ]  # fmt: skip
    assert stages.rows[-1][4:] == ["5m00s", "4", "", "110", "14,000"]
    assert stages.chart.startswith(b"\x89PNG")
    assert seen.rows == [
        ["image", "8", "0", "0", "128", "1"],
        ["video", "0", "8", "40", "128", "1"],
        ["all", "8", "8", "40", "256", ""],
    ]


def test_held_out_losses_are_shown_of_every_stage_that_has_them(folder: Path) -> None:
    overview, last, losses = evaluation_tables(folder)
    assert overview.rows == [["image", "2", "1.1000", "0.6000", "0.6000", "0.5000"]]
    assert last.title == "Held-out loss after update 20 of stage image"
    assert last.columns == ["bucket", "all noise levels", "q0.5"]
    assert last.rows == [["1x64x64", "0.6100", "0.6200"], ["all", "0.6000", "0.6000"]]
    assert losses.title == "Training loss by noise level, stage image"


def test_training_losses_are_means_over_the_tokens_of_the_last_rows(folder: Path) -> None:
    table = loss_table("image", folder / "stages/01-image/loss_table.jsonl")
    assert table is not None
    assert list(table.columns) == ["source", "bucket", "q0.1", "q0.9"]
    assert table.rows == [
        ["a/b", "5x64x64", "", "3.0000"],
        ["films", "1x64x64", "4.0000", "1.0000"],
    ]
    assert loss_table("image", folder / "nothing.jsonl") is None


def test_samples_of_one_prompt_stand_side_by_side(folder: Path) -> None:
    fox, cat = progress_grids(folder)
    assert fox.title.endswith("a fox")
    assert fox.captions == cat.captions == ["image, update 20", "video, update 10"]
    assert [round(video.mean().item()) for video in fox.videos] == [0, 1]
    assert [video.shape[1] for video in cat.videos] == [5, 5]
    (alone, _) = progress_grids(folder / "stages/01-image")
    assert alone.captions == ["01-image, update 10", "01-image, update 20"]
    assert list(spread(list(range(10)), 4)) == [1, 4, 6, 9]


def test_everything_is_on_one_page(folder: Path, tmp_path: Path) -> None:
    tables = evaluation_tables(folder)
    report = Report(
        title="all", opening=opening_tables(folder), tables=tables, grids=progress_grids(folder)
    )
    page = write_report(tmp_path / "out", report).read_text()
    headings = re.findall(r"<h2>([^<]*)</h2>", page)
    assert headings[:2] == ["The curriculum over time", "Data seen"]
    assert "As training went on: a cat" in headings
    assert "Held-out loss" in headings
    assert not re.findall(r"https?://", page)


def test_a_chart_shows_when_and_from_what_a_stage_ran() -> None:
    def chart(after: str, end: float, failures: list[float]) -> bytes:
        first = StageBar(name="a", after="", pieces=[(0, 10)], done=True)
        return stages_chart(
            [first, StageBar(name="b", after=after, pieces=[(10, end)], done=False)], failures
        )

    pictures = [chart("a", 20, []), chart("", 20, []), chart("a", 15, []), chart("a", 20, [5])]
    assert len(set(pictures)) == 4
    assert isinstance(Table(title="", columns=[], rows=[], chart=pictures[0]), Table)

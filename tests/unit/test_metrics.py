"""Rows of metrics on disk, rates, the progress line and the logger."""

import builtins
import io
import json
import logging
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hunyuan_train.observability.config import LoggingConfig, ProgressKind, WandbMode
from hunyuan_train.observability.flops import Peak
from hunyuan_train.observability.logging import setup_logging
from hunyuan_train.observability.metrics import MetricLogger, Throughput, to_host
from hunyuan_train.observability.progress import Progress, format_duration, format_row
from hunyuan_train.observability.trackers import Media


def _rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_row_reaches_jsonl_and_tensorboard(tmp_path: Path):
    logger = MetricLogger(tmp_path, LoggingConfig())
    row = logger.emit(10, {"loss": torch.tensor(0.5), "lr": 1e-3, "tokens": 7, "stage": "video"})
    logger.close()
    assert row == {"loss": 0.5, "lr": 1e-3, "tokens": 7, "stage": "video"}
    (written,) = _rows(tmp_path)
    assert written.pop("time") > 1e9
    assert written == {"step": 10, **row}
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(10, 0.5)]


def test_a_resumed_run_leaves_no_duplicate_steps(tmp_path: Path):
    first = MetricLogger(tmp_path, LoggingConfig())
    for step in (10, 20, 30):
        first.emit(step, {"loss": float(step)})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 40, "lo')  # Killed while writing.
    second = MetricLogger(tmp_path, LoggingConfig(), start_step=20)
    for step in (30, 40):
        second.emit(step, {"loss": -float(step)})
    second.close()
    assert [(r["step"], r["loss"]) for r in _rows(tmp_path)] == [
        (10, 10.0),
        (20, 20.0),
        (30, -30.0),
        (40, -40.0),
    ]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (10, 10.0),
        (20, 20.0),
        (30, -30.0),
        (40, -40.0),
    ]


def test_a_run_killed_before_its_first_checkpoint_starts_over(tmp_path: Path):
    for loss in (1.0, 2.0):
        logger = MetricLogger(tmp_path, LoggingConfig(), start_step=0)
        logger.emit(10, {"loss": loss})
        logger.close()
    assert [(r["step"], r["loss"]) for r in _rows(tmp_path)] == [(10, 2.0)]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(10, 2.0)]


def test_rows_are_on_disk_before_the_run_ends(tmp_path: Path):
    logger = MetricLogger(tmp_path, LoggingConfig())
    logger.emit(1, {"loss": 1.0})
    assert len(_rows(tmp_path)) == 1
    logger.close()


def test_values_json_does_not_know_become_null(tmp_path: Path):
    logger = MetricLogger(tmp_path, LoggingConfig())
    row = logger.emit(1, {"loss": torch.tensor(float("nan")), "norm": float("inf")})
    logger.close()
    assert row["norm"] == float("inf")
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert _rows(tmp_path)[0]["loss"] is None


def test_only_the_first_rank_writes(tmp_path: Path):
    logger = MetricLogger(tmp_path / "run", LoggingConfig(), rank=1)
    assert logger.emit(1, {"loss": torch.tensor(1.0)}) == {}
    logger.close()
    assert not (tmp_path / "run").exists()


def test_device_values_keep_their_exact_value():
    big = 2**31 + 1
    values = {
        "count": torch.tensor(big),
        "third": torch.tensor(1 / 3),
        "one": torch.ones(1),
        "n": 3,
    }
    assert to_host(values) == {
        "count": float(big),
        "third": torch.tensor(1 / 3).item(),
        "one": 1.0,
        "n": 3,
    }


def test_wandb_works_offline_and_a_restart_keeps_its_run(tmp_path: Path):
    pytest.importorskip("wandb")
    cfg = LoggingConfig(wandb_mode=WandbMode.offline)
    for step in (1, 2):
        logger = MetricLogger(tmp_path, cfg, start_step=step - 1, run_config={"a": {"b": 1}})
        logger.emit(step, {"loss": 0.5})
        logger.close()
    run_id = (tmp_path / "wandb_id.txt").read_text()
    files = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert files
    assert {file.name for file in files} == {f"run-{run_id}.wandb"}


def test_missing_wandb_is_one_sentence_with_the_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real = builtins.__import__

    def without_wandb(name, *args, **kwargs):
        if name == "wandb":
            raise ModuleNotFoundError("No module named 'wandb'", name="wandb")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_wandb)
    with pytest.raises(
        ValueError, match=r"needs the wandb package: pip install 'hunyuan_train\[wandb\]'"
    ):
        MetricLogger(tmp_path, LoggingConfig(wandb_mode=WandbMode.online))


def test_rates_follow_from_work_and_time(monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr("hunyuan_train.observability.metrics.time.perf_counter", lambda: now[0])
    peak = Peak(tflops=10.0, measured_tflops=8.0, source="data sheet", device="made up")
    throughput = Throughput(peak, world_size=2)
    throughput.add(tokens=300, flops=4e12, computed_flops=6e12, data_wait_s=0.5)
    throughput.add(tokens=100, flops=4e12, computed_flops=4e12)
    now[0] = 102.0
    assert throughput.take() == pytest.approx(
        {
            "step_s": 1.0,
            "tokens_per_s": 200.0,
            "tflops": 2.0,
            "mfu": 0.2,
            "mfu_measured": 0.25,
            "hfu": 0.25,
            "hfu_measured": 0.3125,
            "data_wait": 0.25,
        }
    )
    now[0] = 103.0
    assert throughput.take()["tokens_per_s"] == 0.0


def test_the_plain_line_holds_what_people_watch(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    now = [0.0]
    monkeypatch.setattr("hunyuan_train.observability.progress.time.monotonic", lambda: now[0])
    cfg = LoggingConfig(progress=ProgressKind.lines)
    row = {
        "loss": 0.25,
        "grad_norm": 1.5,
        "lr": 1e-4,
        "tokens_per_s": 12345.6,
        "tflops": 1.25,
        "mfu": 0.5,
        "hfu": 0.6,
        "data_wait": 0.012,
    }
    with (
        caplog.at_level(logging.INFO, logger="hunyuan_train"),
        Progress(cfg, 120, start_step=20, label="image") as progress,
    ):
        now[0] = 10.0
        progress.show(40, row)
    assert caplog.messages == [
        "image 40/120  loss 0.2500  norm 1.500  lr 1.00e-04  12,346 tok/s  1.25 TFLOP/s  "
        "MFU 50.0%  HFU 60.0%  data wait 1.2%  ETA 40s"
    ]


def test_other_ranks_and_off_show_nothing(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="hunyuan_train"):
        for cfg, rank in (
            (LoggingConfig(progress=ProgressKind.lines), 1),
            (LoggingConfig(progress=ProgressKind.off), 0),
        ):
            with Progress(cfg, 10, rank) as progress:
                progress.show(5, {"loss": 1.0})
    assert caplog.messages == []


def test_the_bar_shows_the_metrics(capsys: pytest.CaptureFixture[str]):
    with Progress(LoggingConfig(progress=ProgressKind.bar), 10) as progress:
        progress.advance(3)
        progress.show(5, {"loss": 0.125})
    shown = capsys.readouterr().err
    assert "5/10" in shown
    assert "loss 0.1250" in shown


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(44.6, "45s"), (725, "12m05s"), (12_000, "3h20m"), (187_300, "2d04h"), (59.7, "1m00s")],
)
def test_durations_are_short(seconds: float, text: str):
    assert format_duration(seconds) == text


def test_missing_metrics_are_left_out():
    assert format_row({"loss": 1.0}) == "loss 1.0000"


def test_the_first_rank_speaks_and_the_others_only_warn(capsys: pytest.CaptureFixture[str]):
    setup_logging(LoggingConfig(), rank=0, world_size=2).info("from zero")
    log = setup_logging(LoggingConfig(), rank=1, world_size=2)
    log.info("from one")
    log.warning("careful")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("[rank 0] I from zero")
    assert lines[1].endswith("[rank 1] W careful")


def test_a_cadence_below_one_step_is_refused():
    with pytest.raises(ValueError, match=r"logging\.every_steps=0 must be at least 1"):
        LoggingConfig(every_steps=0)
    assert [s for s in range(1, 9) if LoggingConfig(every_steps=4).due(s)] == [4, 8]


def test_pictures_reach_tensorboard_and_numbers_of_their_own_leave_the_metrics_alone(
    tmp_path: Path,
) -> None:
    sheet, clip = tmp_path / "sheet.png", tmp_path / "clip.mp4"
    Image.new("RGB", (6, 4), "red").save(sheet)
    clip.write_bytes(b"")
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    logger = MetricLogger(tmp_path, LoggingConfig())
    logger.emit(30, {"loss": 1.0})
    logger.media(
        20,  # later values are there already: pictures come from a slower thread
        [
            Media(name="samples/sheet", path=sheet),
            Media(name="samples/000-0", path=clip, caption="a fox", moving=frames),
            Media(name="samples/001-0", path=clip),
        ],
    )
    logger.show(20, {"evaluation/loss": 0.5})
    logger.close()
    assert [row["step"] for row in _rows(tmp_path)] == [30]
    assert "evaluation/loss" not in _rows(tmp_path)[0]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("evaluation/loss")] == [(20, 0.5)]
    assert sorted(events.Tags()["images"]) == ["samples/000-0", "samples/sheet"]
    (moving,) = events.Images("samples/000-0")
    assert (moving.step, moving.width, moving.height) == (20, 8, 8)
    with Image.open(io.BytesIO(moving.encoded_image_string)) as picture:
        assert (picture.format, getattr(picture, "n_frames", 1)) == ("GIF", 2)
    assert "samples/000-0/prompt/text_summary" in events.Tags()["tensors"]


def test_wandb_takes_pictures_of_earlier_steps(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    sheet = tmp_path / "sheet.png"
    Image.new("RGB", (6, 4), "red").save(sheet)
    logger = MetricLogger(tmp_path, LoggingConfig(wandb_mode=WandbMode.offline))
    logger.emit(30, {"loss": 1.0})
    logger.media(20, [Media(name="samples/sheet", path=sheet, caption="all prompts")])
    logger.emit(31, {"loss": 0.5})
    logger.close()
    (kept,) = tmp_path.glob("wandb/offline-run-*/files/media/images/samples/*.png")
    assert kept.read_bytes() == sheet.read_bytes()


def test_rates_leave_out_what_was_not_training(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("hunyuan_train.observability.metrics.time.perf_counter", lambda: clock[0])
    rates = Throughput(Peak(tflops=1.0, measured_tflops=1.0, source="", device=""))
    rates.add(tokens=100, flops=0.0, computed_flops=0.0)
    clock[0] = 12.0
    rates.leave_out(10.0)
    assert rates.take()["step_s"] == 2.0

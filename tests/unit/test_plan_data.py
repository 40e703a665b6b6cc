import io
import json

import pytest
from PIL import Image
from tiny_run import MODEL, make_data

from hunyuan_train.cli.main import main
from hunyuan_train.data.buckets import Bucket, BucketTable
from hunyuan_train.data.mixture import Cell
from hunyuan_train.data.table import MAX_LINES, bucket_rows, table_chart, table_text


def cell(bucket, count, *, anchor=64, repeat=1, source="data"):
    return Cell(
        name=f"{source}//{bucket}@{anchor}x{repeat}",
        store=0,
        first=0,
        count=count,
        repeat=repeat,
        bucket=bucket,
        anchor=anchor,
        concept="",
        source=source,
    )


IMAGE, VIDEO = Bucket(1, 64, 64), Bucket(17, 64, 96)


def small_table():
    cells = [cell(IMAGE, 30), cell(IMAGE, 5, repeat=2, source="b"), cell(VIDEO, 7)]
    return bucket_rows(cells, [0.5, 0.25, 0.25], [1.0, 1.0, 9.0], [8, 8, 2], [0.1, 0.45, 0.2])


def test_cells_of_one_bucket_are_added_up():
    image, video = small_table()
    assert (image.bucket, image.samples, image.draws, image.batch) == (IMAGE, 35, 40, 8)
    assert image.share == 0.75
    assert image.compute == pytest.approx(0.75 / 3)
    assert image.crop_loss == pytest.approx((30 * 0.1 + 5 * 0.45) / 35)
    # 30 end in a unit of 6 of 8, 5 drawn twice in one of 2 of 8.
    assert image.last_fill == pytest.approx((6 / 8 + 2 / 8) / 2)
    assert (video.samples, video.share, video.compute) == (7, 0.25, pytest.approx(0.75))
    assert video.last_fill == 0.5


def test_full_last_units_are_full():
    (row,) = bucket_rows([cell(IMAGE, 16)], [1.0], [2.0], [8], [0.0])
    assert row.last_fill == 1.0


def test_one_bucket_at_two_anchors_is_two_rows():
    cells = [cell(IMAGE, 3, anchor=64), cell(IMAGE, 4, anchor=96)]
    rows = bucket_rows(cells, [0.5, 0.5], [1.0, 1.0], [4, 4], [0.0, 0.0])
    assert [(row.anchor, row.samples) for row in rows] == [(64, 3), (96, 4)]


def test_text_is_aligned_and_ends_with_a_total():
    assert (
        table_text(small_table())
        == """\
bucket     anchor  samples  tokens  batch  samples %  compute %  crop loss %  last batch %
1x64x64        64       35      16      8       75.0       25.0         15.0          50.0
17x64x96       64        7     120      2       25.0       75.0         20.0          50.0
2 buckets               42                     100.0      100.0         15.8"""
    )


def test_buckets_without_one_full_batch_are_counted():
    rows = bucket_rows([cell(IMAGE, 3), cell(VIDEO, 3)], [0.5, 0.5], [1, 2], [4, 3], [0, 0])
    last = table_text(rows).splitlines()[-1]
    assert last == "1 of them hold less than one full batch; their units are smaller."


def many(count):
    buckets = BucketTable([256], [1, 5, 9, 13, 17]).buckets()[:count]
    assert len(buckets) == count
    cells = [cell(bucket, 10 + number) for number, bucket in enumerate(buckets)]
    ones = [1.0 / count] * count
    return bucket_rows(cells, ones, [b.tokens for b in buckets], [1] * count, [0.0] * count)


def test_text_folds_the_cheapest_buckets_and_says_how_many():
    rows = many(MAX_LINES + 40)
    lines = table_text(rows).splitlines()
    assert len(lines) == MAX_LINES + 3  # head, folded, total
    assert lines[-2].startswith("40 cheaper")
    assert int(lines[-2].split()[2]) == sum(r.samples for r in rows) - sum(
        int(line.split()[2]) for line in lines[1:-2]
    )
    shown = [Bucket.parse(line.split()[0]) for line in lines[1:-2]]
    assert shown == sorted(shown)
    dearest_folded = max(row.tokens for row in rows if row.bucket not in shown)
    assert dearest_folded <= min(bucket.tokens for bucket in shown)
    assert len(table_text(rows[:MAX_LINES]).splitlines()) == MAX_LINES + 2


@pytest.mark.parametrize("count", [1, 120, 230])
def test_chart_has_room_for_every_line_of_bars(count):
    image = Image.open(io.BytesIO(table_chart(many(count))))
    assert image.format == "PNG"
    assert image.width == 1100
    assert image.height >= 15 * min(count, 200)  # pixels: labels are 10 high
    assert image.height < 4000
    colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20)}
    assert {(0x9B, 0xB3, 0xD3), (0x3B, 0x6F, 0xB6)} <= colours


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Generated clips, and a store made of them; sizes of 64 and 96 x 64 pixels."""
    return make_data(tmp_path_factory.mktemp("data"))


def plan(capsys, data, run, *extra):
    """Run the verb and return (exit code, text, JSON or None)."""
    arguments = [
        *("data=shapes", "model=tiny", "text=builtin", *MODEL),
        *("data.anchors=[64]", "data.durations=[1,5]", "data.bucket_stride=32"),
        *(f"data.source={data / 'clips'}", f"data.latents={run / 'latents'}"),
        *(f"run.dir={run / 'run'}", *extra),
    ]
    code = main(["plan", "data", *arguments])
    output = capsys.readouterr()
    path = run / "run" / "data_plan.json"
    return code, output.out + output.err, json.loads(path.read_text()) if path.exists() else None


def test_plan_of_the_clips_is_that_of_the_store_made_of_them(capsys, data, tmp_path):
    code, text, clips = plan(capsys, data, tmp_path / "a", "--ranks", "2")
    assert code == 0
    assert f"20 samples in the clips of data.source={data / 'clips'} (no store in" in text
    _, text, store = plan(capsys, data, tmp_path / "b", f"data.latents={data / 'latents'}")
    assert f"20 samples in {data / 'latents'}" in text
    exact = ("bucket", "anchor", "samples", "draws", "tokens", "share", "crop_loss")
    for one, two in zip(clips["buckets"], store["buckets"], strict=True):
        assert [one[name] for name in exact] == pytest.approx([two[name] for name in exact])
        assert one["compute"] == pytest.approx(two["compute"], rel=0.2)  # text is estimated
    assert sum(row["samples"] for row in clips["buckets"]) == 20  # 8 clips give two, 4 images one
    assert (clips["forecast"]["ranks"], store["forecast"]["ranks"]) == (2, 1)
    for name in ("data_plan.png", "data_plan.json"):
        assert str(tmp_path / "b" / "run" / name) in text
    assert Image.open(tmp_path / "b" / "run" / "data_plan.png").width == 1100


def test_plan_shows_the_shares_that_are_asked_for(capsys, data, tmp_path):
    _, text, found = plan(
        capsys, data, tmp_path, "+data.media_shares={image:0.9,video:0.1}", "--ranks=2"
    )
    assert found["shares"]["media"] == pytest.approx({"image": 0.9, "video": 0.1})
    assert "  media    image 90.0%, video 10.0%" in text
    images = [row for row in found["buckets"] if row["bucket"].startswith("1x")]
    assert sum(row["share"] for row in images) == pytest.approx(0.9)


def test_forecast_is_of_the_size_that_is_asked_for(capsys, data, tmp_path):
    _, text, found = plan(capsys, data, tmp_path, "data.global_samples=12", "--ranks=2")
    forecast = found["forecast"]
    assert (forecast["samples"], forecast["steps"]) == (12, 50)
    assert forecast["steps_per_epoch"] == pytest.approx(20 / 12)
    assert 0.5 < forecast["lockstep"] <= forecast["step"] <= 1
    assert "an update on 2 ranks, mean of the first 50\n  12.0 samples" in text


def test_left_out_files_are_counted_by_reason_with_a_few_examples(capsys, tmp_path):
    clips = tmp_path / "clips"
    clips.mkdir()
    for number in range(7):
        (clips / f"empty{number}.png").write_bytes(b"")
        (clips / f"empty{number}.txt").write_text("nothing")
    for name, size in (("good", (64, 64)), ("long", (1280, 64)), ("silent", (64, 64))):
        Image.new("RGB", size).save(clips / f"{name}.png")
    (clips / "good.txt").write_text("a good one")
    (clips / "long.txt").write_text("a long one")
    code, text, found = plan(capsys, tmp_path, tmp_path)
    assert code == 0
    assert [(item["reason"], item["count"]) for item in found["left_out"]] == [
        ("empty", 7),
        ("crop", 1),
        ("no_caption", 1),
    ]
    lines = text.splitlines()
    start = lines.index("9 files are left out")
    assert lines[start + 1] == "  7 empty"
    assert lines[start + 2] == "    empty0.png: the file is empty (0 bytes)"
    assert lines[start + 7] == "    and 2 more"
    assert lines[start + 9].startswith("    long.png: aspect 20:1 is too far from every bucket")
    assert lines[start + 11] == "    silent.png: no caption: silent.txt is missing"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["memory"], "hunyuan-train plan: memory cannot be planned; topics are data: buckets"),
        (["data", "--ranks", "two"], "--ranks two: write a number like --ranks 8"),
        (["data", "--ranks=0"], "--ranks 0: write a number like --ranks 8"),
        (["data", "--ranks"], "--ranks (nothing): write a number like --ranks 8"),
        (["data", "data.max_tokens=0"], "data.max_tokens=0 leaves the batches to the memory"),
        (["data"], "data.latents is empty"),
        (["data", "data.latents=no/such/store"], "no/such/store/meta.json"),
        (["data", "data.source=no/such", "data.latents=x"], "data.source=no/such does not exist"),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_sentence(capsys, arguments, message):
    assert main(["plan", *arguments]) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.count("\n") == 1
    assert output.out == ""


def test_selection_of_nothing_lists_what_there_is(capsys, data, tmp_path):
    code, text, found = plan(capsys, data, tmp_path, "data.train_anchors=[96]")
    assert (code, found) == (2, None)
    assert "data.train_anchors=[96]" in text
    assert "anchor 64: 1x64x64 (" in text

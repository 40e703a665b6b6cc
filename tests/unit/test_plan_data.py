import io

import pytest
from PIL import Image

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

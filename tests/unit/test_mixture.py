"""Which cells a run draws from, and the shares of their samples."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.config import DataConfig, SourceConfig
from hunyuan_train.data.cost import sample_cost
from hunyuan_train.data.mixture import Cell, cells_of, shares
from hunyuan_train.models.hunyuan.config import HunyuanConfig


def group(bucket: str, first: int, count: int, anchor: int = 256, concept: str = "", repeat=1):
    return SimpleNamespace(
        concept=concept,
        bucket=Bucket.parse(bucket),
        anchor=anchor,
        repeat=repeat,
        first=first,
        count=count,
    )


def store(name: str, *groups: SimpleNamespace) -> SimpleNamespace:
    return SimpleNamespace(name=name, index=SimpleNamespace(groups=list(groups)))


def two_stores() -> list[SimpleNamespace]:
    return [
        store(
            "wide",
            group("1x256x256", 0, 60),
            group("1x512x512", 60, 10, anchor=512),
            group("17x256x256", 70, 30, concept="cat"),
        ),
        store("fine", group("17x256x256", 0, 20, repeat=3), group("1x256x256", 20, 40)),
    ]


def sums(cells: list[Cell], found: np.ndarray, attribute: str) -> dict[str, float]:
    result: dict[str, float] = {}
    for cell, share in zip(cells, found, strict=True):
        value = str(getattr(cell, attribute))
        result[value] = result.get(value, 0.0) + float(share)
    return result


def test_cells_are_the_selected_groups_by_name() -> None:
    cells = cells_of(two_stores(), DataConfig())
    assert [cell.name for cell in cells] == [
        "fine//17x256x256@256x3",
        "fine//1x256x256@256x1",
        "wide//1x256x256@256x1",
        "wide//1x512x512@512x1",
        "wide/cat/17x256x256@256x1",
    ]
    first = cells[0]
    assert (first.store, first.first, first.count, first.repeat) == (1, 0, 20, 3)
    assert (first.source, first.media, first.draws) == ("fine", "video", 60)
    picked = cells_of(two_stores(), DataConfig(train_anchors=[512]))
    assert [cell.anchor for cell in picked] == [512]
    picked = cells_of(two_stores(), DataConfig(train_durations=[17]))
    assert {cell.bucket.frames for cell in picked} == {17}


def test_an_empty_selection_says_what_there_is() -> None:
    with pytest.raises(
        ValueError,
        match=r"data\.train_anchors=\[96\].*none of the 160 samples; there is anchor 256: "
        r"17x256x256 \(50\), anchor 256: 1x256x256 \(100\), anchor 512: 1x512x512 \(10\)\. Change",
    ):
        cells_of(two_stores(), DataConfig(train_anchors=[96]))


def test_natural_shares_count_repeats() -> None:
    cells = cells_of(two_stores(), DataConfig())
    np.testing.assert_allclose(shares(cells, DataConfig()), np.array([60, 40, 60, 10, 30]) / 200)


def test_shares_meet_every_marginal_and_keep_the_rest_in_proportion() -> None:
    cells = cells_of(two_stores(), DataConfig())
    cfg = DataConfig(
        media_shares={"image": 0.4, "video": 0.6},
        anchor_shares={"512": 0.1},
        sources={
            "wide": SourceConfig(latents="w", weight=3), "fine": SourceConfig(latents="f", weight=1)
        },
    )  # fmt: skip
    found = shares(cells, cfg)
    assert sums(cells, found, "media") == pytest.approx({"image": 0.4, "video": 0.6})
    assert sums(cells, found, "anchor") == pytest.approx({"256": 0.9, "512": 0.1})
    assert sums(cells, found, "source") == pytest.approx({"wide": 0.75, "fine": 0.25})
    alone = shares(cells, DataConfig(media_shares={"image": 1, "video": 3}))
    images = [cell.media == "image" for cell in cells]
    np.testing.assert_allclose(alone[images] / alone[images].sum(), np.array([40, 60, 10]) / 110)
    assert alone[images].sum() == pytest.approx(0.25)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_feasible_marginals_are_met(data: st.DataObject) -> None:
    """Marginals taken from a positive table on the same cells can always be met."""
    cells = cells_of(two_stores(), DataConfig())
    table = np.array(data.draw(st.lists(st.floats(0.05, 1), min_size=5, max_size=5)))
    table /= table.sum()
    cfg = DataConfig(
        media_shares=sums(cells, table, "media"),
        anchor_shares=sums(cells, table, "anchor"),
        concept_shares=sums(cells, table, "concept"),
        sources={
            name: SourceConfig(latents=name, weight=weight)
            for name, weight in sums(cells, table, "source").items()
        },
    )
    found = shares(cells, cfg)
    assert found.sum() == pytest.approx(1)
    for attribute in ("media", "anchor", "concept", "source"):
        wanted = sums(cells, table, attribute)
        assert sums(cells, found, attribute) == pytest.approx(wanted, rel=1e-5)


def test_shares_that_leave_something_out_are_met_closely() -> None:
    """All clips are in one source; its share is that of the clips, so its images go out."""
    stores = [
        store("wide", group("1x256x256", 0, 60)),
        store("fine", group("17x256x256", 0, 20), group("1x256x256", 20, 40)),
    ]
    cells = cells_of(stores, DataConfig())
    cfg = DataConfig(
        media_shares={"image": 0.3, "video": 0.7},
        sources={
            "wide": SourceConfig(latents="w", weight=3), "fine": SourceConfig(latents="f", weight=7)
        },
    )  # fmt: skip
    found = shares(cells, cfg)
    assert sums(cells, found, "media") == pytest.approx({"image": 0.3, "video": 0.7}, rel=2e-3)
    assert found[1] < 1e-3


def test_a_share_of_zero_leaves_out_and_one_is_everything() -> None:
    cells = cells_of(two_stores(), DataConfig())
    for asked in ({"image": 0.0, "video": 1.0}, {"video": 1.0}):
        found = shares(cells, DataConfig(media_shares=asked))
        assert sums(cells, found, "media") == pytest.approx({"image": 0, "video": 1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"anchor_shares": {"960": 0.5}},
            r"data\.anchor_shares asks 0\.5 of '960', but no selected sample is of it; there is "
            r"256, 512",
        ),
        ({"media_shares": {"film": 1.0}}, r"data\.media_shares asks 1 of 'film'.*image, video"),
        ({"concept_shares": {"dog": 0.2}}, r"data\.concept_shares asks 0\.2 of 'dog'"),
        (
            {"anchor_shares": {"256": 2.0}},
            r"data\.anchor_shares add up to 2 and leave nothing for 512; name every value",
        ),
        (
            {"media_shares": {"image": 0.1, "video": 0.9}, "anchor_shares": {"512": 0.5}},
            r"exclude each other \(data\.\w+ asks .* and the others allow .*\); loosen one of "
            r"data\.media_shares, data\.anchor_shares",
        ),
        (
            {
                "sources": {
                    "wide": SourceConfig(latents="w", weight=1), "fine": SourceConfig(latents="f")
                }
            },
            r"data\.sources\.fine\.weight is 0 while other sources have a weight",
        ),
    ],
)  # fmt: skip
def test_shares_that_cannot_be_met_are_one_sentence(changes: dict, message: str) -> None:
    cells = cells_of(two_stores(), DataConfig())
    with pytest.raises(ValueError, match=message) as error:
        shares(cells, DataConfig(**changes))
    assert "\n" not in str(error.value)


def test_costs_span_three_orders_of_magnitude_and_follow_the_closed_form() -> None:
    model = HunyuanConfig()
    image = sample_cost(Bucket(1, 256, 256), 256, model)
    clip = sample_cost(Bucket(129, 720, 1280), 256, model)
    assert clip > 1000 * image
    # 24 h^2 L S + 4 h L S^2 per forward, three times that with backward. A double block has 24 h^2
    # per token, a single block the same; the refiner, embeddings and modulation are the remainder.
    hidden, layers, joint = 3072, 60, Bucket(129, 720, 1280).tokens + 256
    closed = 3 * (24 * hidden**2 * layers * joint + 4 * hidden * layers * joint**2)
    assert clip == pytest.approx(closed, rel=0.001)
    assert sample_cost(Bucket(1, 256, 256), 0, model) < image

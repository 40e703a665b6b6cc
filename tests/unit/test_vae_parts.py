"""Which run of a clip each rank has, and what its convolutions fetch, against the whole clip."""

import pytest

from hunyuan_train.parallel.config import VaeSplit
from hunyuan_train.parallel.vae_parts import Parts, border

PADS = {VaeSplit.frames: (2, 0), VaeSplit.height: (1, 1)}
DIVISIONS = [(latents, ranks) for latents in range(1, 10) for ranks in range(1, latents + 1)]


@pytest.mark.parametrize("dim", list(VaeSplit))
def test_runs_follow_one_another_and_nobody_has_nothing(dim: VaeSplit) -> None:
    for latents, ranks in DIVISIONS:
        parts = Parts.of(dim, latents, ranks)
        for scale in (1, 2, 4) if dim is VaeSplit.frames else (1, 2, 4, 8):
            runs = [parts.run(rank, scale) for rank in range(ranks)]
            assert [place for run in runs for place in run] == list(range(parts.total(scale)))
            assert all(runs)
        assert max(parts.counts) - min(parts.counts) <= 1
    assert Parts.of(VaeSplit.frames, 3, 2).run(0, 4) == range(5)
    assert Parts.of(VaeSplit.frames, 3, 2).run(1, 4) == range(5, 9)
    assert Parts.of(VaeSplit.height, 3, 2).run(1, 8) == range(16, 24)


def windows(padded: list[int], stride: int) -> list[tuple[int, ...]]:
    """Return what each output of a convolution of three reads."""
    starts = range(0, len(padded) - 2, stride)
    return [tuple(padded[start : start + 3]) for start in starts]


def on_a_rank(parts: Parts, rank: int, scale: int, stride: int) -> list[int]:
    """Return the positions that a rank has after padding, as the halo exchange puts them."""
    around, real = border(parts, rank, scale, stride, PADS[parts.dim])
    own = parts.run(rank, scale)
    there = dict.fromkeys(own, True)
    for source, first, end in around.fetched:
        theirs, _ = border(parts, source, scale, stride, PADS[parts.dim])
        place = parts.run(source, scale).start
        sent = [range(place + a, place + b) for to, a, b in theirs.lent if to == rank]
        assert sent == [range(own.start + first, own.start + end)]
        there |= dict.fromkeys(sent[0], True)
    assert sorted(there) == list(range(own.start + real.start, own.start + real.stop))
    last = parts.total(scale) - 1
    wanted = range(own.start - around.before, own.stop + around.after)
    assert all(min(max(place, 0), last) in there for place in wanted)
    return [min(max(place, 0), last) for place in wanted]


@pytest.mark.parametrize(
    ("dim", "scale", "stride"),
    [
        *((VaeSplit.frames, scale, 1) for scale in (1, 2, 4)),
        *((VaeSplit.frames, scale, 2) for scale in (2, 4)),
        *((VaeSplit.height, scale, 1) for scale in (1, 2, 4, 8)),
        *((VaeSplit.height, scale, 2) for scale in (2, 4, 8)),
    ],
)
def test_convolutions_read_what_they_would_read_in_the_whole_clip(
    dim: VaeSplit, scale: int, stride: int
) -> None:
    front, back = PADS[dim]
    for latents, ranks in DIVISIONS:
        parts = Parts.of(dim, latents, ranks)
        size = parts.total(scale)
        whole = windows([0] * front + list(range(size)) + [size - 1] * back, stride)
        found = [
            window
            for rank in range(ranks)
            for window in windows(on_a_rank(parts, rank, scale, stride), stride)
        ]
        assert found == whole


@pytest.mark.parametrize(
    ("dim", "latents", "message"),
    [
        (
            VaeSplit.frames,
            2,
            "parallel.vae_split=frames over 4 ranks leaves some of them nothing of a clip of 5 "
            "frames, which has 2 latent frames; use at least 13 frames, at most 2 ranks, or "
            "parallel.vae_split=height",
        ),
        (
            VaeSplit.height,
            3,
            "parallel.vae_split=height over 4 ranks leaves some of them nothing of a clip of a "
            "height of 24 px, which has 3 latent rows; use at least 32 px, at most 3 ranks, or "
            "parallel.vae_split=frames",
        ),
    ],
)
def test_refuses_a_rank_without_a_part(dim: VaeSplit, latents: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Parts.of(dim, latents, 4)

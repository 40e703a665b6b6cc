from hypothesis import given, settings
from hypothesis import strategies as st

from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.config import DataConfig
from hunyuan_train.data.index import SampleRow
from hunyuan_train.data.sampler import BatchStream

BUCKETS = [Bucket(1, 64, 64), Bucket(1, 48, 80), Bucket(5, 64, 64), Bucket(17, 48, 80)]


def make_row(number: int, bucket: Bucket) -> SampleRow:
    return SampleRow(
        sample_id=f"{number:03d}@64:{bucket}",
        source=f"{number:03d}.mp4",
        bucket=bucket,
        anchor=64,
        caption="",
        media=bucket.media,
        shard="s",
        latent_key=f"k{number}/0",
        text_shard="s",
        text_key=f"t{number}",
        text_tokens=1,
        fps=24.0,
        scale=1.0,
        crop_loss=0.0,
    )


ROWS = st.lists(st.sampled_from(BUCKETS), min_size=1, max_size=60).map(
    lambda buckets: [make_row(number, bucket) for number, bucket in enumerate(buckets)]
)
CONFIGS = st.builds(
    lambda max_tokens, max_batch, shuffle: DataConfig(
        max_tokens=max_tokens, max_batch=max_batch, shuffle=shuffle
    ),
    st.integers(1, 400),
    st.integers(1, 7),
    st.booleans(),
)
SEEDS = st.integers(0, 2**31)


@settings(max_examples=100, deadline=None)
@given(rows=ROWS, cfg=CONFIGS, seed=SEEDS, epoch=st.integers(0, 5))
def test_each_epoch_has_each_sample_once_in_batches_of_one_bucket(rows, cfg, seed, epoch):
    stream = BatchStream(rows, cfg, seed)
    first = epoch * stream.batches_per_epoch
    batches = [stream[first + offset] for offset in range(stream.batches_per_epoch)]
    assert sorted(row for batch in batches for row in batch.rows) == list(range(len(rows)))
    for batch in batches:
        assert batch.epoch == epoch
        (bucket,) = {rows[row].bucket for row in batch.rows}
        limit = max(1, min(cfg.max_tokens // bucket.tokens, cfg.max_batch))
        assert 1 <= len(batch.rows) <= limit == stream.batch_sizes[bucket]


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, cfg=CONFIGS, seed=SEEDS, num_micro=st.integers(1, 4))
def test_ranks_of_any_world_read_the_same_stream(rows, cfg, seed, num_micro):
    alone = BatchStream(rows, cfg, seed)
    for world_size in (1, 2, 4):
        for step in range(2):
            start = step * world_size * num_micro
            mine = [
                [
                    BatchStream(rows, cfg, seed)[start + rank + world_size * micro]
                    for micro in range(num_micro)
                ]
                for rank in range(world_size)
            ]
            union = [mine[rank][micro] for micro in range(num_micro) for rank in range(world_size)]
            assert union == [alone[start + offset] for offset in range(world_size * num_micro)]


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, cfg=CONFIGS, seed=SEEDS, position=st.integers(0, 500))
def test_any_position_can_be_entered_directly_and_the_input_order_does_not_matter(
    rows, cfg, seed, position
):
    walked = BatchStream(rows, cfg, seed)
    for earlier in range(position % 40):
        walked[earlier]
    fresh = BatchStream(rows, cfg, seed)
    assert fresh[position] == walked[position]
    turned = BatchStream(rows[::-1], cfg, seed)
    names = [rows[row].sample_id for row in fresh[position].rows]
    assert [rows[::-1][row].sample_id for row in turned[position].rows] == names
    assert turned.fingerprint == fresh.fingerprint


@settings(max_examples=40, deadline=None)
@given(rows=ROWS, cfg=CONFIGS, seed=SEEDS)
def test_fingerprint_changes_with_what_the_stream_depends_on(rows, cfg, seed):
    base = BatchStream(rows, cfg, seed).fingerprint
    assert BatchStream(rows, cfg, seed + 1).fingerprint != base
    assert BatchStream([*rows, make_row(999, BUCKETS[0])], cfg, seed).fingerprint != base
    other = DataConfig(max_tokens=cfg.max_tokens, max_batch=cfg.max_batch, shuffle=not cfg.shuffle)
    assert BatchStream(rows, other, seed).fingerprint != base

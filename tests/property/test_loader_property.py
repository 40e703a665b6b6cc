import json
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.config import DataConfig
from tests.support.sample_store import MadeUpStore, make_loader, make_row, value_of

BUCKETS = [Bucket(1, 64, 64), Bucket(1, 48, 80), Bucket(5, 64, 64), Bucket(17, 48, 80)]

ROWS = st.lists(st.sampled_from(BUCKETS), min_size=1, max_size=40).map(
    lambda buckets: [make_row(number, bucket, 2) for number, bucket in enumerate(buckets)]
)
CONFIGS = st.builds(
    lambda max_tokens, max_batch, shuffle, prefetch, samples, workers: DataConfig(
        max_tokens=max_tokens,
        max_batch=max_batch,
        shuffle=shuffle,
        prefetch_gib=prefetch,
        global_samples=samples,
        workers=workers,
        max_bad_share=1.0,
    ),
    st.integers(1, 400),
    st.integers(1, 7),
    st.booleans(),
    st.sampled_from([0.0, 1e-5, 1e-3]),
    st.sampled_from([0, 5, 16]),
    st.integers(1, 3),
)
SEEDS = st.integers(0, 2**31)


def drawn(batches):
    """Names, epochs and captions of what is trained on."""
    return [
        key
        for batch in batches
        if batch.weight
        for key in zip(batch.sample_ids, batch.epochs, batch.captions, strict=True)
    ]


def open_store(rows, folder):
    return MadeUpStore(Path(folder), rows)


@settings(max_examples=20, deadline=None)
@given(rows=ROWS, cfg=CONFIGS, seed=SEEDS, ranks=st.integers(1, 4), stop=st.integers(0, 4))
def test_any_ranks_go_on_where_any_others_stopped(rows, cfg, seed, ranks, stop):
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(rows, folder)
        alone = make_loader([store], cfg, seed, planned=2)
        steps = []
        for number in range(5):
            if number == stop:
                state = json.loads(json.dumps(alone.state_dict()))
            steps.append(sorted(drawn(alone.next_step())))
        alone.close()
        loaders = [make_loader([store], cfg, seed, r, ranks, planned=3) for r in range(ranks)]
        for loader in loaders:
            loader.load_state_dict(state)
        for expected in steps[stop:]:
            parts = [loader.next_step() for loader in loaders]
            assert len({len(part) for part in parts}) == 1
            assert sorted(key for part in parts for key in drawn(part)) == expected
        for loader in loaders:
            loader.close()


@settings(max_examples=20, deadline=None)
@given(rows=ROWS, cfg=CONFIGS, seed=SEEDS, data=st.data())
def test_bad_samples_never_come_and_leave_the_others_where_they_were(rows, cfg, seed, data):
    by_bucket: dict[Bucket, list[str]] = {}
    for row in rows:
        by_bucket.setdefault(row.bucket, []).append(row.sample_id)
    # One sample of every bucket stays good.
    candidates = [name for names in by_bucket.values() for name in names[1:]]
    bad = set(data.draw(st.lists(st.sampled_from(candidates)))) if candidates else set()
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(rows, folder)
        good = make_loader([store], cfg, seed)
        planned = [good.next_step() for _ in range(4)]
        good.close()
        store.bad = bad
        loader = make_loader([store], cfg, seed, quarantine=Path(folder) / "bad.jsonl")
        met: set[str] = set()
        for step in planned:
            for before, batch in zip(step, loader.next_step(), strict=True):
                for place, (wanted, name) in enumerate(
                    zip(before.sample_ids, batch.sample_ids, strict=True)
                ):
                    met |= {wanted} & bad
                    assert name not in bad
                    assert name == wanted or wanted in bad
                    assert (batch.mean[place] == value_of(name)).all()
                    assert batch.epochs[place] == before.epochs[place]
        loader.close()
        path = Path(folder) / "bad.jsonl"
        listed = [json.loads(line)["sample_id"] for line in path.open()] if met else []
        assert len(listed) == len(set(listed))
        assert met <= set(listed) <= bad

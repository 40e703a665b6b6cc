import json
import time

import pytest

from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.config import SourceConfig
from hunyuan_train.data.quarantine import Reason, SampleError
from hunyuan_train.runtime.seed import keyed_generator
from tests.support.loading import (
    CLIP,
    IMAGE,
    config,
    data_threads,
    epoch_ids,
    ids,
    many_images,
    mixed_store,
    names,
    run,
    wait_for_data_threads,
)
from tests.support.sample_store import MadeUpStore, make_loader, make_row, value_of


@pytest.fixture
def store(tmp_path):
    return mixed_store(tmp_path)


@pytest.fixture
def many(tmp_path):
    return many_images(tmp_path)


@pytest.fixture(autouse=True)
def no_thread_stays():
    yield
    wait_for_data_threads()


def test_batch_holds_its_samples_padded_and_masked(store):
    loader = make_loader([store], config())
    rows = {store.index.row(n).sample_id: store.index.row(n) for n in range(len(store.index))}
    for _ in range(6):
        for batch in loader.next_step():
            size, (frames, height, width) = len(batch.sample_ids), batch.bucket.latent_shape
            assert batch.weight == 1.0
            assert batch.mean.shape == batch.std.shape == (size, 2, frames, height, width)
            assert (batch.text.shape, batch.text_mask.shape) == ((size, 6, 3), (size, 6))
            assert (batch.empty_text.shape, batch.empty_pooled.shape) == ((6, 3), (2,))
            assert batch.empty_mask.tolist() == [True] + [False] * 5
            for place, name in enumerate(batch.sample_ids):
                row = rows[name]
                variant = int(batch.captions[place].split()[-1])
                tokens = row.texts[variant].tokens
                assert row.bucket == batch.bucket
                assert (batch.mean[place] == value_of(name)).all()
                assert (batch.std[place] == value_of(name) / 2).all()
                assert batch.text_mask[place].tolist() == [True] * tokens + [False] * (6 - tokens)
                assert (batch.text[place, :tokens] == 1.0 + variant).all()
                assert (batch.text[place, tokens:] == 0).all()
    loader.close()


def test_caption_is_drawn_by_sample_and_epoch(store):
    loader = make_loader([store], config(train_durations=[1]), seed=9)
    drawn: dict[str, set[str]] = {}
    for _ in range(40):
        for batch in loader.next_step():
            for name, epoch, caption in zip(
                batch.sample_ids, batch.epochs, batch.captions, strict=True
            ):
                variant = int(keyed_generator(9, "caption", name, epoch).integers(3))
                assert caption == f"{int(name[:4])} as {variant}"
                drawn.setdefault(name, set()).add(caption)
    assert max(len(captions) for captions in drawn.values()) == 3
    loader.close()


def test_every_sample_is_once_in_every_epoch(store):
    loader = make_loader([store], config())
    batches = [batch for _ in range(60) for batch in loader.next_step()]
    for epoch in range(3):
        assert sorted(epoch_ids(batches, epoch)) == names(store)
    loader.close()


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_together_read_the_updates_of_one(store, ranks):
    alone = make_loader([store], config(), planned=6)
    loaders = [make_loader([store], config(), rank=r, ranks=ranks, planned=6) for r in range(ranks)]
    for _ in range(5):
        whole = sorted(name for batch in alone.next_step() for name in batch.sample_ids)
        parts = [loader.next_step() for loader in loaders]
        assert len({len(part) for part in parts}) == 1, "ranks do the same number of rounds"
        together = [name for part in parts for b in part if b.weight for name in b.sample_ids]
        assert sorted(together) == whole
        assert len({loader.balance for loader in loaders}) == 1
    for loader in [alone, *loaders]:
        loader.close()


def test_fillers_have_no_weight(tmp_path):
    store = MadeUpStore(tmp_path, [make_row(number, CLIP) for number in range(2)])
    loaders = [
        make_loader([store], config(max_batch=1), rank=r, ranks=4, planned=1) for r in (0, 3)
    ]
    parts = [loader.next_step() for loader in loaders]
    assert sorted(batch.weight for part in parts for batch in part) == [0.0, 1.0]
    for loader in loaders:
        loader.close()


def test_resume_counts_taken_updates_only_and_works_for_other_ranks(store):
    straight = make_loader([store], config(), seed=5)
    steps = [ids(straight.next_step()) for _ in range(14)]
    cut = make_loader([store], config(), seed=5)
    for _ in range(5):
        cut.next_step()
    until = time.monotonic() + 10
    while cut.queued_bytes < 10_000 and time.monotonic() < until:
        time.sleep(0.01)
    assert cut.queued_bytes >= 10_000, "it has read ahead"
    state = json.loads(json.dumps(cut.state_dict()))
    assert state["step"] == 5
    resumed = make_loader([store], config(), seed=5)
    resumed.next_step()
    resumed.load_state_dict(state)
    assert [ids(resumed.next_step()) for _ in range(9)] == steps[5:]
    pair = [make_loader([store], config(), seed=5, rank=r, ranks=2) for r in range(2)]
    for loader in pair:
        loader.load_state_dict(state)
    for expected in steps[5:]:
        parts = [loader.next_step() for loader in pair]
        together = [name for part in parts for b in part if b.weight for name in b.sample_ids]
        assert sorted(together) == sorted(name for batch in expected for name in batch)
    assert pair[0].state_dict() == pair[1].state_dict()
    for loader in [straight, cut, resumed, *pair]:
        loader.close()


def test_close_ends_the_threads_and_the_next_step_goes_on(store):
    straight = make_loader([store], config())
    steps = [ids(straight.next_step()) for _ in range(4)]
    straight.close()
    loader = make_loader([store], config())
    for number, step in enumerate(steps):
        assert ids(loader.next_step()) == step, number
        loader.close()
        assert data_threads() == []
    loader.close()


def test_threads_end_with_a_loader_that_is_dropped(store):
    loader = make_loader([store], config())
    loader.next_step()
    assert data_threads()
    del loader  # the fixture waits for the threads


def test_state_of_other_data_is_refused(store, many):
    state = make_loader([store], config()).state_dict()
    with pytest.raises(ValueError, match="the data differ from those of the checkpoint"):
        make_loader([many], config()).load_state_dict(state)


def test_reading_ahead_is_bounded_in_bytes(many):
    step = make_loader([many], config(prefetch_gib=0.0))
    step.next_step()
    until = time.monotonic() + 10
    while step.queued_bytes < 1 and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.3)
    one = step.queued_bytes  # exactly one update waits, whatever the limit
    taken = len(many.loaded)
    step.close()
    many.loaded.clear()
    loader = make_loader([many], config(prefetch_gib=5.5 * one / 2**30))
    loader.next_step()
    until = time.monotonic() + 10
    while loader.queued_bytes <= 4.9 * one and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.3)
    assert 4.9 * one < loader.queued_bytes <= 5.5 * one
    assert len(many.loaded) == pytest.approx(taken / 2 * 6.5, abs=taken / 2)
    loader.close()


def test_slow_training_finds_its_updates_ready(many):
    many.delay_s = 0.02
    loader = make_loader([many], config())
    loader.next_step()
    time.sleep(1.0)
    started = time.monotonic()
    for _ in range(5):
        loader.next_step()
    assert time.monotonic() - started < 0.1
    loader.close()


def test_what_the_reader_meets_is_raised_on_every_call(store, monkeypatch):
    loader = make_loader([store], config())
    first = [ids(loader.next_step()) for _ in range(2)]
    loader.close()

    def fail(number):
        raise OSError("the index is gone")

    monkeypatch.setattr(store.index, "row", fail)
    for _ in range(3):
        with pytest.raises(OSError, match="the index is gone"):
            loader.next_step()
    monkeypatch.undo()
    loader.load_state_dict(make_loader([store], config()).state_dict())
    assert [ids(loader.next_step()) for _ in range(2)] == first
    loader.close()


def test_end_of_the_data_comes_after_the_last_update(tmp_path):
    rows = [make_row(number, IMAGE) for number in range(12)]
    store = MadeUpStore(tmp_path / "store", rows)
    loader = make_loader([store], config(sources={"data": SourceConfig(latents="x", epochs=2)}))
    batches = run(loader, 4)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"all data are used up after 4 updates"):
            loader.next_step()
    assert sorted(epoch_ids(batches, 0) + epoch_ids(batches, 1)) == sorted(names(store) * 2)
    loader.close()


def test_description_has_a_line_per_bucket_and_stays_short(store, tmp_path):
    text = make_loader([store], config()).describe()
    lines = [line.split() for line in text.splitlines()]
    assert [line[0] for line in lines[1:3]] == ["1x64x64", "5x64x64"]
    assert lines[1][2] == "14"
    rows = [
        make_row(number, Bucket(1, 16 * (1 + number % 12), 16 * (1 + number // 12)))
        for number in range(120)
    ]
    big = MadeUpStore(tmp_path / "big", rows)
    assert len(make_loader([big], config()).describe().splitlines()) <= 65
    assert make_loader([store], config()).buckets == [IMAGE, CLIP]


def test_two_stores_are_mixed_by_name(store, tmp_path):
    other = MadeUpStore(tmp_path / "b", [make_row(number, IMAGE) for number in range(90, 99)], "b")
    store.name = "a"
    loader = make_loader([store, other], config())
    batches = [batch for _ in range(30) for batch in loader.next_step()]
    assert sorted(epoch_ids(batches, 0)) == sorted(names(store) + names(other))
    loader.close()


def test_sample_error_is_what_the_log_says():
    error = SampleError("clip", Reason.checksum, "its bytes have changed")
    assert str(error) == "clip: checksum: its bytes have changed"

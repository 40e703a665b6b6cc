import gc
import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.config import DataConfig, SourceConfig
from hunyuan_train.data.quarantine import Reason, SampleError
from hunyuan_train.data.store import Text
from hunyuan_train.runtime.seed import keyed_generator
from tests.support.sample_store import MadeUpStore, make_loader, make_row, value_of

IMAGE, CLIP = Bucket(1, 64, 64), Bucket(5, 64, 64)


@pytest.fixture
def store(tmp_path):
    """14 images with 3 captions, 6 clips with one."""
    rows = [make_row(number, IMAGE, captions=3) for number in range(14)]
    rows += [make_row(number, CLIP) for number in range(14, 20)]
    return MadeUpStore(tmp_path / "store", rows)


@pytest.fixture
def many(tmp_path):
    rows = [make_row(number, IMAGE) for number in range(400)]
    return MadeUpStore(tmp_path / "many", rows)


@pytest.fixture(autouse=True)
def no_thread_stays():
    yield
    gc.collect()
    until = time.monotonic() + 10
    while data_threads() and time.monotonic() < until:
        time.sleep(0.05)
    assert data_threads() == []


def data_threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("data-")]


def config(**settings):
    return DataConfig(**{"max_tokens": 64, "max_batch": 3, **settings})


def ids(batches):
    return [batch.sample_ids for batch in batches]


def epoch_ids(batches, epoch):
    return [
        name
        for batch in batches
        for name, number in zip(batch.sample_ids, batch.epochs, strict=True)
        if batch.weight and number == epoch
    ]


def run(loader, steps):
    """Take updates and return their batches."""
    return [batch for _ in range(steps) for batch in loader.next_step()]


def names(store):
    return sorted(store.index.row(number).sample_id for number in range(len(store.index)))


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


def test_bad_samples_of_the_last_updates_are_replaced_too(tmp_path):
    rows = [make_row(number, IMAGE) for number in range(12)]
    store = MadeUpStore(tmp_path / "store", rows)
    store.bad = set(names(store)[::2])
    cfg = config(sources={"data": SourceConfig(latents="x", epochs=2)}, max_bad_share=1.0)
    loader = make_loader([store], cfg)
    loader.next_step()
    time.sleep(0.5)  # the reader has met the end
    assert len(run(loader, 3)) > 0
    with pytest.raises(ValueError, match=r"all data are used up"):
        loader.next_step()
    loader.close()


def listed(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_bad_sample_is_replaced_listed_once_and_counted(store, tmp_path):
    good = make_loader([store], config(max_bad_share=1.0))
    expected = [ids(good.next_step()) for _ in range(30)]
    good.close()
    bad = names(store)[3]
    store.bad = {bad}
    path = tmp_path / "run" / "quarantine.jsonl"
    loader = make_loader([store], config(max_bad_share=1.0), quarantine=path)
    hits = 0
    for step, wanted in enumerate(expected, start=1):
        for batch, planned in zip(loader.next_step(), wanted, strict=True):
            for place, name in enumerate(batch.sample_ids):
                assert (batch.mean[place] == value_of(name)).all()
                if planned[place] != bad:
                    assert name == planned[place]
                    continue
                hits += 1
                assert name != bad
                assert str(batch.bucket) in name
                if hits == 1:
                    first = {"step": step, "replaced_by": name}
    assert hits >= 2
    assert loader.replaced == hits
    (row,) = listed(path)
    assert row == {
        **first,
        "sample_id": bad,
        "bucket": "1x64x64",
        "reason": "checksum",
        "detail": "its bytes have changed",
    }
    loader.close()
    again = make_loader([store], config(max_bad_share=1.0), quarantine=path)
    for _ in range(10):
        again.next_step()
    assert again.replaced > 0
    assert len(listed(path)) == 1, "a restart lists nothing twice"
    again.close()


def test_replacement_that_is_bad_too_is_replaced(store, tmp_path):
    store.bad = set(names(store)[:12])  # two images are left
    path = tmp_path / "quarantine.jsonl"
    loader = make_loader([store], config(max_bad_share=1.0), quarantine=path)
    drawn = {name for _ in range(12) for batch in loader.next_step() for name in batch.sample_ids}
    assert not drawn & store.bad
    assert {row["sample_id"] for row in listed(path)} == store.bad
    loader.close()


def test_cell_without_a_good_sample_is_named(store, tmp_path):
    store.bad = set(names(store)[14:])
    path = tmp_path / "quarantine.jsonl"
    loader = make_loader([store], config(max_bad_share=1.0), quarantine=path)
    for _ in range(2):
        with pytest.raises(
            ValueError,
            match=r"bucket 5x64x64 of .* has no usable sample: 6 of its 6 were tried .* "
            r"\(\d+ checksum; listed in .*quarantine.jsonl\)",
        ):
            run(loader, 10)
    assert {row["sample_id"] for row in listed(path)} == store.bad
    loader.close()


def test_cell_of_one_bad_sample_is_named(tmp_path):
    store = MadeUpStore(tmp_path / "store", [make_row(0, IMAGE)])
    store.bad = set(names(store))
    loader = make_loader([store], config())
    with pytest.raises(ValueError, match=r"bucket 1x64x64 .*: 1 of its 1 were tried"):
        loader.next_step()
    loader.close()


def test_run_stops_above_the_tolerated_share_of_bad_samples(many, tmp_path):
    many.bad = set(names(many)[::20])  # 5 %
    path = tmp_path / "quarantine.jsonl"
    loader = make_loader([many], config(max_bad_share=0.02), quarantine=path)
    with pytest.raises(
        ValueError,
        match=r"(\d+) of (\d+) samples were unusable \(\d+ checksum; listed in .*\), more than "
        r"data.max_bad_share=0.02",
    ) as raised:
        run(loader, 100)
    bad, total = map(int, re.findall(r"\d+", str(raised.value))[:2])
    assert 100 <= total <= 400
    assert bad > 0.02 * total
    with pytest.raises(ValueError, match="samples were unusable"):
        loader.next_step()
    loader.close()
    tolerant = make_loader([many], config(max_bad_share=0.1))
    for _ in range(70):
        tolerant.next_step()
    assert 15 <= tolerant.replaced <= 25
    tolerant.close()


@pytest.mark.parametrize("what", ["mean", "std", "states", "pooled", "empty", "raise"])
def test_misshapen_sample_is_bad(store, tmp_path, what):
    wrong = names(store)[5]

    def spoil(row, sample):
        if row.sample_id != wrong:
            return sample
        if what == "raise":
            raise RuntimeError("the disk is on fire")
        if what in ("mean", "std"):
            setattr(sample, what, torch.zeros(2, 1, 8, 4))
        elif what == "states":
            sample.text = Text(states=torch.zeros(7, 3), pooled=torch.zeros(2))
        elif what == "empty":
            sample.text = Text(states=torch.zeros(0, 3), pooled=torch.zeros(2))
        else:
            sample.text = Text(states=torch.zeros(2, 3), pooled=torch.zeros(3))
        return sample

    store.spoil = spoil
    path = tmp_path / "quarantine.jsonl"
    loader = make_loader([store], config(max_bad_share=1.0), quarantine=path)
    drawn = {name for _ in range(12) for batch in loader.next_step() for name in batch.sample_ids}
    assert drawn == set(names(store)) - {wrong}
    (row,) = listed(path)
    assert row["reason"] == ("unreadable" if what == "raise" else "damaged")
    assert ("on fire" if what == "raise" else "has shape") in row["detail"]
    loader.close()


class Group:
    """Stands for the ranks that share a batch: an element-wise OR that all of them must call."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.lock = threading.Lock()
        self.mask: torch.Tensor | None = None
        self.calls = [0] * size

    def agree(self, member: int):
        def call(mask):
            self.calls[member] += 1
            assert threading.current_thread().name.startswith("rank"), "not in the background"
            with self.lock:
                self.mask = mask.clone() if self.mask is None else self.mask | mask
            self.barrier.wait(20)
            result = self.mask
            if self.barrier.wait(20) == 0:
                self.mask = None
            self.barrier.wait(20)
            return result

        return call


def test_ranks_that_share_a_batch_replace_what_one_of_them_cannot_read(store, tmp_path):
    rows = [store.index.row(number) for number in range(len(store.index))]
    stores = [store, MadeUpStore(tmp_path / "twin", rows)]
    stores[1].bad = {names(store)[2], names(store)[16]}
    group = Group(2)
    paths = [tmp_path / "quarantine.jsonl", None]
    loaders = [
        make_loader(
            [stores[member]],
            config(max_bad_share=1.0),
            agree=group.agree(member),
            quarantine=paths[member],
        )
        for member in range(2)
    ]

    def steps(loader):
        return [loader.next_step() for _ in range(20)]

    with ThreadPoolExecutor(2, "rank") as pool:
        one, two = pool.map(steps, loaders)
    for ours, theirs in zip(one, two, strict=True):
        assert ids(ours) == ids(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert a.captions == b.captions
            assert a.epochs == b.epochs
            assert torch.equal(a.mean, b.mean)
            assert torch.equal(a.text, b.text)
    drawn = {name for step in one for batch in step for name in batch.sample_ids}
    assert drawn == set(names(store)) - stores[1].bad
    assert loaders[0].replaced == loaders[1].replaced > 0
    assert group.calls[0] == group.calls[1] > 20
    found = listed(paths[0])
    assert {row["sample_id"] for row in found} == stores[1].bad
    assert {row["detail"] for row in found} == {
        "another rank that shares its batch could not use it"
    }
    for loader in loaders:
        loader.close()


def test_agreement_is_asked_once_per_update_while_all_is_good(store):
    calls = []
    loader = make_loader([store], config(), agree=lambda mask: calls.append(mask) or mask)
    for step in range(1, 8):
        batches = loader.next_step()
        assert len(calls) == step
        assert calls[-1].dtype == torch.bool
        assert len(calls[-1]) == sum(len(batch.sample_ids) for batch in batches)
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

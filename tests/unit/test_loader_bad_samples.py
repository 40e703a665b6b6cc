"""Samples that cannot be used are replaced, listed and counted, alike on all ranks."""

import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hunyuan_train.data.config import SourceConfig
from hunyuan_train.data.store import Text
from tests.support.loading import (
    IMAGE,
    config,
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

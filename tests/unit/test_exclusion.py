"""Samples that training wants never to meet again, in the loader."""

import json

import pytest
import torch

from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.config import DataConfig
from tests.support.sample_store import MadeUpStore, make_loader, make_row, value_of

IMAGE, CLIP = Bucket(1, 64, 64), Bucket(5, 64, 64)
WHY = "loss 9 is above the limit of 1 at step 3"


@pytest.fixture
def store(tmp_path):
    """14 images, 6 clips."""
    rows = [make_row(number, IMAGE if number < 14 else CLIP) for number in range(20)]
    return MadeUpStore(tmp_path / "store", rows)


def config(**settings):
    return DataConfig(**{"max_tokens": 64, "max_batch": 3, **settings})


def names(store):
    return sorted(store.index.row(number).sample_id for number in range(len(store.index)))


def drawn(loaders, steps):
    """Return (sample, epoch, weight) of each update over all ranks, sorted."""
    updates = []
    for _ in range(steps):
        batches = [batch for loader in loaders for batch in loader.next_step()]
        updates.append(
            sorted(
                pair
                for batch in batches
                if batch.weight
                for pair in zip(batch.sample_ids, batch.epochs, strict=True)
            )
        )
    for loader in loaders:
        loader.close()
    return updates


def test_excluded_samples_are_replaced_listed_and_counted_but_do_not_stop_the_run(store, tmp_path):
    before = drawn([make_loader([store], config())], 30)
    lost = set(before[2])
    excluded = {name for name, _ in lost}
    path = tmp_path / "quarantine.jsonl"
    loader = make_loader([store], config(max_bad_share=0.0), quarantine=path)
    run = [loader.next_step() for _ in range(5)]  # others of them may be read ahead
    assert run
    loader.exclude(excluded, WHY)
    loader.restart()
    after = drawn([loader], 30)
    replaced = 0
    for old, new in zip(before, after, strict=True):
        assert {pair for pair in old if pair[0] not in excluded} <= set(new)
        assert len(new) == len(old)
        assert not {name for name, _ in new} & excluded
        replaced += len(old) - len([pair for pair in old if pair[0] not in excluded])
    assert loader.replaced == replaced > 3 * len(excluded)
    assert loader.excluded == len(excluded)
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert {entry["sample_id"] for entry in entries} == excluded
    assert {(entry["reason"], entry["detail"]) for entry in entries} == {("refused", WHY)}
    assert not {entry["replaced_by"] for entry in entries} & excluded


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_exclusions_are_part_of_the_state_and_the_same_for_other_ranks(store, ranks):
    def make(rank, count):
        return make_loader([store], config(), rank=rank, ranks=count, planned=2)

    loaders = [make(rank, 2) for rank in range(2)]
    for loader in loaders:
        loader.next_step()
        state = loader.state_dict()
        loader.exclude(names(store)[2:7], WHY)
        loader.load_state_dict(state)
        loader.next_step()
    states = [json.dumps(loader.state_dict()) for loader in loaders]
    assert states[0] == states[1]
    expected = drawn(loaders, 20)
    again = [make(rank, ranks) for rank in range(ranks)]
    for loader in again:
        loader.load_state_dict(json.loads(states[0]))
        assert loader.excluded == 5
        assert json.dumps(loader.state_dict()) == states[0]
    assert drawn(again, 20) == expected


def test_a_cell_that_is_excluded_as_a_whole_only_keeps_ranks_in_step(store):
    clips = set(names(store)[14:])
    loader = make_loader([store], config())
    loader.exclude(clips, WHY)
    loader.restart()
    cleared = 0
    for _ in range(20):
        for batch in loader.next_step():
            assert batch.weight == float(batch.bucket == IMAGE)
            if not batch.weight:
                cleared += 1
                assert not batch.mean.any()
                assert not batch.std.any()
                assert batch.text_mask.any(dim=1).all()
                assert torch.equal(batch.text[0], batch.empty_text)
            else:
                assert (batch.mean[0] == value_of(batch.sample_ids[0])).all()
    assert cleared > 5
    loader.close()


def test_unreadable_samples_beside_excluded_ones_end_the_same_way(store):
    clips = names(store)[14:]
    store.bad = {clips[0], clips[3]}
    loader = make_loader([store], config(max_bad_share=1.0))
    loader.exclude(set(clips) - store.bad, WHY)
    loader.restart()
    for _ in range(20):
        for batch in loader.next_step():
            assert batch.weight == float(batch.bucket == IMAGE)
    loader.close()


def test_excluding_too_much_is_one_sentence(store):
    loader = make_loader([store], config(max_bad_share=0.2))
    for number, name in enumerate(names(store)[:5]):
        loader.exclude([name], f"{WHY} {number}")
    assert loader.excluded == 5
    with pytest.raises(ValueError, match=r"6 of the 20 selected samples were in 6 refused updates"):
        loader.exclude(names(store)[5:6], f"{WHY} 5")
    loader = make_loader([store], config(max_bad_share=1.0))
    with pytest.raises(ValueError, match="20 of the 20 selected samples") as error:
        loader.exclude(names(store), WHY)
    assert "\n" not in str(error.value)

"""What tests of the loader share: stores of made-up samples and what was drawn from them."""

import gc
import threading
import time

from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.config import DataConfig
from tests.support.sample_store import MadeUpStore, make_row

IMAGE, CLIP = Bucket(1, 64, 64), Bucket(5, 64, 64)


def mixed_store(folder):
    """14 images with 3 captions, 6 clips with one."""
    rows = [make_row(number, IMAGE, captions=3) for number in range(14)]
    rows += [make_row(number, CLIP) for number in range(14, 20)]
    return MadeUpStore(folder / "store", rows)


def many_images(folder):
    return MadeUpStore(folder / "many", [make_row(number, IMAGE) for number in range(400)])


def wait_for_data_threads():
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

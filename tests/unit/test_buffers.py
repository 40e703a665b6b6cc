import gc
import threading

import pytest
import torch

from hunyuan_train.data.buffers import Buffers

LARGE = 300_000


@pytest.mark.parametrize("count", [0, 1, 2**18 - 1, 2**18, LARGE])
def test_tensors_have_the_size_asked_for(count):
    tensor = Buffers(keep=1).take(count)
    assert (tensor.shape, tensor.dtype) == ((count,), torch.float32)
    tensor.fill_(1.0)
    assert float(tensor.sum()) == count


def test_memory_comes_back_with_the_last_tensor_on_it():
    buffers = Buffers(keep=2)
    tensor = buffers.take(LARGE)
    place = tensor.data_ptr()
    view = tensor[5:].view(-1, 5)[:10]
    del tensor
    gc.collect()
    other = buffers.take(LARGE)
    other.fill_(1.0)
    assert other.data_ptr() != place
    del view
    gc.collect()
    assert buffers.take(LARGE + 1).data_ptr() == place  # of the same size class


def test_no_more_than_asked_for_is_kept():
    buffers = Buffers(keep=2)
    tensors = [buffers.take(LARGE) for _ in range(5)]
    del tensors
    gc.collect()
    assert [len(free) for free in buffers._free.values()] == [2]


def test_threads_never_share_memory():
    buffers = Buffers(keep=4)
    wrong: list[int] = []

    def work(mark: int) -> None:
        for _ in range(200):
            tensor = buffers.take(LARGE)
            tensor[:100] = mark
            threading.Event().wait(0.0001)
            if not bool((tensor[:100] == mark).all()):
                wrong.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []

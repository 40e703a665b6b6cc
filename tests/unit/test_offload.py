"""Kept tensors go to the host and come back: exactly, in time, and without a leak."""

import gc
import logging
from weakref import ref

import pytest
import torch
from test_recompute import build, gradients, inputs, tiny, unequal
from torch import Tensor, nn

from hunyuan_train.memory import offload
from hunyuan_train.memory.config import MemoryConfig, Recompute, Switch
from hunyuan_train.memory.offload import Copy, HostPages, Lane, Offload
from hunyuan_train.memory.recompute import BlockForward, set_recompute
from hunyuan_train.memory.tracing import LiveBytes, SavedBytes

MODES = [Recompute.selective, Recompute.full]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PAGE = 4096


def blocks_of(model: nn.Module) -> list[BlockForward]:
    return [m.forward for m in model.modules() if isinstance(m.forward, BlockForward)]


def moving(model: nn.Module, mode: Recompute, **fields: float) -> Offload:
    """Let the blocks of a built model move all they keep; return who does it."""
    blocks = blocks_of(model)
    mover = Offload(len(blocks), **{"min_bytes": 0, "page_bytes": PAGE, **fields})  # pyright: ignore[reportArgumentType]
    for block in blocks:
        block.offload = mover
    set_recompute(model, mode)
    return mover


def placed(batch: tuple, device: str) -> tuple:
    return tuple(None if part is None else part.to(device) for part in batch)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_gradients_are_those_of_keeping_on_the_device(
    mode: Recompute, share: float, device: str
) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    cfg = tiny(3, 3)
    batches = [placed(inputs(cfg, (7, 4)), device), placed(inputs(cfg, (5,), side=12), device)]
    model = build(cfg, MemoryConfig()).to(device)
    set_recompute(model, mode)
    truths = [{n: g.clone() for n, g in gradients(model, batch).items()} for batch in batches]
    mover = moving(model, mode, share=share)
    for number in (0, 1, 0):
        assert unequal(gradients(model, batches[number]), truths[number]) == []
        assert mover.pages.used == 0
    assert mover.pages.count > 0


def test_the_config_decides() -> None:
    cfg = tiny(2, 2)
    memory = MemoryConfig(offload=Switch.on, offload_min_mib=0.0, offload_share=0.5)
    batch = inputs(cfg, (7, 4))
    truth = gradients(build(cfg, None), batch)
    model = build(cfg, memory)
    set_recompute(model, Recompute.selective)
    assert unequal(gradients(model, batch), truth) == []
    mover = model.double_blocks[0].forward.offload
    assert mover.pages.count > 0
    idle = build(cfg, memory)
    set_recompute(idle, Recompute.selective, offload=False)
    assert unequal(gradients(idle, batch), truth) == []
    assert idle.double_blocks[0].forward.offload._device is None
    assert build(cfg, MemoryConfig()).double_blocks[0].forward.offload is None


def test_pages_come_back_and_are_used_again() -> None:
    cfg = tiny(2, 2)
    model = build(cfg, MemoryConfig())
    mover = moving(model, Recompute.selective)
    sizes = [inputs(cfg, (7, 4), side=side) for side in (8, 16, 12)]
    for batch in sizes:
        gradients(model, batch)
    most = mover.pages.count
    for step in range(50):
        gradients(model, sizes[step % 3])
        assert mover.pages.used == 0
    assert mover.pages.count == most
    assert sum(len(kept) for kept in mover._kept.values()) < 40


def test_a_forward_without_backward_gives_its_pages_back() -> None:
    cfg = tiny(2, 2)
    model = build(cfg, MemoryConfig())
    mover = moving(model, Recompute.selective)
    batch = inputs(cfg, (7, 4))
    out = model(*batch)
    assert mover.pages.used > 0
    del out
    gc.collect()
    assert mover.pages.used == 0


def test_two_graphs_at_a_time_do_not_mix() -> None:
    cfg = tiny(2, 2)
    batches = inputs(cfg, (7, 4)), inputs(cfg, (2, 6), side=12)
    truth = gradients(build(cfg, None), *batches)
    model = build(cfg, MemoryConfig())
    moving(model, Recompute.selective)
    assert unequal(gradients(model, *batches), truth) == []


def test_small_tensors_and_the_last_block_stay() -> None:
    cfg = tiny(1, 3)
    model = build(cfg, MemoryConfig())
    batch = inputs(cfg, (7, 4))
    rows = 2 * (3 * 8 * 8 + 7) * cfg.hidden_size * 4
    mover = moving(model, Recompute.full, min_bytes=rows)
    model(*batch)
    # Inputs of the first two single blocks; those of the double block are smaller.
    assert mover.pages.count == 2 * -(-rows // PAGE)
    mover = moving(model, Recompute.full, min_bytes=rows + 1)
    model(*batch)
    assert mover.pages.count == 0


def test_the_device_lets_go_while_later_blocks_run() -> None:
    cfg = tiny(1, 8)
    model = build(cfg, MemoryConfig())
    batch = inputs(cfg, (7, 4))
    held: list[int] = []
    set_recompute(model, Recompute.selective)
    for mover in (None, moving(model, Recompute.selective)):
        for block in blocks_of(model):
            block.offload = mover
        gradients(model, batch)
        with LiveBytes() as live:
            out = model(*batch)
        assert out.requires_grad
        pages = mover.pages.count * PAGE if mover else 0  # counted, but not on the device
        held.append(live.live_bytes - pages)
    each = 2 * 2 * (3 * 8 * 8 + 7) * cfg.hidden_size * 4
    # Of nine blocks the last stays, and the one before it is leaving.
    assert 6 * each < held[0] - held[1] < 8 * each


def test_saved_tensors_hooks_outside_see_nothing_of_what_is_moved() -> None:
    cfg = tiny(1, 3)
    model = build(cfg, MemoryConfig())
    saved: dict[bool, int] = {}
    for moves in (False, True):
        if moves:
            moving(model, Recompute.selective)
        set_recompute(model, Recompute.selective)
        hooks = SavedBytes(model.parameters)
        with hooks:
            out = model(*inputs(cfg, (7, 4)))
        assert out.requires_grad
        saved[moves] = hooks.take()
    assert saved[False] - saved[True] > 4 * 2 * (3 * 8 * 8) * cfg.hidden_size * 4


def test_strides_are_kept() -> None:
    mover = Offload(3, min_bytes=0, page_bytes=PAGE)
    source = torch.randn(3, 5, 700).transpose(0, 1)
    sliced = torch.randn(6, 800)[:, :400]
    hooks = mover.of_block(0)
    moved, stays = hooks.pack_hook(source), hooks.pack_hook(sliced)
    assert (moved.moves, stays.moves) == (True, False)
    moved.let_go()
    back = hooks.unpack_hook(moved)
    assert torch.equal(back, source)
    assert back.stride() == source.stride()
    assert back.untyped_storage()._cdata != source.untyped_storage()._cdata
    assert torch.equal(hooks.unpack_hook(stays), sliced)


def test_a_change_in_place_is_noticed() -> None:
    mover = Offload(3, min_bytes=0, page_bytes=PAGE)
    tensor = torch.randn(4000)
    kept = mover.of_block(0).pack_hook(tensor)
    tensor.mul_(2)
    with pytest.raises(AssertionError, match="changed in place"):
        kept.let_go()


class LateCopy(Copy):
    """Some copies that are done when somebody waits for them, and not before."""

    __slots__ = ("lane", "number")

    def __init__(self, lane: "LateLane", number: int) -> None:
        super().__init__(None)
        object.__setattr__(self, "lane", lane)
        object.__setattr__(self, "number", number)

    def wait(self) -> None:
        self.lane.run_until(self.number)


class LateLane(Lane):
    """The worst case of a stream: nothing happens until it is waited for.

    It keeps no memory alive, and neither does a stream.
    """

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.queue: list[list[tuple[Late, Late]]] = []
        self.done = 0

    def copy(self, pairs: list[tuple[Tensor, Tensor]]) -> Copy:
        self.queue.append([(Late(target), Late(source)) for target, source in pairs])
        return LateCopy(self, len(self.queue))

    def run_until(self, number: int) -> None:
        for position in range(self.done, number):
            for target, source in self.queue[position]:
                target.tensor().copy_(source.tensor())
        self.done = max(self.done, number)


class Late:
    """A flat tensor of bytes that does not hold its memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.storage = ref(tensor.untyped_storage())
        self.place = tensor.storage_offset(), tensor.shape

    def tensor(self) -> Tensor:
        storage = self.storage()
        assert storage is not None, "the memory was given away before its copy was done"
        return torch.empty(0, dtype=torch.uint8).set_(storage, *self.place)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_used_before_its_copy_is_done(mode: Recompute) -> None:
    cfg = tiny(3, 4)
    model = build(cfg, MemoryConfig())
    set_recompute(model, mode)
    batches = [inputs(cfg, (7, 4)), inputs(cfg, (3, 6))]
    truths = [{n: g.clone() for n, g in gradients(model, b).items()} for b in batches]
    mover = moving(model, mode)
    gradients(model, batches[0])
    mover.outward, mover.inward = LateLane(), LateLane()
    for step in range(4):
        assert unequal(gradients(model, batches[step % 2]), truths[step % 2]) == []
    assert mover.pages.used == 0
    assert mover.inward.done > 0


def test_one_block_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = tiny(1, 5)
    model = build(cfg, MemoryConfig())
    mover = moving(model, Recompute.selective)
    events: list[tuple[str, int]] = []
    fetch, take = offload.Kept._fetch, offload.Kept.take

    def fetched(kept: offload.Kept) -> None:
        events.append(("sent for", kept.block))
        fetch(kept)

    def taken(kept: offload.Kept) -> Tensor:
        events.append(("taken", kept.block))
        return take(kept)

    monkeypatch.setattr(offload.Kept, "_fetch", fetched)
    monkeypatch.setattr(offload.Kept, "take", taken)
    gradients(model, inputs(cfg, (7, 4)))
    assert mover.pages.used == 0
    order = list(dict.fromkeys(events))
    # The last block's tensors stay, and those of the one before have not left yet.
    sent = [("sent for", block) for block in (3, 2, 1, 0)]
    assert [event for event in order if event[0] == "sent for"] == sent
    assert len([event for event in events if event == sent[1]]) == 4  # each of its tensors once
    for block in range(4):
        assert order.index(("sent for", block)) == order.index(("taken", block + 1)) - 1
        assert block == 3 or order.index(("sent for", block)) > order.index(("taken", block + 2))


def slow(monkeypatch: pytest.MonkeyPatch, waited: float) -> None:
    monkeypatch.setattr(offload.Meter, "finished", lambda meter: [(waited, 1.0)])


@pytest.mark.parametrize("waited", [0.04, 0.2])
def test_a_link_that_cannot_keep_up_is_left_alone(
    waited: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slow(monkeypatch, waited)
    cfg = tiny(1, 2)
    model = build(cfg, MemoryConfig())
    mover = moving(model, Recompute.selective)
    batch = inputs(cfg, (5,))
    truth = gradients(build(cfg, None), batch)
    with caplog.at_level(logging.WARNING):
        for step in range(offload.WARM_UP + offload.WINDOW + 3):
            assert mover.active or step >= offload.WARM_UP + offload.WINDOW - 1
            assert unequal(gradients(model, batch), truth) == []
    assert mover.active == (waited < offload.WAIT_LIMIT)
    said = [record.getMessage() for record in caplog.records]
    if mover.active:
        assert said == []
    else:
        assert len(said) == 1
        assert "took 20 % of the time, so memory.offload is now off" in said[0]


def test_it_stays_on_where_the_device_is_too_small(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slow(monkeypatch, 0.5)
    monkeypatch.setattr(Offload, "_fits_device", lambda mover: False)
    cfg = tiny(1, 2)
    model = build(cfg, MemoryConfig())
    mover = moving(model, Recompute.selective)
    with caplog.at_level(logging.WARNING):
        for _ in range(offload.WARM_UP + offload.WINDOW + 5):
            gradients(model, inputs(cfg, (5,)))
    assert mover.active
    assert len(caplog.records) == 1
    assert "left on only because its tensors do not fit" in caplog.text


def test_waiting_is_measured_by_micro_step() -> None:
    meter = offload.Meter(torch.device("cpu"))
    assert meter.finished() == []
    meter.start()
    meter.wait(Copy(None))
    assert meter.finished() == []
    meter.start()
    ((waited, passed),) = meter.finished()
    assert 0 <= waited <= passed
    assert meter.finished() == []


def test_pages_are_a_ring() -> None:
    pages = HostPages(PAGE, pinned=False)
    first = pages.take(3 * PAGE)
    second = pages.take(1)
    assert (len(first), len(second), pages.count, pages.used) == (3, 1, 4, 4)
    pages.give_back(first)
    third = pages.take(2 * PAGE)
    assert [page.data_ptr() for page in third] == [page.data_ptr() for page in first[:2]]
    assert (pages.count, pages.used) == (4, 3)

"""Tensor-parallel shards in checkpoints: every layout writes and reads the same whole tensors."""

import math
from pathlib import Path

import pytest
import torch
from distributed import run_distributed
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from hunyuan_train.checkpoint.config import CheckpointConfig
from hunyuan_train.checkpoint.load import flatten, load_weights, restore_into, stored_tensors
from hunyuan_train.checkpoint.manager import CheckpointManager
from hunyuan_train.parallel.layout import Slices, fused_slices, whole_slices
from hunyuan_train.parallel.view import WholeView

CUTS = {
    "qkv_mlp_weight": ((40, 5), 0, (8, 8, 8, 16)),
    "qkv_mlp_bias": ((40,), 0, (8, 8, 8, 16)),
    "out_weight": ((6, 12), 1, (12,)),
    "fused_out_weight": ((7, 20), 1, (8, 12)),
    "out_bias": ((6,), 0, None),
    "norm": ((5,), 0, None),
    "short": ((1,), 0, None),
    "conv_weight": ((8, 2, 1, 3, 2), 0, (8,)),
    "whole_conv_weight": ((6, 2, 1, 3, 2), 0, None),
}
"""Name: whole shape, cut dim, parts of it; None for what every tensor-parallel rank holds."""

LAYOUTS = ["tp2_zero2", "tp4", "zero4", "hsdp", "hsdp_tp2", "flat2_tp2", "flat4"]
HUBS = {"tp2_zero2", "zero4", "flat2_tp2"}
"""Every layout is read into these and reads them; the other pairs would only cost time."""


def _values(zero: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    values = {n: torch.randn(shape, generator=generator) for n, (shape, _, _) in CUTS.items()}
    return {n: torch.zeros_like(v) for n, v in values.items()} if zero else values


def _slices(tp_rank: int, tp_size: int) -> dict[str, Slices]:
    return {
        name: whole_slices(shape)
        if parts is None
        else fused_slices(shape, dim, parts, tp_rank, tp_size)
        for name, (shape, dim, parts) in CUTS.items()
    }


class _Part(nn.Module):
    """Holds tensor-parallel local tensors as plain parameters."""

    def __init__(self, values: dict[str, torch.Tensor], slices: dict[str, Slices]) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(slices[name].take(value).clone()))


Built = dict[str, tuple[torch.Tensor, Slices, int | None]]
"""Name: what the rank stores, of which slices, and where in the flattened local tensor."""


def _fragments(
    values: dict[str, torch.Tensor], slices: dict[str, Slices], rank: int, size: int
) -> Built:
    """All local tensors in one buffer, of which a rank holds an even share."""
    buffer = torch.cat([slices[n].take(v).flatten() for n, v in values.items()])
    share = -(-buffer.numel() // size)
    first = rank * share
    mine = buffer[first : first + share].clone()
    built: Built = {}
    begin = 0
    for name in values:
        end = begin + math.prod(slices[name].local_shape)
        start = min(max(begin, first), end)
        stop = max(min(end, first + len(mine)), start)
        low = min(start - first, len(mine)) if stop > start else 0
        built[name] = (mine[low : low + stop - start], slices[name], start - begin)
        begin = end
    return built


def _build(layout: str, rank: int, values: dict[str, torch.Tensor]) -> Built:
    if layout.startswith("flat"):
        tp_size = 2 if layout == "flat2_tp2" else 1
        return _fragments(values, _slices(rank % tp_size, tp_size), rank // tp_size, 4 // tp_size)
    dims = {
        "tp2_zero2": {"dp_replicate": 1, "dp_shard": 2, "tp": 2},
        "tp4": {"dp_replicate": 1, "dp_shard": 1, "tp": 4},
        "zero4": {"dp_replicate": 1, "dp_shard": 4, "tp": 1},
        "hsdp": {"dp_replicate": 2, "dp_shard": 2, "tp": 1},
        "hsdp_tp2": {"dp_replicate": 2, "dp_shard": 1, "tp": 2},
    }[layout]
    mesh = init_device_mesh("cpu", tuple(dims.values()), mesh_dim_names=tuple(dims))
    slices = _slices(mesh.get_local_rank("tp"), dims["tp"])
    part = _Part(values, slices)
    if layout.startswith("hsdp"):
        fully_shard(part, mesh=mesh["dp_replicate", "dp_shard"])
    elif layout != "tp4":
        fully_shard(part, mesh=mesh["dp_shard"])
    return {name: (p, slices[name], None) for name, p in part.named_parameters()}


def _half(built: Built) -> Built:
    return {n: (t.detach().to(torch.bfloat16), s, start) for n, (t, s, start) in built.items()}


def _views(built: Built) -> dict[str, WholeView]:
    return {name: WholeView.of(*entry) for name, entry in built.items()}


def _local(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _assert_same(found: Built, expected: Built) -> None:
    for name, (tensor, _, _) in expected.items():
        assert torch.equal(_local(found[name][0]), _local(tensor)), name


def _manager(folder: str | Path) -> CheckpointManager:
    return CheckpointManager(Path(folder) / "checkpoints", CheckpointConfig(), {"width": 5})


def _every_layout(rank: int, world: int, folder: str) -> None:
    originals = {layout: _build(layout, rank, _values()) for layout in LAYOUTS}
    for layout, built in originals.items():
        tensors = {"model": _views(built), "ema": _views(_half(built))}
        assert _manager(f"{folder}/{layout}").save(1, tensors, {})
    for source in [*LAYOUTS, "single"]:
        for layout, expected in originals.items():
            if not {source, layout} & HUBS:
                continue
            model = _build(layout, rank, _values(zero=True))
            ema = _half(model)
            tensors = {"model": _views(model), "ema": _views(ema)}
            assert _manager(f"{folder}/{source}").restore(tensors)
            _assert_same(model, expected)
            _assert_same(ema, _half(expected))


def _times_stored(entry: TensorStorageMetadata) -> torch.Tensor:
    seen = torch.zeros(entry.size, dtype=torch.int64)
    for chunk in entry.chunks:
        seen[tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))] += 1
    return seen


@pytest.mark.dist
def test_layouts_read_each_other_bitwise(tmp_path: Path):
    values = _values()
    halves = {name: value.to(torch.bfloat16) for name, value in values.items()}
    assert _manager(tmp_path / "single").save(1, {"model": values, "ema": halves}, {})
    run_distributed(_every_layout, 4, str(tmp_path))
    for layout in LAYOUTS:
        folder = tmp_path / layout
        for section, expected in {"model": values, "ema": halves}.items():
            found = load_weights(folder, section)
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert found[name].dtype == value.dtype
                assert torch.equal(found[name], value), (layout, name)
        step = folder / "checkpoints" / "step-00000001"
        for name, entry in stored_tensors(step).items():
            assert bool((_times_stored(entry) == 1).all()), (layout, name)
        num_chunks = sum(len(entry.chunks) for entry in stored_tensors(step).values())
        held = sum(v.numel() * 6 for v in values.values())
        written = sum(file.stat().st_size for file in step.glob("*.distcp"))
        # torch frames a chunk with 1.2 KB; a second copy would write more chunks than are listed.
        assert written < held + num_chunks * 1700, layout


def _carry_over(rank: int, world: int, folder: str) -> None:
    for layout in ("tp2_zero2", "flat2_tp2"):
        target = _build(layout, rank, _values(zero=True))
        restore_into(folder, {"model": _views(target)}, sections={"model": "ema"})
        rounded = {n: v.to(torch.bfloat16).float() for n, v in _values().items()}
        _assert_same(target, _build(layout, rank, rounded))


def _refused(rank: int, world: int, folder: str) -> None:
    mesh = init_device_mesh("cpu", (world,))
    tensor = distribute_tensor(torch.zeros(8, 4), mesh, [Shard(1)])
    with pytest.raises(ValueError, match="not cut by rows alone"):
        WholeView.of(tensor)
    narrow = {"model": {n: WholeView.of(torch.zeros(2, 3)) for n in CUTS}}
    with pytest.raises(ValueError, match=r"ema/norm is \[5\] there and \[2, 3\] here"):
        _manager(folder).restore(narrow | {"ema": narrow["model"]})


@pytest.mark.dist
def test_types_are_converted_and_misfits_refused(tmp_path: Path):
    values = _values()
    halves = {name: value.to(torch.bfloat16) for name, value in values.items()}
    assert _manager(tmp_path).save(1, {"model": values, "ema": halves}, {})
    run_distributed(_carry_over, 4, str(tmp_path))
    run_distributed(_refused, 2, str(tmp_path))


def test_a_view_is_the_whole_tensor_to_the_checkpoint_code():
    slices = _slices(1, 2)["qkv_mlp_weight"]
    parameter = nn.Parameter(torch.zeros(slices.local_shape, dtype=torch.bfloat16))
    view = flatten({"model": {"weight": WholeView.of(parameter, slices)}})["model/weight"]
    assert isinstance(view, WholeView)
    assert (view.shape, view.dtype) == ((40, 5), torch.bfloat16)
    assert view.numel() * view.element_size() == 40 * 5 * 2
    assert not view.requires_grad
    assert "[4, 0]+[4, 5], [12, 0]+[4, 5], [20, 0]+[4, 5], [32, 0]+[8, 5]" in repr(view)
    for operation in (torch.clone, torch.sum, lambda t: t.copy_(t), lambda t: t[0]):
        with pytest.raises(NotImplementedError, match="has no values of its own"):
            operation(view)


def test_empty_and_scalar_tensors_round_trip(tmp_path: Path):
    def views(scalar: torch.Tensor) -> dict:
        fragment = scalar.view(1)
        return {
            "empty": WholeView.of(torch.zeros(0, 3)),
            "scalar": WholeView.of(scalar),
            "flat_scalar": WholeView.of(fragment, whole_slices(()), 0),
            "flat_empty": WholeView.of(fragment[:0], whole_slices((2, 0)), 0),
        }

    assert _manager(tmp_path).save(1, {"model": views(torch.tensor(4.0))}, {})
    target = torch.tensor(0.0)
    assert _manager(tmp_path).restore({"model": views(target)})
    assert target == 4.0
    found = load_weights(tmp_path, "model")
    assert {n: t.shape for n, t in found.items()} == {
        "empty": (0, 3),
        "scalar": (),
        "flat_scalar": (),
        "flat_empty": (2, 0),
    }


@pytest.mark.parametrize(
    ("tensor", "cut", "start", "message"),
    [
        (torch.zeros(3, 5), (4, 5), None, r"shape \[3, 5\], but its slices of \[8, 5\]"),
        (torch.zeros(3), None, 0, "needs the slices"),
        (torch.zeros(3, 5), (4, 5), 0, r"not a Tensor of shape \[3, 5\]"),
        (torch.zeros(8)[::2], (4, 5), 0, "contiguous 1-D"),
        (torch.zeros(3), (4, 5), 18, "from 18 to 21 is not within"),
        (torch.zeros(3), (4, 5), -1, "from -1 to 2 is not within"),
    ],
)
def test_a_tensor_that_is_not_what_its_slices_say_is_refused(tensor, cut, start, message):
    slices = None if cut is None else fused_slices((8, 5), 0, (8,), 0, 2)
    with pytest.raises(ValueError, match=message):
        WholeView.of(tensor, slices, start)

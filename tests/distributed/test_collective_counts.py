"""Every message of one update, by kind and bytes, against the closed form of docs/parallelism.md.

The bytes of a message are those of the whole: what a gather gives, what a reduction takes, the
buffer of an all-to-all or of one hop.
"""

import functools
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from distributed import run_distributed
from torch.utils._python_dispatch import TorchDispatchMode

from hunyuan_train.config.compose import compose_config
from hunyuan_train.config.root import RunConfig
from hunyuan_train.data.buckets import Bucket
from hunyuan_train.engine.trial import MicroBatch, run_trial
from hunyuan_train.memory.config import Recompute
from hunyuan_train.models.hunyuan.config import HunyuanConfig
from hunyuan_train.models.hunyuan.model import HunyuanVideo
from hunyuan_train.parallel.config import ParallelConfig, ReduceEvery
from hunyuan_train.parallel.mesh import build_axes
from hunyuan_train.runtime.dist import World

SHAPE = MicroBatch(Bucket(9, 80, 112), (5, 3))
BATCH, IMG_TOKENS, TXT_TOKENS = 2, 3 * 5 * 7, 5
FLOAT = 4
KINDS = {
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "allreduce_": "all_reduce",
    "alltoall_base_": "all_to_all",
    "send": "hop",
}
Traffic = Counter[tuple[str, int]]
"""How many messages of a kind and a size in bytes one rank takes part in."""


class Recorder(TorchDispatchMode):
    """Write down everything that reaches the process groups.

    torch's ``CommDebugMode`` neither sees messages from rank to rank nor sizes, and its hooks fail
    on a module that several blocks share, as they do the core of context parallelism.
    """

    def __init__(self) -> None:
        super().__init__()
        self.traffic: Traffic = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            if name != "recv_":  # the other end of a hop
                tensors = args[1] if name == "_reduce_scatter_base_" else args[0]
                sizes = [tensors.nbytes] if isinstance(tensors, torch.Tensor) else None
                sizes = sizes or [tensor.nbytes for tensor in tensors]
                self.traffic[KINDS.get(name, name), sum(sizes)] += 1
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Layout:
    """A layout and how it is run."""

    name: str
    world: int
    parallel: dict[str, Any] = field(default_factory=dict)
    micro_steps: int = 1
    recompute: Recompute = Recompute.none

    def __str__(self) -> str:
        return self.name

    @property
    def config(self) -> ParallelConfig:
        fields: dict[str, Any] = {"zero_stage": 0} | self.parallel
        return ParallelConfig(**fields)

    @property
    def dp(self) -> int:
        return self.world // self.config.tp // self.config.cp


def _zero(stage: int, micro_steps: int, reduce_every: ReduceEvery = ReduceEvery.step) -> Layout:
    name = f"zero{stage}-{reduce_every.value}-{micro_steps}"
    return Layout(name, 2, {"zero_stage": stage, "reduce_every": reduce_every}, micro_steps)


LAYOUTS = [
    Layout("tp", 2, {"tp": 2}),
    Layout("tp-sp", 2, {"tp": 2, "sp": True}),
    Layout("ring", 2, {"cp_ring": 2}),
    Layout("ulysses", 2, {"cp_ulysses": 2}),
    Layout("dp", 2),
    Layout("dp-2-micro-steps", 2, micro_steps=2),
    *(_zero(stage, micro_steps) for stage in (1, 2, 3) for micro_steps in (1, 2)),
    _zero(2, 2, ReduceEvery.micro_step),
    _zero(3, 2, ReduceEvery.micro_step),
    Layout("zero3-bf16", 2, {"zero_stage": 3, "compute_dtype": "bfloat16"}),
    Layout("tp-selective", 2, {"tp": 2}, recompute=Recompute.selective),
    Layout("tp-sp-full", 2, {"tp": 2, "sp": True}, recompute=Recompute.full),
    Layout("ring-selective", 2, {"cp_ring": 2}, recompute=Recompute.selective),
    Layout("ring-full", 2, {"cp_ring": 2}, recompute=Recompute.full),
    Layout("ulysses-selective", 2, {"cp_ulysses": 2}, recompute=Recompute.selective),
    Layout("zero3-full", 2, {"zero_stage": 3}, recompute=Recompute.full),
    Layout("tp-sp-ring", 4, {"tp": 2, "sp": True, "cp_ring": 2}),
    Layout("ring-4", 4, {"cp_ring": 4}),
    Layout("ulysses-ring-zero3", 4, {"cp_ring": 2, "cp_ulysses": 2, "zero_stage": 3}),
    Layout("hsdp", 4, {"dp_replicate": 2, "zero_stage": 3}),
]


@functools.cache
def tiny() -> RunConfig:
    return compose_config(["model=tiny", "run.device=cpu", "model.num_single_blocks=3"])


# The closed form.


@dataclass(frozen=True)
class Tokens:
    """Rows of a context-parallel rank, padding included."""

    img: int
    txt: int
    refined: int
    """Text rows of the refiner, which context parallelism does not divide."""

    @classmethod
    def of(cls, layout: Layout) -> "Tokens":
        cfg = layout.config
        img, txt = (math.ceil(n / cfg.sequence_shards) for n in (IMG_TOKENS, TXT_TOKENS))
        share = cfg.tp if cfg.sp else 1
        refined = txt * cfg.sequence_shards if cfg.sp else TXT_TOKENS
        return cls(img * share, txt * share, refined)


def pair(rows: int, hidden: int, sp: bool) -> Traffic:
    """A column linear and the row linear after it, forward and backward, over ``rows`` tokens."""
    size = BATCH * rows * hidden * FLOAT
    if sp:  # rows are gathered, and again for the weight's gradient; sums are scattered
        return Counter({("all_gather", size): 3, ("reduce_scatter", size): 2})
    return Counter({("all_reduce", size): 2})


def modulation(hidden: int, vectors: int, sp: bool) -> Traffic:
    """A modulation of ``vectors`` hidden sizes, forward and backward."""
    whole = BATCH * vectors * hidden * FLOAT
    traffic = Counter({("all_gather", whole): 1, ("all_reduce", BATCH * hidden * FLOAT): 1})
    if sp:
        traffic["reduce_scatter", whole] += 1
    return traffic


def total(parts: Iterable[Traffic]) -> Traffic:
    """Add counters up."""
    return sum(parts, Counter())


def times(count: int, traffic: Traffic) -> Traffic:
    return Counter({message: count * n for message, n in traffic.items()})


def tensor_traffic(cfg: HunyuanConfig, sp: bool, tokens: Tokens) -> Traffic:
    """Tensor parallelism in one forward and backward."""
    hidden = cfg.hidden_size
    double = total(
        [
            *(pair(rows, hidden, sp) for rows in (tokens.img, tokens.img, tokens.txt, tokens.txt)),
            modulation(hidden, 6, sp),
            modulation(hidden, 6, sp),
        ]
    )
    single = pair(tokens.img + tokens.txt, hidden, sp) + modulation(hidden, 3, sp)
    refiner = times(2, pair(tokens.refined, hidden, sp)) + modulation(hidden, 2, sp)
    # The embedders of time and pooled text, two of them also for the refiner, end in a sum.
    around = modulation(hidden, 2, sp) + Counter({("all_reduce", BATCH * hidden * FLOAT): 4})
    embedded = BATCH * TXT_TOKENS * hidden * FLOAT
    around["all_gather", embedded] += 1
    if sp:
        around["reduce_scatter", embedded] += 1
    return total(
        [
            times(cfg.num_double_blocks, double),
            times(cfg.num_single_blocks, single),
            times(cfg.refiner_depth, refiner),
            around,
        ]
    )


def context_traffic(cfg: HunyuanConfig, parallel: ParallelConfig, tokens: Tokens) -> Traffic:
    """Ulysses and ring in one forward and backward; the ring sees the rows of its Ulysses ranks."""
    layers = cfg.num_double_blocks + cfg.num_single_blocks
    one = BATCH * (tokens.img + tokens.txt) * cfg.hidden_size // parallel.tp * FLOAT
    traffic: Traffic = Counter()
    if parallel.cp_ulysses > 1:
        traffic += Counter({("all_to_all", 3 * one): 2, ("all_to_all", one): 2})
    if parallel.cp_ring > 1:  # keys and values forward and backward, and their gradients
        traffic["hop", 2 * one] += 3 * (parallel.cp_ring - 1)
    return times(layers, traffic)


def second_run_traffic(cfg: HunyuanConfig, layout: Layout, tokens: Tokens) -> Traffic:
    """What the forward of every block sends, again; selective leaves out the ring."""
    parallel, hidden = layout.config, cfg.hidden_size
    rows = (tokens.img, tokens.img, tokens.txt, tokens.txt, tokens.img + tokens.txt)
    counts = (cfg.num_double_blocks,) * 4 + (cfg.num_single_blocks,)
    traffic: Traffic = Counter()
    for count, tokens_of_pair in zip(counts, rows, strict=True) if parallel.tp > 1 else ():
        size = BATCH * tokens_of_pair * hidden * FLOAT
        for kind in ("all_gather", "reduce_scatter") if parallel.sp else ("all_reduce",):
            traffic[kind, size] += count
    if parallel.tp > 1:  # modulations
        traffic["all_gather", BATCH * 6 * hidden * FLOAT] += 2 * cfg.num_double_blocks
        traffic["all_gather", BATCH * 3 * hidden * FLOAT] += cfg.num_single_blocks
    layers = cfg.num_double_blocks + cfg.num_single_blocks
    one = BATCH * (tokens.img + tokens.txt) * hidden // parallel.tp * FLOAT
    if parallel.cp_ulysses > 1:
        traffic += Counter({("all_to_all", 3 * one): layers, ("all_to_all", one): layers})
    if parallel.cp_ring > 1 and layout.recompute is Recompute.full:
        traffic["hop", 2 * one] += layers * (parallel.cp_ring - 1)
    return traffic


def sizes_of_units(cfg: HunyuanConfig) -> list[int]:
    """Return the parameters of every unit and of what belongs to none, of the whole model."""
    with torch.device("meta"):
        model = HunyuanVideo(cfg)
    units = [sum(p.numel() for p in unit.parameters()) for unit in model.repeated_blocks]
    return [*units, sum(p.numel() for p in model.parameters()) - sum(units)]


def zero_traffic(layout: Layout, cfg: HunyuanConfig) -> Traffic:
    """Gathers and reductions of ``fully_shard`` in one update."""
    parallel, micro_steps = layout.config, layout.micro_steps
    gathers = {1: 1, 2: micro_steps, 3: 2 * micro_steps}[parallel.zero_stage]
    reductions = micro_steps if parallel.reduce_every is ReduceEvery.micro_step else 1
    shards = layout.world // parallel.tp // parallel.dp_replicate
    gathered = 2 if parallel.compute_dtype == "bfloat16" else FLOAT  # reduced in float32
    traffic: Traffic = Counter()
    for numel in sizes_of_units(cfg):
        traffic["all_gather", numel * gathered] += gathers
        traffic["reduce_scatter", numel * FLOAT] += reductions
        if parallel.dp_replicate > 1:
            traffic["all_reduce", numel * FLOAT // shards] += reductions
    return traffic


def partial_gradients(cfg: HunyuanConfig, sp: bool) -> int:
    """Return how many gradient elements are summed over tensor-parallel ranks after a backward."""
    hidden, blocks = cfg.hidden_size, (cfg.num_double_blocks, cfg.num_single_blocks)
    elements = cfg.head_dim * (4 * blocks[0] + 2 * blocks[1])  # norms of q and k
    if sp:
        row_biases = hidden * (4 * blocks[0] + blocks[1] + 2 * cfg.refiner_depth)
        norms = 4 * hidden * cfg.refiner_depth
        patch = cfg.in_channels * cfg.patch_volume
        elements += row_biases + norms + 2 * patch * hidden + hidden + patch
    return elements


def expected(layout: Layout) -> Traffic:
    """Return every message of one update of the tiny model."""
    cfg, parallel = tiny().model, layout.config
    tokens = Tokens.of(layout)
    traffic: Traffic = Counter()
    if parallel.tp > 1:
        traffic += times(layout.micro_steps, tensor_traffic(cfg, parallel.sp, tokens))
        traffic["all_reduce", FLOAT * partial_gradients(cfg, parallel.sp)] += 1
    traffic += times(layout.micro_steps, context_traffic(cfg, parallel, tokens))
    if layout.recompute is not Recompute.none:
        traffic += times(layout.micro_steps, second_run_traffic(cfg, layout, tokens))
    if parallel.sequence_shards > 1:
        rows = math.ceil(IMG_TOKENS / parallel.sequence_shards) * parallel.sequence_shards
        velocity = BATCH * rows * cfg.out_channels * cfg.patch_volume * FLOAT
        traffic["all_gather", velocity] += layout.micro_steps
    if parallel.zero_stage > 0:
        traffic += zero_traffic(layout, cfg)
    elif layout.world > parallel.tp:
        traffic["all_reduce", FLOAT * held_elements(cfg, parallel.tp)] += 1  # all gradients
    if parallel.tp > 1 or parallel.zero_stage > 0:
        traffic["all_reduce", FLOAT] += 1  # the gradient norm
    if layout.dp > 1:
        # A row per rank: tokens, those of the loss, samples, FLOPs twice, the largest sample.
        traffic["all_reduce", layout.dp * 6 * 8] += 1
        traffic["all_reduce", FLOAT] += 1  # the loss, to show
    if layout.world > layout.dp:
        traffic["all_reduce", FLOAT] += 1  # the loss again: all ranks judge it alike
    return traffic


def held_elements(cfg: HunyuanConfig, tp: int) -> int:
    """Return the parameters of one tensor-parallel rank: what stays whole, and its share."""
    hidden, patch = cfg.hidden_size, cfg.out_channels * cfg.patch_volume
    whole = cfg.head_dim * (4 * cfg.num_double_blocks + 2 * cfg.num_single_blocks)
    whole += 2 * patch * hidden + hidden + patch + 4 * hidden * cfg.refiner_depth
    row_linears = 4 * cfg.num_double_blocks + cfg.num_single_blocks + 2 * cfg.refiner_depth + 4
    whole += hidden * row_linears  # their biases
    return whole + (sum(sizes_of_units(cfg)) - whole) // tp


# The measurement.


def _run(rank: int, size: int, layouts: list[Layout], cfg: RunConfig) -> dict[str, Traffic]:
    found = {}
    for layout in layouts:
        stage = replace(cfg.stage, micro_steps=layout.micro_steps)
        memory = replace(cfg.memory, recompute=layout.recompute)
        laid_out = replace(cfg, parallel=layout.config, stage=stage, memory=memory)
        axes = build_axes(layout.config, "cpu", size)
        world = World(rank=rank, local_rank=rank, size=size, device=torch.device("cpu"))
        shapes = [SHAPE] * (layout.dp * layout.micro_steps)
        with Recorder() as recorder:
            run_trial(laid_out, axes, world, shapes, 1)
        found[layout.name] = recorder.traffic
    return found


@functools.cache
def measured(world: int) -> list[dict[str, Traffic]]:
    layouts = [layout for layout in LAYOUTS if layout.world == world]
    return run_distributed(_run, world, layouts, tiny())


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_message_of_an_update_is_in_the_closed_form(layout: Layout) -> None:
    wanted = expected(layout)
    for ranks in measured(layout.world):
        found = ranks[layout.name]
        assert {"too many": found - wanted, "missing": wanted - found} == {
            "too many": Counter(),
            "missing": Counter(),
        }


def _count(name: str, kind: str) -> int:
    traffic = measured(2)[0][name]
    return sum(n for (found, size), n in traffic.items() if found == kind and size > 24)


@pytest.mark.dist
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_accumulating_gradients_adds_no_reduction(stage: int) -> None:
    one, two = (_count(f"zero{stage}-step-{n}", "reduce_scatter") for n in (1, 2))
    assert one == two == len(sizes_of_units(tiny().model))


@pytest.mark.dist
@pytest.mark.parametrize("stage", [2, 3])
def test_reducing_every_micro_step_doubles_the_reductions(stage: int) -> None:
    twice = _count(f"zero{stage}-micro_step-2", "reduce_scatter")
    assert twice == 2 * _count(f"zero{stage}-step-2", "reduce_scatter")
    assert _count(f"zero{stage}-micro_step-2", "all_gather") == _count(
        f"zero{stage}-step-2", "all_gather"
    )


@pytest.mark.dist
def test_stages_differ_in_how_often_parameters_are_gathered() -> None:
    units = len(sizes_of_units(tiny().model))
    gathers = [_count(f"zero{stage}-step-{n}", "all_gather") for stage in (1, 2, 3) for n in (1, 2)]
    assert gathers == [units, units, units, 2 * units, 2 * units, 4 * units]

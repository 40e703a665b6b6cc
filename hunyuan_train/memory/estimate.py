"""What one rank's memory holds, part by part and in closed form.

Per layer and token row, in units of the hidden size h and the compute dtype (r is the MLP ratio):

| what a block keeps for its backward | cut by tp | cut by tp only with sp |
|---|---|---|
| double block, one sample | 7 + 2r (q k v twice, attention, MLP before and after GELU) | 6 |
| double block, more samples | 1 more, the attention's output in order | 2 more, normalised tokens |
| single block | 7 + 2r | 3, with more samples 4 |
| any block with Ulysses | 1 more, once | |
| recompute selective | 1, the attention's output | 1, the input |
| recompute full | | 1, the input |

A row is one image or text token of this rank's shard, padding included. What a block needs at most
while it is worked on, beyond what is kept, was counted on tensors without values (``BlockWork``).
Parts a closed form does not know, the CUDA context and gaps between allocations, are the reserve of
``ClusterConfig``. docs/memory.md has all formulas and a table of an example.
"""

from dataclasses import dataclass, fields

from hunyuan_train.memory.config import Recompute
from hunyuan_train.memory.parameters import Parameters, parameters
from hunyuan_train.memory.states import FLOAT32_STATES, StateBytes
from hunyuan_train.models.hunyuan.config import HunyuanConfig

ATTENTION_WORKSPACE = 4
"""Bytes per row and value of q: flash backwards add up its gradient in float32."""
_ROW_STATISTICS = 4
"""Bytes of one float32: log-sum-exp, root mean squares of q and k, mean and deviation of a norm."""
_CACHED_GRIDS = 16
"""Tables of rotary angles that a model keeps; see ``models.rope.RopeCache``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How a run is spread over ranks; fields as in ``parallel.config``."""

    world: int = 1
    tp: int = 1
    sp: bool = False
    cp_ring: int = 1
    cp_ulysses: int = 1
    dp_replicate: int = 1
    zero_stage: int = 3
    compute_bytes: int = 2
    weight_bytes: int = 4
    reduce_bytes: int = 4
    whole_gradients: bool = False
    """Whether gradients are added up unsharded between micro-steps (``reduce_every=step`` and more
    than one)."""

    @property
    def cp(self) -> int:
        """Context-parallel ranks."""
        return self.cp_ring * self.cp_ulysses

    @property
    def ranks_per_batch(self) -> int:
        """Ranks that work on one micro-batch."""
        return self.tp * self.cp

    @property
    def zero_ranks(self) -> int:
        """Ranks a sharded copy is spread over: dp_shard x cp."""
        return self.world // (self.tp * self.dp_replicate)

    @property
    def sequence_shards(self) -> int:
        """Shards each token stream is cut into."""
        return self.cp * (self.tp if self.sp else 1)

    @property
    def casts(self) -> bool:
        """Whether ``fully_shard`` is applied: it shards, or it casts to a narrower dtype."""
        ranks = self.zero_ranks * self.dp_replicate
        return self.zero_stage > 0 and (ranks > 1 or self.compute_bytes < self.weight_bytes)

    def rows(self, img_tokens: int, txt_tokens: int) -> int:
        """Return the token rows of one context-parallel rank, padding included."""
        shards, each = self.sequence_shards, self.tp if self.sp else 1
        return each * (-(-img_tokens // shards) + -(-txt_tokens // shards))


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """One micro-batch and what is kept of it."""

    img_tokens: int
    txt_tokens: int
    batch: int = 1
    recompute: Recompute = Recompute.none
    offload_share: float = 0.0
    """Share of the blocks whose kept tensors are moved to the host."""
    grids: int = 1
    """Different shapes of the run, whose rotary tables stay on the device."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryParts:
    """Bytes on one GPU when it holds most."""

    parameters: float
    """This rank's share of the weights."""
    gradients: float
    """Its share of the gradients, or whole ones where they are added up unsharded."""
    optimizer: float
    """Moments."""
    average: float
    """Moving average of the weights."""
    teacher: float
    """Weights of a frozen model beside, which only stage 3 shards."""
    gathered: float
    """Gathered weights, their gradients and the buffers of both."""
    activations: float
    """What all blocks keep from forward to backward."""
    working: float
    """What the block being worked on needs beyond that."""
    exchange: float
    """Buffers of ring and Ulysses."""
    attention: float
    """Workspace of the attention kernel."""
    ends: float
    """Before the first and after the last block, the text refiner, rotary tables."""
    host: float = 0.0
    """On the host, not on the GPU: what is offloaded, and the states that are kept there."""

    @property
    def total(self) -> float:
        """All that is on the GPU."""
        return sum(getattr(self, field.name) for field in fields(self)) - self.host

    @property
    def states(self) -> float:
        """What is there between updates."""
        return self.parameters + self.gradients + self.optimizer + self.average + self.teacher


@dataclass(frozen=True, slots=True)
class BlockWork:
    """Most values per row that a block needs in its backward beyond what is kept, in units of h.

    Counted for both kinds of block with ``memory.tracing`` and rounded up: a recomputed block holds
    all it keeps without recompute, and gradients on top.
    """

    cut: float
    uncut: float
    ring_of_two: float
    """More with a ring of two ranks."""
    ring: float
    """More with a longer one: chunks arrive while gradients leave."""
    ulysses: float


RECOMPUTED_DOUBLE = BlockWork(17.0, 6.0, 6.0, 12.0, 3.5)
RECOMPUTED_SINGLE = BlockWork(20.5, 2.8, 16.5, 20.0, 3.5)
KEPT = BlockWork(5.5, 1.2, 16.5, 20.5, 1.5)
_GATHERED_ROWS = 1.0
"""With sp, whole rows of one gather are there besides, in units of h and rows of all shards."""
_NORMED_ROWS = 2.0
"""More uncut values in a recomputed double block of several samples."""


def estimate(
    model: HunyuanConfig,
    layout: Layout,
    work: Work,
    states: StateBytes = FLOAT32_STATES,
    counts: Parameters | None = None,
) -> MemoryParts:
    """Return the bytes on one GPU when it holds most, which is in the backward.

    Args:
        model: The transformer.
        layout: How it is spread.
        work: The micro-batch.
        states: Bytes per parameter between updates.
        counts: ``parameters(model)``, where many points of one model are asked for.
    """
    counts = counts or parameters(model)
    shards = layout.zero_ranks if layout.zero_stage else 1
    mine = counts.total.on(layout.tp) / shards
    gradients = states.gradient * mine
    if layout.whole_gradients and layout.casts:
        gradients += counts.total.on(layout.tp) * max(layout.compute_bytes, layout.reduce_bytes)
    kept = kept_bytes(model, layout, work)
    host = kept * work.offload_share
    if host:
        # Of the blocks that are moved, one is leaving or arriving while one is worked on.
        kept -= host - min(host, 2 * kept / max(1, _blocks(model)))
    unit = work.batch * layout.rows(work.img_tokens, work.txt_tokens) * layout.compute_bytes
    unit *= model.hidden_size
    working, exchange = _working(model, layout, work)
    return MemoryParts(
        parameters=states.weight * mine,
        gradients=gradients,
        optimizer=states.moments * mine,
        average=states.average * mine,
        teacher=states.teacher * (mine if layout.zero_stage == 3 else counts.total.on(layout.tp)),
        gathered=_gathered(counts, layout, (working + exchange) * unit),
        activations=kept,
        working=working * unit + states.update,
        exchange=exchange * unit,
        attention=unit / layout.compute_bytes / layout.tp * ATTENTION_WORKSPACE,
        ends=kept_ends_bytes(model, layout, work) + other_ends_bytes(model, layout, work),
        host=host + states.host * mine,
    )


def kept_bytes(model: HunyuanConfig, layout: Layout, work: Work) -> float:
    """Return what autograd keeps of all double and single blocks; see the table of the module."""
    rows = work.batch * layout.rows(work.img_tokens, work.txt_tokens)
    hidden = 2 * model.mlp_size / model.hidden_size
    several, ulysses = work.batch > 1, layout.cp_ulysses > 1
    if work.recompute is Recompute.none:
        double = (7 + hidden + (several or ulysses), 6 + 2 * several)
        single = (7 + hidden + ulysses, 3 + several)
        # Per head: log-sum-exp, q and k norms; per row: mean and deviation of up to two norms.
        statistics = _ROW_STATISTICS * (3 * model.num_heads / layout.tp + 4)
    elif work.recompute is Recompute.selective:
        double = single = (1.0, 1.0)
        statistics = _ROW_STATISTICS * model.num_heads / layout.tp
    else:
        double = single = (0.0, 1.0)
        statistics = 0.0
    values = sum(
        blocks * (cut / layout.tp + uncut / (layout.tp if layout.sp else 1))
        for blocks, (cut, uncut) in (
            (model.num_double_blocks, double),
            (model.num_single_blocks, single),
        )
    )
    width = model.hidden_size * layout.compute_bytes
    return rows * (values * width + statistics * _blocks(model))


def kept_ends_bytes(model: HunyuanConfig, layout: Layout, work: Work) -> float:
    """Return what autograd keeps outside the double and single blocks.

    Per row 2 values of h after the last block (3 with several samples, whose image rows are
    copied); per image token its patch; per text token, which context parallelism does not cut
    there, the language model's state and 10 + 2r values of h in each refiner block.
    """
    h, b = model.hidden_size, work.batch
    rows = layout.rows(work.img_tokens, work.txt_tokens)
    uncut = layout.tp if layout.sp else 1
    last = b * rows / uncut * (3 if b > 1 else 2) * h
    patches = b * work.img_tokens * model.in_channels * model.patch_volume
    refiner = (10 + 2 * model.mlp_size / h) * h * model.refiner_depth / uncut
    text = b * work.txt_tokens * (model.text_dim + refiner)
    return layout.compute_bytes * (last + patches + text)


def other_ends_bytes(model: HunyuanConfig, layout: Layout, work: Work) -> float:
    """Return what else is held outside the blocks.

    On every rank the whole velocity, three times in the compute dtype and three times in float32
    (it, its target, their difference); the text in float32; float32 cosines and sines, whole for
    the last shapes and, where sequences are sharded, of this rank's rows in two orders.
    """
    velocity = work.batch * work.img_tokens * model.out_channels * model.patch_volume
    text = work.batch * work.txt_tokens * model.text_dim
    tokens = work.img_tokens + work.txt_tokens
    tables = min(work.grids, _CACHED_GRIDS) * tokens
    if layout.sequence_shards > 1:
        tables += 2 * layout.rows(work.img_tokens, work.txt_tokens)
    return velocity * (3 * layout.compute_bytes + 12) + 4 * (text + tables * model.head_dim)


def _working(model: HunyuanConfig, layout: Layout, work: Work) -> tuple[float, float]:
    """Return what the busiest block needs, and ring and Ulysses more, per row in units of h."""
    if work.recompute is Recompute.none:
        kinds = [KEPT]
    else:
        doubles = [RECOMPUTED_DOUBLE] if model.num_double_blocks else []
        kinds = doubles + ([RECOMPUTED_SINGLE] if model.num_single_blocks else [])
    found = []
    for kind in kinds:
        normed = _NORMED_ROWS if kind is RECOMPUTED_DOUBLE and work.batch > 1 else 0.0
        uncut = (kind.uncut + normed) / (layout.tp if layout.sp else 1)
        rows = _GATHERED_ROWS if layout.sp else 0.0
        exchange = kind.ulysses if layout.cp_ulysses > 1 else 0.0
        if layout.cp_ring > 1:
            exchange += kind.ring if layout.cp_ring > 2 else kind.ring_of_two
        found.append((kind.cut / layout.tp + uncut + rows, exchange / layout.tp))
    return max(found, key=sum, default=(0.0, 0.0))


def _gathered(counts: Parameters, layout: Layout, working: float) -> float:
    """Return what ``fully_shard`` holds beyond its shards, at most.

    Stage 3: the block worked on, the next one's gather and the copy out of it; stages 1 and 2: all
    blocks and one gather. Besides, the block's gradient and the reduction of the block before, in
    the reduce dtype. The block's own reduction starts when its ``working`` bytes are free again.
    What is outside every block is gathered throughout.
    """
    if not layout.casts:
        return 0.0
    units = (counts.double, counts.single, counts.refiner)
    largest = max(unit.on(layout.tp) for unit in units)
    each, root = layout.compute_bytes, counts.root.on(layout.tp)
    if layout.zero_stage == 3:
        weights = 3 * largest + root
    else:
        weights = counts.total.on(layout.tp) + largest
    reduction = layout.reduce_bytes * largest
    return each * (weights + largest) + reduction + max(0.0, reduction - working)


def _blocks(model: HunyuanConfig) -> int:
    return model.num_double_blocks + model.num_single_blocks


@dataclass(frozen=True, kw_only=True, slots=True)
class Shards:
    """How many ranks share each part of the memory, for :func:`max_tokens`."""

    tp: int = 1
    sp: bool = False
    cp: int = 1
    states: int = 1
    """Ranks that model states are sharded over, tensor parallelism aside."""


def max_tokens(
    model: HunyuanConfig,
    parameters: int,
    memory_bytes: float,
    dtype_bytes: int,
    shards: Shards,
    reserve: float = 0.15,
    recompute: Recompute = Recompute.none,
    state_bytes: StateBytes = FLOAT32_STATES,
) -> int:
    """Return how many tokens of one micro-batch fit on the ranks that share it.

    Args:
        model: the transformer.
        parameters: of the whole model.
        memory_bytes: of one rank's device.
        dtype_bytes: of one activation value.
        shards: how the memory is shared.
        reserve: share of the memory left for what the formulas leave out.
        recompute: what is kept of a block.
        state_bytes: per parameter between updates.

    Raises:
        ValueError: the model states alone do not fit.
    """
    layout = Layout(
        world=shards.tp * max(shards.states, shards.cp),
        tp=shards.tp,
        sp=shards.sp,
        cp_ring=shards.cp,
        zero_stage=3 if shards.states > 1 or dtype_bytes == 2 else 0,
        compute_bytes=dtype_bytes,
        weight_bytes=int(state_bytes.weight),
    )

    def total(tokens: int) -> float:
        # Two samples keep more per token than one.
        half = Work(img_tokens=tokens, txt_tokens=0, batch=2, recompute=recompute)
        return estimate(model, layout, half, state_bytes).total

    free = memory_bytes * (1 - reserve)
    few, many = 0, shards.cp * shards.tp
    while total(many) <= free:
        few, many = many, 2 * many
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if total(middle) <= free else (few, middle)
    if not few:
        nothing = Work(img_tokens=0, txt_tokens=0)
        states = estimate(model, layout, nothing, state_bytes).states
        raise ValueError(
            f"the states of {parameters:,} parameters take {states / 2**30:.1f} GiB of the "
            f"{memory_bytes / 2**30:.1f} GiB of a rank, so no token fits; raise parallel.tp, "
            "use parallel.zero_stage=3 on more ranks, or set data.max_tokens by hand"
        )
    return 2 * few

"""Which layouts fit a cluster, bucket by bucket, and which of them is the fastest for a run.

A layout is one of a run. Recompute, offload and the micro-batch are chosen for every bucket: of
those that fit, the ones with the least GPU time per sample.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from hunyuan_train.memory.cluster import ClusterConfig
from hunyuan_train.memory.config import Recompute
from hunyuan_train.memory.estimate import Layout, MemoryParts, Work, estimate
from hunyuan_train.memory.parameters import parameters
from hunyuan_train.memory.states import FLOAT32_STATES, StateBytes
from hunyuan_train.memory.step_time import TEACHER_PASSES, Prediction, TimeModel
from hunyuan_train.models.hunyuan.config import HunyuanConfig

MODES = (Recompute.none, Recompute.selective, Recompute.full)
"""From the most kept to the least, which is also from the fastest to the slowest."""
CLOSE = 1.02
"""Predicted times within this factor are taken for equal: the simpler way is chosen."""
HOST_SHARE = 0.7
"""Of the host's memory that what is offloaded may take."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Samples of one size."""

    name: str
    img_tokens: int
    txt_tokens: int
    share: float = 1.0
    """Of the samples drawn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """How the samples of one shape are worked on in some layout."""

    shape: Shape
    work: Work
    memory: MemoryParts
    prediction: Prediction


@dataclass(frozen=True, kw_only=True)
class LayoutPlan:
    """A layout and what is best in it for every shape."""

    layout: Layout
    choices: tuple[Choice, ...]

    @cached_property
    def gpu_seconds(self) -> float:
        """GPU time of one sample, on average over the shares."""
        weighted = (c.shape.share * c.prediction.gpu_seconds for c in self.choices)
        return sum(weighted) / sum(c.shape.share for c in self.choices)

    @cached_property
    def mfu(self) -> float:
        """Model FLOPs over GPU time of the mixture, against the peak."""
        time = [c.shape.share * c.prediction.gpu_seconds for c in self.choices]
        used = (t * c.prediction.mfu for t, c in zip(time, self.choices, strict=True))
        return sum(used) / sum(time)

    @cached_property
    def peak_bytes(self) -> float:
        """The most memory a shape takes."""
        return max(choice.memory.total for choice in self.choices)


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What the search may choose from."""

    modes: tuple[Recompute, ...] = MODES
    offload_shares: tuple[float, ...] = (0.0, 1.0)
    max_batch: int = 16
    compute_bytes: int = 2
    reduce_bytes: int = 4
    micro_steps: int = 1
    """Micro-batches of one rank per update."""
    grids: int = 1
    """Different shapes of the run."""
    kernel: str = "auto"
    """Attention kernel."""
    fused: bool = True
    """Whether the fused elementwise kernels run."""
    states: StateBytes = FLOAT32_STATES


class Planner:
    """The search for one model on one cluster.

    Raises:
        ValueError: the cluster has no rates of ``options.kernel``.
    """

    def __init__(self, model: HunyuanConfig, cluster: ClusterConfig, options: Options) -> None:
        self._model, self._cluster, self._options = model, cluster, options
        self._counts = parameters(model)
        self._time = TimeModel(
            model, cluster, options.kernel, options.fused, options.micro_steps,
            teacher_passes=TEACHER_PASSES if options.states.teacher else 0,
        )  # fmt: skip

    @property
    def world(self) -> int:
        """GPUs of the cluster."""
        return self._cluster.world

    @property
    def free_bytes(self) -> float:
        """Memory of one GPU less its reserve."""
        return self._cluster.memory_bytes - self._cluster.reserve_bytes

    def layouts(self, fewest_tokens: int) -> Iterator[Layout]:
        """Yield the layouts of the whole cluster in which no shard of a sequence is empty.

        Tensor parallelism and Ulysses stay inside a node: both wait for their messages.
        """
        cluster, options, heads = self._cluster, self._options, self._model.num_heads
        world = cluster.world
        for tp in _divisors(heads):
            for ulysses in _divisors(heads // tp):
                inner = tp * ulysses
                if inner > cluster.gpus_per_node or world % inner or self._model.mlp_size % tp:
                    continue
                for ring in _divisors(world // inner):
                    for replicate in sorted({1, cluster.nodes}):
                        if world // inner // ring % replicate:
                            continue
                        base = Layout(
                            world=world,
                            tp=tp,
                            cp_ring=ring,
                            cp_ulysses=ulysses,
                            dp_replicate=replicate,
                            compute_bytes=options.compute_bytes,
                            reduce_bytes=options.reduce_bytes,
                            weight_bytes=int(options.states.weight),
                        )
                        yield from self._variants(base, fewest_tokens)

    def _variants(self, base: Layout, fewest_tokens: int) -> Iterator[Layout]:
        for sp in (False, True) if base.tp > 1 else (False,):
            for stage in (3, 2):
                for whole in (True, False) if self._options.micro_steps > 1 else (False,):
                    layout = replace(base, sp=sp, zero_stage=stage, whole_gradients=whole)
                    if layout.sequence_shards <= fewest_tokens:
                        yield layout

    def measure(self, layout: Layout, shape: Shape, work: Work) -> Choice:
        """Return memory and time of one point, whether it fits or not."""
        memory = self._memory(layout, work)
        prediction = self._time.predict(layout, work)
        return Choice(shape=shape, work=work, memory=memory, prediction=prediction)

    def fits(self, memory: MemoryParts) -> bool:
        """Return whether one GPU and its share of the host hold that."""
        host = self._cluster.host_gib * 2**30 * HOST_SHARE / self._cluster.gpus_per_node
        return memory.total <= self.free_bytes and memory.host <= host

    def choose(self, layout: Layout, shape: Shape) -> Choice | None:
        """Return the point of least GPU time per sample that fits, None if none does.

        One that offloads has to be faster by more than the predictions are apart (``CLOSE``).
        """
        best: Choice | None = None
        for share in self._options.offload_shares:
            for mode in self._options.modes:
                if share and mode is Recompute.none and len(self._options.offload_shares) > 1:
                    continue
                work = Work(
                    img_tokens=shape.img_tokens,
                    txt_tokens=shape.txt_tokens,
                    recompute=mode,
                    # Blocks that keep everything move nothing.
                    offload_share=0.0 if mode is Recompute.none else share,
                    grids=self._options.grids,
                )
                batch = self.largest_batch(layout, work)
                for size in sorted({1, batch}) if batch else ():
                    found = self.measure(layout, shape, replace(work, batch=size))
                    if best is None or _faster(found, best):
                        best = found
                if batch == self._options.max_batch:
                    # Less kept or more moved can only be slower.
                    return best
        return best

    def largest_batch(self, layout: Layout, work: Work) -> int:
        """Return the most samples of this kind that fit at once, 0 if not one does."""
        most = self._options.max_batch
        if not self.fits(self._memory(layout, replace(work, batch=1))):
            return 0
        few, many = 1, most + 1
        while many - few > 1:
            middle = (few + many) // 2
            fitting = self.fits(self._memory(layout, replace(work, batch=middle)))
            few, many = (middle, many) if fitting else (few, middle)
        return few

    def plan(self, layout: Layout, shapes: Iterable[Shape]) -> LayoutPlan | None:
        """Return the best of a layout for all shapes, None if one of them does not fit."""
        choices = []
        for shape in shapes:
            choice = self.choose(layout, shape)
            if choice is None:
                return None
            choices.append(choice)
        return LayoutPlan(layout=layout, choices=tuple(choices))

    def rank(self, shapes: Sequence[Shape]) -> list[LayoutPlan]:
        """Return the layouts in which every shape fits, the least GPU time per sample first."""
        # The largest first: where it does not fit, the others need not be looked at.
        order = sorted(range(len(shapes)), key=lambda number: -shapes[number].img_tokens)
        fewest = min(shape.img_tokens for shape in shapes)
        found = []
        for layout in self.layouts(fewest):
            plan = self.plan(layout, (shapes[number] for number in order))
            if plan is not None:
                choices = dict(zip(order, plan.choices, strict=True))
                found.append(replace(plan, choices=tuple(choices[n] for n in range(len(shapes)))))
        return sorted(found, key=_goodness)

    def _memory(self, layout: Layout, work: Work) -> MemoryParts:
        return estimate(self._model, layout, work, self._options.states, self._counts)


def _faster(found: Choice, best: Choice) -> bool:
    """Return whether a later point of the search replaces the best so far."""
    offloads = found.work.offload_share and not best.work.offload_share
    limit = best.prediction.gpu_seconds / (CLOSE if offloads else 1.0)
    return found.prediction.gpu_seconds < limit


def _goodness(plan: LayoutPlan) -> tuple[float, ...]:
    """Order by time; of equals, to a thousandth, the simpler layout, then the smaller memory."""
    layout = plan.layout
    parts = (layout.tp, layout.cp_ring, layout.cp_ulysses, layout.dp_replicate)
    return (round(plan.gpu_seconds, 3), sum(parts), plan.peak_bytes)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]

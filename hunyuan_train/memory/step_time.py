"""How long one micro-batch takes on one GPU, in closed form from the rates of a cluster.

Compute, elementwise work and messages that nothing hides add up; messages that run beside compute
cost what they exceed it by. docs/memory.md lists the formulas, docs/parallelism.md the bytes.
"""

from dataclasses import dataclass, fields

from hunyuan_train.memory.cluster import ClusterConfig
from hunyuan_train.memory.config import Recompute
from hunyuan_train.memory.estimate import Layout, Work, kept_bytes
from hunyuan_train.memory.parameters import Count, Parameters, parameters
from hunyuan_train.models.hunyuan.config import HunyuanConfig
from hunyuan_train.observability.flops import ForwardFlops, dit_forward_flops

ELEMENTWISE_DOUBLE, ELEMENTWISE_SINGLE = 48, 47
"""Values read and written per row and h in a block's forward, one kernel after the other: norms 4
or 2, norms of q and k 4, rotation in float32 20, copies 6 or 10, GELU 8, gates 6 or 3."""
FUSED_DOUBLE, FUSED_SINGLE = 28, 17
"""The same with the kernels of ``hunyuan_kernels``: norms 4 or 2, q and k 4, copies 6 or 0, GELU 8,
gates 6 or 3."""
TEACHER_PASSES = 2
"""Forwards of the teacher of a distillation: with the caption and without."""
_OPTIMIZER_BYTES = 36
"""Read and written per parameter: weight, gradient, two moments, average, all but one twice."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of one micro-batch on one GPU, and its share of the update."""

    linear: float
    attention: float
    elementwise: float
    tensor_parallel: float
    ulysses: float
    ring: float
    """Transfers and merges that the attention does not hide."""
    zero: float
    """Gathers and reductions that the compute does not hide."""
    offload: float
    optimizer: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What one micro-batch costs."""

    seconds: float
    parts: StepTime
    gpu_seconds: float
    """GPU time of one sample."""
    mfu: float
    """Model FLOPs, forward and backward, over the time, against the peak."""
    hfu: float
    """The same of all FLOPs that are computed, repeated ones included."""


@dataclass(frozen=True, slots=True)
class _Links:
    """Bandwidths between the ranks of each axis, bytes per second."""

    tp: float
    ulysses: float
    ring: float
    zero: float
    replicate: float

    @classmethod
    def of(cls, layout: Layout, cluster: ClusterConfig) -> "_Links":
        inside, across = cluster.nvlink_gbs * 1e9, cluster.network_gbs * 1e9

        def link(ranks: int) -> float:
            # Neighbouring ranks share a node; an axis crosses it when its span is longer.
            return inside if ranks <= cluster.gpus_per_node else across

        tp, ulysses = layout.tp, layout.tp * layout.cp_ulysses
        ring, zero = ulysses * layout.cp_ring, layout.tp * layout.zero_ranks
        return cls(link(tp), link(ulysses), link(ring), link(zero), link(layout.world))


class TimeModel:
    """Predictions for one model on one cluster.

    Args:
        model: The transformer.
        cluster: Rates of its GPUs and links.
        kernel: Attention kernel, a key of ``cluster.attention_tflops`` or "auto".
        fused: Whether the fused elementwise kernels run.
        micro_steps: Micro-batches of one rank per update, which share its reductions and optimizer.
        teacher_passes: Forwards of a frozen model of the same size for each micro-batch.

    Raises:
        ValueError: the cluster has no rates of the kernel.
    """

    def __init__(
        self,
        model: HunyuanConfig,
        cluster: ClusterConfig,
        kernel: str = "auto",
        fused: bool = True,
        micro_steps: int = 1,
        teacher_passes: int = 0,
    ) -> None:
        self._model, self._cluster, self._micro_steps = model, cluster, micro_steps
        self._teacher = teacher_passes
        self._forward_rate, self._backward_rate = cluster.attention_rates(kernel)
        self._gemm_rate = cluster.peak_tflops * 1e12 * cluster.gemm_efficiency
        self._hbm = cluster.hbm_gbs * 1e9 * cluster.hbm_efficiency
        double, single = (
            (FUSED_DOUBLE, FUSED_SINGLE) if fused else (ELEMENTWISE_DOUBLE, ELEMENTWISE_SINGLE)
        )
        self._elementwise = model.num_double_blocks * double + model.num_single_blocks * single
        self._counts = parameters(model)

    def predict(self, layout: Layout, work: Work) -> Prediction:
        """Return time and utilisation of one micro-batch."""
        flops, links = forward_flops(self._model, work), _Links.of(layout, self._cluster)
        again = work.recompute is not Recompute.none
        full = work.recompute is Recompute.full
        ranks, rows = layout.ranks_per_batch, self._rows(layout, work)
        passes = 3 + again
        linear = flops.linear / ranks / self._gemm_rate
        attention = flops.attention / ranks
        attention_forward = attention / self._forward_rate
        attention_backward = 2.5 * attention / self._backward_rate
        attention_s = attention_forward * (1 + full) + attention_backward
        elementwise = rows * self._elementwise * self._model.hidden_size * layout.compute_bytes
        elementwise /= self._hbm * (layout.tp if layout.sp else 1)
        ring_forward, ring_backward = self._ring(
            layout, rows, links, (attention_forward, attention_backward)
        )
        tensor_forward, tensor_backward = self._tensor_parallel(layout, rows, links)
        forward = linear + attention_forward + elementwise
        backward = (passes - 1) * (linear + elementwise) + attention_s - attention_forward
        passes += self._teacher
        parts = StepTime(
            linear=passes * linear,
            attention=attention_s + self._teacher * attention_forward,
            elementwise=passes * elementwise,
            tensor_parallel=tensor_forward * (1 + again + self._teacher) + tensor_backward,
            ulysses=self._ulysses(layout, work.recompute, rows, links),
            ring=ring_forward * (1 + full + self._teacher) + ring_backward,
            zero=self._zero(layout, links, forward, backward),
            offload=self._offload(layout, work, forward, backward),
            optimizer=self._optimizer(layout) / self._micro_steps,
        )
        seconds = parts.total
        peak = (self._cluster.measured_peak_tflops or self._cluster.peak_tflops) * 1e12
        computed = flops.computed(linear_again=again, attention_again=full)
        taught = self._teacher * flops.total
        return Prediction(
            seconds=seconds,
            parts=parts,
            gpu_seconds=seconds * ranks / work.batch,
            mfu=(flops.training + taught) / ranks / seconds / peak,
            hfu=(computed + taught) / ranks / seconds / peak,
        )

    def _rows(self, layout: Layout, work: Work) -> float:
        return work.batch * layout.rows(work.img_tokens, work.txt_tokens)

    def _tensor_parallel(self, layout: Layout, rows: float, links: _Links) -> tuple[float, float]:
        """Return forward and backward; nothing hides them.

        Messages of ``rows`` x h: with sp 4 of 10 in a double block's forward and 2 of 5 in a
        single one's; without, an all-reduce counts two, 4 of 8 and 2 of 4.
        """
        if layout.tp == 1:
            return 0.0, 0.0
        model = self._model
        blocks = 2 * model.num_double_blocks + model.num_single_blocks
        message = rows * model.hidden_size * layout.compute_bytes * (1 - 1 / layout.tp)
        forward = 2 * blocks * message / links.tp
        return forward, forward * (1.5 if layout.sp else 1.0)

    def _ulysses(self, layout: Layout, recompute: Recompute, rows: float, links: _Links) -> float:
        """q, k, v and the output change hands in the forward, their gradients in the backward.

        Selective recompute sends q, k and v again, full recompute all four.
        """
        if layout.cp_ulysses == 1:
            return 0.0
        model = self._model
        tensors = (
            8 + 4 * self._teacher + {Recompute.selective: 3, Recompute.full: 4}.get(recompute, 0)
        )
        message = rows * model.hidden_size / layout.tp * layout.compute_bytes
        message *= 1 - 1 / layout.cp_ulysses
        blocks = model.num_double_blocks + model.num_single_blocks
        return blocks * tensors * message / links.ulysses

    def _ring(
        self, layout: Layout, rows: float, links: _Links, attention: tuple[float, float]
    ) -> tuple[float, float]:
        """Return what hops cost beyond the attention of a hop, and the merging, both passes.

        Keys and values of a chunk travel while the chunk before is attended to; in the backward
        float32 gradients follow. Merging reads and writes the float32 output, 10 bytes a value;
        adding up gradients 30.
        """
        size = layout.cp_ring
        if size == 1:
            return 0.0, 0.0
        model = self._model
        blocks = model.num_double_blocks + model.num_single_blocks
        values = rows * model.hidden_size / layout.tp  # Ulysses: U times the rows, 1/U the heads
        keys, gradients = 2 * layout.compute_bytes * values, 8 * values
        exposed = []
        for sent, compute, merged in (
            (keys, attention[0], 10 * values),
            (keys + gradients, attention[1], 30 * values),
        ):
            hop = max(0.0, sent / links.ring - compute / blocks / size)
            exposed.append(blocks * (size - 1) * (hop + merged / self._hbm))
        return exposed[0], exposed[1]

    def _zero(self, layout: Layout, links: _Links, forward: float, backward: float) -> float:
        """Return what gathers and reductions cost beyond the compute beside them.

        The first gather and the last reduction have nothing beside them.
        """
        sharded, replicas = layout.zero_ranks, layout.dp_replicate
        if layout.zero_stage == 0 or sharded * replicas == 1:
            return 0.0
        counts: Parameters = self._counts
        mine, part = counts.total.on(layout.tp), 1 - 1 / sharded
        gather = mine * layout.compute_bytes * part / links.zero
        reduce = mine * layout.reduce_bytes * part / links.zero
        reduce += mine / sharded * layout.reduce_bytes * 2 * (1 - 1 / replicas) / links.replicate
        if layout.whole_gradients:
            reduce /= self._micro_steps
        again = gather if layout.zero_stage == 3 else 0.0
        taught = self._teacher * max(0.0, again - forward)
        largest: Count = max(counts.double, counts.single, key=lambda count: count.on(layout.tp))
        ends = (gather + reduce) * largest.on(layout.tp) / mine
        return max(0.0, gather - forward) + max(0.0, again + reduce - backward) + ends + taught

    def _offload(self, layout: Layout, work: Work, forward: float, backward: float) -> float:
        """Return what copies to the host and back cost beyond the passes beside them."""
        copied = kept_bytes(self._model, layout, work) * work.offload_share
        copy_s = copied / (self._cluster.host_gbs * 1e9)
        return max(0.0, copy_s - forward) + max(0.0, copy_s - backward)

    def _optimizer(self, layout: Layout) -> float:
        shards = layout.zero_ranks if layout.zero_stage else 1
        return self._counts.total.on(layout.tp) / shards * _OPTIMIZER_BYTES / self._hbm


def forward_flops(model: HunyuanConfig, work: Work) -> ForwardFlops:
    """Return the FLOPs of the forward of a micro-batch, over all ranks that share it."""
    return dit_forward_flops(
        batch=work.batch,
        img_tokens=work.img_tokens,
        txt_tokens=work.txt_tokens,
        hidden_size=model.hidden_size,
        double_blocks=model.num_double_blocks,
        single_blocks=model.num_single_blocks,
        mlp_ratio=model.mlp_ratio,
        patch_in=model.in_channels * model.patch_volume,
        patch_out=model.out_channels * model.patch_volume,
        text_dim=model.text_dim,
        pooled_dim=model.pooled_dim,
        refiner_depth=model.refiner_depth,
        guidance_embed=model.guidance_embed,
    )

"""Proof that a layout computes what one process computes, on the user's ranks and config.

The layout trains a thin slice of the model for an update or more; rank 0 trains the same slice
alone, on the batches of all ranks, without any parallel code. Every rank then compares its own
parts of every gradient and weight with the whole ones, so a copy that differs on one rank is found.
"""

import logging
import re
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hunyuan_train.config.root import RunConfig
from hunyuan_train.config.run import CertifyWidth, Trains
from hunyuan_train.data.buckets import Bucket
from hunyuan_train.engine.certified import is_certified, remember
from hunyuan_train.engine.trial import MicroBatch, TrialResult, reference_config, run_trial
from hunyuan_train.memory.config import MemoryConfig
from hunyuan_train.optim.updates import Updates
from hunyuan_train.parallel.mesh import Axes, build_axes
from hunyuan_train.parallel.view import parts_beside
from hunyuan_train.runtime.dist import World, broadcast_from_first, gather_objects

log = logging.getLogger(__name__)

SMALL_HEAD = 8
"""Channels per head of a small slice."""

_EXACT_STATES = {
    name: getattr(MemoryConfig(), name)
    for name in ("weights", "optimizer_states", "optimizer_device", "fused_backward", "ema")
}


@dataclass(frozen=True, slots=True)
class Certificate:
    """Largest relative errors of one comparison, by what was compared."""

    layout: str
    dtype: str
    tolerance: float
    errors: dict[str, float]
    """``loss``, ``grad_norm``, ``output``, and ``gradient GROUP`` and ``weight GROUP`` of every
    group of parameters."""
    seconds: float

    @property
    def holds(self) -> bool:
        """Whether every error is a number within the tolerance."""
        return not self.failures()

    def failures(self) -> dict[str, float]:
        """Return the errors over the tolerance, largest first; what is not a number counts."""
        over = {name: e for name, e in self.errors.items() if not e <= self.tolerance}
        return dict(sorted(over.items(), key=lambda item: -item[1]))

    def table(self) -> str:
        """Return the certificate as text."""
        width = max(map(len, self.errors))
        rows = [
            f"  {name:<{width}}  {error:9.2e}{'' if error <= self.tolerance else '  <-- FAILS'}"
            for name, error in self.errors.items()
        ]
        verdict = "holds" if self.holds else f"FAILS in {len(self.failures())} places"
        title = f"{self.layout} in {self.dtype} against one process in float32"
        summary = f"certificate {verdict}: largest error {max(self.errors.values()):.2e}"
        return "\n".join(
            [title, *rows, f"{summary}, tolerance {self.tolerance:g}, {self.seconds:.1f} s"]
        )


def certify(cfg: RunConfig, world: World) -> list[Certificate]:
    """Prove the layout of ``cfg`` in float32, and again in bfloat16 if it computes in that.

    The slice has ``certify.blocks`` double and single blocks; every rank calls it.

    Raises:
        ValueError: the layout is impossible.
    """
    dtypes = ["float32"]
    if cfg.parallel.compute_dtype != "float32":
        dtypes.append(cfg.parallel.compute_dtype)
    cfg = thin_slice(cfg)
    shapes = trial_shapes(cfg, world.size)
    alone = train_alone(cfg, world, shapes)
    return [
        compare(
            replace(cfg, parallel=replace(cfg.parallel, compute_dtype=dtype)), world, shapes, alone
        )
        for dtype in dtypes
    ]


def certify_start(cfg: RunConfig, world: World) -> None:
    """Prove the layout of a run on several ranks with a small model, in a few seconds.

    A restart leaves out what an earlier attempt of the run has proved. The slice is of the
    diffusion model, so a stage that trains the VAE has no such proof.

    Raises:
        ValueError: the layout computes something else; names the groups of parameters.
    """
    if world.size == 1 or not cfg.certify.at_start or cfg.stage.trains is Trains.vae:
        return
    if is_certified(cfg, world):
        log.info("certified by an earlier attempt: %s", describe_layout(cfg, world.size))
        return
    small = replace(cfg, certify=replace(cfg.certify, width=CertifyWidth.small, blocks=1, steps=1))
    for certificate in certify(small, world):
        if not certificate.holds:
            worst = ", ".join(f"{n} ({e:.1e})" for n, e in certificate.failures().items())
            raise ValueError(
                f"{certificate.layout} does not compute what one process computes: {worst}; "
                f"tolerance {certificate.tolerance:g}. Do not train with it; run "
                "`hunyuan-train certify` for the whole table (certify.at_start=false skips this)"
            )
        log.info(
            "certified: %s in %s within %.1e of one process (%.1f s)",
            certificate.layout,
            certificate.dtype,
            max(certificate.errors.values()),
            certificate.seconds,
        )
    remember(cfg, world)


def thin_slice(cfg: RunConfig) -> RunConfig:
    """Return ``cfg`` with few blocks, and with narrow heads if ``certify.width`` is small."""
    model, blocks = cfg.model, cfg.certify.blocks
    sizes: dict[str, object] = {
        "num_double_blocks": min(blocks, model.num_double_blocks),
        "num_single_blocks": min(blocks, model.num_single_blocks),
    }
    if cfg.certify.width is CertifyWidth.small:
        sizes |= {
            "hidden_size": SMALL_HEAD * model.num_heads,
            "rope_axes": [2, 2, 4],
            "text_dim": 24,
            "pooled_dim": 16,
            "refiner_depth": min(1, model.refiner_depth),
        }
    optimizer = replace(cfg.optimizer, warmup_steps=0)
    return replace(cfg, model=replace(model, **sizes), optimizer=optimizer)


def trial_shapes(cfg: RunConfig, world_size: int) -> list[MicroBatch]:
    """Return videos with ragged text and images, of lengths that no shard count divides."""
    parallel = cfg.parallel
    dp = world_size // (parallel.cp * parallel.tp)
    frames = 9 + 4 * (2 * parallel.sequence_shards // 35)
    video = MicroBatch(Bucket(frames, 80, 112), (13, 4, 7))
    image = MicroBatch(Bucket(1, 80, 112), (9,))
    return [video if number % 2 == 0 else image for number in range(2 * max(dp, 1))]


def train_alone(cfg: RunConfig, world: World, shapes: list[MicroBatch]) -> TrialResult | None:
    """Return what rank 0 computes alone on the batches of all ranks, None on other ranks."""
    if world.rank:
        return None
    return run_trial(reference_config(cfg), Axes.alone(), world, shapes, cfg.certify.steps)


def compare(
    cfg: RunConfig, world: World, shapes: list[MicroBatch], alone: TrialResult | None
) -> Certificate:
    """Train the layout of ``cfg`` and compare everything with what one process computed.

    Args:
        cfg: the model to compare and its layout.
        world: all ranks.
        shapes: the micro-batches of one global step.
        alone: of ``train_alone``, with the same model and batches.
    """
    started = time.perf_counter()
    axes = build_axes(cfg.parallel, world.device.type, world.size)
    micro = len(shapes) // axes.size("dp")
    laid_out = replace(
        cfg,
        stage=replace(cfg.stage, micro_steps=micro),
        # Rounded weights and moments would blur what the layout does.
        memory=replace(cfg.memory, **_EXACT_STATES),
    )
    ours = run_trial(laid_out, axes, world, shapes, cfg.certify.steps)
    errors = _errors(ours, alone, axes)
    merged = {
        name: max(_not_a_number_last(part[name]) for part in gather_objects(errors))
        for name in errors
    }
    bf16 = cfg.parallel.compute_dtype == "bfloat16"
    return Certificate(
        layout=describe_layout(cfg, world.size),
        dtype=cfg.parallel.compute_dtype,
        tolerance=cfg.certify.tolerance_bf16 if bf16 else cfg.certify.tolerance,
        errors=merged,
        seconds=time.perf_counter() - started,
    )


def describe_layout(cfg: RunConfig, world_size: int) -> str:
    """Return a layout as one line, e.g. ``tp=2 sp cp_ring=2 dp_shard=2 zero=3``."""
    p = cfg.parallel
    sizes = {"dp_replicate": p.dp_replicate, "cp_ring": p.cp_ring, "cp_ulysses": p.cp_ulysses}
    parts = [f"tp={p.tp}"] if p.tp > 1 else []
    parts += ["sp"] if p.sp else []
    parts += [f"{name}={size}" for name, size in sizes.items() if size > 1]
    shard = world_size // (p.dp_replicate * p.cp * p.tp)
    parts += [f"dp_shard={shard}"] if shard > 1 else []
    parts += [f"zero={p.zero_stage}"]
    parts += [p.zero_engine.value] if p.zero_engine.value != "torch" else []
    parts += [p.tensor_engine.value] if p.tensor_engine.value != "native" else []
    return " ".join(parts)


def parameter_group(name: str) -> str:
    """Return a parameter's group: its name without block number and tensor."""
    return re.sub(r"\.\d+\.", ".*.", name.rpartition(".")[0], count=1)


def _errors(ours: TrialResult, alone: TrialResult | None, axes: Axes) -> dict[str, float]:
    """Return this rank's largest relative errors; ``alone`` is there on rank 0 only."""
    device = ours.output.device
    scalars = torch.tensor([ours.losses, ours.norms], dtype=torch.float64, device=device)
    truth = torch.zeros_like(scalars)
    if alone is not None:
        truth = torch.tensor([alone.losses, alone.norms], dtype=torch.float64, device=device)
    broadcast_from_first(truth)
    errors = {
        "loss": float(((scalars[0] - truth[0]).abs() / truth[0].abs()).max()),
        "grad_norm": float(((scalars[1] - truth[1]).abs() / truth[1].abs()).max()),
    }
    # Only the ranks of the first batch have this output, and only rank 0 knows its shape.
    (shape,) = {s for s in gather_objects(alone and tuple(alone.output.shape)) if s}
    truth = torch.empty(shape, device=device) if alone is None else alone.output.float()
    broadcast_from_first(truth)
    first = axes.rank("dp") == 0
    errors["output"] = relative_error([(ours.output.float(), truth)]) if first else 0.0
    for kind, mine, theirs in (
        ("gradient", ours.gradients, alone.gradients if alone else None),
        ("weight", ours.updates.local_weights(), alone.updates.local_weights() if alone else None),
    ):
        for name in mine:
            error = _tensor_error(ours.updates, name, mine[name], theirs[name] if theirs else None)
            group = f"{kind} {parameter_group(name)}"
            errors[group] = max(errors.get(group, 0.0), _not_a_number_last(error))
    return errors


def _tensor_error(updates: Updates, name: str, part: Tensor, truth: Tensor | None) -> float:
    """Compare this rank's part of a tensor with the whole one of rank 0."""
    view = updates.view(name, part)
    dtype = torch.promote_types(view.dtype, torch.float32)
    if truth is None:
        truth = torch.empty(view.shape, dtype=dtype, device=view.device)
    truth = broadcast_from_first(truth.detach().to(dtype).contiguous())
    return relative_error(parts_beside(view, truth), scale=truth)


def relative_error(pairs: list[tuple[Tensor, Tensor]], scale: Tensor | None = None) -> float:
    """Return the largest |a - b| of some pairs over the largest |b|, or over that of ``scale``."""
    if not pairs:
        return 0.0
    largest = torch.stack([b.abs().max() for _, b in pairs]).max()
    if scale is not None:
        largest = scale.abs().max()
    differences = [(a.to(b.dtype) - b).abs().max() for a, b in pairs]
    return float(torch.stack(differences).max() / largest.clamp(min=1e-30))


def _not_a_number_last(error: float) -> float:
    """Return infinity for NaN, which ``max`` would lose."""
    return error if error == error else float("inf")

"""What a run decides for the devices it finds itself on, before its first step."""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from hunyuan_kernels import dispatch
from hunyuan_train.config.root import RunConfig
from hunyuan_train.data.buckets import Bucket
from hunyuan_train.engine.data import largest_batch
from hunyuan_train.engine.planning_run import check_fits
from hunyuan_train.memory.config import AttentionKernel
from hunyuan_train.memory.recompute import BucketMode
from hunyuan_train.parallel.attention_choice import (
    AttentionChoice,
    AttentionInputs,
    choose_attention,
    use_attention,
)
from hunyuan_train.runtime.device import Machine
from hunyuan_train.runtime.dist import World, gather_objects
from hunyuan_train.runtime.env import read_launch_env

ATTENTION_NAME = "attention.json"
"""File in the run's folder with the attention kernels it found to be the fastest."""

log = logging.getLogger(__name__)


def fit_memory(
    cfg: RunConfig, world: World, buckets: Sequence[Bucket], tokens: int
) -> dict[Bucket, BucketMode]:
    """Return how each bucket's activations are kept on these devices; all ranks call it.

    Args:
        cfg: Config of the run.
        world: Its ranks; what the one with the least memory can do is what all do.
        buckets: All buckets of the run.
        tokens: Image tokens that fit into one micro-batch.

    Raises:
        ValueError: a bucket does not fit, with the nearest settings that do; not with
            ``memory.check_fit=false``.
    """
    here = Machine.here(world.device, read_launch_env().local_world_size)
    least = min(gather_objects(here), key=lambda machine: machine.memory_bytes)
    largest = {bucket: largest_batch(bucket, tokens, cfg.data) for bucket in buckets}
    modes = check_fits(cfg, world.size, least, largest)
    counts = Counter(
        f"{mode.recompute.value}{' and offload' if mode.offload else ''}" for mode in modes.values()
    )
    parts = ", ".join(f"{number} {name}" for name, number in counts.items())
    log.info("recompute of %d buckets: %s", len(modes), parts)
    return modes


def fit_kernels(cfg: RunConfig, world: World, buckets: Sequence[Bucket]) -> None:
    """Fix the kernels of this process as ``memory`` says; all ranks call it.

    What was measured is kept in the run's folder: a restart that measured again might find another
    attention kernel to be the fastest, and its bits would differ.

    Raises:
        ValueError: the attention kernel that was asked for cannot run here.
    """
    dispatch.set_mode(cfg.memory.kernels.value)
    model, layout = cfg.model, cfg.parallel
    longest = max(bucket.tokens for bucket in buckets) + cfg.text.length
    inputs = AttentionInputs(
        device=world.device,
        dtype=getattr(torch, layout.compute_dtype),
        heads=model.num_heads // (layout.tp * layout.cp_ulysses),
        head_dim=model.head_dim,
        tokens=-(-longest // layout.cp_ring),
    )
    path, key = Path(cfg.run.dir) / ATTENTION_NAME, _key(inputs, world)
    wanted = cfg.memory.attention
    known = _known(path, key) if wanted is AttentionKernel.auto and world.rank == 0 else None
    choice = gather_objects(known)[0]
    if choice is None:
        choice = choose_attention(wanted, inputs)
    use_attention(choice)
    if world.rank == 0:
        kernels = {"padded" if masked else "whole": k for masked, k in choice.kernels.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"of": key, "kernels": kernels}, indent=1) + "\n")


def _key(inputs: AttentionInputs, world: World) -> dict[str, str]:
    """Return what a measurement is true of."""
    on_gpu = inputs.device.type == "cuda"
    name = torch.cuda.get_device_name(inputs.device) if on_gpu else "cpu"
    of = {**asdict(inputs), "device": name, "ranks": world.size, "torch": torch.__version__}
    return {field: str(value) for field, value in of.items()}


def _known(path: Path, key: dict[str, str]) -> AttentionChoice | None:
    """Return what was measured before under the same conditions."""
    try:
        saved = json.loads(path.read_bytes())
        if saved["of"] != key:
            return None
        kernels = {False: saved["kernels"]["whole"], True: saved["kernels"]["padded"]}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s cannot be used, so attention is measured again: %s", path, error)
        return None
    return AttentionChoice(kernels)

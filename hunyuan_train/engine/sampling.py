"""From a run folder and prompts to mp4 files and a contact sheet, under any layout."""

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from hunyuan_train.checkpoint.load import find_checkpoint, restore_into
from hunyuan_train.config.compose import CONFIG_NAME
from hunyuan_train.config.root import RunConfig
from hunyuan_train.data.buckets import Bucket, check_vae
from hunyuan_train.encoders.text import build_text_encoder
from hunyuan_train.engine.build import lay_out
from hunyuan_train.engine.ledger import Ledger, Status
from hunyuan_train.evaluation.config import SampleWeights
from hunyuan_train.evaluation.given import check_pictures
from hunyuan_train.evaluation.prompts import read_prompts
from hunyuan_train.evaluation.sample import sample_videos
from hunyuan_train.evaluation.video import (
    SHEET_COLUMNS,
    even_frames,
    write_contact_sheet,
    write_sample,
)
from hunyuan_train.memory.vae import choose_tile_batch
from hunyuan_train.models.lora import saved_parameters
from hunyuan_train.models.vae.base import Vae
from hunyuan_train.models.vae.state_dict import load_vae
from hunyuan_train.parallel.apply import ParallelModel, check_sequence
from hunyuan_train.parallel.config import Offload, ReduceEvery, ZeroEngine
from hunyuan_train.parallel.init import init_parameters
from hunyuan_train.parallel.mesh import build_axes
from hunyuan_train.parallel.tile_spread import tile_spread
from hunyuan_train.runtime.dist import World, gather_objects

log = logging.getLogger(__name__)

_FREE_SHARE = 0.8
"""Of the GPU's free memory; the rest is for the video itself."""

PROMPTS_NAME = "prompts.json"
"""File beside the samples that lists their prompts, in order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedRun:
    """Where the newest weights of a run are."""

    config: Path
    checkpoint: Path


def newest_weights(folder: Path) -> FinishedRun:
    """Find config and newest checkpoint of a run; of a curriculum, those of its newest stage.

    Raises:
        ValueError: if the folder is not a run's, or the run has not saved a checkpoint yet.
    """
    stages = sorted((folder / "stages").glob(f"*/{CONFIG_NAME}"), reverse=True)
    if not stages and not (folder / CONFIG_NAME).is_file():
        raise ValueError(f"{folder} is not the folder of a run: it has no {CONFIG_NAME} or stages")
    for config in stages or [folder / CONFIG_NAME]:
        if any((config.parent / "checkpoints").glob("step-*")):
            return FinishedRun(config=config, checkpoint=find_checkpoint(config.parent))
    stages = Ledger.read(folder).stages.items()
    done = ", ".join(name for name, record in stages if record.state is Status.done) or "none"
    raise ValueError(f"{folder} holds no checkpoint yet (finished stages: {done}); train it first")


def load_model(cfg: RunConfig, checkpoint: Path, world: World) -> ParallelModel:
    """Build the model with the weights ``sample.weights`` names, for inference.

    Tensor and context parallelism are those of the run; the ranks they leave share the samples,
    each group with all weights, because ZeRO would make groups wait for each other at every layer.

    Raises:
        ValueError: the layout does not fit the number of processes.
    """
    layout = replace(
        cfg.parallel,
        zero_engine=ZeroEngine.torch,
        offload_optimizer=Offload.none,
        reduce_every=ReduceEvery.auto,
        zero_stage=0,
        dp_replicate=1,
        compute_dtype="float32",
    )
    axes = build_axes(layout, world.device.type, world.size)
    check_sequence({str(cfg.sample.bucket): cfg.sample.bucket.tokens}, layout)
    # Weights are loaded in float32 and narrowed on the way to the device.
    cpu = torch.device("cpu")
    model, rules = lay_out(replace(cfg, parallel=layout), axes, cpu)
    named = saved_parameters(model.module)
    weights = {name: model.view(name, param.detach()) for name, param in named.items()}
    if cfg.sample.weights is SampleWeights.initial:
        init_parameters(weights, rules, cfg.run.seed)
    else:
        sections = {"model": cfg.sample.weights.value}
        restore_into(checkpoint, {"model": weights}, sections=sections)
    model.module.to(world.device, getattr(torch, cfg.parallel.compute_dtype)).eval()
    return model


def sample_run(cfg: RunConfig, checkpoint: Path, world: World) -> Path:
    """Sample every prompt, each rank its share, and return the folder with the files.

    The folder holds ``000-0.mp4`` (prompt number, repeat), ``.png`` for single frames,
    ``prompts.json`` and ``contact_sheet.png``.

    Raises:
        ValueError: for missing prompts, VAE, text encoder or weights.
    """
    if not cfg.run.vae:
        raise ValueError("run.vae is empty; give it the folder of the VAE that made the latents")
    prompts = read_prompts(cfg.sample)
    check_pictures(prompts, cfg.model.image_condition)
    vae = load_vae(cfg.run.vae, world.device)
    check_vae(vae.cfg)
    text_encoder = build_text_encoder(cfg.text, world.device)
    model = load_model(cfg, checkpoint, world)
    use_free_memory(vae, cfg.sample.bucket, world)
    axes = model.axes
    folder = Path(cfg.sample.output or Path(cfg.run.dir) / "samples")
    count = len(prompts) * cfg.sample.num_per_prompt
    videos = sample_videos(
        model.module,
        vae,
        text_encoder,
        prompts,
        cfg.sample,
        progress=_log_progress if world.rank == 0 else None,
        items=range(axes.rank("dp"), count, axes.size("dp")),
        decode_share=(axes.rank("model"), axes.size("model")),
        spread=tile_spread(axes, world.device),
    )
    mine: list[tuple[int, int, str, Tensor]] = []
    for video in videos:
        write_sample(folder, video, cfg.sample)
        preview = even_frames(video.pixels, SHEET_COLUMNS).clone()
        mine.append((video.prompt_index, video.repeat, video.prompt, preview))
    rows = sorted((row for part in gather_objects(mine) for row in part), key=lambda r: r[:2])
    if world.rank == 0:
        (folder / PROMPTS_NAME).write_text(json.dumps([p.prompt for p in prompts], indent=2))
        sheet = folder / "contact_sheet.png"
        write_contact_sheet(sheet, [row[3] for row in rows], [row[2] for row in rows])
        log.info("wrote %d samples of %s to %s", count, checkpoint, folder)
    return folder


def use_free_memory(vae: Vae, bucket: Bucket, world: World) -> None:
    """Let as many tiles be decoded together as the GPUs have room for, on all ranks alike.

    A tile that seems too large is tried alone, after a warning: the estimate has a margin.
    """
    if world.device.type != "cuda":
        return
    free = int(_FREE_SHARE * torch.cuda.mem_get_info(world.device)[0])
    video, dtype = (bucket.frames, bucket.height, bucket.width), next(vae.parameters()).dtype
    batch = 1
    try:
        batch = choose_tile_batch(vae.cfg, video, free, decode=True, dtype=dtype)
    except ValueError as error:
        log.warning("%s", error)
    # Ranks that share the tiles of a video must cut the work alike.
    vae.work = replace(vae.work, batch=min(gather_objects(batch)))


def _log_progress(done: int, total: int) -> None:
    if done == total or done % max(1, total // 10) == 0:
        log.info("sampling: %d of %d model steps", done, total)

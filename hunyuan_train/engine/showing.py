"""Samples of the model under training, on its own layout, for the same prompts every time."""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hunyuan_train.config.root import RunConfig
from hunyuan_train.data.buckets import check_vae
from hunyuan_train.encoders.features import Images, TextFeatures, concatenate
from hunyuan_train.encoders.text import TextEncoder, build_text_encoder
from hunyuan_train.engine.build import TrainRun
from hunyuan_train.engine.held_out import averaged
from hunyuan_train.engine.meter import StepMeter
from hunyuan_train.engine.sampling import PROMPTS_NAME
from hunyuan_train.engine.state import TrainState
from hunyuan_train.evaluation.config import SampleConfig, SampleWeights
from hunyuan_train.evaluation.given import check_pictures
from hunyuan_train.evaluation.prompts import captions_of, encode_captions, read_prompts
from hunyuan_train.evaluation.sample import SampledVideo, sample_videos
from hunyuan_train.evaluation.video import (
    SHEET_CELL_PX,
    SHEET_COLUMNS,
    even_frames,
    still_images,
    write_contact_sheet,
    write_sample,
)
from hunyuan_train.memory.config import Recompute
from hunyuan_train.memory.recompute import set_recompute
from hunyuan_train.models.vae.state_dict import load_vae
from hunyuan_train.observability.trackers import Media
from hunyuan_train.parallel.apply import check_sequence
from hunyuan_train.parallel.tile_spread import tile_spread
from hunyuan_train.runtime.dist import World, gather_objects

log = logging.getLogger(__name__)

SHEET_NAME = "contact_sheet.png"
_OTHERS_S = 60.0
"""How long the first rank's thread waits for the files of the others before it goes on without."""


def sample_folder(run: Path, step: int) -> Path:
    """Return where the samples of a step are."""
    return run / "samples" / f"step-{step:08d}"


class LiveModel(nn.Module):
    """The model under training as the sampler takes it: inputs in the precision it computes in."""

    def __init__(self, state: TrainState, cfg: RunConfig) -> None:
        super().__init__()
        self.module = state.updates.module
        self.cfg = cfg.model
        self._dtype = getattr(torch, cfg.parallel.compute_dtype)

    def forward(
        self, latents: Tensor, time: Tensor, text: Tensor, mask: Tensor, pooled: Tensor, *more: Any
    ) -> Tensor:
        """Predict the velocity; time and guidance stay in float32."""
        narrow = (latents.to(self._dtype), time, text.to(self._dtype), mask, pooled.to(self._dtype))
        return self.module(*narrow, *more)


class KnownTexts:
    """A text encoder that has encoded all it will be asked for, and is gone."""

    def __init__(self, known: dict[Any, TextFeatures], widths: tuple[int, int, int], sees: bool):
        self._known = known
        self.text_length, self.text_dim, self.pooled_dim = widths
        self.sees_images = sees
        self.fingerprint = ""

    def encode(self, captions: list[str], media: str, images: Images | None = None) -> TextFeatures:
        """Return the features of captions that are known, on the CPU."""
        pictures = images or [None] * len(captions)
        keys = [_key(*pair, media) for pair in zip(captions, pictures, strict=True)]
        return concatenate([self._known[key] for key in keys])


class _Remembering:
    """A text encoder that remembers what it has encoded."""

    def __init__(self, encoder: TextEncoder) -> None:
        self.known: dict[Any, TextFeatures] = {}
        self._encoder = encoder
        self.sees_images, self.fingerprint = encoder.sees_images, encoder.fingerprint
        self.text_length = encoder.text_length
        self.text_dim, self.pooled_dim = encoder.text_dim, encoder.pooled_dim

    def encode(self, captions: list[str], media: str, images: Images | None = None) -> TextFeatures:
        """Encode one caption."""
        ((caption, image),) = zip(captions, images or [None], strict=True)
        more = [images] if self.sees_images else []
        features = self._encoder.encode(captions, media, *more).to("cpu")
        self.known[_key(caption, image, media)] = features
        return features


def _key(caption: str, image: np.ndarray | None, media: str) -> tuple[str, str, bytes]:
    digest = b"" if image is None else hashlib.sha256(image.tobytes()).digest()
    return caption, media, digest


def know_texts(cfg: RunConfig, captions: Sequence[tuple[str, str]], world: World) -> KnownTexts:
    """Encode captions with their pictures on the first rank, for all, and let go of the encoder.

    It is larger than what is free beside a model in training.
    """
    known = None
    if world.rank == 0:
        encoder = _Remembering(build_text_encoder(cfg.text, world.device))
        with torch.no_grad():
            encode_captions(encoder, captions, cfg.sample.bucket)
        known = encoder.known
    found = gather_objects(known)[0]
    widths = (cfg.text.length, cfg.text.text_dim, cfg.text.pooled_dim)
    return KnownTexts(found, widths, cfg.text.sees_images)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Preview:
    """A sample small enough to be sent to the first rank."""

    name: str
    prompt: str
    pixels: Tensor
    """uint8 [3, up to SHEET_COLUMNS, h, w]."""


class Showing:
    """Samples all prompts; every rank makes the same calls."""

    def __init__(self, run: TrainRun) -> None:
        """Load the VAE and encode the prompts, once.

        Raises:
            ValueError: prompts, VAE or text encoder are missing, or the sample is too short for the
                layout.
        """
        cfg, chosen = run.cfg, run.cfg.evaluation
        if not cfg.run.vae:
            raise ValueError(
                f"evaluation.sample_every={chosen.sample_every} needs run.vae; give it the folder "
                "of the VAE that made the latents"
            )
        self._run = run
        self._cfg: SampleConfig = replace(
            cfg.sample, prompts=chosen.prompts, prompts_file=chosen.prompts_file
        )
        check_sequence({str(cfg.sample.bucket): cfg.sample.bucket.tokens}, cfg.parallel)
        self._prompts = read_prompts(self._cfg)
        check_pictures(self._prompts, cfg.model.image_condition)
        self._texts = know_texts(cfg, captions_of(self._prompts), run.world)
        self._vae = load_vae(cfg.run.vae)
        check_vae(self._vae.cfg)

    def shown(self, step: int) -> bool:
        """Return whether the samples of a step are complete."""
        return (sample_folder(self._run.folder, step) / PROMPTS_NAME).is_file()

    def sample(self, step: int, mark: Callable[[], None], meter: StepMeter) -> Callable[[], None]:
        """Sample and decode; return what is left to do: encode, write and send.

        Ranks with distinct data share the samples and run equally many forwards, some of them in
        vain; the ranks of one batch share the decoding.

        Args:
            step: Updates done.
            mark: Called after each step of the sampler.
            meter: Where pictures go.
        """
        state, cfg = self._run.state, self._cfg
        axes, device = state.model.axes, self._run.world.device
        items, mine = deal(
            len(self._prompts) * cfg.num_per_prompt, axes.rank("dp"), axes.size("dp")
        )
        use_average = cfg.weights is SampleWeights.ema
        videos: list[SampledVideo] = []
        set_recompute(state.model.module, Recompute.none, offload=False)
        with averaged(state) if use_average else nullcontext():
            for video in sample_videos(
                LiveModel(state, self._run.cfg),
                self._vae.to(device),
                self._texts,
                self._prompts,
                cfg,
                progress=lambda done, total: mark(),
                items=items,
                decode_share=(axes.rank("model"), axes.size("model")),
                spread=tile_spread(axes, device),
            ):
                mark()
                if video.prompt_index * cfg.num_per_prompt + video.repeat in mine:
                    videos.append(replace(video, pixels=to_bytes(video.pixels)))
        self._vae.to("cpu")
        return self._rest(step, videos, meter)

    def _rest(self, step: int, videos: list[SampledVideo], meter: StepMeter) -> Callable[[], None]:
        previews = [shrunk(video) for video in videos]
        found = [preview for part in gather_objects(previews) for preview in part]
        folder = sample_folder(self._run.folder, step)
        rank, cfg = self._run.world.rank, self._cfg

        def write() -> None:
            scratch = folder / f".rank-{rank}"
            for video in videos:
                pixels = from_bytes(video.pixels)
                path = write_sample(scratch, replace(video, pixels=pixels), cfg)
                path.replace(folder / path.name)
            if scratch.is_dir():
                scratch.rmdir()
            if rank == 0:
                finish(folder, step, found, [p.prompt for p in self._prompts], meter)

        return write


def deal(count: int, rank: int, ranks: int) -> tuple[list[int], set[int]]:
    """Return the samples that a rank runs, and those of them that count.

    All ranks run equally many; the last ones may repeat what others do.
    """
    mine = list(range(rank, count, ranks))
    most = -(-count // ranks)
    return mine + [0] * (most - len(mine)), set(mine)


def to_bytes(pixels: Tensor) -> Tensor:
    """Return pixels in [-1, 1] as uint8, a quarter of the memory while they wait."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def from_bytes(pixels: Tensor) -> Tensor:
    """Return pixels of :func:`to_bytes` in [-1, 1]; they become the same bytes again."""
    return pixels.float() / 127.5 - 1


def shrunk(video: SampledVideo) -> _Preview:
    """Return a few small frames of a video whose pixels are bytes."""
    frames = even_frames(video.pixels, SHEET_COLUMNS)
    factor = SHEET_CELL_PX / max(frames.shape[2:])
    if factor < 1:
        size = [max(1, round(side * factor)) for side in frames.shape[2:]]
        small = F.interpolate(frames.float().transpose(0, 1), size=size, mode="area")
        frames = small.round().to(torch.uint8).transpose(0, 1)
    suffix = "png" if video.pixels.shape[1] == 1 else "mp4"
    return _Preview(
        name=f"{video.prompt_index:03d}-{video.repeat}.{suffix}",
        prompt=video.prompt,
        pixels=frames.contiguous().clone(),
    )


def finish(
    folder: Path, step: int, found: Sequence[_Preview], prompts: list[str], meter: StepMeter
) -> None:
    """Write the contact sheet and the prompts, and send what there is to the trackers."""
    previews = sorted(found, key=lambda preview: preview.name)
    sheet = folder / SHEET_NAME
    pixels = [from_bytes(preview.pixels) for preview in previews]
    write_contact_sheet(sheet, pixels, [preview.prompt for preview in previews])
    end = time.monotonic() + _OTHERS_S
    paths = [folder / preview.name for preview in previews]
    while not all(path.is_file() for path in paths) and time.monotonic() < end:
        time.sleep(0.05)
    if missing := [path.name for path in paths if not path.is_file()]:
        log.warning("%s lacks %s: another rank could not write them", folder, ", ".join(missing))
    (folder / PROMPTS_NAME).write_text(json.dumps(prompts, indent=2))
    items = [Media(name="samples/all", path=sheet)]
    for preview, path, small in zip(previews, paths, pixels, strict=True):
        if path.is_file():
            moving = still_images(small) if path.suffix == ".mp4" else []
            name = f"samples/{path.stem}"
            items.append(Media(name=name, path=path, caption=preview.prompt, moving=moving))
    meter.media(step, items)

"""What is asked of the sampler: texts, the pictures that begin and end a video, and seeds."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from hunyuan_train.data.buckets import Bucket, cover_crop
from hunyuan_train.data.images import image_pixels, read_image
from hunyuan_train.data.quarantine import MediaError
from hunyuan_train.encoders.text import BLACK, TextEncoder, TextFeatures, shown_beside
from hunyuan_train.evaluation.config import SampleConfig
from hunyuan_train.objectives.config import Task


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One video to sample."""

    prompt: str
    negative_prompt: str = ""
    """Text of the unconditional branch; used when `sample.cfg_scale` is not 1."""
    image: str = ""
    """File of the first frame; empty for text to video."""
    last_image: str = ""
    """File of the last frame, beside `image`."""
    seed: int = 0
    """Seed of the initial noise."""

    @property
    def pictures(self) -> list[str]:
        """Files of the given frames, in the order of the video."""
        return [name for name in (self.image, self.last_image) if name]

    @property
    def task(self) -> Task:
        """Which frames are given."""
        return (Task.text, Task.first, Task.first_last)[len(self.pictures)]

    def key(self) -> str:
        """Return what its noise is keyed by: text and pictures, but not its place in a list."""
        digests = [hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in self.pictures]
        return "\x1f".join([self.prompt, *digests])


def read_prompts(cfg: SampleConfig) -> list[Prompt]:
    """Return the prompts of ``sample.prompts`` and of the lines of ``sample.prompts_file``.

    Raises:
        ValueError: a file is missing, a line is wrong, a picture cannot be given, or there is no
            prompt at all.
    """
    rows: list[tuple[str, dict[str, Any]]] = [("", {"prompt": text}) for text in cfg.prompts]
    if cfg.prompts_file:
        path = Path(cfg.prompts_file)
        if not path.is_file():
            raise ValueError(f"sample.prompts_file={path} does not exist; write one prompt a line")
        lines = [
            (f"{path} line {number}: ", line.strip())
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
            if line.strip()
        ]
        if path.suffix == ".jsonl":
            rows += [(place, _read_row(place, line, path.parent)) for place, line in lines]
        else:
            rows += [(place, {"prompt": line}) for place, line in lines]
    if not rows:
        raise ValueError('no prompts; give sample.prompts=["..."] or sample.prompts_file=FILE')
    shared = {
        "negative_prompt": cfg.negative_prompt,
        "image": cfg.image,
        "last_image": cfg.last_image,
        "seed": cfg.seed,
    }
    prompts = [(place, Prompt(**{**shared, **row})) for place, row in rows]
    for place, prompt in prompts:
        _check(place, prompt, cfg.bucket)
    return [prompt for _, prompt in prompts]


def captions_of(prompts: Sequence[Prompt]) -> list[tuple[str, str]]:
    """Return every text that sampling ``prompts`` encodes, each once, with its first picture.

    A negative text leads away from the picture too: it has a black one.
    """
    texts = [pair for p in prompts for pair in (positive(p), negative(p))]
    return list(dict.fromkeys(texts))


def positive(prompt: Prompt) -> tuple[str, str]:
    """Return the text of a prompt and the file of its first picture."""
    return prompt.prompt, prompt.image


def negative(prompt: Prompt) -> tuple[str, str]:
    """Return the negative text of a prompt and what is shown beside it."""
    return prompt.negative_prompt, _BLACK if prompt.image else ""


def encode_captions(
    encoder: TextEncoder, captions: Sequence[tuple[str, str]], bucket: Bucket
) -> list[TextFeatures]:
    """Encode texts with their pictures, one by one, so that none changes with those beside it.

    Raises:
        ValueError: a picture cannot be read.
    """
    media = bucket.media
    if not encoder.sees_images:
        return [encoder.encode([text], media) for text, _ in captions]
    features: list[TextFeatures] = []
    for text, file in captions:
        picture = BLACK if file == _BLACK else read_picture(file, bucket)[0] if file else None
        features.append(encoder.encode([text], media, [shown_beside(media, text, picture)]))
    return features


def read_picture(path: str, bucket: Bucket) -> np.ndarray:
    """Read a picture as a clip of one frame: resized to cover ``bucket``, its centre cropped.

    Returns:
        uint8 [1, height, width, 3].

    Raises:
        ValueError: it is not a picture that can be read.
    """
    try:
        image = read_image(Path(path))
    except (MediaError, OSError) as error:
        raise ValueError(f"the picture {path} cannot be read: {error}") from error
    return image_pixels(image, bucket, cover_crop(image.height, image.width, bucket))[None]


_BLACK = "\0black"
"""In the place of a file's name."""
_TYPES = {field.name: int if field.name == "seed" else str for field in fields(Prompt)}


def _read_row(place: str, line: str, folder: Path) -> dict[str, Any]:
    """Read one JSON line; files in it are relative to the folder of the list."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f'{place}not JSON ({error}); write {{"prompt": ...}}') from error
    if not isinstance(row, dict) or "prompt" not in row:
        raise ValueError(f'{place}no prompt; write {{"prompt": ...}}')
    for name, value in row.items():
        if name not in _TYPES:
            raise ValueError(f"{place}unknown field {name!r}; choose from {', '.join(_TYPES)}")
        if type(value) is not _TYPES[name]:
            raise ValueError(f"{place}{name}={value!r} is not of type {_TYPES[name].__name__}")
    for name in ("image", "last_image"):
        if row.get(name):
            row[name] = str(folder / row[name])
    return row


def _check(place: str, prompt: Prompt, bucket: Bucket) -> None:
    if not prompt.pictures:
        return
    if not prompt.image:
        raise ValueError(
            f"{place}last_image={prompt.last_image} has no image beside it; give the first frame "
            "too, as models are trained on the first, or on both"
        )
    if bucket.frames == 1:
        raise ValueError(
            f"{place}image={prompt.image} begins a video, but sample.frames=1; set 5 or more"
        )
    for name in prompt.pictures:
        if not Path(name).is_file():
            raise ValueError(f"{place}the picture {name} does not exist; check the path")

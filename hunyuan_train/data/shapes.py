"""A generator of captioned moving-shapes clips: the demo's data, made on the spot from a seed.

A clip shows one plain coloured shape crossing a grey background at constant speed ("a red circle
moving left"), an image shows one standing still ("a red circle"). A third of the colour x shape x
direction combinations is held out: their prompts measure whether a trained model composes words it
has only seen apart. Every clip is drawn from generators keyed by its number, so any clip can be
redrawn alone.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from hunyuan_train.runtime.seed import keyed_generator, keyed_permutation

# Hues at least 50 degrees apart, so that a colour survives a coarse codec and is named by its hue
# alone.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (228, 44, 40),
    "yellow": (240, 218, 48),
    "green": (44, 190, 60),
    "cyan": (48, 208, 220),
    "blue": (52, 76, 236),
    "magenta": (226, 52, 206),
}
# Told apart by their coarse form, which a model learns long before it draws straight edges.
SHAPES: tuple[str, ...] = ("circle", "triangle", "bar", "pillar")
# Unit steps in image coordinates: x to the right, y down.
DIRECTIONS: dict[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
}
# (width, height) of the written files: squares three times in five, 3:2 and 2:3; all of them are
# larger than every demo bucket.
FRAME_SIZES: tuple[tuple[int, int], ...] = (*((128, 128),) * 3, (144, 96), (96, 144))
CLIP_FRAMES: tuple[int, ...] = (17, 17, 17, 5)
FRAMES_PER_SECOND = 8
# Grey levels of the background. A narrow dark range leaves the variance of latents to the shapes;
# with light and dark backgrounds both, most of it is spent on telling the two apart.
BACKGROUND = (16, 56)
# Thickness of a bar (lying) and a pillar (standing) over its length.
BAR_THICKNESS = 0.42
# Bounding square of a shape over the short side.
SHAPE_SIZE = 0.6
# Frames in which a shape crosses the frame; shorter clips show the first part of the way.
CROSSING_FRAMES = 17
# Free border around the whole path over the short side: cropping to a bucket cuts no shape.
MARGIN = 0.06


@dataclass(frozen=True, order=True)
class Combination:
    """What one clip or image shows; ``direction`` is empty for an image."""

    colour: str
    shape: str
    direction: str = ""

    @property
    def caption(self) -> str:
        """The caption, for example ``a red circle moving left`` or ``a red circle``."""
        moving = f" moving {self.direction}" if self.direction else ""
        return f"a {self.colour} {self.shape}{moving}"

    @classmethod
    def parse(cls, caption: str) -> "Combination":
        """Return the combination a caption names.

        Raises:
            ValueError: if the caption is not one of this generator's.
        """
        words = caption.lower().split()
        known = (
            len(words) in (3, 5)
            and words[0] == "a"
            and words[1] in COLOURS
            and words[2] in SHAPES
            and (len(words) == 3 or (words[3] == "moving" and words[4] in DIRECTIONS))
        )
        if not known:
            raise ValueError(
                f"caption {caption!r} is not of the moving-shapes data; write 'a <colour> <shape>' "
                f"or 'a <colour> <shape> moving <direction>' with colours {', '.join(COLOURS)}, "
                f"shapes {', '.join(SHAPES)} and directions {', '.join(DIRECTIONS)}"
            )
        return cls(words[1], words[2], words[4] if len(words) == 5 else "")


def held_out_combinations() -> list[Combination]:
    """Return the 32 of 96 moving combinations that training never shows.

    Colour, shape and direction numbers that sum to a multiple of three are held out: a Latin
    pattern, so every word and every pair of words (colour-shape, colour-direction, shape-direction)
    stays in training.
    """
    return [combo for index, combo in _numbered_combinations() if index % 3 == 0]


def training_combinations() -> list[Combination]:
    """Return the 64 moving combinations that training clips are drawn from."""
    return [combo for index, combo in _numbered_combinations() if index % 3 != 0]


def held_out_prompts() -> list[str]:
    """Return the captions of the held-out combinations, in a fixed order that mixes the words.

    Any prefix of the list is a fair sample, because the order is a fixed shuffle.
    """
    combos = held_out_combinations()
    order = keyed_permutation(len(combos), 0, "held_out_order")
    return [combos[index].caption for index in order]


def _numbered_combinations() -> Iterable[tuple[int, Combination]]:
    for c, colour in enumerate(COLOURS):
        for s, shape in enumerate(SHAPES):
            for d, direction in enumerate(DIRECTIONS):
                yield c + s + d, Combination(colour, shape, direction)


def shape_coverage(
    shape: str, centre_x: float, centre_y: float, half_size: float, width: int, height: int
) -> np.ndarray:
    """Return how much of each pixel a shape covers, float32 [height, width] in 0..1.

    The edge is antialiased by the signed distance to the outline: half a pixel inside is 1, half a
    pixel outside is 0.

    Args:
        shape: one of ``SHAPES``.
        centre_x: centre of the bounding square in pixels from the left edge.
        centre_y: centre of the bounding square in pixels from the top edge.
        half_size: half the side of the bounding square in pixels.
        width: frame width in pixels.
        height: frame height in pixels.

    Raises:
        ValueError: if the shape is unknown.
    """
    x = np.abs(np.arange(width, dtype=np.float32)[None, :] + 0.5 - centre_x)
    y = np.arange(height, dtype=np.float32)[:, None] + 0.5 - centre_y
    if shape == "circle":
        distance = np.hypot(x, y) - half_size
    elif shape == "triangle":
        # Apex at the top middle, base along the bottom of the bounding square.
        distance = np.maximum((2 * x - (y + half_size)) / np.sqrt(5.0), y - half_size)
    elif shape == "bar":
        distance = np.maximum(x - half_size, np.abs(y) - BAR_THICKNESS * half_size)
    elif shape == "pillar":
        distance = np.maximum(x - BAR_THICKNESS * half_size, np.abs(y) - half_size)
    else:
        raise ValueError(f"shape {shape!r} is unknown; choose from {', '.join(SHAPES)}")
    return np.clip(0.5 - distance, 0.0, 1.0).astype(np.float32)


def draw_clip(
    combo: Combination, frames: int, width: int, height: int, generator: np.random.Generator
) -> np.ndarray:
    """Return one clip as uint8 [frames, height, width, 3].

    The shape's bounding square is 0.6 of the short side. Places lie on a grid of an eighth of the
    short side, which is one latent cell in the smallest bucket: a model of a few million parameters
    can learn the data in minutes. A moving shape crosses all the room there is, at constant speed,
    in ``max(frames, 17)`` frames; across its direction its place is drawn.

    Args:
        combo: what to draw; without a direction the shape stands still.
        frames: number of frames, at least 1.
        width: frame width in pixels.
        height: frame height in pixels.
        generator: source of place and background.
    """
    short_side = min(width, height)
    half_size, cell = 0.5 * SHAPE_SIZE * short_side, short_side / 8
    size = np.array([width, height], dtype=np.float64)
    edge = half_size + MARGIN * short_side
    steps = np.floor((size - 2 * edge) / cell).astype(int)  # grid cells of room along x and y
    first = (size - steps * cell) / 2  # the grid is centred in the frame
    direction = np.array(DIRECTIONS[combo.direction] if combo.direction else (0, 0))
    place = np.array([generator.integers(steps[0] + 1), generator.integers(steps[1] + 1)])
    place = np.where(direction > 0, 0, np.where(direction < 0, steps, place))
    start, travel = first + place * cell, direction * steps * cell
    background = generator.uniform(*BACKGROUND)
    colour = np.array(COLOURS[combo.colour], dtype=np.float32)
    clip = np.empty((frames, height, width, 3), dtype=np.uint8)
    for index in range(frames):
        x, y = start + travel * (index / (max(frames, CROSSING_FRAMES) - 1))
        cover = shape_coverage(combo.shape, x, y, half_size, width, height)[..., None]
        clip[index] = np.rint(background + cover * (colour - background))
    return clip


@dataclass(frozen=True)
class DrawnSample:
    """One generated sample: its combination and its pixels, uint8 [frames, height, width, 3]."""

    combo: Combination
    pixels: np.ndarray


def draw_sample(
    index: int, media: str, seed: int, frame_sizes: list[tuple[int, int]], clip_frames: list[int]
) -> DrawnSample:
    """Draw training clip or image number ``index``; combinations and sizes come in even turns.

    Args:
        index: number of the clip or image, from 0.
        media: ``video`` or ``image``.
        seed: seed of the data set.
        frame_sizes: (width, height) pairs to draw from.
        clip_frames: clip lengths in frames to draw from.
    """
    combos = training_combinations()
    if media == "image":
        combos = [Combination(colour, shape) for colour in COLOURS for shape in SHAPES]
    # Every round of len(combos) samples shows each combination once, in a fresh order.
    turn, place = divmod(index, len(combos))
    combo = combos[keyed_permutation(len(combos), seed, f"shapes_{media}_order", turn)[place]]
    generator = keyed_generator(seed, f"shapes_{media}", index)
    width, height = frame_sizes[generator.integers(len(frame_sizes))]
    frames = 1 if media == "image" else clip_frames[generator.integers(len(clip_frames))]
    return DrawnSample(combo, draw_clip(combo, frames, width, height, generator))


def write_shapes_dataset(
    folder: Path,
    num_clips: int,
    num_images: int,
    seed: int,
    frame_sizes: list[tuple[int, int]] | None = None,
    clip_frames: list[int] | None = None,
) -> Path:
    """Write clips (mp4), images (png) and ``manifest.jsonl``, and return the manifest's path.

    Every manifest row holds ``file`` (relative to the folder), ``media``, ``caption``, ``width``,
    ``height`` and ``frames``. A second call with the same arguments writes the same pictures.

    Args:
        folder: where to write; made if missing.
        num_clips: number of moving clips; at least 64 show every training combination.
        num_images: number of still images; at least 24 show every colour-shape pair.
        seed: seed of the data set.
        frame_sizes: (width, height) pairs to draw from, both even; default ``FRAME_SIZES``.
        clip_frames: clip lengths in frames to draw from; default ``CLIP_FRAMES``.

    Raises:
        ValueError: if a count is negative or both are zero.
    """
    if min(num_clips, num_images) < 0 or num_clips + num_images == 0:
        raise ValueError(
            f"num_clips={num_clips} and num_images={num_images}: ask for at least one clip or image"
        )
    sizes, lengths = list(frame_sizes or FRAME_SIZES), list(clip_frames or CLIP_FRAMES)
    folder = Path(folder)
    rows: list[dict[str, str | int]] = []
    for media, count, suffix in (("video", num_clips, "mp4"), ("image", num_images, "png")):
        (folder / f"{media}s").mkdir(parents=True, exist_ok=True)
        for index in range(count):
            sample = draw_sample(index, media, seed, sizes, lengths)
            name = f"{media}s/{index:05d}.{suffix}"
            if media == "video":
                _write_lossy_clip(folder / name, sample.pixels)
            else:
                Image.fromarray(sample.pixels[0]).save(folder / name)
            frames, height, width, _ = sample.pixels.shape
            rows.append(
                {
                    "file": name,
                    "media": media,
                    "caption": sample.combo.caption,
                    "width": width,
                    "height": height,
                    "frames": frames,
                }
            )
    manifest = folder / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return manifest


def _write_lossy_clip(path: Path, pixels: np.ndarray) -> None:
    # Full-resolution chroma and a low crf: halved chroma would smear a small shape's colour into
    # its background, and the measured ceiling would be the file format's rather than the codec's.
    frames, height, width, _ = pixels.shape
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264",
            rate=Fraction(FRAMES_PER_SECOND),
            options={"crf": "12", "preset": "veryfast", "threads": "1"},
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv444p"
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(pixels[index], format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())

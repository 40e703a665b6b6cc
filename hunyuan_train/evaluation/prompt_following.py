"""How often a sampled moving-shapes clip shows what its prompt asks for, read from its pixels.

No learned judge: the background is the colour of the border, the shape is what differs from it, its
colour is named by hue, its form by the best overlap with drawn templates, its motion by the path of
its centre.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from hunyuan_train.data.shapes import COLOURS, DIRECTIONS, SHAPES, Combination, shape_coverage

# A shape that differs from its background by less than this share of the value range is not seen.
MIN_CONTRAST = 0.15
# Saturation (max - min over max of the colour) under which a colour has no name.
MIN_SATURATION = 0.25
# Shares of the frame that one shape may cover: the drawn ones cover 9 to 28 %.
AREA_RANGE = (0.01, 0.6)
# Overlap (intersection over union) with the best template under which a form has no name.
MIN_OVERLAP = 0.6
# Shift of the centre, over the short side, under which a clip stands still.
MIN_SHIFT = 0.03


@dataclass(frozen=True)
class Observation:
    """What the pixels of one clip show; an empty name means that nothing was recognised."""

    colour: str = ""
    shape: str = ""
    direction: str = ""


def observe(pixels: Tensor) -> Observation:
    """Measure colour, shape and direction of the one moving shape in a clip.

    Args:
        pixels: [3, F, H, W] in [-1, 1]; values outside are clipped.

    Raises:
        ValueError: if the tensor is not a colour clip.
    """
    if pixels.ndim != 4 or pixels.shape[0] != 3:
        raise ValueError(f"pixels have shape {list(pixels.shape)}; give one clip as [3, F, H, W]")
    clip = pixels.detach().float().cpu().clamp(-1, 1).permute(1, 2, 3, 0).numpy() * 0.5 + 0.5
    background = _border_colour(clip)
    cover, colour = _foreground(clip - background)
    area = cover.mean(axis=(1, 2))
    seen = (area > AREA_RANGE[0]) & (area < AREA_RANGE[1])
    if seen.mean() < 0.5:
        return Observation()
    return Observation(
        colour=_name_colour(background + colour),
        shape=_name_shape(cover[seen]),
        direction=_name_direction(cover),
    )


def score_video(pixels: Tensor, prompt: str) -> dict[str, bool]:
    """Return whether a clip shows its prompt's ``colour``, ``shape`` and, if named, ``direction``.

    Args:
        pixels: [3, F, H, W] in [-1, 1].
        prompt: a caption of the moving-shapes data.

    Raises:
        ValueError: if the prompt is not one of the generator's captions.
    """
    wanted, shown = Combination.parse(prompt), observe(pixels)
    score = {"colour": shown.colour == wanted.colour, "shape": shown.shape == wanted.shape}
    if wanted.direction:
        score["direction"] = shown.direction == wanted.direction
    return score


def score_videos(videos: Iterable[Tensor], prompts: Sequence[str]) -> dict[str, float]:
    """Return the share of clips that show their prompt's colour, shape and direction, each 0..1.

    Args:
        videos: clips [3, F, H, W] in [-1, 1], one per prompt.
        prompts: captions of the moving-shapes data.

    Raises:
        ValueError: if the numbers of clips and prompts differ.
    """
    return mean_scores(
        [score_video(video, prompt) for video, prompt in zip(videos, prompts, strict=True)]
    )


def mean_scores(scores: Sequence[dict[str, bool]]) -> dict[str, float]:
    """Average single-clip scores per aspect, over the clips whose prompt names that aspect."""
    aspects = {aspect: None for score in scores for aspect in score}
    return {
        aspect: float(np.mean([score[aspect] for score in scores if aspect in score]))
        for aspect in aspects
    }


def chance_scores() -> dict[str, float]:
    """Return what blind guessing among the known words scores, per aspect."""
    return {
        "colour": 1 / len(COLOURS),
        "shape": 1 / len(SHAPES),
        "direction": 1 / len(DIRECTIONS),
    }


def _border_colour(clip: np.ndarray) -> np.ndarray:
    # The median over a border of 2 px of all frames: shapes keep a margin, and may touch one side
    # at most.
    edge = 2
    parts = [clip[:, :edge], clip[:, -edge:], clip[:, :, :edge], clip[:, :, -edge:]]
    return np.median(np.concatenate([part.reshape(-1, 3) for part in parts]), axis=0)


def _foreground(difference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split [F, H, W, 3] differences from the background into coverage [F, H, W] and a colour [3].

    Coverage is the share of the shape's colour in a pixel, so that a soft edge counts as a part of
    a pixel.
    """
    distance = np.linalg.norm(difference, axis=-1)
    # The strongest 2 % of the pixels set the scale: a shape covers more, stray pixels cover less.
    strong = np.quantile(distance, 0.98)
    if strong < MIN_CONTRAST * np.sqrt(3.0):
        return np.zeros_like(distance), np.zeros(3)
    inside = distance > 0.6 * strong
    colour = np.median(difference[inside], axis=0)
    squared = float(colour @ colour)
    if squared < 1e-6:
        return np.zeros_like(distance), np.zeros(3)
    cover = np.clip(difference @ colour / squared, 0.0, 1.0)
    return np.where(cover > 0.2, cover, 0.0), colour


def _name_colour(colour: np.ndarray) -> str:
    """Return the name whose hue is nearest to an RGB colour in 0..1, or nothing for a grey."""
    low, high = float(colour.min()), float(colour.max())
    if high <= 0 or (high - low) / high < MIN_SATURATION:
        return ""
    hue = _hue(colour)
    gaps = {
        name: abs((hue - _hue(np.array(rgb) / 255.0) + 180.0) % 360.0 - 180.0)
        for name, rgb in COLOURS.items()
    }
    return min(gaps, key=gaps.__getitem__)


def _hue(colour: np.ndarray) -> float:
    """Return an RGB colour's angle on the colour circle in degrees: red 0, green 120, blue 240."""
    red, green, blue = (float(value) for value in colour)
    return (
        float(np.degrees(np.arctan2(np.sqrt(3.0) * (green - blue), 2.0 * red - green - blue))) % 360
    )


def _name_shape(cover: np.ndarray) -> str:
    """Return the template that best overlaps the coverage [F, H, W] of 5 evenly spaced frames."""
    picks = np.unique(np.linspace(0, len(cover) - 1, 5).round().astype(int))
    overlaps = {
        shape: float(np.mean([_overlap(cover[frame], shape) for frame in picks]))
        for shape in SHAPES
    }
    best = max(overlaps, key=overlaps.__getitem__)
    return best if overlaps[best] >= MIN_OVERLAP else ""


def _overlap(mask: np.ndarray, shape: str) -> float:
    """Return the intersection over union of a mask [H, W] and a template of its area and centre."""
    height, width = mask.shape
    area = float(mask.sum())
    centre_x, centre_y = _centre(mask)
    # A unit template gives its area and the offset of its centre of mass from its bounding square's
    # centre.
    unit = shape_coverage(shape, 32.0, 32.0, 24.0, 64, 64)
    half_size = 24.0 * np.sqrt(area / float(unit.sum()))
    offset = (_centre(unit)[1] - 32.0) / 24.0 * half_size
    template = shape_coverage(shape, centre_x, centre_y - offset, half_size, width, height)
    union = float(np.maximum(mask, template).sum())
    return float(np.minimum(mask, template).sum()) / max(union, 1e-6)


def _centre(mask: np.ndarray) -> tuple[float, float]:
    """Return the centre of mass (x, y) of a mask [H, W] in pixels from the top left corner."""
    total = max(float(mask.sum()), 1e-6)
    x = float((mask.sum(axis=0) * (np.arange(mask.shape[1]) + 0.5)).sum()) / total
    y = float((mask.sum(axis=1) * (np.arange(mask.shape[0]) + 0.5)).sum()) / total
    return x, y


def _name_direction(cover: np.ndarray) -> str:
    """Return the direction of the centre from the first to the last third of coverage [F, H, W]."""
    third = max(1, len(cover) // 3)
    if len(cover) < 2:
        return ""
    first, last = _centre(cover[:third].mean(axis=0)), _centre(cover[-third:].mean(axis=0))
    shift = np.array(last) - np.array(first)
    if np.abs(shift).max() < MIN_SHIFT * min(cover.shape[1:]):
        return ""
    return max(DIRECTIONS, key=lambda name: float(shift @ np.array(DIRECTIONS[name])))

"""Scores of reconstructions against their formulas, their sums over ranks, and the picture."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from hunyuan_train.evaluation.reconstruction import (
    ReconstructionScores,
    compare_grid,
    flicker,
    psnr_db,
    ssim,
    write_compare_grid,
)
from hunyuan_train.objectives.perceptual import build_perceptual


def clips(frames: int, seed: int = 0, batch: int = 2, side: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(batch, 3, frames, side, side + 8, generator=generator) * 2 - 1
    decoded = pixels + 0.2 * torch.randn(pixels.shape, generator=generator)
    return decoded.clamp(-1, 1), pixels


def ssim_by_definition(x: np.ndarray, y: np.ndarray, size: int = 11) -> float:
    """Return the mean over positions of one plane in [-1, 1], window by window (Wang et al.)."""
    line = np.exp(-0.5 * ((np.arange(size) - size // 2) / 1.5) ** 2)
    weights = np.outer(line, line) / line.sum() ** 2
    found = []
    for top in range(x.shape[0] - size + 1):
        for left in range(x.shape[1] - size + 1):
            a, b = (z[top : top + size, left : left + size] for z in (x, y))
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            var_a = (weights * (a - mean_a) ** 2).sum()
            var_b = (weights * (b - mean_b) ** 2).sum()
            both = (weights * (a - mean_a) * (b - mean_b)).sum()
            c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
            alike = (2 * mean_a * mean_b + c1) * (2 * both + c2)
            found.append(alike / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)))
    return float(np.mean(found))


@pytest.mark.parametrize(("side", "window"), [(16, 11), (10, 9), (8, 7)])
def test_ssim_is_its_definition(side, window):
    decoded, pixels = clips(2, side=side)
    for row, got in enumerate(ssim(decoded, pixels).tolist()):
        planes = [
            ssim_by_definition(
                decoded[row, colour, frame].double().numpy(),
                pixels[row, colour, frame].double().numpy(),
                window,
            )
            for colour in range(3)
            for frame in range(2)
        ]
        assert got == pytest.approx(np.mean(planes), abs=1e-9)
    assert ssim(pixels, pixels).tolist() == pytest.approx([1.0, 1.0], abs=1e-12)


def test_psnr_by_hand():
    pixels = torch.zeros(2, 3, 2, 8, 8)
    decoded = pixels.clone()
    decoded[0, :, 0] += 0.2  # 10 log10(4 / 0.04) = 20 dB
    decoded[0, :, 1] += 0.02  # 40 dB
    assert psnr_db(decoded, pixels).tolist() == pytest.approx([30.0, 100.0])
    # What leaves the range is cut off before it is compared.
    assert psnr_db(pixels + 3, pixels + 1).tolist() == [100.0, 100.0]


def test_flicker_is_the_error_of_changes():
    pixels = torch.zeros(1, 3, 3, 8, 8)
    steady, unsteady = pixels + 0.5, pixels.clone()
    unsteady[:, :, 1] = 0.5
    assert flicker(steady, pixels).item() == 0
    assert flicker(unsteady, pixels).item() == 0.5


def test_scores_are_means_over_samples_of_each_medium():
    perceptual = build_perceptual("", "cpu")
    scores = ReconstructionScores(perceptual)
    images, videos = [clips(1, seed, batch=seed) for seed in (1, 3)], [clips(5, 7)]
    for decoded, pixels in images + videos:
        scores.add(decoded, pixels)
    found = scores.scores()
    assert list(found) == ["image", "video"]
    assert (found["image"].samples, found["video"].samples) == (4, 2)
    decoded, pixels = (torch.cat(part) for part in zip(*images, strict=True))
    image = found["image"]
    assert image.psnr_db == pytest.approx(psnr_db(decoded, pixels).mean().item())
    assert image.ssim == pytest.approx(ssim(decoded, pixels).mean().item())
    assert image.perceptual == pytest.approx(perceptual(decoded, pixels).mean().item(), rel=1e-5)
    assert math.isnan(image.flicker)
    error = (decoded.double() - pixels.double()).square().mean().item()
    assert image.pooled_psnr_db == pytest.approx(10 * math.log10(4 / error))
    assert found["video"].flicker == pytest.approx(flicker(*videos[0]).mean().item())


def test_sums_of_ranks_merge_to_those_of_one():
    whole, ranks = ReconstructionScores(), [ReconstructionScores() for _ in range(3)]
    for number in range(4):
        decoded, pixels = clips(1 + 4 * (number % 2), number)
        whole.add(decoded, pixels)
        ranks[number % 2].add(decoded, pixels)
    # The third rank had nothing to measure and still has every key.
    assert set(ranks[2].sums) == set(whole.sums)
    merged = ReconstructionScores()
    for rank in ranks:
        merged.merge(rank.sums)
    for name, value in whole.sums.items():
        assert isinstance(value, float)
        assert merged.sums[name] == pytest.approx(value, rel=1e-12)
    for medium, scores in whole.scores().items():
        assert math.isnan(scores.perceptual)
        assert merged.scores()[medium].ssim == pytest.approx(scores.ssim)


def test_a_medium_without_samples_is_left_out():
    scores = ReconstructionScores()
    assert scores.scores() == {}
    scores.add(*clips(1))
    assert list(scores.scores()) == ["image"]


def test_perfect_reconstructions_score_finitely():
    scores = ReconstructionScores(build_perceptual("", "cpu"))
    _, pixels = clips(5)
    scores.add(pixels, pixels)
    video = scores.scores()["video"]
    assert (video.psnr_db, video.pooled_psnr_db) == (100.0, 100.0)
    assert (video.perceptual, video.flicker) == (0, 0)
    assert video.ssim == pytest.approx(1.0)


def test_nothing_is_kept_for_a_backward_pass():
    decoded, pixels = clips(1)
    scores = ReconstructionScores(build_perceptual("", "cpu"))
    scores.add(decoded.requires_grad_(), pixels)
    assert decoded.grad is None
    assert scores.scores()["image"].perceptual > 0


def test_grid_shows_original_reconstruction_and_five_times_the_error(tmp_path):
    pixels = torch.zeros(3, 5, 8, 16)
    decoded = pixels + torch.tensor([0.0, 0.1, 0.0, 0.0, -0.4]).view(1, 5, 1, 1)
    decoded[0, 0] = 4.0
    grid = compare_grid(decoded, pixels, columns=3)
    assert grid.shape == (24, 48, 3)
    assert grid.dtype == np.uint8
    assert (grid[:8] == 128).all()
    # Frames 0, 2 and 4 are shown; red of the first is cut to the range.
    assert grid[8, 0].tolist() == [255, 128, 128]
    assert grid[16, 0].tolist() == [255, 128, 128]
    assert (grid[8:, 16:32] == 128).all()
    assert (grid[16:, 32:] == 0).all()
    assert (compare_grid(pixels + 0.1, pixels)[16:] == 191).all()  # 127.5 * (1 + 5 * 0.1)
    path = write_compare_grid(tmp_path / "new" / "grid.png", decoded, pixels, columns=3)
    assert np.array_equal(np.asarray(Image.open(path)), grid)

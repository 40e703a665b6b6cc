import numpy as np
import torch
from media_factory import FakeVae

from hunyuan_train.encoders.latents import LatentEncoder, to_model_range, weights_fingerprint


def test_fingerprint_names_the_weights_and_the_precision():
    base = LatentEncoder(FakeVae()).fingerprint
    assert LatentEncoder(FakeVae()).fingerprint == base
    assert LatentEncoder(FakeVae(gain=1.0 + 1e-6)).fingerprint != base
    assert LatentEncoder(FakeVae(), dtype=torch.bfloat16).fingerprint != base


def test_fingerprint_sees_names_shapes_and_dtypes():
    weights = {"a": torch.zeros(4), "b": torch.zeros(2)}
    base = weights_fingerprint(weights)
    assert weights_fingerprint({"b": weights["b"], "a": weights["a"]}) == base
    assert weights_fingerprint({"a": torch.zeros(2), "b": torch.zeros(4)}) != base
    assert weights_fingerprint({"a": torch.zeros(2, 2), "b": torch.zeros(2)}) != base
    assert weights_fingerprint({"a": torch.zeros(4), "c": torch.zeros(2)}) != base
    half = {"a": torch.zeros(8, dtype=torch.bfloat16), "b": torch.zeros(2)}
    assert weights_fingerprint(half) != base


def test_pixels_reach_the_vae_in_its_range_and_moments_come_back_in_float32():
    clips = [np.full((1, 16, 16, 3), value, np.uint8) for value in (0, 255)]
    pixels = to_model_range(clips)
    assert pixels.shape == (2, 3, 1, 16, 16)
    assert [pixel.unique().tolist() for pixel in pixels] == [[-1.0], [1.0]]
    mean, std = LatentEncoder(FakeVae().double(), dtype=torch.float64).encode(clips)
    assert mean.dtype == std.dtype == torch.float32
    assert not mean.requires_grad
    assert mean.shape == (2, 4, 1, 2, 2)
    assert mean[:, 0, 0, 0, 0].tolist() == [-1.0, 1.0]

"""LPIPS against its formula, what its folder may hold, and what the substitute notices."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from hunyuan_train.data.shapes import Combination, draw_clip
from hunyuan_train.objectives.gabor_pyramid import GaborPyramid
from hunyuan_train.objectives.perceptual import FrameDistance, build_perceptual
from hunyuan_train.runtime.seed import keyed_generator

# The networks once more, from their papers: kernels by torchvision's numbers, "M" a pooling.
ALEX = [(0, 3, 64, 11), (3, 64, 192, 5), (6, 192, 384, 3), (8, 384, 256, 3), (10, 256, 256, 3)]
VGG = [
    *[(0, 3, 64, 3), (2, 64, 64, 3), (5, 64, 128, 3), (7, 128, 128, 3)],
    *[(10, 128, 256, 3), (12, 256, 256, 3), (14, 256, 256, 3)],
    *[(17, 256, 512, 3), (19, 512, 512, 3), (21, 512, 512, 3)],
    *[(24, 512, 512, 3), (26, 512, 512, 3), (28, 512, 512, 3)],
]
WIDTHS = {"alex": [64, 192, 384, 256, 256], "vgg": [64, 128, 256, 512, 512]}
NAMES = {"alex": "alexnet-owt-1234", "vgg": "vgg16-1234"}


def random_weights(kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    network: dict[str, Tensor] = {"classifier.6.bias": torch.zeros(3)}
    for number, inputs, outputs, kernel in ALEX if kind == "alex" else VGG:
        weight = torch.randn(outputs, inputs, kernel, kernel, generator=generator)
        network[f"features.{number}.weight"] = weight * (2 / (inputs * kernel**2)) ** 0.5
        network[f"features.{number}.bias"] = 0.1 * torch.randn(outputs, generator=generator)
    lins = {
        f"lin{number}.model.1.weight": torch.rand(1, width, 1, 1, generator=generator)
        for number, width in enumerate(WIDTHS[kind])
    }
    return network, lins


def write_weights(folder: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    network, lins = random_weights(kind)
    torch.save(network, folder / f"{NAMES[kind]}.pth")
    torch.save(lins, folder / f"{kind}.pth")
    return network, lins


def depths(x: Tensor, kind: str, weights: dict[str, Tensor]) -> list[Tensor]:
    """Return the five feature maps, written out layer by layer."""

    def conv(x: Tensor, number: int, **options: int) -> Tensor:
        name = f"features.{number}"
        return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], **options).relu()

    mean, std = [-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]
    x = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    if kind == "alex":
        first = conv(x, 0, stride=4, padding=2)
        second = conv(F.max_pool2d(first, 3, 2), 3, padding=2)
        third = conv(F.max_pool2d(second, 3, 2), 6, padding=1)
        fourth = conv(third, 8, padding=1)
        return [first, second, third, fourth, conv(fourth, 10, padding=1)]
    found = []
    for numbers in ([0, 2], [5, 7], [10, 12, 14], [17, 19, 21], [24, 26, 28]):
        x = F.max_pool2d(x, 2, 2) if found else x
        for number in numbers:
            x = conv(x, number, padding=1)
        found.append(x)
    return found


def lpips_by_formula(
    a: Tensor, b: Tensor, kind: str, network: dict[str, Tensor], lins: dict[str, Tensor]
) -> Tensor:
    total = torch.zeros(len(a), dtype=a.dtype)
    for depth, (x, y) in enumerate(
        zip(depths(a, kind, network), depths(b, kind, network), strict=True)
    ):
        x = x / (x.norm(dim=1, keepdim=True) + 1e-10)
        y = y / (y.norm(dim=1, keepdim=True) + 1e-10)
        weight = lins[f"lin{depth}.model.1.weight"].flatten()
        total = total + torch.einsum("nchw,c->nhw", (x - y) ** 2, weight).mean(dim=(1, 2))
    return total


@pytest.mark.parametrize("kind", ["alex", "vgg"])
def test_lpips_is_its_formula(tmp_path, kind):
    network, lins = write_weights(tmp_path, kind)
    side = 35 if kind == "alex" else 20
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, 2, side, side + 4, generator=generator) * 2 - 1
    decoded = pixels + 0.3 * torch.randn(pixels.shape, generator=generator)
    distance = build_perceptual(str(tmp_path), "cpu")
    assert distance.name == f"lpips-{kind}"
    assert str(tmp_path) in distance.describe()
    ours = decoded.clone().requires_grad_()
    got = distance(ours, pixels)
    got.sum().backward()
    doubles = [{key: value.double() for key, value in part.items()} for part in (network, lins)]
    theirs = decoded.double().requires_grad_()
    want = torch.stack(
        [
            lpips_by_formula(theirs[:, :, frame], pixels[:, :, frame].double(), kind, *doubles)
            for frame in range(2)
        ]
    ).mean(dim=0)
    want.sum().backward()
    torch.testing.assert_close(got.detach().double(), want.detach(), rtol=0, atol=1e-5)
    assert want.min() > 0.01
    assert ours.grad is not None
    assert theirs.grad is not None
    scale = theirs.grad.abs().max()
    torch.testing.assert_close(ours.grad.double() / scale, theirs.grad / scale, rtol=0, atol=1e-3)


def test_lpips_of_equal_and_of_black_frames_has_finite_gradients(tmp_path):
    write_weights(tmp_path, "alex")
    distance = build_perceptual(str(tmp_path), "cpu")
    pixels = torch.rand(1, 3, 1, 32, 32) * 2 - 1
    for other in (pixels, -torch.ones_like(pixels)):
        decoded = other.clone().requires_grad_()
        value = distance(decoded, other)
        assert value.item() == 0
        value.sum().backward()
        assert decoded.grad is not None
        assert decoded.grad.isfinite().all()


def test_lpips_reads_safetensors(tmp_path):
    network, lins = random_weights("alex")
    save_file(network, tmp_path / "alexnet.safetensors")
    save_file(lins, tmp_path / "alex.safetensors")
    assert build_perceptual(str(tmp_path), "cpu").name == "lpips-alex"


def test_lpips_names_what_is_wrong_with_its_folder(tmp_path):
    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            build_perceptual(str(tmp_path), "cpu")

    with pytest.raises(ValueError, match=r"perceptual_folder=.*nowhere is not a folder"):
        build_perceptual(str(tmp_path / "nowhere"), "cpu")
    refused(r"holds no LPIPS: it needs alexnet\*.pth and alex.pth, .* has no files")
    network, lins = random_weights("alex")
    torch.save(network, tmp_path / "alexnet-1.pth")
    refused("holds no LPIPS: .* and has alexnet-1.pth")
    torch.save({"lin0.model.1.weight": lins["lin0.model.1.weight"]}, tmp_path / "alex.pth")
    refused("alex.pth has no lin1.model.1.weight; it is not the file that LPIPS needs")
    torch.save(lins | {"lin1.model.1.weight": torch.ones(1, 5, 1, 1)}, tmp_path / "alex.pth")
    refused(r"lin1.model.1.weight has the shape \[1, 5, 1, 1\], not \[1, 192, 1, 1\]")
    torch.save(
        lins | {"lin1.model.1.weight": torch.full((1, 192, 1, 1), torch.nan)}, tmp_path / "alex.pth"
    )
    refused("values that are not finite; the file is damaged")
    (tmp_path / "alex.pth").write_bytes(b"not weights")
    refused("alex.pth cannot be read as weights")
    torch.save([1], tmp_path / "alex.pth")
    refused("alex.pth holds a list, not a state dict")
    torch.save(lins, tmp_path / "alex.pth")
    torch.save(network, tmp_path / "alexnet-2.pth")
    refused("several files of the backbone: alexnet-1.pth, alexnet-2.pth; leave one")
    (tmp_path / "alexnet-2.pth").unlink()
    (tmp_path / "vgg16-1.pth").touch()
    (tmp_path / "vgg.pth").touch()
    refused("holds LPIPS with AlexNet and with VGG16; leave the files of one")


def test_lpips_refuses_frames_that_its_network_cannot_take(tmp_path):
    write_weights(tmp_path, "alex")
    distance = build_perceptual(str(tmp_path), "cpu")
    pixels = torch.zeros(1, 3, 1, 30, 64)
    with pytest.raises(ValueError, match=r"frames of 64 x 30 px are too small .* at least 31 px"):
        distance(pixels, pixels)
    assert distance(torch.zeros(1, 3, 1, 31, 31), torch.zeros(1, 3, 1, 31, 31)).item() == 0


def test_chunks_change_neither_distances_nor_gradients():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, 5, 16, 24, generator=generator) * 2 - 1
    decoded = pixels + 0.2 * torch.randn(pixels.shape, generator=generator)
    weights = torch.tensor([1.0, -3.0])
    found = []
    for chunk_px in (2 * 16 * 24 + 5, 2**20):
        ours = decoded.clone().requires_grad_()
        distance = FrameDistance(GaborPyramid(), "x", "y", chunk_px)(ours, pixels)
        (distance * weights).sum().backward()
        found.append((distance.detach(), ours.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-8)
    # The same by automatic differentiation of the whole, without chunks.
    frames = decoded.transpose(1, 2).flatten(0, 1).requires_grad_()
    whole = GaborPyramid()(frames, pixels.transpose(1, 2).flatten(0, 1)).view(2, 5).mean(dim=1)
    (whole * weights).sum().backward()
    assert frames.grad is not None
    slope = frames.grad.unflatten(0, (2, 5)).transpose(1, 2)
    torch.testing.assert_close(found[0], (whole.detach(), slope), rtol=1e-5, atol=1e-8)


def test_a_chunk_is_all_that_is_compared_at_once():
    seen = []

    class Watched(GaborPyramid):
        def forward(self, decoded: Tensor, pixels: Tensor) -> Tensor:
            seen.append(len(decoded))
            return super().forward(decoded, pixels)

    distance = FrameDistance(Watched(), "x", "y", chunk_px=3 * 64)
    clips = torch.zeros(2, 3, 5, 8, 8)
    with torch.no_grad():
        assert distance(clips, clips).tolist() == [0, 0]
    assert seen == [3, 3, 3, 1]


def test_without_a_gradient_none_is_computed():
    pixels = torch.rand(1, 3, 1, 16, 16)
    distance = build_perceptual("", "cpu")
    assert not distance(pixels * 0.5, pixels).requires_grad
    assert distance((pixels * 0.5).requires_grad_(), pixels).requires_grad


def textured(size: int = 64) -> Tensor:
    """Two pictures: a drawn shape, and patches of many sizes and colours like a photograph."""
    frame = draw_clip(
        Combination("red", "triangle"), 1, size, size, keyed_generator(0, "perceptual")
    )
    drawn = torch.from_numpy(frame[0]).permute(2, 0, 1).float() / 127.5 - 1
    generator = torch.Generator().manual_seed(2)
    leaves = torch.zeros(3, size, size)
    for _ in range(150):
        x, y = torch.randint(0, size, (2,), generator=generator).tolist()
        w, h = torch.randint(3, size // 3, (2,), generator=generator).tolist()
        colour = torch.rand(3, 1, 1, generator=generator) * 1.6 - 0.8
        leaves[:, y : y + h, x : x + w] = colour
    return torch.stack([drawn, leaves])


def blurred(x: Tensor, deviation: float) -> Tensor:
    reach = int(3 * deviation + 1)
    line = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / deviation) ** 2)
    line = (line / line.sum()).view(1, 1, 1, -1).expand(3, 1, 1, -1)
    x = F.pad(x, (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(x, line, groups=3), line.transpose(2, 3), groups=3)


def noise_for(x: Tensor) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(3))


def blocky(x: Tensor, size: int) -> Tensor:
    return F.interpolate(F.avg_pool2d(x, size), scale_factor=size)


HUE = torch.tensor([1.0, -0.5, -0.5]).view(3, 1, 1)
DISTORTIONS = {
    "blur": [lambda x, s=s: blurred(x, s) for s in (0.5, 1.0, 2.0, 4.0)],
    "noise": [lambda x, s=s: x + s * noise_for(x) for s in (0.02, 0.05, 0.1, 0.2, 0.4)],
    "blocks": [lambda x, s=s: blocky(x, s) for s in (2, 4, 8, 16)],
    "hue": [lambda x, s=s: x + s * HUE for s in (0.03, 0.1, 0.2, 0.4)],
    "brightness": [lambda x, s=s: x + s for s in (0.03, 0.1, 0.2, 0.4)],
}


@pytest.mark.parametrize("kind", DISTORTIONS)
def test_substitute_grows_with_every_distortion(kind):
    distance = GaborPyramid()
    pictures = textured()
    rows = torch.stack([distance(distort(pictures), pictures) for distort in DISTORTIONS[kind]])
    assert (rows[0] > 0).all()
    assert (rows.diff(dim=0) > 0.5 * rows[:-1]).all(), rows


@pytest.mark.parametrize("deviation", [2.0, 4.0])
def test_substitute_prefers_noise_to_blur_of_the_same_psnr(deviation):
    distance = GaborPyramid()
    pictures = textured()
    blur = blurred(pictures, deviation)
    error = (blur - pictures).square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    noise = noise_for(pictures)
    noise = noise / noise.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    noisy = pictures + error * noise
    torch.testing.assert_close(
        (noisy - pictures).square().mean(dim=(1, 2, 3)), error.flatten().square()
    )
    assert (distance(blur, pictures) > 1.1 * distance(noisy, pictures)).all()


def test_substitute_masks_noise_by_texture():
    distance = GaborPyramid()
    flat = torch.zeros(1, 3, 32, 32)
    stripes = flat + torch.tensor([0.5, 0.5, -0.5, -0.5]).repeat(8)
    noise = 0.1 * noise_for(flat)
    assert distance(flat + noise, flat) > 1.5 * distance(stripes + noise, stripes)


@pytest.mark.parametrize("size", [(1, 8, 8), (5, 8, 24), (1, 17, 9), (1, 64, 64)])
def test_substitute_of_equal_clips_is_zero_with_finite_gradients(size):
    distance = build_perceptual("", "cpu")
    assert distance.name == "gabor-pyramid"
    assert "not LPIPS" in distance.describe()
    for clips in (torch.rand(2, 3, *size) * 2 - 1, torch.zeros(2, 3, *size)):
        decoded = clips.clone().requires_grad_()
        value = distance(decoded, clips)
        assert value.tolist() == [0, 0]
        value.sum().backward()
        assert decoded.grad is not None
        assert decoded.grad.isfinite().all()


def test_substitute_has_the_gradient_of_its_value():
    network = GaborPyramid().double()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(1, 3, 8, 8, generator=generator, dtype=torch.float64) * 2 - 1
    for decoded in (0.7 * pixels, torch.full_like(pixels, 0.2)):
        assert torch.autograd.gradcheck(lambda x: network(x, pixels), decoded.requires_grad_())


def test_descent_on_the_substitute_sharpens_a_blurred_picture():
    distance = GaborPyramid()
    pictures = textured(32)
    decoded = blurred(pictures, 1.5).requires_grad_()
    optimizer = torch.optim.Adam([decoded], lr=0.02)
    before = distance(decoded, pictures).detach()
    error = (decoded - pictures).abs().mean().item()
    for _ in range(30):
        optimizer.zero_grad()
        distance(decoded, pictures).sum().backward()
        optimizer.step()
    assert (distance(decoded, pictures) < 0.2 * before).all()
    assert (decoded - pictures).abs().mean().item() < 0.9 * error


def test_narrow_clips_are_compared_in_float32():
    distance = build_perceptual("", "cpu")
    pixels = torch.rand(1, 3, 1, 16, 16) * 2 - 1
    got = distance((0.5 * pixels).bfloat16(), pixels.bfloat16())
    assert got.dtype == torch.float32
    want = distance((0.5 * pixels).bfloat16().float(), pixels.bfloat16().float())
    torch.testing.assert_close(got, want)


def test_mixed_precision_does_not_reach_the_comparison():
    distance = build_perceptual("", "cpu")
    pixels = torch.rand(1, 3, 1, 16, 16) * 2 - 1
    found = []
    for enabled in (False, True):
        decoded = (0.9 * pixels).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            value = distance(decoded, pixels)
        value.sum().backward()
        found.append((value.detach(), decoded.grad))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)

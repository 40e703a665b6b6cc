"""LPIPS: the learned perceptual distance of two pictures (Zhang et al. 2018, arXiv 1801.03924).

Both pictures pass a classifier's convolutions. At five depths the features of every position are
scaled to unit length, subtracted and squared; a learned non-negative weight per channel adds them
up, positions are averaged, and the five numbers are summed.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

# Of the released metric: the classifiers' mean and deviation, for pixels in [-1, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
SMALLEST_NORM = 1e-10


@dataclass(frozen=True, slots=True)
class Conv:
    """A convolution with a ReLU behind it."""

    index: int
    """Its number in torchvision's ``features``."""
    inputs: int
    outputs: int
    kernel: int
    stride: int = 1
    padding: int = 1


@dataclass(frozen=True, slots=True)
class Backbone:
    """The convolutions of a classifier, by depth; a depth after the first begins with a pooling."""

    title: str
    """Its name in error messages."""
    files: str
    """What names of files with its weights start with."""
    pool: int
    """Kernel of the max poolings, whose stride is 2."""
    pooled: tuple[bool, ...]
    """Whether a depth begins with one."""
    depths: tuple[tuple[Conv, ...], ...]
    smallest_px: int
    """Side of the smallest picture that reaches the last depth."""


BACKBONES = {
    "alex": Backbone(
        title="AlexNet",
        files="alexnet",
        pool=3,
        pooled=(False, True, True, False, False),
        depths=(
            (Conv(0, 3, 64, 11, 4, 2),),
            (Conv(3, 64, 192, 5, 1, 2),),
            (Conv(6, 192, 384, 3),),
            (Conv(8, 384, 256, 3),),
            (Conv(10, 256, 256, 3),),
        ),
        smallest_px=31,
    ),
    "vgg": Backbone(
        title="VGG16",
        files="vgg16",
        pool=2,
        pooled=(False, True, True, True, True),
        depths=(
            (Conv(0, 3, 64, 3), Conv(2, 64, 64, 3)),
            (Conv(5, 64, 128, 3), Conv(7, 128, 128, 3)),
            (Conv(10, 128, 256, 3), Conv(12, 256, 256, 3), Conv(14, 256, 256, 3)),
            (Conv(17, 256, 512, 3), Conv(19, 512, 512, 3), Conv(21, 512, 512, 3)),
            (Conv(24, 512, 512, 3), Conv(26, 512, 512, 3), Conv(28, 512, 512, 3)),
        ),
        smallest_px=16,
    ),
}


class Lpips(nn.Module):
    """The distance of pictures; weights are loaded by :func:`load_lpips` and never trained."""

    def __init__(self, kind: str) -> None:
        """Build the network without weights worth using; kind is "alex" or "vgg"."""
        super().__init__()
        self.kind = kind
        self.backbone = BACKBONES[kind]
        convs = [conv for depth in self.backbone.depths for conv in depth]
        self.features = nn.ModuleDict(
            {
                str(conv.index): nn.Conv2d(
                    conv.inputs, conv.outputs, conv.kernel, conv.stride, conv.padding
                )
                for conv in convs
            }
        )
        widths = [depth[-1].outputs for depth in self.backbone.depths]
        self.lins = nn.ParameterList([torch.ones(1, width, 1, 1) for width in widths])
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def forward(self, decoded: Tensor, pixels: Tensor) -> Tensor:
        """Return the distances [N] of pictures [N, 3, H, W] in [-1, 1].

        Raises:
            ValueError: a side is too short for the network.
        """
        if min(pixels.shape[2:]) < self.backbone.smallest_px:
            raise ValueError(
                f"frames of {pixels.shape[3]} x {pixels.shape[2]} px are too small for LPIPS with "
                f"{self.backbone.title}; both sides need at least {self.backbone.smallest_px} px"
            )
        ours, theirs = self._features(decoded), self._features(pixels)
        total = decoded.new_zeros(len(decoded))
        for lin, mine, other in zip(self.lins, ours, theirs, strict=True):
            squared = (_unit_length(mine) - _unit_length(other)).square()
            total = total + (squared * lin).sum(dim=1).mean(dim=(1, 2))
        return total

    def _features(self, pictures: Tensor) -> list[Tensor]:
        x = (pictures - self.get_buffer("shift")) / self.get_buffer("scale")
        depths = []
        for pooled, convs in zip(self.backbone.pooled, self.backbone.depths, strict=True):
            if pooled:
                x = F.max_pool2d(x, self.backbone.pool, stride=2)
            for conv in convs:
                x = F.relu(self.features[str(conv.index)](x))
            depths.append(x)
        return depths


def load_lpips(folder: str | Path) -> Lpips:
    """Return the network whose weights are in a folder.

    The folder holds torchvision's weights of one classifier (a name starting with ``alexnet`` or
    ``vgg16``, ending in .pth, .pt or .safetensors) and the lin layers of that network, named
    ``alex`` or ``vgg`` with the same endings, keys ``lin0.model.1.weight`` to ``lin4...``.

    Raises:
        ValueError: the folder is missing, holds no or two networks, or a file does not fit.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(
            f"vae_loss.perceptual_folder={folder} is not a folder; give one with the weights of "
            "LPIPS, or leave it empty for the gabor-pyramid distance"
        )
    found = {kind: _files(folder, kind) for kind in BACKBONES}
    kinds = [kind for kind, (networks, lins) in found.items() if networks and lins]
    if len(kinds) != 1:
        raise ValueError(_which(folder, kinds))
    kind = kinds[0]
    networks, lins = found[kind]
    for what, files in (("backbone", networks), ("lin layers", lins)):
        if len(files) > 1:
            names = ", ".join(path.name for path in files)
            raise ValueError(f"{folder} has several files of the {what}: {names}; leave one")
    network = Lpips(kind)
    values = _read(networks[0])
    for name, parameter in network.features.named_parameters():
        _fill(parameter, values, f"features.{name}", networks[0])
    values = _read(lins[0])
    for number, parameter in enumerate(network.lins):
        _fill(parameter, values, f"lin{number}.model.1.weight", lins[0])
    return network.eval()


def _files(folder: Path, kind: str) -> tuple[list[Path], list[Path]]:
    weights = [p for p in sorted(folder.iterdir()) if p.suffix in (".pth", ".pt", ".safetensors")]
    networks = [path for path in weights if path.name.startswith(BACKBONES[kind].files)]
    return networks, [path for path in weights if path.stem == kind]


def _which(folder: Path, kinds: list[str]) -> str:
    if kinds:
        return f"{folder} holds LPIPS with AlexNet and with VGG16; leave the files of one"
    names = sorted(path.name for path in folder.iterdir())
    listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return (
        f"{folder} holds no LPIPS: it needs alexnet*.pth and alex.pth, or vgg16*.pth and vgg.pth, "
        f"and has {listed or 'no files'}"
    )


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        values = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Damaged archives raise almost anything, from EOFError to pickle's own.
        raise ValueError(f"{path} cannot be read as weights: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, not a state dict")
    return values


@torch.no_grad()
def _fill(parameter: Tensor, values: dict[str, Tensor], key: str, path: Path) -> None:
    value = values.get(key)
    if not isinstance(value, Tensor):
        raise ValueError(f"{path} has no {key}; it is not the file that LPIPS needs")
    if value.shape != parameter.shape:
        raise ValueError(
            f"{path}: {key} has the shape {list(value.shape)}, not {list(parameter.shape)}"
        )
    if not value.isfinite().all():
        raise ValueError(f"{path}: {key} has values that are not finite; the file is damaged")
    parameter.copy_(value)


def _unit_length(features: Tensor) -> Tensor:
    # The square keeps the root's gradient finite where no feature responds, as in black areas.
    length = (features.square().sum(dim=1, keepdim=True) + SMALLEST_NORM**2).sqrt()
    return features / (length + SMALLEST_NORM)

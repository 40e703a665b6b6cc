"""A VAE on disk: config.json and model.safetensors, whose keys are the released ones."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hunyuan_train.models.vae.base import Vae
from hunyuan_train.models.vae.build import build_vae
from hunyuan_train.models.vae.config import KINDS, TEMPORAL_RATIO, VAE_884, VAE_HY15, VaeConfig

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

# Our fields by the names that the configs of the released checkpoints and of diffusers use; the
# keys of the weights need no map.
RELEASED_FIELDS = {
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "latent_channels": "latent_channels",
    "block_out_channels": "block_channels",
    "layers_per_block": "layers_per_block",
    "norm_num_groups": "norm_groups",
    "mid_block_add_attention": "mid_attention",
    "scaling_factor": "scaling_factor",
}
ONLY_884 = ("norm_groups", "mid_attention")
RELEASED_CLASSES = {VAE_884: "AutoencoderKLHunyuanVideo", VAE_HY15: "AutoencoderKLHunyuanVideo15"}
RELEASED_RATIOS = ("spatial_compression_ratio", "ffactor_spatial")
MATCHES = ("downsample_match_channel", "upsample_match_channel")


def hunyuan_15_config() -> VaeConfig:
    """Return the config of the released HunyuanVideo-1.5 VAE."""
    return VaeConfig(
        kind=VAE_HY15,
        latent_channels=32,
        block_channels=[128, 256, 512, 1024, 1024],
        scaling_factor=1.03682,
        tile_temporal=False,
    )


def load_vae(folder: Path | str, device: torch.device | str = "cpu") -> Vae:
    """Return the VAE stored in a folder, in evaluation mode.

    Args:
        folder: Holds ``config.json`` and ``model.safetensors``.
        device: Where the weights go, in the precision they are stored in.

    Raises:
        ValueError: If a file is missing or damaged or the weights do not fit the config.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder / name} does not exist; a VAE folder holds {CONFIG_FILE} and "
                f"{WEIGHTS_FILE}: train one, or make it from the released VAE with "
                "`hunyuan-train convert`"
            )
    cfg = load_vae_config(folder / CONFIG_FILE)
    with torch.device("meta"):
        vae = build_vae(cfg)
    path = folder / WEIGHTS_FILE
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); copy or make it again") from error
    check_weights(vae, state, str(path))
    vae.load_state_dict(state, assign=True)
    return vae.channels_last().eval()


def load_vae_config(path: Path) -> VaeConfig:
    """Return the config in a ``config.json`` of ours.

    Raises:
        ValueError: If the file is not JSON or has a field that VaeConfig does not know.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); copy or make it again") from error
    known = {field.name for field in dataclasses.fields(VaeConfig)}
    unknown = sorted(set(fields) - known)
    if unknown:
        raise ValueError(
            f"{path} has the unknown field {unknown[0]!r}; it must be written by this package, "
            "for example by `hunyuan-train convert`"
        )
    return VaeConfig(**fields)


def save_vae(vae: Vae, folder: Path | str) -> None:
    """Write ``config.json`` and ``model.safetensors`` so that neither is ever seen half-written."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().cpu().contiguous() for key, value in vae.state_dict().items()}
    weights = folder / (WEIGHTS_FILE + ".tmp")
    save_file(state, weights, metadata={"format": "pt"})
    weights.replace(folder / WEIGHTS_FILE)
    config = folder / (CONFIG_FILE + ".tmp")
    text = json.dumps(dataclasses.asdict(vae.cfg), indent=2) + "\n"
    config.write_text(text, encoding="utf-8")
    config.replace(folder / CONFIG_FILE)


def check_weights(vae: Vae, state: Mapping[str, Tensor], where: str) -> None:
    """Raise ValueError, naming the first wrong key, unless ``state`` fits the VAE exactly."""
    wanted = {key: list(value.shape) for key, value in vae.state_dict().items()}
    for problem, keys in (
        ("lacks", sorted(wanted.keys() - state.keys())),
        ("has the unknown key", sorted(state.keys() - wanted.keys())),
    ):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ValueError(
                f"{where} {problem} {keys[0]}{more}; it does not fit the VAE config beside it"
            )
    for key, shape in wanted.items():
        if list(state[key].shape) != shape:
            raise ValueError(
                f"{where}: {key} has shape {list(state[key].shape)}, the VAE config needs {shape}"
            )


def config_from_released(fields: Mapping[str, Any]) -> VaeConfig:
    """Return our config for the ``config.json`` of a released checkpoint or of diffusers.

    Fields without a counterpart (block types, activation, paths) are fixed in these architectures.

    Raises:
        ValueError: If the architecture is neither of the two, or one of its fields does not fit.
    """
    kind = _released_kind(fields)
    ours = {name: fields[theirs] for theirs, name in RELEASED_FIELDS.items() if theirs in fields}
    if "block_channels" in ours:
        ours["block_channels"] = list(ours["block_channels"])
    if kind == VAE_884:
        return VaeConfig(**ours)
    ours = {name: value for name, value in ours.items() if name not in ONLY_884}
    return dataclasses.replace(hunyuan_15_config(), **ours)


def config_to_released(cfg: VaeConfig) -> dict[str, Any]:
    """Return the fields of the config of the diffusers class in ``RELEASED_CLASSES`` for ours."""
    fields = {theirs: getattr(cfg, name) for theirs, name in RELEASED_FIELDS.items()}
    if cfg.kind == VAE_884:
        return fields
    fields = {theirs: v for theirs, v in fields.items() if RELEASED_FIELDS[theirs] not in ONLY_884}
    ratios = {
        "spatial_compression_ratio": cfg.spatial_ratio,
        "temporal_compression_ratio": cfg.temporal_ratio,
    }
    return fields | ratios | dict.fromkeys(MATCHES, True)


def _released_kind(fields: Mapping[str, Any]) -> str:
    """Tell the kind from the class or, where none is named, from the ratio in space."""
    ratio = next((fields[name] for name in RELEASED_RATIOS if name in fields), None)
    kinds = {value: kind for kind, value in RELEASED_CLASSES.items()}
    kind = kinds.get(fields.get("_class_name", ""))
    if kind is None:
        kind = VAE_HY15 if ratio == KINDS[VAE_HY15].spatial_ratio else VAE_884
    pace = fields.get("temporal_compression_ratio", fields.get("ffactor_temporal", TEMPORAL_RATIO))
    wanted = KINDS[kind].spatial_ratio
    if ratio not in (None, wanted) or pace != TEMPORAL_RATIO:
        raise ValueError(
            f"a VAE that shrinks space by {ratio} and time by {pace} is not one of HunyuanVideo's; "
            f"{kind} has {wanted} and {TEMPORAL_RATIO}"
        )
    for name in MATCHES:
        if kind == VAE_HY15 and not fields.get(name, True):
            raise ValueError(f"a VAE with {name}=false is not HunyuanVideo-1.5's, which has true")
    return kind

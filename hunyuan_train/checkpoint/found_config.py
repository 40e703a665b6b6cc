"""What weights on disk say of their model: by the config beside them, or by their shapes."""

import dataclasses
from pathlib import Path
from typing import Any

from hunyuan_train.checkpoint.convertible import Layout
from hunyuan_train.checkpoint.load import read_manifest
from hunyuan_train.checkpoint.pipeline_files import read_json
from hunyuan_train.checkpoint.tensor_files import is_checkpoint, open_source
from hunyuan_train.models.hunyuan.config import ImageCondition
from hunyuan_train.models.hunyuan.state_dict import (
    common_prefix,
    fields_from_diffusers,
    fields_from_shapes,
)
from hunyuan_train.models.vae.config import VaeConfig
from hunyuan_train.models.vae.state_dict import config_from_released, load_vae_config

CONFIG_NAME = "config.json"
IMAGE_TO_VIDEO = "i2v"
"""Part of the name of official folders whose model takes a first frame."""


def transformer_fields(path: Path, layout: Layout) -> dict[str, Any]:
    """Return the fields of the config of a transformer whose weights are at ``path``.

    Official weights have no config. Their shapes show all but the rotary base, which is the
    released one, and whether given frames replace noisy ones, which a folder named i2v says.

    Raises:
        ValueError: nothing there says what the model is, or it is not ours.
    """
    beside = path / CONFIG_NAME
    if layout is Layout.OURS:
        if is_checkpoint(path):
            return {k: v for k, v in read_manifest(path).identity.items() if k != "lora"}
        if not beside.is_file():
            raise ValueError(f"{path} has no {CONFIG_NAME} that says what it is; give model=NAME")
        return read_json(beside)
    if layout is Layout.DIFFUSERS:
        stored = read_json(beside)
        try:
            return fields_from_diffusers(stored)
        except ValueError as error:
            raise ValueError(f"{beside}: {error}") from error
    if beside.is_file() and "hidden_size" in (stored := read_json(beside)):
        return stored
    infos = open_source(path, ema=False).infos
    prefix = common_prefix(infos)
    try:
        fields = fields_from_shapes({k.removeprefix(prefix): i.shape for k, i in infos.items()})
    except ValueError as error:
        raise ValueError(f"{path} is no transformer in the official layout: {error}") from error
    names = (path.resolve().name, *(parent.name for parent in path.resolve().parents[:3]))
    if "image_condition" not in fields and any(IMAGE_TO_VIDEO in name.lower() for name in names):
        fields["image_condition"] = ImageCondition.token_replace.value
    return fields


def vae_config(path: Path, layout: Layout) -> VaeConfig | None:
    """Return the VAE's config that lies beside its weights in a layout; None without one."""
    beside = (path if path.is_dir() else path.parent) / CONFIG_NAME
    if not beside.is_file():
        return None
    if layout is Layout.OURS:
        return load_vae_config(beside)
    stored = read_json(beside)
    cfg = config_from_released(stored)
    tiles = {"sample_size": "tile_size_px", "sample_tsize": "tile_frames"}
    if layout is Layout.OFFICIAL:
        changes = {ours: stored[name] for name, ours in tiles.items() if name in stored}
        cfg = dataclasses.replace(cfg, **changes)
    return cfg

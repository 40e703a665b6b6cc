"""``doctor encoders``: the folders of VAE and text encoders, and what they make of fixed inputs."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hunyuan_train.config.root import RunConfig
from hunyuan_train.data.parts import write_text
from hunyuan_train.encoders.config import TextEncoderKind
from hunyuan_train.encoders.templates import (
    MEDIA,
    PICTURE_TEMPLATE,
    TEMPLATES,
    check_template,
)
from hunyuan_train.encoders.text import TextEncoder, build_text_encoder
from hunyuan_train.encoders.weights import check_folders
from hunyuan_train.engine.precompute import build_latent_encoder
from hunyuan_train.runtime.device import resolve_device

EXPECTATIONS = "expectations.json"
TOLERANCES = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.1}
"""Largest departure of a value over the root mean square of its tensor: another device or another
version of a library rounds otherwise; a wrong tensor is off by about 1."""
_FIRST = 16
_CAPTIONS = (
    "",
    "A red fox crosses a snowy field at dawn.",
    "A slow pan over a harbour.\n\nBoats rock, gulls circle, the light turns from grey to gold.",
)

Made = dict[str, dict[str, Any]]
"""By input: size, norm and first values of what an encoder makes of it."""


@dataclass(kw_only=True, slots=True)
class EncoderCheckup:
    """What was found out."""

    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def text(self) -> str:
        """Return what is there, a sentence for each thing not checked and for each failed check."""
        rows = [*self.lines, *(f"WARNING {warning}" for warning in self.warnings)]
        rows += [f"FAILED {complaint}" for complaint in self.complaints]
        return "\n".join(rows if self.complaints else [*rows, "all checks hold"])

    def attempt(self, check: Callable[[], None]) -> bool:
        """Run a check; its ValueError becomes a complaint. Return whether it held."""
        try:
            check()
        except ValueError as error:
            self.complaints.append(" ".join(str(error).split()))
            return False
        return True


def check_encoders(cfg: RunConfig, write: bool = False) -> EncoderCheckup:
    """Check what ``run.vae`` and ``text`` name: files, sizes, tokenizers, templates, results.

    Args:
        cfg: The run's config.
        write: Store what the encoders make of the fixed inputs, for other machines to compare.
    """
    checkup = EncoderCheckup()
    device = resolve_device(cfg.run.device, 0)
    made: dict[str, Made] = {}
    with torch.no_grad():
        checkup.attempt(lambda: made.update(vae=_try_vae(cfg, device, checkup)))
        for media, template in (*TEMPLATES.items(), ("image-to-video", PICTURE_TEMPLATE)):
            if checkup.attempt(lambda m=media, t=template: check_template(m, t)):
                checkup.lines.append(
                    f"template {media}: {template.num_chars} characters, SHA-256 "
                    f"{template.sha256[:16]}, as released"
                )
        complaints = check_folders(cfg.text)
        checkup.complaints += [" ".join(complaint.split()) for complaint in complaints]
        if not complaints:
            checkup.attempt(lambda: made.update(text=_try_text(cfg, device, checkup)))
    for name, inputs in made.items():
        checkup.complaints += [
            f"{name}: what it makes of {key} is not finite; its weights are damaged, or "
            "text.dtype=bfloat16 is needed"
            for key, row in inputs.items()
            if not row["finite"]
        ]
    if write and not checkup.complaints:
        write_text(expectations_path(cfg), json.dumps(made, indent=2) + "\n")
        checkup.lines.append(f"wrote {expectations_path(cfg)}")
    elif not write:
        _compare(made, expectations_path(cfg), checkup)
    return checkup


def expectations_path(cfg: RunConfig) -> Path:
    """Return the file with the expectations: named, or beside the text encoder or the VAE."""
    if cfg.text.expectations:
        return Path(cfg.text.expectations)
    builtin = cfg.text.kind is TextEncoderKind.builtin
    return Path(cfg.run.vae if builtin else cfg.text.llm_folder) / EXPECTATIONS


def _try_vae(cfg: RunConfig, device: torch.device, checkup: EncoderCheckup) -> Made:
    if not cfg.run.vae:
        raise ValueError("run.vae is empty; set it to the folder of the VAE")
    vae = build_latent_encoder(cfg.run.vae, device)
    made: Made = {}
    for frames in (1, 5):
        mean, std = vae.encode([_pixels(frames)])
        made[f"{frames} frames, mean"] = _summary(mean, vae.dtype)
        made[f"{frames} frames, std"] = _summary(std, vae.dtype)
    if mean.shape[1] != cfg.vae.latent_channels:
        raise ValueError(
            f"run.vae={cfg.run.vae} makes {mean.shape[1]} latent channels, but "
            f"vae.latent_channels={cfg.vae.latent_channels}; name another folder"
        )
    checkup.lines.append(
        f"vae {cfg.run.vae}: {mean.shape[1]} channels, {vae.dtype}, weights {vae.fingerprint}"
    )
    return made


def _try_text(cfg: RunConfig, device: torch.device, checkup: EncoderCheckup) -> Made:
    text: TextEncoder = build_text_encoder(cfg.text, device)
    dtype = "float32" if cfg.text.kind is TextEncoderKind.builtin else str(cfg.text.dtype)
    made: Made = {}
    for media in MEDIA:
        for number, caption in enumerate(_CAPTIONS):
            features = text.encode([caption], media)
            _add_features(made, f"{media} caption {number}", features, dtype)
    if text.sees_images:
        for number, caption in enumerate(_CAPTIONS):
            features = text.encode([caption], "video", [_pixels(1)[0]])
            _add_features(made, f"picture and caption {number}", features, dtype)
    checkup.lines.append(
        f"text {cfg.text.kind}: {text.text_length} tokens x {text.text_dim}, pooled "
        f"{text.pooled_dim}, {dtype}, {text.fingerprint}"
    )
    return made


def _add_features(made: Made, name: str, features: Any, dtype: str) -> None:
    states = features.states[features.mask]
    made[f"{name}, states"] = _summary(states, dtype)
    made[f"{name}, pooled"] = _summary(features.pooled, dtype)


def _pixels(frames: int) -> np.ndarray:
    """Return a clip that is the same everywhere, uint8 [frames, 64, 64, 3]."""
    place = np.indices((frames, 64, 64, 3)).astype(np.int64)
    return ((place[0] * 37 + place[1] * 5 + place[2] * 3 + place[3] * 91) % 256).astype(np.uint8)


def _summary(values: Tensor, dtype: object) -> dict[str, Any]:
    flat = values.detach().float().cpu().flatten()
    step = max(1, len(flat) // _FIRST)
    return {
        "size": list(values.shape),
        "norm": float(flat.norm()),
        "values": flat[::step][:_FIRST].tolist(),
        "dtype": str(dtype).removeprefix("torch."),
        "finite": bool(flat.isfinite().all()),
    }


def _compare(made: dict[str, Made], path: Path, checkup: EncoderCheckup) -> None:
    """Add a complaint for each encoder that departs from the expectations."""
    if not path.is_file():
        checkup.warnings.append(
            f"{path} does not exist, so the encoders ran but their results were compared with "
            "nothing; run `hunyuan-train doctor encoders write=true` where they are known to be "
            "good, and copy it here"
        )
        return
    try:
        expected: dict[str, Made] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        checkup.complaints.append(f"{path} is not valid JSON ({error}); write it again")
        return
    for name, inputs in made.items():
        worst, where = 0.0, ""
        for key, row in inputs.items():
            wanted = expected.get(name, {}).get(key)
            if wanted is None or wanted["size"] != row["size"]:
                found = "nothing" if wanted is None else f"a result of size {wanted['size']}"
                checkup.complaints.append(
                    f"{name}: {path} expects {found} of {key}, found {row['size']}; other settings "
                    "made it, or another encoder is here"
                )
                break
            error = _departure(row, wanted)
            if error >= worst:
                worst, where = error, key
        else:
            if worst > 1:
                checkup.complaints.append(
                    f"{name}: departs from {path} by {worst:.3g} times what rounding explains, "
                    f"most of all for {where}; the weights or a library's version are others"
                )
            else:
                checkup.lines.append(f"{name}: as expected, {worst:.2g} of the tolerance")


def _departure(row: dict[str, Any], wanted: dict[str, Any]) -> float:
    """Return the largest departure over what the two number formats allow."""
    allowed = max(TOLERANCES.get(kind, 0.1) for kind in (row["dtype"], wanted["dtype"]))
    scale = max(wanted["norm"] / max(1, int(np.prod(wanted["size"]))) ** 0.5, 1e-12)
    errors = np.abs(np.subtract(row["values"], wanted["values"])) / scale
    norm = abs(row["norm"] - wanted["norm"]) / max(wanted["norm"], 1e-12)
    worst = max(float(errors.max(initial=0.0)), norm) / allowed
    return worst if np.isfinite(worst) else float("inf")

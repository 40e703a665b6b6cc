"""Whole models on disk: transformer, its moving average, VAE and sampler, in one folder.

| part | official | diffusers and ours |
|---|---|---|
| transformer | `transformers/mp_rank_00_model_states.pt`, entry `module` | `transformer/` |
| its moving average | the same file, entry `ema` | `transformer_ema/` |
| VAE | `vae/pytorch_model.pt` | `vae/` |
| sampler | | `scheduler/` |

The folder of a run has the first two in its newest checkpoint, and names the VAE in its config.
"""

import json
import shutil
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path

import torch

from hunyuan_train.checkpoint.convertible import ADAPTERS, Convertible, Layout, diffusers_vae_class
from hunyuan_train.checkpoint.export import CONFIG_NAME, MAX_SHARD_BYTES, Conversion, prepare
from hunyuan_train.checkpoint.pickle_writer import write_pickle
from hunyuan_train.checkpoint.pipeline_files import read_shift, write_index, write_scheduler
from hunyuan_train.models.hunyuan.config import HunyuanConfig
from hunyuan_train.models.vae.config import VaeConfig

TRANSFORMER, AVERAGE, VAE = "transformer", "transformer_ema", "vae"
OFFICIAL_TRANSFORMER = "transformers"
OFFICIAL_WEIGHTS = "mp_rank_00_model_states.pt"
OFFICIAL_VAE_WEIGHTS = "pytorch_model.pt"
GIB = 1 << 30


class Sets(StrEnum):
    """Which weights of a transformer are converted."""

    LAST = "false"
    AVERAGE = "true"
    """The moving average, in place of the last ones."""
    BOTH = "both"


@dataclass(frozen=True, slots=True)
class Place:
    """Where one set of weights is."""

    path: Path
    ema: bool = False
    """Whether it is the one called ema there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """Where the parts of a whole model are."""

    layout: Layout
    transformer: Place
    average: Place | None
    vae: Path
    shift: float | None
    """Shift of the sampler; None if nothing there says it."""


def find_parts(folder: Path, layout: Layout, vae: Path | None, shift: float | None) -> Parts:
    """Find the parts of a model in its folder.

    Args:
        folder: In the official, the diffusers or our layout.
        layout: Which of them.
        vae: Folder of the VAE in place of the one there.
        shift: Shift in place of the one there.

    Raises:
        ValueError: a part is missing.
    """
    if not folder.is_dir():
        raise ValueError(f"input={folder} is not a folder, which model=pipeline reads")
    name = OFFICIAL_TRANSFORMER if layout is Layout.OFFICIAL else TRANSFORMER
    inner = sorted(folder.glob(f"hunyuan-video-*/{name}")) if layout is Layout.OFFICIAL else []
    if len(inner) == 1 and not (folder / name).is_dir():
        folder = inner[0].parent
    if not (folder / name).is_dir():
        raise ValueError(
            f"{folder} has no folder {name}, so it is no whole model in the {layout} layout; for "
            "weights alone give model=transformer or model=vae"
        )
    if vae is None:
        vae = folder / VAE
        if not vae.is_dir():
            raise ValueError(f"{folder} has no folder {VAE}; name the VAE's with vae=FOLDER")
    average = None
    if layout is Layout.OFFICIAL:
        average = Place(folder / name, ema=True)
    elif (folder / AVERAGE).is_dir():
        average = Place(folder / AVERAGE)
    return Parts(
        layout=layout,
        transformer=Place(folder / name),
        average=average,
        vae=vae,
        shift=shift or read_shift(folder),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderOptions:
    """How a whole model is written."""

    target: Layout
    shift: float | None
    """Shift of the sampler; the official layout has none."""
    sets: Sets = Sets.LAST
    dtype: torch.dtype | None = None
    """Type of the transformer; None keeps the types there are, and makes float8 bfloat16."""
    vae_dtype: torch.dtype | None = None
    max_shard_bytes: int = MAX_SHARD_BYTES


def convert_folder(
    parts: Parts,
    transformer: Convertible,
    vae: Convertible,
    output: Path,
    options: FolderOptions,
) -> list[Path]:
    """Convert a whole model and return the files written; all input is checked before the first.

    Raises:
        ValueError: one line naming the part and what does not fit.
    """
    if options.target in ADAPTERS:
        raise ValueError(f"to={options.target} writes adapters alone; give model=transformer")
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(f"output={output} is not empty; choose a new folder")
    if options.sets is not Sets.LAST and parts.average is None:
        raise ValueError(
            f"{parts.transformer.path.parent} has no {AVERAGE}; leave out ema={options.sets}"
        )
    main = parts.average if options.sets is Sets.AVERAGE else parts.transformer
    places = [main, parts.average] if options.sets is Sets.BOTH else [main]
    fit = partial(prepare, source=parts.layout, target=options.target)
    weights = [
        fit(transformer, place.path, ema=place.ema, dtype=options.dtype)
        for place in places
        if place is not None
    ]
    vae_weights = fit(vae, parts.vae, dtype=options.vae_dtype)
    _check_space(output, [*weights, vae_weights])
    if options.target is Layout.OFFICIAL:
        return _write_official(output, weights, vae_weights)
    return _write_folders(output, weights, vae_weights, options)


def _check_space(output: Path, conversions: list[Conversion]) -> None:
    sizes = [sum(i.num_bytes for i in each.infos.values()) for each in conversions]
    needed = sum(sizes)
    if conversions[0].target is Layout.OFFICIAL:  # see write_pickle
        needed += max(sum(sizes[:-1]), sizes[-1])
    output.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(output).free) < needed:
        raise ValueError(
            f"output={output} needs {needed / GIB:.1f} GiB, but its disk has {free / GIB:.1f} GiB "
            "free"
        )


def _write_official(output: Path, weights: list[Conversion], vae: Conversion) -> list[Path]:
    """Write what the official code loads, and our config, which says what shapes do not."""
    sections = dict(zip(("module", "ema"), weights, strict=False))
    files = [
        write_pickle(
            output / OFFICIAL_TRANSFORMER / OFFICIAL_WEIGHTS,
            {name: each.infos for name, each in sections.items()},
            {name: each.tensors() for name, each in sections.items()},
        ),
        write_pickle(
            output / VAE / OFFICIAL_VAE_WEIGHTS,
            {"state_dict": vae.infos},
            {"state_dict": vae.tensors()},
        ),
    ]
    configs = {
        OFFICIAL_TRANSFORMER: weights[0].model.stored_config(Layout.OURS),
        VAE: vae.model.stored_config(Layout.OFFICIAL),
    }
    for folder, config in configs.items():
        path = output / folder / CONFIG_NAME
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        files.append(path)
    return files


def _write_folders(
    output: Path, weights: list[Conversion], vae: Conversion, options: FolderOptions
) -> list[Path]:
    files: list[Path] = []
    for folder, each in zip((TRANSFORMER, AVERAGE), weights, strict=False):
        files += each.write(output / folder, options.max_shard_bytes)
    files += vae.write(output / VAE, options.max_shard_bytes)
    assert options.shift is not None
    files.append(write_scheduler(output, options.shift))
    if options.target is Layout.DIFFUSERS:
        dit, autoencoder = weights[0].model.config, vae.model.config
        assert isinstance(dit, HunyuanConfig)
        assert isinstance(autoencoder, VaeConfig)
        files.append(write_index(output, dit.image_condition, diffusers_vae_class(autoencoder)))
    return files

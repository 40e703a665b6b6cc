"""The small files of a diffusers folder: its scheduler, and the index of its parts."""

import json
from pathlib import Path
from typing import Any

from hunyuan_train.models.hunyuan.config import ImageCondition

INDEX_NAME = "model_index.json"
SCHEDULER_NAME = "scheduler/scheduler_config.json"
SCHEDULER_CLASS = "FlowMatchEulerDiscreteScheduler"

# What their scheduler does besides moving the steps by `shift`; our sampler does none of it.
_UNSUPPORTED = (
    "use_dynamic_shifting",
    "invert_sigmas",
    "shift_terminal",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "stochastic_sampling",
)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ValueError: it is missing, is not JSON, or holds something else.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; copy it again") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); copy it again") from error
    if not isinstance(stored, dict):
        raise ValueError(f"{path} holds a {type(stored).__name__}, expected an object")
    return stored


def read_shift(folder: Path) -> float | None:
    """Return the shift of the scheduler in a model's folder; None if the folder has none.

    Raises:
        ValueError: it is a scheduler whose noise levels our sampler does not have.
    """
    path = folder / SCHEDULER_NAME
    if not path.is_file():
        return None
    stored = read_json(path)
    if stored.get("_class_name", SCHEDULER_CLASS) != SCHEDULER_CLASS:
        raise ValueError(
            f"{path}: the scheduler is {stored['_class_name']}, and our sampler is that of "
            f"{SCHEDULER_CLASS} alone; name the shift to use with shift="
        )
    if used := [name for name in _UNSUPPORTED if stored.get(name)]:
        raise ValueError(
            f"{path}: {used[0]} is {stored[used[0]]}, which our sampler does not do; name the "
            "shift to use with shift="
        )
    return float(stored.get("shift", 1.0))


def write_scheduler(folder: Path, shift: float) -> Path:
    """Write the scheduler that takes the steps of our sampler."""
    path = folder / SCHEDULER_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = {"_class_name": SCHEDULER_CLASS, "num_train_timesteps": 1000, "shift": shift}
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    return path


def write_index(folder: Path, condition: ImageCondition, vae_class: str) -> Path:
    """Write ``model_index.json``, by which ``DiffusionPipeline.from_pretrained`` finds the parts.

    Text encoders and tokenizers are entered as absent: they are given when the pipeline is loaded.

    Args:
        folder: Folder of the model.
        condition: What decides between the classes of the pipeline.
        vae_class: Class of the VAE.
    """
    absent = ["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"]
    name = "HunyuanVideoPipeline"
    if condition is not ImageCondition.none:
        name = "HunyuanVideoImageToVideoPipeline"
        absent.append("image_processor")
    parts = {
        "scheduler": SCHEDULER_CLASS,
        "transformer": "HunyuanVideoTransformer3DModel",
        "vae": vae_class,
    }
    index = {
        "_class_name": name,
        **{part: ["diffusers", kind] for part, kind in parts.items()},
        **{part: [None, None] for part in absent},
    }
    path = folder / INDEX_NAME
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return path

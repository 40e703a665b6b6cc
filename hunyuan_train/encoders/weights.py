"""Local folders of pretrained encoders: what must be in them, and a fingerprint of what is."""

import hashlib
import json
from pathlib import Path
from typing import Any

from hunyuan_train.encoders.config import TextEncoderConfig, TextEncoderKind

LLM = "the LLaMA-3-8B language part of xtuner/llava-llama-3-8b-v1_1-transformers"
LLAVA = "the whole of xtuner/llava-llama-3-8b-v1_1-transformers"
CLIP = "openai/clip-vit-large-patch14"
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json")
_TEXT_FILES = ("*.json", "*.txt", "*.model")
_SAMPLES_PER_FILE = 16
_SAMPLE_BYTES = 65_536


def check_folder(field: str, folder: str, contents: str, model_types: tuple[str, ...]) -> None:
    """Raise ValueError unless `folder` holds a model of a known type with weights and tokenizer.

    Args:
        field: config path of the folder, for the message.
        folder: local path.
        contents: what belongs there, for the message.
        model_types: accepted values of `model_type` in its config.json.
    """
    fix = f"put {contents} there (config.json, weights and tokenizer files in one folder)"
    if not folder:
        raise ValueError(f"{field} is not set; name a local folder and {fix}")
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"{field}={folder} is not a folder; {fix}")
    if not (path / "config.json").is_file():
        raise ValueError(f"{field}={folder} has no config.json; {fix}")
    model_type = _read_json(field, path / "config.json").get("model_type", "")
    if model_type not in model_types:
        raise ValueError(
            f"{field}={folder} holds a model of type {model_type!r}, expected "
            f"{' or '.join(map(repr, model_types))}; {fix}"
        )
    if not weight_files(path):
        raise ValueError(f"{field}={folder} has no weights ({' or '.join(_WEIGHTS)}); {fix}")
    for index in sorted(path.glob("*.index.json")):
        shards = sorted(set(_read_json(field, index).get("weight_map", {}).values()))
        missing = [shard for shard in shards if not (path / shard).is_file()]
        if missing:
            raise ValueError(
                f"{field}={folder} lacks {missing[0]}, one of {len(shards)} weight files that "
                f"{index.name} lists; {fix}"
            )
    if not any((path / name).is_file() for name in _TOKENIZER):
        raise ValueError(f"{field}={folder} has no tokenizer ({' or '.join(_TOKENIZER)}); {fix}")


def check_folders(cfg: TextEncoderConfig) -> list[str]:
    """Return a sentence for each folder of ``cfg`` that is not what the encoder needs."""
    if cfg.kind is TextEncoderKind.builtin:
        return []
    complaints: list[str] = []
    llm, types = (LLAVA, ("llava",)) if cfg.sees_images else (LLM, ("llama", "llava"))
    for field, contents, model_types in (
        ("llm_folder", llm, types),
        ("clip_folder", CLIP, ("clip", "clip_text_model")),
    ):
        try:
            check_folder(f"text.{field}", getattr(cfg, field), contents, model_types)
        except ValueError as error:
            complaints.append(str(error))
    return complaints


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a folder, sorted by name."""
    return sorted(file for pattern in _WEIGHTS for file in folder.glob(pattern))


def folder_fingerprint(folder: str) -> str:
    """Hash the configuration and tokenizer files in full and the weights by samples.

    Reading 16 GB to name the weights would take longer than encoding a small data set. The size,
    the start of each file (the safetensors header) and 16 pieces spread over it tell releases and
    full fine-tunings apart.

    Returns:
        Hex digest that does not depend on where the folder lies.
    """
    path = Path(folder)
    digest = hashlib.sha256()
    for file in sorted({file for pattern in _TEXT_FILES for file in path.glob(pattern)}):
        digest.update(f"{file.name}\0".encode() + file.read_bytes())
    for file in weight_files(path):
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as stream:
            for number in range(_SAMPLES_PER_FILE):
                stream.seek(number * max(size - _SAMPLE_BYTES, 0) // (_SAMPLES_PER_FILE - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _read_json(field: str, file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{field}: {file} is not valid JSON ({error}); copy it again") from error

"""The built-in encoder, the feature container, and messages about missing encoder folders."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hunyuan_train.encoders.config import TextEncoderConfig, TextEncoderKind
from hunyuan_train.encoders.features import concatenate
from hunyuan_train.encoders.text import TextEncoder, build_text_encoder


def builtin(**changes: int) -> TextEncoder:
    sizes = {"max_length": 16, "text_dim": 64, "pooled_dim": 64, **changes}
    return build_text_encoder(TextEncoderConfig(kind=TextEncoderKind.builtin, **sizes))


def test_shapes_and_mask() -> None:
    features = builtin(pooled_dim=48).encode(["a red circle", "Moving left, slowly!"], "video")
    assert features.states.shape == (2, 16, 64)
    assert features.pooled.shape == (2, 48)
    assert features.mask.dtype == torch.bool
    assert features.mask.sum(dim=1).tolist() == [3, 3]
    assert features.mask[:, :3].all()
    assert not features.states[~features.mask].any()


def test_scale_is_about_one() -> None:
    captions = ["a red circle moving left", "the green square moves up and down"]
    features = builtin().encode(captions, "video")
    assert 0.8 < features.states[features.mask].std() < 1.3
    torch.testing.assert_close(features.pooled.square().mean(dim=1), torch.ones(2))


def test_a_word_has_the_same_content_wherever_it_stands() -> None:
    encoder = builtin()
    states = encoder.encode(["red circle", "circle red", "RED"], "video").states
    # Content plus position code: red at 0, circle at 0, and the two swapped at 1.
    torch.testing.assert_close(states[0, 0], states[2, 0])
    torch.testing.assert_close(
        states[0, 0] + states[0, 1], states[1, 0] + states[1, 1], rtol=0, atol=1e-5
    )
    assert not torch.allclose(states[0, 0], states[1, 1])  # but order is visible


def test_words_are_nearly_orthogonal() -> None:
    words = [
        "red",
        "green",
        "blue",
        "yellow",
        "circle",
        "square",
        "triangle",
        "star",
        "left",
        "right",
        "up",
        "down",
    ]
    states = builtin().encode(words, "image").pooled
    unit = states / states.norm(dim=1, keepdim=True)
    cosines = [float(unit[i] @ unit[j]) for i, j in itertools.combinations(range(len(words)), 2)]
    assert max(map(abs, cosines)) < 0.5
    assert sum(abs(c) for c in cosines) / len(cosines) < 0.15


def test_positions_are_told_apart() -> None:
    states = builtin().encode(["red " * 16], "image").states[0]
    distances = torch.cdist(states, states) + 10 * torch.eye(16)
    assert distances.min() > 0.3


def test_empty_caption_has_one_token_of_its_own() -> None:
    features = builtin().encode(["", "?!", "empty", "a"], "video")
    assert features.mask.sum(dim=1).tolist() == [1, 1, 1, 1]
    assert torch.equal(features.states[0], features.states[1])
    assert not torch.equal(features.states[0], features.states[2])
    assert features.pooled[0].norm() > 1


def test_long_caption_is_cut_and_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    encoder = builtin(max_length=3)
    features = encoder.encode(["one two three four", "one two three", "a b c d e"], "video")
    assert features.mask.all()
    assert torch.equal(features.states[0], features.states[1])
    assert caplog.text.count("is cut to text.max_length=3") == 1


def test_features_are_the_same_in_another_process() -> None:
    code = (
        "from hunyuan_train.encoders.config import *\n"
        "from hunyuan_train.encoders.text import *\n"
        "c = TextEncoderConfig(kind=TextEncoderKind.builtin, max_length=16, text_dim=64,"
        " pooled_dim=64)\n"
        "f = build_text_encoder(c).encode(['a red circle'], 'image')\n"
        "print(f.states.double().sum().item(), f.pooled[0, 0].item())"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    features = builtin().encode(["a red circle"], "image")
    expected = (features.states.double().sum().item(), features.pooled[0, 0].item())
    assert tuple(map(float, done.stdout.split())) == expected


def test_fingerprint_follows_the_sizes() -> None:
    assert builtin().fingerprint == builtin().fingerprint
    others = {builtin(**{name: 32}).fingerprint for name in ("max_length", "text_dim")}
    assert len(others | {builtin().fingerprint}) == 3


def test_media_is_checked() -> None:
    with pytest.raises(ValueError, match="media='sound' is not known"):
        builtin().encode(["a"], "sound")


def test_select_and_concatenate() -> None:
    features = builtin().encode(["red", "green circle", "blue"], "image")
    picked = features.select([2, 0, 2])
    assert len(picked) == 3
    assert torch.equal(picked.pooled, features.pooled[[2, 0, 2]])
    assert torch.equal(picked.mask, features.mask[[2, 0, 2]])
    joined = concatenate([features.select([0]), features.select([1, 2])])
    assert torch.equal(joined.states, features.states)


@pytest.mark.parametrize("name", ["max_length", "text_dim", "pooled_dim", "batch_size"])
def test_sizes_are_checked(name: str) -> None:
    with pytest.raises(ValueError, match=rf"text\.{name}=0 must be at least 1"):
        TextEncoderConfig(**{name: 0})


def _folder(path: Path, *files: str, model_type: str = "llama") -> str:
    path.mkdir()
    if "no_config" not in files:
        (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    for file in files:
        (path / file).write_bytes(b"")
    return str(path)


def _build(llm_folder: str, clip_folder: str) -> None:
    build_text_encoder(
        TextEncoderConfig(
            kind=TextEncoderKind.hunyuan, llm_folder=llm_folder, clip_folder=clip_folder
        )
    )


def test_missing_folders_say_what_to_put_where(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"text\.llm_folder is not set; .* put the LLaMA-3-8B"):
        _build("", "")
    with pytest.raises(ValueError, match=r"text\.llm_folder=/nowhere is not a folder; put the LL"):
        _build("/nowhere", "")
    complete = _folder(tmp_path / "llm", "model.safetensors", "tokenizer.json")
    message = r"text\.clip_folder is not set; .* put openai/clip-vit-large-patch14 there"
    with pytest.raises(ValueError, match=message):
        _build(complete, "")


def test_missing_files_are_named(tmp_path: Path) -> None:
    cases = {
        "no config.json": _folder(tmp_path / "a", "no_config"),
        "no weights": _folder(tmp_path / "b", "tokenizer.json"),
        "no tokenizer": _folder(tmp_path / "c", "model.safetensors"),
        "holds a model of type 'bert'": _folder(tmp_path / "d", model_type="bert"),
    }
    for message, folder in cases.items():
        with pytest.raises(ValueError, match=rf"text\.llm_folder=.* {message}"):
            _build(folder, "")


def test_missing_weight_shard_and_broken_json_are_named(tmp_path: Path) -> None:
    shards = [f"model-{n:05d}-of-00002.safetensors" for n in (1, 2)]
    folder = _folder(tmp_path / "llm", shards[0], "tokenizer.json")
    index = {"weight_map": {"a": shards[0], "b": shards[1]}}
    (tmp_path / "llm" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"lacks {shards[1]}, one of 2 weight files"):
        _build(folder, "")
    (tmp_path / "llm" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        _build(folder, "")

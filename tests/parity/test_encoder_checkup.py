"""``doctor encoders`` on tiny random encoders: what holds, and one sentence for each fault."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_llava_features import TOKENS, llava_folder
from test_text_features import MAX_LENGTH, POOLED_DIM, TEXT_DIM, clip_folder, llm_folder

from hunyuan_train.cli.doctor import main
from hunyuan_train.models.vae.config import VaeConfig
from hunyuan_train.models.vae.model import CausalVae3D
from hunyuan_train.models.vae.state_dict import save_vae

__all__ = ["clip_folder", "llava_folder", "llm_folder"]


@pytest.fixture
def vae_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    cfg = VaeConfig(block_channels=[8, 8, 8, 8], norm_groups=4, layers_per_block=1)
    save_vae(CausalVae3D(cfg).eval(), tmp_path / "vae")
    return tmp_path / "vae"


def doctor(capsys, vae: Path, llm: Path, clip: Path, *more: str) -> tuple[int, str]:
    sizes = f"text.max_length={MAX_LENGTH} text.text_dim={TEXT_DIM} model.text_dim={TEXT_DIM}"
    pooled = f"text.pooled_dim={POOLED_DIM} model.pooled_dim={POOLED_DIM} run.device=cpu"
    folders = f"run.vae={vae} text.llm_folder={llm} text.clip_folder={clip}"
    code = main(["encoders", *f"{sizes} {pooled} {folders} text.kind=hunyuan".split(), *more])
    return code, capsys.readouterr().out


def test_good_folders_hold_and_a_changed_weight_is_found(
    capsys, vae_folder: Path, llm_folder: Path, clip_folder: Path
) -> None:
    folders = (vae_folder, llm_folder, clip_folder)
    code, said = doctor(capsys, *folders)
    assert code == 0
    assert "WARNING" in said
    assert "expectations.json does not exist" in said
    assert said.count("as released") == 3
    code, said = doctor(capsys, *folders, "write=true")
    assert (code, "wrote" in said) == (0, True)
    code, said = doctor(capsys, *folders)
    assert (code, said.count("as expected"), "WARNING" in said) == (0, 2, False)
    # In another number format the results are others, within what that explains.
    code, said = doctor(capsys, *folders, "text.dtype=bfloat16")
    assert code == 0, said
    for folder, name in ((vae_folder, "vae"), (clip_folder, "text")):
        (file,) = folder.glob("*.safetensors")
        kept = file.read_bytes()
        weights = load_file(file)
        key = max(weights, key=lambda key: weights[key].numel())
        weights[key] = weights[key].flip(0).contiguous()
        save_file(weights, file, {"format": "pt"})
        code, said = doctor(capsys, *folders)
        (failed,) = [line for line in said.splitlines() if line.startswith("FAILED")]
        assert code == 1
        assert f"{name}: departs from" in failed
        file.write_bytes(kept)


def test_each_fault_is_one_line(capsys, vae_folder: Path, llm_folder: Path, tmp_path: Path) -> None:
    (vae_folder / "config.json").unlink()
    code, said = doctor(capsys, vae_folder, llm_folder, tmp_path / "none", "text.kind=llava")
    failed = [line for line in said.splitlines() if line.startswith("FAILED")]
    assert (code, len(failed)) == (1, 3)
    assert "config.json" in failed[0]
    assert "holds a model of type 'llama', expected 'llava'" in failed[1]
    assert "text.clip_folder" in failed[2]


def test_the_encoder_that_sees_is_shown_a_picture(
    capsys, vae_folder: Path, llava_folder: Path, clip_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "expected.json"
    more = ("text.kind=llava", f"text.image_tokens={TOKENS}", f"text.expectations={path}")
    folders = (vae_folder, llava_folder, clip_folder)
    assert doctor(capsys, *folders, *more, "write=true")[0] == 0
    expected = json.loads(path.read_text())
    assert "picture and caption 1, states" in expected["text"]
    assert doctor(capsys, *folders, *more)[0] == 0
    code, said = doctor(capsys, *folders, *more, "text.image_stride=4")
    assert code == 1
    assert "FAILED text: " in said
    assert "expects a result of size" in said

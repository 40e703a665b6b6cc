"""Whole model folders converted: every direction and back, one group in memory, what is missing."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hunyuan_train.checkpoint import export
from hunyuan_train.checkpoint.config import CheckpointConfig
from hunyuan_train.checkpoint.manager import CheckpointManager
from hunyuan_train.cli.convert import main, model_config
from hunyuan_train.config.compose import compose_config, config_dict, save_config
from hunyuan_train.models.hunyuan.config import HunyuanConfig, ImageCondition
from hunyuan_train.models.hunyuan.model import HunyuanVideo
from hunyuan_train.models.hunyuan.state_dict import (
    diffusers_config,
    fields_from_diffusers,
    fields_from_shapes,
    hunyuan_links,
)
from hunyuan_train.models.vae.config import VaeConfig
from hunyuan_train.models.vae.model import CausalVae3D
from hunyuan_train.models.vae.state_dict import load_vae, save_vae

SIZES = {
    "hidden_size": 48,
    "num_heads": 3,
    "num_double_blocks": 2,
    "num_single_blocks": 1,
    "in_channels": 4,
    "out_channels": 4,
    "rope_axes": [4, 6, 6],
    "text_dim": 10,
    "pooled_dim": 6,
    "refiner_depth": 1,
    "guidance_embed": True,
}
VAE = VaeConfig(
    latent_channels=4,
    block_channels=[8, 8, 8, 8],
    layers_per_block=1,
    norm_groups=4,
    scaling_factor=0.7,
    tile_size_px=128,
)
AXES = "model.rope_axes=[4,6,6]"
WEIGHTS = Path("transformers") / "mp_rank_00_model_states.pt"
QKV = "double_blocks.1.img_attn_qkv.weight"


def random_state(cfg: HunyuanConfig, seed: int) -> dict[str, Tensor]:
    """Random weights, in bfloat16 but for the final projection, as released."""
    torch.manual_seed(seed)
    weights = {k: torch.randn(v.shape) for k, v in HunyuanVideo(cfg).state_dict().items()}
    return {
        k: v if k.startswith("final_layer.linear") else v.bfloat16() for k, v in weights.items()
    }


@pytest.fixture(scope="module")
def states() -> dict[str, dict[str, Tensor]]:
    cfg = HunyuanConfig(**SIZES)
    return {"module": random_state(cfg, 0), "ema": random_state(cfg, 1)}


@pytest.fixture(scope="module")
def vae_state() -> dict[str, Tensor]:
    torch.manual_seed(2)
    return {k: torch.randn_like(v).half() for k, v in CausalVae3D(VAE).state_dict().items()}


def released_vae_config() -> dict:
    """The fields of a released config.json, with our tiny sizes."""
    return {
        "_class_name": "AutoencoderKLCausal3D",
        "_diffusers_version": "0.4.2",
        "act_fn": "silu",
        "block_out_channels": [8, 8, 8, 8],
        "down_block_types": ["DownEncoderBlockCausal3D"] * 4,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "out_channels": 3,
        "sample_size": 128,
        "sample_tsize": 64,
        "scaling_factor": 0.7,
        "time_compression_ratio": 4,
        "up_block_types": ["UpDecoderBlockCausal3D"] * 4,
        "mid_block_add_attention": True,
    }


def write_official(folder: Path, states: dict, vae_state: dict[str, Tensor]) -> Path:
    (folder / "transformers").mkdir(parents=True)
    (folder / "vae").mkdir()
    torch.save(states, folder / WEIGHTS)
    prefixed = {f"vae.{k}": v for k, v in vae_state.items()}
    torch.save({"state_dict": prefixed}, folder / "vae" / "pytorch_model.pt")
    (folder / "vae" / "config.json").write_text(json.dumps(released_vae_config()))
    return folder


@pytest.fixture
def official(states, vae_state, tmp_path) -> Path:
    return write_official(tmp_path / "ckpts" / "hunyuan-video-t2v-720p", states, vae_state)


def run(source: str, target: str, path: Path, output: Path, *extra: str) -> Path:
    arguments = [f"from={source}", f"to={target}", "model=pipeline", f"input={path}"]
    assert main([*arguments, f"output={output}", *extra]) == 0
    assert not [*output.rglob("*.incomplete"), *output.rglob("*.scratch")]
    return output


def stored(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def assert_identical(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key


def assert_official(folder: Path, states: dict, vae_state: dict[str, Tensor]) -> None:
    found = torch.load(folder / WEIGHTS, weights_only=True)
    assert list(found) == list(states)
    for name, state in states.items():
        assert_identical(found[name], state)
    vae = torch.load(folder / "vae" / "pytorch_model.pt", weights_only=True)
    assert_identical(vae["state_dict"], vae_state)


def test_around_all_layouts_is_bit_identical(official, states, vae_state, tmp_path, capsys):
    small = "max_shard_gib=0.00003"
    ours = run("official", "ours", official, tmp_path / "ours", AXES, "ema=both", small)
    assert_identical(stored(ours / "transformer"), states["module"])
    assert_identical(stored(ours / "transformer_ema"), states["ema"])
    vae = load_vae(ours / "vae")
    assert vae.cfg == VAE
    assert_identical(dict(vae.state_dict()), vae_state)
    assert "released one; shift=NUMBER" in capsys.readouterr().out

    theirs = run("ours", "diffusers", ours, tmp_path / "theirs", "ema=both", "shift=5", small)
    assert len(list((theirs / "transformer").glob("*.safetensors"))) > 3
    back = run("diffusers", "official", theirs, tmp_path / "back", "ema=both")
    assert_official(back, states, vae_state)
    assert "--flow-shift 5" in capsys.readouterr().out
    fields = json.loads((back / "vae" / "config.json").read_text())
    released = released_vae_config()
    assert {k: fields[k] for k in released if k[0] != "_" and k != "sample_size"} == {
        k: released[k] for k in released if k[0] != "_" and k != "sample_size"
    }
    # What was written says all of itself, so nothing has to be given on the way back.
    again = run("official", "diffusers", back, tmp_path / "again", "ema=both", "shift=5")
    for path in theirs.rglob("*.json"):
        if "index" not in path.name or path.name == "model_index.json":
            assert path.read_text() == (again / path.relative_to(theirs)).read_text(), path
    for part in ("transformer", "transformer_ema", "vae"):
        assert_identical(stored(again / part), stored(theirs / part))


def test_average_takes_the_place_of_the_weights(official, states, vae_state, tmp_path):
    out = run("official", "official", official, tmp_path / "out", AXES, "ema=true")
    assert_official(out, {"module": states["ema"]}, vae_state)


def test_run_to_official_and_back(states, vae_state, tmp_path):
    folder = tmp_path / "run"
    cfg = HunyuanConfig(**SIZES)
    vae = CausalVae3D(VAE)
    vae.load_state_dict(vae_state)
    save_vae(vae.half(), folder / "vae")
    texts = [f"model.{k}={str(v).replace(' ', '')}" for k, v in SIZES.items()]
    texts += ["vae.latent_channels=4", "text.text_dim=10", "text.pooled_dim=6"]
    save_config(compose_config([*texts, f"run.vae={folder / 'vae'}"]), folder / "config.yaml")
    manager = CheckpointManager(
        folder / "checkpoints", CheckpointConfig(), identity=config_dict(cfg)
    )
    assert manager.save(3, {"model": states["module"], "ema": states["ema"]}, extra={})
    out = run("ours", "official", folder, tmp_path / "out", "ema=both")
    assert_official(out, states, vae_state)
    back = run("official", "ours", out, tmp_path / "back", "ema=true")
    assert_identical(stored(back / "transformer"), states["ema"])
    with pytest.raises(ValueError, match=r"nowhere, the VAE of .*config\.yaml, does not exist"):
        run("ours", "official", folder, tmp_path / "x", f"vae={tmp_path / 'nowhere'}")


@pytest.mark.parametrize("form", [ImageCondition.concat, ImageCondition.token_replace])
def test_official_image_to_video_is_recognised(form, vae_state, tmp_path):
    channels = 9 if form is ImageCondition.concat else 4
    cfg = HunyuanConfig(**{**SIZES, "in_channels": channels, "image_condition": form})
    state = random_state(cfg, 4)
    folder = tmp_path / "hunyuan-video-i2v-720p"
    write_official(folder, {"module": state}, vae_state)
    theirs = run("official", "diffusers", folder, tmp_path / "theirs", AXES)
    index = json.loads((theirs / "model_index.json").read_text())
    assert index["_class_name"] == "HunyuanVideoImageToVideoPipeline"
    fields = json.loads((theirs / "transformer" / "config.json").read_text())
    named = {ImageCondition.concat: "latent_concat", ImageCondition.token_replace: "token_replace"}
    assert fields["image_condition_type"] == named[form]
    back = run("diffusers", "official", theirs, tmp_path / "back")
    assert_official(back, {"module": state}, vae_state)
    # The form stands beside the weights, whatever the folder is called.
    ours = run("official", "ours", back, tmp_path / "ours")
    assert json.loads((ours / "transformer" / "config.json").read_text())["image_condition"] == form


def test_types_are_chosen_for_each_part(official, states, vae_state, tmp_path):
    types = ("dtype=float16", "vae_dtype=float32")
    out = run("official", "ours", official, tmp_path / "out", AXES, *types)
    assert_identical(
        stored(out / "transformer"), {k: v.half() for k, v in states["module"].items()}
    )
    assert_identical(stored(out / "vae"), {k: v.float() for k, v in vae_state.items()})


def test_value_beyond_float16_is_named(states, vae_state, tmp_path):
    changed = {**states["module"], QKV: states["module"][QKV] * 1e6}
    folder = write_official(tmp_path / "in", {"module": changed}, vae_state)
    with pytest.raises(ValueError, match=f"{QKV} has the value .*, which float16 cannot hold"):
        run("official", "ours", folder, tmp_path / "out", AXES, "dtype=float16")


def test_at_most_one_group_of_tensors_is_alive(official, states, vae_state, tmp_path, monkeypatch):
    """Count the bytes read and not yet written; the largest tensor bounds them."""
    alive = peak = 0
    opened, write = export.open_source, export.ShardedWriter.write

    def counting_open(path, **options):
        source = opened(path, **options)
        read = source.read

        def counting_read(key):
            nonlocal alive, peak
            tensor = read(key)
            alive += tensor.nbytes
            peak = max(peak, alive)
            return tensor

        source.read = counting_read
        return source

    def counting_write(self, key, tensor):
        nonlocal alive
        write(self, key, tensor)
        alive -= tensor.nbytes

    monkeypatch.setattr(export, "open_source", counting_open)
    monkeypatch.setattr(export.ShardedWriter, "write", counting_write)
    theirs = run("official", "diffusers", official, tmp_path / "theirs", AXES, "ema=both")
    run("diffusers", "official", theirs, tmp_path / "back", "ema=both")
    assert alive == 0
    assert peak == max(t.nbytes for t in [*states["module"].values(), *vae_state.values()])


class Evil:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_pickles_cannot_run_code(states, official, tmp_path):
    for name in (WEIGHTS, Path("vae") / "pytorch_model.pt"):
        whole = (official / name).read_bytes()
        torch.save({"module": states["module"], "x": Evil(tmp_path / "ran")}, official / name)
        with pytest.raises(ValueError, match=f"{name.name} is damaged or holds more than tensors"):
            run("official", "ours", official, tmp_path / "out", AXES)
        assert not (tmp_path / "ran").exists()
        (official / name).write_bytes(whole)


def spoil(kind: str, folder: Path, states: dict[str, dict[str, Tensor]]) -> None:
    """Damage an official folder, or with ``theirs`` in the name a diffusers one."""
    weights, vae = folder / WEIGHTS, folder / "vae"
    state = dict(states["module"])
    match kind:
        case "no transformers":
            (folder / "transformers").rename(folder / "other")
        case "no vae":
            vae.rename(folder / "other")
        case "neither":
            torch.save({"optimizer": {"state": state}, "step": 3}, weights)
        case "no ema":
            torch.save({"module": state}, weights)
        case "unknown key":
            torch.save({"module": {**state, "extra.weight": torch.zeros(2)}}, weights)
        case "missing key":
            del state["final_layer.linear.weight"]
            torch.save({"module": state}, weights)
        case "vae size":
            fields = released_vae_config() | {"block_out_channels": [8, 8, 8, 16]}
            (vae / "config.json").write_text(json.dumps(fields))
        case "theirs: truncated":
            path = sorted((folder / "transformer").glob("*.safetensors"))[1]
            path.write_bytes(path.read_bytes()[:-10])
        case "theirs: heads":
            path = folder / "transformer" / "config.json"
            path.write_text(path.read_text().replace('_heads": 3', '_heads": 6'))
        case "theirs: class":
            path = folder / "transformer" / "config.json"
            path.write_text(path.read_text().replace("HunyuanVideoT", "HunyuanVideo15T"))
        case "theirs: no config":
            (folder / "transformer" / "config.json").unlink()
        case "theirs: scheduler":
            path = folder / "scheduler" / "scheduler_config.json"
            path.write_text(json.dumps({"use_karras_sigmas": True, "shift": 7.0}))
        case "theirs: vae key":
            path = sorted((folder / "vae").glob("*.safetensors"))[0]
            save_file({**load_file(path), "extra": torch.zeros(1)}, path)


@pytest.mark.parametrize(
    ("kind", "message", "extra"),
    [
        ("no transformers", "has no folder transformers, so it is no whole model in the offi", ()),
        ("no vae", "has no folder vae; name the VAE's with vae=FOLDER", ()),
        ("neither", r"holds no tensors, bare or under module, .*; it has optimizer, step", ()),
        ("no ema", "has no ema weights; leave out ema=true", ("ema=both",)),
        ("unknown key", r"unexpected key extra\.weight of shape \[2\]", ()),
        ("missing key", r"official layout: the tensor final_layer\.linear\.weight is missing", ()),
        ("vae size", r"encoder\.\S+ has shape \[\S+.*\], expected \[16.*another model\?", ()),
        ("theirs: truncated", r"00002-of-\d+\.safetensors is damaged", ()),
        ("theirs: heads", r"proj\.weight has shape \[48, .*expected \[96, .* another model", ()),
        ("theirs: class", "config.json: _class_name is HunyuanVideo15Transformer3DModel, exp", ()),
        ("theirs: no config", r"transformer/config\.json is missing; copy it again", ()),
        ("theirs: scheduler", "use_karras_sigmas is True, which our sampler does not do", ()),
        ("theirs: vae key", r"unexpected key extra of shape \[1\]", ()),
    ],
)
def test_what_is_wrong_is_one_line(kind, message, extra, official, states, tmp_path):
    source, folder = "official", official
    if kind.startswith("theirs"):
        source, folder = "diffusers", tmp_path / "theirs"
        run("official", source, official, folder, AXES, "max_shard_gib=0.0001")
    spoil(kind, folder, states)
    axes = [AXES] if source == "official" else []
    with pytest.raises(ValueError, match=message) as error:
        run(source, "ours", folder, tmp_path / "out", *axes, *extra)
    assert "\n" not in str(error.value)
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model=tiny", "vae=x"], "vae= belongs to model=pipeline; leave it out"),
        (["model=tiny", "ema=both"], "ema=both writes a folder of both sets"),
        (["model=pipeline", "ema=yes"], "ema=yes is unknown; choose from false true both"),
        (["model=pipeline", "dtype=int8"], "dtype=int8 is unknown; choose from keep bfloat16"),
        (["model=pipeline", "shift=-1"], "shift=-1 must be a positive number"),
        (["model=pipeline", "input=nowhere"], "input=nowhere is not a folder"),
        (["model=pipeline", "to=peft"], "to=peft writes adapters alone"),
        (["model=pipeline"], r"model\.rope_axes=\[16, 56, 56\] adds up to 128, but .* 16"),
        (["model=pipeline", "full"], "output=.*full is not empty; choose a new folder"),
    ],
)
def test_bad_arguments(arguments, message, official, tmp_path):
    given = {"from": "official", "to": "ours", "input": str(official)}
    output = tmp_path / "full" if arguments[-1] == "full" else tmp_path / "out"
    if output.name == "full":
        (output / "something").mkdir(parents=True)
        arguments = [arguments[0], AXES]
    elif "to=peft" in arguments:
        arguments = [*arguments, AXES]
    given |= dict(text.split("=", 1) for text in arguments)
    with pytest.raises(ValueError, match=message):
        main([f"{key}={value}" for key, value in given.items()] + [f"output={output}"])


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("hunyuan_s2", ImageCondition.none),
        ("hunyuan_video_13b", ImageCondition.concat),
        ("hunyuan_video_13b_cfg", ImageCondition.token_replace),
    ],
)
def test_config_comes_back_from_shapes_and_from_diffusers(name, form):
    channels = {"in_channels": 33} if form is ImageCondition.concat else {}
    cfg = replace(model_config(name, []), image_condition=form, **channels)
    shapes = {link.ours: link.shape for link in hunyuan_links(cfg)}
    # Nothing in the shapes tells that given frames replace noisy ones.
    seen = replace(cfg, image_condition=ImageCondition.none)
    expected = cfg if form is ImageCondition.concat else seen
    assert HunyuanConfig(**fields_from_shapes(shapes)) == expected
    theirs = json.loads(json.dumps(diffusers_config(cfg)))
    assert HunyuanConfig(**fields_from_diffusers(theirs)) == cfg

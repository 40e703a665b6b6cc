"""Weights converted on disk: round trips, one group in memory, what is wrong in one line."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from hunyuan_train.checkpoint import export
from hunyuan_train.checkpoint.config import CheckpointConfig
from hunyuan_train.checkpoint.convertible import Layout, convertible
from hunyuan_train.checkpoint.export import convert
from hunyuan_train.checkpoint.manager import CheckpointManager
from hunyuan_train.cli.convert import main
from hunyuan_train.config.compose import config_dict
from hunyuan_train.models.hunyuan.config import HunyuanConfig
from hunyuan_train.models.hunyuan.model import HunyuanVideo
from hunyuan_train.models.vae.build import build_vae
from hunyuan_train.models.vae.config import VaeConfig
from hunyuan_train.models.vae.state_dict import load_vae, save_vae

SIZES = {
    "hidden_size": 32,
    "num_heads": 2,
    "num_double_blocks": 2,
    "num_single_blocks": 2,
    "rope_axes": [4, 6, 6],
    "text_dim": 10,
    "pooled_dim": 6,
    "refiner_depth": 1,
    "guidance_embed": True,
}
OVERRIDES = [f"model.{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in SIZES.items()]
OVERRIDES = [text.replace(" ", "") for text in OVERRIDES]
QKV = "double_blocks.0.img_attn_qkv.weight"


@pytest.fixture(scope="module")
def cfg() -> HunyuanConfig:
    return HunyuanConfig(**SIZES)


@pytest.fixture(scope="module")
def state(cfg) -> dict[str, Tensor]:
    """Random weights, stored as bfloat16 but for the final projection, as released."""
    torch.manual_seed(0)
    weights = {k: torch.randn(v.shape) for k, v in HunyuanVideo(cfg).state_dict().items()}
    final = ("final_layer.linear.weight", "final_layer.linear.bias")
    return {k: v if k in final else v.bfloat16() for k, v in weights.items()}


@pytest.fixture
def official(state, tmp_path) -> Path:
    folder = tmp_path / "official"
    folder.mkdir()
    other = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    torch.save({"module": state, "ema": other}, folder / "mp_rank_00_model_states.pt")
    return folder


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


def run(source: str, target: str, path: Path, output: Path, *extra: str) -> int:
    arguments = [f"from={source}", f"to={target}", "model=tiny", f"input={path}"]
    return main([*arguments, f"output={output}", *OVERRIDES, *extra])


def test_round_trip_is_bit_identical(official, state, tmp_path, capsys):
    theirs, ours, back = (tmp_path / name for name in ("diffusers", "ours", "back"))
    assert run("official", "diffusers", official, theirs, "max_shard_gib=0.00003") == 0
    assert run("diffusers", "ours", theirs, ours) == 0
    assert run("ours", "official", ours, back) == 0
    assert_identical(stored(ours), state)
    assert_identical(stored(back), state)
    assert str(back / "model.safetensors") in capsys.readouterr().out
    assert len(list(theirs.glob("*.safetensors"))) > 3
    assert not list(tmp_path.rglob("*.incomplete"))


def test_diffusers_loads_the_shards_strictly(official, state, cfg, tmp_path):
    output = tmp_path / "diffusers"
    run("official", "diffusers", official, output, "max_shard_gib=0.00003")
    model, info = HunyuanVideoTransformer3DModel.from_pretrained(
        output, torch_dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    found = model.state_dict()
    final = state["final_layer.adaLN_modulation.1.weight"].float()
    shift, scale = final.chunk(2)
    assert torch.equal(found["norm_out.linear.weight"], torch.cat([scale, shift]))
    q, _, _ = state[QKV].float().chunk(3)
    assert torch.equal(found["transformer_blocks.0.attn.to_q.weight"], q)
    mlp = state["single_blocks.1.linear1.weight"].float()[3 * cfg.hidden_size :]
    assert torch.equal(found["single_transformer_blocks.1.proj_mlp.weight"], mlp)


def test_ema_of_the_pickle(official, tmp_path):
    run("official", "ours", official, tmp_path / "out", "ema=true")
    assert all((tensor == 0).all() for tensor in stored(tmp_path / "out").values())


def test_saver_prefix_is_dropped(state, tmp_path):
    save_file({f"module.{k}": v for k, v in state.items()}, tmp_path / "in.safetensors")
    run("official", "ours", tmp_path / "in.safetensors", tmp_path / "out")
    assert_identical(stored(tmp_path / "out"), state)


def test_training_checkpoint_is_a_source(state, cfg, tmp_path):
    weights = {k: v.float() for k, v in state.items()}
    averaged = {k: v + 1 for k, v in weights.items()}
    manager = CheckpointManager(
        tmp_path / "run" / "checkpoints", CheckpointConfig(), identity=config_dict(cfg)
    )
    assert manager.save(3, {"model": weights, "ema": averaged}, extra={})
    for which, expected in (("false", weights), ("true", averaged)):
        run("ours", "official", tmp_path / "run", tmp_path / which, f"ema={which}")
        assert_identical(stored(tmp_path / which), expected)
    with pytest.raises(ValueError, match=r"another model: rope_theta is 256\.0 there and 9\.0"):
        run("ours", "official", tmp_path / "run", tmp_path / "x", "model.rope_theta=9.0")


def test_at_most_one_group_of_tensors_is_alive(official, state, cfg, tmp_path, monkeypatch):
    """Count the bytes read and not yet written; the largest link bounds them."""
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
    model = convertible(cfg)
    convert(model, official, tmp_path / "d", source=Layout.OFFICIAL, target=Layout.DIFFUSERS)
    convert(model, tmp_path / "d", tmp_path / "o", source=Layout.DIFFUSERS, target=Layout.OURS)
    assert alive == 0
    assert peak == max(tensor.nbytes for tensor in state.values())


def broken(state: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    changed = dict(state)
    if kind == "missing":
        del changed[QKV]
    elif kind == "shape":
        changed[QKV] = changed[QKV][:-1].contiguous()
    elif kind == "unexpected":
        changed["img_in.proj.scale"] = torch.zeros(3)
    elif kind == "float8":
        changed[QKV] = changed[QKV].to(torch.float8_e4m3fn)
    elif kind == "e5m2":
        changed[QKV] = changed[QKV].to(torch.float8_e5m2)
    return changed


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "missing",
            r"lacks double_blocks\.0\.img_attn_qkv\.weight, expected with .* \[96, 32\]",
        ),
        ("shape", r"img_attn_qkv\.weight has shape \[95, 32\], expected \[96, 32\]"),
        ("unexpected", r"unexpected key img_in\.proj\.scale of shape \[3\]"),
        (
            "float8",
            r"img_attn_qkv\.weight is stored as float8 .* in_map\.pt beside it, which is mis",
        ),
        ("e5m2", r"img_attn_qkv\.weight is stored as F8_E5M2, which is no released form; conv"),
    ],
)
def test_wrong_tensor_is_named_and_nothing_is_written(kind, message, state, tmp_path):
    save_file(broken(state, kind), tmp_path / "in.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        run("official", "diffusers", tmp_path / "in.safetensors", tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_parts_of_different_types_are_named(official, tmp_path):
    run("official", "diffusers", official, tmp_path / "d")
    tensors = stored(tmp_path / "d")
    key = "transformer_blocks.0.attn.to_k.weight"
    tensors[key] = tensors[key].float()
    save_file(tensors, tmp_path / "in.safetensors")
    with pytest.raises(ValueError, match=r"to_q\.weight and .*to_k\.weight .* differ in type"):
        run("diffusers", "ours", tmp_path / "in.safetensors", tmp_path / "out")


def test_config_beside_the_weights_must_agree(official, tmp_path):
    run("official", "diffusers", official, tmp_path / "d")
    with pytest.raises(ValueError, match=r"rope_theta is 256\.0 there and 10\.0 here"):
        run("diffusers", "ours", tmp_path / "d", tmp_path / "out", "model.rope_theta=10.0")


def test_input_that_cannot_be_read(official, state, tmp_path):
    with pytest.raises(ValueError, match=r"input=.*nowhere does not exist"):
        run("official", "ours", tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no \.safetensors, \.pt or \.bin file"):
        run("official", "ours", tmp_path / "empty", tmp_path / "out")
    path = tmp_path / "cut.safetensors"
    save_file(state, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cut\.safetensors is damaged"):
        run("official", "ours", path, tmp_path / "out")
    pickle = official / "mp_rank_00_model_states.pt"
    pickle.write_bytes(pickle.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"mp_rank_00_model_states\.pt is damaged"):
        run("official", "ours", official, tmp_path / "out")


def test_output_that_holds_weights_and_a_missing_shard(official, tmp_path):
    output = tmp_path / "out"
    run("official", "diffusers", official, output, "max_shard_gib=0.00003")
    with pytest.raises(ValueError, match="already holds safetensors; choose a new folder"):
        run("official", "diffusers", official, output)
    first = sorted(output.glob("*.safetensors"))[0]
    first.unlink()
    with pytest.raises(ValueError, match=f"{first.name} is missing, but .*index.json lists it"):
        run("diffusers", "ours", output, tmp_path / "next")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["from=official"], "to= is missing"),
        (["from=official", "from=ours"], "from is given twice"),
        (["form=official"], "form is not an argument of convert; choose from from to model"),
        (["official"], "official is not key=value"),
        (["from=a", "to=ours", "model=tiny", "input=x", "output=y"], "from=a is no layout; choose"),
        (["from=ours", "to=ours", "model=big", "input=x", "output=y"], "model=big is unknown; ch"),
        (
            ["from=ours", "to=ours", "model=tiny", "input=x", "output=y", "model.width=3"],
            "model=tiny: .*width",
        ),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        main(arguments)


def test_vae_both_ways(tmp_path):
    torch.manual_seed(0)
    cfg = VaeConfig(
        latent_channels=4,
        block_channels=[8, 8, 8, 8],
        layers_per_block=1,
        norm_groups=4,
        scaling_factor=0.7,
    )
    vae = build_vae(cfg)
    save_vae(vae, tmp_path / "ours")
    arguments = ["from=ours", "to=diffusers", "model=vae", f"input={tmp_path / 'ours'}"]
    main([*arguments, f"output={tmp_path / 'theirs'}"])
    model, info = AutoencoderKLHunyuanVideo.from_pretrained(
        tmp_path / "theirs", output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_identical(model.state_dict(), dict(vae.state_dict()))
    assert model.config.scaling_factor == 0.7

    released = {f"vae.{k}": v for k, v in vae.state_dict().items()}
    (tmp_path / "official").mkdir()
    extra = {"discriminator.weight": torch.zeros(2)}
    torch.save({"state_dict": released | extra}, tmp_path / "official" / "pytorch_model.pt")
    fields = json.loads((tmp_path / "theirs" / "config.json").read_text())
    (tmp_path / "official" / "config.json").write_text(json.dumps(fields))
    arguments = ["from=official", "to=ours", "model=vae", f"input={tmp_path / 'official'}"]
    main([*arguments, f"output={tmp_path / 'back'}"])
    back = load_vae(tmp_path / "back")
    assert back.cfg == cfg
    assert_identical(dict(back.state_dict()), dict(vae.state_dict()))

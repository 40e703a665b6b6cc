"""Sizes, initial values, padding and input checks of the transformer."""

from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from hunyuan_train.models.attention import SdpaCore
from hunyuan_train.models.hunyuan.config import HunyuanConfig
from hunyuan_train.models.hunyuan.model import HunyuanVideo
from hunyuan_train.models.hunyuan.text_refiner import trim_text
from hunyuan_train.models.layers import NORM_EPS, HeadNorm
from hunyuan_train.models.registry import build_model, sharding_plan
from hunyuan_train.models.rope import MAX_CACHED_GRIDS, RopeCache, apply_rope, rope_table

CONF = Path(__file__).parents[2] / "conf" / "model"
SMALL = {
    "hidden_size": 32,
    "num_heads": 2,
    "num_double_blocks": 2,
    "num_single_blocks": 3,
    "in_channels": 4,
    "out_channels": 4,
    "rope_axes": [4, 6, 6],
    "text_dim": 10,
    "pooled_dim": 6,
    "refiner_depth": 1,
}


def shipped(name: str) -> HunyuanConfig:
    return HunyuanConfig(**yaml.safe_load((CONF / f"{name}.yaml").read_text()))


def small(seed: int = 0, **changes) -> HunyuanVideo:
    torch.manual_seed(seed)
    model = HunyuanVideo(HunyuanConfig(**(SMALL | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.1)
    return model


def batch(samples: int = 2, text_tokens: int = 5) -> dict:
    generator = torch.Generator().manual_seed(3)
    return {
        "latents": torch.randn(samples, 4, 2, 4, 6, generator=generator),
        "time": torch.rand(samples, generator=generator) * 1000,
        "text": torch.randn(samples, text_tokens, 10, generator=generator),
        "text_mask": torch.ones(samples, text_tokens, dtype=torch.bool),
        "pooled": torch.randn(samples, 6, generator=generator),
    }


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [
        ("hunyuan_video_13b_cfg", 856, 12_821_012_544),
        ("hunyuan_video_13b", 852, 12_810_782_784),
    ],
)
def test_released_size(name, tensors, parameters):
    with torch.device("meta"):
        model = build_model(shipped(name))
    assert len(model.state_dict()) == tensors
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_parts_have_their_released_sizes():
    with torch.device("meta"):
        model = build_model(shipped("hunyuan_video_13b_cfg"))
    sizes = {
        "img_in": 199_680,
        "txt_in": 309_175_296,
        "time_in": 10_229_760,
        "vector_in": 11_802_624,
        "guidance_in": 10_229_760,
        "double_blocks.7": 339_831_296,
        "single_blocks.39": 141_591_808,
        "final_layer": 19_077_184,
    }
    found = {n: sum(p.numel() for p in model.get_submodule(n).parameters()) for n in sizes}
    assert found == sizes


def test_published_debug_size():
    cfg = shipped("hunyuan_s2")
    assert (cfg.hidden_size, cfg.num_heads, cfg.head_dim) == (480, 5, 96)
    assert (cfg.num_double_blocks, cfg.num_single_blocks) == (6, 12)
    assert cfg.rope_axes == [12, 42, 42]


def test_initial_output_is_zero_and_modulations_are_zero():
    torch.manual_seed(0)
    model = HunyuanVideo(HunyuanConfig(**SMALL))
    assert model(**batch()).abs().max() == 0
    modulations = [n for n, _ in model.named_parameters() if "mod" in n and "time" not in n]
    assert len(modulations) == 2 * (2 * 2 + 3 + 1 + 1)  # double, single, refiner, final
    for name in [*modulations, "final_layer.linear.weight", "final_layer.linear.bias"]:
        assert model.get_parameter(name).abs().max() == 0, name


def test_initial_values_after_meta_construction():
    with torch.device("meta"):
        model = HunyuanVideo(
            HunyuanConfig(**(SMALL | {"hidden_size": 512, "num_heads": 32, "guidance_embed": True}))
        )
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    model.init_weights(torch.Generator().manual_seed(0))
    assert not any(p.isnan().any() for p in model.parameters())
    for embedder in ("time_in", "guidance_in", "txt_in.t_embedder"):
        for layer in ("mlp.0", "mlp.2"):
            weight = model.get_parameter(f"{embedder}.{layer}.weight")
            assert weight.std().item() == pytest.approx(0.02, rel=0.02), embedder
    xavier = (6 / (4 * 4 + 512)) ** 0.5
    assert model.img_in.proj.weight.abs().max().item() == pytest.approx(xavier, rel=0.01)
    assert model.img_in.proj.bias.abs().max() == 0
    block = model.double_blocks[0]
    linear = 512**-0.5
    assert block.img_attn_qkv.weight.abs().max().item() == pytest.approx(linear, rel=0.01)
    assert block.img_attn_qkv.bias.abs().max().item() == pytest.approx(linear, rel=0.01)
    assert (block.img_attn_q_norm.weight == 1).all()


def test_padding_content_does_not_reach_the_output():
    model, b = small(), batch()
    b["text_mask"][0, 2:] = False
    first = model(**b)
    b["text"][0, 2:] = 1e3
    second = model(**b)
    assert torch.equal(first, second)
    b["text"][0, :2] += 1.0
    assert not torch.equal(first, model(**b))


def test_trimmed_text_gives_the_same_output():
    model, b = small(), batch()
    b["text_mask"][0, 2:] = False
    b["text_mask"][1, 3:] = False
    full = model(**b)
    b["text"], b["text_mask"] = trim_text(b["text"], b["text_mask"])
    assert b["text"].shape[1] == 3
    assert b["text_mask"].tolist() == [[True, True, False], [True, True, True]]
    torch.testing.assert_close(model(**b), full, rtol=1e-5, atol=1e-6)
    text, mask = trim_text(b["text"][:1, :], b["text_mask"][:1])
    assert text.shape[1] == 2
    assert mask is None


def test_no_mask_means_all_valid():
    model, b = small(), batch()
    full = model(**b)
    torch.testing.assert_close(model(**(b | {"text_mask": None})), full, rtol=1e-5, atol=1e-6)


def test_samples_do_not_mix_and_batch_one_is_the_same():
    model, b = small(), batch(samples=3)
    together = model(**b)
    for i in range(3):
        alone = model(**{name: tensor[i : i + 1] for name, tensor in b.items()})
        torch.testing.assert_close(alone[0], together[i], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.zeros(2, 4, 2, 5, 6)}, "latent H=5 is not a multiple of the patch's 2"),
        ({"latents": torch.zeros(2, 4, 2, 4, 7)}, "latent W=7 is not a multiple of the patch's 2"),
        ({"latents": torch.zeros(2, 3, 2, 4, 6)}, r"the model takes \[B, 4, T, H, W\]"),
        ({"text": torch.zeros(2, 5, 11)}, "width 11, but model.text_dim=10"),
        ({"pooled": torch.zeros(2, 5)}, "width 5, but model.pooled_dim=6"),
        ({"guidance": torch.zeros(2)}, "guidance was given, but model.guidance_embed=false"),
    ],
)
def test_bad_inputs(change, message):
    with pytest.raises(ValueError, match=message):
        small()(**(batch() | change))


def test_guidance_is_required_when_embedded():
    with pytest.raises(ValueError, match=r"guidance was not given, but model\.guidance_embed=true"):
        small(guidance_embed=True)(**batch())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_axes": [4, 6, 4]}, r"rope_axes=\[4, 6, 4\] adds up to 14.*add up to 16"),
        ({"rope_axes": [4, 12]}, "rope_axes.*three even positive"),
        ({"rope_axes": [3, 7, 6]}, "rope_axes.*three even positive"),
        ({"num_heads": 3}, "model.hidden_size=32 is not a multiple of model.num_heads=3"),
        ({"patch_size": [1, 2]}, r"model.patch_size=\[1, 2\]"),
        ({"mlp_ratio": 0.0}, "model.mlp_ratio=0.0 must be positive"),
        ({"refiner_depth": -1}, "model.refiner_depth=-1 must not be negative"),
    ],
)
def test_config_that_does_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        HunyuanConfig(**(SMALL | change))


def test_unknown_kind():
    with pytest.raises(ValueError, match=r"model\.kind='dit' is unknown; choose from hunyuan"):
        build_model(HunyuanConfig(**(SMALL | {"kind": "dit"})))


def test_time_and_guidance_stay_float32_until_after_the_sinusoid():
    model = small(guidance_embed=True).bfloat16()
    b = batch(samples=2) | {"guidance": torch.tensor([6000.0, 6016.0])}
    for name in ("latents", "time", "text", "pooled"):
        b[name][1] = b[name][0]
    embedded = model.guidance_in(b["guidance"])
    assert not torch.equal(embedded[0], embedded[1])  # equal if 6000 was rounded to bfloat16
    assert model(**b).dtype == torch.bfloat16


def test_sharding_units_are_every_block_in_order():
    model = small()
    names = sharding_plan(model.cfg).units
    assert names == (
        "txt_in.individual_token_refiner.blocks.0",
        "double_blocks.0",
        "double_blocks.1",
        "single_blocks.0",
        "single_blocks.1",
        "single_blocks.2",
    )
    assert model.repeated_blocks[1] is model.double_blocks[0]


def test_a_replaced_core_sees_joint_heads_and_mask():
    model, b = small(), batch()
    b["text_mask"][0, 2:] = False
    expected = model(**b)
    seen = []

    class Recorder(SdpaCore):
        def forward(self, q, k, v, key_mask):
            seen.append((tuple(q.shape), tuple(key_mask.shape), int((~key_mask).sum())))
            return super().forward(q, k, v, key_mask)

    for block in [*model.double_blocks, *model.single_blocks]:
        block.core = Recorder()
    assert torch.equal(model(**b), expected)
    assert seen == [((2, 12 + 5, 2, 16), (2, 17), 3)] * 5
    assert "core" not in " ".join(model.state_dict())


def test_rope_cache_is_bounded_and_reused():
    cache = RopeCache([4, 6, 6], 256.0)
    cpu = torch.device("cpu")
    first = cache.get((1, 2, 2), 3, cpu)
    assert cache.get((1, 2, 2), 3, cpu) is first
    assert first.cos.shape == (4 + 3, 8)
    assert (first.cos[4:] == 1).all()
    assert (first.sin[4:] == 0).all()
    for i in range(MAX_CACHED_GRIDS):
        cache.get((1, 2, 4 + i), 3, cpu)
    assert cache.get((1, 2, 2), 3, cpu) is not first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_norm_is_rms_norm_with_its_gradient(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, 16, generator=generator).to(dtype)
    results = []
    for norm in (HeadNorm(16), nn.RMSNorm(16, eps=NORM_EPS)):
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(-1.0, 2.0, 16))
        leaf = x.clone().requires_grad_()
        out = norm.to(dtype)(leaf)
        (out.float() * torch.arange(16)).sum().backward()
        results.append((out, leaf.grad, norm.weight.grad))
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    for found, expected in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_rotation_turns_adjacent_pairs_by_axis_frequencies():
    rope = rope_table((2, 2, 3), [4, 6, 6], 256.0, torch.device("cpu"))
    x = torch.zeros(1, 12, 1, 16)
    x[..., 0::2] = 1.0
    turned = apply_rope(x, rope)[0, 7, 0].unflatten(-1, (8, 2))  # token (t, h, w) = (1, 0, 1)
    frame = [256.0 ** (-2 * i / 4) for i in range(2)]
    column = [256.0 ** (-2 * i / 6) for i in range(3)]
    angle = torch.tensor([*frame, 0.0, 0.0, 0.0, *column])
    torch.testing.assert_close(turned, torch.stack([angle.cos(), angle.sin()], dim=-1))


@pytest.mark.compile
def test_compiled_blocks_are_one_graph_each():
    model, b = small(), batch()
    b["text_mask"][0, 2:] = False
    expected = model(**b)
    for block in model.repeated_blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    found = model(**b)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    found.sum().backward()
    assert all(p.grad is not None for p in model.parameters())

"""The closed-form FLOP count against torch's counter on real modules, and against published
sizes."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hunyuan_train.config.compose import compose_config, conf_folder, stage_names
from hunyuan_train.engine.planning_run import planned_buckets
from hunyuan_train.models.hunyuan.config import HunyuanConfig
from hunyuan_train.models.hunyuan.model import HunyuanVideo
from hunyuan_train.observability.flops import ForwardFlops, dit_forward_flops, peak_tflops

RELEASED = {
    "hidden_size": 3072,
    "double_blocks": 20,
    "single_blocks": 40,
    "mlp_ratio": 4.0,
    "patch_in": 64,
    "patch_out": 64,
    "text_dim": 4096,
    "pooled_dim": 768,
    "refiner_depth": 2,
    "guidance_embed": True,
}


def _closed_form(cfg: HunyuanConfig, batch: int, img_tokens: int, txt_tokens: int) -> ForwardFlops:
    patch = cfg.patch_size[0] * cfg.patch_size[1] * cfg.patch_size[2]
    return dit_forward_flops(
        batch=batch,
        img_tokens=img_tokens,
        txt_tokens=txt_tokens,
        hidden_size=cfg.hidden_size,
        double_blocks=cfg.num_double_blocks,
        single_blocks=cfg.num_single_blocks,
        mlp_ratio=cfg.mlp_ratio,
        patch_in=cfg.in_channels * patch,
        patch_out=cfg.out_channels * patch,
        text_dim=cfg.text_dim,
        pooled_dim=cfg.pooled_dim,
        refiner_depth=cfg.refiner_depth,
        guidance_embed=cfg.guidance_embed,
    )


@pytest.mark.parametrize("guidance", [False, True])
@pytest.mark.parametrize(
    ("batch", "grid", "txt", "double", "single", "depth", "ratio"),
    [
        (1, (1, 8, 8), 5, 1, 1, 1, 4.0),
        (3, (2, 6, 4), 9, 2, 3, 2, 2.0),
        (2, (3, 4, 4), 7, 0, 2, 0, 4.0),
    ],
)
def test_it_equals_torch_flop_counter(
    guidance: bool,
    batch: int,
    grid: tuple[int, int, int],
    txt: int,
    double: int,
    single: int,
    depth: int,
    ratio: float,
):
    cfg = HunyuanConfig(
        hidden_size=32,
        num_heads=2,
        num_double_blocks=double,
        num_single_blocks=single,
        mlp_ratio=ratio,
        in_channels=4,
        out_channels=6,
        rope_axes=[4, 6, 6],
        text_dim=24,
        pooled_dim=20,
        refiner_depth=depth,
        guidance_embed=guidance,
    )
    model = HunyuanVideo(cfg)
    mask = torch.ones(batch, txt, dtype=torch.bool)
    mask[0, -2:] = False
    counter = FlopCounterMode(display=False)
    # The flash kernel of the CPU is not known to the counter; the matrix products of the math form
    # are.
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), counter:
        model(
            torch.randn(batch, 4, *grid),
            torch.full((batch,), 500.0),
            torch.randn(batch, txt, 24),
            mask,
            torch.randn(batch, 20),
            torch.full((batch,), 6000.0) if guidance else None,
        )
    expected = _closed_form(cfg, batch, grid[0] * grid[1] * grid[2] // 4, txt)
    assert counter.get_total_flops() == expected.total
    by_op = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    masked_mean = 2 * batch * txt * cfg.text_dim
    assert by_op["aten.bmm"] == expected.attention + masked_mean


def test_the_released_model_at_720p_needs_12_pflop():
    flops = dit_forward_flops(batch=1, img_tokens=118_800, txt_tokens=256, **RELEASED)
    assert flops.total / 1e15 == pytest.approx(12.07, abs=0.005)
    assert flops.linear / 1e15 == pytest.approx(1.62, abs=0.005)
    assert flops.attention / 1e15 == pytest.approx(10.45, abs=0.005)
    assert flops.training == pytest.approx(3 * flops.total, rel=1e-4)


_PARTS = 4
"""The buckets are dealt out to as many tests, to keep each short."""


def _shipped_buckets() -> list[tuple[int, int]]:
    """Return the (image tokens, text tokens) of every bucket of every shipped stage, once each."""
    found = set()
    for stage in stage_names():
        cfg = compose_config(
            [
                "model=hunyuan_video_13b",
                "text=hunyuan",
                f"stage={stage}",
                "optimizer.warmup_steps=0",
            ]
        )
        found |= {bucket.tokens for bucket in planned_buckets(cfg)[1]}
    return [(tokens, 256) for tokens in sorted(found)]


@pytest.mark.slow
@pytest.mark.parametrize("part", range(_PARTS))
def test_forward_and_backward_equal_torch_for_every_shipped_bucket(part: int):
    cfg = HunyuanConfig(
        hidden_size=32,
        num_heads=2,
        num_double_blocks=1,
        num_single_blocks=1,
        rope_axes=[4, 6, 6],
        text_dim=24,
        pooled_dim=20,
        refiner_depth=1,
        guidance_embed=True,
    )
    buckets = _shipped_buckets()
    assert len(buckets) > 100
    assert buckets[-1] == (118_800, 256)
    meta = torch.device("meta")
    with meta:
        model = HunyuanVideo(cfg)
    for img_tokens, txt_tokens in buckets[part::_PARTS]:
        counter = FlopCounterMode(display=False)
        # The flash kernel of the CPU is not known to the counter; that of a GPU counts a backward
        # of 2.5 forwards, of which the half is what it repeats.
        with meta, sdpa_kernel(SDPBackend.MATH), counter:
            model(
                torch.empty(1, 16, img_tokens, 2, 2),
                torch.empty(1),
                torch.empty(1, txt_tokens, 24),
                None,
                torch.empty(1, 20),
                torch.empty(1),
            ).sum().backward()
        expected = _closed_form(cfg, 1, img_tokens, txt_tokens)
        # Without a mask the mean over text is a plain mean and no product.
        mean = 2 * txt_tokens * cfg.text_dim
        assert counter.get_total_flops() == expected.training - mean


def test_recompute_adds_what_runs_again():
    flops = dit_forward_flops(batch=1, img_tokens=118_800, txt_tokens=256, **RELEASED)
    none = flops.computed(linear_again=False, attention_again=False)
    assert none == flops.training + flops.attention // 2
    selective = flops.computed(linear_again=True, attention_again=False)
    assert selective - none == flops.linear
    full = flops.computed(linear_again=True, attention_again=True)
    assert full - selective == flops.attention


def test_shipped_clusters_have_the_peaks_of_the_table(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hunyuan_train.observability.flops._measure", lambda *_: 300.0)
    for path in (conf_folder() / "cluster").glob("*.yaml"):
        cluster = compose_config([f"cluster={path.stem}"]).cluster
        monkeypatch.setattr(
            torch.cuda, "get_device_name", lambda device, name=cluster.gpu: f"NVIDIA {name}"
        )
        assert peak_tflops("cuda:0").source == "data sheet"
        assert peak_tflops("cuda:0").tflops == cluster.peak_tflops


def test_the_backward_of_a_linear_layer_costs_twice_its_forward():
    layer = torch.nn.Linear(16, 8)
    data = torch.randn(4, 16, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        out = layer(data).sum()
    with FlopCounterMode(display=False) as backward:
        out.backward()
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


def test_the_cpu_peak_is_measured_and_positive():
    peak = peak_tflops("cpu")
    assert peak.source == "measured"
    assert 1e-3 < peak.tflops < 100


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
    ],
)
def test_known_devices_use_the_data_sheet(
    name: str, tflops: float, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr("hunyuan_train.observability.flops._measure", lambda *_: 300.0)
    peak = peak_tflops("cuda:0")
    assert (peak.tflops, peak.source, peak.device) == (tflops, "data sheet", name)
    assert peak.measured_tflops == 300.0

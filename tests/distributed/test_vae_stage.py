"""Stages that train the VAE: every layout learns what one process learns; a kill costs nothing."""

from pathlib import Path

import pytest
import torch
from forked import Job
from tiny_run import rows, run_verb

from hunyuan_train.checkpoint.load import load_weights
from hunyuan_train.checkpoint.storage import Manifest
from hunyuan_train.data.shapes import write_shapes_dataset
from hunyuan_train.models.vae.state_dict import load_vae

STEPS = 6
VAE = [
    "stage=demo_vae",
    "vae.block_channels=[4,8,8,8]",
    "vae.latent_channels=4",
    "vae.norm_groups=2",
    "vae.tile_size_px=32",
    "vae.tile_frames=16",
    "vae_training.crop_px=48",
    "vae_training.max_interval=2",
    "vae_training.tiling_share=0.3",
    "vae_training.tiling_consistency=0.5",
    "vae_training.scale_samples=5",
    "vae_loss.perceptual=0.1",
    "vae_loss.adversarial=0.05",
    "vae_loss.adversarial_start=2",
    "vae_loss.discriminator.base_channels=4",
    "vae_loss.discriminator.layers=1",
    "vae_loss.discriminator.norm_groups=2",
    "data.anchors=[64]",
    "data.durations=[1,5]",
    "data.assign=every",
    "data.batches={}",
    "data.max_tokens=64",
    "data.policy=balanced",
    "optimizer.warmup_steps=2",
    "logging.every_steps=1",
    "logging.progress=off",
    "run.device=cpu",
]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for name, count, seed in (("train", 8, 0), ("held-out", 3, 1)):
        write_shapes_dataset(
            folder / name, count, 4, seed, frame_sizes=[(64, 64), (96, 64)], clip_frames=[9, 17]
        )
    return folder


def arguments(clips: Path, run: Path, *extra: str) -> list[str]:
    return [
        *VAE, f"data.source={clips / 'train'}", f"run.dir={run}", f"stage.steps={STEPS}", *extra
    ]  # fmt: skip


def trained(clips: Path, run: Path, *extra: str, ranks: int = 1) -> Path:
    done = run_verb("train", arguments(clips, run, *extra), ranks)
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture(scope="module")
def single(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process on the global batches of two, measured and shown as it goes."""
    return trained(
        clips,
        tmp_path_factory.mktemp("single"),
        "data.planned_ranks=2",
        f"evaluation.clips={clips / 'held-out'}",
        "evaluation.every_steps=3",
        "evaluation.sample_every=6",
    )


def sections(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    names = ("model", "ema", "discriminator")
    return {name: load_weights(run, name) for name in names}


@pytest.mark.dist
def test_a_stage_shows_its_terms_and_writes_a_vae_that_loads(single: Path) -> None:
    found = rows(single)
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    assert all({"absolute", "kl", "gabor-pyramid"} <= row.keys() for row in found)
    judged = ["discriminator" in row for row in found]
    assert judged == [False, False, True, True, True, True], "from adversarial_start on"
    assert found[2]["adversarial_weight"] > 0
    vae = load_vae(single / "vae")
    average = load_weights(single, "ema")
    for name, value in vae.state_dict().items():
        torch.testing.assert_close(value, average[name], rtol=0, atol=0)
    assert 0.05 < vae.cfg.scaling_factor < 20
    assert vae.cfg.scaling_factor != 1.0


@pytest.mark.dist
def test_reconstructions_of_held_out_clips_are_measured_and_shown(single: Path) -> None:
    import json

    lines = [json.loads(line) for line in (single / "evaluation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6]
    for medium in ("image", "video"):
        assert 3 < lines[-1][f"ema/{medium}/psnr_db"] < 60
        assert -1 < lines[-1][f"ema/{medium}/ssim"] < 1
    shown = single / "samples" / "step-00000006"
    assert len(json.loads((shown / "prompts.json").read_text())) == len(list(shown.glob("*.png")))


@pytest.mark.dist
@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.zero_stage=0"],
        ["parallel.zero_stage=3", "memory.recompute=full"],
        pytest.param(["parallel.zero_stage=2"], marks=pytest.mark.again),
    ],
)
def test_two_ranks_learn_what_one_learns(
    clips: Path, single: Path, tmp_path: Path, layout: list[str]
) -> None:
    compare(trained(clips, tmp_path, *layout, ranks=2), single)


def compare(run: Path, single: Path) -> None:
    for one, two in zip(rows(single), rows(run), strict=True):
        for name in ("loss", "absolute", "kl", "gabor-pyramid", "discriminator"):
            if name in one:
                assert two[name] == pytest.approx(one[name], rel=1e-4), (name, one["step"])
        # The signs that the absolute error's gradient is made of flip where rounding differs.
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=2e-2), one["step"]
        assert two["samples"] == one["samples"]
    ours, theirs = sections(run), sections(single)
    for section, weights in theirs.items():
        for name, value in weights.items():
            scale = max(value.abs().max().item(), 1e-2)
            error = (ours[section][name] - value).abs().max().item() / scale
            assert error < 2e-2, (section, name, error)


@pytest.mark.dist
@pytest.mark.again
def test_ranks_that_share_every_clip_learn_what_one_learns(clips: Path, tmp_path: Path) -> None:
    extra = ("vae_training.tiling_share=0", "parallel.zero_stage=0")
    alone = trained(clips, tmp_path / "one", *extra)
    shared = trained(clips, tmp_path / "two", *extra, "parallel.cp_ring=2", ranks=2)
    compare(shared, alone)


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.again)])
def test_killed_and_resumed_it_is_bitwise_the_straight_one(
    clips: Path, tmp_path: Path, ranks: int
) -> None:
    extra = ("checkpoint.every_steps=3", "resilience.snapshot_every=0", "parallel.zero_stage=3")
    straight = trained(clips, tmp_path / "straight", *extra, ranks=ranks)
    broken = tmp_path / "broken"
    job = Job("train", arguments(clips, broken, *extra), ranks, tmp_path / "log")

    def saved() -> bool:
        metrics = broken / "metrics.jsonl"
        done = (broken / "checkpoints" / "step-00000003" / "manifest.json").is_file()
        return done and any('"step": 4' in line for line in metrics.open())

    assert job.kill_when(saved), "the run ended before it could be killed"
    trained(clips, broken, *extra, ranks=ranks)
    for section, weights in sections(straight).items():
        found = sections(broken)[section]
        assert all(torch.equal(value, found[name]) for name, value in weights.items()), section
    left, right = (rows(run)[-1] for run in (straight, broken))
    assert left["loss"] == right["loss"]
    assert left["discriminator"] == right["discriminator"]


@pytest.mark.dist
def test_a_phase_with_tiles_starts_from_the_one_before(clips: Path, single: Path, tmp_path: Path):
    run = trained(
        clips, tmp_path, f"stage.init_from={single}", "stage.steps=1", "vae_training.tiling_share=1"
        , "optimizer.lr=1e-9", "optimizer.muon_lr=1e-9", "vae_loss.discriminator_lr=1e-9",
        "optimizer.warmup_steps=0", "vae_loss.adversarial_start=0",
    )  # fmt: skip
    before = sections(single)
    for section in ("model", "discriminator"):
        for name, value in sections(run)[section].items():
            torch.testing.assert_close(value, before[section][name], atol=1e-6, rtol=1e-6)
    assert Manifest.read(next((run / "checkpoints").glob("step-*"))).identity["trains"] == "vae"


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("parallel.tp=2", "stage.trains=vae cannot be combined with parallel.tp=2"),
        ("memory.recompute=selective", "cannot be combined with memory.recompute=selective"),
        ("data.max_tokens=0", "cannot be combined with data.max_tokens=0"),
        ("vae_training.crop_px=20", "vae_training.crop_px=20 must be a multiple of 8"),
        ("data.source=", "data.source is empty"),
        ("evaluation={every_steps:2,latents:there}", "need evaluation.clips"),
    ],
)
def test_what_does_not_suit_a_vae_is_one_sentence(
    clips: Path, tmp_path: Path, field: str, said: str
) -> None:
    done = run_verb("train", arguments(clips, tmp_path, field))
    assert done.returncode == 2
    assert said in done.stderr

"""The Euler sampler: schedule, guidance, batching, and whole videos from a small model and VAE."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from hunyuan_train.encoders.config import TextEncoderConfig, TextEncoderKind
from hunyuan_train.encoders.features import TextFeatures
from hunyuan_train.encoders.text import TextEncoder, build_text_encoder
from hunyuan_train.evaluation.config import SampleConfig
from hunyuan_train.evaluation.sample import (
    default_shift,
    sample_latents,
    sample_videos,
    sigma_schedule,
)


class TinyVelocity(nn.Module):
    """Depends on every input; remembers how it was called."""

    def __init__(self, guidance_embed: bool = False) -> None:
        super().__init__()
        self.cfg = SimpleNamespace(guidance_embed=guidance_embed)
        self.mix = nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)) / 2)
        self.calls: list[tuple[int, Tensor, Tensor | None]] = []

    def forward(
        self,
        latents: Tensor,
        time: Tensor,
        text: Tensor,
        text_mask: Tensor,
        pooled: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        assert latents.dtype == text.dtype == pooled.dtype == self.mix.dtype
        assert time.dtype == torch.float32
        self.calls.append((latents.shape[0], time, guidance))
        words = (text.float() * text_mask[..., None]).mean(dim=(1, 2)) + pooled.float().mean(1)
        bias = words + time / 1000 + (0 if guidance is None else guidance / 1e4)
        mixed = torch.einsum("dc,bcthw->bdthw", self.mix, latents)
        return (mixed + bias.to(mixed.dtype)[:, None, None, None, None]).tanh()


class TinyVae(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cfg = SimpleNamespace(latent_channels=4)
        self.gain = nn.Parameter(torch.ones(()))

    def unscale(self, latents: Tensor) -> Tensor:
        return latents / 0.5

    def decode(self, latents: Tensor) -> Tensor:
        first = latents[:, :3, :1]
        rest = latents[:, :3, 1:].repeat_interleave(4, dim=2)
        frames = torch.cat([first, rest], dim=2) * self.gain
        return frames.repeat_interleave(8, dim=3).repeat_interleave(8, dim=4)


@pytest.fixture
def text_encoder() -> TextEncoder:
    return build_text_encoder(
        TextEncoderConfig(kind=TextEncoderKind.builtin, max_length=16, text_dim=32, pooled_dim=32)
    )


def features(text_encoder: TextEncoder, *captions: str) -> TextFeatures:
    return text_encoder.encode(list(captions), "video")


def start(batch: int = 2) -> Tensor:
    return torch.randn(batch, 4, 2, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("steps", "shift"), [(50, 7.0), (19, 17.0), (4, 1.0), (1, 3.0)])
def test_schedule_and_steps_equal_the_euler_scheduler(steps: int, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    # Without explicit sigmas this scheduler applies its shift twice.
    uniform = torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1]
    scheduler.set_timesteps(sigmas=uniform.tolist())
    sigmas = sigma_schedule(steps, shift)
    assert sigmas.dtype == torch.float32
    torch.testing.assert_close(sigmas, scheduler.sigmas, rtol=0, atol=1.2e-7)

    def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
        return (3 * latents + sigma).sin()

    ours = theirs = start()
    for i, time in enumerate(scheduler.timesteps):
        ours = ours + (sigmas[i + 1] - sigmas[i]) * velocity(ours, sigmas[i])
        theirs = scheduler.step(velocity(theirs, time / 1000), time, theirs).prev_sample
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_shift_follows_the_number_of_steps() -> None:
    assert [default_shift(steps) for steps in (8, 19, 20, 50)] == [17.0, 17.0, 7.0, 7.0]
    assert torch.equal(sigma_schedule(10, 0.0), sigma_schedule(10, 17.0))
    assert not torch.equal(sigma_schedule(10, 0.0), sigma_schedule(10, 7.0))


def test_exact_velocity_leads_to_the_data() -> None:
    data, noise = start(), start().flip(0)

    class Exact(TinyVelocity):
        def forward(self, latents: Tensor, *args: Tensor, **kwargs: Tensor) -> Tensor:
            return noise - data

    text = TextFeatures(
        states=torch.zeros(2, 1, 1), mask=torch.ones(2, 1).bool(), pooled=torch.zeros(2, 1)
    )
    latents = sample_latents(Exact(), noise, text, steps=7)
    torch.testing.assert_close(latents, data, rtol=0, atol=1e-5)


def test_model_sees_scheduled_times_and_float32_guidance(text_encoder: TextEncoder) -> None:
    model = TinyVelocity(guidance_embed=True)
    text = features(text_encoder, "a", "b")
    sample_latents(model, start(), text, steps=3, shift=7.0, guidance=6.016)
    times = torch.stack([time for _, time, _ in model.calls])
    torch.testing.assert_close(times, 1000 * sigma_schedule(3, 7.0)[:-1, None].expand(3, 2))
    for _, _, guidance in model.calls:
        torch.testing.assert_close(guidance, torch.full((2,), 6016.0))


@pytest.mark.parametrize("batched", [True, False])
def test_guidance_is_uncond_plus_scale_times_difference(
    text_encoder: TextEncoder, batched: bool
) -> None:
    model, noise = TinyVelocity(), start()
    cond = features(text_encoder, "a red circle", "a blue square")
    uncond = features(text_encoder, "blurry")
    options = {"steps": 1, "shift": 1.0}  # one step: the result is noise - velocity
    v_cond = noise - sample_latents(model, noise, cond, **options)
    v_uncond = noise - sample_latents(model, noise, uncond.select([0, 0]), **options)
    model.calls.clear()
    guided = sample_latents(
        model, noise, cond, uncond, cfg_scale=4.0, batched_cfg=batched, **options
    )
    expected = noise - (v_uncond + 4.0 * (v_cond - v_uncond))
    torch.testing.assert_close(guided, expected, rtol=0, atol=2e-6)
    assert [batch for batch, _, _ in model.calls] == ([4] if batched else [2, 2])


def test_guidance_without_negative_text_is_refused(text_encoder: TextEncoder) -> None:
    with pytest.raises(ValueError, match=r"sample\.cfg_scale=5\.0 needs the features of a negati"):
        sample_latents(
            TinyVelocity(), start(1), features(text_encoder, "a"), steps=2, cfg_scale=5.0
        )


def test_scale_one_runs_the_prompt_alone(text_encoder: TextEncoder) -> None:
    model, text = TinyVelocity(), features(text_encoder, "a", "b")
    sample_latents(model, start(), text, text, steps=2)
    assert [batch for batch, _, _ in model.calls] == [2, 2]


def test_half_precision_model_keeps_float32_latents(text_encoder: TextEncoder) -> None:
    text = features(text_encoder, "a", "b")
    exact = sample_latents(TinyVelocity(), start(), text, steps=20)
    half = sample_latents(TinyVelocity().bfloat16(), start(), text, steps=20)
    assert half.dtype == torch.float32
    assert 0 < (half - exact).abs().max() < 0.1


def config(**changes: object) -> SampleConfig:
    fields: dict[str, object] = {"steps": 3, "frames": 5, "height": 16, "width": 32, "seed": 4}
    return SampleConfig(**{**fields, **changes})


PROMPTS = ["a red circle", "a blue square", "a green star"]


def test_videos_have_the_asked_size_order_and_range(text_encoder: TextEncoder) -> None:
    cfg = config(num_per_prompt=2, batch_size=4)
    progress: list[tuple[int, int]] = []
    videos = list(
        sample_videos(
            TinyVelocity(), TinyVae(), text_encoder, PROMPTS, cfg, lambda *x: progress.append(x)
        )
    )
    assert [(v.prompt_index, v.repeat) for v in videos] == [
        (p, r) for p in range(3) for r in (0, 1)
    ]
    assert [v.prompt for v in videos] == [p for p in PROMPTS for _ in (0, 1)]
    for video in videos:
        assert video.pixels.shape == (3, 5, 16, 32)
        assert video.pixels.dtype == torch.float32
        assert video.pixels.abs().max() <= 1
    assert not torch.equal(videos[0].pixels, videos[1].pixels)
    assert progress == [(n, 6) for n in range(1, 7)]  # two batches of three steps


def test_videos_do_not_depend_on_batching_or_sharing(text_encoder: TextEncoder) -> None:
    def run(items: list[int] | None = None, **changes: object) -> dict[tuple[int, int], Tensor]:
        cfg = config(num_per_prompt=2, cfg_scale=3.0, negative_prompt="dark", **changes)
        videos = sample_videos(TinyVelocity(), TinyVae(), text_encoder, PROMPTS, cfg, items=items)
        return {(v.prompt_index, v.repeat): v.pixels for v in videos}

    whole = run(batch_size=1)
    batched = run(batch_size=5)
    shared = {**run(items=[0, 2, 4]), **run(items=[1, 3, 5], batch_size=2, batched_cfg=False)}
    assert whole.keys() == batched.keys() == shared.keys()
    for key, pixels in whole.items():
        torch.testing.assert_close(batched[key], pixels, rtol=0, atol=1e-5)
        torch.testing.assert_close(shared[key], pixels, rtol=0, atol=1e-5)
    other = run(seed=5)
    assert all((other[key] - whole[key]).abs().max() > 0.01 for key in whole)


def test_every_video_starts_from_its_own_noise(text_encoder: TextEncoder) -> None:
    cfg = config(num_per_prompt=2)
    videos = list(sample_videos(TinyVelocity(), TinyVae(), text_encoder, ["a", "a"], cfg))
    for number, video in enumerate(videos):
        for other in videos[:number]:
            assert (video.pixels - other.pixels).abs().mean() > 0.1


def test_latents_are_unscaled_before_decoding(text_encoder: TextEncoder) -> None:
    class Zero(TinyVelocity):
        def forward(self, latents: Tensor, *args: Tensor, **kwargs: Tensor) -> Tensor:
            return torch.zeros_like(latents)

    from hunyuan_train.runtime.seed import keyed_normal

    [video] = sample_videos(Zero(), TinyVae(), text_encoder, ["a"], config())
    noise = keyed_normal((4, 2, 2, 4), 4, "sample", 0, 0)
    expected = (noise[:3, 0] / 0.5).clamp(-1, 1)
    torch.testing.assert_close(video.pixels[:, 0, ::8, ::8], expected)


@pytest.mark.parametrize("guidance_embed", [True, False])
def test_guidance_is_fed_only_to_models_that_embed_it(
    text_encoder: TextEncoder, guidance_embed: bool
) -> None:
    model = TinyVelocity(guidance_embed)
    list(sample_videos(model, TinyVae(), text_encoder, ["a"], config(guidance=4.5)))
    fed = [None if guidance is None else guidance.tolist() for _, _, guidance in model.calls]
    assert fed == [[4500.0] if guidance_embed else None] * 3


def test_media_follows_the_number_of_frames(
    text_encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    encode = text_encoder.encode

    def record(captions: list[str], media: str) -> TextFeatures:
        seen.append(media)
        return encode(captions, media)

    monkeypatch.setattr(text_encoder, "encode", record)
    for frames in (1, 5):
        list(sample_videos(TinyVelocity(), TinyVae(), text_encoder, ["a"], config(frames=frames)))
    assert seen == ["image", "video"]


def test_no_prompts_is_refused(text_encoder: TextEncoder) -> None:
    with pytest.raises(ValueError, match=r"list prompts in sample\.prompts"):
        next(sample_videos(TinyVelocity(), TinyVae(), text_encoder, [], config()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 360}, r"sample\.height.*height=360 is not a multiple of 16"),
        ({"frames": 16}, r"sample\.frames.*frames=16"),
        ({"steps": 0}, r"sample\.steps=0 must be at least 1"),
        ({"shift": -1.0}, r"sample\.shift=-1\.0"),
        ({"cfg_scale": -2.0}, r"sample\.cfg_scale=-2\.0"),
        ({"crf": 60}, r"sample\.crf=60"),
    ],
)
def test_config_names_the_field_and_the_value(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)

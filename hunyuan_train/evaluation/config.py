"""The `sample` and `evaluation` sections: what to sample and how, and what to measure meanwhile."""

from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise

from hunyuan_train.data.buckets import Bucket


class SampleWeights(StrEnum):
    """Which weights of a run to sample from; all but `initial` are sections of its checkpoints."""

    ema = "ema"
    model = "model"
    initial = "initial"


class Schedule(StrEnum):
    """Which noise levels the steps of the sampler go through."""

    shifted = "shifted"
    """Equal steps, moved towards noise by `shift`: the released sampler."""
    linear = "linear"
    """Equal steps."""
    linear_quadratic = "linear_quadratic"
    """Half of the steps for the first 2.5 % of the way, in equal steps, the rest quadratic (Movie
    Gen, arXiv 2410.13720)."""


@dataclass(kw_only=True, slots=True)
class SampleConfig:
    """Prompts, size and sampler settings of one sampling run."""

    prompts: list[str] = field(default_factory=list)
    """What to sample, one video per entry and repetition."""
    prompts_file: str = ""
    """Text file with further prompts, one a line; or .jsonl with rows of prompt and, if they differ
    from this section, negative_prompt, image, last_image and seed."""
    image: str = ""
    """Picture that videos begin with, resized to cover them and cropped; needs
    `model.image_condition`."""
    last_image: str = ""
    """Picture that videos end with, beside `image`."""
    output: str = ""
    """Folder for the videos and the contact sheet; empty is `samples` in the run's folder."""
    negative_prompt: str = ""
    """Text of the unconditional branch; used when `cfg_scale` is not 1."""
    steps: int = 50
    """Euler steps."""
    schedule: Schedule = Schedule.shifted
    """Noise levels of the steps: shifted, linear or linear_quadratic."""
    shift: float = 0.0
    """Shift of the sigmas towards noise; 0 chooses 7, or 17 below 20 steps."""
    cfg_scale: float = 1.0
    """Classifier-free guidance `uncond + cfg_scale * (cond - uncond)`; 1 runs the prompt alone.

    Use about 6 for a model without `guidance_embed`, 1 for a guidance-distilled one."""
    batched_cfg: bool = True
    """Run both guidance branches as one batch; false takes turns, in about half the memory."""
    guidance: float = 6.0
    """Guidance scale fed to a model with `guidance_embed`; other models ignore it.

    The released pipelines round scale * 1000 to bfloat16, so 6.016 here is their 6.0."""
    frames: int = 129
    """Frames in pixels, 4n + 1; 1 samples an image."""
    height: int = 720
    """Height in pixels, a multiple of 16."""
    width: int = 1280
    """Width in pixels, a multiple of 16."""
    fps: int = 24
    """Frame rate written into the mp4 files."""
    crf: int = 18
    """Quality of the mp4 files, 0 (best) to 51."""
    seed: int = 0
    """Seed of the initial noise, which also depends on the prompt's text and pictures alone."""
    num_per_prompt: int = 1
    """Videos per prompt, each from its own noise."""
    weights: SampleWeights = SampleWeights.ema
    """`ema`: averaged weights; `model`: the last ones; `initial`: untrained, for comparison."""
    batch_size: int = 1
    """Videos sampled at once; it does not change them."""

    @property
    def bucket(self) -> Bucket:
        """The size of one sample in pixels."""
        return Bucket(self.frames, self.height, self.width)

    def __post_init__(self) -> None:
        """Reject settings that no sampler can follow."""
        for name in ("steps", "fps", "num_per_prompt", "batch_size"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"sample.{name}={value} must be at least 1")
        if self.shift < 0:
            raise ValueError(f"sample.shift={self.shift} must be above 0, or 0 to choose by steps")
        if self.shift and self.schedule is not Schedule.shifted:
            raise ValueError(
                f"sample.shift={self.shift} belongs to sample.schedule=shifted, not to "
                f"{self.schedule}; leave it at 0"
            )
        if self.cfg_scale < 0:
            raise ValueError(f"sample.cfg_scale={self.cfg_scale} must not be negative; 1 is off")
        if not 0 <= self.crf <= 51:
            raise ValueError(f"sample.crf={self.crf} must be from 0 (best) to 51")
        try:
            _ = self.bucket
        except ValueError as error:
            raise ValueError(f"sample.frames, sample.height, sample.width: {error}") from error


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    """What a training run measures and shows of itself while it runs."""

    every_steps: int = 0
    """Updates between two measurements of the held-out loss, also after `stage.steps`; 0 is off."""
    latents: str = ""
    """Folder or URL of held-out latents that `precompute` wrote with the encoders of the training
    data. Of them the buckets count that the stage trains on."""
    clips: str = ""
    """Folder or manifest of held-out clips and images, for stages that train the VAE."""
    samples_per_bucket: int = 4
    """Samples of each bucket that are measured, spread evenly over those there are."""
    quantiles: list[float] = field(default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.9])
    """Noise levels at which each is measured, as quantiles of the sigmas that training draws. The
    losses of training are booked under the nearest of them."""
    sample_every: int = 0
    """Updates between two sets of samples, also after `stage.steps`; 0 is off. Sizes and sampler
    are those of `sample`."""
    prompts: list[str] = field(default_factory=list)
    """What to sample; the same prompts from the same noise every time."""
    prompts_file: str = ""
    """File with further prompts, as `sample.prompts_file`."""
    max_pending: int = 8
    """Sets of samples that may wait to be written and sent; more are dropped, with a warning."""

    def __post_init__(self) -> None:
        """Reject settings that measure nothing."""
        for name in ("every_steps", "sample_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"evaluation.{name}={getattr(self, name)} must be 0 (off) or more")
        for name in ("samples_per_bucket", "max_pending"):
            if getattr(self, name) < 1:
                raise ValueError(f"evaluation.{name}={getattr(self, name)} must be at least 1")
        increasing = all(low < high for low, high in pairwise(self.quantiles))
        if not (self.quantiles and increasing and 0 < self.quantiles[0] < 1 > self.quantiles[-1]):
            raise ValueError(
                f"evaluation.quantiles={self.quantiles} must be numbers between 0 and 1 in "
                "ascending order, such as [0.1,0.5,0.9]"
            )
        if self.every_steps and not (self.latents or self.clips):
            raise ValueError(
                f"evaluation.every_steps={self.every_steps} needs evaluation.latents; give it the "
                "folder that `hunyuan-train precompute` wrote for held-out clips"
            )
        if self.sample_every and not (self.prompts or self.prompts_file or self.clips):
            raise ValueError(
                f"evaluation.sample_every={self.sample_every} needs evaluation.prompts or "
                "evaluation.prompts_file"
            )

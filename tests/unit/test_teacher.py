"""The teacher of a guidance distillation: its target, its student's first step, its refusals."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_run import MODEL

from hunyuan_train.config.compose import compose_config
from hunyuan_train.config.root import RunConfig
from hunyuan_train.data.buckets import Bucket
from hunyuan_train.engine.denoising import forward_flops, teacher_flops, training_flops
from hunyuan_train.engine.footprint import footprint
from hunyuan_train.engine.inputs import ModelInputs, build_inputs
from hunyuan_train.engine.teacher import (
    TEACHER_NAME,
    Teacher,
    build_teacher,
    check_teacher,
    teacher_layout,
    teacher_model,
)
from hunyuan_train.engine.trial import MicroBatch, make_batch
from hunyuan_train.models.registry import build_model
from hunyuan_train.objectives.conditioning import keyed_scales
from hunyuan_train.objectives.config import FlowMatchingConfig
from hunyuan_train.objectives.distillation import guided_velocity
from hunyuan_train.parallel.mesh import Axes
from hunyuan_train.runtime.dist import World
from hunyuan_train.runtime.seed import keyed_normal

WORLD = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))


def config(folder: Path, *extra: str) -> RunConfig:
    return compose_config(
        [
            *MODEL,
            "model.guidance_embed=true",
            "objective.distill=true",
            f"objective.teacher={folder}/weights",
            f"run.dir={folder}/run",
            "parallel.zero_stage=0",
            *extra,
        ]
    )


def random_weights(cfg: RunConfig) -> dict[str, torch.Tensor]:
    model = build_model(teacher_model(cfg.model))
    return {n: 0.2 * keyed_normal(tuple(p.shape), 1, n) for n, p in model.named_parameters()}


def write_weights(cfg: RunConfig, folder: Path) -> dict[str, torch.Tensor]:
    weights = random_weights(cfg)
    (folder / "weights").mkdir()
    save_file(weights, folder / "weights" / "model.safetensors")
    return weights


def inputs(cfg: RunConfig) -> ModelInputs:
    batch = make_batch(cfg, MicroBatch(Bucket(5, 64, 64), (3, 5, 7)), 0, 9)
    return build_inputs(batch, cfg, 1.0, torch.device("cpu"))


def test_target_is_uncond_plus_w_times_the_difference(tmp_path: Path) -> None:
    cfg = config(tmp_path, "objective.text_drop=1")
    weights = write_weights(cfg, tmp_path)
    teacher = build_teacher(cfg, Axes.alone(), WORLD)
    batch = make_batch(cfg, MicroBatch(Bucket(5, 64, 64), (3, 5, 7)), 0, 9)
    x = build_inputs(batch, cfg, 1.0, torch.device("cpu"))
    found = teacher.target(x)
    assert not found.requires_grad

    model = build_model(teacher_model(cfg.model))
    model.load_state_dict(weights)
    scale = keyed_scales(cfg.objective, cfg.run.seed, batch.sample_ids, batch.epochs)
    assert x.guidance is not None
    assert torch.equal(x.guidance, scale * 1000)
    with torch.no_grad():
        # One sample at a time, with its own caption: text_drop does not reach a distillation.
        for i in range(3):
            here = (x.noisy[i : i + 1], x.time[i : i + 1])
            length = int(batch.text_mask[i].sum())
            cond = model(*here, batch.text[i : i + 1, :length], None, batch.pooled[i : i + 1])
            uncond = model(*here, batch.empty_text[None, :2], None, batch.empty_pooled[None])
            wanted = uncond + scale[i] * (cond - uncond)
            torch.testing.assert_close(found[i : i + 1], wanted, rtol=1e-4, atol=1e-4)
            assert (wanted - cond).abs().max() > 0.01, "the scale has to matter here"


@pytest.mark.parametrize("fields", [
    [],
    ["model.image_condition=token_replace", "objective.tasks={text: 0.5, first: 0.5}"],
    ["model.image_condition=concat", "model.in_channels=33", "objective.tasks={first_last: 1}"],
])  # fmt: skip
def test_a_student_with_a_silent_embedder_is_the_teacher_at_any_scale(
    tmp_path: Path, fields: list[str]
) -> None:
    cfg = config(tmp_path, *fields)
    weights = write_weights(cfg, tmp_path)
    teacher = build_teacher(cfg, Axes.alone(), WORLD)
    student = build_model(cfg.model)
    missing, unknown = student.load_state_dict(weights, strict=False)
    assert not unknown
    assert all(name.startswith("guidance_in.") for name in missing)
    torch.nn.init.zeros_(student.get_parameter("guidance_in.mlp.2.weight"))
    torch.nn.init.zeros_(student.get_parameter("guidance_in.mlp.2.bias"))
    x = inputs(cfg)
    assert (x.given is not None) == ("token_replace" in "".join(fields))
    with torch.no_grad():
        cond = teacher.module(*replace(x, guidance=None).arguments())
        assert torch.equal(student(*x.arguments()), cond)
        # And at w = 1 that is the target: the loss of a student starts at zero.
        one = replace(x, guidance=torch.full((3,), 1000.0))
        torch.testing.assert_close(teacher.target(one), cond, rtol=1e-5, atol=1e-5)


def test_its_forwards_and_its_weights_are_counted(tmp_path: Path) -> None:
    cfg = config(tmp_path, "parallel.compute_dtype=bfloat16", "parallel.zero_stage=2")
    plain = replace(cfg, objective=replace(cfg.objective, distill=False))
    assert footprint(cfg).teacher == 2
    assert footprint(plain).teacher == 0
    batch = make_batch(cfg, MicroBatch(Bucket(5, 64, 64), (3, 5, 7)), 0, 9)
    flops = forward_flops(batch, cfg).total
    # Two forwards, one with fewer text tokens and both without the embedder of the scale.
    assert 1.8 * flops < teacher_flops(batch, cfg) < 2 * flops
    assert teacher_flops(batch, plain) == 0
    taught, untaught = training_flops(batch, cfg), training_flops(batch, plain)
    assert taught == untaught + teacher_flops(batch, cfg)


def test_predictions_are_combined_in_float32() -> None:
    cond, uncond = torch.full((1, 1, 1, 1, 1), 1.0078125), torch.ones(1, 1, 1, 1, 1)
    found = guided_velocity(cond.bfloat16(), uncond.bfloat16(), torch.tensor([3.3]))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.flatten(), torch.tensor([1 + 3.3 * 0.0078125]))


def test_scales_are_uniform_in_their_range_and_keyed_by_sample() -> None:
    cfg = FlowMatchingConfig(guidance_min=2.0, guidance_max=6.0)
    ids, epochs = [f"clip-{n}" for n in range(4000)], [0] * 4000
    scales = keyed_scales(cfg, 0, ids, epochs)
    assert scales.min() >= 2
    assert scales.max() < 6
    # Standard errors: 4 / sqrt(12 * 4000) of the mean.
    assert abs(scales.mean() - 4) < 4 * 4 / (12 * 4000) ** 0.5
    assert abs((scales < 3).double().mean() - 0.25) < 0.03
    assert torch.equal(keyed_scales(cfg, 0, ids[7:9], [0, 0]), scales[7:9])
    assert not torch.equal(keyed_scales(cfg, 0, ids, [1] * 4000), scales)


def test_without_a_teacher_in_sight_one_sentence_says_what_to_set(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    cfg.objective.teacher = ""
    with pytest.raises(ValueError, match=r"needs a teacher; set objective\.teacher, or stage\.ini"):
        build_teacher(cfg, Axes.alone(), WORLD)


def test_other_models_are_refused_as_teachers(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    folder = tmp_path / "weights"
    write_weights(cfg, tmp_path)
    (folder / "config.json").write_text('{"guidance_embed": true}')
    with pytest.raises(ValueError, match="takes a guidance scale itself"):
        check_teacher(cfg.model, folder)
    (folder / "config.json").write_text('{"guidance_embed": false, "hidden_size": 64}')
    with pytest.raises(ValueError, match=r"model\.hidden_size is 64 there and 32 here"):
        build_teacher(cfg, Axes.alone(), WORLD)
    (folder / "config.json").unlink()
    save_file({"time_in.mlp.0.bias": torch.zeros(32)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks the tensor double_blocks\.0\.img_attn_k_norm"):
        build_teacher(cfg, Axes.alone(), WORLD)


def test_distilling_into_a_model_that_is_not_told_the_scale_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"objective\.distill=true .*model\.guidance_embed=false"):
        config(tmp_path, "model.guidance_embed=false")


def test_a_restart_takes_the_noted_weights_or_says_that_they_are_gone(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    write_weights(cfg, tmp_path)
    first = build_teacher(cfg, Axes.alone(), WORLD)
    assert (Path(cfg.run.dir) / TEACHER_NAME).is_file()
    again = build_teacher(cfg, Axes.alone(), WORLD)
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.module.parameters(), again.module.parameters(), strict=True)
    )
    (tmp_path / "weights").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"weights is gone, the teacher this run was started with"):
        build_teacher(cfg, Axes.alone(), WORLD)


@pytest.mark.parametrize("stage", [1, 2])
def test_below_stage_three_the_teacher_is_whole_in_the_compute_dtype(
    tmp_path: Path, stage: int
) -> None:
    extra = [f"parallel.zero_stage={stage}", "parallel.compute_dtype=bfloat16"]
    cfg = config(tmp_path, *extra, "parallel.reduce_every=auto")
    assert teacher_layout(cfg.parallel).zero_stage == 0
    write_weights(cfg, tmp_path)
    teacher = build_teacher(cfg, Axes.alone(), WORLD)
    assert isinstance(teacher, Teacher)
    assert {p.dtype for p in teacher.module.parameters()} == {torch.bfloat16}
    assert teacher.target(inputs(cfg)).dtype == torch.float32

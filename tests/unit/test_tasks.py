"""Tasks of samples: which frames they are given, and that these are what the loss leaves out."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from hunyuan_train.config.compose import compose_config
from hunyuan_train.config.root import RunConfig
from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.collate import Batch
from hunyuan_train.engine.inputs import ModelInputs, build_inputs, loss_tokens
from hunyuan_train.engine.trial import MicroBatch, make_batch
from hunyuan_train.models.hunyuan.config import ImageCondition
from hunyuan_train.objectives.config import FlowMatchingConfig, Task
from hunyuan_train.objectives.loss import flow_matching_loss
from hunyuan_train.objectives.tasks import draw_tasks, frame_mask, give_frames, place_frames

SCALE = 0.5
VIDEO, IMAGE = Bucket(17, 64, 96), Bucket(1, 64, 96)
REPLACE = ["model.image_condition=token_replace"]
CONCAT = ["model.image_condition=concat", "model.in_channels=33"]
MIXED = ["objective.tasks={text:2,first:1,first_last:1}"]


def config(*overrides: str) -> RunConfig:
    return compose_config(["model=tiny", "objective.text_drop=0.5", *overrides])


def batch_of(cfg: RunConfig, bucket: Bucket = VIDEO, samples: int = 12) -> Batch:
    return make_batch(cfg, MicroBatch(bucket, (5,) * samples), 0, 7)


def inputs_of(cfg: RunConfig, batch: Batch) -> ModelInputs:
    return build_inputs(batch, cfg, SCALE, torch.device("cpu"))


def tasks_of(cfg: RunConfig, batch: Batch, frames: int = 5) -> list[Task]:
    return draw_tasks(cfg.objective, cfg.run.seed, batch.sample_ids, batch.epochs, frames)


def test_tasks_have_their_shares_and_belong_to_the_sample():
    cfg = FlowMatchingConfig(tasks={"first_last": 1.0, "text": 2.0, "first": 5.0})
    ids = [f"clip-{number}" for number in range(4000)]
    tasks = draw_tasks(cfg, 3, ids, [0] * len(ids), 5)
    shares = {task: count / len(ids) for task, count in Counter(tasks).items()}
    assert shares == pytest.approx({"text": 0.25, "first": 0.625, "first_last": 0.125}, abs=0.03)
    some = [7, 3, 99]
    assert draw_tasks(cfg, 3, [ids[i] for i in some], [0] * 3, 5) == [tasks[i] for i in some]
    assert draw_tasks(cfg, 3, ids, [1] * len(ids), 5) != tasks
    assert draw_tasks(cfg, 4, ids, [0] * len(ids), 5) != tasks


def test_pictures_are_text_and_two_latent_frames_leave_one_to_learn():
    cfg = FlowMatchingConfig(tasks={"first_last": 1.0})
    assert draw_tasks(cfg, 0, ["a"], [0], 1) == [Task.text]
    assert draw_tasks(cfg, 0, ["a"], [0], 2) == [Task.first]
    assert draw_tasks(cfg, 0, ["a"], [0], 3) == [Task.first_last]
    assert draw_tasks(FlowMatchingConfig(), 0, ["a"], [0], 3) == [Task.text]
    assert (cfg.given_frames, FlowMatchingConfig().given_frames) == (["first", "last"], [])
    assert FlowMatchingConfig(tasks={"first": 1, "first_last": 0}).given_frames == ["first"]


def test_masks_and_places_of_frames():
    mask = frame_mask([Task.text, Task.first, Task.first_last], 4)
    assert mask.int().tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 1]]
    pictures = torch.arange(1.0, 5.0).view(2, 1, 2, 1, 1)
    placed = place_frames(pictures, ["first", "last"], 3).flatten(1)
    assert placed.tolist() == [[1, 0, 2], [3, 0, 4]]
    noisy, clean = torch.full((2, 1, 3, 1, 1), 9.0), place_frames(pictures, ["first", "last"], 3)
    given = torch.tensor([[True, False, False], [True, False, True]])
    replaced = give_frames(ImageCondition.token_replace, noisy, clean, given)
    assert replaced.flatten(1).tolist() == [[1, 9, 9], [3, 9, 4]]
    joined = give_frames(ImageCondition.concat, noisy, clean, given)
    assert joined.flatten(2).tolist() == [
        [[9, 9, 9], [1, 0, 0], [1, 0, 0]],
        [[9, 9, 9], [3, 0, 4], [1, 0, 1]],
    ]


def test_replaced_frames_are_their_pictures_and_not_learned():
    cfg, plain = config(*REPLACE, *MIXED), config()
    batch = batch_of(cfg)
    batch.stills[:, 1] = 0.0  # no spread: the draws are then the means
    x, before, tasks = inputs_of(cfg, batch), inputs_of(plain, batch), tasks_of(cfg, batch)
    assert set(tasks) == set(Task)
    assert torch.equal(x.given, frame_mask(tasks, 5))
    assert torch.equal(x.target, before.target)
    assert torch.equal(x.time, before.time)
    for row, task in enumerate(tasks):
        for frame in range(5):
            wanted = before.noisy[row, :, frame]
            if x.given[row, frame]:
                wanted = batch.stills[row, 0, :, 0 if frame == 0 else 1] * SCALE
            torch.testing.assert_close(x.noisy[row, :, frame], wanted, msg=f"{task} {frame}")
    assert torch.equal(x.arguments()[-1], x.given)
    loss = flow_matching_loss(x.noisy * 0, x.target, given=x.given)
    assert loss.count == loss_tokens(batch, cfg) < loss_tokens(batch, plain)
    elsewhere = x.target + 100 * x.given[:, None, :, None, None]
    again = flow_matching_loss(x.noisy * 0, elsewhere, given=x.given)
    assert torch.equal(loss.samples, again.samples)
    kept = x.target.square().mean(dim=(1, 3, 4))[~x.given]
    assert loss.mean.item() == pytest.approx(kept.mean().item(), rel=1e-5)


def test_joined_frames_and_mask_are_channels_and_all_is_learned():
    cfg, plain = config(*CONCAT, *MIXED), config()
    batch = batch_of(cfg)
    batch.stills[:, 1] = 0.0
    x, before, mask = (
        inputs_of(cfg, batch),
        inputs_of(plain, batch),
        frame_mask(tasks_of(cfg, batch), 5),
    )
    assert x.noisy.shape == (12, 33, 5, 8, 12)
    assert torch.equal(x.noisy[:, :16], before.noisy)
    assert torch.equal(x.noisy[:, 32], mask[:, :, None, None].expand(-1, -1, 8, 12).float())
    shown = x.noisy[:, 16:32]
    for frame, place in ((0, 0), (4, 1)):
        wanted = batch.stills[:, 0, :, place] * SCALE * mask[:, frame].view(-1, 1, 1, 1)
        torch.testing.assert_close(shown[:, :, frame], wanted)
    assert not shown[:, :, 1:4].any()
    assert x.given is None
    assert x.arguments()[-1] is None
    assert loss_tokens(batch, cfg) == loss_tokens(batch, plain) == 12 * VIDEO.tokens


def test_pictures_are_drawn_from_their_posterior_and_keyed_by_sample():
    cfg = config(*REPLACE, "objective.tasks={first:1}")
    batch = batch_of(cfg)
    x = inputs_of(cfg, batch)
    deviation = (x.noisy[:, :, 0] / SCALE - batch.stills[:, 0, :, 0]) / batch.stills[:, 1, :, 0]
    assert deviation.std().item() == pytest.approx(1.0, abs=0.05)
    assert (deviation[0] - deviation[1]).abs().max() > 1
    later = inputs_of(cfg, replace(batch, epochs=[1] * 12))
    assert not torch.equal(later.noisy[:, :, 0], x.noisy[:, :, 0])


@pytest.mark.parametrize("form", [REPLACE, CONCAT])
def test_images_and_text_alone_are_given_nothing(form):
    for more, bucket in ((MIXED, IMAGE), ([], VIDEO)):
        cfg = config(*form, *more)
        batch = batch_of(cfg, bucket)
        x, before = inputs_of(cfg, batch), inputs_of(config(), batch)
        assert x.given is None
        assert torch.equal(x.noisy[:, :16], before.noisy)
        assert not x.noisy[:, 16:].any()
        assert loss_tokens(batch, cfg) == 12 * bucket.tokens


def test_a_store_without_the_frames_is_named():
    cfg = config(*REPLACE, *MIXED)
    batch = replace(batch_of(cfg), stills=None, still_frames=[])
    with pytest.raises(ValueError, match=r"with data\.condition_frames=\[first,last\]"):
        inputs_of(cfg, batch)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (MIXED, r"model\.image_condition=none\); set it to token_replace or concat"),
        (
            [*REPLACE, *MIXED, "data.encode=online", "data.condition_frames=[first]"],
            r"data\.condition_frames=\['first'\]; set it to \[first,last\]",
        ),
        ([*CONCAT[:1]], r"must be 2 \* model\.out_channels \+ 1 = 33"),
        (["model.image_condition=token_replace", "model.in_channels=33"], "set it to 16"),
    ],
)
def test_configs_that_do_not_fit(overrides, message):
    with pytest.raises(ValueError, match=message):
        config(*overrides)

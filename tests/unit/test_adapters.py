"""Adapters: where they sit, what is trained, and that merging them changes no output."""

import sys
from dataclasses import replace

import pytest
import torch
from tiny_run import MODEL
from torch import nn

from hunyuan_train.config.compose import compose_config
from hunyuan_train.config.root import RunConfig
from hunyuan_train.data.buckets import Bucket
from hunyuan_train.engine.build import averaged_weights, init_weights, lay_out, model_and_rules
from hunyuan_train.engine.denoising import Denoising, forward_flops
from hunyuan_train.engine.footprint import footprint, trained_share
from hunyuan_train.engine.inputs import build_inputs
from hunyuan_train.engine.state import TrainState
from hunyuan_train.engine.step import global_counts, train_step
from hunyuan_train.engine.trial import MicroBatch, make_batch
from hunyuan_train.memory.config import Recompute
from hunyuan_train.memory.recompute import BucketMode
from hunyuan_train.models.lora import (
    add_adapters,
    is_adapter,
    merged,
    saved_name,
    saved_parameters,
)
from hunyuan_train.models.lora_config import LoraConfig
from hunyuan_train.models.registry import build_model, init_rules
from hunyuan_train.optim.ema import Ema
from hunyuan_train.optim.updates import build_updates
from hunyuan_train.parallel.mesh import Axes
from hunyuan_train.resilience.guard import Guard
from hunyuan_train.runtime.dist import World
from hunyuan_train.runtime.seed import keyed_normal

CPU = torch.device("cpu")
SHAPE = MicroBatch(Bucket(5, 64, 64), (3, 5))


def config(*extra: str) -> RunConfig:
    return compose_config([*MODEL, "lora.rank=4", "lora.alpha=8", "parallel.zero_stage=0", *extra])


def random_model(cfg: RunConfig) -> nn.Module:
    model = build_model(cfg.model)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(0.2 * keyed_normal(tuple(param.shape), 1, name))
    return model


def arguments(cfg: RunConfig) -> tuple:
    return build_inputs(make_batch(cfg, SHAPE, 0, 7), cfg, 1.0, CPU).arguments()


def test_default_targets_are_the_linears_of_attention_and_mlp() -> None:
    model = random_model(config())
    before = set(dict(model.named_parameters()))
    rules = add_adapters(model, LoraConfig(rank=4))
    adapted = {name.rpartition(".lora_")[0] for name in rules}
    double = {f"{side}_{part}" for side in ("img", "txt") for part in (
        "attn_qkv", "attn_proj", "mlp.fc1", "mlp.fc2")}  # fmt: skip
    wanted = {f"double_blocks.0.{name}" for name in double}
    wanted |= {f"single_blocks.{n}.linear{m}" for n in (0, 1) for m in (1, 2)}
    refiner = "txt_in.individual_token_refiner.blocks"
    parts = ("self_attn_qkv", "self_attn_proj", "mlp.fc1", "mlp.fc2")
    wanted |= {f"{refiner}.0.{part}" for part in parts}
    assert adapted == wanted
    # The weights keep their names, and nothing else is trained.
    named = saved_parameters(model)
    assert set(named) == before | set(rules)
    assert {name for name, p in named.items() if p.requires_grad} == set(rules)


def test_new_adapters_change_nothing_and_start_as_published() -> None:
    cfg = config()
    model = random_model(cfg)
    with torch.no_grad():
        wanted = model(*arguments(cfg))
        rules = add_adapters(model, cfg.lora)
        generator = torch.Generator().manual_seed(0)
        for name, param in saved_parameters(model).items():
            if name in rules:
                rules[name].fill(param, generator)
        assert torch.equal(model(*arguments(cfg)), wanted)
    named = saved_parameters(model)
    downs = torch.cat([p.flatten() for n, p in named.items() if n.endswith("lora_A.weight")])
    assert abs(downs.std() - 1 / 4) < 0.01
    assert all((p == 0).all() for n, p in named.items() if n.endswith("lora_B.weight"))


def test_merged_weights_give_the_same_output() -> None:
    cfg = config()
    adapted, plain = random_model(cfg), random_model(cfg)
    base = {name: param.clone() for name, param in plain.named_parameters()}
    rules = add_adapters(adapted, cfg.lora)
    named = saved_parameters(adapted)
    with torch.no_grad():
        untouched = plain(*arguments(cfg))
        for name in rules:
            named[name].copy_(0.2 * keyed_normal(tuple(named[name].shape), 2, name))
        wanted = adapted(*arguments(cfg))
        for name in {n.rpartition(".lora_")[0] for n in rules}:
            halves = named[f"{name}.lora_A.weight"], named[f"{name}.lora_B.weight"]
            plain.get_parameter(f"{name}.weight").copy_(
                merged(base[f"{name}.weight"], *halves, cfg.lora.scale)
            )
        found = plain(*arguments(cfg))
    assert (wanted - untouched).abs().max() > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_alpha_over_rank_is_the_strength() -> None:
    assert LoraConfig(rank=4).scale == 1
    assert LoraConfig(rank=4, alpha=8).scale == 2
    model = nn.ModuleDict({"fc1": nn.Linear(3, 3)})
    add_adapters(model, LoraConfig(rank=2, alpha=6, targets=["fc1"]))
    named = saved_parameters(model)
    with torch.no_grad():
        for name in ("fc1.lora_A.weight", "fc1.lora_B.weight"):
            named[name].fill_(1.0)
        x = torch.ones(1, 3)
        plain = nn.functional.linear(x, named["fc1.weight"], named["fc1.bias"])
        torch.testing.assert_close(model["fc1"](x) - plain, torch.full((1, 3), 3.0 * 3 * 2))


def test_frozen_weights_are_kept_in_the_compute_dtype() -> None:
    module, _ = model_and_rules(config("parallel.compute_dtype=bfloat16", "parallel.zero_stage=1"))
    dtypes = {is_adapter(n): p.dtype for n, p in saved_parameters(module).items()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}


def test_training_moves_adapters_alone_and_averages_them_alone() -> None:
    cfg = config("optimizer.lr=1e-2")
    world = World(rank=0, local_rank=0, size=1, device=CPU)
    model, rules = lay_out(cfg, Axes.alone(), CPU)
    updates = build_updates(model, cfg.parallel, cfg.optimizer)
    init_weights(updates, rules, 0)
    state = TrainState(
        model=model,
        updates=updates,
        ema=Ema(model.module, cfg.optimizer, averaged_weights(updates, cfg)),
        loader=None,  # pyright: ignore[reportArgumentType]
        guard=Guard(cfg.resilience),
        skipped_updates=torch.zeros(()),
    )
    with torch.no_grad():  # gates of zero let nothing through to an adapter
        for name, weight in updates.local_weights().items():
            if not is_adapter(name):
                weight.add_(0.1 * keyed_normal(tuple(weight.shape), 3, name))
    before = {n: w.clone() for n, w in updates.local_weights().items()}
    for step in range(3):
        metrics = train_step(state, [make_batch(cfg, SHAPE, step, 7)], cfg, world, 1.0)
        assert metrics.grad_norm > 0
    after = updates.local_weights()
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved == {n for n in before if is_adapter(n)}
    assert set(updates.local_moments()) == set(state.ema.state_dict()) == moved
    assert set(state.weights()["model"]) == set(before)


def test_the_same_weights_are_drawn_with_and_without_adapters() -> None:
    cfg = config()
    plain = replace(cfg, lora=LoraConfig())
    drawn = []
    for each in (cfg, plain):
        model, rules = lay_out(each, Axes.alone(), CPU)
        updates = build_updates(model, each.parallel, each.optimizer)
        init_weights(updates, rules, 0)
        drawn.append(updates.local_weights())
    with_adapters, without = drawn
    assert all(torch.equal(with_adapters[name], without[name]) for name in without)
    assert set(with_adapters) - set(without) == {n for n in with_adapters if is_adapter(n)}
    assert set(init_rules(build_model(cfg.model))) >= set(without)


def test_the_estimate_leaves_out_what_is_frozen() -> None:
    cfg = compose_config(
        [
            "model=hunyuan_video_13b",
            "text=hunyuan",
            "vae=hunyuan_884",
            "lora.rank=64",
            "parallel.compute_dtype=bfloat16",
        ]
    )
    found = footprint(cfg)
    # 64 rows and columns of widths from 3,072 to 21,504: 242 million parameters to 12.8e9.
    assert found.gradient / 4 == pytest.approx(0.0189, abs=1e-4)
    assert found.total == pytest.approx(2 + 20 * found.gradient / 4)
    assert found.total * 12.8e9 / 2**30 < 32


def test_gradients_that_are_not_computed_are_not_counted() -> None:
    cfg, axes = config(), Axes.alone()
    batches, mode = [make_batch(cfg, SHAPE, 0, 7)], BucketMode(Recompute.none, offload=False)
    flops = forward_flops(batches[0], cfg)
    cpu = torch.device("cpu")
    whole = global_counts(batches, [mode], Denoising(cfg, cpu, 1.0), axes).flops
    assert whole == flops.training
    frozen = global_counts(batches, [mode], Denoising(cfg, cpu, 1.0, 0.25), axes).flops
    assert frozen == pytest.approx(whole - 0.75 * (flops.linear - flops.of_mask))
    assert 0 < trained_share(cfg) < 0.3


def test_names_of_wrapped_parameters() -> None:
    assert saved_name("a.fc1.base_layer.weight") == "a.fc1.weight"
    assert saved_name("a.fc1.lora_A.default.weight") == "a.fc1.lora_A.weight"
    assert saved_name("a.fc1.bias") == "a.fc1.bias"
    assert is_adapter("a.fc1.lora_B.weight")
    assert not is_adapter("a.fc1.weight")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (["parallel.tp=2"], r"lora\.rank=4 wraps whole linears.*set parallel\.tp=1"),
        (["parallel.tp=2", "parallel.tensor_engine=megatron"], r"lora\.rank=4 wraps whole linears"),
        (["parallel.zero_engine=deepspeed", "parallel.zero_stage=2"], r"set parallel\.zero_engine"),
        (["memory.compile=true"], r"lora\.rank=4 cannot be compiled"),
        (["optimizer.trainable=[img_in.*]"], r"leave optimizer\.trainable empty"),
        (["objective.distill=true", "model.guidance_embed=true"], r"set lora\.rank=0"),
        (["lora.alpha=-1"], r"lora\.alpha=-1\.0 must not be negative"),
        (["lora.targets=[]"], r"lora\.targets is empty"),
    ],
)
def test_what_does_not_go_together_is_said_before_the_start(
    fields: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config(*fields)


def test_a_pattern_that_is_no_linear_is_named() -> None:
    with pytest.raises(ValueError, match=r"lora\.targets has the pattern '\*\.linear3'"):
        add_adapters(random_model(config()), LoraConfig(rank=2, targets=["*.fc1", "*.linear3"]))


def test_without_peft_one_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"pip install hunyuan_train\[lora\]"):
        add_adapters(random_model(config()), LoraConfig(rank=2))

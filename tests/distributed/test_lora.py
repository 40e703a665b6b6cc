"""Adapters under every layout; a run of them resumed, converted for peft, merged and sampled."""

import json
from pathlib import Path

import pytest
import torch
from distributed import run_distributed
from layout_errors import layout_errors
from safetensors.torch import load_file
from tiny_run import MODEL, make_data, overrides, rows
from torch import nn
from train_all import train_all

from hunyuan_train.checkpoint.load import load_weights, stored_tensors
from hunyuan_train.cli import convert
from hunyuan_train.config.compose import compose_config
from hunyuan_train.data.buckets import Bucket
from hunyuan_train.engine.inputs import build_inputs
from hunyuan_train.engine.trial import MicroBatch, make_batch
from hunyuan_train.models.lora import is_adapter
from hunyuan_train.models.registry import build_model

pytestmark = pytest.mark.dist

LAYOUTS = {
    "zero0": "zero_stage=0",
    "zero1": "zero_stage=1",
    "zero2": "zero_stage=2",
    "zero3": "zero_stage=3",
    "ring2": "cp_ring=2",
    "ulysses2, zero3": "cp_ulysses=2 zero_stage=3",
}
LORA = ["lora.rank=4", "lora.alpha=8"]


@pytest.mark.parametrize(
    "recompute",
    ["selective", *(pytest.param(mode, marks=pytest.mark.again) for mode in ("none", "full"))],
)
def test_every_layout_trains_what_one_process_trains(recompute: str) -> None:
    fields = [*LORA, f"memory.recompute={recompute}"]
    for layout, errors in run_distributed(layout_errors, 2, LAYOUTS, fields)[0].items():
        over = {name: error for name, error in errors.items() if not error <= 1e-5}
        assert not over, f"{layout}: {over}"
        groups = [name for name in errors if name.startswith("gradient ")]
        assert groups
        assert all(".lora_" in group for group in groups), "nothing else has a gradient"


def adapters(data: Path, base: Path, run: Path, *extra: str) -> list[str]:
    return overrides(
        data, run, *LORA, f"stage.init_from={base}", "stage.carry=[ema]",
        "parallel.compute_dtype=bfloat16", "parallel.zero_stage=3", "optimizer.lr=5e-2", *extra,
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Data, a run of the whole model, and adapters trained on its average in bfloat16."""
    folder = tmp_path_factory.mktemp("runs")
    data = make_data(tmp_path_factory.mktemp("data"), num_clips=4, num_images=2)
    base, lora, broken, more = (folder / name for name in ("base", "lora", "broken", "more"))
    stages = [
        overrides(data, base, "optimizer.lr=1e-2", "stage.steps=5"),
        adapters(data, base, lora),
        adapters(data, base, broken, "stage.steps=3"),
        adapters(data, base, broken, "run.accept_changes=true"),
        adapters(data, lora, more, "optimizer.lr=1e-12", "stage.steps=3",
                 "stage.carry=[weights,ema]"),
        overrides(data, folder / "plain", f"stage.init_from={lora}"),
    ]  # fmt: skip
    (ends,) = run_distributed(train_all, 1, stages, timeout_s=280)
    assert ends[:-1] == ["done"] * 5
    assert "has adapters beside its weights, and this stage has none" in ends[-1]
    return {"data": data, "base": base, "lora": lora, "broken": broken, "more": more}


def outputs(model: nn.Module) -> torch.Tensor:
    cfg = compose_config(MODEL)
    batch = make_batch(cfg, MicroBatch(Bucket(5, 64, 64), (3, 5)), 0, 7)
    with torch.no_grad():
        return model(*build_inputs(batch, cfg, 1.0, torch.device("cpu")).arguments())


def converted(run: Path, output: Path, layout: str = "ours") -> dict[str, torch.Tensor]:
    given = ["from=ours", f"to={layout}", "model=tiny", f"input={run}", f"output={output}"]
    assert convert.main([*given, "ema=true", *MODEL]) == 0
    (path,) = output.glob("*.safetensors")
    return load_file(path)


@pytest.mark.slow
def test_frozen_weights_are_those_it_started_from(runs: dict[str, Path]) -> None:
    start = load_weights(runs["base"], "ema")
    end = load_weights(runs["lora"], "model")
    for name, weight in start.items():
        assert torch.equal(end[name], weight.bfloat16()), name
    trained = {name for name in end if is_adapter(name)}
    assert set(end) == set(start) | trained
    assert all(end[name].any() for name in trained), "each half has moved"
    (step,) = (runs["lora"] / "checkpoints").glob("step-*")
    average = {n.removeprefix("ema/") for n in stored_tensors(step) if n.startswith("ema/")}
    assert average == trained


@pytest.mark.slow
def test_a_resumed_run_is_bitwise_the_straight_one(runs: dict[str, Path]) -> None:
    assert [r["loss"] for r in rows(runs["broken"])] == [r["loss"] for r in rows(runs["lora"])]
    for which in ("model", "ema"):
        one, two = load_weights(runs["lora"], which), load_weights(runs["broken"], which)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one), which


@pytest.mark.slow
def test_peft_and_merged_weights_give_the_same_output(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    from peft import PeftModel

    frozen = {n: w for n, w in load_weights(runs["lora"]).items() if not is_adapter(n)}
    plain, whole = (build_model(compose_config(MODEL).model) for _ in range(2))
    plain.load_state_dict(frozen)
    untouched = outputs(plain)
    halves = converted(runs["lora"], tmp_path / "peft", "peft")
    assert all(key.startswith("base_model.model.") for key in halves)
    settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (4, 8)
    adapted = PeftModel.from_pretrained(plain, tmp_path / "peft")
    # Merged in the type that the frozen weights are kept in, so up to its rounding.
    merged = converted(runs["lora"], tmp_path / "merged")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    whole.load_state_dict(merged)
    wanted, found = outputs(adapted), outputs(whole)
    effect = (wanted - untouched).abs().max()
    assert effect > 1e-3
    assert (found - wanted).abs().max() < 0.1 * effect


def sampled(rank: int, world: int, run: str) -> torch.Tensor:
    """Return what the model that ``sample`` builds computes."""
    from hunyuan_train.config.compose import load_config
    from hunyuan_train.engine.sampling import load_model, newest_weights
    from hunyuan_train.runtime.dist import World

    found = newest_weights(Path(run))
    cfg = load_config(found.config, ["sample.weights=ema", "parallel.compute_dtype=float32"])
    here = World(rank=rank, local_rank=rank, size=world, device=torch.device("cpu"))
    return outputs(load_model(cfg, found.checkpoint, here).module)


@pytest.mark.slow
def test_samples_are_of_the_adapted_model(runs: dict[str, Path], tmp_path: Path) -> None:
    (found,) = run_distributed(sampled, 1, str(runs["lora"]))
    whole = build_model(compose_config(MODEL).model)
    whole.load_state_dict(converted(runs["lora"], tmp_path))
    wanted = outputs(whole)
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2 * float(wanted.abs().max()))


@pytest.mark.slow
def test_a_stage_goes_on_with_the_adapters_of_another(runs: dict[str, Path]) -> None:
    then, now = load_weights(runs["lora"], "model"), load_weights(runs["more"], "model")
    for name, weight in then.items():
        torch.testing.assert_close(now[name], weight, rtol=0, atol=1e-9, msg=name)

"""A certificate holds for a right layout and names what is wrong with a broken one."""

from collections.abc import Callable
from pathlib import Path

import pytest
from distributed import run_distributed
from tiny_run import make_data, overrides, run_verb

pytestmark = pytest.mark.dist


def _break_ring(patch: pytest.MonkeyPatch) -> None:
    """The backward attends to the keys of hop 0 in every hop (huggingface/diffusers#14265)."""
    from hunyuan_train.parallel import ring

    right, first = ring._hops, {}

    def stale(place, k, v, masks):
        first["keys"] = (k, v)
        yield from right(place, k, v, masks)

    def of_hop(arrived, masks, chunk):
        return keys(first["keys"] if backward[0] else arrived, masks, chunk)

    keys, backward, backwards = ring._keys_of_hop, [False], ring._backward

    def in_backward(*args):
        backward[0] = True
        try:
            return backwards(*args)
        finally:
            backward[0] = False

    patch.setattr(ring, "_hops", stale)
    patch.setattr(ring, "_keys_of_hop", of_hop)
    patch.setattr(ring, "_backward", in_backward)


def _break_padding(patch: pytest.MonkeyPatch) -> None:
    """Attention sees the rows that only pad a sequence to a multiple of the shards."""
    from hunyuan_train.parallel import sequence

    right = sequence.ShardedTokens._order

    def unmasked(self, by_cp, img_tokens, device):
        order = right(self, by_cp, img_tokens, device)
        return order._replace(
            keep=tuple(None for _ in order.keep),
            text=tuple((chunk - img_tokens) for chunk in by_cp.view(len(order.keep), -1)),
        )

    patch.setattr(sequence.ShardedTokens, "_order", unmasked)


def _break_tensor_sum(patch: pytest.MonkeyPatch) -> None:
    """Gradients of what runs on local heads are not added up over tensor-parallel ranks."""
    from hunyuan_train.parallel import gradients

    patch.setattr(gradients, "sum_in_place", lambda tensors, group: None)


def _break_row_sum(patch: pytest.MonkeyPatch) -> None:
    """A row linear keeps its part of the output instead of the sum over ranks."""
    from hunyuan_train.parallel import tensor

    patch.setattr(tensor, "sum_to_whole", lambda x, group: x)


def _break_loss_scale(patch: pytest.MonkeyPatch) -> None:
    """Gradients are averaged over the ranks that share the global token count."""
    from hunyuan_train.optim import updates

    patch.setattr(updates, "is_sharded", lambda module: False)


SP, RING, TP, ZERO = (
    ["parallel.tp=2", "parallel.sp=true"],
    ["parallel.cp_ring=2"],
    ["parallel.tp=2"],
    ["parallel.zero_stage=3"],
)
QKV = "gradient double_blocks.*.img_attn_qkv"
PLANTED = [
    pytest.param(_break_ring, RING, {QKV}, {"output", "loss"}, id="ring backward"),
    pytest.param(_break_padding, SP, {QKV, "output"}, set(), id="padding mask"),
    pytest.param(
        _break_tensor_sum,
        TP,
        {"gradient double_blocks.*.img_attn_q_norm", "gradient single_blocks.*.k_norm"},
        {"output", "loss", QKV},
        id="tensor-parallel sum of gradients",
    ),
    pytest.param(_break_row_sum, TP, {QKV, "output"}, set(), id="tensor-parallel sum"),
    pytest.param(
        _break_loss_scale, ZERO, {QKV, "grad_norm"}, {"output", "loss"}, id="loss scaling"
    ),
]


def _certify(
    rank: int, world: int, fields: list[str], fault: Callable[..., None] | None
) -> tuple[bool, dict[str, float], float]:
    import torch

    from hunyuan_train.config.compose import compose_config
    from hunyuan_train.engine.certify import certify
    from hunyuan_train.runtime.dist import World

    # Clipping would hide a wrong scale of all gradients.
    cfg = compose_config(
        ["run.device=cpu", "certify.width=small", "optimizer.clip_norm=0", *fields]
    )
    here = World(rank=rank, local_rank=rank, size=world, device=torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        if fault is not None:
            fault(patch)
        (certificate,) = certify(cfg, here)
    return certificate.holds, certificate.failures(), certificate.seconds


@pytest.mark.parametrize(("fault", "fields", "named", "right"), PLANTED)
def test_a_planted_error_is_named(
    fault: Callable[..., None], fields: list[str], named: set[str], right: set[str]
):
    holds, failures, _ = run_distributed(_certify, 2, fields, fault)[0]
    assert not holds
    assert named <= failures.keys(), failures
    assert not right & failures.keys(), failures


@pytest.mark.parametrize("fields", [SP, RING, TP, ZERO], ids=" ".join)
def test_the_same_layouts_hold_without_it(fields: list[str]):
    for holds, failures, _ in run_distributed(_certify, 2, fields, None):
        assert holds, failures


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("certify"))


LAYOUT = ["parallel.tp=2", "parallel.cp_ring=2"]


def test_the_verb_prints_the_table_and_what_it_means(tmp_path: Path):
    done = run_verb("certify", ["model=tiny", "run.device=cpu", "certify.blocks=1", *LAYOUT], 4)
    assert done.returncode == 0, done.stderr
    assert "tp=2 cp_ring=2 zero=3 in float32 against one process in float32" in done.stdout
    assert "gradient single_blocks.*.linear1" in done.stdout
    assert "certificate holds: largest error" in done.stdout
    strict = run_verb(
        "certify", ["model=tiny", "run.device=cpu", "certify.tolerance=1e-12", *LAYOUT], 4
    )
    assert strict.returncode == 1
    assert "<-- FAILS" in strict.stdout


def test_train_proves_its_layout_first_and_refuses_a_wrong_one(data: Path, tmp_path: Path):
    arguments = overrides(data, tmp_path / "run", "stage.steps=1", "optimizer.warmup_steps=0")
    done = run_verb("train", [*arguments, *LAYOUT[:1]], 2)
    assert done.returncode == 0, done.stderr
    assert "certified: tp=2 zero=3 in float32 within" in done.stdout + done.stderr
    other = overrides(data, tmp_path / "refused", "stage.steps=1", "optimizer.warmup_steps=0")
    refused = run_verb("train", [*other, *LAYOUT[:1], "certify.tolerance=1e-12"], 2)
    assert refused.returncode != 0
    assert "does not compute what one process computes: " in refused.stderr
    assert not (tmp_path / "refused" / "config.yaml").exists()
    unproved = run_verb(
        "train", [*other, *LAYOUT[:1], "certify.tolerance=1e-12", "certify.at_start=false"], 2
    )
    assert unproved.returncode == 0, unproved.stderr

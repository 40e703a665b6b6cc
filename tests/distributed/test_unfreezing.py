"""Frozen parameters under every layout: what one process trains, and no more."""

import pytest
from distributed import run_distributed
from layout_errors import layout_errors

pytestmark = pytest.mark.dist

LAYOUTS = {
    "zero0": "zero_stage=0",
    "zero2": "zero_stage=2",
    "zero3": "zero_stage=3",
    "zero3, gradients sharded at once": "zero_stage=3 reduce_every=micro_step",
    "tp2+sp": "tp=2 sp=true",
    "ring2": "cp_ring=2",
}
FIELDS = [
    # Whole blocks at both ends, and parts of one, are never trained; others begin later.
    "optimizer.trainable=[double_blocks.1.img*,single_blocks.0.*,final_layer.*,txt_in.*,img_in.*]",
    "optimizer.unfreeze={single_blocks.0.linear1.*: 2, txt_in.*: 3}",
]


@pytest.mark.parametrize(
    "recompute",
    ["selective", *(pytest.param(mode, marks=pytest.mark.again) for mode in ("none", "full"))],
)
def test_every_layout_trains_what_one_process_trains(recompute: str) -> None:
    fields = [*FIELDS, f"memory.recompute={recompute}"]
    for layout, errors in run_distributed(layout_errors, 2, LAYOUTS, fields)[0].items():
        over = {name: error for name, error in errors.items() if not error <= 1e-5}
        assert not over, f"{layout}: {over}"
        groups = {name.removeprefix("gradient ") for name in errors if name.startswith("grad")}
        assert "single_blocks.*.linear1" in groups, "trained from the second update on"
        assert "double_blocks.*.img_attn_qkv" in groups
        assert not any(group.startswith(("txt_in", "time_in", "vector_in")) for group in groups)
        assert any(name.startswith("weight time_in") for name in errors)

"""Plans: what fits, what is fastest, and that shipped stages are planned in time."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_run import MODEL, make_data

from hunyuan_train.cli.main import main
from hunyuan_train.config.compose import compose_config, conf_folder, stage_names
from hunyuan_train.config.root import RunConfig
from hunyuan_train.data.buckets import Bucket
from hunyuan_train.engine.planning_run import check_fits, layout_of, plan_run, planned_buckets
from hunyuan_train.memory.cluster import ClusterConfig
from hunyuan_train.memory.config import Recompute
from hunyuan_train.memory.estimate import Layout, Work
from hunyuan_train.memory.planner import Options, Planner, Shape
from hunyuan_train.memory.recompute import BucketMode
from hunyuan_train.memory.step_time import TimeModel
from hunyuan_train.models.hunyuan.config import HunyuanConfig
from hunyuan_train.models.hunyuan.sharding import hunyuan_sharding_plan
from hunyuan_train.parallel.apply import check_divisors
from hunyuan_train.parallel.mesh import mesh_shape
from hunyuan_train.runtime.device import Machine

MODEL_13B = HunyuanConfig()
CLIP_720P = Shape(name="129x720x1280", img_tokens=118_800, txt_tokens=256)
BIG = ["model=hunyuan_video_13b", "text=hunyuan", "parallel.compute_dtype=bfloat16"]
KEEP_ALL = BucketMode(Recompute.none, offload=False)
H200 = Machine(memory_bytes=139.8 * 2**30, host_bytes=2**40)
H100 = Machine(memory_bytes=79.2 * 2**30, host_bytes=2**40)


def work(mode: Recompute = Recompute.none, batch: int = 1) -> Work:
    return Work(img_tokens=118_800, txt_tokens=256, recompute=mode, batch=batch)


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ((650.0, 580.0), (0.534, 0.515, 0.420)),
        ((620.0, 535.0), (0.500, 0.484, 0.396)),
        ((380.0, 335.0), (0.324, 0.317, 0.256)),
    ],
)
def test_time_agrees_with_the_published_ceilings(
    rates: tuple[float, float], expected: tuple[float, ...]
) -> None:
    """Attainable MFU at 720p without communication, from kernel rates alone."""
    cluster = ClusterConfig(
        attention_tflops={"cudnn": list(rates)},
        gemm_efficiency=650 / 989.4,
        hbm_gbs=1e9,
    )
    model = TimeModel(MODEL_13B, cluster)
    for mode, mfu in zip(Recompute, (None, *expected), strict=True):
        if mfu is not None:
            found = model.predict(Layout(), work(mode))
            assert found.mfu == pytest.approx(mfu, rel=0.01)
            assert found.hfu > found.mfu


def test_a_ring_hides_its_hops_where_chunks_are_long() -> None:
    """The chunk that hides a hop: 1,444 tokens over NVLink, 13,000 over 50 GB/s."""
    rates = {"cudnn": [650.0, 580.0]}
    cluster = ClusterConfig(nodes=16, attention_tflops=rates, hbm_gbs=1e12)
    model = TimeModel(MODEL_13B, cluster)

    def exposed(ring: int, ulysses: int = 1) -> float:
        layout = Layout(world=128, cp_ring=ring, cp_ulysses=ulysses)
        return model.predict(layout, work()).parts.ring

    assert exposed(8) == pytest.approx(0, abs=1e-6)
    assert exposed(2, 8) == pytest.approx(0, abs=1e-6)
    assert exposed(16) > 0.1


def test_bytes_of_tensor_parallelism_and_ulysses_are_those_of_the_documentation() -> None:
    cluster = ClusterConfig(nvlink_gbs=1.0)
    parts = {
        name: TimeModel(MODEL_13B, cluster).predict(layout, work()).parts
        for name, layout in {
            "tp": Layout(world=2, tp=2),
            "sp": Layout(world=2, tp=2, sp=True),
            "u8": Layout(world=8, cp_ulysses=8),
        }.items()
    }
    # GB per double and single block, from docs/parallelism.md.
    assert parts["tp"].tensor_parallel == pytest.approx(20 * 2.93 + 40 * 1.46, rel=0.01)
    assert parts["sp"].tensor_parallel == pytest.approx(20 * 3.66 + 40 * 1.83, rel=0.01)
    assert parts["u8"].ulysses == pytest.approx(60 * 0.64, rel=0.01)


def test_every_layout_is_one_that_a_run_accepts() -> None:
    cluster = ClusterConfig(nodes=3, gpus_per_node=8)
    layouts = list(Planner(MODEL_13B, cluster, Options()).layouts(118_800))
    assert len(set(layouts)) == len(layouts) > 100
    for layout in (x for x in layouts if x.tp == 2 and x.cp_ring == 3):
        names = ("tp", "cp_ring", "cp_ulysses", "dp_replicate", "zero_stage")
        fields = [f"parallel.{name}={getattr(layout, name)}" for name in names]
        cfg = compose_config([*BIG, *fields, f"parallel.sp={str(layout.sp).lower()}"])
        check_divisors(hunyuan_sharding_plan(cfg.model), cfg.parallel)
        assert mesh_shape(cfg.parallel, 24)
        assert layout_of(cfg, 24) == layout


def test_720p_trains_on_one_node_and_the_recompute_is_chosen_by_what_fits() -> None:
    eight = Planner(MODEL_13B, ClusterConfig(nodes=1), Options(offload_shares=(0.0,)))
    best = eight.rank([CLIP_720P])[0]
    assert best.choices[0].work.recompute is Recompute.selective
    assert best.layout.cp == 4
    assert 0.4 < best.mfu < 0.5
    many = Planner(MODEL_13B, ClusterConfig(nodes=8), Options())
    assert many.rank([CLIP_720P])[0].choices[0].work.recompute is Recompute.none
    assert all(p.peak_bytes <= eight.free_bytes for p in eight.rank([CLIP_720P]))


def test_one_bucket_more_can_only_take_layouts_away() -> None:
    planner = Planner(MODEL_13B, ClusterConfig(nodes=1), Options(offload_shares=(0.0,)))
    image = Shape(name="1x256x256", img_tokens=256, txt_tokens=256)
    alone = {plan.layout for plan in planner.rank([image])}
    joined = {plan.layout for plan in planner.rank([image, CLIP_720P])}
    assert joined < alone


def test_all_shipped_stages_are_planned_on_all_clusters_in_time() -> None:
    clusters = sorted(path.stem for path in (conf_folder() / "cluster").glob("*.yaml"))
    assert len(clusters) == 5
    spent, planned = 0.0, 0
    for stage in stage_names():
        cfg = compose_config([*BIG, f"stage={stage}", "optimizer.warmup_steps=0"])
        for cluster in clusters:
            cfg.cluster = compose_config([f"cluster={cluster}"]).cluster
            started = time.process_time()
            plan = plan_run(cfg)
            spent += time.process_time() - started
            planned += 1
            assert plan.chosen in plan.ranked
            assert set(plan.choices) == set(planned_buckets(cfg)[1])
            for point in plan.ranked:
                assert point.peak_bytes <= plan.free_bytes
    assert planned == 5 * len(stage_names())
    assert spent < 30 * 5, "thirty seconds here; machines may be five times slower"


def test_shares_of_the_table_follow_the_config() -> None:
    cfg = compose_config([*BIG, "stage=hunyuan_video_low_long"])
    _, buckets = planned_buckets(cfg)
    assert {bucket.frames for bucket in buckets} == {1, 65, 129}
    images = sum(share for bucket, share in buckets.items() if bucket.frames == 1)
    assert images / sum(buckets.values()) == pytest.approx(0.2)


def fitting(extra: list[str], world: int, buckets: dict[Bucket, int]) -> dict[Bucket, BucketMode]:
    return check_fits(compose_config([*BIG, *extra]), world, H100, buckets)


def test_recompute_of_a_bucket_is_the_least_that_fits() -> None:
    image, clip = Bucket(1, 256, 256), Bucket(129, 720, 1280)
    modes = fitting(["parallel.cp_ulysses=8"], 8, {image: 4, clip: 1})
    assert modes == {image: KEEP_ALL, clip: BucketMode(Recompute.selective, offload=False)}
    modes = fitting(["parallel.cp_ulysses=8", "memory.recompute=full"], 8, {image: 4, clip: 1})
    assert set(modes.values()) == {BucketMode(Recompute.full, offload=False)}


def test_what_is_kept_moves_to_the_host_where_it_does_not_fit_or_where_it_is_wanted() -> None:
    image, clip = Bucket(1, 256, 256), Bucket(129, 720, 1280)
    moved = fitting(["memory.offload=auto"], 8, {image: 4, clip: 1})
    assert moved == {image: KEEP_ALL, clip: BucketMode(Recompute.selective, offload=True)}
    roomy = ["parallel.cp_ulysses=8"]
    assert not fitting([*roomy, "memory.offload=auto"], 8, {clip: 1})[clip].offload
    wanted = fitting([*roomy, "memory.offload=on"], 8, {clip: 1})
    assert wanted[clip] == BucketMode(Recompute.selective, offload=True)


def test_deepspeed_that_gathers_in_every_run_of_a_linear_has_one_mode() -> None:
    image, clip = Bucket(1, 256, 256), Bucket(129, 720, 1280)
    engine = ["parallel.zero_engine=deepspeed", "parallel.zero_stage=3", "parallel.sp=false"]
    modes = fitting([*engine, "parallel.cp_ulysses=8"], 8, {image: 4, clip: 1})
    assert set(modes.values()) == {BucketMode(Recompute.selective, offload=False)}


def test_a_cpu_keeps_nothing_back_for_a_gpu_context() -> None:
    small = Machine(memory_bytes=2**29, host_bytes=2**30, is_gpu=False)
    cfg = compose_config(["model=tiny"])
    assert check_fits(cfg, 2, small, {Bucket(5, 64, 64): 2})
    with pytest.raises(ValueError, match="GiB can be planned"):
        check_fits(cfg, 2, replace(small, is_gpu=True), {Bucket(5, 64, 64): 2})


@pytest.mark.parametrize(
    ("extra", "world", "batch", "said", "remedy"),
    [
        ([], 1, 1, "recompute full", "no layout of 1 GPUs holds it"),
        (["parallel.cp_ulysses=8"], 8, 8, "129x720x1280 with 8 samples", "data.batches"),
        ([], 8, 1, "129x720x1280 with 1 samples", "memory.offload=auto"),
        (
            ["parallel.cp_ulysses=8", "memory.recompute=none"],
            8,
            1,
            "recompute none",
            "memory.recompute=selective",
        ),
        (
            ["parallel.cp_ulysses=8", "stage.micro_steps=4"],
            8,
            1,
            "needs",
            "parallel.reduce_every=micro_step",
        ),
    ],
)
def test_what_cannot_fit_is_refused_with_the_nearest_that_does(
    extra: list[str], world: int, batch: int, said: str, remedy: str
) -> None:
    clip = Bucket(129, 720, 1280)
    with pytest.raises(ValueError, match="GiB can be planned") as caught:
        fitting(extra, world, {clip: batch})
    message = str(caught.value)
    assert said in message
    assert remedy in message
    assert "\n" not in message


def test_the_nearest_layout_does_fit() -> None:
    clip = Bucket(129, 720, 1280)
    start = ["parallel.cp_ulysses=8", "memory.recompute=none"]
    with pytest.raises(ValueError, match="the nearest that fits sets") as caught:
        fitting(start, 8, {clip: 1})
    changes = str(caught.value).split(" sets ")[1].split()
    names = {change.split("=")[0] for change in changes}
    kept = [override for override in start if override.split("=")[0] not in names]
    assert fitting([*kept, *changes], 8, {clip: 1})


def test_a_stage_without_room_is_told_what_is_missing() -> None:
    cfg = compose_config([*BIG, "stage=hunyuan_image_256", "cluster.gpus_per_node=1"])
    with pytest.raises(
        ValueError, match=r"no layout of 1 H100 holds bucket .* raise cluster.nodes"
    ):
        plan_run(cfg)


def test_the_verb_prints_and_writes_a_plan_whose_overrides_compose(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["model=hunyuan_video_13b", "stage=hunyuan_video_low_short", "cluster=h200"]
    assert main(["plan", *arguments, f"run.dir={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    assert "chosen for the run" in printed
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["cluster"]["gpu"] == "H200"
    assert written["buckets"]["65x256x256"]["bytes"]["total"] > 2**30
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    pasted = (tmp_path / "plan_overrides.txt").read_text().split()
    cfg = compose_config([*arguments, *pasted])
    batches = {Bucket.parse(name): size for name, size in cfg.data.batches.items()}
    assert check_fits(cfg, 8, H200, batches)


def test_buckets_are_those_of_the_data_where_there_are_some(tmp_path: Path) -> None:
    data = make_data(tmp_path)
    cfg: RunConfig = compose_config([*MODEL, "data=shapes", f"data.latents={data / 'latents'}"])
    plan = plan_run(cfg)
    assert "latents" in plan.origin
    assert {bucket.frames for bucket in plan.choices} == {1, 5}
    assert len(plan.choices) < len(planned_buckets(replace_latents(cfg))[1])


def replace_latents(cfg: RunConfig) -> RunConfig:
    return replace(cfg, data=replace(cfg.data, latents=""))


def test_one_block_is_measured_here(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["model.hidden_size=256", "model.num_heads=4", "model.rope_axes=[16,24,24]"]
    assert main(["plan", "verify", *small, "run.device=cpu"]) == 0
    errors = [line.rsplit(" ", 1)[1] for line in capsys.readouterr().out.splitlines()[1:]]
    assert len(errors) == 2
    assert all(abs(float(error.rstrip("%"))) < 5 for error in errors)

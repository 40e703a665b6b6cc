"""The graph of a curriculum, its ledger, what ends a stage, and what a dry run says."""

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filled_states import config, fresh_state, save

from hunyuan_train.cli.main import main
from hunyuan_train.cli.options import split_options
from hunyuan_train.config.compose import compose_config, conf_folder
from hunyuan_train.config.curriculum import CurriculumConfig, CurriculumStage
from hunyuan_train.config.root import RunConfig
from hunyuan_train.config.run import StageConfig
from hunyuan_train.engine.curriculum import (
    _claim,
    _finish,
    compose_stages,
    curriculum_changes,
    identity_fields,
)
from hunyuan_train.engine.ending import since_best, stage_end
from hunyuan_train.engine.ledger import Ledger, StageRecord, Status, changing, stage_folder
from hunyuan_train.runtime.dist import World

NODES = ("two:{stage:demo_image,after:one}", "one:{stage:demo_image}",
         "side:{stage:demo_image,after:one}", "end:{stage:demo_image,after:two}")  # fmt: skip
GRAPH = f"curriculum.stages={{{','.join(NODES)}}}"
DEMO = ["recipe=demo", "curriculum=none"]


def graph(**after: str) -> CurriculumConfig:
    return CurriculumConfig(stages={name: CurriculumStage(after=a) for name, a in after.items()})


def test_stages_run_in_the_order_of_the_file_after_what_they_need() -> None:
    tree = graph(two="one", one="", side="one", end="two", other="")
    assert tree.order() == ["one", "two", "side", "end", "other"]
    assert tree.selection(first="two") == ["two", "end"]
    assert tree.selection(last="side") == ["one", "side"]
    assert tree.selection("two", "end") == ["two", "end"]
    assert tree.selection("end", "end") == ["end"]


@pytest.mark.parametrize(
    ("first", "last", "message"),
    [
        ("tow", "", "--from tow is not a stage of the curriculum; choose from one, two, side"),
        ("", "tow", "--until tow is not a stage"),
        ("side", "two", "two does not come after side"),
    ],
)
def test_a_selection_that_makes_no_sense_is_refused(first: str, last: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        graph(one="", two="one", side="one").selection(first, last)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("{a:{after:b}}", r"stages\.a\.after=b is not a stage of the curriculum; choose from a"),
        ("{a:{after:b},b:{after:a}}", r"stages\.a comes after itself, by way of b, a"),
        ("{a:{transform:[guidance_embed]}}", r"stages\.a\.transform needs weights to change"),
        ("{a:{carry:[schedule]}}", r"stages\.a\.carry=\['schedule'\] has neither weights nor ema"),
        ("{a:{carry:[ema,optimizer]}}", r"carry has optimizer without weights"),
        ("{a:{carry:[all]}}", r"Invalid value 'all', expected one of \[weights, ema, optimizer"),
        ("[a]", r"curriculum\.stages: Cannot merge DictConfig with ListConfig"),
    ],
)
def test_a_graph_that_makes_no_sense_is_refused(stages: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compose_config([f"curriculum.stages={stages}"])


def test_options_are_told_from_overrides() -> None:
    argv = ["a=1", "--from", "x", "--until=y", "--dry-run", "b=2"]
    options, rest = split_options(argv, ("--from", "--until"), ("--dry-run",))
    assert options == {"--from": "x", "--until": "y", "--dry-run": ""}
    assert rest == ["a=1", "b=2"]
    with pytest.raises(ValueError, match="--from needs a value"):
        split_options(["--from"], ("--from",))


def test_every_shipped_curriculum_composes_with_its_edges() -> None:
    for path in sorted((conf_folder() / "curriculum").glob("*.yaml")):
        family = path.stem.split("_")[0]
        recipe = [f"recipe={family}"] if (conf_folder() / f"recipe/{family}.yaml").is_file() else []
        argv = [*recipe, f"curriculum={path.stem}"]
        cfg = compose_config(argv)
        assert list(compose_stages(argv, cfg)) == cfg.curriculum.order()


def test_an_edge_whose_model_changes_names_both_stages() -> None:
    stages = "{a:{stage:demo_image},b:{stage:demo_distill,after:a}}"
    argv = [*DEMO, f"curriculum.stages={stages}"]
    clause = r"stage b cannot start from a: .*takes the transform guidance_embed"
    with pytest.raises(ValueError, match=clause):
        compose_stages(argv, compose_config(argv))
    wider = "curriculum.stages.b.overrides=['model.num_single_blocks=9']"
    with pytest.raises(ValueError, match="num_single_blocks is 4 there and 9 here"):
        compose_stages([*argv, wider], compose_config([*argv, wider]))


def test_fields_of_one_stage_win_over_those_of_the_command() -> None:
    argv = [*DEMO, GRAPH, "optimizer.lr=0.5"]
    argv += ["curriculum.stages.side.overrides=['optimizer.lr=0.25']"]
    stages = compose_stages(argv, compose_config(argv))
    assert [stage.optimizer.lr for stage in stages.values()] == [0.5, 0.5, 0.25, 0.5]


@pytest.mark.parametrize(
    ("limits", "step", "samples", "tokens", "end"),
    [
        ({}, 9, 0, 0, None),
        ({}, 10, 0, 0, "steps"),
        ({"samples": 100}, 5, 99, 0, None),
        ({"samples": 100}, 5, 103, 0, "samples"),
        ({"tokens": 1000}, 5, 50, 1000, "tokens"),
        ({"samples": 100}, 10, 99, 0, "steps"),
    ],
)
def test_a_stage_ends(
    limits: dict[str, int], step: int, samples: int, tokens: int, end: str | None
) -> None:
    assert stage_end(StageConfig(steps=10, **limits), step, samples, tokens) == end


def test_a_plateau_is_so_many_evaluations_without_a_lower_loss() -> None:
    stage = StageConfig(steps=1000, plateau=3, plateau_gain=0.01)
    losses = [1.0, 0.9, 0.895, 0.893, 0.892]
    evaluations = list(enumerate(losses))
    assert [since_best(evaluations[:n], 0.01) for n in range(6)] == [0, 0, 0, 1, 2, 3]
    assert stage_end(stage, 50, 0, 0, evaluations) == "plateau"
    assert stage_end(stage, 50, 0, 0, evaluations[:-1]) is None
    # Small gains count once they add up, and what is not a number never does.
    assert since_best([*evaluations, (5, 0.889)], 0.01) == 0
    assert since_best([(0, float("nan")), (1, float("nan"))], 0.01) == 2
    assert stage_end(replace(stage, plateau=0), 50, 0, 0, evaluations) is None


def test_the_ledger_survives_and_keeps_the_folders(tmp_path: Path) -> None:
    cfg = compose_config([f"run.dir={tmp_path}", GRAPH])
    assert stage_folder(cfg, "side") == tmp_path / "stages/03-side"
    with changing(tmp_path) as ledger:
        ledger.stages["side"] = StageRecord(
            folder="stages/01-side", state=Status.done, attempts=[[1.0, 4.0], [10.0, 12.5]]
        )
    assert Ledger.read(tmp_path) == ledger
    assert (
        json.loads((tmp_path / "curriculum.json").read_text())["stages"]["side"]["seconds"] == 5.5
    )
    assert stage_folder(cfg, "side") == tmp_path / "stages/01-side"
    (tmp_path / "curriculum.json").write_text("{}")
    with pytest.raises(ValueError, match="is no ledger of this version"):
        Ledger.read(tmp_path)


def _count(folder: str) -> None:
    for _ in range(50):
        with changing(Path(folder)) as ledger:
            ledger.stages["a"].steps += 1


def test_branches_change_the_ledger_one_at_a_time(tmp_path: Path) -> None:
    with changing(tmp_path) as ledger:
        ledger.stages["a"] = StageRecord(folder="a")
    context = multiprocessing.get_context("fork")
    jobs = [context.Process(target=_count, args=(str(tmp_path),)) for _ in range(3)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert Ledger.read(tmp_path).stages["a"].steps == 150


def claimed(folder: Path, *overrides: str, ranks: int = 4, chosen: tuple[str, ...] = ("one",)):
    argv = [*DEMO, f"run.dir={folder}", GRAPH, *overrides]
    cfg = compose_config(argv)
    world = World(rank=0, local_rank=0, size=ranks, device=torch.device("cpu"))
    return _claim(cfg, compose_stages(argv, cfg), world, chosen)


def test_the_first_start_plans_the_ranks_of_all_stages(tmp_path: Path) -> None:
    own = "curriculum.stages.side.overrides=['parallel.tp=2']"
    for ranks in (4, 1, 2):
        ledger = claimed(tmp_path, own, ranks=ranks)
        planned = {name: record.planned_ranks for name, record in ledger.stages.items()}
        assert planned == {"one": 4, "two": 4, "side": 2, "end": 4}


def test_another_curriculum_is_refused_with_its_differences(tmp_path: Path) -> None:
    before = claimed(tmp_path)
    claimed(tmp_path, "logging.every_steps=3", "parallel.zero_stage=2", "stage.init_from=x")
    changed = ["curriculum.stages.side.overrides=['optimizer.lr=0.25']"]
    with pytest.raises(ValueError, match=r"(?s)stage side: optimizer.lr: 0.002 -> 0.25\n"):
        claimed(tmp_path, *changed)
    with pytest.raises(ValueError, match="stage new is new"):
        claimed(tmp_path, "curriculum.stages.new.stage=demo_image")
    with pytest.raises(ValueError, match="stage end: after: two -> one"):
        claimed(tmp_path, "curriculum.stages.end.after=one")
    with pytest.raises(ValueError, match="planned_ranks: 4 -> 8"):
        claimed(tmp_path, "data.planned_ranks=8")
    assert Ledger.read(tmp_path) == before
    accepted = claimed(tmp_path, *changed, "run.accept_changes=true")
    assert claimed(tmp_path, *changed) == accepted
    with pytest.raises(ValueError, match=r"optimizer.lr: 0.25 -> 0.002"):
        claimed(tmp_path)


def test_a_field_that_another_version_lacks_is_no_difference() -> None:
    then = {"a": {"after": "", "data.old": 1, "run.seed": 0}}
    now = {"a": {"after": "", "data.new": 1, "run.seed": 0}}
    assert curriculum_changes(then, now) == []
    assert curriculum_changes(then, {**now, "b": {}}) == ["stage b is new"]


def test_entries_of_a_table_belong_to_the_identity() -> None:
    def fields(*overrides: str) -> dict:
        argv = [*DEMO, GRAPH, *overrides]
        cfg: RunConfig = compose_config(argv)
        return identity_fields(cfg, compose_stages(argv, cfg))

    changes = curriculum_changes(fields(), fields("data.anchor_shares.64=1.0"))
    assert "stage one: data.anchor_shares: {} -> {'64': 1.0}" in changes


def test_a_stage_waits_for_the_one_it_needs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stage two comes after one, which is not finished in"):
        claimed(tmp_path, chosen=("two", "end"))


def test_a_stage_whose_last_save_failed_is_not_finished(tmp_path: Path) -> None:
    cfg = config(f"run.dir={tmp_path / 'stages/01-one'}", "stage.steps=10")
    with changing(tmp_path) as ledger:
        ledger.stages["one"] = StageRecord(folder="stages/01-one", attempts=[[1.0, 1.0]])
    state = fresh_state(cfg)
    for step in (4, 10):
        with pytest.raises(
            ValueError, match="stage one left no checkpoint of its end; see the log"
        ):
            _finish(tmp_path, "one", cfg)
        state.step, state.samples = step, 3 * step
        save(state, cfg, Path(cfg.run.dir))
    record = _finish(tmp_path, "one", cfg).stages["one"]
    assert record.checkpoint == "stages/01-one/checkpoints/step-00000010"
    assert (record.steps, record.samples, record.ended_by) == (10, 30, "steps")


def test_a_dry_run_needs_neither_gpu_nor_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["curriculum", "--dry-run", "recipe=hunyuan", "curriculum=hunyuan", "cluster.nodes=16"]
    argv += ["--until", "image_256"]
    assert main([*argv, f"run.dir={tmp_path}"]) == 0
    (stage,) = json.loads((tmp_path / "curriculum_plan.json").read_text())["stages"].values()
    assert stage["ended_by"] == "tokens"
    assert stage["tokens"] == pytest.approx(740e9, rel=1e-3)


def test_the_list_names_what_each_stage_comes_after(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["curriculum", "--list", GRAPH, "--from", "one"]) == 0
    assert capsys.readouterr().out.split("\n")[:-1] == ["one -", "two one", "side one", "end two"]

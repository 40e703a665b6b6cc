"""The Slurm script on a real Slurm: requeued, resumed, cancelled, failed, chained."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from local_slurm import LocalSlurm, missing, poll
from tiny_run import make_data, overrides, rows, run_verb

LAUNCH = Path(__file__).parents[2] / "launch"
COMPARED = ("step", "loss", "grad_norm", "lr", "tokens", "samples")

pytestmark = [
    pytest.mark.dist,
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=f"no Slurm to test with: {missing()}"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def slurm() -> Iterator[LocalSlurm]:
    with LocalSlurm() as cluster:
        cluster.env |= {
            "PATH": f"{Path(sys.executable).parent}:{cluster.env['PATH']}",
            "PYTHONPATH": str(LAUNCH.parent),
            "RANKS_PER_NODE": "1",
        }
        yield cluster


def submit(slurm: LocalSlurm, log: Path, *arguments: str, options: tuple[str, ...] = ()) -> str:
    """Submit the script and return the number of the job."""
    script = str(LAUNCH / "slurm.sbatch")
    lines = slurm.run("sbatch", "--parsable", f"--output={log}", *options, script, *arguments)
    assert lines, "sbatch refused the script"
    return lines[0]


def follow(slurm: LocalSlurm, job: str, log: Path, what: str, true: Callable[[], bool]) -> None:
    """Wait until ``true()``; fail with the log at once if the job has failed."""
    failed = lambda: slurm.field(job, "JobState") == "FAILED"  # noqa: E731
    poll(what, lambda: true() or failed())
    assert not failed(), log.read_text()


def done(slurm: LocalSlurm, job: str) -> bool:
    return slurm.field(job, "JobState") == "COMPLETED"


def last_step(run: Path) -> int:
    """Return the step of the last row that is complete, 0 if there is none."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return max((json.loads(line)["step"] for line in lines[-2:] if line.endswith("\n")), default=0)


def saved(run: Path, step: int) -> bool:
    return (run / "checkpoints" / f"step-{step:08d}").is_dir()


def test_run_warned_of_the_time_limit_is_requeued_and_ends_as_if_never_stopped(
    slurm: LocalSlurm, data: Path, tmp_path: Path
) -> None:
    extra = ("stage.steps=40", "checkpoint.every_steps=0")
    straight, broken, log = tmp_path / "straight", tmp_path / "broken", tmp_path / "log"
    job = submit(slurm, log, "train", *overrides(data, broken, *extra))
    follow(slurm, job, log, "step 5", lambda: last_step(broken) >= 5)
    # What --signal sends before the time limit, and to whom.
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    poll("requeued", lambda: slurm.field(job, "Restarts") == "1")
    stopped = last_step(broken)
    assert 5 <= stopped < 40
    assert saved(broken, stopped)
    undisturbed = run_verb("train", overrides(data, straight, *extra), ranks=2)
    assert undisturbed.returncode == 0, undisturbed.stderr
    follow(slurm, job, log, "done", lambda: done(slurm, job))

    left, right = rows(straight), rows(broken)
    assert [row["step"] for row in right] == list(range(1, 41))
    assert [[r[k] for k in COMPARED] for r in left] == [[r[k] for k in COMPARED] for r in right]
    assert f"job {job}, restart 1: 2 nodes" in log.read_text()


def test_preempted_run_goes_on_and_a_cancelled_one_saves_and_stays_away(
    slurm: LocalSlurm, data: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    arguments = overrides(data, run, "stage.steps=100000", "checkpoint.every_steps=0")
    job = submit(slurm, log, "train", *arguments)
    follow(slurm, job, log, "step 5", lambda: last_step(run) >= 5)
    high = slurm.run("sbatch", "--parsable", "-phigh", "-N2", "--exclusive", "--wrap=true")[0]
    poll("preempted", lambda: slurm.field(job, "Restarts") == "1")
    stopped = last_step(run)
    assert saved(run, stopped)
    poll("the other job is done", lambda: done(slurm, high))
    poll("resumed", lambda: last_step(run) > stopped)
    assert [row["step"] for row in rows(run)] == list(range(1, last_step(run) + 1))

    slurm.run("scancel", job)
    poll("cancelled", lambda: slurm.field(job, "JobState") == "CANCELLED")
    assert saved(run, last_step(run))
    assert slurm.field(job, "Restarts") == "1"


def test_bad_config_fails_with_its_sentence_and_is_not_requeued(
    slurm: LocalSlurm, data: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    job = submit(slurm, log, "train", *overrides(data, tmp_path / "run", "stage.steps=0"))
    poll("over", lambda: slurm.field(job, "JobState") == "FAILED")
    assert slurm.field(job, "ExitCode") == "2:0"
    assert slurm.field(job, "Restarts") == "0"
    assert "stage.steps=0" in log.read_text()


def test_chain_is_a_tree_and_drops_what_comes_after_a_failure(
    slurm: LocalSlurm, data: Path, tmp_path: Path
) -> None:
    nodes = ("clips_image:{}", "clips_video:{after:clips_image}")
    stages = f"{{{','.join(nodes)},other:{{stage:clips_image,after:clips_image}}}}"

    def chain(run: Path, *extra: str) -> dict[str, str]:
        fields = (f"curriculum.stages={stages}", "stage.steps=3", *extra)
        lines = slurm.run(
            str(LAUNCH / "slurm_chain.sh"),
            *overrides(data, run, *fields),
            SBATCH_OUTPUT=str(tmp_path / "%x"),
        )
        return {line.split()[1]: line.split()[0] for line in lines}

    run = tmp_path / "run"
    jobs = chain(run)
    assert list(jobs) == ["clips_image", "clips_video", "other"]
    for name in ("clips_video", "other"):
        wanted = f"afterok:{jobs['clips_image']}(unfulfilled)"
        assert slurm.field(jobs[name], "Dependency") == wanted
    for name, job in jobs.items():
        follow(slurm, job, tmp_path / name, name, lambda job=job: done(slurm, job))
    ledger = json.loads((run / "curriculum.json").read_text())["stages"]
    assert [(name, entry["state"]) for name, entry in ledger.items()] == [
        (name, "done") for name in jobs
    ]

    broken = chain(tmp_path / "broken", f"data.latents={tmp_path / 'nothing'}")
    first = broken["clips_image"]
    poll("failed", lambda: slurm.field(first, "JobState") == "FAILED")
    assert f"{tmp_path / 'nothing'}" in (tmp_path / "clips_image").read_text()
    assert slurm.field(first, "Restarts") == "0"
    for name in ("clips_video", "other"):
        poll("dropped", lambda name=name: slurm.field(broken[name], "JobState") == "CANCELLED")

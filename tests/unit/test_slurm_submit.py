"""`moba-train slurm submit` and launch/slurm.sbatch without a Slurm: its commands are small programs on PATH."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moba_train import cli
from moba_train.commands.slurm import END_OF_SETTINGS, SlurmJob, render

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "launch" / "slurm.sbatch"
SMOKE = str(ROOT / "configs" / "smoke.toml")
WORDS = ("slurm", "submit", SMOKE, "--ranks-per-node", "1", "--time", "00:10:00")


def program(folder: Path, name: str, text: str) -> None:
    """A program `name` in `folder`, as a bash script."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


def test_the_script_in_the_repository_is_the_template_with_its_defaults() -> None:
    text = TEMPLATE.read_text("utf-8")
    assert render(SlurmJob(), text) == text
    assert os.access(TEMPLATE, os.X_OK)
    assert subprocess.run(["bash", "-n", str(TEMPLATE)], check=False).returncode == 0


def test_dry_run_prints_a_script_of_the_callers_settings_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = (
        "--nodes 2 --gpus-per-node 4 --time 1-04:00:00 --partition gpu,long --account lab --lead 600 --sbatch qos=high"
    )
    words += " --dry-run -- --parallel.cp 8 --run-dir runs/a"
    assert cli.main(["slurm", "submit", SMOKE, *words.split()]) == 0
    script = capsys.readouterr().out
    head, body = script.split(END_OF_SETTINGS)
    assert re.findall("^#SBATCH --(.*)", head, re.MULTILINE) == [
        "job-name=smoke",
        "partition=gpu,long",
        "account=lab",
        "nodes=2",
        "gpus-per-node=4",
        "exclusive",
        "mem=0",
        "time=1-04:00:00",
        "signal=USR1@600",
        f"output={tmp_path}/runs/a/slurm-%j.log",
        "qos=high",
        "ntasks-per-node=1",
        "requeue",
        "open-mode=append",
    ]
    assert f"\nworkdir={tmp_path} " in head and f"\nrun_dir={tmp_path}/runs/a\n" in head
    assert "\nranks_per_node=4\noptions=(--parallel.cp 8 --run-dir runs/a)" in head
    assert body == TEMPLATE.read_text("utf-8").split(END_OF_SETTINGS)[1]
    assert not (tmp_path / "runs").exists()


def test_a_miniature_is_submitted_as_the_run_would_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = str(ROOT / "configs" / "llama_8b_1m.toml")
    words = "--gpus-per-node 2 --time 01:00:00 --dry-run --scale tiny --engine.device cuda"
    assert cli.main(["slurm", "submit", recipe, *words.split()]) == 0, "64 ranks are what the run needs, not this"
    head, _ = capsys.readouterr().out.split(END_OF_SETTINGS)
    assert "#SBATCH --job-name=llama_8b_1m-tiny\n" in head
    assert f"\nrun_dir={tmp_path}/runs/llama_8b_1m-tiny\n" in head
    assert "\noptions=(--scale tiny --engine.device cuda) " in head


def test_no_value_is_read_by_the_shell(tmp_path: Path) -> None:
    evil = "$(touch hit) `touch hit`; touch hit #'\""
    job = SlurmJob(workdir=evil, bin=evil, launcher=evil, config=evil, resume=evil, options=("--run.x", evil))
    head, _ = render(job, TEMPLATE.read_text("utf-8")).split(END_OF_SETTINGS)
    told = 'printf "%s\\0" "$workdir" "$bin" "$launcher" "$config" "$resume" "${options[@]}"'
    done = subprocess.run(["bash", "-c", head + told], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split("\0")[:-1] == [evil] * 5 + ["--run.x", evil]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--job-name", "a b"), "not a name that sbatch takes\n  where:   --job-name"),
        (("--partition", "gpu\n#SBATCH --uid=0"), "not a name that sbatch takes\n  where:   --partition"),
        (("--account", "--wrap"), "expected one argument"),
        (("--run-dir", "runs/a b"), "Slurm cannot write a log there"),
        (("--run-dir", "runs/%j"), "Slurm cannot write a log there"),
        (("--data.tokenizer", "a\nb"), "a value has a line break in it"),
        (("--sbatch", "qos=a b"), "not an option of sbatch"),
        (("--sbatch", "no-requeue"), "the script sets this option itself"),
        (("--time", "04:00"), "Slurm reads 04:00 as four minutes"),
        (("--time", "00:06:00"), "told to stop as soon as it has started"),
        (("--nodes", "0"), "the number is too small\n  where:   --nodes"),
        (("--ranks-per-node", "0"), "the job has no ranks"),
        (("--resume", " "), "the value is empty\n  where:   --resume"),
        (("--nodes", "2", "--parallel.cp", "4"), "the number of ranks does not fit the mesh"),
        (("--nodez", "2"), "unknown option"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_before_anything_is_submitted(
    words: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    program(tmp_path / "bin", "sbatch", "touch submitted")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    try:
        code = cli.main([*WORDS, *words])
    except SystemExit as stop:  # argparse's own
        code = int(str(stop.code))
    assert code == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


def test_submit_writes_the_script_to_the_run_folder_and_says_how_to_watch_stop_and_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program(tmp_path / "bin", "sbatch", 'printf "%s\\n" "$@" >called; echo "77;cluster"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    assert cli.main([*WORDS, "--run-dir", "runs/a"]) == 0
    script = tmp_path / "runs" / "a" / "slurm.sbatch"
    assert (tmp_path / "called").read_text().splitlines() == ["--parsable", str(script)]
    assert script.read_text().startswith("#!/usr/bin/env bash\n")
    out = capsys.readouterr().out
    assert out.startswith("submitted job 77: 1 node(s) x 1 rank(s), 00:10:00 each time it runs\n")
    for line in (
        f"tail -F {script.parent}/slurm-77.log",
        "squeue -j 77",
        "scancel --signal=USR1 77",
        f"sbatch {script}",
    ):
        assert line in out


def test_without_sbatch_and_when_it_refuses_the_user_is_told_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert cli.main([*WORDS, "--run-dir", str(tmp_path / "a")]) == 2
    assert "cannot run sbatch" in (err := capsys.readouterr().err) and "--dry-run" in err
    program(tmp_path / "bin", "sbatch", "echo 'sbatch: error: invalid partition specified: x' >&2; exit 1")
    assert cli.main([*WORDS, "--run-dir", str(tmp_path / "a"), "--partition", "x"]) == 2
    assert "got:     sbatch: error: invalid partition specified: x" in capsys.readouterr().err


Job = Callable[..., tuple[int, str, list[str]]]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Runs launch/slurm.sbatch with programs in the place of Slurm's: (exit code, log, calls of scontrol)."""
    run, bin_dir = tmp_path / "run", tmp_path / "bin"
    (run / "checkpoints").mkdir(parents=True)
    settings = SlurmJob(workdir=str(tmp_path), run_dir="run", bin=str(bin_dir), launcher="LAUNCH", ranks_per_node=2)
    (tmp_path / "job.sh").write_text(render(settings, TEMPLATE.read_text("utf-8")))
    program(
        bin_dir,
        "squeue",
        f'case $5 in %T) cat {tmp_path}/state;; %e) date -d "@$(<{tmp_path}/end)" +%FT%T;; esac 2>/dev/null',
    )
    program(
        bin_dir,
        "scontrol",
        f'echo "$*" >>{tmp_path}/called; [ $1 = show ] && cat {tmp_path}/shown; [ ! -e {tmp_path}/shown ]',
    )

    def play(
        code: int,
        *,
        reason: str = "",
        saved: str = "",
        left_s: float = 3600,
        state: str = "RUNNING",
        restarts: int = 0,
        term: bool = False,
    ) -> tuple[int, str, list[str]]:
        """One start of the job, whose ranks save a checkpoint `saved`, write an outcome and end with `code`."""
        (tmp_path / "state").write_text(state)
        (tmp_path / "end").write_text(str(int(time.time() + left_s)))
        told = json.dumps({"finished": reason == "finished", "reason": reason, "step": 7}, indent=2)
        acts = [
            'printf "srun %s\\n" "$*" "$SLURM_JOB_END_TIME $NNODES $RDZV_ENDPOINT"',
            f"echo {saved} >run/checkpoints/latest" if saved else "",
            f"cat >run/outcome.json <<'E'\n{told}\nE" if reason else "",
            "kill -USR1 $PPID; kill -TERM $PPID" if term else "kill -USR1 $PPID",
            f"exit {code}",
        ]
        program(bin_dir, "srun", "\n".join(acts))
        (tmp_path / "called").write_text("")
        environment = {
            "PATH": f"{bin_dir}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "12345",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "n[1-2]",
            **({"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}),
        }
        done = subprocess.run(
            ["bash", str(tmp_path / "job.sh")], env=environment, capture_output=True, text=True, check=False
        )
        assert "slurm.sbatch: " in done.stdout, done.stderr
        return done.returncode, done.stdout + done.stderr, (tmp_path / "called").read_text().splitlines()

    return play


REQUEUE = ["requeue 12345"]


def test_the_ranks_are_told_where_they_meet_and_when_the_job_ends(job: Job) -> None:
    code, log, called = job(0, reason="finished", saved="step_1", left_s=1000)
    assert (code, called) == (0, [])
    launched, told, *_ = re.findall("^srun (.*)", log, re.MULTILINE)
    assert launched.endswith("LAUNCH 2 configs/llama_1b_32k.toml --run-dir run --resume auto")
    end, nodes, endpoint = told.split()
    assert abs(int(end) - time.time() - 1000) < 60
    assert nodes == "2" and endpoint.endswith(":22345")
    assert log.endswith("slurm.sbatch: the run is finished\n")


def test_a_run_that_is_stopped_for_the_time_limit_goes_on(job: Job) -> None:
    code, log, called = job(0, reason="the end of the Slurm job, SLURM_JOB_END_TIME: 70 s left", saved="step_1")
    assert (code, called) == (0, REQUEUE)
    assert "stopped for the time limit (the end of the Slurm job" in log
    assert job(0, reason="SIGUSR1", saved="step_2", left_s=350)[::2] == (0, REQUEUE)


def test_a_run_that_is_stopped_as_somebody_wished_stays_stopped(job: Job) -> None:
    code, log, called = job(0, reason="SIGUSR1", saved="step_1", left_s=1000)
    assert (code, called) == (0, []) and "stopped by hand" in log
    code, log, called = job(0, reason="stop_after_steps", saved="step_2", left_s=100)
    assert (code, called) == (0, []) and "stopped as configured" in log


def test_a_mistake_is_not_repeated(job: Job) -> None:
    assert job(2)[::2] == (2, [])
    assert job(2, saved="step_1", restarts=3)[::2] == (2, [])


def test_a_job_that_slurm_ends_leaves_the_rest_to_slurm(job: Job) -> None:
    """Requeued from here, a cancelled job would come to life again."""
    assert job(143, state="COMPLETING", saved="step_1")[::2] == (143, [])
    assert job(143, term=True)[::2] == (143, [])
    assert job(0, term=True, reason="SIGTERM", saved="step_2")[::2] == (0, [])


def test_failures_in_a_row_without_a_checkpoint_come_to_an_end(job: Job) -> None:
    assert [job(code)[::2] for code in (3, 1, 137)] == [(0, REQUEUE)] * 3
    assert job(1)[::2] == (1, [])
    assert job(3, saved="step_1")[::2] == (0, REQUEUE), "a checkpoint was made: the count begins anew"
    assert [job(0)[::2] for _ in range(3)] == [(0, REQUEUE)] * 2 + [(1, [])], "done, but no outcome and no progress"
    assert job(0, reason="SIGUSR1", saved="step_2", left_s=100)[::2] == (0, REQUEUE)
    assert job(1)[1].endswith(
        "failed, for the 1. time without a new checkpoint (at most 3 restarts); the job is requeued\n"
    )


def test_a_start_too_late_for_a_step_is_repeated_until_it_is_clear_that_the_limit_is_too_short(job: Job) -> None:
    late = "the end of the Slurm job, SLURM_JOB_END_TIME: 30 s left, too little to begin a step"
    assert job(0, reason="SIGUSR1", saved="step_1", left_s=100)[::2] == (0, REQUEUE)
    for time_ in (1, 2, 3):
        code, log, called = job(0, reason=late, left_s=30, restarts=time_)
        assert (code, called) == (0, REQUEUE)
        assert f"trained nothing ({late}), for the {time_}. time without a new checkpoint" in log
    code, log, called = job(0, reason=late, left_s=30, restarts=4)
    assert (code, called) == (1, []) and log.endswith("4 starts in a row without a new checkpoint; given up\n")


def test_a_late_start_behind_a_checkpoint_of_the_same_job_just_goes_on(job: Job) -> None:
    """A rank died after a save, and torchrun started it again with less than a minute left."""
    late = "the end of the Slurm job, SLURM_JOB_END_TIME: 30 s left, too little to begin a step"
    code, log, called = job(0, reason=late, saved="step_1", left_s=30)
    assert (code, called) == (0, REQUEUE) and f"stopped for the time limit ({late})" in log


def test_a_job_whose_failures_cannot_be_counted_does_not_start_again_for_ever(job: Job, tmp_path: Path) -> None:
    count = tmp_path / "run" / "slurm-12345.failures"
    count.write_text("a[$(touch hit)]")  # whatever stands there is no program
    assert job(1)[::2] == (0, REQUEUE) and count.read_text() == "1\n" and not (tmp_path / "hit").exists()
    count.unlink()
    count.mkdir()
    code, log, called = job(137)
    assert (code, called) == (137, []) and "cannot be counted in run; given up" in log


def test_a_job_that_fails_before_there_is_a_run_folder_is_counted_too(job: Job, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "run")
    assert [job(127)[::2] for _ in range(4)] == [(0, REQUEUE)] * 3 + [(127, [])]


def test_an_outcome_of_an_earlier_start_does_not_count(job: Job) -> None:
    assert job(0, reason="finished", saved="step_1")[::2] == (0, [])
    code, log, called = job(0)
    assert (code, called) == (0, REQUEUE) and "trained nothing (no outcome), for the 1. time" in log


def test_a_refused_requeue_is_a_failure_unless_it_was_wished(job: Job, tmp_path: Path) -> None:
    (tmp_path / "shown").write_text("   Requeue=1 Restarts=0\n")
    code, log, _ = job(0, reason="SIGUSR1", saved="step_1", left_s=100)
    assert code == 1 and "Slurm has refused that" in log
    (tmp_path / "shown").write_text("   Requeue=0 Restarts=0\n")
    assert job(0, reason="SIGUSR1", saved="step_2", left_s=100)[0] == 0


def test_a_restarted_job_takes_the_newest_checkpoint_whatever_the_first_start_took(job: Job, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    text = script.read_text()
    for first, before, later in (("never", "", "auto"), ("runs/old", "", "runs/old"), ("runs/old", "step_1", "auto")):
        script.write_text(text.replace("resume=auto  #", f"resume={first}  #"))
        (tmp_path / "run/checkpoints/latest").write_text(before)
        assert f"--resume {first}\n" in job(0, reason="finished")[1]
        assert f"--resume {later}\n" in job(0, reason="finished", restarts=1)[1]


def test_every_command_of_the_page_is_run_by_a_test(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "slurm.md").read_text("utf-8")
    lines = "".join(re.findall(r"^```sh\n(.*?)```", page, re.MULTILINE | re.DOTALL)).splitlines()
    (submit,) = (line for line in lines if line.startswith("moba-train "))
    assert cli.main(submit.replace("configs/", f"{ROOT}/configs/").split()[1:]) == 0
    assert "\n#SBATCH --gpus-per-node=8\n" in capsys.readouterr().out
    under_slurm = (ROOT / "tests" / "slurm" / "test_jobs.py").read_text("utf-8")
    assert set(lines) - {submit} == set(re.findall(r'documented\("(.*?)"', under_slurm))


def test_a_template_without_the_end_of_its_settings_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("moba_train.commands.slurm.END_OF_SETTINGS", "# no such line\n")
    assert cli.main([*WORDS, "--dry-run"]) == 2
    assert "the script does not say where its settings end" in capsys.readouterr().err

"""Mistakes in a training's command line: one line that names what is wrong, exit code 2, and
nothing in --out. And the scripts' --help, and SLURM's script."""

import argparse
import contextlib
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_lines import GLOO_ABORTS, ROOT, TOKENIZER, call, environment, has_rows, run, wait_for

import dar
import train_ar
from common import cli, distributed, training

MISTAKES = {
    "train_tokenizer.py --out o": "--data is missing",
    "train_tokenizer.py --data shapes": "--out is missing",
    "train_tokenizer.py --data nowhere --out o": "nowhere",
    "train_tokenizer.py --data empty --out o": "empty: holds no images",
    "train_tokenizer.py --data shapes --val nowhere --out o": "nowhere",
    "train_tokenizer.py --data shapes --out o --steps 0": "0: expected 1",
    "train_tokenizer.py --data shapes --out o --lr nan": "--lr: nan: expected",
    "train_tokenizer.py --data shapes --out o --lr 0": "--lr: 0: expected",
    "train_tokenizer.py --data shapes --out o --threads 0": "--threads: 0: expected 1 ... 1024",
    "train_tokenizer.py --data shapes --out o --steps 9 --warmup 9": "--warmup 9: the run has only",
    "train_tokenizer.py --data shapes --out o --steps 9 --codebook-warmup 10": "only 9 steps",
    "train_tokenizer.py --data data --out data/o": "--out data/o: lies inside data",
    "train_tokenizer.py --data data --out data/../data": "lies inside data",
    "train_tokenizer.py --data shapes --val data --out data/ant/o": "lies inside data",
    "train_tokenizer.py --data shapes --out o --seed -1": "--seed: -1: expected 0 ... 2147483647",
    "train_tokenizer.py --data shapes --out o --workers many": "'many' is no whole number",
    "train_tokenizer.py --data shapes --out o --decay 2": "--decay: 2: expected 0 ... 1",
    "train_tokenizer.py --data shapes --out o --batch 8 --micro-batch 3": "--micro-batch 3",
    "train_tokenizer.py --data shapes --out o --set image_size=30": "30 is no multiple",
    "train_tokenizer.py --data shapes --out o --set num_groups=7": "7 equal groups",
    "train_tokenizer.py --data shapes --out o --set colour=red": "colour=red: no such field",
    "train_tokenizer.py --data shapes --out o --set num_tokens=x": "num_tokens=int",
    "train_tokenizer.py --data shapes --out o --init no.pt": "no.pt",
    "train_tokenizer.py --data shapes --out o --repa 0.5": "has no REPA head",
    "train_tokenizer.py --data shapes --out file": "file",
    "train_ar.py --data data --out o": "--tokenizer is missing",
    "train_ar.py --data data --out o --tokenizer no.pt": "no.pt",
    "train_ar.py --data data --out o --tokenizer half.pt": "half.pt: damaged",
    "train_ar.py --data data --out o --tokenizer T --val shapes": "its classes are not those of",
    "train_ar.py --data data --out o --tokenizer T --cfg 1 2 3": "(1.0, 2.0, 3.0)",
    "train_ar.py --data data --out o --tokenizer T --width 100": "width",
    "train_ar.py --data data --out o --tokenizer T --steps 9 --warmup 9": "has only 9 steps",
    "train_ar.py --data data --out data/o --tokenizer T": "--out data/o: lies inside data",
    "train_ar.py --data data --out o --tokenizer T --dropout 1.5": "--dropout: 1.5: expected 0",
    "train_ar.py --data data --out o --tokenizer T --epochs inf": "--epochs: inf: expected",
}


@pytest.fixture(scope="module")
def mistaken(work) -> Path:
    """The folder work, with more that is of no use."""
    (work / "empty").mkdir()
    (work / "file").touch()
    data = (work / "tokenizer" / "last.pt").read_bytes()
    (work / "half.pt").write_bytes(data[: len(data) // 2])
    return work


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_one_line(mistaken, capsys, monkeypatch, mistake):
    words = mistake.replace(" T", " tokenizer/last.pt").split()
    monkeypatch.setattr(train_ar, "tokenize", lambda *_: pytest.fail("it tokenizes"))
    monkeypatch.setattr(training.StopSignal, "__init__", lambda _: pytest.fail("it trains"))
    with pytest.raises(SystemExit) as ended:
        cli.command_line(lambda: call(*words, "--device", "cpu", cwd=mistaken))
    lines = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2
    assert "error: " in lines[-1]
    assert MISTAKES[mistake] in lines[-1]
    if not lines[0].startswith("usage: "):  # as argparse does
        assert len(lines) == 1
    assert not (mistaken / "o").exists()


@pytest.mark.slow
def test_the_shell_sees_the_line_and_the_exit_code(tmp_path):
    done = run(*"train_tokenizer.py --data nowhere --out o".split(), cwd=tmp_path, code=2)
    assert done.stderr.startswith("error: ")
    assert "nowhere" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("script", ["train_tokenizer", "train_ar", "sample", "fid"])
def test_help_is_the_launch_lines_and_all_arguments(script, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    assert ended.value.code in (0, None)
    text = capsys.readouterr().out
    assert f"python {script}.py" in text
    assert text.count("\n  --") > 3


@pytest.mark.parametrize("script", ["train_tokenizer", "train_ar", "sample", "fid"])
def test_every_option_has_help(script, monkeypatch):
    def parse_args(parser, *words):
        missing = [action.dest for action in parser._actions if not action.help]
        assert missing == []
        raise SystemExit

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")


OUT_OF_MEMORY = "error: out of memory; take a smaller batch (in a training: --micro-batch)"


@pytest.mark.parametrize(
    "error, code, said",
    [
        (ValueError("x = 3\nis odd"), 2, "error: x = 3 is odd"),
        (FileNotFoundError("a: no such file"), 2, "error: a: no such file"),
        (KeyboardInterrupt(), 130, "stopped"),
        (FloatingPointError("step 3: not finite"), 3, "error: step 3: not finite"),
        (MemoryError(), 2, OUT_OF_MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), 2, OUT_OF_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, OUT_OF_MEMORY),
    ],
)
def test_errors_have_exit_codes(error, code, said, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        cli.command_line(main)
    assert ended.value.code == code
    assert capsys.readouterr().err == said + "\n"


def test_exit_code_is_mains_and_bugs_keep_their_traceback():
    with pytest.raises(SystemExit) as ended:
        cli.command_line(lambda: 143)
    assert ended.value.code == 143
    with pytest.raises(ZeroDivisionError):
        cli.command_line(lambda: 1 // 0)


# Processes


def test_a_device_that_is_not_there_is_named():
    assert distributed.pick_device("cpu").type == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--device cuda: not available here"):
            distributed.pick_device("cuda")


def test_a_world_size_that_torchrun_did_not_set_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="WORLD_SIZE is set"):
        distributed.start_processes("cpu")
    for name, value in {"RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "99999"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="WORLD_SIZE is set.* port"):
        distributed.start_processes("cpu")


@pytest.mark.slow
def test_what_process_0_cannot_do_ends_all(tmp_path):
    done = run(*TOKENIZER, *"--data nowhere --out o".split(), cwd=tmp_path, processes=2, code=1)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "nowhere" in lines[0]


# SLURM

# What the script calls, on a "cluster" of this machine: one node with two processes.
COMMANDS = {
    "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$@" >>"$STUBS/calls"; fi',
    "srun": 'echo $$ >"$STUBS/pid"; shift 2; exec "$@"',
    "scancel": 'kill -TERM "$(cat "$STUBS/pid")"; echo "$@" >>"$STUBS/calls"',
}


@pytest.fixture
def submit(tmp_path):
    """A function that runs experiments/slurm.sh as a job that trains so many steps."""
    for name, body in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    variables = environment(
        PATH=f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        STUBS=tmp_path,
        SLURM_NNODES=1,
        SLURM_GPUS_ON_NODE=2,
        SLURM_JOB_NODELIST="localhost",
        SLURM_JOB_ID=os.getpid(),
    )
    jobs = []

    def submit(steps: int) -> subprocess.Popen:
        training = [str(ROOT / TOKENIZER[0]), *TOKENIZER[1:], "--steps", str(steps)]
        training += ["--out", "run", "--save-every", "10000"]
        job = subprocess.Popen(
            ["bash", ROOT / "experiments" / "slurm.sh", *training],
            cwd=tmp_path,
            env=variables,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that all that it starts can be ended with it
        )
        jobs.append(job)
        return job

    yield submit
    for job in jobs:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)


def test_slurm_job_that_would_begin_anew_is_refused():
    words = ["bash", ROOT / "experiments" / "slurm.sh", *"train_ar.py --resume never".split()]
    done = subprocess.run(words, capture_output=True, text=True, env=environment(SLURM_JOB_ID=1))
    assert done.returncode == 2
    assert done.stderr.startswith("--resume never would begin anew")


@pytest.mark.slow
def test_slurm_job_saves_queues_again_and_goes_on(submit, tmp_path):
    first = submit(100_000)
    wait_for(has_rows(tmp_path / "run", 3), first)
    first.send_signal(signal.SIGTERM)
    _, errors = first.communicate()
    assert first.returncode == 0, errors[-3000:]
    calls = (tmp_path / "calls").read_text()
    assert f"requeue {os.getpid()}" in calls
    assert f"--signal=TERM {os.getpid()}.0" in calls
    done = dar.read_checkpoint(tmp_path / "run" / "last.pt")["training"]["step"]
    assert done >= 3

    for _ in range(3):
        second = submit(done + 2)
        _, errors = second.communicate()
        if GLOO_ABORTS not in errors:
            break
    assert second.returncode == 0, errors[-3000:]
    assert dar.read_checkpoint(tmp_path / "run" / "last.pt")["training"]["step"] == done + 2
    assert (tmp_path / "calls").read_text() == calls  # an end is no reason to queue again

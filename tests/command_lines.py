"""How the tests run the trainings: as a user does, in processes of their own (run, start), or,
which takes a tenth of the time, in the process of the test (call). Models have a few thousand
weights."""

import csv
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

import dar
from common.files import LOCKS
from common.training import STOP_SIGNALS, draw_shape

ROOT = Path(dar.__file__).parent
PROBE = Path(__file__).with_name("probe.py")  # runs a script, and kills it from inside

SMALL_FIELDS = dict(
    image_size=16,
    encoder_width=64,
    decoder_width=64,
    diffusion_width=64,
    encoder_layers=1,
    decoder_layers=1,
    diffusion_layers=1,
    num_tokens=16,
    num_groups=4,
    codebook_size=64,
)
CPU = "--device cpu --precision float32 --log-every 1".split()
SMALL = ["--set", *(f"{name}={value}" for name, value in SMALL_FIELDS.items())]
# Ends with --set, so that what follows may be one more FIELD=VALUE.
TOKENIZER = "train_tokenizer.py --preset tiny --data shapes --batch 4 --picture-every 100".split()
TOKENIZER += CPU + SMALL
BASELINE = [*TOKENIZER, *"--data data --steps 4 --codebook-warmup 2 --times 2".split()]
AR = "train_ar.py --preset tiny --data data --width 64 --layers 1 --batch 4".split() + CPU

# Of a hundred processes that gloo has connected, one aborts with these words when all is done and
# it ends: torch does so without this project too. The same command again finds nothing left to do.
GLOO_ABORTS = "terminate called without an active exception"


def command(*words, processes: int = 1, probe: bool = False) -> list[str]:
    start = [sys.executable]
    if processes > 1:
        start += "-m torch.distributed.run --standalone".split()
        start += [f"--nproc_per_node={processes}"]
    if probe:
        start += [str(PROBE)]
    return [*start, str(ROOT / words[0]), *map(str, words[1:])]


def environment(**more) -> dict[str, str]:
    more = {name: str(value) for name, value in more.items()}
    return os.environ | {"OMP_NUM_THREADS": "1"} | more


def run(
    *words, cwd=ROOT, code: int = 0, processes: int = 1, probe: bool = False, **more
) -> subprocess.CompletedProcess:
    """Runs a script to its end, which must be this exit code. more: environment variables."""
    words = command(*words, processes=processes, probe=probe)
    for _ in range(3):
        done = subprocess.run(
            words, cwd=cwd, env=environment(**more), capture_output=True, text=True
        )
        if GLOO_ABORTS not in done.stderr:
            break
    assert done.returncode == code, done.stderr[-3000:]
    return done


def call(*words, cwd) -> int:
    """Runs a script's main() in this process, and leaves folder, arguments, signals and dar.attend
    as they were."""
    script = importlib.import_module(words[0].removesuffix(".py"))
    folder = os.getcwd()
    arguments = sys.argv
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    attend = dar.attend
    os.chdir(cwd)
    sys.argv = [str(word) for word in words]
    try:
        return script.main()
    finally:
        os.chdir(folder)
        sys.argv = arguments
        dar.attend = attend
        while LOCKS:  # as when a process ends
            LOCKS.pop().close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if words[0] == "train_ar.py":
            script.map_file.cache_clear()  # a relative path means another file in another folder


def start(*words, cwd, processes: int = 1) -> subprocess.Popen:
    words = command(*words, processes=processes)
    return subprocess.Popen(words, cwd=cwd, env=environment(), stderr=subprocess.PIPE, text=True)


def wait_for(condition, process: subprocess.Popen) -> None:
    """Waits until condition() holds, while the process runs."""
    while not condition():
        assert process.poll() is None, f"it ended: {process.stderr.read()[-3000:]}"
        time.sleep(0.01)


def log(folder: Path) -> list[dict[str, str]]:
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def losses(folder: Path) -> list[tuple[str, ...]]:
    """(step, loss, gradient norm) of each row, as they were written: equal bits, equal words."""
    return [(row["step"], row["loss"], row["grad_norm"]) for row in log(folder)]


def has_rows(folder: Path, count: int):
    return lambda: (folder / "log.csv").exists() and len(log(folder)) >= count


def flatten(data, prefix: str = "") -> dict[str, torch.Tensor]:
    """The tensors in nested dictionaries, each by the path that leads to it."""
    if isinstance(data, torch.Tensor):
        return {prefix: data}
    tensors = {}
    if isinstance(data, dict):
        for name, value in data.items():
            tensors |= flatten(value, f"{prefix}/{name}")
    return tensors


def assert_same_run(a: Path, b: Path) -> None:
    """The same rows of the log; the same bits of weights, averages, moments and sums."""
    assert losses(a) == losses(b)
    first = flatten(dar.read_checkpoint(a / "last.pt"))
    second = flatten(dar.read_checkpoint(b / "last.pt"))
    assert first.keys() == second.keys() and len(first) > 20
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def draw_pictures(folder: Path) -> None:
    """24 pictures of 16 pixels in three classes."""
    for i in range(24):
        name = ("ant", "bee", "cat")[i % 3]
        (folder / name).mkdir(parents=True, exist_ok=True)
        draw_shape(i, 16).save(folder / name / f"{i}.png")

"""How the tests run the scripts: as a user does, in processes of their own, on models of a few thousand weights."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import dar
import training

ROOT = Path(dar.__file__).parent
PROBE = Path(__file__).with_name("probe.py")  # runs a script and looks at it, or kills it, from inside
SMALL = (
    "--device cpu --precision float32 --set image_size=16 encoder_width=64 decoder_width=64 diffusion_width=64 "
    "encoder_layers=1 decoder_layers=1 diffusion_layers=1 num_tokens=16 num_groups=4 codebook_size=64"
).split()
TOKENIZER = "train_tokenizer.py --data shapes --batch 4 --log-every 1 --picture-every 100".split() + SMALL
BASELINE = [word.replace("shapes", "data") for word in TOKENIZER] + "--steps 4 --codebook-warmup 2 --times 2".split()
AR = "train_ar.py --device cpu --precision float32 --data data --width 64 --layers 1 --batch 4 --log-every 1".split()


def command(*words, processes: int = 1, probe: bool = False) -> list[str]:
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*start, *([str(PROBE)] if probe else []), str(ROOT / words[0]), *map(str, words[1:])]


def environment(**more) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in more.items()}


# Of a hundred processes that gloo has connected, one aborts with these words when all is done and it ends: torch does
# so without this project too. The same command again then finds nothing left to do.
GLOO_ABORTS = "terminate called without an active exception"


def run(*words, cwd=ROOT, code=0, processes=1, probe=False, **more) -> subprocess.CompletedProcess:
    words, options = command(*words, processes=processes, probe=probe), dict(cwd=cwd, env=environment(**more))
    for _ in range(3):
        done = subprocess.run(words, capture_output=True, text=True, **options)
        if GLOO_ABORTS not in done.stderr:
            break
    assert done.returncode == code, done.stderr[-3000:]
    return done


def start(*words, cwd, processes: int = 1) -> subprocess.Popen:
    words = command(*words, processes=processes)
    return subprocess.Popen(words, cwd=cwd, env=environment(), stderr=subprocess.PIPE, text=True)


def wait_for(condition, process: subprocess.Popen, seconds: float = 300) -> None:
    """Waits until condition() holds, while the process runs."""
    deadline = time.time() + seconds
    while not condition():
        assert process.poll() is None, f"it ended: {process.stderr.read()[-3000:]}"
        assert time.time() < deadline, "it takes too long"
        time.sleep(0.01)


def kill_when(condition, *words, cwd) -> None:
    """Starts a script and kills it, SIGKILL, as soon as condition() holds."""
    process = start(*words, cwd=cwd)
    wait_for(condition, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run ended before it was killed"


def log(folder: Path) -> list[dict[str, str]]:
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def losses(folder: Path) -> list[tuple[str, ...]]:
    """(step, loss, gradient norm) of each row, as they were written: equal bits give equal words."""
    return [(row["step"], row["loss"], row["grad_norm"]) for row in log(folder)]


def has_rows(folder: Path, count: int):
    return lambda: (folder / "log.csv").exists() and len(log(folder)) >= count


def draw_pictures(folder: Path) -> None:
    """24 pictures of 16 pixels in three classes."""
    for i in range(24):
        (folder / ("ant", "bee", "cat")[i % 3]).mkdir(parents=True, exist_ok=True)
        training.draw_shape(i, 16).save(folder / ("ant", "bee", "cat")[i % 3] / f"{i}.png")

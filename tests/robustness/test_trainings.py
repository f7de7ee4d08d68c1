"""What may befall a training of several days: kills, signals, a full disk, numbers that are not
finite, images that cannot be read, a folder that is another run's. Nothing is lost, or one line
says what is wrong."""

import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from command_lines import (
    AR,
    BASELINE,
    ROOT,
    TOKENIZER,
    assert_same_run,
    call,
    draw_pictures,
    environment,
    has_rows,
    log,
    losses,
    run,
    start,
    wait_for,
)

import dar
import train_tokenizer
from common.training import ImageData, StopSignal, draw_shape


def saved_step(folder) -> int:
    return dar.read_checkpoint(folder / "last.pt")["training"]["step"]


# Kills


@pytest.mark.slow
def test_killed_at_every_moment_of_saving(work):
    words = [*BASELINE, *"--steps 7 --save-every 1 --keep-every 2 --out".split()]
    call(*words, "whole", cwd=work)
    folder = work / "torn"
    # Each start writes the log anew (2 moments), then saves once (2) and, with the kept copy, once
    # more (4). Every run is killed one moment later than the one before.
    steps = []
    for moment in range(1, 9):
        run(*words, "torn", cwd=work, probe=True, KILL_AT=moment, code=-signal.SIGKILL)
        files = list(folder.glob("*.pt"))
        steps.append(max([dar.read_checkpoint(path)["training"]["step"] for path in files] or [0]))
    assert steps == sorted(steps)
    assert 0 < steps[-1] < 7
    run(*words, "torn", cwd=work)
    assert_same_run(folder, work / "whole")
    assert not list(folder.glob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("script", ["tokenizer", "llama"])
def test_killed_run_goes_on_bit_for_bit(work, script):
    words = [*BASELINE, *"--steps 150 --save-every 3 --codebook-warmup 5".split()]
    if script == "llama":
        words = [*AR, *"--tokenizer tokenizer/last.pt --dropout 0.1 --ema".split()]
        words += "--steps 200 --save-every 7".split()
    whole, killed = (work / f"{script}-{name}" for name in ("whole", "killed"))
    call(*words, "--out", whole.name, cwd=work)
    seed = time.time_ns()
    print("seed of the moments:", seed)
    dice = random.Random(seed)
    for _ in range(3):
        rows = dice.randrange(1, 20)
        if has_rows(killed, 1)():
            rows += len(log(killed))
        process = start(*words, "--out", killed.name, cwd=work)
        wait_for(has_rows(killed, rows), process)
        time.sleep(dice.uniform(0, 0.1))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    run(*words, "--out", killed.name, cwd=work)
    assert_same_run(killed, whole)


# Signals


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_signal_saves_and_the_exit_code_names_it(tmp_path, number):
    words = [*TOKENIZER, *"--steps 100000 --save-every 100000 --workers 1 --out run".split()]
    process = start(*words, cwd=tmp_path)
    wait_for(has_rows(tmp_path / "run", 2), process)
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == 128 + number
    step = saved_step(tmp_path / "run")
    assert errors.endswith(f"stopped after step {step}, saved; the same command goes on\n")
    assert "Traceback" not in errors
    assert len(log(tmp_path / "run")) == step


def children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True)
    pairs = [line.split() for line in listed.stdout.splitlines()[1:]]
    return [int(child) for child, parent in pairs if int(parent) == pid]


@pytest.mark.slow
def test_signal_to_one_of_two_processes_stops_both(tmp_path):
    words = [*TOKENIZER, *"--steps 100000 --save-every 100000 --out run".split()]
    process = start(*words, cwd=tmp_path, processes=2)
    wait_for(has_rows(tmp_path / "run", 2), process)
    os.kill(max(children(process.pid)), signal.SIGTERM)
    _, errors = process.communicate()
    step = saved_step(tmp_path / "run")
    assert f"stopped after step {step}, saved" in errors
    assert len(log(tmp_path / "run")) == step


@pytest.mark.parametrize(
    "resume, said", [("auto", "the same command goes on"), ("never", "without --resume never")]
)
def test_stopped_run_says_which_command_goes_on(tmp_path, capsys, monkeypatch, resume, said):
    accept = train_tokenizer.LossScaler.accept

    def stop(self, numbers, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return accept(self, numbers, step)

    monkeypatch.setattr(train_tokenizer.LossScaler, "accept", stop)
    words = [*TOKENIZER, *f"--steps 9 --out run --resume {resume}".split()]
    assert call(*words, cwd=tmp_path) == 128 + signal.SIGTERM
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("stopped after step 4, saved; the same command ")
    assert said in last


@pytest.mark.slow
def test_a_closed_terminal_ends_no_training(tmp_path):
    process = start(*TOKENIZER, *"--steps 30 --out run".split(), cwd=tmp_path)
    process.stderr.close()  # nobody reads the progress bar any more
    assert process.wait(timeout=100) == 0
    assert saved_step(tmp_path / "run") == 30


def test_second_ctrl_c_does_not_wait(restore_signals, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    stop = StopSignal()
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.number == signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")  # torchrun passes each Ctrl-C on a second time
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.number == signal.SIGINT


# A full disk


def test_full_disk_leaves_the_last_checkpoint(tmp_path):
    resource = pytest.importorskip("resource")  # a limit on the size of files takes its place
    words = [*TOKENIZER, *"--steps 6 --save-every 2 --keep-every 4 --decay 0 --out".split()]
    call(*words, "whole", cwd=tmp_path)
    call(*words, "full", "--steps", 2, cwd=tmp_path)
    before = (tmp_path / "full" / "last.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match="step-4.pt: cannot be written .*nothing was replaced"):
            call(*words, "full", cwd=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "full" / "last.pt").read_bytes() == before
    assert not list((tmp_path / "full").glob("*.tmp"))
    call(*words, "full", cwd=tmp_path)
    assert_same_run(tmp_path / "full", tmp_path / "whole")


# Numbers that are not finite


def assert_finite(folder) -> None:
    checkpoint = dar.read_checkpoint(folder / "last.pt")
    for part in ("model", "ema"):
        for name, weight in checkpoint.get(part, {}).items():
            assert weight.isfinite().all(), name


def test_too_high_a_rate_stops_before_it_is_saved(tmp_path):
    words = "--steps 50 --lr 1e9 --warmup 0 --save-every 1 --out run"
    with pytest.raises(FloatingPointError, match="step [0-9]+: not finite .*a lower --lr"):
        call(*TOKENIZER, *words.split(), cwd=tmp_path)
    assert_finite(tmp_path / "run")


@pytest.mark.parametrize("spoilt", ["loss", "gradient"])
@pytest.mark.parametrize("script", ["tokenizer", "llama"])
def test_neither_loss_nor_gradient_may_be_infinite(work, tmp_path, monkeypatch, script, spoilt):
    """In the first half of the second step; the step before was saved."""
    ar_loss, tokenizer_loss = dar.ar_loss, dar.tokenizer_loss
    calls = []

    def spoil(loss: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) != 3:
            return loss
        if spoilt == "loss":
            return loss * math.inf
        return loss + (0 * loss).sqrt()  # the same number; its derivative is infinite times 0

    def spoil_fm(*args) -> dict[str, torch.Tensor]:
        terms = tokenizer_loss(*args)
        return terms | {"fm": spoil(terms["fm"])}

    monkeypatch.setattr(dar, "tokenizer_loss", spoil_fm)
    monkeypatch.setattr(dar, "ar_loss", lambda *args: spoil(ar_loss(*args)))
    words = TOKENIZER
    if script == "llama":
        words = [*AR, *"--data shapes --on-the-fly --ema --tokenizer".split()]
        words += [work / "tokenizer" / "last.pt"]
    words = [*words, *"--steps 4 --save-every 1 --micro-batch 2 --out run".split()]
    with pytest.raises(FloatingPointError, match="step 2: not finite .*(loss inf|grad_norm nan)"):
        call(*words, cwd=tmp_path)
    assert len(calls) == 4
    assert saved_step(tmp_path / "run") == 1
    assert_finite(tmp_path / "run")


def test_float16_skips_the_steps_that_overflow(tmp_path, monkeypatch):
    accept = train_tokenizer.LossScaler.accept

    def overflow(self, numbers, step):
        if step in (1, 2):
            numbers = numbers | {"grad_norm": math.inf}
        return accept(self, numbers, step)

    monkeypatch.setattr(train_tokenizer.LossScaler, "accept", overflow)
    words = "--steps 4 --precision float16 --save-every 1 --keep-every 1 --out run"
    call(*TOKENIZER, *words.split(), cwd=tmp_path)
    files = [dar.read_checkpoint(tmp_path / "run" / f"step-{i}.pt") for i in (1, 2, 3, 4)]
    weights = [file["model"]["diffusion.patch_out.weight"] for file in files]
    same = [torch.equal(a, b) for a, b in zip(weights, weights[1:])]
    assert same == [True, True, False]
    assert [file["training"]["scaler"]["scale"] for file in files] == [2**16, 2**15, 2**14, 2**14]
    assert log(tmp_path / "run")[-1]["skipped"] == "2"


@pytest.mark.parametrize("script", ["tokenizer", "llama"])
def test_weights_that_are_not_finite_start_no_training(work, script):
    tokenizer = dar.load_tokenizer(work / "tokenizer" / "last.pt")
    tokenizer.quant_out.weight.data[:] = math.inf
    dar.save_checkpoint(work / "infinite.pt", tokenizer)
    words = [*TOKENIZER, *"--init infinite.pt --out unborn".split()]
    if script == "llama":
        words = [*AR, *"--tokenizer infinite.pt --out unborn".split()]
    with pytest.raises(FloatingPointError, match="infinite.pt: quant_out.weight is not finite"):
        call(*words, cwd=work)
    assert not (work / "unborn").exists()


# Images that cannot be read


@pytest.fixture
def images(tmp_path):
    """A folder of 150 images; number 7 is no image."""
    folder = tmp_path / "data" / "ant"
    folder.mkdir(parents=True)
    for i in range(150):
        draw_shape(i, 16).save(folder / f"{i:03}.png")
    (folder / "007.png").write_bytes(b"no picture")
    return folder


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_corrupt_images_are_replaced_named_and_counted(images, tmp_path, capfd, workers):
    words = f"--data data --batch 50 --save-every 2 --out run --workers {workers} --steps"
    words = [*TOKENIZER, *words.split()]
    call(*words, 3, cwd=tmp_path)
    assert "007.png" in capfd.readouterr().err
    assert log(tmp_path / "run")[-1]["unreadable"] == "1"
    call(*words, 6, cwd=tmp_path)  # met again in the second epoch
    assert log(tmp_path / "run")[-1]["unreadable"] == "2"


def test_images_that_vanish_count_as_corrupt(images, tmp_path, monkeypatch):
    build_model = train_tokenizer.build_model

    def remove_one(*args):  # after the images were listed
        (images / "007.png").unlink()
        return build_model(*args)

    monkeypatch.setattr(train_tokenizer, "build_model", remove_one)
    call(*TOKENIZER, *"--data data --batch 50 --steps 3 --out run".split(), cwd=tmp_path)
    assert log(tmp_path / "run")[-1]["unreadable"] == "1"


def test_the_next_image_comes_with_its_own_label(tmp_path, capsys):
    draw_pictures(tmp_path)
    (tmp_path / "ant" / "9.png").write_bytes(b"no picture")  # the last of its class
    data = ImageData(str(tmp_path), 16)
    image, source = data.next_readable(7)
    assert source == 8
    assert data.class_names[data.labels[source]] == "bee"
    assert image.tobytes() == data.image(8).tobytes()
    assert "ant/9.png" in capsys.readouterr().err
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="not one of its 24 images can be read"):
        data.next_readable(7)


def test_too_many_corrupt_images_end_a_run(images, tmp_path):
    for i in range(100, 103):
        (images / f"{i}.png").write_bytes(b"")
    words = "--data data --batch 75 --steps 2 --out run"
    with pytest.raises(ValueError, match="data: [2-4] unreadable images, over 1%"):
        call(*TOKENIZER, *words.split(), cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_worker_ends_the_training_in_a_line(tmp_path, processes):
    """As the system does when memory is short. Python would wait for the others for ever."""
    words = "--steps 100000 --save-every 100000 --out run --workers 2"
    process = start(*TOKENIZER, *words.split(), cwd=tmp_path, processes=processes)
    wait_for(has_rows(tmp_path / "run", 2), process)
    training = process.pid
    if processes > 1:  # torchrun's, and two trainings
        training = children(process.pid)[0]
    os.kill(children(training)[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (2 if processes == 1 else 1)
    assert "error: a process that prepares images failed" in errors
    if processes == 1:
        assert "Traceback" not in errors


def test_too_little_memory_is_no_corrupt_image(images, monkeypatch):
    def no_memory(file):
        raise MemoryError

    monkeypatch.setattr("PIL.Image.open", no_memory)
    with pytest.raises(MemoryError):
        ImageData(str(images.parent), 16).next_readable(0)


# A folder where something is already


@pytest.fixture
def done(work, tmp_path):
    """A copy of a finished run of four steps."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("last.pt", "log.csv"):
        (folder / name).write_bytes((work / "tokenizer" / name).read_bytes())
    return folder


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


@pytest.mark.parametrize("damage", [cut, lambda data: b"", lambda data: b"text"])
def test_damaged_checkpoint_is_named_and_kept(work, done, damage):
    path = done / "last.pt"
    path.write_bytes(damage(path.read_bytes()))
    before = {path.name: path.read_bytes() for path in done.iterdir()} | {"lock": b""}
    with pytest.raises(ValueError, match="last.pt: damaged"):
        call(*BASELINE, "--out", done, cwd=work)
    assert {path.name: path.read_bytes() for path in done.iterdir()} == before


@pytest.mark.slow
def test_a_folder_has_one_training(tmp_path):
    words = [*TOKENIZER, *"--steps 100000 --save-every 100000 --out run".split()]
    first = start(*words, cwd=tmp_path)
    wait_for(has_rows(tmp_path / "run", 2), first)
    second = run(*words, "--steps", 2, cwd=tmp_path, code=2)
    assert "error: run: another process trains there" in second.stderr
    first.kill()
    first.communicate()
    run(*words, "--steps", 2, cwd=tmp_path)  # a kill leaves no lock


def test_init_may_be_gone_once_the_run_has_begun(work, tmp_path):
    init = tmp_path / "init.pt"
    init.write_bytes((work / "tokenizer" / "last.pt").read_bytes())
    words = [*TOKENIZER, *"--codebook-warmup 0 --warmup 0 --out run --init".split()]
    call(*words, "init.pt", "--steps", 2, cwd=tmp_path)
    init.unlink()
    call(*words, "./init.pt", "--steps", 3, cwd=tmp_path)
    assert saved_step(tmp_path / "run") == 3


@pytest.mark.slow
def test_processes_that_see_other_folders_are_refused(work, tmp_path):
    words = [*BASELINE, "--data", work / "data", "--out", "run"]
    program = f"""
import os, sys, runpy
folder = os.path.join({str(tmp_path)!r}, os.environ["RANK"])
os.makedirs(folder, exist_ok=True)
os.chdir(folder)
sys.argv = {[str(word) for word in words]!r}
sys.path.insert(0, {str(ROOT)!r})
runpy.run_path({str(ROOT / "train_tokenizer.py")!r}, run_name="__main__")
"""
    (tmp_path / "apart.py").write_text(program)
    for folder in ("0", "1"):
        (tmp_path / folder).mkdir()
    call(*words, "--steps", 3, cwd=tmp_path / "0")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*torchrun, tmp_path / "apart.py"], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "has step = " in done.stderr
    assert "all must see the same --data and --out" in done.stderr


def test_weights_alone_are_no_run(work, done):
    dar.save_checkpoint(done / "last.pt", dar.load_tokenizer(done / "last.pt"))
    with pytest.raises(ValueError, match="last.pt: no training can go on from it"):
        call(*BASELINE, "--out", done, cwd=work)


LOGS = {
    "semicolons": lambda text: b"\xef\xbb\xbf" + text.replace(b",", b";"),
    "other ends of lines": lambda text: text.replace(b"\n", b"\r\n"),
    "empty": lambda text: b"",
    "torn line": lambda text: text + b"5,0.12",
    "later rows": lambda text: text + text.splitlines()[-1].replace(b"4,", b"5,", 1) + b"\n",
    "no text": lambda text: bytes(range(256)) * 8,
}


@pytest.mark.parametrize("change", LOGS)
def test_run_goes_on_whatever_became_of_its_log(work, done, change):
    path = done / "log.csv"
    path.write_bytes(LOGS[change](path.read_bytes()))
    call(*BASELINE, "--out", done, "--steps", 6, cwd=work)
    steps = [row["step"] for row in log(done)]
    assert steps[-2:] == ["5", "6"]
    if change in ("other ends of lines", "torn line", "later rows"):
        assert steps == ["1", "2", "3", "4", "5", "6"]


# Worker processes of other platforms


@pytest.mark.slow
@pytest.mark.parametrize("script", ["tokenizer", "llama"])
def test_spawned_workers_change_nothing(work, script):
    """As on a Mac and on Windows: a worker is sent what it needs, and imports the rest."""
    words = [*BASELINE, *"--out spawned --workers 1".split()]
    plain = "tokenizer"
    if script == "llama":
        words = [*AR, *"--tokenizer tokenizer/last.pt --steps 5 --ema --workers 1".split()]
        words += ["--out", "spawned-ar"]
        plain = "ar"
    run(*words, cwd=work, probe=True, START_METHOD="spawn")
    assert losses(work / words[words.index("--out") + 1]) == losses(work / plain)

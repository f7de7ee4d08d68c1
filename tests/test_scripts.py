"""The scripts, run as a user runs them: from procedural data to pictures, through kills and mistakes."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dar
import sample
from train_tokenizer import Samples, sample_noise, training_batches

ROOT = Path(dar.__file__).parent
SMALL = (
    "--device cpu --set image_size=16 encoder_width=64 decoder_width=64 diffusion_width=64 encoder_layers=1 "
    "decoder_layers=1 diffusion_layers=1 num_tokens=16 num_groups=4 codebook_size=64"
).split()
TOKENIZER = [
    "train_tokenizer.py",
    "--data",
    "shapes",
    "--batch",
    "4",
    "--log-every",
    "1",
    "--picture-every",
    "100",
    *SMALL,
]
AR = [
    "train_ar.py",
    "--device",
    "cpu",
    "--data",
    "data",
    "--width",
    "64",
    "--layers",
    "1",
    "--batch",
    "4",
    "--log-every",
    "1",
]


def command(*words) -> list[str]:
    return [sys.executable, str(ROOT / words[0]), *map(str, words[1:])]


def run(*words, cwd=ROOT, code=0) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command(*words), cwd=cwd, capture_output=True, text=True, env=environment)
    assert done.returncode == code, done.stderr[-2000:]
    return done


def losses(folder: Path) -> list[tuple[str, ...]]:
    with open(folder / "log.csv", newline="") as file:
        return [(row["step"], row["loss"], row["grad_norm"]) for row in csv.DictReader(file)]


def kill_after(words, folder: Path, rows: int) -> None:
    """Starts a training and kills it, SIGKILL, once its log has so many rows."""
    process = subprocess.Popen(
        command(*words), cwd=folder.parent, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL
    )
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:
        if (folder / "log.csv").exists() and len(losses(folder)) >= rows:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with a trained tokenizer (tokenizer/), 24 pictures of 3 classes (data/), and a trained Llama (ar/)."""
    work = tmp_path_factory.mktemp("work")
    for i in range(24):
        folder = work / "data" / ("ant", "bee", "cat")[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        dar.draw_shape(i, 16).save(folder / f"{i}.png")
    run(
        *TOKENIZER,
        "--val",
        "shapes",
        "--out",
        "tokenizer",
        "--steps",
        5,
        "--codebook-warmup",
        2,
        "--times",
        2,
        cwd=work,
    )
    run(*AR, "--val", "data", "--tokenizer", "tokenizer/last.pt", "--out", "ar", "--steps", 5, "--ema", cwd=work)
    return work


def test_a_samples_noise_does_not_depend_on_its_batch():
    device = torch.device("cpu")
    together = sample_noise(1, list(range(8)), (3, 4, 4), device)
    assert torch.equal(together[5:6], sample_noise(1, [5], (3, 4, 4), device))
    assert not torch.equal(together[5], together[6])
    assert not torch.equal(together, sample_noise(2, list(range(8)), (3, 4, 4), device))
    assert abs(together.mean()) < 0.2 and abs(together.std() - 1) < 0.2


def test_batches_are_the_same_for_any_number_of_processes_and_micro_batches():
    data = dar.ImageData("shapes", 8)
    samples = Samples(data, lambda image, rng: image if rng.random() < 0.5 else image.rotate(90), seed=0)

    def images(world, micro):
        parts = [training_batches(samples, range(2, 4), 8, rank, world, micro, 0) for rank in range(world)]
        steps = [[torch.cat([next(part)[0] for _ in range(8 // world // micro)]) for part in parts] for _ in range(2)]
        return torch.stack([torch.cat(step) for step in steps])

    assert torch.equal(images(1, 8), images(2, 4)) and torch.equal(images(1, 8), images(4, 1))


def test_tokenizer_training_logs_draws_and_saves(work):
    rows = losses(work / "tokenizer")
    assert [step for step, _, _ in rows] == ["1", "2", "3", "4", "5"] and all(float(loss) > 0 for _, loss, _ in rows)
    with open(work / "tokenizer" / "log.csv", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last["val_psnr"]) > 0 and 0 < float(last["val_code_use"]) <= 1
    assert Image.open(work / "tokenizer" / "step-5.png").size == (6 * 18 + 2, 8 * 18 + 2)  # 4 previews between the two
    tokenizer = dar.load_tokenizer(work / "tokenizer" / "last.pt")
    assert tokenizer.encode(torch.zeros(1, 3, 16, 16)).shape == (1, 16)


def test_a_killed_tokenizer_training_goes_on_bit_for_bit(work):
    words = (*TOKENIZER, "--steps", "8", "--save-every", "2", "--codebook-warmup", "5")
    run(*words, "--out", "whole", cwd=work)
    kill_after((*words, "--out", "killed"), work / "killed", 4)
    run(*words, "--out", "killed", cwd=work)
    assert losses(work / "killed") == losses(work / "whole")
    whole, killed = (dar.read_checkpoint(work / name / "last.pt") for name in ("whole", "killed"))
    assert all(torch.equal(whole[part][k], killed[part][k]) for part in ("model", "ema") for k in whole["model"])


def test_a_killed_llama_training_goes_on_bit_for_bit(work):
    words = (*AR, "--tokenizer", "tokenizer/last.pt", "--steps", "40", "--save-every", "7")
    run(*words, "--out", "ar-whole", cwd=work)
    kill_after((*words, "--out", "ar-killed"), work / "ar-killed", 10)
    run(*words, "--out", "ar-killed", cwd=work)
    assert losses(work / "ar-killed") == losses(work / "ar-whole")


def test_sigterm_saves_and_the_next_start_goes_on(work):
    words = (*TOKENIZER, "--steps", "100000", "--save-every", "100000", "--out", "stopped")
    process = subprocess.Popen(command(*words), cwd=work, stderr=subprocess.PIPE, text=True)
    while not (work / "stopped" / "log.csv").exists() or len(losses(work / "stopped")) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in errors
    step = dar.read_checkpoint(work / "stopped" / "last.pt")["training"]["step"]
    assert step == int(losses(work / "stopped")[-1][0])


def test_a_llama_checkpoint_needs_nothing_else_to_sample(work, tmp_path):
    ar = dar.load_ar(work / "ar" / "last.pt")
    assert ar.class_names == ["ant", "bee", "cat"] and ar.tokenizer.config.num_tokens == 16
    out = tmp_path / "grid.png"
    run("sample.py", "--ckpt", work / "ar" / "last.pt", "--classes", "bee", "2", "--num", 3, "--batch", 2, "--out", out)
    assert Image.open(out).size[0] > 2 * 96
    again = tmp_path / "again.png"
    run(
        "sample.py",
        "--ckpt",
        work / "ar" / "last.pt",
        "--classes",
        "1",
        "cat",
        "--num",
        3,
        "--batch",
        2,
        "--out",
        again,
    )
    assert out.read_bytes() == again.read_bytes()
    bundle = tmp_path / "bundle.pt"
    run("sample.py", "--ckpt", work / "ar" / "last.pt", "--save-bundle", bundle)
    assert torch.equal(dar.load_ar(bundle).output.weight, ar.output.weight)


def test_held_out_losses_are_logged_by_group(work):
    with open(work / "ar" / "log.csv", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    groups = [float(last[f"val_group_{k}"]) for k in range(4)]
    assert abs(sum(groups) / 4 - float(last["val_loss"])) < 1e-4
    assert 0 < float(last["unigram_by_position"]) <= float(last["unigram"]) + 1e-6


def test_codes_of_another_tokenizer_are_refused(work):
    run(*TOKENIZER, "--out", "other", "--steps", 1, "--seed", 7, cwd=work)
    done = run(*AR, "--tokenizer", "other/last.pt", "--out", "ar", "--steps", 5, cwd=work, code=2)
    assert "of another tokenizer" in done.stderr


def test_released_files_draw_the_golden_tokens_from_the_command_line(released_dir, golden_ar, tmp_path):
    words = f"--ckpt {released_dir}/ar.pt --tokenizer {released_dir}/tokenizer.pt --classes 3 7 --num 2 --top-k 1"
    run("sample.py", *words.split(), "--cfg", 1.1, 4.0, "--seed", 9, "--device", "cpu", "--out", tmp_path / "x.png")
    codes = torch.from_numpy(golden_ar["greedy"]).long()  # top-k 1 is greedy
    tokenizer = dar.load_tokenizer(released_dir / "tokenizer.pt")
    images = tokenizer.decode(codes, dar.initial_noise([9, 10], 256, torch.device("cpu")))
    expected = np.asarray(sample.labelled_grid(images, ["3", "7"], 2)).astype(int)
    difference = np.abs(np.asarray(Image.open(tmp_path / "x.png")).astype(int) - expected)
    assert difference.max() <= 1  # the script's own thread count may round a pixel the other way


def test_the_shipped_model_draws_its_grid(tmp_path):
    done = run("sample.py", "--num", 2, "--out", tmp_path / "x.png")
    assert "x.png" in done.stdout and Image.open(tmp_path / "x.png").size[0] >= 2 * 96


MISTAKES = {
    "no such data": ("train_tokenizer.py --data nowhere --out o", "nowhere"),
    "empty data": ("train_tokenizer.py --data empty --out o", "empty"),
    "indivisible image": ("train_tokenizer.py --data shapes --out o --set image_size=30", "30"),
    "indivisible groups": ("train_tokenizer.py --data shapes --out o --set num_groups=7", "K = 7"),
    "unknown field": ("train_tokenizer.py --data shapes --out o --set colour=red", "colour"),
    "another run": ("train_tokenizer.py --data shapes --out tokenizer --seed 5", "seed was 0, is 5"),
    "no tokenizer": ("train_ar.py --data data --tokenizer no.pt --out o", "no.pt"),
    "Llama as tokenizer": ("train_ar.py --data data --tokenizer ar/last.pt --out o", "autoregressive"),
    "tokenizer as Llama": ("sample.py --ckpt tokenizer/last.pt", "tokenizer"),
    "truncated checkpoint": ("sample.py --ckpt half.pt", "half.pt"),
    "no such class": ("sample.py --ckpt ar/last.pt --classes 3", "3"),
    "bad guidance": ("sample.py --ckpt ar/last.pt --cfg much", "much"),
    "bad picture name": ("sample.py --ckpt ar/last.pt --out nowhere/x.png", "nowhere"),
    "half precision": ("sample.py --ckpt ar/last.pt --device cpu --dtype float16", "float16"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_line_that_names_it(work, mistake):
    words, named = MISTAKES[mistake]
    (work / "empty").mkdir(exist_ok=True)
    data = (work / "ar" / "last.pt").read_bytes()
    (work / "half.pt").write_bytes(data[: len(data) // 2])
    done = run(*words.split(), cwd=work, code=2)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and named in lines[0], done.stderr

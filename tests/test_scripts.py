"""The scripts, run as a user runs them: pictures from checkpoints, and mistakes."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_lines import ROOT, command, environment, run
from PIL import Image

import dar
import sample


def test_a_llama_checkpoint_needs_nothing_else_to_sample(work, tmp_path):
    ar = dar.load_ar(work / "ar" / "last.pt")
    assert ar.class_names == ["ant", "bee", "cat"] and ar.tokenizer.config.num_tokens == 16
    out, again, bundle = (tmp_path / name for name in ("grid.png", "again.png", "bundle.pt"))
    words = ["sample.py", "--ckpt", work / "ar" / "last.pt", "--num", 3, "--batch", 2]
    run(*words, "--classes", "bee", "2", "--out", out)
    assert Image.open(out).size[0] > 2 * 96
    run(*words, "--classes", "1", "cat", "--out", again)
    assert out.read_bytes() == again.read_bytes()
    run("sample.py", "--ckpt", work / "ar" / "last.pt", "--save-bundle", bundle)
    assert torch.equal(dar.load_ar(bundle).output.weight, ar.output.weight)


@pytest.mark.slow
def test_released_files_draw_the_golden_tokens_from_the_command_line(released_dir, golden_ar, tmp_path):
    plain = "--device cpu --dtype float32".split()
    words = f"--ckpt {released_dir}/ar.pt --tokenizer {released_dir}/tokenizer.pt --classes 3 7 --num 2 --top-k 1"
    run("sample.py", *words.split(), "--cfg", 1.1, 4.0, "--seed", 9, *plain, "--out", tmp_path / "x.png")
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
    "no data": ("train_tokenizer.py --out o", "--data"),
    "no steps": ("train_tokenizer.py --data shapes --out o --steps 0", "--steps 0"),
    "odd micro-batch": ("train_tokenizer.py --data shapes --out o --batch 8 --micro-batch 3", "--micro-batch 3"),
    "long guidance": ("train_ar.py --data data --tokenizer tokenizer/last.pt --out o --cfg 1 2 3", "(1.0, 2.0, 3.0)"),
    "no tokenizer": ("train_ar.py --data data --tokenizer no.pt --out o", "no.pt"),
    "Llama as tokenizer": ("train_ar.py --data data --tokenizer ar/last.pt --out o", "expected a tokenizer"),
    "tokenizer as Llama": ("sample.py --ckpt tokenizer/last.pt", "tokenizer"),
    "truncated checkpoint": ("sample.py --ckpt half.pt", "half.pt"),
    "no such class": ("sample.py --ckpt ar/last.pt --classes 3", "3"),
    "bad guidance": ("sample.py --ckpt ar/last.pt --cfg much", "much"),
    "bad picture name": ("sample.py --ckpt ar/last.pt --out nowhere/x.png", "nowhere"),
    "half precision": ("sample.py --ckpt ar/last.pt --device cpu --dtype float16", "float16"),
}


@pytest.fixture(scope="module")
def mistaken(work) -> Path:
    (work / "empty").mkdir()
    data = (work / "ar" / "last.pt").read_bytes()
    (work / "half.pt").write_bytes(data[: len(data) // 2])
    return work


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_line_that_names_it(mistaken, mistake, monkeypatch, capsys, restore_signals):
    (script, *words), named = MISTAKES[mistake][0].split(), MISTAKES[mistake][1]
    threads = torch.get_num_threads()
    monkeypatch.chdir(mistaken)
    monkeypatch.setattr(sys, "argv", [script, *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    torch.set_num_threads(threads)
    lines = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: ") and named in lines[0], lines


@pytest.mark.slow
@pytest.mark.parametrize("mistake", ["no such data", "truncated checkpoint"])
def test_the_shell_sees_the_same_line_and_exit_code(mistaken, mistake):
    words, named = MISTAKES[mistake]
    lines = run(*words.split(), cwd=mistaken, code=2).stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and named in lines[0], lines


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs a shell that can close stderr")
def test_a_closed_stderr_stops_nothing(work, tmp_path):
    words = command("sample.py", "--ckpt", work / "ar" / "last.pt", "--num", 1, "--out", tmp_path / "x.png")
    done = subprocess.run(["sh", "-c", 'exec "$@" 2>&-', "sh", *words], env=environment(), capture_output=True)
    assert done.returncode == 0 and Image.open(tmp_path / "x.png").format == "PNG"


@pytest.mark.slow
def test_without_a_compiler_compiling_ends_in_one_line(work, tmp_path):
    words = "sample.py --ckpt ar/last.pt --num 1 --compile --device cpu --out".split()
    elsewhere = dict(CXX="/nowhere/c++", TORCHINDUCTOR_CACHE_DIR=tmp_path)
    done = run(*words, tmp_path / "x.png", cwd=work, code=2, **elsewhere)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: torch.compile") and "/nowhere/c++" in last and "Traceback" not in done.stderr

"""Chapter 10: pictures, data, randomness that belongs to the sample, averages, and runs that survive."""

import argparse
import csv
import ctypes
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
from torch import nn

import dar

ROOT = Path(dar.__file__).parent


def test_rounding_to_uint8_is_adms():
    x = torch.tensor([-2.0, -1.0, -1 + 1 / 127.5, 0.0, 0.999, 1.0, 2.0])
    expected = [min(max(int(127.5 * v + 128), 0), 255) for v in x.tolist()]
    assert dar.to_uint8(x).tolist() == expected
    everything = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(dar.to_uint8(dar.to_float(everything)), everything)


def test_psnr_is_that_of_8_bit_ranges():
    a = torch.zeros(1, 3, 4, 4)
    assert dar.psnr(a + 0.2, a).item() == pytest.approx(20 * np.log10(2 / 0.2), abs=1e-4)
    assert dar.psnr(a + 7, a + 1).item() == float("inf")  # clamped first


def test_tile_puts_pictures_row_by_row():
    images = torch.stack([torch.full((3, 2, 2), v) for v in (-1.0, 0.0, 1.0)])
    pixels = np.asarray(dar.tile(images, 2, gap=1))
    assert pixels.shape == (7, 7, 3)
    assert pixels[1, 1, 0] == 0 and pixels[1, 4, 0] == 128 and pixels[4, 1, 0] == 255 and pixels[0, 0, 0] == 255


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "I;16", "1", "F"])
def test_every_image_mode_becomes_rgb(tmp_path, mode):
    ramp = np.tile(np.arange(0, 256, 16, dtype=np.uint8), (16, 1))
    if mode == "I;16":
        image = Image.fromarray(ramp.astype(np.uint16) * 257)
    elif mode == "P":
        image = Image.fromarray(np.stack([ramp] * 3, -1)).quantize(16)
    else:
        image = Image.fromarray(ramp).convert(mode, dither=0) if mode == "1" else Image.fromarray(ramp).convert(mode)
    path = tmp_path / ("x.tif" if mode in ("F", "CMYK") else "x.png")
    image.save(path)
    found = np.asarray(dar.load_rgb(path))
    assert found.shape == (16, 16, 3) and found.dtype == np.uint8
    expected = np.where(ramp >= 128, 255, 0) if mode == "1" else ramp
    assert np.abs(found.astype(int) - expected[..., None]).max() <= 8


def test_transparent_pixels_become_white(tmp_path):
    Image.new("RGBA", (4, 4), (10, 20, 30, 0)).save(tmp_path / "x.png")
    assert (np.asarray(dar.load_rgb(tmp_path / "x.png")) == 255).all()


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n broken"])
def test_a_corrupt_image_is_named(tmp_path, content):
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(ValueError, match="bad.png"):
        dar.load_rgb(tmp_path / "bad.png")


def test_center_crop_keeps_the_middle_and_the_aspect():
    wide = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (50, 1, 3)))
    found = np.asarray(dar.center_crop(wide, 50))
    assert found.shape == (50, 50, 3) and (found[0, :, 0] == np.arange(75, 125)).all()
    for size in ((640, 480), (333, 500), (64, 64), (20, 31)):
        assert dar.center_crop(Image.new("RGB", size), 64).size == (64, 64)


def test_shapes_depend_on_their_index_alone():
    first, again, other = (dar.ImageData("shapes", 32) for _ in range(3))
    assert np.array_equal(first.image(11), again.image(11)) and not np.array_equal(first.image(11), other.image(19))
    assert not np.array_equal(first.image(11), dar.ImageData("shapes", 32, held_out=True).image(11))
    assert first.class_names == list(dar.SHAPES) and set(first.labels) == set(range(len(dar.SHAPES)))


def test_a_folder_a_class_gives_sorted_names_and_labels(tmp_path):
    for name in ("zebra", "ant"):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{i}.png")
    data = dar.ImageData(str(tmp_path), 8)
    assert data.class_names == ["ant", "zebra"] and data.labels.tolist() == [0, 0, 1, 1]


def test_missing_empty_and_flat_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        dar.ImageData(str(tmp_path / "nowhere"), 8)
    with pytest.raises(ValueError, match="no images"):
        dar.ImageData(str(tmp_path), 8)
    Image.new("RGB", (8, 8)).save(tmp_path / "flat.png")
    with pytest.raises(ValueError, match="sub-folder"):
        dar.ImageData(str(tmp_path), 8)


def test_every_epoch_visits_every_image_once_in_another_order():
    epochs = [[dar.data_index(p, 50, seed=3) for p in range(e * 50, e * 50 + 50)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(50)) and epochs[0] != epochs[1]
    assert epochs[0] != [dar.data_index(p, 50, seed=4) for p in range(50)]


def test_ema_follows_its_formula_for_100_steps():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    ema, expected = dar.EMA(model), model.weight.detach().double()
    for i in range(100):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        ema.update(model)
        decay = min(0.999, (1 + i) / (10 + i))
        expected = decay * expected + (1 - decay) * model.weight.detach().double()
    assert torch.allclose(ema.model.weight.double(), expected, atol=1e-5)
    assert not ema.model.training and not ema.model.weight.requires_grad


def small_run(folder, seed=0, model=None, **settings):
    """A run on a small Linear that is trained to give zero."""
    parser = argparse.ArgumentParser()
    dar.add_training_arguments(parser, ["tiny"])
    words = f"--data shapes --out {folder} --steps 4 --batch 2 --lr 0.1 --seed {seed} --save-every 2 --log-every 1"
    args = parser.parse_args([*words.split(), "--device", "cpu", "--precision", "float32"])
    torch.manual_seed(5)
    model = model or nn.Linear(3, 2)
    optimizer, processes = torch.optim.Adam(model.parameters(), 0.1), dar.Processes(torch.device("cpu"))
    return dar.TrainingRun(args, processes, model, dar.EMA(model), optimizer, settings, ["square"], [])


def take_steps(run) -> None:
    for step in run.steps():
        x = torch.full((2, 3), 1.0 + step)
        run.optimise(lambda chunk: {"square": run.parallel(chunk).square().mean()}, [x], 0.1)
        row = run.row()
        run.log(row)


@pytest.fixture
def trained(tmp_path, restore_signals, monkeypatch):
    """A finished run of 4 steps, saved at 2 and 4. (A Linear is no model of ours: saved by what it has in common.)"""
    config = dar.ARConfig(64, 0)
    monkeypatch.setattr(nn.Linear, "config", config, raising=False)
    monkeypatch.setattr(nn.Linear, "tokenizer", None, raising=False)
    monkeypatch.setattr(nn.Linear, "class_names", None, raising=False)
    run = small_run(tmp_path / "run")
    take_steps(run)
    return run


def steps_in_log(run) -> list[str]:
    with open(run.folder / "log.csv", newline="") as file:
        return [row["step"] for row in csv.DictReader(file)]


def test_a_run_restores_weights_average_and_optimizer_bit_for_bit(trained):
    again = small_run(trained.folder)
    assert again.step == 4 and again.ema.updates == trained.ema.updates == 4
    for a, b in ((trained.model, again.model), (trained.ema.model, again.ema.model)):
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    states = zip(trained.optimizer.state.values(), again.optimizer.state.values())
    assert all(torch.equal(a[k], b[k]) for a, b in states for k in ("exp_avg", "exp_avg_sq", "step"))


def test_a_truncated_last_checkpoint_falls_back_to_the_one_before(trained):
    data = (trained.folder / "last.pt").read_bytes()
    (trained.folder / "last.pt").write_bytes(data[: len(data) // 2])
    run = small_run(trained.folder)
    assert run.step == 2 and steps_in_log(run) == ["1", "2"]  # cut back: 3 and 4 will happen again
    take_steps(run)
    assert steps_in_log(run) == ["1", "2", "3", "4"]
    assert torch.equal(run.model.weight, trained.model.weight)


def test_a_run_with_other_settings_is_refused_naming_the_difference(trained):
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        small_run(trained.folder, seed=1)
    with pytest.raises(ValueError, match="model width was None, is 64"):
        small_run(trained.folder, **{"model width": 64})


def test_left_overs_of_a_killed_save_are_removed(trained):
    (trained.folder / "new.pt.123.tmp").write_bytes(b"half")
    small_run(trained.folder)
    assert not list(trained.folder.glob("*.tmp"))


def test_gradients_are_clipped_to_the_norm(trained):
    seen = []
    run = small_run(trained.folder / "clipped")
    run.optimizer.step = lambda: seen.append(run.model.weight.grad.norm().hypot(run.model.bias.grad.norm()).item())
    run.optimise(lambda _: {"square": 1e4 * run.parallel(torch.ones(2, 3)).square().mean()}, [0], 0.1)
    run.optimise(lambda _: {"square": 1e-4 * run.parallel(torch.ones(2, 3)).square().mean()}, [0], 0.1)
    assert seen[0] == pytest.approx(1, abs=1e-4) and 0 < seen[1] < 1e-3


def test_a_signal_ends_the_steps_and_a_second_ctrl_c_does_not_wait(trained):
    run = small_run(trained.folder / "other")
    for step in run.steps():
        os.kill(os.getpid(), signal.SIGINT)
        run.optimise(lambda _: {"square": run.parallel(torch.ones(2, 3)).square().mean()}, [0], 0.1)
        assert step == 0
    assert run.exit_code == 128 + signal.SIGINT and small_run(run.folder).step == 1
    run.received = signal.SIGINT
    signal.signal(signal.SIGINT, run._remember_signal)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "x.bin"
    dar.write_atomically(path, lambda file: file.write(b"old"))

    def full_disk(file):
        file.write(b"half")
        raise RuntimeError("no space left")

    with pytest.raises(OSError, match="x.bin"):
        dar.write_atomically(path, full_disk)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["x.bin"]


@pytest.mark.parametrize(
    "body, code, words",
    [
        ("raise ValueError('x = 3\\nis odd')", 2, "error: x = 3 is odd"),
        ("raise FileNotFoundError('a: no such file')", 2, "error: a: no such file"),
        ("raise KeyboardInterrupt", 130, "stopped"),
        ("raise FloatingPointError('step 3: not finite')", 3, "error: step 3: not finite"),
        ("return 143", 143, ""),
        ("return None", 0, ""),
    ],
)
def test_mistakes_end_in_one_line_and_an_exit_code(body, code, words):
    program = f"import dar\ndef main():\n    {body}\ndar.command_line(main)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code and done.stderr.strip() == words


def test_a_device_that_is_not_there_is_refused():
    assert dar.pick_device("cpu").type == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="cuda"):
            dar.pick_device("cuda")


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="about the malloc of Linux's glibc"
)
def test_freed_memory_is_kept():
    """Counts the pages that the system hands out while 64 MB are taken and freed twenty times."""
    program = (
        "import resource, torch, dar\n"
        "pages = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "def main():\n"
        "    for i in range(40):\n"
        "        before = pages() if i == 20 else i and before\n"
        "        torch.ones(2**24)\n"
        "    print(pages() - before)\n"
        "{}"
    )
    found = []
    for start in ("main()", "dar.keep_freed_memory(); main()"):
        command = [sys.executable, "-c", program.format(start)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        found.append(int(done.stdout))
    plain, kept = found
    assert kept < 1000 and kept < plain / 10

"""Chapter 10: pictures, data, randomness that belongs to the sample, averages, and runs that survive."""

import csv
import os
import signal
import subprocess
import sys
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
    assert data.class_names == ["ant", "zebra"] and data.labels == [0, 0, 1, 1]


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


def small_run(folder, **changes):
    settings = {"model width": 1, "seed": 0} | changes
    return dar.TrainingRun(folder, settings, ["step", "loss"])


@pytest.fixture
def restore_signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def trained(tmp_path, small_tokenizer, restore_signals):
    """A folder with a run of 4 steps, saved at 2 and 4: (folder, tokenizer, ema, optimizer)."""
    model = dar.copy.deepcopy(small_tokenizer)
    ema, optimizer = dar.EMA(model), torch.optim.Adam(model.parameters(), 1e-3)
    run = small_run(tmp_path / "run")
    for step in range(1, 5):
        sum(p.square().sum() for p in model.parameters()).backward()
        optimizer.step()
        ema.update(model)
        run.log({"step": step, "loss": 0.5})
        if step % 2 == 0:
            run.save(step, model, ema, optimizer)
    return tmp_path / "run", model, ema, optimizer


def test_a_run_restores_weights_average_and_optimizer_bit_for_bit(trained, small_tokenizer):
    folder, model, ema, optimizer = trained
    run = small_run(folder)
    assert run.step == 4
    again = dar.copy.deepcopy(small_tokenizer)
    again_ema, again_optimizer = dar.EMA(again), torch.optim.Adam(again.parameters(), 1e-3)
    run.restore(again, again_ema, again_optimizer)
    for a, b in zip(
        (*model.parameters(), *ema.model.parameters()), (*again.parameters(), *again_ema.model.parameters())
    ):
        assert torch.equal(a, b)
    assert again_ema.updates == ema.updates == 4
    states = zip(optimizer.state.values(), again_optimizer.state.values())
    assert all(torch.equal(a[k], b[k]) for a, b in states for k in ("exp_avg", "exp_avg_sq", "step"))


def test_a_truncated_last_checkpoint_falls_back_to_the_one_before(trained):
    folder = trained[0]
    data = (folder / "last.pt").read_bytes()
    (folder / "last.pt").write_bytes(data[: len(data) // 2])
    run = small_run(folder)
    assert run.step == 2
    with open(folder / "log.csv", newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2"]  # cut back: 3 and 4 will happen again


def test_a_run_with_other_settings_is_refused_naming_the_difference(trained):
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        small_run(trained[0], seed=1)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "x.bin"
    dar.write_atomically(path, lambda file: file.write(b"old"))

    def full_disk(file):
        file.write(b"half")
        raise RuntimeError("no space left")

    with pytest.raises(OSError, match="x.bin"):
        dar.write_atomically(path, full_disk)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["x.bin"]


def test_a_signal_asks_the_run_to_stop(tmp_path, restore_signals):
    run = small_run(tmp_path)
    assert not run.stopping(torch.device("cpu"))
    os.kill(os.getpid(), signal.SIGTERM)
    assert run.stopping(torch.device("cpu")) and run.signal == signal.SIGTERM


@pytest.mark.parametrize(
    "body, code, words",
    [
        ("raise ValueError('x = 3\\nis odd')", 2, "error: x = 3 is odd"),
        ("raise FileNotFoundError('a: no such file')", 2, "error: a: no such file"),
        ("raise KeyboardInterrupt", 130, "stopped"),
        ("return 3", 3, ""),
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

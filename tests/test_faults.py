"""What users of such programs report, and its kind: odd files, odd names, odd terminals, odd arguments."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dar

ROOT = Path(dar.__file__).parent


def pictures(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(folder / name)


# Pixels


BAD_PIXELS = {
    "uint8": lambda images: dar.to_uint8(images),
    "bool": lambda images: images > 0,
    "0 to 255": lambda images: dar.to_uint8(images).float(),
    "NaN": lambda images: images.index_fill(2, torch.tensor(3), torch.nan),
    "infinite": lambda images: images / 0,
}


@pytest.mark.parametrize("bad", BAD_PIXELS)
def test_pixels_that_are_no_floats_around_1_are_refused(small_tokenizer, bad):
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with pytest.raises(ValueError, match=r"images: torch.\w+ up to .*, expected floats in \[-1, 1\]"):
        small_tokenizer.encode(BAD_PIXELS[bad](images))


def test_what_decode_returns_can_be_encoded_and_training_looks_at_no_value(small_tokenizer):
    images = 1.9 * (torch.rand(2, 3, 32, 32) * 2 - 1)
    assert small_tokenizer.encode(images).shape == (2, 32) and small_tokenizer.encode(images[:0]).shape == (0, 32)
    assert small_tokenizer.encode(images.double()).shape == small_tokenizer.encode(images.bfloat16()).shape == (2, 32)
    looks = []
    with pytest.MonkeyPatch.context() as patch:
        real = torch.Tensor.item
        patch.setattr(torch.Tensor, "item", lambda tensor: looks.append(1) or real(tensor))
        small_tokenizer(images)
        with torch.autocast("cpu", torch.bfloat16):
            small_tokenizer.encoder(images)
        assert not looks
        small_tokenizer.encode(images)
    assert looks


@pytest.mark.parametrize(
    "values, refused",
    [
        ((0, 1.2), False),  # sharpened a little too much
        ((-0.1, 1), False),
        ((0, 300), False),
        ((-1, 1), True),
        ((-128, 127), True),
        ((0, np.nan), True),
        ((0, np.inf), True),
        ((-np.inf, 1), True),
        ((-1, -1), True),
    ],
)
def test_greys_of_an_unknown_range_are_refused_not_black(tmp_path, values, refused):
    ramp = np.linspace(*values, 16).astype(np.float32) if np.isfinite(values).all() else np.repeat(values, 8)
    Image.fromarray(np.tile(ramp.astype(np.float32), (16, 1))).save(tmp_path / "x.tif")
    if refused:
        with pytest.raises(ValueError, match="x.tif: not a readable image .*pixels from"):
            dar.load_rgb(tmp_path / "x.tif")
    else:
        found = np.asarray(dar.load_rgb(tmp_path / "x.tif"))
        assert found[0, 0, 0] == 0 and found[0, -1, 0] == 255 and 60 < found.mean() < 200


# Folders


@pytest.mark.parametrize("name", ["a/x.png", "a/x", "x.txt"])
@pytest.mark.parametrize("target", ["nowhere", "itself"])
def test_a_link_to_nothing_is_named(tmp_path, name, target):
    pictures(tmp_path, "a/1.png")
    (tmp_path / name).symlink_to(tmp_path / (name if target == "itself" else "nowhere"))
    with pytest.raises(OSError, match=name):
        dar.list_images(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_what_is_no_file_is_no_image(tmp_path, monkeypatch):
    """Reading a pipe would wait for ever."""
    pictures(tmp_path, "a/1.png")
    os.mkfifo(tmp_path / "a" / "pipe.png")
    (tmp_path / "a" / "device.png").symlink_to(os.devnull)
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("a/socket.png")
        assert dar.list_images(tmp_path) == ["a/1.png"]


def test_a_file_in_a_folders_place_is_named(tmp_path):
    pictures(tmp_path, "1.png")
    with pytest.raises(NotADirectoryError, match="1.png"):
        dar.list_images(tmp_path / "1.png")


def test_folders_may_be_deeper_than_python_recurses(tmp_path):
    deep = Path(*["x"] * 300)
    pictures(tmp_path, str(deep / "1.png"))
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(250)
    try:
        found = dar.list_images(tmp_path)
    finally:
        sys.setrecursionlimit(limit)
    assert found == [(deep / "1.png").as_posix()]


# Terminals and environments


def python(program: str, **environment) -> subprocess.CompletedProcess:
    more = os.environ | environment
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=more, capture_output=True)


@pytest.mark.parametrize("name, encoding", [("é.png", "ascii"), ("\\udcff.png", "utf-8")])
def test_a_name_that_a_terminal_cannot_show_stops_nothing(name, encoding):
    done = python(f"import dar\ndar.command_line(lambda: print('wrote {name}'))", PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and done.stdout.startswith(b"wrote ") and done.stdout.endswith(b".png\n"), done.stderr


@pytest.mark.parametrize("world", ["abc", "", "0", "-3", "2"])
def test_a_world_size_that_torchrun_did_not_set_is_named(monkeypatch, world):
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="WORLD_SIZE"):
        dar.Processes.start(torch.device("cpu"))

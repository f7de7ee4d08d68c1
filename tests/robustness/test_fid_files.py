"""fid.py and files that are damaged, strange, or not there: one error that names the file, before
the network has looked at an image."""

import os
import sys
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import synthetic
import torch
from PIL import Image

import fid


@pytest.fixture(scope="module")
def state_dict():
    golden = synthetic.load_golden("inception_small.npz")
    return synthetic.synthetic_state_dict(golden, "inception")


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (11, 16, 16, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path, images):
    """A folder a/ of 11 small pictures."""
    (tmp_path / "a").mkdir()
    for i, pixels in enumerate(images):
        Image.fromarray(pixels).save(tmp_path / "a" / f"{i:02d}.png")
    return tmp_path / "a"


@pytest.fixture
def main(monkeypatch):
    """A function that runs fid.py with arguments."""

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["fid.py", *map(str, arguments), "--device", "cpu"])
        fid.main()

    return main


# Archives that are as they should be


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_batches_may_skip_ahead_and_return(tmp_path, images, save):
    save(tmp_path / "a.npz", arr_0=images, arr_1=np.arange(11))
    archive = fid.open_images(tmp_path / "a.npz")
    for start, stop in ((0, 4), (8, 11), (2, 3)):
        batch = archive.read(start, stop).permute(0, 2, 3, 1)
        assert np.array_equal(batch, images[start:stop])


def test_archive_may_exceed_the_memory(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, arr_0=np.zeros((10_000, 64, 64, 3), np.uint8))  # 123 MB
    tracemalloc.start()
    archive = fid.open_images(path)
    for start in range(8000, 10_000, 100):
        archive.read(start, start + 100)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6


# Archives that are not


BAD_ARRAYS = {
    "float": (dict(arr_0=np.zeros((8, 16, 16, 3))), "float64.*uint8"),
    "objects": (dict(arr_0=np.array([None, 1])), "object.*uint8"),
    "channels first": (dict(arr_0=np.zeros((8, 3, 16, 16), np.uint8)), r"\(8, 3, 16, 16\)"),
    "Fortran order": (dict(arr_0=np.zeros((8, 16, 16, 3), np.uint8, "F")), "Fortran"),
    "no images": (dict(arr_0=np.zeros((0, 16, 16, 3), np.uint8)), r"\(0, 16, 16, 3\)"),
    "one image": (dict(arr_0=np.zeros((1, 16, 16, 3), np.uint8)), "1 image"),
    "another name": (dict(images=np.zeros((8, 16, 16, 3), np.uint8)), "arr_0.*images"),
    "nothing": ({}, "arr_0"),
    "mu alone": (dict(mu=np.zeros(2048)), "sigma"),
    "other features": (dict(mu=np.zeros(64), sigma=np.eye(64)), r"\(64, 64\).*\(2048, 2048\)"),
    "NaN": (dict(mu=np.full(2048, np.nan), sigma=np.eye(2048)), "finite"),
    "words": (dict(mu=np.full(2048, "x"), sigma=np.eye(2048)), "finite"),
    "an object": (dict(mu=np.array([None]), sigma=np.eye(2048)), "allow_pickle"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_other_arrays_are_refused(tmp_path, case):
    arrays, message = BAD_ARRAYS[case]
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=f"bad.npz.*{message}"):
        fid.open_images(tmp_path / "bad.npz")


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_the_pixels(path):
    """Writes an archive that is sound, with an array that says it has more than it has."""
    array = path.with_name("arr_0.npy")
    np.save(array, np.zeros((8, 16, 16, 3), np.uint8))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", array.read_bytes()[:-100])


DAMAGE = {
    "a flipped bit": (flip_a_bit, "checksum of arr_0.npy|invalid"),
    "half a file": (lambda path: os.truncate(path, 3000), "not a zip file"),
    "text": (lambda path: path.write_text("no archive"), "not a zip file"),
    "an .npy": (lambda path: np.save(path.open("wb"), np.zeros(8)), "not a zip file"),
    "too few pixels": (cut_the_pixels, "6044 bytes"),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_archive_is_named_at_once(tmp_path, images, save, case):
    damage, message = DAMAGE[case]
    save(tmp_path / "bad.npz", arr_0=images)
    damage(tmp_path / "bad.npz")
    with pytest.raises(ValueError, match=f"bad.npz.*({message})"):
        fid.open_images(tmp_path / "bad.npz")


def test_missing_archive_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.npz"):
        fid.open_images(tmp_path / "missing.npz")


def test_zip_of_pictures_is_refused_in_a_short_line(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for i in range(3000):
            archive.writestr(f"picture-{i:05d}.png", b"")
    with pytest.raises(ValueError, match="picture-00000.png") as error:
        fid.open_images(tmp_path / "a.npz")
    assert len(str(error.value)) < 500


# Folders


def claim_a_huge_size(path):
    """Writes a PNG whose head says 60,000 x 60,000 pixels, which would be 10 GB."""
    Image.new("RGB", (16, 16)).save(path)
    png = bytearray(path.read_bytes())
    png[16:24] = 2 * (60_000).to_bytes(4, "big")
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    path.write_bytes(png)


BAD_PICTURES = {
    "empty": lambda path: path.touch(),
    "text": lambda path: path.write_text("no picture"),
    "half a head": lambda path: path.write_bytes(path.with_name("00.png").read_bytes()[:20]),
    "half a body": lambda path: path.write_bytes(path.with_name("00.png").read_bytes()[:-40]),
    "huge": claim_a_huge_size,
    "another size": lambda path: Image.new("RGB", (20, 16)).save(path),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("bad", BAD_PICTURES)
def test_bad_picture_is_named_at_once(folder, bad):
    BAD_PICTURES[bad](folder / "bad.png")
    with pytest.raises((ValueError, OSError), match="bad.png"):
        fid.open_images(folder)


def test_sets_of_different_size_are_refused(main, folder, tmp_path):
    np.savez(tmp_path / "b.npz", arr_0=np.zeros((4, 20, 20, 3), np.uint8))
    with pytest.raises(ValueError, match=r"16, 16, 3.*b.npz.*20, 20, 3"):
        main(folder, tmp_path / "b.npz")


# Arguments


def test_samples_may_be_missing_only_with_save_stats(main, folder):
    with pytest.raises(ValueError, match="SAMPLES"):
        main(folder)


@pytest.mark.parametrize("name", ["a", "a/00.png", "none/stats.npz"])
def test_statistics_need_a_new_file_in_a_folder(main, folder, tmp_path, name):
    with pytest.raises(ValueError, match=f"--save-stats .*{name}"):
        main(folder, "--save-stats", tmp_path / name, "--weights", "missing.pth")


# Weights


class RunsCode:
    """Unpickled carelessly, it creates the file `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_weights_that_run_code_are_refused(state_dict, tmp_path):
    torch.save({**state_dict, "fc.bias": RunsCode(tmp_path / "ran")}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="weights.pth"):
        fid.load_inception(tmp_path / "weights.pth")
    assert not (tmp_path / "ran").exists()


def test_weights_without_a_layer_are_refused(state_dict, tmp_path):
    torch.save({"fc.bias": state_dict["fc.bias"]}, tmp_path / "weights.pth")
    with pytest.raises(
        ValueError, match="(?s)weights.pth.*Conv2d_1a_3x3.*https://.*--weights FILE"
    ):
        fid.load_inception(tmp_path / "weights.pth")


def test_web_page_is_refused_as_weights(tmp_path):
    (tmp_path / "weights.pth").write_text("<!DOCTYPE html><html>Not found</html>")
    with pytest.raises(ValueError, match="weights.pth"):
        fid.load_inception(tmp_path / "weights.pth")


def test_download_is_verified(state_dict, monkeypatch, capsys):
    options = {}

    def download(url, **arguments):
        options.update(arguments)
        print("Downloading")  # as torch.hub does
        return state_dict

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    fid.load_inception()
    assert options["check_hash"] is True
    assert options["weights_only"] is True
    assert capsys.readouterr().out == ""  # Standard output is for the numbers.


def test_failed_download_says_what_to_do(monkeypatch):
    def fail(url, **arguments):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    with pytest.raises(ValueError, match="no route to host.*https://.*--weights FILE"):
        fid.load_inception()


def test_features_that_are_nan_are_noticed(main, folder, state_dict, tmp_path):
    state = {**state_dict, "Conv2d_1a_3x3.bn.weight": torch.full((32,), torch.nan)}
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(ValueError, match=f"{folder}: features are NaN"):
        main(folder, folder, "--weights", tmp_path / "nan.pth", "--batch-size", 1)

"""common/images.py and what is found on real disks: damaged files, odd formats, links, pipes."""

import os

import numpy as np
import pytest
from PIL import Image

from common import images


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "a" / "1.png"
    path.parent.mkdir()
    Image.new("RGB", (8, 8)).save(path)
    return path


# Files


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n broken"])
def test_damaged_image_is_named(tmp_path, content):
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(ValueError, match="bad.png: not a readable image"):
        images.read_image(tmp_path / "bad.png")


def test_half_an_image_is_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "bad.jpg")
    os.truncate(tmp_path / "bad.jpg", 2000)
    with pytest.raises(ValueError, match="bad.jpg: not a readable image"):
        images.read_image(tmp_path / "bad.jpg")


@pytest.mark.parametrize("error", [TypeError, NotImplementedError, Image.DecompressionBombError])
def test_whatever_stops_a_decoder_the_image_is_named(picture, error, monkeypatch):
    def load(self):
        raise error("odd tag")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    with pytest.raises(ValueError, match="1.png.*odd tag"):
        images.read_image(picture)


def save_lying(path, damage):
    """A picture of 8 x 4 pixels that lies on its side, as damaged EXIF data says."""
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation
    exif[0x010F] = "a camera"
    Image.new("RGB", (8, 4)).save(path, exif=damage(exif.tobytes()))


def break_head(exif):
    assert exif[6:10] == b"MM\0*"
    return exif.replace(b"MM\0*", b"MM\0?")


def break_other_tag(exif):
    words = b"\x01\x0f\0\x02\0\0\0\x09"  # a tag, a type: text of 9 bytes
    assert words in exif
    return exif.replace(words, b"\x01\x0f\0\x05\0\0\0\x01")  # a fraction


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp"])
@pytest.mark.parametrize("damage, size", [(break_head, (8, 4)), (break_other_tag, (4, 8))])
def test_damaged_exif_does_no_harm(tmp_path, name, damage, size):
    """The picture is turned if only the rest of the data is damaged."""
    save_lying(tmp_path / name, damage)
    assert images.read_image(tmp_path / name).size == (8, 4)
    assert images.read_image(tmp_path / name, upright=True).size == size


def test_too_little_memory_is_not_taken_for_damage(picture, monkeypatch):
    def transpose(image, in_place):
        raise MemoryError

    monkeypatch.setattr("PIL.ImageOps.exif_transpose", transpose)
    with pytest.raises(MemoryError):
        images.read_image(picture, upright=True)


@pytest.mark.parametrize("upright", [False, True])
def test_damaged_body_is_named(tmp_path, upright):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "bad.png")
    os.truncate(tmp_path / "bad.png", 2000)
    with pytest.raises(ValueError, match="bad.png: not a readable image"):
        images.read_image(tmp_path / "bad.png", upright)
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    with pytest.raises(ValueError, match="bad.png: not a readable image"):
        images.check_images([tmp_path / "good.png", tmp_path / "bad.png"])


def test_missing_image_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.png"):
        images.read_image(tmp_path / "missing.png")


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_of_unknown_range_are_refused(tmp_path, dtype):
    Image.fromarray(np.ones((8, 8), dtype)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match="x.tif.*unknown range"):
        images.read_image(tmp_path / "x.tif")


@pytest.mark.parametrize("size", [(1, 65000), (65000, 1)])
def test_strip_does_not_become_gigabytes(size):
    strip = Image.new("RGB", size)
    assert sorted(images.shrink(strip, 64).size) == [64, 32 * 64]
    assert images.center_crop(strip, 64).size == (64, 64)


# Folders


def test_links_round_in_a_circle_end(picture):
    folder = picture.parent
    (folder / "self").symlink_to(folder)
    (folder / "up").symlink_to(folder.parent)
    assert images.list_images(folder.parent) == ["a/1.png"]


def test_links_between_two_folders_end(picture, tmp_path):
    other = tmp_path / "b"
    other.mkdir()
    (picture.parent / "other").symlink_to(other)
    (other / "other").symlink_to(picture.parent)
    assert images.list_images(tmp_path) == ["a/1.png", "b/other/1.png"]


@pytest.mark.parametrize("name", ["1.png", "folder"])
@pytest.mark.parametrize("target", ["nowhere", "itself"])
def test_link_to_nothing_is_named(picture, tmp_path, name, target):
    link = tmp_path / name
    link.symlink_to(name if target == "itself" else "nowhere")
    with pytest.raises(OSError, match=name):
        images.list_images(tmp_path)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        images.list_images(tmp_path / "missing")


def test_file_in_the_place_of_a_folder_is_named(picture):
    with pytest.raises(NotADirectoryError, match="1.png"):
        images.list_images(picture)


def test_closed_folder_is_named(picture, tmp_path, monkeypatch):
    scandir = os.scandir

    def refuse(path):  # chmod would not stop root, whom some machines run tests as.
        if str(path).endswith("a"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="a'"):
        images.list_images(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipe_is_no_image(picture):
    """To read it would wait for ever."""
    os.mkfifo(picture.parent / "pipe.png")
    assert images.list_images(picture.parent) == ["1.png"]


def test_files_are_listed_without_a_request_for_each(picture, monkeypatch):
    """On a network disk a request takes a millisecond, and ImageNet has 1,281,167 files."""
    requests = []
    for name in ("stat", "lstat"):
        original = getattr(os, name)

        def count(path, *arguments, original=original, **options):
            requests.append(path)
            return original(path, *arguments, **options)

        monkeypatch.setattr(os, name, count)

    images.list_images(picture.parent)
    with_one_file = len(requests)
    for i in range(2, 20):
        (picture.parent / f"{i}.png").touch()
    requests.clear()
    assert len(images.list_images(picture.parent)) == 19
    assert len(requests) == with_one_file

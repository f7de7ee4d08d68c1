"""common/images.py: how pictures are found, read, cropped and shown."""

import numpy as np
import pytest
import torch
from PIL import Image

from common import images


def save_pictures(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)


# Files


def test_list_is_sorted_with_slashes(tmp_path):
    save_pictures(tmp_path, "c.webp", "a/b/2.jpg", "a/1.PNG")
    (tmp_path / "a" / "notes.txt").touch()
    assert images.list_images(tmp_path) == ["a/1.PNG", "a/b/2.jpg", "c.webp"]


def test_hidden_files_and_folders_are_left_out(tmp_path):
    save_pictures(tmp_path, "a/1.png", "a/._1.png", ".x/1.png", "__MACOSX/a/1.png")
    assert images.list_images(tmp_path) == ["a/1.png"]


def test_links_are_followed(tmp_path):
    save_pictures(tmp_path, "data/a/1.png", "elsewhere/2.png")
    (tmp_path / "data" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "c").symlink_to(tmp_path / "elsewhere")
    assert images.list_images(tmp_path / "data") == ["a/1.png", "b/2.png", "c/2.png"]


def test_list_without_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no images"):
        images.list_images(tmp_path)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "I;16"])
def test_every_mode_is_read_as_rgb(tmp_path, mode):
    greys = np.arange(256, dtype=np.uint8).reshape(16, 16)
    if mode == "I;16":
        image = Image.fromarray(greys.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(greys).convert(mode)
    image.save(tmp_path / "x.tif")
    expected = np.repeat(greys[:, :, None], 3, axis=2)
    assert np.array_equal(images.read_image(tmp_path / "x.tif"), expected)


def test_transparent_pixels_are_white(tmp_path):
    Image.new("RGBA", (4, 4), (10, 20, 30, 0)).save(tmp_path / "x.png")
    assert np.all(np.asarray(images.read_image(tmp_path / "x.png")) == 255)


def test_picture_is_turned_only_if_asked(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "x.jpg", exif=exif)
    assert images.read_image(tmp_path / "x.jpg").size == (8, 4)
    assert images.read_image(tmp_path / "x.jpg", upright=True).size == (4, 8)


def test_whole_images_have_a_size(tmp_path):
    save_pictures(tmp_path, "1.png", "2.png")
    Image.new("RGB", (8, 4)).save(tmp_path / "2.png")
    assert images.check_images([tmp_path / "1.png", tmp_path / "2.png"]) == [(8, 8), (8, 4)]


# Crops


def test_center_crop_keeps_the_middle():
    columns = np.arange(200, dtype=np.uint8)
    wide = Image.fromarray(np.tile(columns[:, None], (50, 1, 3)))
    crop = np.asarray(images.center_crop(wide, 50))
    assert np.array_equal(crop[0, :, 0], columns[75:125])


@pytest.mark.parametrize("size", [(640, 480), (333, 500), (64, 64), (20, 31), (129, 128)])
def test_center_crop_has_the_size(size):
    assert images.center_crop(Image.new("RGB", size), 64).size == (64, 64)


def test_shrinking_averages():
    """ADM halves with a box filter as long as it can; a resize by bicubic alone would not see the
    average of a chequered pattern."""
    pattern = np.indices((64, 64)).sum(0) % 2 * np.uint8(255)
    shrunk = images.shrink(Image.fromarray(pattern.astype(np.uint8)), 16)
    assert set(np.asarray(shrunk).flat) == {128}


def test_center_crops_are_a_batch():
    pictures = [Image.new("RGB", (20, 10), "black"), Image.new("RGB", (10, 30), "white")]
    crops = images.center_crops(pictures, 8)
    assert crops.shape == (2, 3, 8, 8)
    assert crops.dtype == torch.float32
    assert crops[:, 0, 0, 0].tolist() == [-1, 1]


# Pixels


def test_rounding_is_adms():
    x = torch.tensor([-2.0, -1.0, -1 + 1 / 127.5, 0.0, 0.999, 1.0, 2.0])
    assert images.to_uint8(x).tolist() == [0, 0, 1, 128, 255, 255, 255]


def test_bytes_survive_the_way_to_floats_and_back():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(images.to_uint8(images.to_float(values)), values)


def test_psnr_is_that_of_bytes():
    black = torch.full((1, 3, 4, 4), -1.0)
    grey = images.to_float(torch.full((1, 3, 4, 4), 25))
    assert images.psnr(grey, black).item() == pytest.approx(20 * np.log10(255 / 25), abs=1e-4)


def test_psnr_clamps_images():
    white = torch.ones(1, 3, 4, 4)
    assert images.psnr(7 * white, white).item() == float("inf")


def test_tile_fills_rows_and_leaves_the_rest_white():
    colours = torch.tensor([-1.0, 0.0, -1.0]).view(3, 1, 1, 1)
    pixels = np.asarray(images.tile(colours.expand(3, 3, 2, 2), columns=2, gap=1, zoom=1))[:, :, 0]
    assert pixels.tolist() == [
        [255, 255, 255, 255, 255, 255, 255],
        [255, 0, 0, 255, 128, 128, 255],
        [255, 0, 0, 255, 128, 128, 255],
        [255, 255, 255, 255, 255, 255, 255],
        [255, 0, 0, 255, 255, 255, 255],
        [255, 0, 0, 255, 255, 255, 255],
        [255, 255, 255, 255, 255, 255, 255],
    ]


def test_tile_enlarges_without_blur():
    colours = torch.tensor([[-1.0, 0.0]]).expand(1, 3, 1, 2)
    pixels = np.asarray(images.tile(colours, columns=1, gap=0, zoom=2))[:, :, 0]
    assert pixels.tolist() == [[0, 0, 128, 128], [0, 0, 128, 128]]


def test_tile_enlarges_what_is_small():
    assert images.tile(torch.zeros(2, 3, 32, 32), columns=2).size == (2 * 98 + 2, 98 + 2)
    assert images.tile(torch.zeros(2, 3, 256, 256), columns=2).size == (2 * 258 + 2, 258 + 2)


def test_tile_shows_bytes_as_it_shows_floats():
    floats = torch.rand(2, 3, 4, 4) * 2 - 1
    expected = np.asarray(images.tile(floats, columns=2))
    assert np.array_equal(images.tile(images.to_uint8(floats), columns=2), expected)

"""Pictures: listed in folders, read, cropped, and laid out in a grid.

An image is a Pillow image of 8-bit RGB, or a tensor [3, H, W]: uint8, or float in [-1, 1]. Crops
and rounding are those of ADM ("Diffusion Models Beat GANs", Dhariwal and Nichol 2021), which most
papers on ImageNet follow.
"""

import math
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")

# ------------------------------------------------------------------------------------------------
# Files


def list_images(folder: str | Path) -> list[str]:
    """The images below a folder: sorted names relative to it, with "/" between folders. Hidden
    files and folders are left out.

    Raises ValueError if there are none, and OSError if a folder is missing or closed, or if a link
    leads to nothing.
    """
    names = sorted(walk(str(folder)))
    if not names:
        raise ValueError(f"{folder}: holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return names


def walk(folder: str, prefix: str = "", parents: frozenset[str] = frozenset()) -> Iterator[str]:
    """Yields `prefix` + the name of each image below `folder`. `parents` are the real paths of the
    folders that lead here: a link back to one of them would lead round in a circle.
    """
    real_path = os.path.realpath(folder)
    if real_path in parents:
        return

    # A directory's entries know whether they are folders. To ask the file system about each of a
    # million files would take minutes on a network disk.
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith((".", "__MACOSX")):
                continue
            if entry.is_dir():
                yield from walk(entry.path, f"{prefix}{entry.name}/", parents | {real_path})
            elif entry.is_file():
                if entry.name.lower().endswith(IMAGE_SUFFIXES):
                    yield prefix + entry.name
            elif entry.is_symlink():
                raise FileNotFoundError(f"{entry.path}: a link to nothing")


def read_image(path: str | Path, upright: bool = False) -> Image.Image:
    """An image file as 8-bit RGB, transparency on white. upright: turned as its EXIF data says, if
    that can be read; ADM does not turn. Raises ValueError or OSError, which name the file.
    """
    with open(path, "rb") as file:
        try:
            image = Image.open(file)
            image.load()
            if upright:
                turn_upright(image)
            return to_rgb(image)
        except MemoryError:  # which says nothing of the file
            raise
        except Exception as error:  # A damaged file makes decoders fail in every way there is.
            raise ValueError(f"{path}: not a readable image ({error})") from error


def turn_upright(image: Image.Image) -> None:
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # Damaged EXIF data, which fails in as many ways, and no harm to the pixels.
        pass


def check_images(paths: list[Path]) -> list[tuple[int, int]]:
    """Decodes all images, for damage often lies behind the head; returns their (width, height).
    Raises ValueError or OSError, which name the file.
    """
    with ThreadPoolExecutor() as threads:
        sizes = threads.map(lambda path: read_image(path).size, paths)
        return list(tqdm(sizes, desc="checking", total=len(paths), unit="image", delay=1))


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # convert() would clip 16-bit greys at 255.
        greys = np.asarray(image) / 257
        image = Image.fromarray(greys.astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels of unknown range; save it with 8 bits a channel")
    if "A" in image.getbands() or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


# ------------------------------------------------------------------------------------------------
# Crops


def shrink(image: Image.Image, size: int) -> Image.Image:
    """ADM's resize of the short side to `size`: BOX halves it while it is at least twice as long,
    then BICUBIC.
    """
    longest = 32 * min(image.size)
    if max(image.size) > longest:
        # Only the middle of such a strip: 65,000 x 1 pixels would become gigabytes.
        middle = (min(image.width, longest), min(image.height, longest))
        image = ImageOps.fit(image, middle)

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    width = round(image.width * scale)
    height = round(image.height * scale)
    return image.resize((width, height), Image.BICUBIC)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop: the middle square of the image whose short side has become `size`."""
    image = shrink(image, size)
    left = (image.width - size) // 2
    top = (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def center_crops(images: Iterable[Image.Image], size: int) -> Tensor:
    """The centre crops of images: float32 [n, 3, size, size] in [-1, 1]."""
    crops = np.stack([np.asarray(center_crop(image, size)) for image in images])
    return to_float(torch.from_numpy(crops).permute(0, 3, 1, 2))


# ------------------------------------------------------------------------------------------------
# Pixels


def to_uint8(images: Tensor) -> Tensor:
    """Floats in [-1, 1] -> uint8 as ADM rounds: 127.5 x + 128, clamped to 0 ... 255, truncated."""
    return (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)


def to_float(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]: u / 127.5 - 1."""
    return images.float() / 127.5 - 1


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, in dB: float [B, 3, H, W] twice -> [B].

    The references are in [-1, 1]; the images are clamped to it.
    """
    error = (images.clamp(-1, 1) - references) / 2
    return -10 * error.square().flatten(1).mean(1).log10()


def tile(images: Tensor, columns: int, gap: int = 2, zoom: int | None = None) -> Image.Image:
    """Images [n, 3, H, W], uint8 or float in [-1, 1] -> one picture, row by row, on white that
    shows for `gap` pixels around each. The last row need not be full. A pixel becomes zoom x zoom;
    by default, images of fewer than 96 pixels are enlarged to about that, or screens would blur
    them.
    """
    if images.dtype == torch.uint8:
        images = to_float(images)
    if zoom is None:
        zoom = max(1, 96 // images.shape[3])
    images = images.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    height, width = images.shape[2:]
    rows = math.ceil(len(images) / columns)
    canvas_height = rows * (height + gap) + gap
    canvas_width = columns * (width + gap) + gap
    canvas = torch.ones(3, canvas_height, canvas_width)

    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        top = gap + row * (height + gap)
        left = gap + column * (width + gap)
        canvas[:, top : top + height, left : left + width] = image

    return Image.fromarray(to_uint8(canvas).permute(1, 2, 0).numpy())

"""Fetches CIFAR-10 and unpacks it: cifar10/train/cat/0000.png and so on, 50,000 and 10,000 images.

    python experiments/cifar10.py
    python experiments/cifar10.py --archive cifar-10-binary.tar.gz  # a local file, or a URL

It fetches the binary archive (170 MB), whose records are a byte for the class and 3072 for the
pixels: the better known python archive holds pickles, which could run code. A download that was
interrupted goes on with the same command. The folder appears under its name when all is there.
"""

import argparse
import hashlib
import http.client
import shutil
import tarfile
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from common.cli import command_line

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
FILES = {
    "train": [f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6)],
    "test": ["cifar-10-batches-bin/test_batch.bin"],
}
SIZE = 32  # pixels a side
RECORD = 1 + 3 * SIZE**2  # bytes: the class, then all reds, all greens, all blues
BLOCK = 2**16  # bytes that are read at once


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--archive", default=URL, help=f"a file, or a URL (default: {URL})")
    add("--md5", default=MD5, help="what the archive's MD5 must be (default: the authors')")
    add("--out", type=Path, default=Path("cifar10"), help="the folder (default: cifar10)")
    return parser.parse_args()


def download(url: str, path: Path) -> None:
    """Fetches url to path. What is there already of PATH.part is not fetched again, if the server
    can begin in the middle. Raises OSError."""
    part = path.with_name(path.name + ".part")
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            if response.status != 206:  # 206: the server begins in the middle, as it was asked to
                start = 0
            length = response.headers["Content-Length"]
            total = start + int(length) if length else None
            with open(part, "ab" if start else "wb") as file:
                with tqdm(
                    total=total, initial=start, unit="B", unit_scale=True, desc="fetching"
                ) as bar:
                    while block := response.read(BLOCK):
                        file.write(block)
                        bar.update(len(block))
                received = file.tell()
    except (OSError, http.client.HTTPException) as error:
        if getattr(error, "code", None) != 416:
            raise OSError(f"{url}: {error}; what has come is kept, run it again") from None
        # 416: nothing comes after the part, so it is all there. The checksum will tell.
    else:
        if total is not None and received < total:
            raise OSError(f"{url}: ended after {received} of {total} bytes; run it again")
    part.replace(path)


def check_md5(path: Path, expected: str) -> None:
    digest = hashlib.md5()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    if digest.hexdigest() != expected.lower():
        raise ValueError(
            f"{path}: damaged, or another file: MD5 {digest.hexdigest()}, not {expected}"
        )


def read_records(archive: tarfile.TarFile, name: str) -> Iterator[tuple[int, Image.Image]]:
    """(class, image) of each record of a file in the archive."""
    data = archive.extractfile(name).read()
    for start in range(0, len(data), RECORD):
        record = data[start : start + RECORD]
        planes = [record[1 + i * SIZE**2 :][: SIZE**2] for i in range(3)]
        channels = [Image.frombytes("L", (SIZE, SIZE), plane) for plane in planes]
        yield record[0], Image.merge("RGB", channels)


def unpack(path: Path, out: Path) -> None:
    """Writes the archive's images to OUT.part, which at the end becomes out."""
    part = out.with_name(out.name + ".part")
    if part.exists():  # of a run that was stopped
        shutil.rmtree(part)
    with tarfile.open(path) as archive:
        for split, names in FILES.items():
            counts = [0] * len(CLASSES)
            for name in CLASSES:
                (part / split / name).mkdir(parents=True)
            for name in tqdm(names, desc=f"unpacking {split}", unit="file"):
                for label, image in read_records(archive, name):
                    image.save(part / split / CLASSES[label] / f"{counts[label]:04d}.png")
                    counts[label] += 1
    part.replace(out)


def main() -> None:
    args = parse_arguments()
    if args.out.exists():
        raise ValueError(f"{args.out}: exists already; remove it or choose another --out")
    path = Path(args.archive)
    is_url = args.archive.startswith(("http://", "https://"))
    if is_url:
        path = args.out.with_name(args.out.name + ".tar.gz")
        if not path.exists():
            download(args.archive, path)
    try:
        check_md5(path, args.md5)
    except ValueError:
        if is_url:
            path.unlink()  # or the same command would find it again
        raise
    try:
        unpack(path, args.out)
    except (tarfile.TarError, zlib.error, EOFError, LookupError, ValueError) as error:
        raise ValueError(f"{path}: not CIFAR-10's binary archive ({error})") from None
    if is_url:
        path.unlink()
    print(f"wrote {args.out}/train, {args.out}/test")


if __name__ == "__main__":
    command_line(main)

"""Draws pictures: the Llama writes tokens, and every finished group of them takes a denoising step at once.

The small model that ships here: python sample.py
Some classes, and how they come: python sample.py --classes dog ship 7 --cfg 1.1 6 --seed 100 --trajectory --gif
Another picture's layout:        python sample.py --prefix-image photo.jpg --classes dog ship truck --out layout.png
A set for FID, on eight GPUs:    torchrun --nproc_per_node=8 -- sample.py --num 50000 --balanced --npz set.npz
Reconstructions for rFID:        python sample.py --reconstruct photos/ --npz ours.npz --reference-npz theirs.npz
The authors' released weights:   python sample.py --ckpt D-AR-XL-360K.pt --tokenizer D-AR-tokenizer_v1.pt --cfg 1.1 10
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

import dar

SHIPPED = Path(__file__).resolve().parent / "checkpoints" / "cifar10.pt"
LONGEST = {".jpg": 65_500, ".jpeg": 65_500, ".webp": 16_383, ".gif": 65_535}  # side that a format allows, in pixels
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", default=str(SHIPPED), help="Llama checkpoint, ours or a released one (default: the CIFAR-10 model)")
    add("--tokenizer", type=Path, metavar="FILE", help="tokenizer checkpoint, where the Llama's file carries none")
    add("--classes", nargs="+", help="class names or numbers (default: all)")
    add("--num", type=int, help="how many pictures, their classes in turn (default: 16)")
    add("--cfg", nargs="+", default=["4"], help="guidance: a number, start and end, or none (default: 4)")
    add("--seed", type=int, default=0, help="of the first picture; the next ones count up (default: 0)")
    add("--tokens", type=int, metavar="N", help="draw only the first N tokens and show the preview (Table 5)")
    add("--steps", type=int, help="denoising steps (default: the tokenizer's, one for each group)")
    add("--solver", default="ab2", choices=["ab2", "euler"])
    add("--temperature", type=float, default=1.0)
    add("--top-k", type=int, default=0, help="draw from the k likeliest tokens (default: 0, all)")
    add("--top-p", type=float, default=1.0, help="draw from the likeliest tokens of this mass (default: 1, all)")
    add("--batch", type=int, default=16, help="pictures drawn at once, in each process (default: 16)")
    add("--dtype", default="auto", choices=["auto", *DTYPES], help="of the weights; auto: bfloat16 where it is fast")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    add("--compile", action="store_true", help="for many pictures on a GPU: torch.compile, CUDA graphs; takes a minute")
    add("--threads", type=int, help="of the CPU, in each process (default: 1 for sets; else OMP_NUM_THREADS, or all)")
    add("--save-bundle", type=Path, metavar="FILE", help="write model and tokenizer into one .pt, in --dtype, and stop")
    add = parser.add_argument_group("pictures").add_argument
    add("--out", type=Path, default=Path("samples.png"), help="the labelled grid (default: samples.png)")
    some = dict(type=Path, nargs="?", const="", metavar="FILE")
    add("--trajectory", **some, help="a row a picture, a column a group's preview, the result last (default: --out)")
    add("--gif", **some, help="the same as an animation (default: --out with the ending .gif)")
    about = "keep the first tokens of a picture: a row for each number of them, a column for each class"
    add = parser.add_argument_group("layout control, Fig. 6 and 12", about).add_argument
    add("--prefix-image", type=Path, metavar="FILE", help="the picture, any image file")
    add("--prefix-class", metavar="CLASS", help="or one that is drawn: its class ...")
    add("--prefix-seed", type=int, metavar="SEED", help="... and seed")
    add("--prefix-tokens", type=int, nargs="+", metavar="N", help="how many (default: 1/8, 1/4, 3/8, 1/2 of all)")
    about = "the same bytes for any number of processes (torchrun); the same command continues a stopped set"
    add = parser.add_argument_group("sets of pictures", about).add_argument
    add("--npz", type=Path, metavar="FILE", help="pictures as uint8 [num, H, W, 3] in arr_0, class numbers in arr_1")
    add("--folder", type=Path, metavar="DIR", help="or as NUMBER-CLASS.png in a new folder")
    add("--balanced", action="store_true", help="classes in turn, not at random")
    add("--reconstruct", type=Path, metavar="DIR", help="encode and decode the images below DIR into --npz instead")
    add("--reference-npz", type=Path, metavar="FILE", help="those images as they were encoded, cropped as ADM does")
    return parser.parse_args()


def check_arguments(args: argparse.Namespace) -> None:
    """Brings the arguments into their final form; ValueError naming what can be seen to be wrong before loading."""
    try:
        numbers = [None] if args.cfg == ["none"] else [float(word) for word in args.cfg]
        args.cfg = numbers[0] if len(numbers) == 1 else numbers
        dar.guidance_schedule(args.cfg, 1)
    except ValueError:
        raise ValueError(f"--cfg {args.cfg}: expected a number, start and end, or none") from None
    for name in ("num", "batch", "threads", "steps", "tokens"):
        value, most = getattr(args, name), 1024 if name == "threads" else math.inf  # too many threads crash torch
        dar.require(value is None or 1 <= value <= most, f"--{name} {value}: expected 1 ... {most}")
    for option, seed, count in ("seed", args.seed, args.num or 16), ("prefix-seed", args.prefix_seed or 0, 1):
        dar.require(0 <= seed <= 2**31 - count, f"--{option} {seed}: expected {count} seeds from 0 to below {2**31}")
    args.trajectory = args.out if args.trajectory == Path() else args.trajectory
    args.gif = args.out.with_suffix(".gif") if args.gif == Path() else args.gif
    drawn = [args.prefix_class is not None, args.prefix_seed is not None]
    args.layout = bool(args.prefix_image or any(drawn) or args.prefix_tokens)
    if args.layout and [bool(args.prefix_image), *drawn] not in ([True, False, False], [False, True, True]):
        raise ValueError("which picture's layout? give --prefix-image, or --prefix-class and --prefix-seed")
    a_set, pictures = args.npz or args.folder, args.layout or args.trajectory or args.gif
    if args.npz and args.folder or a_set and pictures:
        raise ValueError("--npz, --folder, and pictures (--trajectory, --gif, --prefix-...): choose one")
    three = args.reconstruct, args.npz, args.reference_npz
    if (args.reconstruct or args.reference_npz) and (not all(three) or len(set(map(os.path.realpath, three))) < 3):
        raise ValueError("--reconstruct DIR, --npz FILE and --reference-npz FILE go together")
    files = {args.out: dar.IMAGE_SUFFIXES, args.trajectory: dar.IMAGE_SUFFIXES, args.gif: {".gif", ".png", ".webp"}}
    files = {args.npz: {".npz"}, args.reference_npz: {".npz"}} if a_set else files
    files = {args.save_bundle: {".pt"}} if args.save_bundle else files
    for file, endings in files.items():
        if file and (not file.name or file.is_dir() or file.suffix.lower() not in endings):
            raise ValueError(f"{file}: expected a file's name, ending in {' '.join(sorted(endings))}")
    if args.folder and (not args.folder.name or args.folder.is_file() or args.folder.suffix.lower() == ".npz"):
        raise ValueError(f"--folder {args.folder}: expected a new folder's name; for an archive there is --npz")
    for file in filter(None, [*files, args.folder]):
        dar.require(os.access(file.absolute().parent, os.W_OK), f"{file}: its folder is missing or not writable")


def class_names(ar: dar.ARTransformer) -> list[str]:
    """The checkpoint's own names; ImageNet's, from torchvision, if there are 1000 and none; numbers otherwise."""
    if ar.class_names is None and ar.config.num_classes == 1000:
        from torchvision.models import ResNet18_Weights

        return ResNet18_Weights.DEFAULT.meta["categories"]
    return ar.class_names or [str(i) for i in range(ar.config.num_classes)]


def parse_classes(words: list[str] | None, names: list[str], option: str = "--classes") -> list[int]:
    """Names or numbers -> class numbers; all if words is None. Raises ValueError naming the one that does not exist."""
    pairs = [(name, i) for i, name in enumerate(names)][::-1]  # of two with one name the first counts
    known = {str(i): i for _, i in pairs} | {name.lower(): i for name, i in pairs} | dict(pairs)
    for word in words or ():
        there = f"there are 0 ... {len(names) - 1} ({', '.join([*names[:20], '...'][: len(names)])})"
        dar.require(word in known or word.lower() in known, f"{option} {word}: no such class; {there}")
    return list(range(len(names))) if words is None else [known.get(word, known.get(word.lower())) for word in words]


def stream(ar, args, labels: list[int], seeds: list[int], prefix=None, tokens=None) -> Iterator[dar.StreamStep]:
    """dar.stream with the command line's settings, up to --tokens; x is the preview until all are drawn."""
    total, group, tokens = ar.config.num_tokens, ar.tokenizer.config.group_size, tokens or args.tokens
    sampling = dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, prefix=prefix)
    labels = torch.tensor(labels, device=ar.tok_embeddings.weight.device)
    steps = dar.stream(ar, ar.tokenizer, labels, args.cfg, seeds, None, args.steps, args.solver, **sampling)
    # Run to its end where possible: a Ctrl-C while Python clears away a generator that is left half-way would be lost.
    for step in itertools.islice(steps, None if tokens in (None, total) else tokens // group):
        yield step if step.codes.shape[1] == total else step._replace(x=step.preview)


# Pictures


def check_grid(files: list[Path | None], ar, columns: int, rows: int) -> None:
    """Raises ValueError if a labelled_grid is too large for a file's format: now, not after everything was drawn."""
    size = ar.tokenizer.config.image_size * max(1, 96 // ar.tokenizer.config.image_size)
    longest = max(columns * (size + 4), rows * (size + 18))
    for file in filter(None, files):
        fits = longest <= LONGEST.get(file.suffix.lower(), longest)
        dar.require(fits, f"{file}: {longest} pixels are more than this format allows; .png allows them")


def labelled_grid(images: torch.Tensor, labels: list[str], columns: int) -> Image.Image:
    """Float images [n, 3, H, W] in [-1, 1] -> a grid with a name under each; small images are shown larger."""
    zoom = max(1, 96 // images.shape[-1])
    images = images.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    size, line = images.shape[-1], 16
    picture = dar.tile(torch.nn.functional.pad(images, (2, 2, 2, line), value=1.0), columns, gap=0)
    draw = ImageDraw.Draw(picture)
    for i, name in enumerate(labels):
        x, y = i % columns * (size + 4) + 2, i // columns * (size + 2 + line) + size + 3
        while draw.textlength(name) > size and len(name) > 1:
            name = name[:-2] + "…" if name.endswith("…") else name[:-1] + "…"
        draw.text((x, y), name, fill="black")
    return picture


def draw_pictures(ar: dar.ARTransformer, args, names: list[str]) -> None:
    """The grid, the trajectories and the animation. After Ctrl-C they show the batches that were finished."""
    classes, total, group = parse_classes(args.classes, names), ar.config.num_tokens, ar.tokenizer.config.group_size
    num, kept, codes, stopped = args.num or 16, [0], None, None
    shown = [name if name.isascii() and name.isprintable() else str(i) for i, name in enumerate(names)]  # by Pillow
    if args.layout:
        num, kept = args.num or min(len(classes), 8), args.prefix_tokens or [total * k // 8 for k in range(1, 5)]
        fits = 0 <= min(kept) <= max(kept) <= total
        dar.require(fits, f"--prefix-tokens {' '.join(map(str, kept))}: expected numbers from 0 to {total}")
        if args.prefix_image:
            photo = dar.load_rgb(args.prefix_image)
            with contextlib.suppress(Exception), Image.open(args.prefix_image) as file:  # a damaged EXIF turns nothing
                file.load()
                photo.info = file.info
                photo = ImageOps.exif_transpose(photo)  # as the camera was held
            source = dar.center_crops([photo], ar.tokenizer.config.image_size)
            codes = ar.tokenizer.encode(source.to(ar.tok_embeddings.weight.device))[0]
        else:
            label = parse_classes([args.prefix_class], names, "--prefix-class")
            *_, step = stream(ar, args, label, [args.prefix_seed], tokens=total)
            source, codes = step.x.cpu(), step.codes[0]
    labels = [classes[i % len(classes)] for i in range(num)]
    frames, captions = [], []  # frames: [K + 1, n, 3, H, W], the previews and the result; or [1, n, ...], the result
    length = (args.tokens or total) // group + 1 if args.trajectory or args.gif else 1
    a_row = len(classes) if len(classes) <= 10 and num % len(classes) == 0 else min(num, 8)
    columns = num + 1 if args.layout else a_row
    count = num * len(kept) + len(kept) * args.layout
    check_grid([args.out, args.gif], ar, columns, -(-count // columns))
    check_grid([args.trajectory], ar, length, count)
    try:
        with tqdm(total=num * len(kept) * (args.tokens or total), unit="token", dynamic_ncols=True) as bar:
            for n, start in itertools.product(kept, range(0, num, args.batch)):
                which, previews = range(start, min(start + args.batch, num)), []
                prefix = codes[:n] if args.layout else None
                for step in stream(ar, args, labels[start : which.stop], [args.seed + i for i in which], prefix):
                    previews.append(step.preview.cpu())
                    bar.update(len(which) * group)
                if args.layout and start == 0:  # each row begins with the picture of which it keeps n tokens
                    frames.append(source.expand(length, 1, -1, -1, -1))
                    captions.append(f"{n} of {total} kept")
                frames.append(torch.stack([*previews, step.x.cpu()][-length:]))
                captions += [shown[label] for label in labels[start : which.stop]]
    except KeyboardInterrupt as caught:
        stopped = caught
    if not frames:
        raise stopped
    frames = torch.cat(frames, 1)
    grids = [labelled_grid(frame, captions, columns) for frame in frames]
    outputs = {args.out: (grids[-1], {})}
    if args.trajectory:
        steps = [f"{group * k} tokens" for k in range(1, length)]
        under = [word for name in captions for word in (*steps, name)]
        outputs[args.trajectory] = labelled_grid(frames.transpose(0, 1).flatten(0, 1), under, length), {}
    if args.gif:
        times = dict(duration=[400] * (length - 1) + [2000], loop=0)  # milliseconds
        outputs[args.gif] = grids[0], dict(save_all=True, append_images=grids[1:], **times)
    for file, (picture, options) in outputs.items():
        save_picture(picture, file, **options)
    print(f"wrote {', '.join(map(str, outputs))}")
    if stopped:
        raise stopped


def save_picture(picture: Image.Image, file: Path, **options) -> None:
    kind = Image.registered_extensions()[file.suffix.lower()]
    dar.write_atomically(file, lambda opened: picture.save(opened, kind, **options))


# Sets
# A set is cut into batches by picture number and each process draws whole batches, so that no picture depends on how
# many processes there are. Beside FILE.npz the folder FILE.npz.part keeps what a killed run leaves: 0.npy, pictures,
# mapped into the memory of each process, which all fill it, and "done": a line of settings, then a byte for each batch,
# 1 once it is in the .npy. The pictures of a --folder go to their places at once; its .part has no .npy.


def begin_set(files: list[Path], part: Path, shape: tuple[int, ...], args) -> None:
    """Creates the part folder, or finds that it holds this very set. Raises ValueError naming what is in the way."""
    names = vars(args).keys() - {"ckpt", "tokenizer", "out", "npz", "reference_npz", "folder", "save_bundle"}
    now = {name: str(getattr(args, name)) for name in sorted(names)}
    before, _, marks = (part / "done").read_text().partition("\n") if (part / "done").exists() else ("{}", "", "")
    was = json.loads(before)
    if was == now:
        return
    if "\1" in marks:
        changed = "; ".join(f"{k} was {was.get(k)}, is {now.get(k)}" for k in now | was if was.get(k) != now.get(k))
        raise ValueError(f"{part}: another set, half done ({changed}); finish or remove it, or choose another name")
    shutil.rmtree(part, ignore_errors=True)  # nothing was finished, nothing can be lost
    for file in files:
        if file.is_file() or file.is_dir() and any(file.iterdir()):
            raise ValueError(f"{file}: exists already; remove it or choose another name")
    archives = [file for file in files if file.suffix.lower() == ".npz"]
    needed = int(np.prod(shape)) * (2 * len(archives) or 1)  # in the .npy and once more in the .npz
    if (free := shutil.disk_usage(part.resolve().parent).free) < needed:
        raise ValueError(f"{files[0]}: the set needs {needed / 1e9:.2f} GB of disk, only {free / 1e9:.2f} are free")
    for folder in (part, *files[len(archives) :]):
        folder.mkdir(exist_ok=True)
    for i, _ in enumerate(archives):
        np.lib.format.open_memmap(part / f"{i}.npy", "w+", np.uint8, shape).flush()
        if hasattr(os, "posix_fallocate"):  # takes the space now: on a full disk, writing to a map kills the process
            with open(part / f"{i}.npy", "r+b") as opened:
                os.posix_fallocate(opened.fileno(), 0, os.path.getsize(opened.name))
    start = json.dumps(now).encode() + b"\n" + bytes(-(-shape[0] // args.batch))
    dar.write_atomically(part / "done", lambda opened: opened.write(start))


def fill_set(files, shape, args, draw, processes, labels=None, summary=lambda arrays: None) -> None:
    """Draws whichever batches are missing, then completes the files: one or more .npz, or one folder of PNGs.
    shape: (num, H, W, 3). draw: picture numbers -> for each file, their pictures, float [B, 3, H, W] in [-1, 1].
    labels: numbers -> classes. summary is called in the end with the uint8 arrays of the .npz files."""
    (_, rank, world), num, batch = processes, shape[0], args.batch
    part, batches = files[0].with_name(files[0].name + ".part"), -(-num // batch)
    processes.first_alone(lambda: begin_set(files, part, shape, args))
    arrays = [np.load(part / f"{i}.npy", "r+") for i, file in enumerate(files) if file.suffix.lower() == ".npz"]
    done = (part / "done").read_bytes()
    head, before = len(done) - batches, min(done.count(1) * batch, num)

    def all_done() -> bool:
        count = (part / "done").read_bytes().count(1)
        bar.update(min(count * batch, num) - bar.n)
        return count == batches

    try:
        with tqdm(total=num, initial=before, unit="picture", dynamic_ncols=True, disable=rank > 0) as bar:
            for b in (b for b in range(rank, batches, world) if not done[head + b]):
                which = range(b * batch, min((b + 1) * batch, num))
                pictures = [dar.to_uint8(images).permute(0, 2, 3, 1).cpu().numpy() for images in draw(which)]
                for array, images in zip(arrays, pictures):
                    array[which.start : which.stop] = images
                    array.flush()
                if not arrays:  # sorted by their names they are in order
                    for i, label, image in zip(which, labels(which), pictures[0]):
                        save_picture(Image.fromarray(image), files[0] / f"{i:0{len(str(num - 1))}d}-{label}.png")
                with open(part / "done", "r+b") as opened:
                    opened.seek(head + b)
                    opened.write(b"\1")
                if rank == 0:
                    all_done()
            while rank == 0 and not all_done():  # the other processes are still at it
                time.sleep(0.1)
    except KeyboardInterrupt:
        if rank == 0:
            print(f"{bar.n} of {num} pictures are done; the same command goes on from there", file=sys.stderr)
        raise
    if rank == 0:
        summary(arrays)
        for i, file in enumerate(files if arrays else ()):  # images are ADM's arr_0, and class numbers arr_1
            classes = {} if labels is None else {"arr_1": np.array(labels(range(num)))}
            np.savez(part / f"{i}.npz", arr_0=arrays[i], **classes)
            shutil.move(part / f"{i}.npz", file)
        (part / "done").unlink()  # first: without it the rest is no set
        shutil.rmtree(part)
        print(f"{num} pictures in {', '.join(map(str, files))}")


def draw_set(ar: dar.ARTransformer, args, names: list[str], processes: dar.Processes) -> None:
    """--npz or --folder: picture i has seed --seed + i, and a class in turn or drawn from that seed too."""
    classes, args.num, size = parse_classes(args.classes, names), args.num or 16, ar.tokenizer.config.image_size

    def labels(which: range) -> list[int]:
        places = which if args.balanced else (np.random.default_rng(args.seed + i).integers(2**31) for i in which)
        return [classes[place % len(classes)] for place in places]

    def draw(which: range) -> list[torch.Tensor]:
        *_, step = stream(ar, args, labels(which), [args.seed + i for i in which])
        return [step.x]

    args.classes, file, shape = classes, args.npz or args.folder, (args.num, size, size, 3)
    fill_set([file], shape, args, draw, processes, labels)


def reconstruct(tokenizer: dar.SequentialDiffusionTokenizer, args, processes: dar.Processes) -> None:
    """--reconstruct: two sets, the images and what the tokenizer makes of them; prints the mean of their PSNR."""
    paths = [args.reconstruct / name for name in dar.list_images(args.reconstruct)[: args.num]]
    args.num, size, device = len(paths), tokenizer.config.image_size, processes.device
    found = [(str(path), status.st_size, status.st_mtime_ns) for path in paths for status in [path.stat()]]
    args.photographs = hashlib.sha256(repr(found).encode()).hexdigest()[:16]  # others do not continue this set

    def draw(which: range) -> list[torch.Tensor]:
        images = dar.center_crops(map(dar.load_rgb, paths[which.start : which.stop]), size)
        noise = dar.initial_noise([args.seed + i for i in which], size, device)
        codes = tokenizer.encode(images.to(device))[:, : args.tokens]
        return [tokenizer.decode(codes, noise, args.steps, args.solver), images]

    def print_psnr(arrays: list[np.ndarray]) -> None:
        parts = (slice(start, start + 256) for start in range(0, len(paths), 256))
        found = [dar.psnr(*(dar.to_float(torch.from_numpy(array[part])) for array in arrays)) for part in parts]
        print(f"PSNR {torch.cat(found).mean():.2f} dB, the mean over {len(paths)} images")

    fill_set([args.npz, args.reference_npz], (args.num, size, size, 3), args, draw, processes, summary=print_psnr)


@torch.no_grad()
def main() -> None:
    args = parse_arguments()
    check_arguments(args)
    if args.threads or args.npz or args.folder:  # rounding depends on the number, which torchrun would set
        torch.set_num_threads(args.threads or 1)
    processes = dar.Processes.start(dar.pick_device(args.device))
    device, args.device = processes.device, processes.device.type
    if args.dtype == "auto":  # a bundle keeps the dtype of its files; pictures take what is fast
        args.dtype = "" if args.save_bundle else "bfloat16" if dar.has_fast_bfloat16(device) else "float32"
    if args.dtype == "float16" and device.type == "cpu" and not args.save_bundle:
        raise ValueError("--dtype float16: only on a GPU; use bfloat16 or float32 on a CPU")
    dtype = None if args.save_bundle else DTYPES[args.dtype]
    tokenizer = dar.load_tokenizer(args.tokenizer, device, dtype) if args.tokenizer else None
    ar = None if args.reconstruct and tokenizer else dar.load_ar(args.ckpt, device, dtype, tokenizer=tokenizer)
    tokenizer = tokenizer or ar.tokenizer
    dar.require(tokenizer is not None, f"{args.ckpt}: carries no tokenizer; give its own as --tokenizer FILE")
    if args.save_bundle:
        dar.save_checkpoint(args.save_bundle, ar, dtype=DTYPES.get(args.dtype))
        return print(f"wrote {args.save_bundle}")
    group, total = tokenizer.config.group_size, tokenizer.config.num_tokens
    if args.tokens and (args.tokens % group or args.tokens > total):
        raise ValueError(f"--tokens {args.tokens}: expected a multiple of {group}, up to {total}")
    models = [tokenizer] if ar is None else [ar, tokenizer]
    args.weights = dar.fingerprint(models) if args.npz or args.folder else None
    dar.prepare_for_sampling(models[0], args.compile)
    if args.reconstruct:
        reconstruct(tokenizer, args, processes)
    elif args.npz or args.folder:
        draw_set(ar, args, class_names(ar), processes)
    else:
        draw_pictures(ar, args, class_names(ar))


if __name__ == "__main__":
    dar.command_line(main)

"""Draws pictures: the Llama writes tokens, and each finished group of them moves the pictures on.

The small model that ships here:
    python sample.py
Some classes, and how they come about:
    python sample.py --classes dog ship 7 --cfg 1.1 6 --seed 100 --trajectory --gif
Another picture's layout:
    python sample.py --prefix-image photo.jpg --classes dog ship truck --out layout.png
A set for FID, on eight GPUs:
    torchrun --nproc_per_node=8 -- sample.py --num 50000 --balanced --npz set.npz
Reconstructions for rFID:
    python sample.py --reconstruct photos/ --npz ours.npz --reference-npz theirs.npz
The authors' released weights:
    python sample.py --ckpt D-AR-XL-360K.pt --tokenizer D-AR-tokenizer_v1.pt --cfg 1.1 10
"""

import argparse
import hashlib
import math
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

import dar
from common.cli import command_line, integer, real
from common.distributed import Processes, start_processes
from common.files import fill_chunks, fingerprint, read_chunks, write_atomically, write_npy
from common.images import (
    IMAGE_SUFFIXES,
    center_crops,
    check_images,
    list_images,
    psnr,
    read_image,
    tile,
    to_float,
    to_uint8,
)
from common.speed import pick_dtype, prepare_for_sampling
from common.threads import Threads, add_threads_option

SHIPPED = Path(__file__).resolve().parent / "checkpoints" / "cifar10.pt"

# ------------------------------------------------------------------------------
# Command line


# The mode is the first of these options that is given, or else the last. It takes the options that
# stand beside it, and ALL.
ALL = "ckpt tokenizer dtype"
FLOW = "device compile threads batch num seed tokens steps solver"
LLAMA = f"{FLOW} classes cfg temperature top_k top_p"
MODES = {
    "save_bundle": "",
    "reconstruct": f"{FLOW} npz reference_npz",
    "npz": f"{LLAMA} balanced",
    "folder": f"{LLAMA} balanced",
    "prefix_image": f"{LLAMA} out trajectory gif prefix_tokens",
    "prefix_class": f"{LLAMA} out trajectory gif prefix_tokens prefix_seed",
    "out": f"{LLAMA} trajectory gif",
}


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    image = output_file(*IMAGE_SUFFIXES)
    animation = output_file(".gif", ".png", ".webp")
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    devices = ["auto", "cpu", "cuda", "mps"]

    add = parser.add_argument_group("models").add_argument
    add("--ckpt", type=Path, default=SHIPPED, help="weights of the Llama (default: CIFAR-10's)")
    add("--tokenizer", type=Path, help="weights of the tokenizer, if that file does not hold them")
    add("--save-bundle", type=output_file(".pt"), help="only write both into one file for --ckpt")
    add("--dtype", default="auto", choices=dtypes, help="auto: bfloat16 where fast, else float32")
    add("--device", default="auto", choices=devices, help="auto: a GPU, if there is one")
    add("--compile", action="store_true", help="for many pictures: faster after a minute, on a GPU")
    add_threads_option(add, "sets: 1; else the fastest number, tried")
    add("--batch", type=integer(1), default=16, help="how many to draw at once (default: 16)")

    add = parser.add_argument_group("what is drawn").add_argument
    add("--classes", nargs="+", help="their names or numbers (default: all)")
    add("--num", type=integer(1), help="how many pictures, classes in turn (default: 16)")
    add("--seed", type=integer(0), default=0, help="of the first picture (0); the next count up")
    add(
        "--cfg",
        type=guidance_scale,
        nargs="+",
        default=[4.0],
        help="guidance, by how much to exaggerate the class: one number, two for the first and the "
        "last token, or none (default: 4)",
    )
    add(
        "--temperature",
        type=real(1e-6),
        default=1.0,
        help="below 1, likely tokens become likelier; above, less likely ones (default: 1)",
    )
    add("--top-k", type=integer(0), default=0, help="draw from the K likeliest tokens (0: all)")
    add(
        "--top-p",
        type=real(1e-6, 1),
        default=1.0,
        help="or from those of this probability (1: all)",
    )
    add("--tokens", type=integer(1), help="draw this many tokens only, and show the preview")
    add("--steps", type=integer(1), help="of the flow, from noise to picture (one for each group)")
    add(
        "--solver",
        default="ab2",
        choices=["ab2", "euler"],
        help="how the flow steps: Adams-Bashforth, as the paper (ab2, the default), or Euler",
    )

    add = parser.add_argument_group("pictures").add_argument
    add("--out", type=image, default=Path("samples.png"), help="the grid (default: samples.png)")
    add(
        "--trajectory",
        type=image,
        nargs="?",
        const=True,
        help="a row for each picture: its preview after each group of tokens, and the result "
        "(default: as --out, instead of the grid)",
    )
    add(
        "--gif",
        type=animation,
        nargs="?",
        const=True,
        help="the same, animated (default: as --out, ending in .gif)",
    )

    about = "keep the first tokens of a picture: a row for each number of them, a column a class"
    group = parser.add_argument_group("layout control, Fig. 6 and 12", about)
    source = group.add_mutually_exclusive_group()
    source.add_argument("--prefix-image", type=Path, help="the picture, an image file;")
    source.add_argument("--prefix-class", help="or one that is drawn: its class ...")
    add = group.add_argument
    add("--prefix-seed", type=integer(0), help="... and its seed (default: 0)")
    add("--prefix-tokens", type=integer(0), nargs="+", help="how many (default: 1/8 to 1/2 of all)")

    about = "the same bytes for any number of processes; the same command continues a stopped set"
    group = parser.add_argument_group("sets of pictures", about)
    target = group.add_mutually_exclusive_group()
    target.add_argument(
        "--npz",
        type=output_file(".npz"),
        help="uint8 [num, H, W, 3] in arr_0, class numbers in arr_1",
    )
    target.add_argument("--folder", type=Path, help="or NUMBER-CLASS.png in a new folder")
    add = group.add_argument
    add("--balanced", action="store_true", help="classes in turn, not at random")
    add("--reconstruct", type=Path, help="encode and decode the images below this folder instead")
    add("--reference-npz", type=output_file(".npz"), help="those images, as they were encoded")

    args = parser.parse_args(words)
    if len(args.cfg) == 1:
        args.cfg = args.cfg[0]
    if args.trajectory is True:
        args.trajectory = args.out
    if args.gif is True:
        args.gif = args.out.with_suffix(".gif")
    return args


def guidance_scale(word: str) -> float | None:
    """For argparse's type=: a number, or "none"."""
    if word == "none":
        return None
    return real(-math.inf)(word)


def output_file(*endings: str) -> Callable[[str], Path]:
    """For argparse's type=: a file that can be written and has one of these endings, which say its
    format. To find that out after all has been drawn would be too late."""

    def parse(word: str) -> Path:
        path = Path(word)
        if path.suffix.lower() not in endings:
            raise argparse.ArgumentTypeError(f"{word!r} does not end in {' '.join(endings)}")
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"{word}: is a folder")
        if not os.access(path.absolute().parent, os.W_OK):
            raise argparse.ArgumentTypeError(f"{word}: its folder is missing or not writable")
        return path

    return parse


def check_arguments(args: argparse.Namespace) -> None:
    """Raises ValueError where a mode lacks an option, or would ignore one that is given."""
    dar.guidance_schedule(args.cfg, num_tokens=1)
    if args.reconstruct is not None or args.reference_npz is not None:
        if None in (args.reconstruct, args.npz, args.reference_npz):
            raise ValueError("--reconstruct, --npz and --reference-npz go together")
        if args.npz.resolve() == args.reference_npz.resolve():
            raise ValueError(f"--npz and --reference-npz are one file, {args.npz}")

    mode = next(name for name in MODES if getattr(args, name) is not None)
    known = f"{mode} {MODES[mode]} {ALL}".split()
    for name, default in vars(parse_arguments([])).items():
        if name in known or getattr(args, name) == default:
            continue
        others = [flag(other) for other in MODES if name in MODES[other].split()]
        where = f"without {' or '.join(others)}" if mode == "out" else f"with {flag(mode)}"
        raise ValueError(f"{flag(name)} has no effect {where}")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# ------------------------------------------------------------------------------
# Models and classes


def load_ar(args: argparse.Namespace, device="cpu", dtype=None) -> dar.ARTransformer:
    """The Llama, with its tokenizer. Raises ValueError, OSError or FloatingPointError."""
    tokenizer = None
    if args.tokenizer is not None:
        tokenizer = dar.load_tokenizer(args.tokenizer, device, dtype)
    ar = dar.load_ar(args.ckpt, device, dtype, tokenizer)
    if ar.tokenizer is None:
        raise ValueError(f"{args.ckpt}: carries no tokenizer; give its own as --tokenizer FILE")
    return ar


def check_tokens(tokens: int | None, config: dar.TokenizerConfig) -> None:
    if tokens is not None and (tokens % config.group_size != 0 or tokens > config.num_tokens):
        raise ValueError(
            f"--tokens {tokens}: expected a multiple of {config.group_size}, up to "
            f"{config.num_tokens}"
        )


def class_names(ar: dar.ARTransformer) -> list[str]:
    """The checkpoint's own names; else ImageNet's for 1000 classes; else numbers."""
    if ar.class_names is not None:
        return ar.class_names
    if ar.config.num_classes == 1000:
        from torchvision.models import ResNet18_Weights

        return ResNet18_Weights.DEFAULT.meta["categories"]
    return [str(i) for i in range(ar.config.num_classes)]


def parse_classes(words: list[str] | None, names: list[str]) -> list[int]:
    """Names or numbers -> class numbers; all classes for None. Raises ValueError."""
    if words is None:
        return list(range(len(names)))
    return [find_class(word, names) for word in words]


def find_class(word: str, names: list[str]) -> int:
    """The class of this name, else of this name in other letters' case, else of this number."""
    if word in names:
        return names.index(word)
    lower_names = [name.lower() for name in names]
    if word.lower() in lower_names:
        return lower_names.index(word.lower())
    if word.isdecimal() and int(word) < len(names):
        return int(word)
    some = ", ".join(names[:20])
    raise ValueError(f"no class {word}: there are 0 ... {len(names) - 1} ({some})")


# ------------------------------------------------------------------------------
# Drawing


def stream(
    ar: dar.ARTransformer,
    args: argparse.Namespace,
    labels: list[int],
    seeds: list[int],
    tokens: int | None = None,
    prefix: Tensor | None = None,
) -> Iterator[dar.StreamStep]:
    """dar.stream with the command line's settings. It ends after `tokens` tokens, if given."""
    steps = dar.stream(
        ar,
        ar.tokenizer,
        torch.tensor(labels, device=ar.output.weight.device),
        args.cfg,
        seeds,
        num_steps=args.steps,
        solver=args.solver,
        prefix=prefix,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
    )
    for step in steps:
        yield step
        if step.codes.shape[1] == tokens:
            return


def result(ar: dar.ARTransformer, step: dar.StreamStep) -> Tensor:
    """The pictures, or their previews if not all tokens are there: float32 [B, 3, H, W]."""
    if step.codes.shape[1] < ar.config.num_tokens:
        return step.preview
    return step.x


def draw_frames(
    ar: dar.ARTransformer,
    args: argparse.Namespace,
    threads: Threads,
    labels: list[int],
    description: str,
    prefix: Tensor | None = None,
) -> Tensor:
    """Pictures of n classes, with the seeds --seed, --seed + 1, ...: float32 [T, n, 3, H, W] on the
    CPU. T frames: the preview after each group of tokens, if --trajectory or --gif want it, and
    last the result."""
    group_size = ar.tokenizer.config.group_size
    tokens = args.tokens or ar.config.num_tokens
    wants_previews = args.trajectory is not None or args.gif is not None
    batches = []
    with tqdm(total=len(labels) * tokens, desc=description, unit="token") as progress:
        for start in range(0, len(labels), args.batch):
            batch = labels[start : start + args.batch]
            first_seed = args.seed + start
            seeds = list(range(first_seed, first_seed + len(batch)))
            frames = []
            for step in stream(ar, args, batch, seeds, tokens, prefix):
                threads.look_again()
                if wants_previews:
                    frames.append(step.preview.cpu())
                progress.update(len(batch) * group_size)
            frames.append(result(ar, step).cpu())
            batches.append(torch.stack(frames))
    return torch.cat(batches, 1)


# ------------------------------------------------------------------------------
# Pictures


def draw_pictures(ar: dar.ARTransformer, args: argparse.Namespace, threads: Threads) -> None:
    """A grid of pictures, their classes in turn; perhaps their trajectories and the animation."""
    names = class_names(ar)
    classes = parse_classes(args.classes, names)
    num = args.num or 16
    labels = [classes[i % len(classes)] for i in range(num)]

    columns = 8
    if 2 <= len(classes) <= 10:
        columns = len(classes)  # one a class
    frames = draw_frames(ar, args, threads, labels, "drawing")
    captions = [caption(names, label) for label in labels]
    save_frames(ar, args, frames, captions, min(num, columns))


def caption(names: list[str], label: int) -> str:
    """A class's name, or its number if Pillow's font may lack a letter."""
    name = names[label]
    if name.isascii() and name.isprintable():
        return name
    return str(label)


def save_frames(ar, args, frames: Tensor, captions: list[str], columns: int) -> None:
    """Writes what --out, --trajectory and --gif ask for. frames: draw_frames' [T, n, 3, H, W]."""
    files = [args.out]
    if args.trajectory != args.out:
        save_picture(labelled_grid(frames[-1], captions, columns), args.out)

    if args.trajectory is not None:
        count = len(frames)
        group_size = ar.tokenizer.config.group_size
        labels = []
        for name in captions:
            labels += [f"{group_size * i} tokens" for i in range(1, count)]
            labels.append(name)
        rows = frames.transpose(0, 1).flatten(0, 1)  # [n · T, 3, H, W], picture by picture
        save_picture(labelled_grid(rows, labels, count), args.trajectory)
        files.append(args.trajectory)

    if args.gif is not None:
        first, *others = [labelled_grid(frame, captions, columns) for frame in frames]
        milliseconds = [400] * len(others) + [2000]
        save_picture(
            first, args.gif, save_all=True, append_images=others, duration=milliseconds, loop=0
        )
        files.append(args.gif)

    print("wrote " + ", ".join(dict.fromkeys(map(str, files))))


def labelled_grid(images: Tensor, captions: list[str], columns: int) -> Image.Image:
    """Float images [n, 3, H, W] in [-1, 1] -> a grid with a caption under each image. Images of
    fewer than 96 pixels are enlarged by a whole number."""
    zoom = max(1, 96 // images.shape[-1])
    images = images.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    size = images.shape[-1]
    line = 16  # pixels of a caption's height
    images = F.pad(images, (2, 2, 2, line), value=1.0)
    picture = tile(images, columns, gap=0)

    draw = ImageDraw.Draw(picture)
    for i, text in enumerate(captions):
        row, column = divmod(i, columns)
        left = 2 + column * (size + 4)
        top = 3 + size + row * (size + 2 + line)
        draw.text((left, top), shorten(text, size, draw), fill="black")
    return picture


def shorten(text: str, width: int, draw: ImageDraw.ImageDraw) -> str:
    """The text, or its beginning and "…" where it is wider than `width` pixels."""
    shorter = text
    kept = len(text)
    while draw.textlength(shorter) > width and kept > 0:
        kept -= 1
        shorter = text[:kept] + "…"
    return shorter


def save_picture(picture: Image.Image, path: Path, **options) -> None:
    """Writes a picture in the format of path's ending. options: of Pillow's save. Raises
    OSError."""
    kind = Image.registered_extensions()[path.suffix.lower()]
    write_atomically(path, lambda temporary: picture.save(temporary, kind, **options))


# ------------------------------------------------------------------------------
# Layout control


def draw_layout(ar: dar.ARTransformer, args: argparse.Namespace, threads: Threads) -> None:
    """Fig. 6 and 12: a row for each number of kept tokens. It begins with the picture whose tokens
    are kept; each further picture starts from these tokens and has another class."""
    total = args.tokens or ar.config.num_tokens
    kept_counts = args.prefix_tokens or [total // 8, total // 4, total * 3 // 8, total // 2]
    if max(kept_counts) > total:
        raise ValueError(f"--prefix-tokens {max(kept_counts)}: there are {total} tokens to draw")
    names = class_names(ar)
    classes = parse_classes(args.classes, names)
    num = args.num or min(len(classes), 8)
    labels = [classes[i % len(classes)] for i in range(num)]

    if args.prefix_image is not None:
        source, codes = encode_photograph(ar, args.prefix_image)
    else:
        seed = args.prefix_seed or 0
        *_, step = stream(ar, args, [find_class(args.prefix_class, names)], [seed])
        source, codes = step.x, step.codes

    rows = []
    captions = []
    for kept in kept_counts:
        prefix = codes[:, :kept]
        frames = draw_frames(ar, args, threads, labels, f"{kept} tokens kept", prefix)
        first = source.cpu().expand(len(frames), 1, -1, -1, -1)
        rows.append(torch.cat((first, frames), 1))
        captions.append(f"{kept} of {total} kept")
        captions += [caption(names, label) for label in labels]
    save_frames(ar, args, torch.cat(rows, 1), captions, columns=1 + num)


def encode_photograph(ar: dar.ARTransformer, path: Path) -> tuple[Tensor, Tensor]:
    """An image file, as the camera was held -> its middle square, float32 [1, 3, H, W], and the
    tokens of that, int64 [1, N]. Raises ValueError or OSError."""
    photograph = read_image(path, upright=True)
    image = center_crops([photograph], ar.tokenizer.config.image_size)
    return image, ar.tokenizer.encode(image.to(ar.output.weight.device))


# ------------------------------------------------------------------------------
# Sets
#
# A set is cut into batches by the pictures' numbers, and a process draws whole batches. So no
# picture depends on how many processes there are. Each batch becomes a chunk (common/files.py) in
# the folder TARGET.part, and when all are there they are joined.

# What the pixels of a set depend on, beside the weights. A stopped set goes on with the same alone.
# fmt: off
SET_OPTIONS = (
    "seed", "cfg", "tokens", "steps", "solver", "temperature", "top_k", "top_p", "balanced",
    "batch", "device", "dtype", "compile", "threads",
)
# fmt: on


def set_settings(args: argparse.Namespace, models: list, **more) -> dict:
    settings = {name: getattr(args, name) for name in SET_OPTIONS}
    settings |= more
    settings["weights"] = fingerprint(models)[:16]
    return settings


def draw_set(ar: dar.ARTransformer, args: argparse.Namespace, processes: Processes) -> None:
    """Pictures into --npz or --folder. Picture i has the seed --seed + i."""
    target = args.npz
    if args.folder is not None:
        target = args.folder
    part = part_folder(target)
    processes.first_alone(lambda: refuse_existing(target, part))

    num = args.num or 16
    classes = parse_classes(args.classes, class_names(ar))
    labels = choose_labels(classes, num, args.seed, args.balanced)
    settings = set_settings(args, [ar, ar.tokenizer], classes=classes, num=num)
    num_chunks = math.ceil(num / args.batch)

    def draw_chunk(chunk: int) -> dict[str, np.ndarray]:
        pictures = range(num)[chunk * args.batch : (chunk + 1) * args.batch]
        chunk_labels = [labels[i] for i in pictures]
        seeds = [args.seed + i for i in pictures]
        *_, step = stream(ar, args, chunk_labels, seeds, args.tokens)
        return {"images": to_pixels(result(ar, step)), "labels": np.array(chunk_labels)}

    def draw_files(chunk: int) -> dict[str, np.ndarray]:
        digits = len(str(num - 1))  # with leading zeros, names are in the order of numbers
        images = draw_chunk(chunk)["images"]
        for i, image in enumerate(images, start=chunk * args.batch):
            name = f"{i:0{digits}d}-{labels[i]}.png"
            save_picture(Image.fromarray(image), args.folder / name)
        return {}  # an empty chunk, which records that its pictures are there

    if args.folder is not None:
        args.folder.mkdir(parents=True, exist_ok=True)
        fill_chunks(part, settings, num_chunks, draw_files, processes, "drawing")
    else:
        fill_chunks(part, settings, num_chunks, draw_chunk, processes, "drawing")
    if processes.rank > 0:
        return
    if args.npz is not None:
        write_npz(args.npz, num, part, num_chunks, arr_0="images", arr_1="labels")
    shutil.rmtree(part)
    print(f"{num} pictures in {target}")


def choose_labels(classes: list[int], num: int, seed: int, balanced: bool) -> list[int]:
    """A class for each picture of a set: in turn, or drawn from the picture's own seed."""
    if balanced:
        return [classes[i % len(classes)] for i in range(num)]
    labels = []
    for i in range(num):
        number = np.random.default_rng(seed + i).integers(2**31)
        labels.append(classes[number % len(classes)])
    return labels


def to_pixels(images: Tensor) -> np.ndarray:
    """Float images [n, 3, H, W] in [-1, 1] -> uint8 [n, H, W, 3]."""
    return to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()


def part_folder(target: Path) -> Path:
    return Path(f"{target}.part")


def refuse_existing(target: Path, part: Path) -> None:
    """Raises ValueError if the target is there, unless this is a set that was stopped."""
    if target.exists() and not part.exists():
        raise ValueError(f"{target}: exists already; remove it or choose another name")


def write_npz(path: Path, num: int, part: Path, num_chunks: int, **members: str) -> None:
    """Joins chunks to an .npz, without holding more than one of them in memory. members: for each
    array in the .npz, num rows long, its name in the chunks."""

    def write(temporary: Path) -> None:
        with zipfile.ZipFile(temporary, "w") as archive:
            for member, name in members.items():
                with archive.open(f"{member}.npy", "w", force_zip64=True) as file:
                    write_npy(file, num, read_chunks(part, num_chunks, name))

    write_atomically(path, write)


# ------------------------------------------------------------------------------
# Reconstructions


def reconstruct(args: argparse.Namespace, processes: Processes, dtype: torch.dtype) -> None:
    """What the tokenizer makes of the images below --reconstruct into --npz, the images into
    --reference-npz. Prints the mean of their PSNR."""
    part = part_folder(args.npz)
    processes.first_alone(lambda: refuse_existing(args.npz, part))
    processes.first_alone(lambda: refuse_existing(args.reference_npz, part))
    device = processes.device
    tokenizer = dar.load_tokenizer(args.tokenizer or args.ckpt, device, dtype)
    check_tokens(args.tokens, tokenizer.config)
    prepare_for_sampling(tokenizer, args.compile)
    size = tokenizer.config.image_size
    paths = [args.reconstruct / name for name in list_images(args.reconstruct)[: args.num]]
    # A damaged one that is found late would end the set: mended, it is another photograph.
    processes.first_alone(lambda: check_images(paths if processes.rank == 0 else []))

    def reconstruct_chunk(chunk: int) -> dict[str, np.ndarray]:
        pictures = range(len(paths))[chunk * args.batch : (chunk + 1) * args.batch]
        images = center_crops([read_image(paths[i]) for i in pictures], size)
        noise = dar.initial_noise([args.seed + i for i in pictures], size, device)
        codes = tokenizer.encode(images.to(device))[:, : args.tokens]
        decoded = tokenizer.decode(codes, noise, args.steps, args.solver)
        saved = to_float(to_uint8(decoded)).cpu()
        return {
            "ours": to_pixels(decoded),
            "theirs": to_pixels(images),
            "psnr": psnr(saved, images).numpy(),
        }

    photographs = photographs_digest(paths, args.reconstruct)
    settings = set_settings(args, [tokenizer], photographs=photographs)
    num_chunks = math.ceil(len(paths) / args.batch)
    fill_chunks(part, settings, num_chunks, reconstruct_chunk, processes, "reconstructing")
    if processes.rank == 0:
        write_npz(args.npz, len(paths), part, num_chunks, arr_0="ours")
        write_npz(args.reference_npz, len(paths), part, num_chunks, arr_0="theirs")
        mean = np.concatenate(list(read_chunks(part, num_chunks, "psnr"))).mean()
        shutil.rmtree(part)
        print(f"PSNR {mean:.2f} dB, the mean over {len(paths)} images")
        print(f"{len(paths)} pictures in {args.npz}, {args.reference_npz}")


def photographs_digest(paths: list[Path], folder: Path) -> str:
    """A word that changes with the files' names, sizes and times of change: other photographs do
    not continue a stopped set."""
    files = []
    for path in paths:
        status = path.stat()
        files.append((str(path.relative_to(folder)), status.st_size, status.st_mtime_ns))
    return hashlib.sha256(repr(files).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------
# Bundle


def save_bundle(args: argparse.Namespace) -> None:
    """Llama and tokenizer into one file, in --dtype or that of their own files."""
    dtype = None
    if args.dtype != "auto":
        dtype = getattr(torch, args.dtype)
    ar = load_ar(args)
    write_atomically(
        args.save_bundle, lambda temporary: dar.save_checkpoint(temporary, ar, dtype=dtype)
    )
    print(f"wrote {args.save_bundle}")


def main() -> None:
    args = parse_arguments()
    check_arguments(args)
    if args.save_bundle is not None:
        save_bundle(args)
        return

    is_set = args.npz is not None or args.folder is not None
    if is_set and args.threads is None:
        args.threads = 1  # Rounding depends on their number, and torchrun would choose another.
    processes = start_processes(args.device)
    device = processes.device
    dtype = pick_dtype(args.dtype, device)
    if dtype == torch.float16 and device.type == "cpu":
        raise ValueError("--dtype float16: only on a GPU; use bfloat16 or float32 on a CPU")
    args.device = device.type  # what "auto" was
    args.dtype = str(dtype)
    threads = Threads(args.threads, device)
    if not is_set:
        threads.start()

    if args.reconstruct is not None:
        reconstruct(args, processes, dtype)
        return
    ar = load_ar(args, device, dtype)
    check_tokens(args.tokens, ar.tokenizer.config)
    prepare_for_sampling(ar, args.compile)
    if is_set:
        draw_set(ar, args, processes)
    elif args.prefix_image is not None or args.prefix_class is not None:
        draw_layout(ar, args, threads)
    else:
        draw_pictures(ar, args, threads)


if __name__ == "__main__":
    command_line(main)

"""Draws pictures: the Llama writes tokens, and every finished group of them takes a denoising step at once.

The small model that ships here: python sample.py
Some classes, more guidance:     python sample.py --classes dog ship 7 --num 12 --cfg 1.1 6 --seed 100
A model of your own:             python sample.py --ckpt runs/ar/last.pt
The authors' released weights:   python sample.py --ckpt D-AR-XL-360K.pt --tokenizer D-AR-tokenizer_v1.pt --cfg 1.1 10
"""

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

import dar

SHIPPED = Path(__file__).resolve().parent / "checkpoints" / "cifar10-tiny.pt"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--ckpt",
        default=str(SHIPPED),
        help="Llama checkpoint, ours or a released one (default: the CIFAR-10 model here)",
    )
    add("--tokenizer", help="tokenizer checkpoint, where the Llama's file does not carry one")
    add("--classes", nargs="+", help="class names or numbers, repeated in turn (default: all)")
    add("--num", type=int, default=16, help="how many pictures (default: 16)")
    add(
        "--cfg",
        nargs="+",
        default=["1.1", "4.0"],
        help="guidance: one number, start and end, or 'none' (default: 1.1 4)",
    )
    add("--seed", type=int, default=0, help="of the first picture; the next ones count up (default: 0)")
    add("--out", default="samples.png", help="picture file (default: samples.png)")
    add("--steps", type=int, help="denoising steps (default: the tokenizer's, one for each group)")
    add("--solver", default="ab2", choices=["ab2", "euler"])
    add("--temperature", type=float, default=1.0)
    add("--top-k", type=int, default=0, help="draw from the k likeliest tokens (default: 0, all)")
    add("--top-p", type=float, default=1.0, help="draw from the likeliest tokens of this mass (default: 1, all)")
    add("--batch", type=int, default=16, help="pictures drawn at once (default: 16)")
    add("--dtype", default="float32", choices=DTYPES, help="of the weights (default: float32)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    add("--save-bundle", metavar="FILE", help="write model and tokenizer into one file, in --dtype, and stop")
    return parser.parse_args()


def parse_guidance(words: list[str]) -> float | tuple[float, float] | None:
    if words == ["none"]:
        return None
    try:
        values = tuple(float(word) for word in words)
    except ValueError:
        values = ()
    if len(values) not in (1, 2):
        raise ValueError(f"--cfg {' '.join(words)}: expected one number, start and end, or 'none'")
    return values if len(values) == 2 else values[0]


def class_names(ar: dar.ARTransformer) -> list[str]:
    """The checkpoint's own names; ImageNet's, from torchvision, if there are 1000 and none; numbers otherwise."""
    if ar.class_names is not None:
        return ar.class_names
    if ar.config.num_classes == 1000:
        from torchvision.models import ResNet18_Weights

        return ResNet18_Weights.DEFAULT.meta["categories"]
    return [str(i) for i in range(ar.config.num_classes)]


def parse_classes(words: list[str] | None, names: list[str]) -> list[int]:
    """Names or numbers -> class numbers. Raises ValueError naming the one that does not exist."""
    if words is None:
        return list(range(len(names)))
    found, lower = [], [name.lower() for name in names]
    for word in words:
        if word.lower() in lower:
            found.append(lower.index(word.lower()))
        elif word.isdigit() and int(word) < len(names):
            found.append(int(word))
        else:
            known = ", ".join(names) if len(names) <= 20 else f"ImageNet's names, or numbers up to {len(names) - 1}"
            raise ValueError(f"--classes {word}: no such class; there are 0 ... {len(names) - 1} ({known})")
    return found


def labelled_grid(images: torch.Tensor, labels: list[str], columns: int) -> Image.Image:
    """Float images [n, 3, H, W] in [-1, 1] -> a grid with a name under each; small images are shown larger."""
    zoom = max(1, 96 // images.shape[-1])
    images = images.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    size, line = images.shape[-1], 16
    padded = torch.nn.functional.pad(images, (2, 2, 2, line), value=1.0)
    picture = dar.tile(padded, columns, gap=0)
    draw = ImageDraw.Draw(picture)
    for i, name in enumerate(labels):
        x, y = i % columns * (size + 4) + 2, i // columns * (size + 2 + line) + size + 3
        while draw.textlength(name) > size and len(name) > 1:
            name = name[:-2] + "…" if name.endswith("…") else name[:-1] + "…"
        draw.text((x, y), name, fill="black")
    return picture


def load(args: argparse.Namespace, device: torch.device) -> dar.ARTransformer:
    dtype = None if args.save_bundle else DTYPES[args.dtype]
    if dtype == torch.float16 and device.type == "cpu":
        raise ValueError("--dtype float16: only on a GPU; use bfloat16 or float32 on a CPU")
    if args.ckpt == str(SHIPPED) and not SHIPPED.exists():
        raise FileNotFoundError(f"{SHIPPED}: the model that ships with the repository is missing; give one with --ckpt")
    tokenizer = dar.load_tokenizer(args.tokenizer, device, dtype) if args.tokenizer else None
    ar = dar.load_ar(args.ckpt, device, dtype, tokenizer=tokenizer)
    if ar.tokenizer is None:
        raise ValueError(f"{args.ckpt}: carries no tokenizer; give the one it was trained with as --tokenizer FILE")
    return ar


@torch.no_grad()
def main() -> None:
    args = parse_arguments()
    cfg, device, out = parse_guidance(args.cfg), dar.pick_device(args.device), Path(args.out)
    if args.num < 1 or args.batch < 1:
        raise ValueError(f"--num {args.num} --batch {args.batch}: expected at least 1")
    if out.suffix.lower() not in Image.registered_extensions() or not out.resolve().parent.is_dir():
        raise ValueError(f"--out {out}: expected a picture's name, such as samples.png, in a folder that exists")
    ar = load(args, device)
    if args.save_bundle:
        dar.save_checkpoint(args.save_bundle, ar, dtype=DTYPES[args.dtype])
        print(f"wrote {args.save_bundle}")
        return
    names = class_names(ar)
    classes = parse_classes(args.classes, names)
    labels = [classes[i % len(classes)] for i in range(args.num)]
    seeds = list(range(args.seed, args.seed + args.num))
    images = []
    bar = tqdm(total=args.num * ar.config.num_tokens, unit="token", dynamic_ncols=True)
    for start in range(0, args.num, args.batch):
        batch = torch.tensor(labels[start : start + args.batch], device=device)
        sampling = dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
        for shown in dar.stream(  # noqa: B007
            ar, ar.tokenizer, batch, cfg, seeds[start : start + args.batch], None, args.steps, args.solver, **sampling
        ):
            bar.update(len(batch) * ar.tokenizer.config.group_size)
        images.append(shown.x.cpu())
    bar.close()
    columns = len(classes) if len(classes) <= 10 and args.num % len(classes) == 0 else min(args.num, 8)
    labelled_grid(torch.cat(images), [names[i] for i in labels], columns).save(out)
    print(f"{args.num} pictures in {out}")


if __name__ == "__main__":
    dar.command_line(main)

"""README, the figure at the top: one picture being drawn, as the method sees it.

    python experiments/figure.py --class-name ship --seed 3 --out assets/how.png

A column for each group of tokens. From top to bottom: the tokens that the Llama writes (a colour is the place of a code
in the codebook, its first three dimensions), where the flow stands after their denoising step, and the preview, the
jump to the end from where the flow stood before it.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from PIL import Image, ImageDraw, ImageFont

import dar
import sample

CELL, GAP, LEFT, LINE = 96, 14, 150, 22  # pixels: a picture, between pictures, the captions' column, a line of text
ROWS = [
    "tokens, written\nby the Llama",
    "the flow after\ntheir denoising step",
    "preview: the jump to\nthe end instead of it",
]


def token_picture(vectors: torch.Tensor) -> Image.Image:
    """Code vectors [n, D] of length one -> a square with a coloured cell for each token, row by row."""
    count, columns = len(vectors), max(1, round(len(vectors) ** 0.5))
    colours = dar.to_uint8(1.4 * vectors[:, :3]).tolist()
    picture = Image.new("RGB", (columns, -(-count // columns)), "white")
    for i, colour in enumerate(colours):
        picture.putpixel((i % columns, i // columns), tuple(colour))
    return picture.resize((CELL, CELL), Image.Resampling.NEAREST)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", default=str(sample.SHIPPED), help="Llama checkpoint that carries its tokenizer")
    parser.add_argument("--class-name", default="ship", help="name or number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cfg", type=float, nargs=2, default=[4.0, 4.0])
    parser.add_argument("--out", type=Path, default=Path("how.png"))
    args = parser.parse_args()
    if args.out.suffix.lower() not in dar.IMAGE_SUFFIXES or not args.out.resolve().parent.is_dir():
        raise ValueError(f"{args.out}: expected a name ending in .png or another image's, in a folder that exists")
    ar = dar.load_ar(args.ckpt, dtype=torch.float32)
    label = sample.parse_classes([args.class_name], sample.class_names(ar), "--class-name")
    steps = list(dar.stream(ar, ar.tokenizer, torch.tensor(label), args.cfg, [args.seed]))
    size, groups = ar.tokenizer.config.group_size, len(steps)
    font = ImageFont.load_default(15)
    width, height = LEFT + groups * (CELL + GAP), LINE + 3 * (CELL + GAP)
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    for row, words in enumerate(ROWS):
        draw.multiline_text((8, LINE + row * (CELL + GAP) + CELL // 3), words, "black", font)
    for k, step in enumerate(steps):
        x = LEFT + k * (CELL + GAP)
        name = f"{k * size + 1} … {(k + 1) * size}"
        draw.text((x + CELL / 2, 2), name, "black", font, anchor="ma")
        vectors = ar.tokenizer.quantize.lookup(step.codes[0, -size:])
        images = [Image.fromarray(dar.to_uint8(image[0]).permute(1, 2, 0).numpy()) for image in (step.x, step.preview)]
        cells = [token_picture(vectors), *(image.resize((CELL, CELL), Image.Resampling.NEAREST) for image in images)]
        for row, cell in enumerate(cells):
            picture.paste(cell, (x, LINE + row * (CELL + GAP)))
            if k + 1 < groups:  # time runs to the right
                y = LINE + row * (CELL + GAP) + CELL // 2
                draw.polygon([(x + CELL + 3, y - 5), (x + CELL + 3, y + 5), (x + CELL + GAP - 3, y)], "black")
    sample.save_picture(picture, args.out)
    print(f"wrote {args.out}: {sample.class_names(ar)[label[0]]}, seed {args.seed}")


if __name__ == "__main__":
    dar.command_line(main)

"""The picture at the top of the README: one picture being drawn, as the method sees it.

    python experiments/figure.py --classes horse --seed 0 --out assets/how.png

A column for each group of tokens. Above, the tokens that the Llama writes: a code's colour is its
place in the codebook, in its first three dimensions. Below, the preview: where the flow would end
if it went straight on. Last, the picture. (Where the flow itself stands is not drawn: noise hides
it until the last step.)
"""

import argparse
import math
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import dar
from common.cli import command_line, integer, real
from common.images import to_uint8
from sample import SHIPPED, class_names, output_file, parse_classes

# In pixels.
CELL = 96  # a picture
GAP = 14  # between two
LEFT = 150  # the column of captions
LINE = 22  # the row of captions

CAPTIONS = ["tokens, written\nby the Llama", "preview after\nthese tokens"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ckpt", default=SHIPPED, help="a Llama with its tokenizer (default: the one that ships)")
    add("--classes", nargs=1, default=["ship"], help="one, its name or number (default: ship)")
    add("--seed", type=integer(0), default=0, help="of the picture (default: 0)")
    add("--cfg", type=real(0), default=4.0, help="guidance (default: 4)")
    add("--out", type=output_file(".png"), default=Path("how.png"), help="default: how.png")
    return parser.parse_args()


def draw_tokens(vectors: Tensor) -> Image.Image:
    """Code vectors [n, D] of length one -> a square with a coloured cell for each, row by row."""
    columns = max(1, round(math.sqrt(len(vectors))))
    rows = math.ceil(len(vectors) / columns)
    colours = to_uint8(1.4 * vectors[:, :3]).tolist()
    picture = Image.new("RGB", (columns, rows), "white")
    for i, colour in enumerate(colours):
        row, column = divmod(i, columns)
        picture.putpixel((column, row), tuple(colour))
    return enlarge(picture)


def draw_image(image: Tensor) -> Image.Image:
    """Float [3, H, W] in [-1, 1] -> a square of CELL pixels."""
    return enlarge(Image.fromarray(to_uint8(image).permute(1, 2, 0).numpy()))


def enlarge(picture: Image.Image) -> Image.Image:
    return picture.resize((CELL, CELL), Image.Resampling.NEAREST)


def draw_arrow(draw: ImageDraw.ImageDraw, left: int, top: int) -> None:
    """In the gap to the right of the cell at (left, top): time runs to the right."""
    tail = left + CELL + 3
    tip = left + CELL + GAP - 3
    middle = top + CELL // 2
    draw.polygon([(tail, middle - 5), (tail, middle + 5), (tip, middle)], "black")


@torch.no_grad()
def main() -> None:
    args = parse_arguments()
    ar = dar.load_ar(args.ckpt, dtype=torch.float32)
    if ar.tokenizer is None:
        raise ValueError(f"{args.ckpt}: carries no tokenizer")
    names = class_names(ar)
    label = parse_classes(args.classes, names)[0]
    labels = torch.tensor([label])
    steps = list(dar.stream(ar, ar.tokenizer, labels, args.cfg, [args.seed]))

    size = ar.tokenizer.config.group_size
    width = LEFT + (len(steps) + 1) * (CELL + GAP)
    height = LINE + len(CAPTIONS) * (CELL + GAP)
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(15)
    for row, caption in enumerate(CAPTIONS):
        top = LINE + row * (CELL + GAP)
        draw.multiline_text((8, top + CELL // 3), caption, "black", font)

    for k, step in enumerate(steps):
        left = LEFT + k * (CELL + GAP)
        numbers = f"{k * size + 1} … {(k + 1) * size}"
        draw.text((left + CELL / 2, 2), numbers, "black", font, anchor="ma")
        vectors = ar.tokenizer.quantize.lookup(step.codes[0, -size:])
        picture.paste(draw_tokens(vectors), (left, LINE))
        picture.paste(draw_image(step.preview[0]), (left, LINE + CELL + GAP))
        draw_arrow(draw, left, LINE + CELL + GAP)
        if k + 1 < len(steps):
            draw_arrow(draw, left, LINE)
    left = LEFT + len(steps) * (CELL + GAP)
    draw.text((left + CELL / 2, LINE + CELL), "the picture", "black", font, anchor="md")
    picture.paste(draw_image(step.x[0]), (left, LINE + CELL + GAP))

    picture.save(args.out)
    print(f"wrote {args.out}: {names[label]}, seed {args.seed}")


if __name__ == "__main__":
    command_line(main)

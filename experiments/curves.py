"""What the trainings of a model logged as they went, from log.csv.

    python experiments/curves.py experiments/logs/*.csv --out assets/curves.png

Three panels: the held-out PSNR of the tokenizer, whose trainings follow one another; the loss of
the Llama; and its held-out loss in each group of tokens, at some moments of the training: what
"coarse to fine" looks like to the Llama. A panel without numbers is left out.
"""

import argparse
import csv
import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from common.cli import command_line
from sample import output_file

# Of a panel, in pixels.
WIDTH = 460
HEIGHT = 320
LEFT = 50  # the margins
RIGHT = 90
TOP = 28
BOTTOM = 40
ZOOM = 2  # it is drawn so many times as large and averaged down

PALEST = (175, 190, 210)  # of the curves
DARKEST = (20, 60, 130)

Curve = list[tuple[float, float]]  # points (x, y)


def round_step(span: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that cuts the span into at most 8 parts."""
    power = 10.0 ** math.floor(math.log10(span / 8))
    for digit in (1, 2, 5):
        if span <= 8 * digit * power:
            return digit * power
    return 10 * power


def ticks(low: float, high: float) -> list[float]:
    """The round numbers from low to high."""
    step = round_step(high - low)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def draw_panel(
    curves: dict[str, Curve], x_label: str, y_label: str, low: float | None = None
) -> Image.Image:
    """A line through the points of each curve; of several curves, later ones are darker. low: where
    y begins, by default at the lowest point."""
    points = [point for curve in curves.values() for point in curve]
    left = min(x for x, _ in points)
    right = max(max(x for x, _ in points), left + 1e-9)
    if low is None:
        low = min(y for _, y in points)
    high = max(max(y for _, y in points), low + 1e-9)

    picture = Image.new("RGB", (WIDTH * ZOOM, HEIGHT * ZOOM), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(12 * ZOOM)

    def to_pixel(x: float, y: float) -> tuple[float, float]:
        column = LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT)
        row = HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - BOTTOM - TOP)
        return column * ZOOM, row * ZOOM

    for y in ticks(low, high):
        start, row = to_pixel(left, y)
        end, _ = to_pixel(right, y)
        draw.line([(start, row), (end, row)], fill="#dddddd", width=ZOOM)
        draw.text((start - 6 * ZOOM, row), f"{y:g}", fill="black", font=font, anchor="rm")
    for x in ticks(left, right):
        column, row = to_pixel(x, low)
        draw.text((column, row + 6 * ZOOM), f"{x:g}", fill="black", font=font, anchor="mt")
    middle, _ = to_pixel((left + right) / 2, low)
    draw.text((middle, (HEIGHT - 16) * ZOOM), x_label, fill="black", font=font, anchor="mt")
    draw.text((4 * ZOOM, 2 * ZOOM), y_label, fill="black", font=font)

    for i, (name, curve) in enumerate(curves.items()):
        share = (i + 1) / len(curves)
        colour = tuple(round(a + share * (b - a)) for a, b in zip(PALEST, DARKEST))
        pixels = [to_pixel(x, y) for x, y in curve]
        draw.line(pixels, fill=colour, width=2 * ZOOM, joint="curve")
        if len(curve) < 20:
            for pixel in pixels:
                draw.circle(pixel, 3 * ZOOM, fill=colour)
        corner = ((WIDTH - RIGHT + 8) * ZOOM, (TOP + 16 * i) * ZOOM)
        draw.text(corner, name, fill=colour, font=font)
    return picture.resize((WIDTH, HEIGHT), Image.BOX)


def read_log(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def read_curve(rows: list[dict[str, str]], column: str, start: float = 0) -> Curve:
    """(thousands of steps, value) of the rows that have a value; steps count from `start`."""
    with_value = [row for row in rows if row.get(column)]
    return [(start + int(row["step"]) / 1000, float(row[column])) for row in with_value]


def read_groups(rows: list[dict[str, str]]) -> dict[str, Curve]:
    """{moment: (group, nats per token in it)}."""
    columns = [name for name in rows[0] if name.startswith("val_group_")]
    curves = {}
    for row in rows:
        if row.get("val_group_0"):
            values = [float(row[column]) for column in columns]
            curves[f"step {row['step']}"] = list(enumerate(values, start=1))
    return curves


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("logs", type=Path, nargs="+", help="log.csv of the trainings, in their order")
    add("--out", type=output_file(".png"), default=Path("curves.png"), help="default: curves.png")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    psnr = {}
    loss = {}
    groups = {}
    start = 0.0
    for path in args.logs:
        name = path.parent.name if path.name == "log.csv" else path.stem
        rows = read_log(path)
        if read_curve(rows, "val_psnr"):
            psnr[name] = read_curve(rows, "val_psnr", start)
            start += int(rows[-1]["step"]) / 1000
        if read_curve(rows, "val_loss"):
            loss["training"] = read_curve(rows, "loss")
            loss["held out"] = read_curve(rows, "val_loss")
            groups = read_groups(rows)

    panels = []
    if psnr:
        panels.append(draw_panel(psnr, "thousands of steps", "held-out PSNR, dB"))
    if loss:
        panels.append(draw_panel(loss, "thousands of steps", "Llama, nats per token"))
    if groups:
        label = "Llama, held-out nats per token"
        panels.append(draw_panel(groups, "group of tokens", label, low=0.0))
    if not panels:
        raise ValueError(f"{args.logs[0]}: nothing was measured; was the training given --val?")

    picture = Image.new("RGB", (WIDTH * len(panels), HEIGHT), "white")
    for i, panel in enumerate(panels):
        picture.paste(panel, (WIDTH * i, 0))
    picture.save(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    command_line(main)

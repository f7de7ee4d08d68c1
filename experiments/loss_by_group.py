"""README.md here, "What the shipped model is": held-out loss against group, from a Llama's log.csv.

    python experiments/loss_by_group.py runs/ar/log.csv --out assets/loss_by_group.png

One line for each of some moments of the training, the last one darkest: what coarse-to-fine looks like to the Llama.
"""

import argparse
import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from PIL import Image, ImageDraw, ImageFont

import dar

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 360, 50, 130, 28, 40  # of a panel, and of its margins
ZOOM = 2  # drawn so many times as large and averaged down


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between low and high: five to eight."""
    step = next(s * 10**e for e in range(-6, 9) for s in (1, 2, 5) if (high - low) / (s * 10**e) <= 8)
    return [i * step for i in range(round(low / step + 0.499), int(high / step + 1e-9) + 1)]


def panel(curves: dict[str, list[tuple[float, float]]], across: str, up: str, low: float | None = None) -> Image.Image:
    """Lines through the points (x, y) of each curve, later curves darker; y from `low` or the smallest value up."""
    points = [point for curve in curves.values() for point in curve]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    left, right = min(xs), max(max(xs), min(xs) + 1e-9)
    low, high = min(ys) if low is None else low, max(ys)
    high = max(high + 0.05 * (high - low), low + 1e-9)
    picture = Image.new("RGB", (WIDTH * ZOOM, HEIGHT * ZOOM), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13 * ZOOM)

    def at(x: float, y: float) -> tuple[float, float]:
        x = LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT)
        return x * ZOOM, (HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - BOTTOM - TOP)) * ZOOM

    for y in ticks(low, high):
        draw.line([at(left, y), at(right, y)], fill="#dddddd", width=ZOOM)
        draw.text((at(left, y)[0] - 6 * ZOOM, at(left, y)[1]), f"{y:g}", fill="black", font=font, anchor="rm")
    for x in ticks(left, right):
        draw.text((at(x, low)[0], at(x, low)[1] + 6 * ZOOM), f"{x:g}", fill="black", font=font, anchor="mt")
    middle = (at((left + right) / 2, low)[0], (HEIGHT - 16) * ZOOM)
    draw.text(middle, across, fill="black", font=font, anchor="mt")
    draw.text((4 * ZOOM, 2 * ZOOM), up, fill="black", font=font)
    for i, (name, curve) in enumerate(curves.items()):
        share = (i + 1) / len(curves)
        colour = tuple(round(235 + share * (end - 235)) for end in (20, 60, 130))
        draw.line([at(*point) for point in curve], fill=colour, width=2 * ZOOM, joint="curve")
        for x, y in [at(*point) for point in curve] if len(curve) < 20 else []:
            draw.ellipse((x - 3 * ZOOM, y - 3 * ZOOM, x + 3 * ZOOM, y + 3 * ZOOM), fill=colour)
        draw.text(((WIDTH - RIGHT + 10) * ZOOM, (20 + 18 * i) * ZOOM), name, fill=colour, font=font)
    return picture.resize((WIDTH, HEIGHT), Image.BOX)


def by_group(rows: list[dict[str, str]], shown: int) -> Image.Image:
    """The rows of log.csv that were measured; `shown` of them are drawn, evenly spaced, back from the last."""
    groups = [name for name in rows[0] if name.startswith("val_group_")]
    rows = rows[:: -max(1, len(rows) // shown)][:shown][::-1]
    curves = {f"step {row['step']}": [(i + 1, float(row[name])) for i, name in enumerate(groups)] for row in rows}
    return panel(curves, "group of tokens", "held-out nats per token", low=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path)
    parser.add_argument("--out", default="loss_by_group.png")
    parser.add_argument("--shown", type=int, default=5, help="moments of the training (default: 5)")
    args = parser.parse_args()
    with open(args.log, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("val_group_0")]
    if not rows:
        raise ValueError(f"{args.log}: no row has val_group_0; was the training given --val?")
    by_group(rows, args.shown).save(args.out)
    last = rows[-1]
    groups = " ".join(f"{float(last[name]):.2f}" for name in last if name.startswith("val_group_"))
    print(f"step {last['step']}: {float(last['val_loss']):.3f} nats per token, by group {groups}")
    print(f"shuffled labels {float(last['val_shuffled']):.3f}, unigram {float(last['unigram']):.3f}", end=", ")
    print(f"unigram by position {float(last['unigram_by_position']):.3f}; {args.out}")


if __name__ == "__main__":
    dar.command_line(main)

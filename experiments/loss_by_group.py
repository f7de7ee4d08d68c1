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

WIDTH, HEIGHT, LEFT, BOTTOM, ZOOM = 640, 360, 50, 40, 2  # drawn ZOOM times as large and averaged down


def plot(rows: list[dict[str, str]], shown: int) -> Image.Image:
    """The rows of log.csv that were measured; `shown` of them are drawn, evenly spaced, back from the last."""
    groups = [name for name in rows[0] if name.startswith("val_group_")]
    rows = rows[:: -max(1, len(rows) // shown)][:shown][::-1]
    curves = {f"step {row['step']}": [float(row[name]) for name in groups] for row in rows}
    top = 1.1 * max(max(curve) for curve in curves.values())
    picture = Image.new("RGB", (WIDTH * ZOOM, HEIGHT * ZOOM), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13 * ZOOM)

    def at(x: float, y: float) -> tuple[float, float]:
        right = LEFT + x / max(len(groups) - 1, 1) * (WIDTH - LEFT - 130)
        return right * ZOOM, (HEIGHT - BOTTOM - y / top * (HEIGHT - BOTTOM - 20)) * ZOOM

    for y in range(int(top) + 1):
        draw.line([at(0, y), at(len(groups) - 1, y)], fill="#dddddd", width=ZOOM)
        draw.text((at(0, y)[0] - 10 * ZOOM, at(0, y)[1]), str(y), fill="black", font=font, anchor="rm")
    for x in range(len(groups)):
        draw.text((at(x, 0)[0], at(x, 0)[1] + 6 * ZOOM), str(x + 1), fill="black", font=font, anchor="mt")
    middle = (at((len(groups) - 1) / 2, 0)[0], (HEIGHT - 16) * ZOOM)
    draw.text(middle, "group of tokens", fill="black", font=font, anchor="mt")
    draw.text((4 * ZOOM, 2 * ZOOM), "held-out nats per token", fill="black", font=font)
    for i, (name, curve) in enumerate(curves.items()):
        share = (i + 1) / len(curves)
        colour = tuple(round(235 + share * (end - 235)) for end in (20, 60, 130))
        points = [at(x, y) for x, y in enumerate(curve)]
        draw.line(points, fill=colour, width=2 * ZOOM, joint="curve")
        for x, y in points:
            draw.ellipse((x - 3 * ZOOM, y - 3 * ZOOM, x + 3 * ZOOM, y + 3 * ZOOM), fill=colour)
        draw.text(((WIDTH - 120) * ZOOM, (20 + 18 * i) * ZOOM), name, fill=colour, font=font)
    return picture.resize((WIDTH, HEIGHT), Image.BOX)


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
    plot(rows, args.shown).save(args.out)
    last = rows[-1]
    by_group = " ".join(f"{float(last[name]):.2f}" for name in last if name.startswith("val_group_"))
    print(f"step {last['step']}: {float(last['val_loss']):.3f} nats per token, by group {by_group}")
    print(f"shuffled labels {float(last['val_shuffled']):.3f}, unigram {float(last['unigram']):.3f}", end=", ")
    print(f"unigram by position {float(last['unigram_by_position']):.3f}; {args.out}")


if __name__ == "__main__":
    dar.command_line(main)

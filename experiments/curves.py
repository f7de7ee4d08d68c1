"""README.md here, "What the shipped model is": what the trainings of a model measured as they went, from log.csv.

    python experiments/curves.py runs/flow/log.csv runs/tokenizer/log.csv runs/ar/log.csv --out assets/curves.png

One panel for the held-out PSNR of the tokenizer, whose trainings follow one another, and one for the loss of the Llama.
"""

import argparse
import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from loss_by_group import panel
from PIL import Image

import dar


def column(rows: list[dict[str, str]], name: str, start: float = 0) -> list[tuple[float, float]]:
    """(steps in thousands, value) of the rows that have one."""
    return [(start + int(row["step"]) / 1000, float(row[name])) for row in rows if row.get(name)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", type=Path, nargs="+", help="log.csv of the trainings, in their order")
    parser.add_argument("--out", default="curves.png")
    args = parser.parse_args()
    psnr, loss, start = {}, {}, 0.0
    for path in args.logs:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        if curve := column(rows, "val_psnr", start):
            psnr[path.parent.name] = curve
            start += int(rows[-1]["step"]) / 1000
        if curve := column(rows, "val_loss"):
            loss |= {"training": column(rows, "loss"), "held out": curve}
    panels = [panel(psnr, "thousands of steps", "held-out PSNR, dB")] if psnr else []
    panels += [panel(loss, "thousands of steps", "Llama, nats per token")] if loss else []
    if not panels:
        raise ValueError(f"{args.logs[0]}: no row has val_psnr or val_loss; was the training given --val?")
    picture = Image.new("RGB", (sum(p.width for p in panels), panels[0].height), "white")
    for i, one in enumerate(panels):
        picture.paste(one, (i * one.width, 0))
    picture.save(args.out)


if __name__ == "__main__":
    dar.command_line(main)

"""Beta, K and the group rule of the tokenizer, as the paper's Tables 6 and 7, at a small scale.

    python experiments/ablations.py --data cifar10/train --val cifar10/test --out runs/ablations

Trains the "tiny" recipe once for each row, 500 steps each (about eight minutes of one core), and
prints PSNR and code use over held-out images. A row that is there is not trained again, and one
that was interrupted goes on.
"""

import argparse
import contextlib
import subprocess
import sys
from pathlib import Path

import dar
import train_tokenizer
from common.cli import command_line, integer
from common.distributed import Processes, pick_device
from common.training import ImageData

# The words of each row's training. K below 8 is sampled in 8 steps, as in the paper's Table 7;
# otherwise S = K.
ROWS = {
    "β = 2, K = 8, ceil": "--seed 0",
    "the same with another seed": "--seed 1",
    "β = 1": "--set time_shift=1",
    "β = 4": "--set time_shift=4",
    "K = 1 (8 sampling steps)": "--set num_groups=1 num_steps=8",
    "K = 4 (8 sampling steps)": "--set num_groups=4 num_steps=8",
    "K = 16": "--set num_groups=16",
    "nearest rule": "--set group_rule=nearest",
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", required=True, help="folder with a sub-folder of images for each class")
    add("--val", required=True, help="the same, held out")
    add("--out", required=True, type=Path, help="folder for the runs")
    add("--steps", type=integer(1), default=500, help="of each training (default: 500)")
    add("--num", type=integer(1), default=2000, help="held-out images (default: 2000)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    device = pick_device(args.device)
    table = ["| | held-out PSNR, dB | codes seen |", "|---|---|---|"]
    for i, (name, changes) in enumerate(ROWS.items()):
        folder = args.out / f"row-{i}"
        words = [sys.executable, train_tokenizer.__file__, "--preset", "tiny"]
        words += ["--data", args.data, "--val", args.val, "--out", str(folder)]
        words += ["--steps", str(args.steps), "--warmup", str(args.steps // 5)]
        words += ["--codebook-warmup", str(args.steps * 2 // 5)]
        words += ["--device", args.device, *changes.split()]
        code = subprocess.run(words).returncode
        if code != 0:
            return code  # the training has said why

        tokenizer = dar.load_tokenizer(folder / "last.pt", device)
        data = ImageData(args.val, tokenizer.config.image_size, held_out=True)
        row = train_tokenizer.held_out(
            tokenizer, data, args.num, Processes(device), contextlib.nullcontext()
        )
        table.append(f"| {name} | {row['val_psnr']:.2f} | {row['val_code_use']:.1%} |")
        print(table[-1], flush=True)
    print("\n" + "\n".join(table))
    return 0


if __name__ == "__main__":
    command_line(main)

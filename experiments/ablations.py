"""README.md here, "Ablations": beta, K and the group rule of the tokenizer (Tables 6 and 7), at the tiny scale.

    python experiments/ablations.py --data cifar10/train --val cifar10/test --out runs/ablations

Trains the tiny recipe once for each row, 500 steps each (about eight minutes on one core with bfloat16), and prints the
table: PSNR and code use over held-out images. A row that is there is not trained again, and one that was interrupted
goes on.
"""

import argparse
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dar
import train_tokenizer
import training

# K < 8 is sampled in 8 steps, as in the paper's Table 7; otherwise S = K.
ROWS = {
    "β = 2, K = 8, ceil": "",
    "β = 1": "time_shift=1",
    "β = 4": "time_shift=4",
    "K = 1": "num_groups=1 num_steps=8",
    "K = 4": "num_groups=4 num_steps=8",
    "K = 16": "num_groups=16",
    "nearest rule": "group_rule=nearest",
    "β = 2, K = 8, ceil, another seed": "",
}


def main() -> int | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of training images, one sub-folder a class")
    parser.add_argument("--val", required=True, help="held-out images")
    parser.add_argument("--out", required=True, type=Path, help="folder for the runs")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--num", type=int, default=2000, help="held-out images that are measured (default: 2000)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    args = parser.parse_args()
    device, table = dar.pick_device(args.device), []
    for i, (name, fields) in enumerate(ROWS.items()):
        folder = args.out / f"row-{i}"
        words = ["--data", args.data, "--val", args.val, "--out", folder, "--steps", args.steps]
        words += ["--device", args.device, "--seed", int("seed" in name)] + (
            ["--set", *fields.split()] if fields else []
        )
        done = subprocess.run([sys.executable, train_tokenizer.__file__, *map(str, words)])
        if done.returncode:  # it has said why
            return done.returncode
        tokenizer = dar.load_tokenizer(folder / "last.pt", device)
        data = training.ImageData(args.val, tokenizer.config.image_size, held_out=True)
        found = train_tokenizer.held_out(tokenizer, data, args.num, device)
        table.append(f"| {name} | {found['val_psnr']:.2f} | {found['val_code_use']:.1%} |")
        print(table[-1], flush=True)
    print("\n| | held-out PSNR, dB | codes seen |\n|---|---|---|", *table, sep="\n")


if __name__ == "__main__":
    dar.command_line(main)

"""README.md here, "Previews": how much the preview after each group agrees with the picture that follows.

    python experiments/previews.py

Draws pictures as sample.py does, classes in turn, and prints for each group the PSNR of its preview against the
finished picture, for both solvers. The last line is what agreement by chance would be: finished pictures against
others of the same class.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tqdm import tqdm

import dar
import sample


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", default=str(sample.SHIPPED), help="Llama checkpoint that carries its tokenizer")
    parser.add_argument("--num", type=int, default=500, help="pictures (default: 500)")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--cfg", type=float, nargs=2, default=[4.0, 4.0])
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    args = parser.parse_args()
    device = dar.pick_device(args.device)
    ar = dar.load_ar(args.ckpt, device, torch.float32)
    classes, size = ar.config.num_classes, ar.tokenizer.config.group_size
    found = {"ab2": [], "euler": []}
    pictures, codes = [], []
    for start in tqdm(range(0, args.num, args.batch), unit="batch"):
        seeds = list(range(start, min(start + args.batch, args.num)))
        labels = torch.tensor([i % classes for i in seeds], device=device)
        noise = dar.initial_noise(seeds, ar.tokenizer.config.image_size, device)
        *_, last = dar.stream(ar, ar.tokenizer, labels, args.cfg, seeds, noise)
        codes.append(last.codes)
        pictures.append(last.x.clamp(-1, 1))
        for solver in found:
            picture = ar.tokenizer.decode(last.codes, noise, solver=solver).clamp(-1, 1)
            found[solver].append(
                torch.stack([dar.psnr(x, picture) for x in ar.tokenizer.previews(last.codes, noise, solver=solver)])
            )
    found = {solver: torch.cat(parts, 1).mean(1) for solver, parts in found.items()}  # [K]
    print(f"{args.num} pictures, guidance {args.cfg[0]} to {args.cfg[1]}; PSNR against the finished picture, dB")
    print("| tokens | " + " | ".join(found) + " |\n|---|---|---|")
    for k in range(len(found["ab2"])):
        print(f"| {size * (k + 1)} | " + " | ".join(f"{values[k]:.1f}" for values in found.values()) + " |")
    pictures = torch.cat(pictures)
    others = pictures.roll(-classes, 0)  # the next picture of the same class
    print(f"another picture of the class: {dar.psnr(pictures, others).mean():.1f}")


if __name__ == "__main__":
    dar.command_line(main)

"""README, "Train your own": which share of a Llama's samples look like the shape that was asked for.

    python experiments/judge.py runs/shapes-ar/last.pt

The judge has no weights. A picture looks like the training picture that it is nearest to, and is recognised if that is
of the class asked for and not far away: noise, too, is nearest to something. Rows: held-out originals, their
reconstructions, samples without guidance, samples with it. Columns: the share that is recognised, with that limit and
without it, and the mean PSNR to the nearest training picture.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

import dar
import training
from train_tokenizer import load_crops

NEAR = 18.0  # dB: noise has 7, a picture 16 to the nearest one of another class, and 34 or more to one of its own


def nearest(pictures: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the known pictures each is nearest to, int64 [n], and how near, PSNR in dB [n]."""
    found = torch.cdist(pictures.clamp(-1, 1).flatten(1), known.flatten(1)).argmin(1)
    return found, dar.psnr(pictures, known[found])


def draw(ar: dar.ARTransformer, labels: Tensor, cfg: float | None, seed: int) -> Tensor:
    """A sample of each label, float [n, 3, H, W]; picture i has the seed `seed` + i."""
    parts, start = [], seed
    for part in labels.split(100):
        *_, last = dar.stream(ar, ar.tokenizer, part, cfg=cfg, seeds=list(range(start, start + len(part))))
        parts.append(last.x)
        start += len(part)
    return torch.cat(parts)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="of a Llama trained on --data")
    parser.add_argument("--data", default="shapes", help="what it was trained on (default: the word 'shapes')")
    parser.add_argument("--num", type=int, default=500, help="pictures a row (default: 500)")
    parser.add_argument("--cfg", type=float, default=4.0, help="guidance of the last row (default: 4)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    dar.require(args.num >= 1, f"--num {args.num}: expected at least 1")
    ar = dar.prepare_for_sampling(dar.load_ar(args.checkpoint, dtype=torch.float32))
    data = training.ImageData(args.data, ar.tokenizer.config.image_size)
    val = training.ImageData(args.data, data.size, held_out=True)
    dar.require(data.class_names == ar.class_names, f"--data {args.data}: not the classes of {args.checkpoint}")
    known, truth = load_crops(data, range(len(data))), torch.from_numpy(data.labels)

    indices = [i % len(val) for i in range(args.num)]
    originals, shown = load_crops(val, indices), torch.from_numpy(val.labels)[indices]
    decoded = ar.tokenizer.decode(ar.tokenizer.encode(originals), dar.initial_noise(indices, data.size, "cpu"))
    asked = torch.arange(args.num) % len(data.class_names)
    rows = {"originals": (originals, shown), "reconstructions": (decoded, shown)}
    rows["samples, no guidance"] = draw(ar, asked, None, args.seed), asked
    rows[f"samples, guidance {args.cfg:g}"] = draw(ar, asked, args.cfg, args.seed), asked
    print(f"{'of ' + str(args.num):24} recognised  nearest  PSNR to it")
    for name, (pictures, labels) in rows.items():
        found, distance = nearest(pictures, known)
        right = truth[found] == labels
        share, near = right.double().mean(), (right & (distance >= NEAR)).double().mean()
        print(f"{name:24} {near:10.1%}  {share:7.1%}  {distance.mean():7.1f} dB")
    print(f"reconstructions: {dar.psnr(decoded, originals).mean():.2f} dB to their originals")


if __name__ == "__main__":
    dar.command_line(main)

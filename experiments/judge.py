"""Which share of a Llama's samples look like the shape that was asked for.

    python experiments/judge.py runs/shapes-ar/last.pt

The judge has no weights. A picture looks like the training picture that is nearest to it, and is
recognised if that is of the right class and not far away: noise, too, is nearest to something.
Rows: held-out originals, their reconstructions, samples without guidance, samples with it. Columns:
the share that is recognised, the share whose nearest picture is of the right class however far, and
the mean PSNR to it.
"""

import argparse

import torch
from torch import Tensor

import dar
from common.cli import command_line, integer, real
from common.images import psnr
from common.speed import prepare_for_sampling
from common.training import ImageData
from train_tokenizer import load_crops

# dB. Noise has 7, a picture 16 to the nearest one of another class, and 34 or more to one of its
# own.
NEAR = 18.0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoint", help="of a Llama trained on --data")
    add("--data", default="shapes", help="what it was trained on (default: shapes)")
    add("--num", type=integer(1), default=500, help="pictures a row (default: 500)")
    add("--cfg", type=real(0), default=4.0, help="guidance of the last row (default: 4)")
    add("--seed", type=integer(0), default=0, help="of the first sample (default: 0)")
    return parser.parse_args()


def draw(ar: dar.ARTransformer, labels: Tensor, cfg: float | None, seed: int) -> Tensor:
    """A sample of each label, float [n, 3, H, W]; the seeds count up from `seed`."""
    pictures = []
    for start in range(0, len(labels), 100):
        steps = list(dar.stream(ar, ar.tokenizer, labels[start : start + 100], cfg, seed + start))
        pictures.append(steps[-1].x)
    return torch.cat(pictures)


@torch.no_grad()
def main() -> None:
    args = parse_arguments()
    ar = prepare_for_sampling(dar.load_ar(args.checkpoint, dtype=torch.float32))
    if ar.tokenizer is None:
        raise ValueError(f"{args.checkpoint}: carries no tokenizer")
    size = ar.tokenizer.config.image_size
    data = ImageData(args.data, size)
    val = ImageData(args.data, size, held_out=True)
    if data.class_names != ar.class_names:
        raise ValueError(f"--data {args.data}: not the classes of {args.checkpoint}")
    known = load_crops(data, range(len(data)))
    known_labels = torch.from_numpy(data.labels)

    indices = [i % len(val) for i in range(args.num)]
    originals = load_crops(val, indices)
    labels = torch.from_numpy(val.labels)[indices]
    codes = ar.tokenizer.encode(originals)
    reconstructions = ar.tokenizer.decode(codes, dar.initial_noise(indices, size, codes.device))
    asked = torch.arange(args.num) % len(data.class_names)
    rows = [
        ("originals", originals, labels),
        ("reconstructions", reconstructions, labels),
        ("samples, no guidance", draw(ar, asked, None, args.seed), asked),
        (f"samples, guidance {args.cfg:g}", draw(ar, asked, args.cfg, args.seed), asked),
    ]

    print(f"{'of ' + str(args.num):24} recognised  nearest  PSNR to it")
    for name, pictures, wanted in rows:
        nearest = torch.cdist(pictures.clamp(-1, 1).flatten(1), known.flatten(1)).argmin(1)
        distance = psnr(pictures, known[nearest])
        is_right = known_labels[nearest] == wanted
        is_recognised = is_right & (distance >= NEAR)
        shares = f"{is_recognised.double().mean():10.1%}  {is_right.double().mean():7.1%}"
        print(f"{name:24} {shares}  {distance.mean():7.1f} dB")
    print(f"reconstructions: {psnr(reconstructions, originals).mean():.2f} dB to their originals")


if __name__ == "__main__":
    command_line(main)

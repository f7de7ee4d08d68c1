"""README.md here, "The released weights": how many of 64 pictures' tokens change at batch 1 instead of 16.

    python experiments/batch_size.py

The random numbers of a picture do not depend on its batch, but a matrix product's rounding does, and a token changes
where the two best of logits + Gumbel noise are closer than that. What matters is therefore the number of candidates
(16384 codes), the size of the logits, which rounding is relative to, the guidance that multiplies their errors, and
the number of tokens (256); the network only has to round like a Llama. So this is one with random weights, smaller
than B to fit a CPU, whose head is scaled until its distribution is as decided as a trained one's: an entropy of about
6.5 nats out of log 16384 = 9.7. Tokens behind the first change are not counted, as they follow from it.
"""

import argparse
import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tqdm import tqdm

import dar


def make_llama(width: int, layers: int, entropy: float) -> dar.ARTransformer:
    """Random weights whose layers all matter; the head's scale gives a mean entropy (nats) without guidance."""
    torch.manual_seed(0)
    ar = dar.ARTransformer(dar.ARConfig(width, layers)).eval()
    for name, weight in ar.named_parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=1.0 if "embedding" in name else weight.shape[1] ** -0.5)
    codes, labels = torch.randint(16384, (4, 255)), torch.arange(4)
    logits = ar(codes, labels).flatten(0, 1)
    low, high = 0.0, 20.0
    for _ in range(20):
        scale = (low + high) / 2
        found = torch.distributions.Categorical(logits=scale * logits).entropy().mean()
        low, high = (scale, high) if found > entropy else (low, scale)
    ar.output.weight.mul_(scale)
    print(f"entropy {found:.2f} nats, standard deviation of the logits {(scale * logits).std():.2f}")
    return ar


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=64, help="pictures (default: 64)")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--entropy", type=float, default=6.5, help="of the next token, nats (default: 6.5)")
    parser.add_argument("--cfg", type=float, nargs=2, default=[1.1, 8.0])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    args = parser.parse_args()
    device, ar = dar.pick_device(args.device), make_llama(args.width, args.layers, args.entropy)
    labels = torch.arange(args.num, device=device) % 1000
    for name in args.dtypes:
        llama = copy.deepcopy(ar).to(device, getattr(torch, name))
        drawn, llama = {}, dar.prepare_for_sampling(llama)  # as sample.py draws
        for batch in (16, 1):
            parts = tqdm(range(0, args.num, batch), desc=f"{name}, batch {batch}", unit="batch")
            cut = ((labels[i : i + batch], list(range(i, min(i + batch, args.num)))) for i in parts)
            drawn[batch] = torch.cat([llama.generate(which, cfg=tuple(args.cfg), seeds=seeds) for which, seeds in cut])
        changed = (drawn[16] != drawn[1]).int()
        pictures = changed.any(1)
        print(
            f"{name}: {int(pictures.sum())} of {args.num} pictures change between batch 16 and 1; first changes at "
            f"tokens {changed.argmax(1)[pictures].tolist()}",
            flush=True,
        )


if __name__ == "__main__":
    dar.command_line(main)

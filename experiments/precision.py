"""README.md here, "The released weights": what bfloat16 weights change, against float32.

    python experiments/precision.py --data cifar10/test                    (the model that ships here)
    python experiments/precision.py --ckpt D-AR-L-360K.pt --tokenizer D-AR-tokenizer_v1.pt --data imagenet/val --num 64

Four questions, each with everything else equal: how many codes of an image change, how far its reconstruction from the
same codes moves, how far the Llama's distribution of the next token moves (KL divergence; share of most likely tokens
that change), and what that does to held-out loss.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F

import dar
import training

SHIPPED = Path(__file__).resolve().parent.parent / "checkpoints" / "cifar10.pt"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", default=SHIPPED)
    parser.add_argument("--tokenizer", help="where the Llama's file carries none")
    parser.add_argument("--data", required=True, help="folder of images, a sub-folder a class, or 'shapes'")
    parser.add_argument("--num", type=int, default=500, help="images (default: 500)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    args = parser.parse_args()
    device, models = dar.pick_device(args.device), {}
    for dtype in (torch.float32, torch.bfloat16):
        tokenizer = dar.load_tokenizer(args.tokenizer, device, dtype) if args.tokenizer else None
        models[dtype] = dar.load_ar(args.ckpt, device, dtype, tokenizer=tokenizer)
    data = training.ImageData(args.data, models[torch.float32].tokenizer.config.image_size, held_out=True)
    order = np.random.default_rng(0).permutation(len(data))[: args.num]
    sums = torch.zeros(5, dtype=torch.float64)
    for indices in np.array_split(order, max(1, len(order) // 25)):
        size = models[torch.float32].tokenizer.config.image_size
        crops = np.stack([np.array(dar.center_crop(data.image(i), size)) for i in indices])
        images = dar.to_float(torch.from_numpy(crops).permute(0, 3, 1, 2)).to(device)
        labels = torch.tensor([data.labels[i] for i in indices], device=device)
        noise = dar.initial_noise(indices.tolist(), size, device)
        codes, decoded, logits = {}, {}, {}
        for dtype, ar in models.items():
            codes[dtype] = ar.tokenizer.encode(images)
            decoded[dtype] = ar.tokenizer.decode(codes[torch.float32], noise)
            logits[dtype] = ar(codes[torch.float32][:, :-1], labels).flatten(0, 1)
        (c32, c16), (x32, x16), (l32, l16) = codes.values(), decoded.values(), logits.values()
        found = [
            (c32 != c16).double().mean(),
            dar.psnr(x16, x32.clamp(-1, 1)).mean(),
            F.kl_div(l16.log_softmax(-1), l32.log_softmax(-1), reduction="batchmean", log_target=True),
            (l32.argmax(-1) != l16.argmax(-1)).double().mean(),
            F.cross_entropy(l16, c32.flatten()) - F.cross_entropy(l32, c32.flatten()),
        ]
        sums += torch.stack([value.double().cpu() for value in found]) * len(indices)
    changed, close, divergence, likeliest, loss = (sums / len(order)).tolist()
    print(f"{len(order)} images, bfloat16 against float32:")
    print(f"  codes of an image that change                     {changed:.2%}")
    print(f"  reconstructions of the same codes: PSNR between   {close:.1f} dB")
    print(f"  next token: KL divergence                         {divergence:.1e} nats")
    print(f"  next token: the most likely one changes           {likeliest:.2%}")
    print(f"  held-out loss                                     {loss:+.1e} nats per token")


if __name__ == "__main__":
    dar.command_line(main)

"""What a tokenizer gives back of held-out images, and what bfloat16 weights change.

    python experiments/reconstruction.py --data cifar10/test --picture assets/reconstructions.png
    python experiments/reconstruction.py --data cifar10/test --num 500 --bfloat16

The first prints for both solvers the PSNR of the preview after each step of the flow, to the image
and to the finished picture, and the share of the codebook in use. --picture also writes some
originals with their previews and reconstructions.

The second compares bfloat16 weights with float32, all else equal: how many codes of an image
change, how far the reconstruction from the same codes moves, how far the Llama's distribution of
the next token moves, and what that does to its loss.
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import dar
from common.cli import command_line, integer
from common.distributed import pick_device
from common.images import psnr
from common.training import ImageData
from sample import SHIPPED, output_file
from train_tokenizer import load_crops, reconstruction_picture


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ckpt", default=SHIPPED, help="tokenizer, or Llama with one (default: the shipped model)")
    add("--tokenizer", help="for --bfloat16, where the Llama's file carries none")
    add("--data", required=True, help="folder with a sub-folder of images for each class")
    add("--num", type=integer(1), default=1000, help="images (default: 1000)")
    add("--picture", type=output_file(".png"), help="also draw previews there")
    add("--bfloat16", action="store_true", help="compare bfloat16 weights with float32")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    return parser.parse_args()


def choose_images(data: ImageData, num: int) -> list[np.ndarray]:
    """The indices of the images that a training measures, in batches of 50 and fewer."""
    order = np.random.default_rng(0).permutation(len(data))[:num]
    return [order[start : start + 50] for start in range(0, len(order), 50)]


# ------------------------------------------------------------------------------
# Previews


@torch.no_grad()
def show_previews(args: argparse.Namespace, device: torch.device) -> None:
    tokenizer = dar.load_tokenizer(args.ckpt, device, torch.float32)
    config = tokenizer.config
    data = ImageData(args.data, config.image_size, held_out=True)
    if args.picture is not None:
        reconstruction_picture(tokenizer, data, device).save(args.picture)

    used = torch.zeros(config.codebook_size, dtype=torch.bool, device=device)
    previews = {"ab2": [], "euler": []}  # PSNR to image and to finished picture, [steps, 2, batch]
    finished = {"ab2": [], "euler": []}  # PSNR to image, [batch]
    for indices in tqdm(choose_images(data, args.num), unit="batch"):
        images = load_crops(data, indices).to(device)
        noise = dar.initial_noise(indices.tolist(), config.image_size, device)
        codes = tokenizer.encode(images)
        used[codes] = True
        for solver in previews:
            last = dar.decode_steps(tokenizer, codes, noise, None, solver)[-1]
            picture = last.x.clamp(-1, 1)
            finished[solver].append(psnr(picture, images))
            rows = [torch.stack([psnr(x, images), psnr(x, picture)]) for x in last.previews]
            previews[solver].append(torch.stack(rows))

    print("PSNR, dB         ab2                  euler")
    print("preview          to image   finished  to image   finished")
    means = [torch.cat(batches, 2).mean(2) for batches in previews.values()]  # [steps, 2] each
    for step, row in enumerate(torch.cat(means, 1).tolist(), start=1):
        numbers = "   ".join(f"{value:8.2f}" for value in row)
        print(f"after step {step:<4}  {numbers}")
    for solver, batches in finished.items():
        print(f"finished pictures, {solver}: {torch.cat(batches).mean():.2f} dB")
    count = min(args.num, len(data))
    print(f"{count} images; {used.double().mean():.1%} of the {config.codebook_size} codes seen")


# ------------------------------------------------------------------------------
# bfloat16


def compare(float32: dar.ARTransformer, bfloat16: dar.ARTransformer, images, labels, noise):
    """Both models, with their tokenizers, on the same images -> what differs, float64 [5]."""
    codes = float32.tokenizer.encode(images)
    changed = codes != bfloat16.tokenizer.encode(images)
    decoded = float32.tokenizer.decode(codes, noise).clamp(-1, 1)
    difference = psnr(bfloat16.tokenizer.decode(codes, noise), decoded)

    logits = float32(codes[:, :-1], labels).flatten(0, 1)
    rounded = bfloat16(codes[:, :-1], labels).flatten(0, 1)
    divergence = F.kl_div(
        rounded.log_softmax(-1), logits.log_softmax(-1), reduction="batchmean", log_target=True
    )
    likeliest_changed = logits.argmax(-1) != rounded.argmax(-1)
    loss = F.cross_entropy(rounded, codes.flatten()) - F.cross_entropy(logits, codes.flatten())
    differences = [changed, difference, divergence, likeliest_changed, loss]
    return torch.stack([value.double().mean().cpu() for value in differences])


def load_model(args: argparse.Namespace, device, dtype: torch.dtype) -> dar.ARTransformer:
    tokenizer = None
    if args.tokenizer is not None:
        tokenizer = dar.load_tokenizer(args.tokenizer, device, dtype)
    ar = dar.load_ar(args.ckpt, device, dtype, tokenizer)
    if ar.tokenizer is None:
        raise ValueError(f"{args.ckpt}: carries no tokenizer; give its own as --tokenizer FILE")
    return ar


@torch.no_grad()
def show_bfloat16(args: argparse.Namespace, device: torch.device) -> None:
    float32 = load_model(args, device, torch.float32)
    bfloat16 = load_model(args, device, torch.bfloat16)
    size = float32.tokenizer.config.image_size
    data = ImageData(args.data, size, held_out=True)
    total = torch.zeros(5, dtype=torch.float64)
    count = 0
    for indices in tqdm(choose_images(data, args.num), unit="batch"):
        images = load_crops(data, indices).to(device)
        labels = torch.from_numpy(data.labels[indices]).to(device)
        noise = dar.initial_noise(indices.tolist(), size, device)
        total += compare(float32, bfloat16, images, labels, noise) * len(indices)
        count += len(indices)
    changed, difference, divergence, likeliest_changed, loss = (total / count).tolist()
    print(f"{count} images, bfloat16 against float32")
    print(f"codes of an image that change                     {changed:.2%}")
    print(f"reconstructions of the same codes: PSNR between   {difference:.1f} dB")
    print(f"next token: KL divergence                         {divergence:.1e} nats")
    print(f"next token: the likeliest one changes             {likeliest_changed:.2%}")
    print(f"held-out loss                                     {loss:+.1e} nats per token")


def main() -> None:
    args = parse_arguments()
    device = pick_device(args.device)
    if args.bfloat16:
        show_bfloat16(args, device)
    else:
        show_previews(args, device)


if __name__ == "__main__":
    command_line(main)

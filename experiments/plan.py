"""What a training needs, before a GPU is at hand: memory, time and size of its checkpoint.

    python experiments/plan.py v1 --batch 1024 --gpus 8 --gpu A100-80
    python experiments/plan.py XL --batch 1024 --gpus 16 --gpu H100-80

The networks are run on tensors without memory, and what they keep and compute is counted
(common/plan.py). Times are what the counts take if matrix products reach 75% of the GPU's peak in
bfloat16, attention 45%, and all other operations 80% of its memory's bandwidth, without waiting for
data or for other GPUs. These shares are assumed. No GPU has run this code yet.
"""

import argparse
from typing import NamedTuple

import torch

import dar
import train_ar
import train_tokenizer
from common.cli import command_line, integer
from common.plan import ar_cost, needed_bytes, tokenizer_cost, weights_bytes


class GPU(NamedTuple):
    """Peaks from its data sheet, without sparsity."""

    memory: float  # GB of 10^9 bytes that a program may use
    bfloat16: float  # TFLOP/s
    tf32: float  # TFLOP/s
    bandwidth: float  # TB/s


GPUS = {
    "A100-80": GPU(79, 312, 156, 2.0),
    "A100-40": GPU(39, 312, 156, 1.56),
    "H100-80": GPU(79, 989, 494, 3.35),
    "RTX4090-24": GPU(23.5, 165, 82, 1.01),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names = [*train_tokenizer.RECIPES, *train_ar.RECIPES]
    add("preset", choices=sorted(set(names)), help="of train_tokenizer.py or train_ar.py")
    add("--llama", action="store_true", help="of a name that both have, train_ar.py's")
    add("--batch", type=integer(1), help="images a step (default: the recipe's)")
    add("--gpus", type=integer(1), default=8, help="how many (default: 8)")
    add("--gpu", choices=list(GPUS), default="A100-80", help="which (default: A100-80)")
    add("--images", type=integer(1), default=1_281_167, help="in the data (default: ImageNet's)")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    gpu = GPUS[args.gpu]
    is_llama = args.llama or args.preset not in train_tokenizer.RECIPES
    if is_llama:
        recipe = train_ar.RECIPES[args.preset]
        config = dar.AR_PRESETS[args.preset]
        cost = ar_cost(config)
        with torch.device("meta"):
            model = dar.ARTransformer(config)
    else:
        recipe = train_tokenizer.RECIPES[args.preset]
        config = dar.TOKENIZER_PRESETS[args.preset]
        cost = tokenizer_cost(config, recipe["times"], recipe["lpips"] > 0, recipe["repa"] > 0)
        with torch.device("meta"):
            model = dar.SequentialDiffusionTokenizer(config)
    batch = args.batch or recipe["batch"]
    steps = recipe.get("steps") or round(recipe["epochs"] * args.images / batch)
    parameters = sum(p.numel() for p in model.parameters())
    weights = weights_bytes(model, ema=not is_llama) / 1e9  # GB
    per_image = cost.saved / 1e9

    print(f"{args.preset}: {parameters / 1e6:.0f}M parameters")
    print(f"batch {batch} on {args.gpus} {args.gpu}")
    print(f"weights, gradients, moments, averages   {weights:6.1f} GB")
    print(f"kept for the backward pass, an image    {per_image:6.2f} GB")
    images_per_gpu = batch // args.gpus
    fits = [n for n in range(1, images_per_gpu + 1) if images_per_gpu % n == 0]
    fits = [n for n in fits if needed_bytes(model, not is_llama, cost, n) < 1e9 * gpu.memory]
    if not fits:
        print(f"does not fit: {gpu.memory} GB, even with --micro-batch 1")
        return
    micro_batch = max(n for n in fits)
    wanted = recipe.get("micro_batch")
    if wanted in fits:
        micro_batch = wanted
    used = needed_bytes(model, not is_llama, cost, micro_batch) / 1e9
    print(f"memory with --micro-batch {micro_batch:<4d}          {used:6.1f} of {gpu.memory} GB")
    print(f"largest --micro-batch that fits         {max(fits):6d}")

    flops = cost.products + cost.attention + cost.float32
    print(f"work of a step                          {flops * batch / 1e15:6.2f} PFLOP")
    seconds = cost.products / (0.75 * gpu.bfloat16 * 1e12)
    seconds += cost.attention / (0.45 * gpu.bfloat16 * 1e12)
    seconds += cost.float32 / (0.75 * gpu.tf32 * 1e12)
    eager = seconds + cost.moved / (0.8 * gpu.bandwidth * 1e12)
    compiled = seconds + cost.moved / 2 / (0.8 * gpu.bandwidth * 1e12)
    for name, image in (("eager", eager), ("--compile", compiled)):
        share = flops / image / (gpu.bfloat16 * 1e12)
        step = image * images_per_gpu
        days = step * steps / 86400
        print(
            f"{name:10s} {image * micro_batch:6.3f} s a micro-batch, {step:6.2f} s a step, "
            f"{days:5.1f} days for {steps} steps, {share:.0%} of the peak"
        )
    copies = 3 if is_llama else 4
    print(f"last.pt                                 {copies * 4 * parameters / 1e9:6.1f} GB")


if __name__ == "__main__":
    command_line(main)

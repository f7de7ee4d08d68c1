"""README.md here, "What the shipped model is": Tables 2, 4 and 5 at CIFAR-10's size, judged by a classifier.

    python experiments/classifier.py --data cifar10/train --val cifar10/test --out runs/judge.pt --seed 1
    python experiments/cifar10_tables.py --classifier runs/judge.pt --train cifar10/train --test cifar10/test

For every set of pictures: how many look like their class to the classifier, the Frechet distance of its penultimate
features to the test set's (fid.frechet_distance; not Inception features, so this is no FID), precision and recall in
the same features. Picture i has class i % 10 and seed i; weights are in sample.py's default dtype.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import classifier
import torch
from tqdm import tqdm

import dar
import fid
import sample
import training

GUIDANCE = {"none": None, "2": (2.0, 2.0), "4": (4.0, 4.0), "8": (8.0, 8.0), "1.1 → 8": (1.1, 8.0)}
SHOWN = "4"  # sample.py's default, of which Table 5 shows the parts
SOLVERS = {"4": (4, "euler"), "8": (8, "euler"), "8, Adams 2nd": (8, "ab2"), "12": (12, "euler"), "16": (16, "euler")}


class Judge:
    """Prints a row of a table for a set of uint8 images [n, 3, 32, 32] and the classes that they should look like."""

    def __init__(self, model: classifier.Classifier, images: torch.Tensor):
        self.model = model
        _, self.features = classifier.judge(model, images)
        self.reference = self.gaussian(self.features)

    @staticmethod
    def gaussian(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        count, mean, square = fid.moments(features)
        return mean, square / (count - 1)

    def row(self, name: str, images: torch.Tensor, labels: torch.Tensor, more: str = "") -> None:
        guesses, features = classifier.judge(self.model, images)
        distance = fid.frechet_distance(*self.gaussian(features), *self.reference)
        precision, recall = fid.precision_recall(self.features, features)
        right = (guesses == labels).float().mean()
        print(f"| {name} | {right:.1%} | {distance:.2f} | {precision:.2f} | {recall:.2f} |{more}", flush=True)


@torch.no_grad()
def generate(ar, cfg, num: int, batch: int, name: str) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Pictures after each group of tokens, previews and the finished ones last, each uint8 [num, 3, H, W]; classes."""
    labels, shown = torch.arange(num) % ar.config.num_classes, []
    for start in tqdm(range(0, num, batch), desc=name, unit="batch", dynamic_ncols=True, leave=False):
        seeds = list(range(start, min(start + batch, num)))
        steps = list(dar.stream(ar, ar.tokenizer, labels[seeds].to(ar.output.weight.device), cfg, seeds))
        shown.append([dar.to_uint8(x).cpu() for x in [*(step.preview for step in steps[:-1]), steps[-1].x]])
    return [torch.cat(parts) for parts in zip(*shown)], labels


@torch.no_grad()
def reconstruct(tokenizer, images: torch.Tensor, batch: int, solvers: dict) -> dict[str, torch.Tensor]:
    """uint8 images -> {name of the solver: what comes back}; noise from the image's number."""
    found, device = {name: [] for name in solvers}, tokenizer.quantize.embedding.weight.device
    for start in tqdm(
        range(0, len(images), batch), desc="reconstructing", unit="batch", dynamic_ncols=True, leave=False
    ):
        part = dar.to_float(images[start : start + batch]).to(device)
        codes = tokenizer.encode(part)
        noise = dar.initial_noise(list(range(start, start + len(part))), part.shape[-1], device)
        for name, (steps, solver) in solvers.items():
            found[name].append(dar.to_uint8(tokenizer.decode(codes, noise, steps, solver)).cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", default=str(sample.SHIPPED), help="Llama checkpoint that carries its tokenizer")
    parser.add_argument("--classifier", required=True, help="what experiments/classifier.py wrote")
    parser.add_argument("--train", required=True, help="folder with one sub-folder of images a class")
    parser.add_argument("--test", required=True, help="the same, held out")
    parser.add_argument("--num", type=int, default=10_000, help="pictures in each set (default: 10000)")
    parser.add_argument("--tables", nargs="+", default=["2", "4", "5"], choices=["2", "4", "5"])
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    args = parser.parse_args()
    if args.num < 500:
        raise ValueError(f"--num {args.num}: expected at least 500; 256 features need more images than dimensions")
    device = dar.pick_device(args.device)
    model = classifier.load_classifier(args.classifier, device)
    ar = dar.load_ar(args.ckpt, device, torch.bfloat16 if dar.has_fast_bfloat16(device) else torch.float32)
    dar.prepare_for_sampling(ar)
    test, train = training.ImageData(args.test, 32, held_out=True), training.ImageData(args.train, 32)
    if not ar.class_names == test.class_names == train.class_names:
        raise ValueError(f"{args.ckpt}, {args.test} and {args.train} do not have the same classes")
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[: args.num]
    images, labels = classifier.all_images(test)[order], torch.from_numpy(test.labels)[order]
    judge, shown = Judge(model, images), None
    head = "| look like their class | Fréchet distance | precision | recall |"
    if "2" in args.tables:
        found = reconstruct(ar.tokenizer, images, args.batch, SOLVERS)
        print(f"\n| {len(images)} images {head} PSNR |\n|---|---|---|---|---|---|")
        judge.row("test set", images, labels, " |")
        others = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[: args.num]
        judge.row("train set", classifier.all_images(train)[others], torch.from_numpy(train.labels)[others], " |")
        for name, pictures in found.items():
            parts = zip(pictures.split(1000), images.split(1000))
            psnr = torch.cat([dar.psnr(dar.to_float(a), dar.to_float(b)) for a, b in parts]).mean()
            judge.row(f"Table 2: reconstructions, {name}", pictures, labels, f" {psnr:.2f} |")
    if "4" in args.tables:
        print(f"\n| Table 4: guidance {head}\n|---|---|---|---|---|")
    for name, cfg in GUIDANCE.items():
        if "4" in args.tables or ("5" in args.tables and name == SHOWN):
            pictures, classes = generate(ar, cfg, args.num, args.batch, name)
            if "4" in args.tables:
                judge.row(name, pictures[-1], classes)
            shown = pictures if name == SHOWN else shown
    if "5" in args.tables:
        print(f"\n| Table 5: tokens, guidance {SHOWN} {head}\n|---|---|---|---|---|")
        for k, pictures in enumerate(shown, 1):
            judge.row(str(k * ar.tokenizer.config.group_size), pictures, torch.arange(args.num) % ar.config.num_classes)


if __name__ == "__main__":
    dar.command_line(main)

"""The paper's Tables 2, 4 and 5 at CIFAR-10's size, judged by a small classifier.

    python experiments/classifier.py --data cifar10/train --val cifar10/test --out runs/judge.pt
    python experiments/cifar10_tables.py --judge runs/judge.pt --train cifar10/train \\
        --test cifar10/test --num 3000

For each set of pictures: how many look like their class to the judge; the Fréchet distance of its
features to the test set's (no FID, whose features are Inception's); precision and recall in the
same features. Picture i is of class i % 10 and has the seed i; weights are in the dtype that
sample.py would take.
"""

import argparse

import torch
from classifier import Classifier, classify, load_classifier, read_images
from torch import Tensor
from tqdm import tqdm

import dar
import fid
from common.cli import command_line, integer
from common.distributed import pick_device
from common.images import psnr, to_float, to_uint8
from common.speed import pick_dtype, prepare_for_sampling
from common.training import ImageData
from sample import SHIPPED

GUIDANCE = {"none": None, "2": 2.0, "4": 4.0, "8": 8.0, "1.1 → 8": (1.1, 8.0)}
SHOWN = "4"  # sample.py's default: the guidance of Table 5
SOLVERS = {  # of Table 2: steps and solver
    "4": (4, "euler"),
    "8": (8, "euler"),
    "8, Adams 2nd": (8, "ab2"),
    "12": (12, "euler"),
    "16": (16, "euler"),
}
BATCH = 100  # pictures at once
COLUMNS = "look like their class | Fréchet distance | precision | recall"


class Judge:
    """Judges sets of pictures beside the reference, uint8 images [n, 3, 32, 32]."""

    def __init__(self, model: Classifier, reference: Tensor):
        self.model = model
        _, self.features = classify(model, reference)
        self.gaussian = fid.mean_and_covariance(self.features)

    def table_row(self, name: str, images: Tensor, labels: Tensor) -> str:
        """The row for uint8 images [n, 3, 32, 32] that should look like the classes int64 [n]."""
        guesses, features = classify(self.model, images)
        right = (guesses == labels).double().mean()
        gaussian = fid.mean_and_covariance(features)
        distance = fid.frechet_distance(*gaussian, *self.gaussian)
        precision, recall = fid.precision_recall(self.features, features)
        return f"| {name} | {right:.1%} | {distance:.2f} | {precision:.2f} | {recall:.2f} |"


@torch.no_grad()
def generate(ar: dar.ARTransformer, cfg, num: int, name: str) -> tuple[list[Tensor], Tensor]:
    """What can be shown after each group of tokens, previews and in the end the pictures, each
    uint8 [num, 3, H, W]; and the classes, int64 [num]."""
    labels = torch.arange(num) % ar.config.num_classes
    batches = []
    for start in tqdm(range(0, num, BATCH), desc=f"guidance {name}", unit="batch", leave=False):
        part = labels[start : start + BATCH].to(ar.output.weight.device)
        steps = list(dar.stream(ar, ar.tokenizer, part, cfg, seeds=start))
        shown = [step.preview for step in steps[:-1]] + [steps[-1].x]
        batches.append([to_uint8(x).cpu() for x in shown])
    return [torch.cat(parts) for parts in zip(*batches)], labels


@torch.no_grad()
def reconstruct(tokenizer, images: Tensor, steps: int, solver: str, device) -> Tensor:
    """uint8 images [n, 3, H, W] -> what comes back; an image's noise is its number's."""
    pictures = []
    for start in tqdm(range(0, len(images), BATCH), desc=solver, unit="batch", leave=False):
        part = to_float(images[start : start + BATCH]).to(device)
        seeds = list(range(start, start + len(part)))
        noise = dar.initial_noise(seeds, part.shape[-1], device)
        codes = tokenizer.encode(part)
        decoded = tokenizer.decode(codes, noise, steps, solver)
        pictures.append(to_uint8(decoded).cpu())
    return torch.cat(pictures)


def draw_at_random(data: ImageData, num: int) -> tuple[Tensor, Tensor]:
    """num of the images, uint8 [num, 3, 32, 32], and their classes."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:num]
    return read_images(data, order), torch.from_numpy(data.labels)[order]


def print_header(first: str, more: str = "") -> None:
    header = f"| {first} | {COLUMNS} |{more}"
    print("\n" + header)
    print("|" + "---|" * (header.count("|") - 1), flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ckpt", default=SHIPPED, help="a Llama with its tokenizer (default: the one that ships)")
    add("--judge", required=True, help="what experiments/classifier.py wrote")
    add("--train", required=True, help="folder with a sub-folder of images for each class")
    add("--test", required=True, help="the same, held out")
    # 256 features need more pictures than dimensions.
    add("--num", type=integer(500), default=3000, help="pictures in each set (default: 3000)")
    add("--tables", nargs="+", default=["2", "4", "5"], choices=["2", "4", "5"])
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    device = pick_device(args.device)
    ar = prepare_for_sampling(dar.load_ar(args.ckpt, device, pick_dtype("auto", device)))
    test = ImageData(args.test, 32, held_out=True)
    train = ImageData(args.train, 32)
    if not ar.class_names == test.class_names == train.class_names:
        raise ValueError(f"{args.ckpt}, {args.test} and {args.train}: not the same classes")
    images, labels = draw_at_random(test, args.num)
    judge = Judge(load_classifier(args.judge, device), images)

    if "2" in args.tables:
        print_header(f"Table 2: steps, {len(images)} images", " PSNR |")
        print(judge.table_row("test set", images, labels), "|")
        others, other_labels = draw_at_random(train, args.num)
        print(judge.table_row("train set", others, other_labels), "|", flush=True)
        for name, (steps, solver) in SOLVERS.items():
            pictures = reconstruct(ar.tokenizer, images, steps, solver, device)
            mean = psnr(to_float(pictures), to_float(images)).mean()
            print(judge.table_row(name, pictures, labels), f"{mean:.2f} |", flush=True)

    if "4" in args.tables:
        print_header(f"Table 4: guidance, {args.num} pictures")
        for name, cfg in GUIDANCE.items():
            shown, classes = generate(ar, cfg, args.num, name)
            print(judge.table_row(name, shown[-1], classes), flush=True)

    if "5" in args.tables:
        print_header(f"Table 5: tokens, {args.num} pictures, guidance {SHOWN}")
        shown, classes = generate(ar, GUIDANCE[SHOWN], args.num, SHOWN)
        for k, pictures in enumerate(shown, start=1):
            tokens = k * ar.tokenizer.config.group_size
            print(judge.table_row(str(tokens), pictures, classes))


if __name__ == "__main__":
    command_line(main)

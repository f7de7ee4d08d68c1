"""A small classifier for 32x32 pixels, which judges whether pictures look like their class.

    python experiments/classifier.py --data cifar10/train --val cifar10/test --out runs/judge.pt

Trains it and prints its accuracy on the held-out images. cifar10_tables.py asks it for the class of
a picture, and takes its penultimate features in place of Inception's. That gives no FID, and
numbers from two judges must not be compared.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import dar
from common.cli import command_line, integer, real
from common.distributed import pick_device
from common.files import write_atomically
from common.images import to_float, to_uint8
from common.training import ImageData
from train_tokenizer import load_crops


def conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Classifier(nn.Module):
    """A residual network of eight convolutions, 1.6M parameters."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.body = nn.Sequential(
            conv(3, 32),
            conv(32, 64),
            nn.AvgPool2d(2),
            Residual(conv(64, 64), conv(64, 64)),
            conv(64, 128),
            nn.AvgPool2d(2),
            conv(128, 256),
            nn.AvgPool2d(2),
            Residual(conv(256, 256), conv(256, 256)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(256, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, 32, 32] in [-1, 1] -> logits [B, classes] and features [B, 256]."""
        features = self.body(x)
        return self.head(features), features


def load_classifier(path: str | Path, device: torch.device) -> Classifier:
    """A trained classifier, in eval mode. Raises OSError or ValueError naming the file."""
    state = dar.read_checkpoint(path)
    if "head.bias" not in state:
        raise ValueError(f"{path}: no classifier; python experiments/classifier.py makes one")
    model = Classifier(len(state["head.bias"]))
    try:
        model.load_state_dict(state)
    except RuntimeError:
        raise ValueError(f"{path}: a classifier of another shape; train it anew") from None
    return model.eval().to(device)


@torch.no_grad()
def classify(model: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 images [n, 3, 32, 32] -> the class that each looks like [n], and features [n, 256], on
    the CPU."""
    device = model.head.weight.device
    guesses = []
    features = []
    for part in images.split(500):
        logits, part_features = model(to_float(part).to(device))
        guesses.append(logits.argmax(1).cpu())
        features.append(part_features.cpu())
    return torch.cat(guesses), torch.cat(features)


def read_images(data: ImageData, indices: Tensor) -> Tensor:
    """uint8 [n, 3, 32, 32]."""
    return torch.cat([to_uint8(load_crops(data, part)) for part in indices.split(1000)])


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image [B, 3, 32, 32] moved by up to four pixels, its border reflected, and mirrored half
    of the time."""
    count, _, height, width = images.shape
    padded = F.pad(images, (4, 4, 4, 4), mode="reflect")
    top = torch.randint(9, (count, 1, 1), generator=generator)
    left = torch.randint(9, (count, 1, 1), generator=generator)
    mirror = torch.randint(2, (count, 1, 1), generator=generator) == 1
    rows = top + torch.arange(height)[:, None]  # [B, 32, 1]
    columns = left + torch.arange(width)  # [B, 1, 32]
    columns = torch.where(mirror, columns.flip(2), columns)
    image = torch.arange(count)[:, None, None]
    return padded[image, :, rows, columns].permute(0, 3, 1, 2)


def learning_rate(step: int, steps: int, highest: float) -> float:
    """Up for a fifth of the steps, then down to 0 as a cosine."""
    done = step / steps
    rising = 5 * done
    falling = 0.5 + 0.5 * math.cos(math.pi * (done - 0.2) / 0.8)
    return highest * min(rising, falling)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", required=True, help="folder with a sub-folder of images for each class")
    add("--val", required=True, help="the same, held out")
    add("--out", type=Path, default=Path("runs/judge.pt"), help="default: runs/judge.pt")
    add("--epochs", type=real(0), default=3.0, help="passes over the images (default: 3)")
    add("--batch", type=integer(1), default=128, help="images a step (default: 128)")
    add("--lr", type=real(0), default=0.2, help="highest learning rate (default: 0.2)")
    add("--seed", type=integer(0), default=1, help="of all that is random (default: 1)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    device = pick_device(args.device)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    data = ImageData(args.data, 32)
    val = ImageData(args.val, 32, held_out=True)
    if data.class_names != val.class_names:
        raise ValueError(f"{args.val}: other classes than {args.data}")
    images = read_images(data, torch.arange(len(data)))
    labels = torch.from_numpy(data.labels)

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = Classifier(len(data.class_names)).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    steps = max(1, int(args.epochs * len(images) / args.batch))
    bar = tqdm(range(steps), unit="step")
    remaining = torch.empty(0, dtype=torch.int64)
    for step in bar:
        if len(remaining) < args.batch:  # a new epoch
            remaining = torch.randperm(len(images), generator=generator)
        chosen = remaining[: args.batch]
        remaining = remaining[args.batch :]
        batch = augment(to_float(images[chosen]), generator)
        logits, _ = model(batch.to(device, memory_format=torch.channels_last))
        loss = F.cross_entropy(logits, labels[chosen].to(device), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, args.lr)
        optimizer.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")

    model.eval()
    write_atomically(args.out, lambda path: torch.save(model.state_dict(), path))
    guesses, _ = classify(model, read_images(val, torch.arange(len(val))))
    accuracy = (guesses == torch.from_numpy(val.labels)).double().mean()
    print(f"{args.out}: {accuracy:.1%} of {len(val)} held-out images named rightly")


if __name__ == "__main__":
    command_line(main)

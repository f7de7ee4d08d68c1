"""README.md here, "What the shipped model is": a small CIFAR-10 classifier, for two uses that need one training each.

    python experiments/classifier.py --data cifar10/train --val cifar10/test --out runs/classifier.pt --noise 0.5
    python experiments/classifier.py --data cifar10/train --val cifar10/test --out runs/judge.pt --seed 1

Trains it and prints its accuracy on the held-out images. As runs/classifier.pt it lends train_tokenizer.py its features
for the perceptual loss, since LPIPS's and DINOv2's networks are made for larger images. --noise is added to the images
that it learns from, so that its features do not depend on faint patterns. As runs/judge.pt, from another seed, it says
whether a picture looks like the class it was drawn for, and its penultimate features stand in for Inception's in a
Frechet distance. That is no FID, and numbers from two judges must not be compared.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import dar
import training


def conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Classifier(nn.Module):
    """A residual network of eight convolutions, 1.6M parameters: float [B, 3, 32, 32] in [-1, 1] to logits. noise: the
    largest standard deviation of noise on the images that it learns from."""

    def __init__(self, num_classes: int, noise: float = 0.0):
        super().__init__()
        self.register_buffer("noise", torch.tensor(noise))
        self.body = nn.Sequential(
            conv(3, 32), conv(32, 64), nn.AvgPool2d(2), Residual(conv(64, 64), conv(64, 64)),
            conv(64, 128), nn.AvgPool2d(2), conv(128, 256), nn.AvgPool2d(2),
            Residual(conv(256, 256), conv(256, 256)), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(256, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, classes] and the penultimate features [B, 256]."""
        features = self.body(x)
        return self.head(features), features


def load_classifier(path, device) -> Classifier:
    """The trained judge, in eval mode. Raises FileNotFoundError or ValueError naming the file."""
    state = dar.read_checkpoint(path)
    model = Classifier(len(state.get("head.bias", [0])))
    try:
        model.load_state_dict(state)
    except RuntimeError:
        raise ValueError(f"{path}: no classifier; python experiments/classifier.py makes one") from None
    return model.eval().to(device)


class PerceptualDistance(nn.Module):
    """In the manner of LPIPS: squared distances of two images' features, of length one at each place, averaged over
    the places and summed over five stages of the network. float [B, 3, 32, 32] in [-1, 1], twice -> [B]."""

    # {part of Classifier.body: its weight}: 64 channels at 16x16, 128 there, 256 at 8x8, 256 at 4x4, their mean. The
    # later ones say most about the class, but differ least.
    STAGES = {3: 0.5, 4: 0.5, 6: 1.0, 8: 2.0, 9: 4.0}

    def __init__(self, classifier: Classifier):
        super().__init__()
        self.body, self.noise = classifier.body.requires_grad_(False).eval(), classifier.noise

    def features(self, x: Tensor) -> list[Tensor]:
        found = []
        with torch.autocast(x.device.type, torch.bfloat16, dar.has_fast_bfloat16(x.device)):
            x = x.to(memory_format=torch.channels_last)
            for i, layer in enumerate(self.body[: max(self.STAGES) + 1]):
                x = layer(x)
                if i in self.STAGES:
                    found.append(F.normalize(x.float(), dim=1, eps=1e-3))
        return found

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        pairs = zip(self.STAGES.values(), self.features(images), self.features(references))
        return sum(weight * (a - b).square().sum(1).mean((1, 2)) for weight, a, b in pairs)


def all_images(data: training.ImageData) -> Tensor:
    """uint8 [n, 3, 32, 32]."""
    parts = (range(start, min(start + 1000, len(data))) for start in range(0, len(data), 1000))
    return torch.cat(
        [dar.to_uint8(dar.center_crops((data.next_readable(i)[0] for i in part), data.size)) for part in parts]
    )


def shifted_and_mirrored(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image [B, 3, H, W] mirrored half of the time and moved by up to four pixels, its border reflected."""
    count, _, height, width = images.shape
    draws = [torch.randint(n, (count, 1, 1), generator=generator) for n in (9, 9, 2)]
    rows, columns = draws[0] + torch.arange(height)[:, None], draws[1] + torch.arange(width)
    columns = torch.where(draws[2] == 1, columns.flip(2), columns)
    padded = F.pad(images, (4, 4, 4, 4), mode="reflect")
    return padded[torch.arange(count)[:, None, None], :, rows, columns].permute(0, 3, 1, 2)


@torch.no_grad()
def judge(model: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 images [n, 3, 32, 32] -> the class that each looks like [n], and features [n, 256], on the CPU."""
    device = model.head.weight.device
    parts = [model(dar.to_float(part).to(device)) for part in images.split(500)]
    return torch.cat([logits.argmax(1).cpu() for logits, _ in parts]), torch.cat([f.cpu() for _, f in parts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with one sub-folder of images a class")
    parser.add_argument("--val", required=True, help="the same, held out")
    parser.add_argument("--out", default="runs/classifier.pt")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.2)
    parser.add_argument("--noise", type=float, default=0.0, help="largest standard deviation of noise (default: 0)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    args = parser.parse_args()
    if min(args.epochs, args.batch) < 1:
        raise ValueError(f"--epochs {args.epochs} --batch {args.batch}: expected at least 1 of each")
    dar.require(0 <= args.noise < 100, f"--noise {args.noise}: expected 0 ... 100")
    device, out = dar.pick_device(args.device), Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    data, val = training.ImageData(args.data, 32), training.ImageData(args.val, 32, held_out=True)
    if data.class_names != val.class_names:
        raise ValueError(f"{args.val}: other classes than {args.data}")
    if len(data) < args.batch:
        raise ValueError(f"{args.data}: {len(data)} images do not fill a --batch of {args.batch}")
    images, labels = all_images(data), torch.from_numpy(data.labels)
    dar.keep_freed_memory()
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = Classifier(len(data.class_names), args.noise).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, 0.9, weight_decay=5e-4, nesterov=True)
    steps = args.epochs * (len(images) // args.batch)
    bar = tqdm(range(steps), unit="step", dynamic_ncols=True)
    for step in bar:
        if step % (len(images) // args.batch) == 0:
            order = iter(torch.randperm(len(images), generator=generator).split(args.batch))
        chosen, done = next(order), step / steps
        for group in optimizer.param_groups:  # up for a fifth of the steps, then down to 0
            group["lr"] = args.lr * min(5 * done, 0.5 + 0.5 * math.cos(math.pi * (done - 0.2) / 0.8))
        batch = shifted_and_mirrored(dar.to_float(images[chosen]), generator)
        sigma = model.noise.item() * torch.rand(len(batch), 1, 1, 1, generator=generator)
        batch = batch + sigma * torch.randn(batch.shape, generator=generator)
        batch = batch.to(device, memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, dar.has_fast_bfloat16(device)):
            logits, _ = model(batch)
        loss = F.cross_entropy(logits.float(), labels[chosen].to(device), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()
    dar.write_atomically(out, lambda file: torch.save(model.state_dict(), file))
    guesses, _ = judge(model, all_images(val))
    accuracy = (guesses == torch.from_numpy(val.labels)).float().mean()
    print(f"{out}: {accuracy:.1%} of {len(val)} held-out images named rightly")


if __name__ == "__main__":
    dar.command_line(main)

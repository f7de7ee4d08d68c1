"""Trains the sequential diffusion tokenizer (section 3.1 and 4 of the paper).

From nothing:      python train_tokenizer.py --data shapes --out runs/tokenizer
A folder a class:  python train_tokenizer.py --data cifar10/train --val cifar10/test --out runs/tokenizer
The paper's:       torchrun --nproc_per_node=8 train_tokenizer.py --preset v1 --data imagenet/train --out runs/v1

The same command again goes on where the run stopped. RUN/last.pt is the checkpoint (EMA weights inside), RUN/log.csv
the losses, RUN/*.png originals beside what comes back.
"""

import argparse
import contextlib
import dataclasses
import sys
import time

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import dar

# "v1" and "lite" are the paper's (section 5, appendix III); "tiny" is ours, found by trials on CIFAR-10 (README).
RECIPES = {
    "v1": dict(batch=1024, steps=210_000, lr=2e-4, warmup=5000, codebook_warmup=0, times=1, decay=0.0),
    "lite": dict(batch=256, steps=50_000, lr=2e-4, warmup=5000, codebook_warmup=0, times=1, decay=0.0),
    "tiny": dict(batch=32, steps=2800, lr=1.5e-3, warmup=100, codebook_warmup=200, times=2, decay=0.5),
}
COLUMNS = [
    "step",
    "loss",
    "fm",
    "vq",
    "commit",
    "lr",
    "grad_norm",
    "images_per_s",
    "code_use",
    "val_psnr",
    "val_code_use",
]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, help="folder with one sub-folder of images a class, or the word 'shapes'")
    add("--val", help="the same, held out: its PSNR and code use are logged")
    add("--out", required=True, help="folder of the run; an existing run there is continued")
    add("--preset", default="tiny", choices=dar.TOKENIZER_PRESETS, help="model and recipe (default: tiny)")
    add("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="change fields of the preset, e.g. num_groups=4")
    add("--steps", type=int, help="optimisation steps (default: the preset's)")
    add("--batch", type=int, help="images a step, over all processes (default: the preset's)")
    add("--micro-batch", type=int, help="images that one process takes at once; the rest is accumulated (default: all)")
    add("--times", type=int, help="diffusion times drawn for each encoded image (default: the preset's)")
    add("--lr", type=float, help="learning rate (default: the preset's)")
    add("--warmup", type=int, help="steps over which the rate rises from 0 (default: the preset's)")
    add(
        "--codebook-warmup",
        type=int,
        help="steps before tokens are quantized; then codes start as features (default: the preset's)",
    )
    add("--decay", type=float, help="last share of the steps over which the rate falls to 0 (default: the preset's)")
    add("--clip", type=float, default=1.0, help="largest gradient norm (default: 1)")
    add("--no-flip", action="store_true", help="do not mirror images at random")
    add("--seed", type=int, default=0)
    add(
        "--precision",
        default="auto",
        choices=["auto", "float32", "bfloat16"],
        help="of products; auto: bfloat16 if fast",
    )
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    add("--workers", type=int, default=0, help="processes that decode images (default: none)")
    add("--log-every", type=int, default=50)
    add("--picture-every", type=int, default=500, help="also how often the held-out images are measured")
    add("--save-every", type=int, default=500)
    add("--resume", default="auto", choices=["auto", "never"])
    args = parser.parse_args()
    for name, value in RECIPES[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def build_config(args: argparse.Namespace) -> dar.TokenizerConfig:
    config, changes = dar.TOKENIZER_PRESETS[args.preset], {}
    kinds = {f.name: type(getattr(config, f.name)) for f in dataclasses.fields(config)}
    for item in args.set:
        name, _, value = item.partition("=")
        if name not in kinds:
            raise ValueError(f"--set {item}: no such field; there are {', '.join(kinds)}")
        try:
            changes[name] = int(value) if name == "repa_layer" else kinds[name](value)
        except ValueError:
            raise ValueError(f"--set {item}: expected {name}={kinds[name].__name__}") from None
    return dataclasses.replace(config, **changes)


def random_crop(image, size: int, flip: bool, rng: np.random.Generator):
    """ADM's augmentation: short side to 1-1.25 x size, a random square, a random mirror; images that have the wanted
    size, and small ones (CIFAR-10), are only mirrored."""
    if image.size != (size, size):
        if min(image.size) < 64:
            image = dar.center_crop(image, size)
        else:
            larger = int(rng.integers(size, int(1.25 * size) + 1))
            while min(image.size) >= 2 * larger:
                image = image.resize((image.width // 2, image.height // 2), dar.Image.BOX)
            scale = larger / min(image.size)
            image = image.resize((round(image.width * scale), round(image.height * scale)), dar.Image.BICUBIC)
            x, y = rng.integers(0, image.width - size + 1), rng.integers(0, image.height - size + 1)
            image = image.crop((x, y, x + size, y + size))
    return image.transpose(dar.Image.FLIP_LEFT_RIGHT) if flip and rng.random() < 0.5 else image


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then constant (section 5); with --decay it falls to 0 over that last share of the steps."""
    warm = min(1.0, (step + 1) / max(args.warmup, 1))
    return args.lr * warm * min(1.0, (args.steps - step) / max(args.decay * args.steps, 1))


def sample_noise(seed: int, positions: list[int], shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Standard normal noise, float32 [len(positions), *shape], each sample's drawn on the device from its own seed."""
    generator, noise = torch.Generator(device), torch.empty(len(positions), *shape, device=device)
    for row, position in zip(noise, positions):
        # odd multipliers permute the 32-bit numbers: no two samples of a run share a seed
        row.normal_(generator=generator.manual_seed((position * 2654435761 + seed * 40503 + 12345) % 2**32))
    return noise


class Samples(torch.utils.data.Dataset):
    """Sample position -> (uint8 image [3, H, W], label, position); transform(PIL image, generator) crops and flips."""

    def __init__(self, data: dar.ImageData, transform, seed: int):
        self.data, self.transform, self.seed = data, transform, seed

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int, int]:
        index = dar.data_index(position, len(self.data), self.seed)
        image = self.transform(self.data.image(index), dar.sample_rng(self.seed, position))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), self.data.labels[index], position


def training_batches(samples: Samples, steps: range, batch: int, rank: int, world: int, micro: int, workers: int):
    """Yields (images, labels, positions) in micro-batches: this rank's share of the global batch of each step."""
    share = batch // world
    starts = (step * batch + rank * share + i for step in steps for i in range(0, share, micro))
    positions = (range(start, start + micro) for start in starts)
    return iter(torch.utils.data.DataLoader(samples, batch_sampler=positions, num_workers=workers))


@torch.no_grad()
def held_out(model, data: dar.ImageData, count: int, device, batch: int = 50) -> dict[str, float]:
    """PSNR (ab2, S = K, noise from the image's index) and share of the codebook seen, over the first `count` images."""
    size, quality, seen = model.config.image_size, [], []
    order = np.random.default_rng(0).permutation(len(data))[:count]
    for indices in np.array_split(order, max(1, len(order) // batch)):
        crops = np.stack([np.array(dar.center_crop(data.image(i), size)) for i in indices])
        images = dar.to_float(torch.from_numpy(crops).permute(0, 3, 1, 2)).to(device)
        codes = model.encode(images)
        decoded = model.decode(codes, dar.initial_noise(indices.tolist(), size, device))
        quality.append(dar.psnr(decoded, images))
        seen.append(codes.unique())
    return {
        "val_psnr": torch.cat(quality).mean().item(),
        "val_code_use": len(torch.cat(seen).unique()) / model.config.codebook_size,
    }


def reconstruction_picture(model, data: dar.ImageData, device, count: int = 8):
    """A row an image: original, the preview after each step, reconstruction."""
    size = model.config.image_size
    crops = np.stack([np.array(dar.center_crop(data.image(i * len(data) // count), size)) for i in range(count)])
    images = dar.to_float(torch.from_numpy(crops).permute(0, 3, 1, 2)).to(device)
    codes, noise = (
        model.encode(images),
        dar.initial_noise(0, size, device) if count == 1 else dar.initial_noise(list(range(count)), size, device),
    )
    columns = [images, *model.previews(codes, noise), model.decode(codes, noise)]
    return dar.tile(torch.stack(columns, 1).flatten(0, 1), len(columns))


def main() -> int:
    args = parse_arguments()
    config = build_config(args)
    data = dar.ImageData(args.data, config.image_size)
    val = dar.ImageData(args.val, config.image_size, held_out=True) if args.val else None
    rank, world, device = dar.init_distributed(dar.pick_device(args.device))
    if args.batch % world:
        raise ValueError(f"--batch {args.batch} cannot be shared equally by {world} processes")
    share = args.batch // world
    micro = args.micro_batch or share
    if share % micro:
        raise ValueError(f"--micro-batch {micro} does not divide the {share} images of one process")
    bf16 = args.precision == "bfloat16" or args.precision == "auto" and dar.has_fast_bfloat16(device)

    if device.type == "cpu":
        torch.backends.cuda.enable_flash_sdp(False)  # also the CPU's switch; a tiny step takes 15% less without it

    torch.manual_seed(args.seed)
    model = dar.SequentialDiffusionTokenizer(config).to(device)
    if config.repa_layer is not None:
        model.diffusion.repa_head.requires_grad_(False)
    ema = dar.EMA(model)
    fused = device.type == "cuda"
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], args.lr, (0.9, 0.95), fused=fused)
    settings = {f"model {k}": v for k, v in dataclasses.asdict(config).items()}
    settings |= {"data": str(args.data), "images": len(data), "flip": not args.no_flip, "seed": args.seed}
    settings |= {"batch": args.batch, "times": args.times, "codebook_warmup": args.codebook_warmup}
    run = dar.TrainingRun(args.out, settings, COLUMNS, args.resume == "auto", rank == 0)
    run.restore(model, ema, optimizer)
    parallel = DistributedDataParallel(model, [device.index] if fused else None) if world > 1 else model

    samples = Samples(data, lambda image, rng: random_crop(image, config.image_size, not args.no_flip, rng), args.seed)
    batches = training_batches(samples, range(run.step, args.steps), args.batch, rank, world, micro, args.workers)
    bar = tqdm(total=args.steps, initial=run.step, disable=rank > 0, unit="step", dynamic_ncols=True)
    sums, seen, since, clock = torch.zeros(4, device=device), [], run.step, time.time()
    for step in range(run.step, args.steps):
        if step == args.codebook_warmup > 0:
            start_codebook(model, samples, step * args.batch, device)
            start_codebook(ema.model, samples, step * args.batch, device)
        chunks = [next(batches) for _ in range(share // micro)]
        times = [draw_times(args.seed, positions, args.times, device) for _, _, positions in chunks]
        kept = sum(kept_tokens(s, config) for s in times)
        if world > 1:
            torch.distributed.all_reduce(kept)
        rate = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(
            (args.seed * 1_000_003 + step) * world + rank
        )  # of the warm-up's noise: a resumed step repeats it
        for i, ((images, _, positions), s) in enumerate(zip(chunks, times)):
            images = dar.to_float(images.to(device))
            noise = sample_noise(args.seed, positions.tolist(), (args.times, *images.shape[1:]), device)
            # gradients are exchanged once a step, with the last micro-batch
            wait = parallel.no_sync() if world > 1 and i + 1 < len(chunks) else contextlib.nullcontext()
            with wait:
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    out = parallel(images, s, noise, step >= args.codebook_warmup)
                # Means over the global batch: fm over equal shares, the quantizer's over all tokens that were kept.
                part = out["kept"] * world / kept
                terms = torch.stack((out["fm"] / len(chunks), out["vq"] * part, out["commit"] * part))
                terms.sum().backward()
            sums[1:] += terms.detach()
            seen.append(out["codes"].flatten())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        ema.update(model)
        sums[0] += norm
        bar.update()

        done = step + 1
        last = done == args.steps
        if done % args.log_every == 0 or last:
            if world > 1:
                torch.distributed.all_reduce(sums)
            norm, fm, vq, commit = (sums / world / (done - since)).tolist()
            if not np.isfinite(norm + fm + vq + commit):
                print(
                    f"error: step {done}: loss {fm + vq + commit}, gradient norm {norm}; not finite, stopped",
                    file=sys.stderr,
                )
                return 3
            row = dict(step=done, loss=fm + vq + commit, fm=fm, vq=vq, commit=commit, lr=rate, grad_norm=norm)
            row["images_per_s"] = args.batch * (done - since) / (time.time() - clock)
            row["code_use"] = len(torch.cat(seen).unique()) / config.codebook_size
            bar.set_postfix(loss=f"{row['loss']:.3f}", fm=f"{fm:.3f}", images_s=f"{row['images_per_s']:.0f}")
            if rank == 0 and (done % args.picture_every == 0 or last):
                reconstruction_picture(ema.model, val or data, device).save(run.folder / f"step-{done}.png")
                if val is not None:
                    row |= held_out(ema.model, val, 250, device)
            run.log(row)
            sums.zero_()
            seen, since, clock = [], done, time.time()
        stop = run.stopping(device)
        if done % args.save_every == 0 or last or stop:
            run.save(done, model, ema, optimizer)
        if stop:
            bar.close()
            print(f"stopped after step {done}, saved; the same command goes on", file=sys.stderr)
            return 128 + run.signal
    bar.close()
    return 0


def draw_times(seed: int, positions, count: int, device) -> torch.Tensor:
    """Each sample's uniform times s, float32 [B, count]: a function of (seed, position) alone."""
    draws = [np.random.default_rng([seed, 2, p]).random(count, np.float32) for p in positions.tolist()]
    return torch.from_numpy(np.stack(draws)).to(device)


@torch.no_grad()
def start_codebook(model, samples: Samples, position: int, device) -> None:
    """Ends the codebook warm-up: codes become features of coming samples, the same on every process.

    During it, noise as large as the quantizer's later error makes the encoder spread its features over the sphere.
    The encoder's gates start at 0, so at first every image gives the same features; quantized from step 0, they are
    held to the few codes that they happened to be near (4% of the tiny codebook over the first 500 steps).
    """
    torch.manual_seed(position)
    count = -(-4 * model.config.codebook_size // model.config.num_tokens)  # four features for each code
    images = torch.stack([samples[position + i][0] for i in range(count)])
    model.quantize.start_from(torch.cat([model.features(dar.to_float(part.to(device))) for part in images.split(64)]))


def kept_tokens(s: torch.Tensor, config: dar.TokenizerConfig) -> torch.Tensor:
    """How many tokens the quantizer's losses will average over for times s [B, R] (the tokenizer's "kept")."""
    groups = dar.condition_group(s, config.num_groups, config.group_rule).amax(1) + 1
    return (groups * config.group_size).sum()


if __name__ == "__main__":
    dar.command_line(main)

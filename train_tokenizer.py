"""Trains the sequential diffusion tokenizer (sections 3.1, 4 and 5 of the paper).

From nothing:      python train_tokenizer.py --data shapes --out runs/tokenizer
A folder a class:  python train_tokenizer.py --data cifar10/train --val cifar10/test --out runs/tokenizer
The paper's:       torchrun --nproc_per_node=8 train_tokenizer.py --preset v1 --data imagenet/train --out runs/v1
On two nodes:      the same on each, with --nnodes=2 --rdzv_backend=c10d --rdzv_id=v1 --rdzv_endpoint=FIRST_NODE:29500
Without internet:  python train_tokenizer.py --prefetch, beforehand, where there is some

The same command again goes on where the run stopped, with any number of processes. RUN/last.pt is the checkpoint (EMA
weights inside), RUN/log.csv the losses, RUN/*.png originals beside what comes back.
"""

import argparse
import dataclasses
import functools
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dar

# "v1" and "lite" are the paper's (section 5, appendix III); "tiny" and "cifar10" are ours, found by trials (README).
# lpips and repa are the weights of these losses in eq. 7.
PAPER = dict(lr=2e-4, warmup=5000, codebook_warmup=0, times=1, decay=0.0, lpips=0.5, repa=0.5)
RECIPES = {
    "v1": PAPER | dict(batch=1024, steps=210_000),
    "lite": PAPER | dict(batch=256, steps=50_000),
    "tiny": dict(
        batch=32, steps=2800, lr=1.5e-3, warmup=100, codebook_warmup=200, times=2, decay=0.5, lpips=0.0, repa=0.0
    ),
}
RECIPES["cifar10"] = RECIPES["tiny"] | dict(steps=5000)
WARMUP_NOISE = 0.18  # a standard deviation: about 0.5 in 8 dimensions, how far 1024 spread codes are from a feature
DINOV2 = "facebookresearch/dinov2"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    dar.add_training_arguments(parser, dar.TOKENIZER_PRESETS)
    add("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="change fields of the preset, e.g. num_groups=4")
    add("--times", type=int, help="diffusion times drawn for each encoded image (default: the preset's)")
    add("--codebook-warmup", type=int, help="steps before tokens are quantized (default: the preset's)")
    add("--decay", type=float, help="last share of the steps over which the rate falls to 0 (default: the preset's)")
    add("--no-flip", action="store_true", help="do not mirror images at random")
    add("--lpips", type=float, metavar="WEIGHT", help="of the LPIPS loss; 0: without (default: the preset's)")
    add("--repa", type=float, metavar="WEIGHT", help="of the REPA loss; 0: without (default: the preset's)")
    add("--lpips-net", metavar="FILE", help="an experiments/classifier.py instead of VGG-16, for images of 32 pixels")
    add("--vgg", metavar="FILE", help="torchvision's VGG-16 weights for LPIPS (default: fetched by torch.hub)")
    add("--dinov2", metavar="FILE", help="DINOv2 ViT-B/14 weights for REPA (default: fetched by torch.hub)")
    add("--dinov2-repo", metavar="DIR", help="a clone of DINOv2's repository (default: fetched by torch.hub)")
    add("--init", metavar="FILE", help="start from this tokenizer's averaged weights, without codebook warm-up")
    add("--prefetch", action="store_true", help="download what LPIPS and REPA need, say where it lies, and stop")
    args = parser.parse_args()
    if not args.prefetch:
        recipe = RECIPES[args.preset] | ({"codebook_warmup": 0} if args.init else {})
        if args.lpips_net and not (recipe["lpips"] if args.lpips is None else args.lpips):
            raise ValueError(f"--lpips-net {args.lpips_net}: has no effect without a weight, --lpips 0.5, say")
        dar.check_training_arguments(args, recipe, times=1, codebook_warmup=0, decay=0, lpips=0, repa=0)
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
    config = dataclasses.replace(config, **changes)
    if args.repa and config.repa_layer is None:
        raise ValueError(f"--repa {args.repa}: the {args.preset} model has no REPA head; add --set repa_layer=4, say")
    return config


# Data and randomness: everything random about a sample follows from (seed, position).


def random_crop(image, rng: np.random.Generator, size: int, flip: bool):
    """ADM's augmentation: short side to 1-1.25 x size, a random square, a random mirror; images that have the wanted
    size, and small ones (CIFAR-10), are only mirrored."""
    if image.size != (size, size):
        if min(image.size) < 64:
            image = dar.center_crop(image, size)
        else:
            larger = int(rng.integers(size, int(1.25 * size) + 1))
            image = dar.shrink(image, larger)
            x, y = rng.integers(0, image.width - size + 1), rng.integers(0, image.height - size + 1)
            image = image.crop((x, y, x + size, y + size))
    return image.transpose(dar.Image.FLIP_LEFT_RIGHT) if flip and rng.random() < 0.5 else image


def draw_times(seed: int, positions: Tensor, count: int, device: torch.device) -> Tensor:
    """Each sample's uniform times s, float32 [B, count]."""
    draws = [np.random.default_rng([seed, 2, p]).random(count, np.float32) for p in positions.tolist()]
    return torch.from_numpy(np.stack(draws)).to(device)


def sample_noise(seed: int, positions: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Standard normal noise, float32 [len(positions), *shape], each sample's drawn on the device from its own seed."""
    generator, noise = torch.Generator(device), torch.empty(len(positions), *shape, device=device)
    for row, position in zip(noise, positions.tolist()):
        # odd multipliers permute the 32-bit numbers: no two samples of a run share a seed
        row.normal_(generator=generator.manual_seed((position * 2654435761 + seed * 40503 + 12345) % 2**32))
    return noise


def kept_tokens(s: Tensor, config: dar.TokenizerConfig) -> Tensor:
    """How many tokens the quantizer's losses will average over for times s [B, R] (the tokenizer's "kept")."""
    groups = dar.condition_group(s, config.num_groups, config.group_rule).amax(1) + 1
    return (groups * config.group_size).sum()


# The two losses of eq. 7 that look through a frozen network


def check_file(path: str | None, argument: str) -> None:
    if path is not None and not dar.Path(path).exists():
        raise FileNotFoundError(f"{argument} {path}: no such file or folder")


def load_weights(net: nn.Module, path: str, rename=lambda name: name) -> None:
    """Weights from a file (weights_only) into net, whose names it has after rename. ValueError if they do not fit."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        net.load_state_dict({name: state[rename(name)] for name in net.state_dict()})
    except Exception as error:  # a damaged file can fail in any way there is
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path}: not the weights of {type(net).__name__} ({reason})") from None


def load_lpips(vgg: str | None, classifier: str | None = None) -> nn.Module:
    """LPIPS (VGG, v0.1), frozen: (images, images) in [-1, 1] -> [B, 1, 1, 1]. vgg: torchvision's file, else fetched.
    classifier: the file of a small classifier whose features are compared instead, -> [B]."""
    if classifier is not None:
        from experiments.classifier import PerceptualDistance, load_classifier

        return PerceptualDistance(load_classifier(classifier, "cpu")).eval()
    import lpips

    check_file(vgg, "--vgg")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips calls torchvision in a way that is deprecated
        try:
            net = lpips.LPIPS(net="vgg", pnet_rand=vgg is not None, verbose=False)
        except OSError as error:
            raise OSError(f"LPIPS: VGG-16 cannot be fetched ({error}); run --prefetch, or give --vgg FILE") from None
    if vgg is not None:
        load_weights(
            net.net, vgg, lambda name: "features." + name.split(".", 1)[1]
        )  # slice2.5.weight: features.5.weight
    return net.requires_grad_(False).eval()


def load_dinov2(repo: str | None, weights: str | None) -> nn.Module:
    """DINOv2 ViT-B/14, frozen, through torch.hub: from a local clone and a weights file where they are given."""
    check_file(repo, "--dinov2-repo")
    check_file(weights, "--dinov2")
    source = dict(source="local") if repo else dict(source="github", trust_repo=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # DINOv2 remarks that xFormers is not there
            net = torch.hub.load(repo or DINOV2, "dinov2_vitb14", pretrained=weights is None, verbose=False, **source)
    except (OSError, RuntimeError, ImportError) as error:
        raise OSError(
            f"REPA: DINOv2 cannot be loaded ({str(error).splitlines()[0]}); run --prefetch, or give --dinov2-repo DIR "
            "(a clone of github.com/facebookresearch/dinov2) and --dinov2 FILE (its dinov2_vitb14_pretrain.pth)"
        ) from None
    if weights is not None:
        load_weights(net, weights)
    return net.requires_grad_(False).eval()


@torch.no_grad()
def dinov2_features(net: nn.Module, images: Tensor, grid: int) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1] -> patch features [B, grid·grid, 768]; DINOv2 sees 14 pixels a side for each."""
    mean, std = (images.new_tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    images = F.interpolate((images + 1) / 2, (14 * grid, 14 * grid), mode="bicubic")
    return net.forward_features((images - mean) / std)["x_norm_patchtokens"]


def repa_loss(features: Tensor, target: Tensor) -> Tensor:
    """Eq. 7's alignment: 1 - cosine, a mean over patches; features [B·R, n, 768], target [B, n, 768]."""
    target = target.float().repeat_interleave(len(features) // len(target), 0)
    return 1 - F.cosine_similarity(features.float(), target, dim=-1).mean()


def prefetch(args: argparse.Namespace) -> None:
    load_lpips(args.vgg)
    load_dinov2(args.dinov2_repo, args.dinov2)
    print(f"VGG-16 (LPIPS) and DINOv2 (REPA) lie in {torch.hub.get_dir()}; nodes that share it need no internet")


# Watching


class CodeUse:
    """What the codes of a window of steps look like: share of the codebook seen, share of positions that never vary."""

    def __init__(self, config: dar.TokenizerConfig, processes: dar.Processes):
        self.config, self.processes = config, processes
        self.reset()

    def reset(self) -> None:
        c, device = self.config, self.processes.device
        self.seen = torch.zeros(c.codebook_size, dtype=torch.uint8, device=device)
        self.low, self.high = (torch.full((c.num_tokens,), v, device=device) for v in (c.codebook_size, -1))

    def add(self, codes: Tensor) -> None:
        self.seen[codes.flatten()] = 1
        self.low, self.high = torch.minimum(self.low, codes.amin(0)), torch.maximum(self.high, codes.amax(0))

    def row(self) -> dict[str, float]:
        seen = self.processes.reduce(self.seen, "MAX").float().mean().item()
        constant = self.processes.reduce(self.low, "MIN") == self.processes.reduce(self.high, "MAX")
        self.reset()
        return {"code_use": seen, "constant_positions": constant.float().mean().item()}


def centre_crops(data: dar.ImageData, indices) -> Tensor:
    return dar.center_crops((data.next_readable(int(i))[0] for i in indices), data.size)


@torch.no_grad()
def held_out(model, data: dar.ImageData, count: int, device, batch: int = 50) -> dict[str, float]:
    """PSNR (ab2, S = K, noise from the image's index) and share of the codebook seen, over `count` images."""
    quality, seen = [], []
    order = np.random.default_rng(0).permutation(len(data))[:count]
    for indices in np.array_split(order, max(1, len(order) // batch)):
        images = centre_crops(data, indices).to(device)
        codes = model.encode(images)
        decoded = model.decode(codes, dar.initial_noise(indices.tolist(), data.size, device))
        quality.append(dar.psnr(decoded, images))
        seen.append(codes.unique())
    use = len(torch.cat(seen).unique()) / model.config.codebook_size
    return {"val_psnr": torch.cat(quality).mean().item(), "val_code_use": use}


def reconstruction_picture(model, data: dar.ImageData, device, count: int = 8):
    """A row an image: original, the preview after each step, reconstruction."""
    count = min(count, len(data))
    images = centre_crops(data, (i * len(data) // count for i in range(count))).to(device)
    codes, noise = model.encode(images), dar.initial_noise(list(range(count)), data.size, device)
    columns = [images, *model.previews(codes, noise), model.decode(codes, noise)]
    return dar.tile(torch.stack(columns, 1).flatten(0, 1), len(columns))


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then constant (section 5); with --decay it falls to 0 over that last share of the steps."""
    warm = min(1.0, (step + 1) / max(args.warmup, 1))
    return args.lr * warm * min(1.0, (args.steps - step) / max(args.decay * args.steps, 1))


@torch.no_grad()
def start_codebook(model, samples: dar.Samples, position: int, device) -> None:
    """Ends the codebook warm-up: codes become features of coming samples, the same on every process.

    During it, noise as large as the quantizer's later error makes the encoder spread its features over the sphere.
    The encoder's gates start at 0, so at first every image gives the same features; quantized from step 0, they are
    held to the few codes that they happened to be near (4% of the tiny codebook over the first 500 steps).
    """
    torch.manual_seed(position)
    count = -(-4 * model.config.codebook_size // model.config.num_tokens)  # four features for each code
    images = torch.stack([samples[position + i][0] for i in range(count)])
    features = [model.features(dar.to_float(part.to(device))).float().flatten(0, 1) for part in images.split(64)]
    features = F.normalize(torch.cat(features), dim=-1)
    chosen = torch.randperm(len(features))[: model.config.codebook_size]
    model.quantize.embedding.weight.copy_(features[chosen.to(device)])


def load_initial(path: str, config: dar.TokenizerConfig) -> dict[str, Tensor]:
    """The weights of a tokenizer of this very shape. Raises ValueError naming the file and a field that differs."""
    tokenizer = dar.load_tokenizer(path, dtype=torch.float32)
    for name, value in dataclasses.asdict(config).items():
        if getattr(tokenizer.config, name) != value:
            raise ValueError(f"--init {path}: has {name} = {getattr(tokenizer.config, name)}, this run {value}")
    return tokenizer.state_dict()


def main() -> int:
    args = parse_arguments()
    if args.prefetch:
        return prefetch(args)
    config = build_config(args)
    processes = dar.Processes.start(dar.pick_device(args.device))
    device, listing = processes.device, dar.Path(args.out) / "images.list"
    data = processes.first_alone(lambda: dar.ImageData(args.data, config.image_size, listing=listing))
    val = dar.ImageData(args.val, config.image_size, held_out=True) if args.val else None
    perceptual = processes.first_alone(lambda: load_lpips(args.vgg, args.lpips_net).to(device)) if args.lpips else None
    dinov2 = processes.first_alone(lambda: load_dinov2(args.dinov2_repo, args.dinov2).to(device)) if args.repa else None
    repa_grid = min(config.image_size // config.diffusion_patch, dar.DiffusionDecoder.REPA_GRID)

    torch.manual_seed(args.seed)
    model = dar.SequentialDiffusionTokenizer(config).to(device)
    if config.repa_layer is not None and not args.repa:
        model.diffusion.repa_head.requires_grad_(False)
    if args.init:
        model.load_state_dict(load_initial(args.init, config))
    ema, trained = dar.EMA(model), [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, args.lr, (0.9, 0.95), fused=device.type == "cuda")
    settings = {f"model {k}": v for k, v in dataclasses.asdict(config).items()}
    settings |= {"data": data.digest, "flip": not args.no_flip, "times": args.times, "lpips": args.lpips}
    settings |= {"repa": args.repa, "codebook_warmup": args.codebook_warmup, "lpips_net": bool(args.lpips_net)}
    terms = ["fm", "vq", "commit"] + ["lpips"] * (args.lpips > 0) + ["repa"] * (args.repa > 0)
    columns = ["code_use", "constant_positions", "val_psnr", "val_code_use"]
    run = dar.TrainingRun(args, processes, model, ema, optimizer, settings, terms, columns)
    use = CodeUse(config, processes)

    def losses(chunk) -> dict[str, Tensor]:
        """Eq. 7 for a micro-batch. Its terms are means over the global batch once they are summed over micro-batches
        and averaged over processes: most over equal shares, the quantizer's over all tokens that were kept."""
        images, s, positions = chunk
        images = dar.to_float(images)
        noise = sample_noise(args.seed, positions, (args.times, *images.shape[1:]), device)
        code_noise = None
        if run.step < args.codebook_warmup:
            shape = (config.num_tokens, config.code_dim)
            code_noise = WARMUP_NOISE * sample_noise(args.seed + 1, positions, shape, device)
        out = run.parallel(images, s, noise, code_noise)
        use.add(out["codes"])
        share, part = len(images) / run.share, out["kept"] * processes.world / kept
        found = {"fm": out["fm"] * share, "vq": out["vq"] * part, "commit": out["commit"] * part}
        if perceptual is not None:
            with torch.autocast(device.type, enabled=False):
                distance = perceptual(out["pred_image"], images.repeat_interleave(args.times, 0)).mean()
            found["lpips"] = args.lpips * distance * share
        if dinov2 is not None:
            found["repa"] = args.repa * repa_loss(out["repa"], dinov2_features(dinov2, images, repa_grid)) * share
        return found

    flip = functools.partial(random_crop, size=config.image_size, flip=not args.no_flip)
    samples = dar.Samples(data, flip, args.seed)
    for step, chunks in zip(run.steps(), run.batches(samples)):
        if step == args.codebook_warmup > 0:
            start_codebook(model, samples, step * args.batch, device)
            start_codebook(ema.model, samples, step * args.batch, device)
        chunks = [(images, draw_times(args.seed, place, args.times, device), place) for images, _, place in chunks]
        kept = processes.reduce(sum(kept_tokens(s, config) for _, s, _ in chunks))  # in the whole global batch
        run.optimise(losses, chunks, learning_rate(step, args))
        row = run.row()
        if row is not None:
            row |= use.row()
            if run.due(args.picture_every) and processes.rank == 0:
                reconstruction_picture(ema.model, val or data, device).save(run.folder / f"step-{step + 1}.png")
                row |= held_out(ema.model, val, 250, device) if val else {}
            run.log(row)
    return run.exit_code


if __name__ == "__main__":
    dar.command_line(main)

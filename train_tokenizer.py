"""Trains the sequential diffusion tokenizer (sections 3.1, 4 and 5 of the paper).

From nothing:      python train_tokenizer.py --preset shapes --data shapes --out runs/shapes
A folder a class:  python train_tokenizer.py --data cifar10/train --val cifar10/test --out runs/tokenizer
The paper's:       torchrun --nproc_per_node=8 train_tokenizer.py --preset v1 --data imagenet/train --out runs/v1
On two nodes:      the same on each, with --nnodes=2 --rdzv_backend=c10d --rdzv_id=v1 --rdzv_endpoint=FIRST_NODE:29500
Without internet:  python train_tokenizer.py --prefetch, beforehand, where there is some

The same command again goes on where the run stopped, with any number of processes. RUN/last.pt is the checkpoint (EMA
weights inside), RUN/log.csv the losses, RUN/*.png originals beside what comes back.
"""

import dataclasses
import functools
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import dar
import training
from training import option

# "v1" and "lite" are the paper's (section 5, appendix III); the others are ours, found by trials (README).
# lpips and repa are the weights of these losses in eq. 7.
PAPER = dict(lr=2e-4, warmup=5000, codebook_warmup=0, times=1, decay=0.0, lpips=0.5, repa=0.5)
OURS = dict(batch=32, lr=1.5e-3, warmup=100, codebook_warmup=200, times=2, decay=0.5, lpips=0.0, repa=0.0)
RECIPES = {
    "v1": PAPER | dict(batch=1024, steps=210_000),
    "lite": PAPER | dict(batch=256, steps=50_000),
    "tiny": OURS | dict(steps=2800),
    "cifar10": OURS | dict(steps=5000),
    "shapes": OURS | dict(steps=2000, lr=4e-3, warmup=50, codebook_warmup=150, times=4, decay=0.9),
}
PATTERN = 200.0  # price of dots beside --lpips-net: a pattern of 3 levels (of 255), as it left without, costs 0.1
WARMUP_NOISE = 0.18  # a standard deviation: about 0.5 in 8 dimensions, how far 1024 spread codes are from a feature


@dataclasses.dataclass
class Arguments(training.Arguments):
    preset: str = option("model and its recipe: the numbers not given here (default: tiny)", "tiny", choices=[*RECIPES])
    set: tuple[str, ...] = option("change the preset's fields, e.g. num_groups=4", (), nargs="+", metavar="FIELD=VALUE")
    times: int | None = option("diffusion times drawn for each encoded image (default: the recipe's)", least=1)
    codebook_warmup: int | None = option("steps before tokens are quantized (default: the recipe's)", least=0)
    decay: float | None = option("last share of the steps, over which the rate falls to 0", least=0, most=1)
    no_flip: bool = option("do not mirror images at random", False)
    lpips: float | None = option("weight of the LPIPS loss; 0: without (default: the recipe's)", least=0)
    repa: float | None = option("weight of the REPA loss; 0: without (default: the recipe's)", least=0)
    lpips_net: tuple[str, ...] = option("for 32 pixels: classifiers instead of VGG-16, in turns", (), nargs="+")
    vgg: str | None = option("torchvision's VGG-16 weights for LPIPS (default: fetched by torch.hub)")
    dinov2: str | None = option("DINOv2 ViT-B/14 weights for REPA (default: fetched by torch.hub)")
    dinov2_repo: str | None = option("a clone of DINOv2's repository (default: fetched by torch.hub)")
    init: str | None = option("start from the averaged weights of this tokenizer, or Llama's, without codebook warm-up")
    prefetch: bool = option("download what LPIPS and REPA need, say where it lies, and stop", False)


def build_config(args: Arguments) -> dar.TokenizerConfig:
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
    if args.lpips_net and not args.lpips:
        raise ValueError(f"--lpips-net {args.lpips_net[0]}: has no effect without a weight, --lpips 0.5, say")
    return config


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
    return image.transpose(Image.FLIP_LEFT_RIGHT) if flip and rng.random() < 0.5 else image


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


# The frozen networks of eq. 7


def load_weights(net: nn.Module, path: str, rename=lambda name: name) -> None:
    """Weights from a file (weights_only) into net, whose names it has after rename. ValueError if they do not fit."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        net.load_state_dict({name: state[rename(name)] for name in net.state_dict()})
    except Exception as error:  # a damaged file can fail in any way there is
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path}: not the weights of {type(net).__name__} ({reason})") from None


def load_frozen(load, what: str, file: str, arguments: str) -> nn.Module:
    """load(), without its warnings. file: what torch.hub fetched it as. Raises OSError with advice if there is no
    internet, or a damaged file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load()
    except Exception as error:  # a damaged file can fail in any way there is
        reason = f"cannot be loaded ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
        prefetch = f"delete {torch.hub.get_dir()}/checkpoints/{file} if it is there, and run --prefetch"
        raise OSError(f"{what} {reason}; {prefetch}, or give {arguments}") from None


def load_lpips(vgg: str | None) -> nn.Module:
    """LPIPS (VGG, v0.1), frozen: (images, images) in [-1, 1] -> [B, 1, 1, 1]. vgg: torchvision's file, else fetched."""
    import lpips

    options = dict(net="vgg", pnet_rand=vgg is not None, verbose=False)
    net = load_frozen(lambda: lpips.LPIPS(**options), "LPIPS: VGG-16", "vgg16-397923af.pth", "--vgg FILE")
    if vgg is not None:  # slice2.5.weight is torchvision's features.5.weight
        load_weights(net.net, vgg, lambda name: "features." + name.split(".", 1)[1])
    return net.requires_grad_(False).eval()


def load_dinov2(repo: str | None, weights: str | None) -> nn.Module:
    """DINOv2 ViT-B/14, frozen, through torch.hub: from a local clone and a weights file where they are given."""
    name, options = "facebookresearch/dinov2", dict(pretrained=weights is None, verbose=False)
    options |= dict(source="local") if repo else dict(source="github", trust_repo=True)
    arguments = f"--dinov2-repo DIR (a clone of github.com/{name}) and --dinov2 FILE (its weights)"
    load, file = lambda: torch.hub.load(repo or name, "dinov2_vitb14", **options), "dinov2_vitb14_pretrain.pth"
    net = load_frozen(load, "REPA: DINOv2", file, arguments)
    if weights is not None:
        load_weights(net, weights)
    return net.requires_grad_(False).eval()


@torch.no_grad()
def dinov2_features(net: nn.Module, grid: int, images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1] -> patch features [B, grid·grid, 768]; DINOv2 sees 14 pixels a side for each."""
    mean, std = (images.new_tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    images = F.interpolate((images + 1) / 2, (14 * grid, 14 * grid), mode="bicubic")
    return net.forward_features((images - mean) / std)["x_norm_patchtokens"]


def in_float32(network):
    """The same function outside autocast: what LPIPS and DINOv2 compare is finer than bfloat16."""

    def function(*images: Tensor) -> Tensor:
        with torch.autocast(images[0].device.type, enabled=False):
            return network(*(x.float() for x in images))

    return function


def repeated_error(errors: Tensor, patch: int) -> Tensor:
    """The error that all patches of an image share: errors [B, C, H, W] -> the variance within their mean patch [B]."""
    batch, channels, height, width = errors.shape
    patches = errors.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return patches.mean((2, 4)).var((2, 3), correction=0).mean(1)


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


def load_crops(data: training.ImageData, indices) -> Tensor:
    """Centre crops of the images with these indices, float32 [n, 3, size, size] in [-1, 1]."""
    return dar.center_crops((data.next_readable(int(i))[0] for i in indices), data.size)


@torch.no_grad()
def held_out(model, data: training.ImageData, count: int, device, batch: int = 50) -> dict[str, float]:
    """PSNR (ab2, S = K, noise from the image's index) and share of the codebook seen, over `count` images."""
    quality, seen = [], []
    order = np.random.default_rng(0).permutation(len(data))[:count]
    for indices in np.array_split(order, max(1, len(order) // batch)):
        images = load_crops(data, indices).to(device)
        codes = model.encode(images)
        decoded = model.decode(codes, dar.initial_noise(indices.tolist(), data.size, device))
        quality.append(dar.psnr(decoded, images))
        seen.append(codes.unique())
    use = len(torch.cat(seen).unique()) / model.config.codebook_size
    return {"val_psnr": torch.cat(quality).mean().item(), "val_code_use": use}


def reconstruction_picture(model, data: training.ImageData, device, count: int = 8) -> Image.Image:
    """A row an image, class by class: original, the preview after each step, reconstruction."""
    count, by_class = min(count, len(data)), np.argsort(data.labels, kind="stable")
    images = load_crops(data, (by_class[i * len(data) // count] for i in range(count))).to(device)
    codes, noise = model.encode(images), dar.initial_noise(list(range(count)), data.size, device)
    columns = [images, *model.previews(codes, noise), model.decode(codes, noise)]
    return dar.tile(torch.stack(columns, 1).flatten(0, 1), len(columns))


def learning_rate(step: int, args: Arguments) -> float:
    """Linear warm-up, then constant (section 5); with --decay it falls to 0 over that last share of the steps."""
    warm = min(1.0, (step + 1) / max(args.warmup, 1))
    return args.lr * warm * min(1.0, (args.steps - step) / max(args.decay * args.steps, 1))


@torch.no_grad()
def start_codebook(model, samples: training.Samples, position: int, device) -> None:
    """Ends the codebook warm-up, in which noise stood for the quantizer's error, so that the encoder spread its
    features over the sphere: the codes become features of coming samples, the same ones on every process."""
    torch.manual_seed(position)
    count = -(-4 * model.config.codebook_size // model.config.num_tokens)  # four features for each code
    images = torch.stack([samples[position + i][0] for i in range(count)])
    features = [model.encoder(dar.to_float(part.to(device))).float().flatten(0, 1) for part in images.split(64)]
    features = F.normalize(torch.cat(features), dim=-1)
    chosen = torch.randperm(len(features))[: model.config.codebook_size]
    model.quantize.embedding.weight.copy_(features[chosen.to(device)])


def find_tokenizer(path: str, device: torch.device) -> dar.SequentialDiffusionTokenizer:
    """A tokenizer's checkpoint, or the tokenizer that a Llama's carries, in float32."""
    if "tokenizer" in dar.read_checkpoint(path):
        return dar.load_ar(path, device, torch.float32).tokenizer
    return dar.load_tokenizer(path, device, torch.float32)


def build_model(args: Arguments, config: dar.TokenizerConfig) -> dar.SequentialDiffusionTokenizer:
    """A fresh tokenizer, or --init's weights. Raises ValueError naming its file and a field in which it differs."""
    torch.manual_seed(args.seed)
    model = dar.SequentialDiffusionTokenizer(config)
    if config.repa_layer is not None and not args.repa:
        model.diffusion.repa_head.requires_grad_(False)
    if args.init:
        first = find_tokenizer(args.init, torch.device("cpu"))
        for name, value in dataclasses.asdict(config).items():
            if name != "time_shift" and getattr(first.config, name) != value:  # which no weight's shape depends on
                raise ValueError(f"--init {args.init}: has {name} = {getattr(first.config, name)}, this run {value}")
        model.load_state_dict(first.state_dict())
    return model


def main() -> int:
    args = training.parse_arguments(Arguments, __doc__)
    if args.prefetch:
        load_lpips(args.vgg), load_dinov2(args.dinov2_repo, args.dinov2)
        print(f"VGG-16 (LPIPS) and DINOv2 (REPA) lie in {torch.hub.get_dir()}; nodes that share it need no internet")
        return 0
    training.check_arguments(args, RECIPES[args.preset] | ({"codebook_warmup": 0} if args.init else {}))
    config = build_config(args)
    processes = dar.Processes.start(dar.pick_device(args.device))
    device = processes.device
    data = processes.first_alone(lambda: training.ImageData(args.data, config.image_size))
    val = training.ImageData(args.val, config.image_size, held_out=True) if args.val else None
    lpips = dinov2 = None
    if args.lpips_net:
        from experiments.classifier import PerceptualDistance, load_classifier

        nets = [PerceptualDistance(load_classifier(file, device)) for file in args.lpips_net]
    elif args.lpips:
        lpips = in_float32(processes.first_alone(lambda: load_lpips(args.vgg)).to(device))
    if args.repa:
        network = processes.first_alone(lambda: load_dinov2(args.dinov2_repo, args.dinov2)).to(device)
        grid = min(config.image_size // config.diffusion_patch, dar.DiffusionDecoder.REPA_GRID)
        dinov2 = in_float32(functools.partial(dinov2_features, network, grid))

    model = build_model(args, config).to(device)
    ema, trained = training.EMA(model), [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, args.lr, (0.9, 0.95), fused=device.type != "mps")
    settings = {f"model {k}": v for k, v in dataclasses.asdict(config).items()}
    same = "times", "no_flip", "lpips", "repa", "lpips_net", "codebook_warmup", "init"
    settings |= {"data": data.digest} | {name: getattr(args, name) for name in same}
    terms = ["fm", "vq", "commit"] + ["lpips"] * (args.lpips > 0) + ["repa"] * (dinov2 is not None)
    columns, use = ["code_use", "constant_positions", "val_psnr", "val_code_use"], CodeUse(config, processes)
    llama = f"--preset {args.preset if args.preset in dar.AR_PRESETS else 'XL'} --data {args.data}"
    llama += f" --val {args.val}" if args.val else ""
    following = f"train_ar.py {llama} --tokenizer {args.out}/last.pt --out {args.out.rstrip('/')}-ar"
    run = training.TrainingRun(args, processes, model, ema, optimizer, settings, terms, columns, following)

    def for_small_images(s: Tensor, positions: Tensor):
        """--lpips-net, in four ways unlike LPIPS in eq. 7: else every patch gets the same dots. An estimate counts s:
        early ones cannot know the details that the loss asks for. Both images get the same noise, as strong as the
        classifier learned with, behind which faint dots are not seen. Classifiers take turns, so that what pleases
        only one does not pay. And dots have a price of their own, PATTERN times repeated_error."""
        net = nets[run.step % len(nets)]
        sigma = net.noise * draw_times(args.seed + 2, positions, args.times, device)
        noise = sample_noise(args.seed + 2, positions, (args.times, 3, data.size, data.size), device)
        noise = (sigma[..., None, None, None] * noise).flatten(0, 1)

        def compare(estimates: Tensor, images: Tensor) -> Tensor:
            dots = repeated_error(estimates - images, config.diffusion_patch)
            return s.flatten() * (net(estimates + noise, images + noise) + PATTERN * dots)

        return compare

    def losses(chunk) -> dict[str, Tensor]:
        """Eq. 7 for a micro-batch. Its terms are means over the global batch once they are summed over micro-batches
        and averaged over processes: most over equal shares, the quantizer's over all tokens that were kept."""
        images, s, positions = chunk
        images = dar.to_float(images)
        noise = sample_noise(args.seed, positions, (args.times, *images.shape[1:]), device)
        code_noise = None
        if run.step < args.codebook_warmup:
            code_shape = config.num_tokens, config.code_dim
            code_noise = WARMUP_NOISE * sample_noise(args.seed + 1, positions, code_shape, device)
        out = run.parallel(images, s, noise, code_noise)
        use.add(out["codes"])
        compare = for_small_images(s, positions) if args.lpips_net else lpips
        found = dar.tokenizer_loss(out, images, compare, args.lpips, dinov2 and dinov2(images), args.repa)
        share, part = len(images) / run.share, out["kept"] * processes.world / kept
        return {name: loss * (part if name in ("vq", "commit") else share) for name, loss in found.items()}

    flip = functools.partial(random_crop, size=config.image_size, flip=not args.no_flip)
    samples = training.Samples(data, flip, args.seed)
    for step, chunks in run.steps(samples):
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
    return 128 + run.signal if run.signal else 0


if __name__ == "__main__":
    dar.command_line(main)

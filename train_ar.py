"""Trains the Llama on a tokenizer's codes (sections 3.2, 4 and 5 of the paper).

From nothing:      python train_ar.py --preset shapes --data shapes --tokenizer runs/shapes/last.pt --out runs/shapes-ar
A folder a class:  python train_ar.py --data cifar10/train --tokenizer runs/tokenizer/last.pt --out runs/ar
The paper's:       torchrun --nproc_per_node=8 train_ar.py --preset XL --data imagenet/train \\
                       --tokenizer D-AR-tokenizer_v1.pt --out runs/xl
On two nodes:      the same on each, with --nnodes=2 --rdzv_backend=c10d --rdzv_id=xl --rdzv_endpoint=FIRST_NODE:29500

The images are first tokenized once, into RUN/codes, which several nodes must share; or with --on-the-fly as they are
needed. The same command again goes on where the run stopped. RUN/last.pt carries the tokenizer and the class names:
`python sample.py --ckpt RUN/last.pt` needs nothing else.
"""

import dataclasses
import functools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import dar
import training
from training import option

# "B", "L" and "XL" follow section 5: batch 1024, 300 epochs, 4e-4 falling to 1e-5 over the last 50. The others are
# ours: so short that they see each image twice (eight times in "shapes"), they do without dropout.
RECIPES = {name: dict(batch=1024, epochs=300, lr=4e-4, warmup=0, dropout=0.1) for name in ("B", "L", "XL")}
RECIPES["tiny"] = RECIPES["cifar10"] = dict(batch=64, epochs=2, lr=2e-3, warmup=50, dropout=0.0)
RECIPES["shapes"] = dict(batch=64, epochs=8, lr=1e-3, warmup=50, dropout=0.0)
CHUNK = 256  # images that are tokenized before they count as done
HELD_OUT = 10_000  # images that are measured, at most


@dataclasses.dataclass
class Arguments(training.Arguments):
    """What only this training is told."""

    preset: str = option("model and its recipe: the numbers not given here (default: tiny)", "tiny", choices=[*RECIPES])
    tokenizer: str | None = option("checkpoint of a trained tokenizer", required=True)
    epochs: float | None = option("passes over the data, without --steps (default: the recipe's)", least=1e-6)
    width: int | None = option("instead of the preset's", least=1)
    layers: int | None = option("instead of the preset's", least=1)
    weight_decay: float = option("on matrices only (default: 0.05)", 0.05, least=0)
    dropout: float | None = option("on embeddings, attention and MLP (default: the recipe's)", least=0, most=1)
    class_dropout: float = option("share of samples that train as unconditional (default: 0.1)", 0.1, least=0, most=1)
    init: str | None = option("start from the weights of this Llama, of the same shape: for other data or tokenizer")
    ema: bool = option("also average the weights, and sample from the average", False)
    on_the_fly: bool = option("tokenize at every step instead of once: no RUN/codes, but slower", False)
    cfg: tuple[float, ...] = option("of the pictures: one number, or start and end", (4.0,), nargs="+")


# Tokenizing


def crops(image: Image.Image, size: int) -> list[Image.Image]:
    """Section 5's ten crops, after LlamaGen: five places of an int(1.1 size) centre crop, then the same of its mirror.

    Images below 64 pixels (CIFAR-10) have no room to move: the image and its mirror.
    """
    small = size < 64
    whole = dar.center_crop(image, size if small else int(1.1 * size))
    found = []
    for view in (whole, whole.transpose(Image.FLIP_LEFT_RIGHT)):
        end = whole.width - size
        middle = round(end / 2)
        places = [(0, 0)] if small else [(0, 0), (end, 0), (0, end), (end, end), (middle, middle)]
        found += [view.crop((x, y, x + size, y + size)) for x, y in places]
    return found


def one_crop(image: Image.Image, rng: np.random.Generator, size: int) -> Image.Image:
    """One of the crops, drawn at random: what training sees of an image at one step."""
    views = crops(image, size)
    return views[rng.integers(len(views))]


@functools.lru_cache(maxsize=8)
def mapped(path: Path) -> np.ndarray:
    """A .npy file, of which only the parts that are used are read. Every process maps it for itself, once."""
    return np.load(path, mmap_mode="r")


class CodeSamples(torch.utils.data.Dataset):
    """As training.Samples, already tokenized: sample number -> (codes int64 [N] of one crop, label, number, corrupt).

    folder: where extract_codes put them. It is the path, not the array, that a loader's worker processes are sent.
    """

    def __init__(self, folder: Path, data: training.ImageData, seed: int):
        self.folder, self.data, self.seed = folder, data, seed

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int, int, bool]:
        codes, sources = mapped(self.folder / "codes.npy"), mapped(self.folder / "sources.npy")
        index = training.data_index(position, len(self.data), self.seed)
        crop = training.sample_rng(self.seed, position).integers(codes.shape[1])  # the same crop that one_crop draws
        source = int(sources[index])  # another image, if this one is corrupt
        tokens = torch.from_numpy(codes[index, crop].astype(np.int64))
        return tokens, self.data.labels[source], position, source != index


def new_map(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Writes a .npy file of zeros and takes its space on the disk, now: a disk that fills up while a map is written
    kills the process without a word. Raises OSError naming the file."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    try:
        np.lib.format.open_memmap(path, "w+", dtype, shape).flush()
        if hasattr(os, "posix_fallocate"):
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        elif shutil.disk_usage(path.parent).free < size:
            raise OSError("the disk has less space")
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OSError(f"{path}: {size / 1e9:.2g} GB cannot be written ({error}); --on-the-fly needs no file") from None


def extract_codes(
    tokenizer, digest: str, data: training.ImageData, folder: Path, center_only: bool, processes: dar.Processes
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenizes all crops of all images once, and keeps the codes in folder.

    Returns two maps of files: codes [images, crops, N], and sources [images], the index of the image that each row
    shows: its own, or where that is corrupt, the next one's; -1 marks what is still to do, so that a stopped extraction
    goes on. Processes take turns at chunks of images. Raises ValueError if the folder holds the codes of another
    tokenizer or of other images, and OSError if there is no space for them.
    """
    c = tokenizer.config
    per_image = 1 if center_only else len(crops(Image.new("RGB", (c.image_size, c.image_size)), c.image_size))
    dtype = np.dtype(np.uint16 if c.codebook_size <= 2**16 else np.int32)
    manifest = {"tokenizer": digest, "data": data.digest, "images": len(data), "crops": per_image}
    manifest |= {"image_size": c.image_size, "dtype": dtype.name}
    manifest_path = folder / "manifest.json"

    def prepare() -> None:
        if manifest_path.exists():
            before = json.loads(manifest_path.read_text())
            for key, now in manifest.items():
                if before.get(key) != now:
                    change = f"{before.get(key)}, now {now}"
                    raise ValueError(f"{folder}: of another {key} ({change}); remove it or choose another --out")
            return
        folder.mkdir(parents=True, exist_ok=True)
        new_map(folder / "codes.npy", (len(data), per_image, c.num_tokens), dtype)
        to_do = np.full(len(data), -1, np.int32)
        dar.write_atomically(folder / "sources.npy", lambda file: np.save(file, to_do))
        # The manifest comes last: without it, nothing was begun.
        dar.write_atomically(manifest_path, lambda file: file.write(json.dumps(manifest, indent=1).encode()))

    processes.first_alone(prepare)
    codes, sources = (np.lib.format.open_memmap(folder / name, "r+") for name in ("codes.npy", "sources.npy"))
    starts = range(processes.rank * CHUNK, len(data), processes.world * CHUNK)
    missing = [start for start in starts if (sources[start : start + CHUNK] < 0).any()]
    quiet = processes.rank > 0 or not missing
    for start in tqdm(missing, desc=f"tokenizing {data.source}", disable=quiet, unit="chunk"):
        views, found = [], []
        for index in range(start, min(start + CHUNK, len(data))):
            image, source = data.next_readable(index)
            found.append(source)
            views += [dar.center_crop(image, c.image_size)] if center_only else crops(image, c.image_size)
        pixels = torch.from_numpy(np.stack([np.array(view) for view in views])).permute(0, 3, 1, 2)
        parts = [tokenizer.encode(dar.to_float(part.to(processes.device))).cpu() for part in pixels.split(64)]
        end = start + len(found)
        codes[start:end] = torch.cat(parts).view(-1, per_image, c.num_tokens).numpy()
        codes.flush()
        sources[start:end] = found
    sources.flush()
    processes.barrier()
    if (sources < 0).any():
        raise ValueError(f"{folder}: other processes wrote their codes elsewhere; all nodes must share --out")
    data.refuse_if_corrupt(int((sources != np.arange(len(data))).sum()), len(data))
    return codes, sources


# Measuring


def entropy(counts: np.ndarray) -> float:
    """Nats of the empirical distribution(s) in the rows of counts, averaged over rows."""
    p = counts / counts.sum(-1, keepdims=True)
    return float(-(p * np.log(np.maximum(p, 1e-300))).sum(-1).mean())


def unigram_entropies(codes: np.ndarray, vocab_size: int) -> dict[str, float]:
    """Nats per token if tokens were drawn independently: from one distribution, or from one for each position."""
    flat = codes.reshape(-1, codes.shape[-1])
    counts = np.zeros((flat.shape[1], vocab_size), np.int64)
    for start in range(0, len(flat), 10_000):  # in the order in which they lie on the disk
        part = flat[start : start + 10_000]
        for i in range(flat.shape[1]):
            counts[i] += np.bincount(part[:, i], minlength=vocab_size)
    return {"unigram": entropy(counts.sum(0)[None]), "unigram_by_position": entropy(counts)}


@torch.no_grad()
def held_out(model, codes: np.ndarray, labels: np.ndarray, run: training.TrainingRun) -> dict[str, float]:
    """Nats per token with the right labels, with shuffled ones, and by group of tokens with the right ones."""
    shuffled, device = labels[np.random.default_rng(0).permutation(len(labels))], run.processes.device
    losses = []
    for use in (labels, shuffled):
        total = torch.zeros(codes.shape[1], device=device)
        for start in range(0, len(codes), 250):
            part = torch.from_numpy(codes[start : start + 250].astype(np.int64)).to(device)
            with run.autocast():
                logits = model(part[:, :-1], torch.from_numpy(use[start : start + 250]).to(device))
            total += F.cross_entropy(logits.transpose(1, 2), part, reduction="none").sum(0)
        losses.append(total / len(codes))
    groups = losses[0].view(model.tokenizer.config.num_groups, -1).mean(1).tolist()
    found = {"val_loss": losses[0].mean().item(), "val_shuffled": losses[1].mean().item()}
    return found | {f"val_group_{k}": loss for k, loss in enumerate(groups)}


@torch.no_grad()
def picture(model: dar.ARTransformer, cfg, device) -> Image.Image:
    """Samples of up to ten classes, a column a class, always from the same seeds: the same pictures getting better."""
    columns, rows = min(10, model.config.num_classes), 4
    labels = torch.arange(columns, device=device).repeat(rows)
    *_, last = dar.stream(model, model.tokenizer, labels, cfg=cfg, seeds=0)
    return dar.tile(last.x, columns)


# Training


def learning_rate(step: int, args: Arguments) -> float:
    """Constant, then linear to 1e-5 over the last sixth (section 5: 50 of 300 epochs); warm-up if asked for."""
    rest = min(1.0, (args.steps - step) / max(args.steps / 6, 1))
    return min(1.0, (step + 1) / max(args.warmup, 1)) * (1e-5 + (args.lr - 1e-5) * rest)


def build_model(args: Arguments, tokenizer, class_names: list[str]) -> dar.ARTransformer:
    """A Llama for the tokenizer's codes, fresh or with --init's weights. Raises ValueError for a width or dropout that
    cannot be, or naming --init's file if its Llama has another shape."""
    torch.manual_seed(args.seed)
    t, preset = tokenizer.config, dar.AR_PRESETS[args.preset]
    width, layers = args.width or preset.width, args.layers or preset.layers
    model = dar.ARTransformer(
        dar.ARConfig(width, layers, t.codebook_size, len(class_names), t.num_tokens, args.dropout)
    )
    if args.init:
        first = dar.load_ar(args.init, dtype=torch.float32)
        same = dataclasses.replace(first.config, dropout=args.dropout) == model.config
        dar.require(same, f"--init {args.init}: is {first.config}, this run's is {model.config}")
        model.load_state_dict(first.state_dict())
    model.class_names = class_names
    model.attach_tokenizer(tokenizer)
    return model


def main() -> int:
    args = training.parse_arguments(Arguments, __doc__)
    training.check_arguments(args, RECIPES[args.preset])
    cfg = args.cfg[0] if len(args.cfg) == 1 else tuple(args.cfg)
    dar.guidance_schedule(cfg, 1)  # refuses now what the first picture would stumble over
    processes = dar.Processes.start(dar.pick_device(args.device))
    device, folder = processes.device, Path(args.out)
    tokenizer = dar.load_tokenizer(args.tokenizer, device)
    t, digest = tokenizer.config, dar.fingerprint([tokenizer])
    data = processes.first_alone(lambda: training.ImageData(args.data, t.image_size))
    val = training.ImageData(args.val, t.image_size, held_out=True) if args.val else None
    if val and val.class_names != data.class_names:
        raise ValueError(f"--val {args.val}: its classes are not those of {args.data}")
    args.steps = args.steps or max(1, int(args.epochs * len(data) / args.batch))

    model = build_model(args, tokenizer, data.class_names).to(device)
    ema = training.EMA(model) if args.ema else None
    shown = ema.model if ema else model
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, args.lr, (0.9, 0.95), fused=device.type != "mps")
    settings = {f"model {k}": v for k, v in dataclasses.asdict(model.config).items()}
    settings |= {"data": data.digest, "tokenizer": digest, "class_dropout": args.class_dropout}
    settings["init"] = args.init
    columns = ["val_loss", "val_shuffled", "unigram", "unigram_by_position"]
    columns += [f"val_group_{k}" for k in range(t.num_groups)]
    following = f"sample.py --ckpt {args.out}/last.pt"
    run = training.TrainingRun(args, processes, model, ema, optimizer, settings, [], columns, following)

    # What cannot work has been refused by now: tokenizing may take hours.
    if args.on_the_fly:
        samples = training.Samples(data, functools.partial(one_crop, size=t.image_size), args.seed)
    else:
        codes, _ = extract_codes(tokenizer, digest, data, folder / "codes", False, processes)
        samples = CodeSamples(folder / "codes", data, args.seed)
    if val:
        val_codes, sources = extract_codes(tokenizer, digest, val, folder / "codes-val", True, processes)
        chosen = np.sort(np.random.default_rng(0).permutation(len(val))[:HELD_OUT])
        val_codes, val_labels = val_codes[chosen, 0], val.labels[sources[chosen]]
        unigram = unigram_entropies(val_codes if args.on_the_fly else codes, t.codebook_size)

    def losses(chunk) -> dict[str, torch.Tensor]:
        """Eq. 6 for a micro-batch, nats per token; scaled so that micro-batches sum to the mean over the batch."""
        tokens, labels, positions = chunk
        if args.on_the_fly:  # images still; in float32, as when they are cached
            with torch.autocast(device.type, enabled=False):
                tokens = tokenizer.encode(dar.to_float(tokens))
        drop = [np.random.default_rng([args.seed, 3, p]).random() < args.class_dropout for p in positions.tolist()]
        dropped = torch.tensor(drop, device=device)
        loss = dar.ar_loss(run.parallel, tokens, labels, dropped, model.config.num_classes)
        return {"loss": loss * (len(tokens) / run.share)}

    for step, chunks in run.steps(samples):
        model.train()
        # of the dropouts: a step that is taken again after resuming draws the same
        torch.manual_seed((args.seed * 1_000_003 + step) * processes.world + processes.rank)
        run.optimise(losses, chunks, learning_rate(step, args))
        row = run.row()
        if row is not None:
            if run.due(args.picture_every) and processes.rank == 0:
                shown.eval()
                picture(shown, cfg, device).save(folder / f"step-{step + 1}.png")
                row |= held_out(shown, val_codes, val_labels, run) | unigram if val else {}
            run.log(row)
    return 128 + run.signal if run.signal else 0


if __name__ == "__main__":
    dar.command_line(main)

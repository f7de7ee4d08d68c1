"""Trains the Llama on a tokenizer's codes (sections 3.2, 4 and 5 of the paper).

From nothing:      python train_ar.py --data shapes --tokenizer runs/tokenizer/last.pt --out runs/ar
A folder a class:  python train_ar.py --data cifar10/train --tokenizer runs/tokenizer/last.pt --out runs/ar
The paper's:       torchrun --nproc_per_node=8 train_ar.py --preset XL --data imagenet/train \\
                       --tokenizer D-AR-tokenizer_v1.pt --out runs/xl
On two nodes:      the same on each, with --nnodes=2 --rdzv_backend=c10d --rdzv_id=xl --rdzv_endpoint=FIRST_NODE:29500

The images are first tokenized once, into RUN/codes, which several nodes must share; or with --on-the-fly as they are
needed. The same command again goes on where the run stopped. RUN/last.pt carries the tokenizer and the class names:
`python sample.py --ckpt RUN/last.pt` needs nothing else.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import dar

# "B", "L" and "XL" follow section 5: batch 1024, 300 epochs, 4e-4 falling to 1e-5 over the last 50. The others are
# ours: so short that they see each image twice, they do without dropout.
RECIPES = {name: dict(batch=1024, epochs=300, lr=4e-4, warmup=0, dropout=0.1) for name in ("B", "L", "XL")}
RECIPES["tiny"] = RECIPES["cifar10"] = dict(batch=64, epochs=2, lr=2e-3, warmup=50, dropout=0.0)
CHUNK = 256  # images tokenized and marked as done at once
HELD_OUT = 10_000  # images that are measured, at most


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    dar.add_training_arguments(parser, dar.AR_PRESETS)
    add("--tokenizer", required=True, help="checkpoint of a trained tokenizer")
    add("--epochs", type=float, help="passes over the data, where --steps is not given (default: the preset's)")
    add("--width", type=int, help="instead of the preset's")
    add("--layers", type=int, help="instead of the preset's")
    add("--weight-decay", type=float, default=0.05, help="on matrices only (default: 0.05)")
    add("--dropout", type=float, help="on embeddings, attention and MLP outputs (default: the preset's)")
    add("--class-dropout", type=float, default=0.1, help="share of samples that train as unconditional (default: 0.1)")
    add("--ema", action="store_true", help="also average the weights, and sample from the average")
    add("--on-the-fly", action="store_true", help="tokenize at every step instead of once: no RUN/codes, but slower")
    add("--cfg", type=float, nargs="+", default=[4.0], help="of the pictures: one number, or start and end")
    args = parser.parse_args()
    recipe = RECIPES[args.preset]
    dar.check_training_arguments(args, recipe, weight_decay=0, dropout=0, class_dropout=0, epochs=0)
    return args


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


def fingerprint(tokenizer: dar.SequentialDiffusionTokenizer) -> str:
    """SHA-256 of what a tokenizer's codes depend on, N and the weights: codes belong to one tokenizer."""
    digest = hashlib.sha256(str(tokenizer.config.num_tokens).encode())
    for name, value in sorted(tokenizer.state_dict().items()):
        digest.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def one_crop(image: Image.Image, rng: np.random.Generator, size: int) -> Image.Image:
    """One of the crops, drawn at random: what training sees of an image at one step."""
    views = crops(image, size)
    return views[rng.integers(len(views))]


class CodeSamples(torch.utils.data.Dataset):
    """Sample position -> (codes int64 [N] of one crop, label, position, 0): dar.Samples, already tokenized."""

    def __init__(self, codes: np.ndarray, data: dar.ImageData, seed: int):
        self.codes, self.data, self.seed = codes, data, seed
        self.usable = np.flatnonzero(data.unreadable.numpy() == 0)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int, int, int]:
        index = self.usable[dar.data_index(position, len(self.usable), self.seed)]
        crop = dar.sample_rng(self.seed, position).integers(self.codes.shape[1])  # the same crop that one_crop draws
        return torch.from_numpy(self.codes[index, crop].astype(np.int64)), self.data.labels[index], position, 0


def extract_codes(
    tokenizer, digest: str, data: dar.ImageData, folder: Path, center_only: bool, processes: dar.Processes
):
    """Codes of all crops of all images, a memory-mapped uint16 array [images, crops, N], made once and kept in folder.

    Chunks of images are shared among the processes and marked when done, so that a stopped extraction continues. Images
    that cannot be read are marked in data.unreadable and their codes are 0. Raises ValueError if the folder holds the
    codes of another tokenizer or of other images.
    """
    c = tokenizer.config
    per_image = 1 if center_only else len(crops(Image.new("RGB", (c.image_size, c.image_size)), c.image_size))
    manifest = {"tokenizer": digest, "data": data.digest, "images": len(data), "crops": per_image}
    manifest["image_size"] = c.image_size
    shape, chunks = (len(data), per_image, c.num_tokens), -(-len(data) // CHUNK)
    path, done_path, manifest_path = folder / "codes.npy", folder / "done.npy", folder / "manifest.json"
    bad_path = folder / "unreadable.npy"

    def prepare() -> None:
        if manifest_path.exists():
            before = json.loads(manifest_path.read_text())
            for key, now in manifest.items():
                if before.get(key) != now:
                    change = f"{before.get(key)}, now {now}"
                    raise ValueError(f"{folder}: of another {key} ({change}); remove it or choose another --out")
        else:  # the manifest comes last: without it, nothing was done yet
            folder.mkdir(parents=True, exist_ok=True)
            np.lib.format.open_memmap(path, "w+", np.uint16, shape).flush()
            np.lib.format.open_memmap(done_path, "w+", np.uint8, (chunks,)).flush()
            np.lib.format.open_memmap(bad_path, "w+", np.uint8, (len(data),)).flush()
            dar.write_atomically(manifest_path, lambda file: file.write(json.dumps(manifest, indent=1).encode()))

    processes.first_alone(prepare)
    codes, done, bad = (np.lib.format.open_memmap(p, "r+") for p in (path, done_path, bad_path))
    missing = [i for i in range(processes.rank, chunks, processes.world) if not done[i]]
    for i in tqdm(missing, desc=f"tokenizing {data.source}", disable=processes.rank > 0 or not missing, unit="chunk"):
        indices = range(i * CHUNK, min((i + 1) * CHUNK, len(data)))
        views = []
        for index in indices:
            image, found = data.next_readable(index)
            bad[index] = found != index
            views += [dar.center_crop(image, c.image_size)] if center_only else crops(image, c.image_size)
        pixels = torch.from_numpy(np.stack([np.array(view) for view in views])).permute(0, 3, 1, 2)
        found = torch.cat([tokenizer.encode(dar.to_float(part.to(processes.device))) for part in pixels.split(64)])
        codes[indices.start : indices.stop] = found.view(-1, per_image, c.num_tokens).cpu().numpy()
        codes.flush()
        done[i] = 1
    done.flush()
    bad.flush()
    processes.barrier()
    if not np.load(done_path, mmap_mode="r").all():
        raise ValueError(f"{folder}: other processes wrote their codes elsewhere; all nodes must share --out")
    data.unreadable |= torch.from_numpy(np.array(bad))
    data.refuse_if_corrupt()
    return codes


# Measuring


def entropy(counts: np.ndarray) -> float:
    """Nats of the empirical distribution(s) in the rows of counts, averaged over rows."""
    p = counts / counts.sum(-1, keepdims=True)
    return float(-(p * np.log(np.maximum(p, 1e-300))).sum(-1).mean())


def unigram_entropies(codes: np.ndarray, vocab_size: int) -> dict[str, float]:
    """Nats per token if tokens were drawn independently: from one distribution, or from one for each position."""
    flat = codes.reshape(-1, codes.shape[-1])
    counts = np.stack([np.bincount(flat[:, i], minlength=vocab_size) for i in range(flat.shape[1])])
    return {"unigram": entropy(counts.sum(0)[None]), "unigram_by_position": entropy(counts)}


@torch.no_grad()
def held_out(model, codes: np.ndarray, labels: np.ndarray, run: dar.TrainingRun) -> dict[str, float]:
    """Nats per token with the right labels, with shuffled ones, and by group of tokens with the right ones."""
    shuffled, device = labels[np.random.default_rng(0).permutation(len(labels))], run.processes.device
    losses = []
    for use in (labels, shuffled):
        total = torch.zeros(codes.shape[1], device=device)
        for start in range(0, len(codes), 250):
            part = torch.from_numpy(codes[start : start + 250].astype(np.int64)).to(device)
            with torch.autocast(device.type, run.dtype, enabled=run.dtype != torch.float32):
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
    for shown in dar.stream(model, model.tokenizer, labels, cfg, seeds=0):  # noqa: B007
        pass
    return dar.tile(shown.x, columns)


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Constant, then linear to 1e-5 over the last sixth (section 5: 50 of 300 epochs); warm-up if asked for."""
    rest = min(1.0, (args.steps - step) / max(args.steps / 6, 1))
    return min(1.0, (step + 1) / max(args.warmup, 1)) * (1e-5 + (args.lr - 1e-5) * rest)


def main() -> int:
    args = parse_arguments()
    processes = dar.Processes.start(dar.pick_device(args.device))
    device, folder = processes.device, Path(args.out)
    cfg = args.cfg[0] if len(args.cfg) == 1 else tuple(args.cfg)
    dar.guidance_schedule(cfg, 1)  # refuses now what the first picture would stumble over
    tokenizer = dar.load_tokenizer(args.tokenizer, device)
    dar.keep_freed_memory()
    t, digest = tokenizer.config, fingerprint(tokenizer)
    data = processes.first_alone(lambda: dar.ImageData(args.data, t.image_size, listing=folder / "images.list"))
    args.steps = args.steps or max(1, int(args.epochs * len(data) / args.batch))
    codes = None if args.on_the_fly else extract_codes(tokenizer, digest, data, folder / "codes", False, processes)
    if args.val:
        val = dar.ImageData(args.val, t.image_size, held_out=True)
        if val.class_names != data.class_names:
            raise ValueError(f"--val {args.val}: its classes are not those of {args.data}")
        chosen = np.sort(np.random.default_rng(0).permutation(len(val))[:HELD_OUT])
        val_codes = extract_codes(tokenizer, digest, val, folder / "codes-val", True, processes)[chosen, 0]
        unigram = unigram_entropies(val_codes if codes is None else codes, t.codebook_size)

    torch.manual_seed(args.seed)
    preset, classes = dar.AR_PRESETS[args.preset], len(data.class_names)
    width, layers = args.width or preset.width, args.layers or preset.layers
    config = dar.ARConfig(width, layers, t.codebook_size, classes, t.num_tokens, args.dropout)
    model = dar.ARTransformer(config).to(device)
    model.class_names = data.class_names
    model.attach_tokenizer(tokenizer)
    ema = dar.EMA(model) if args.ema else None
    shown = ema.model if ema else model
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, args.lr, (0.9, 0.95), fused=device.type == "cuda")
    settings = {f"model {k}": v for k, v in dataclasses.asdict(config).items()}
    settings |= {"data": data.digest, "tokenizer": digest, "class_dropout": args.class_dropout}
    columns = ["val_loss", "val_shuffled", "unigram", "unigram_by_position"]
    columns += [f"val_group_{k}" for k in range(t.num_groups)]
    run = dar.TrainingRun(args, processes, model, ema, optimizer, settings, [], columns)

    def losses(chunk) -> dict[str, torch.Tensor]:
        """Eq. 6 for a micro-batch, nats per token; scaled so that micro-batches sum to the mean over the batch."""
        tokens, labels, positions = chunk
        if codes is None:  # images still; in float32, as when they are cached
            with torch.autocast(device.type, enabled=False):
                tokens = tokenizer.encode(dar.to_float(tokens))
        drop = [np.random.default_rng([args.seed, 3, p]).random() < args.class_dropout for p in positions.tolist()]
        labels = labels.masked_fill(torch.tensor(drop, device=device), config.num_classes)
        logits = run.parallel(tokens[:, :-1], labels)  # [b, N, V]: all tokens at once
        return {"loss": F.cross_entropy(logits.flatten(0, 1), tokens.flatten()) * (len(tokens) / run.share)}

    draw = functools.partial(one_crop, size=t.image_size)
    samples = dar.Samples(data, draw, args.seed) if codes is None else CodeSamples(codes, data, args.seed)
    for step, chunks in zip(run.steps(), run.batches(samples)):
        model.train()
        # of the dropouts: a step that is taken again after resuming draws the same
        torch.manual_seed((args.seed * 1_000_003 + step) * processes.world + processes.rank)
        run.optimise(losses, chunks, learning_rate(step, args))
        row = run.row()
        if row is not None:
            if run.due(args.picture_every) and processes.rank == 0:
                shown.eval()
                picture(shown, cfg, device).save(folder / f"step-{step + 1}.png")
                row |= held_out(shown, val_codes, val.labels[chosen], run) | unigram if args.val else {}
            run.log(row)
    return run.exit_code


if __name__ == "__main__":
    dar.command_line(main)

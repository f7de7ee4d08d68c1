"""Trains the Llama on a tokenizer's codes (sections 3.2 and 4 of the paper).

On this machine, from nothing: python train_ar.py --data shapes --tokenizer runs/tokenizer/last.pt --out runs/ar
On a folder a class a folder:  python train_ar.py --data cifar10/train --tokenizer runs/tokenizer/last.pt --out runs/ar
The paper's, on one node:      torchrun --nproc_per_node=8 train_ar.py --preset XL --data imagenet/train \\
                                   --tokenizer D-AR-tokenizer_v1.pt --out runs/xl

The images are first tokenized once, into RUN/codes. The same command again goes on where the run stopped. RUN/last.pt
carries the tokenizer and the class names: `python sample.py --ckpt RUN/last.pt` needs nothing else.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import dar

# "B", "L" and "XL" follow section 5: batch 1024, 300 epochs, 4e-4 falling to 1e-5 over the last 50. "tiny" is ours: so
# short that it sees each image twice, it does without dropout.
RECIPES = {name: dict(batch=1024, epochs=300, lr=4e-4, warmup=0, dropout=0.1) for name in ("B", "L", "XL")}
RECIPES["tiny"] = dict(batch=64, epochs=2, lr=2e-3, warmup=50, dropout=0.0)
COLUMNS = [
    "step",
    "loss",
    "lr",
    "grad_norm",
    "images_per_s",
    "val_loss",
    "val_shuffled",
    "unigram",
    "unigram_by_position",
]
CHUNK = 256  # images tokenized and marked as done at once


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, help="folder with one sub-folder of images a class, or the word 'shapes'")
    add("--val", help="the same, held out: its loss is logged, whole and by group")
    add("--tokenizer", required=True, help="checkpoint of a trained tokenizer")
    add("--out", required=True, help="folder of the run; an existing run there is continued")
    add("--preset", default="tiny", choices=dar.AR_PRESETS, help="model and recipe (default: tiny)")
    add("--width", type=int, help="instead of the preset's")
    add("--layers", type=int, help="instead of the preset's")
    add("--epochs", type=float, help="passes over the data (default: the preset's)")
    add("--steps", type=int, help="optimisation steps, instead of --epochs")
    add("--batch", type=int, help="images a step, over all processes (default: the preset's)")
    add("--micro-batch", type=int, help="images that one process takes at once; the rest is accumulated (default: all)")
    add("--lr", type=float, help="learning rate (default: the preset's)")
    add("--weight-decay", type=float, default=0.05, help="on matrices only (default: 0.05)")
    add("--warmup", type=int, help="steps over which the rate rises from 0 (default: the preset's)")
    add("--dropout", type=float, help="on embeddings, attention and MLP outputs (default: the preset's)")
    add("--class-dropout", type=float, default=0.1, help="share of samples that train as unconditional (default: 0.1)")
    add("--clip", type=float, default=1.0, help="largest gradient norm (default: 1)")
    add("--ema", action="store_true", help="also average the weights, and sample from the average")
    add(
        "--cfg",
        type=float,
        nargs="+",
        default=[1.1, 4.0],
        help="guidance of the pictures: one number, or start and end",
    )
    add("--seed", type=int, default=0)
    add(
        "--precision",
        default="auto",
        choices=["auto", "float32", "bfloat16"],
        help="of products; auto: bfloat16 if fast",
    )
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    add("--log-every", type=int, default=50)
    add("--picture-every", type=int, default=500, help="also how often the held-out images are measured")
    add("--save-every", type=int, default=500)
    add("--resume", default="auto", choices=["auto", "never"])
    args = parser.parse_args()
    for name, value in RECIPES[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def crops(image: Image.Image, size: int) -> list[Image.Image]:
    """Section 5's ten crops, after LlamaGen: five places of an int(1.1 size) centre crop, then the same of its mirror.

    Images below 64 pixels (CIFAR-10) have no room to move: the image and its mirror.
    """
    small = size < 64
    whole = (
        dar.center_crop(image, size if small else int(1.1 * size)) if image.size != (size, size) or not small else image
    )
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


def extract_codes(tokenizer, data: dar.ImageData, folder: Path, center_only: bool, device, rank: int, world: int):
    """Codes of all crops of all images, a memory-mapped uint16 array [images, crops, N], made once and kept in folder.

    Chunks of images are shared among the processes and marked when done, so that a stopped extraction continues.
    Raises ValueError if the folder holds the codes of another tokenizer or of other images.
    """
    c = tokenizer.config
    per_image = 1 if center_only else len(crops(Image.new("RGB", (c.image_size, c.image_size)), c.image_size))
    manifest = {"tokenizer": fingerprint(tokenizer), "data": data.source, "images": len(data), "crops": per_image}
    shape, chunks = (len(data), per_image, c.num_tokens), -(-len(data) // CHUNK)
    path, done_path, manifest_path = folder / "codes.npy", folder / "done.npy", folder / "manifest.json"
    if manifest_path.exists():
        before = json.loads(manifest_path.read_text())
        for key, now in manifest.items():
            if before.get(key) != now:
                raise ValueError(
                    f"{folder}: of another {key} ({before.get(key)}, now {now}); remove it or choose another --out"
                )
    elif rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        np.lib.format.open_memmap(path, "w+", np.uint16, shape).flush()
        np.lib.format.open_memmap(done_path, "w+", np.uint8, (chunks,)).flush()
        dar.write_atomically(manifest_path, lambda file: file.write(json.dumps(manifest, indent=1).encode()))
    if world > 1:
        torch.distributed.barrier()
    codes, done = np.lib.format.open_memmap(path, "r+"), np.lib.format.open_memmap(done_path, "r+")
    missing = [i for i in range(rank, chunks, world) if not done[i]]
    for i in tqdm(missing, desc=f"tokenizing {data.source}", disable=rank > 0 or not missing, dynamic_ncols=True):
        views = []
        for index in range(i * CHUNK, min((i + 1) * CHUNK, len(data))):
            image = data.image(index)
            views += [dar.center_crop(image, c.image_size)] if center_only else crops(image, c.image_size)
        pixels = torch.from_numpy(np.stack([np.array(view) for view in views])).permute(0, 3, 1, 2)
        found = torch.cat([tokenizer.encode(dar.to_float(part.to(device))) for part in pixels.split(64)])
        codes[i * CHUNK : (i + 1) * CHUNK] = found.view(-1, per_image, c.num_tokens).cpu().numpy()
        codes.flush()
        done[i] = 1
    done.flush()
    if world > 1:
        torch.distributed.barrier()
    return codes


def learning_rate(step: int, steps: int, rate: float, warmup: int) -> float:
    """Constant, then linear to 1e-5 over the last sixth (section 5: 50 of 300 epochs); warm-up if asked for."""
    rest = min(1.0, (steps - step) / max(steps / 6, 1))
    return min(1.0, (step + 1) / max(warmup, 1)) * (1e-5 + (rate - 1e-5) * rest)


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
def held_out(model, codes: np.ndarray, labels: np.ndarray, device, bf16: bool) -> tuple[dict[str, float], list[float]]:
    """Nats per token with the right labels, with shuffled ones, and by group of tokens with the right ones."""
    model.eval()
    shuffled = labels[np.random.default_rng(0).permutation(len(labels))]
    losses = []
    for use in (labels, shuffled):
        total = torch.zeros(codes.shape[1], device=device)
        for start in range(0, len(codes), 250):
            part = torch.from_numpy(codes[start : start + 250].astype(np.int64)).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits = model(part[:, :-1], torch.from_numpy(use[start : start + 250]).to(device))
            total += F.cross_entropy(logits.transpose(1, 2), part, reduction="none").sum(0)
        losses.append(total / len(codes))
    groups = losses[0].view(model.tokenizer.config.num_groups, -1).mean(1).tolist()
    return {"val_loss": losses[0].mean().item(), "val_shuffled": losses[1].mean().item()}, groups


def main() -> int:
    args = parse_arguments()
    rank, world, device = dar.init_distributed(dar.pick_device(args.device))
    tokenizer = dar.load_tokenizer(args.tokenizer, device)
    t = tokenizer.config
    data = dar.ImageData(args.data, t.image_size)
    val = dar.ImageData(args.val, t.image_size, held_out=True) if args.val else None
    if args.batch % world:
        raise ValueError(f"--batch {args.batch} cannot be shared equally by {world} processes")
    share = args.batch // world
    micro = args.micro_batch or share
    if share % micro:
        raise ValueError(f"--micro-batch {micro} does not divide the {share} images of one process")
    if len(args.cfg) > 2:
        raise ValueError(f"--cfg {args.cfg}: expected one number, or start and end")
    cfg = args.cfg[0] if len(args.cfg) == 1 else tuple(args.cfg)
    steps = args.steps or max(1, int(args.epochs * len(data) / args.batch))
    bf16 = args.precision == "bfloat16" or args.precision == "auto" and dar.has_fast_bfloat16(device)
    if device.type == "cpu":
        torch.backends.cuda.enable_flash_sdp(False)  # also the CPU's switch: its backward is slow at short lengths

    folder = Path(args.out)
    codes = extract_codes(tokenizer, data, folder / "codes", False, device, rank, world)
    labels = np.array(data.labels)
    if val is not None:
        if val.class_names != data.class_names:
            raise ValueError(f"--val {args.val}: its classes are not those of {args.data}")
        val_codes = extract_codes(tokenizer, val, folder / "codes-val", True, device, rank, world)[
            : 2000 if args.val == "shapes" else 10000, 0
        ]
        val_labels = np.array(val.labels)[: len(val_codes)]
        unigram = unigram_entropies(codes, t.codebook_size)

    torch.manual_seed(args.seed)
    preset = dar.AR_PRESETS[args.preset]
    config = dar.ARConfig(
        args.width or preset.width,
        args.layers or preset.layers,
        t.codebook_size,
        len(data.class_names),
        t.num_tokens,
        args.dropout,
    )
    model = dar.ARTransformer(config).to(device)
    ema = dar.EMA(model) if args.ema else None
    for m in (model, ema.model) if ema else (model,):
        m.attach_tokenizer(tokenizer)
        m.class_names = data.class_names
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, args.lr, (0.9, 0.95), fused=device.type == "cuda")
    settings = {f"model {k}": v for k, v in dataclasses.asdict(config).items()}
    settings |= {"data": str(args.data), "images": len(data), "tokenizer": fingerprint(tokenizer), "seed": args.seed}
    settings |= {"batch": args.batch, "class_dropout": args.class_dropout}
    columns = COLUMNS + [f"val_group_{k}" for k in range(t.num_groups)]
    run = dar.TrainingRun(folder, settings, columns, args.resume == "auto", rank == 0)
    run.restore(model, ema, optimizer)
    parallel = DistributedDataParallel(model, [device.index] if device.type == "cuda" else None) if world > 1 else model

    bar = tqdm(total=steps, initial=run.step, disable=rank > 0, unit="step", dynamic_ncols=True)
    sums, since, clock = torch.zeros(2, device=device), run.step, time.time()
    for step in range(run.step, steps):
        rate = learning_rate(step, steps, args.lr, args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        model.train()
        torch.manual_seed((args.seed * 1_000_003 + step) * world + rank)  # of the dropouts: a resumed step repeats them
        optimizer.zero_grad(set_to_none=True)
        first = step * args.batch + rank * share
        for start in range(first, first + share, micro):
            batch = [draw(position, codes, labels, args, config) for position in range(start, start + micro)]
            tokens = torch.from_numpy(np.stack([c for c, _ in batch]).astype(np.int64)).to(device)
            classes = torch.tensor([label for _, label in batch], device=device)
            wait = parallel.no_sync() if world > 1 and start + micro < first + share else contextlib.nullcontext()
            with wait:
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    logits = parallel(tokens[:, :-1], classes)  # [b, N, V]: eq. 6 for all tokens at once
                loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten()) * (micro / share)
                loss.backward()
            sums[1] += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        if ema:
            ema.update(model)
        sums[0] += norm
        bar.update()

        done = step + 1
        last = done == steps
        if done % args.log_every == 0 or last:
            if world > 1:
                torch.distributed.all_reduce(sums)
            norm, loss = (sums / world / (done - since)).tolist()
            if not np.isfinite(norm + loss):
                print(f"error: step {done}: loss {loss}, gradient norm {norm}; not finite, stopped", file=sys.stderr)
                return 3
            row = dict(step=done, loss=loss, lr=rate, grad_norm=norm)
            row["images_per_s"] = args.batch * (done - since) / (time.time() - clock)
            bar.set_postfix(loss=f"{loss:.3f}", images_s=f"{row['images_per_s']:.0f}")
            if rank == 0 and (done % args.picture_every == 0 or last):
                best = ema.model if ema else model
                best.eval()
                picture(best, cfg, device).save(run.folder / f"step-{done}.png")
                if val is not None:
                    found, by_group = held_out(best, val_codes, val_labels, device, bf16)
                    row |= found | unigram | {f"val_group_{k}": loss for k, loss in enumerate(by_group)}
            run.log(row)
            sums.zero_()
            since, clock = done, time.time()
        stop = run.stopping(device)
        if done % args.save_every == 0 or last or stop:
            run.save(done, model, ema, optimizer)
        if stop:
            bar.close()
            print(f"stopped after step {done}, saved; the same command goes on", file=sys.stderr)
            return 128 + run.signal
    bar.close()
    return 0


def draw(position: int, codes: np.ndarray, labels: np.ndarray, args, config: dar.ARConfig) -> tuple[np.ndarray, int]:
    """Training sample `position`: the codes of one crop of its image, drawn at random, and its label or no label."""
    index, rng = dar.data_index(position, len(labels), args.seed), dar.sample_rng(args.seed, position)
    crop, drop = rng.integers(codes.shape[1]), rng.random() < args.class_dropout
    return codes[index, crop], config.num_classes if drop else int(labels[index])


@torch.no_grad()
def picture(model: dar.ARTransformer, cfg, device) -> Image.Image:
    """Samples of up to ten classes, a column a class, always from the same seeds: the same pictures getting better."""
    columns, rows = min(10, model.config.num_classes), 4
    labels = torch.arange(columns, device=device).repeat(rows)
    for shown in dar.stream(model, model.tokenizer, labels, cfg, seeds=0):  # noqa: B007
        pass
    return dar.tile(shown.x, columns)


if __name__ == "__main__":
    dar.command_line(main)

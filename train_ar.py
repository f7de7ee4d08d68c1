"""Trains the Llama on a tokenizer's codes (sections 3.2, 4 and 5 of the paper).

From nothing:
    python train_ar.py --preset shapes --data shapes --tokenizer runs/shapes/last.pt \\
        --out runs/shapes-ar
On images, a folder with a sub-folder for each class:
    python train_ar.py --data cifar10/train --tokenizer runs/tokenizer/last.pt --out runs/ar
The paper's, on eight GPUs; for two nodes see train_tokenizer.py:
    torchrun --nproc_per_node=8 train_ar.py --preset XL --data imagenet/train \\
        --tokenizer D-AR-tokenizer_v1.pt --out runs/xl

The images are first tokenized once, into RUN/codes, which several nodes must share; or with
--on-the-fly as they are needed. The same command again goes on where the run stopped. RUN/last.pt
carries the tokenizer and the class names: `python sample.py --ckpt RUN/last.pt` needs nothing else.
"""

import argparse
import copy
import dataclasses
import functools
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import dar
from common.cli import command_line, integer, real, say
from common.distributed import Processes, start_processes
from common.files import (
    fill_chunks,
    fingerprint,
    lock_folder,
    read_chunks,
    write_atomically,
    write_npy,
)
from common.images import center_crop, tile, to_float
from common.plan import ar_cost, refuse_if_too_large
from common.speed import pick_dtype
from common.threads import Threads
from common.training import (
    RUN_COLUMNS,
    ImageData,
    Log,
    LossScaler,
    Samples,
    State,
    StopSignal,
    add_arguments,
    all_reduce_stats,
    clip_gradients,
    count_workers,
    data_index,
    describe_recipe,
    divide_batch,
    fill_in,
    fill_in_warmups,
    is_due,
    iterate_batches,
    refuse_other_shape,
    resume_run,
    run_row,
    sample_numbers,
    sample_rng,
    save_run,
    say_goodbye,
    sync_gradients,
    will_resume,
    wrap_model,
)

# "B", "L" and "XL" follow section 5: batch 1024, 300 epochs, 4e-4 falling to 1e-5 over the last 50.
# The others are ours: so short that they see each image twice (eight times in "shapes"), they do
# without dropout.
PAPER = {
    "batch": 1024,
    "epochs": 300,
    "lr": 4e-4,
    "warmup": 0,
    "dropout": 0.1,
    "micro_batch": 64,
    "picture_every": 5000,
    "save_every": 5000,
}
OURS = {
    "batch": 64,
    "epochs": 2,
    "lr": 2e-3,
    "warmup": 50,
    "dropout": 0.0,
    "picture_every": 500,
    "save_every": 500,
}
RECIPES = {
    "B": PAPER,
    "L": PAPER,
    "XL": PAPER,
    "tiny": OURS,
    "cifar10": OURS,
    "shapes": OURS | {"epochs": 8, "lr": 1e-3},
}
HELD_OUT = 10_000  # images that are measured, at most


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    add = parser.add_argument
    add(
        "--preset",
        default="cifar10",
        choices=list(RECIPES),
        help="model and recipe (default: cifar10)",
    )
    add("--tokenizer", help="checkpoint of a trained tokenizer, or of a Llama that carries one")
    add("--epochs", type=real(1e-6), help="passes over the data, without --steps (the recipe's)")
    add("--width", type=integer(1), help="instead of the preset's")
    add("--layers", type=integer(1), help="instead of the preset's")
    add("--weight-decay", type=real(0), default=0.05, help="on matrices only (default: 0.05)")
    add("--dropout", type=real(0, 1), help="on embeddings, attention and MLP (the recipe's)")
    add("--class-dropout", type=real(0, 1), default=0.1, help="share without class (default: 0.1)")
    add("--init", help="start from the weights of this Llama; its classes may be others")
    add("--ema", action="store_true", help="also average the weights, and sample from the average")
    add("--on-the-fly", action="store_true", help="tokenize at every step instead of once")
    add("--cfg", type=float, nargs="+", default=[4.0], help="guidance of the pictures (default: 4)")
    return parser.parse_args()


# ------------------------------------------------------------------------------
# Tokenizing

CHUNK = 256  # images


def ten_crops(image: Image.Image, size: int) -> list[Image.Image]:
    """Section 5's ten crops, after LlamaGen: five places of a centre crop of int(1.1 size), then
    the same of its mirror. Images below 64 pixels (CIFAR-10) have no room to move: the image and
    its mirror."""
    whole = center_crop(image, size if size < 64 else int(1.1 * size))
    end = whole.width - size
    middle = round(end / 2)
    corners = [(0, 0), (end, 0), (0, end), (end, end), (middle, middle)]
    if size < 64:
        corners = [(0, 0)]
    crops = []
    for view in (whole, whole.transpose(Image.FLIP_LEFT_RIGHT)):
        crops += [view.crop((x, y, x + size, y + size)) for x, y in corners]
    return crops


def one_crop(image: Image.Image, rng: np.random.Generator, size: int) -> Image.Image:
    """One of the crops, drawn at random: what training sees of an image at one step."""
    crops = ten_crops(image, size)
    return crops[rng.integers(len(crops))]


@torch.no_grad()
def tokenize(
    tokenizer: dar.SequentialDiffusionTokenizer,
    data: ImageData,
    folder: Path,
    center_only: bool,
    processes: Processes,
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenizes all crops of all images (center_only: the centre crop), once: what is in the folder
    already is not done again. Returns two files, mapped into memory: codes [images, crops, N], and
    sources int32 [images], the number of the image that each row shows: its own, or where that is
    corrupt, the next one's. Raises ValueError if the folder holds the codes of another tokenizer or
    of other images, and OSError if there is no space."""
    config = tokenizer.config
    size = config.image_size
    settings = {
        "tokenizer": fingerprint([tokenizer]),
        "data": data.digest,
        "images": len(data),
        "crops": "center" if center_only else "ten",
        "image_size": size,
    }
    num_chunks = math.ceil(len(data) / CHUNK)
    dtype = np.uint16 if config.codebook_size <= 2**16 else np.int32

    def load(index: int) -> tuple[Tensor, int]:
        image, source = data.next_readable(index)
        crops = [center_crop(image, size)] if center_only else ten_crops(image, size)
        pixels = np.stack([np.array(crop) for crop in crops])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2), source

    def compute(chunk: int) -> dict[str, np.ndarray]:
        end = min((chunk + 1) * CHUNK, len(data))
        codes = []
        sources = []
        with ThreadPoolExecutor(max(1, count_workers(size))) as threads:
            loaded = threads.map(load, range(chunk * CHUNK, end))  # ahead of the encoder
            for first in range(chunk * CHUNK, end, 8):
                batch = [next(loaded) for _ in range(min(8, end - first))]
                crops = torch.cat([crops for crops, _ in batch]).to(processes.device)
                codes.append(tokenizer.encode(to_float(crops)).cpu())
                sources += [source for _, source in batch]
        codes = torch.cat(codes).view(len(sources), -1, config.num_tokens)
        return {"codes": codes.numpy().astype(dtype), "sources": np.array(sources, np.int32)}

    def join() -> None:
        if not (folder / "sources.npy").exists():
            for name in ("codes", "sources"):  # sources come last: once they are there, all is
                parts = read_chunks(folder, num_chunks, name)
                save = functools.partial(save_parts, count=len(data), parts=parts)
                write_atomically(folder / f"{name}.npy", save)
        for path in folder.glob("chunk-*.npz"):
            path.unlink()

    done = (folder / "sources.npy").exists()
    fill_chunks(folder, settings, 0 if done else num_chunks, compute, processes, "tokenizing")
    processes.first_alone(join)
    try:
        codes = np.load(folder / "codes.npy", mmap_mode="r")
        sources = np.load(folder / "sources.npy")
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{folder}: damaged codes ({error}); remove the folder") from None
    if len(codes) != len(data) or len(sources) != len(data):
        raise ValueError(f"{folder}: {len(codes)} codes of {len(data)} images; remove the folder")
    data.refuse_if_corrupt(int((sources != np.arange(len(data))).sum()), len(data))
    return codes, sources


def save_parts(path: Path, count: int, parts: Iterator[np.ndarray]) -> None:
    with open(path, "wb") as file:
        write_npy(file, count, parts)


@functools.lru_cache(maxsize=8)
def map_file(path: Path) -> np.ndarray:
    """A .npy file, of which only the parts that are used are read. Every process maps it once."""
    return np.load(path, mmap_mode="r")


class CodeSamples(torch.utils.data.Dataset):
    """As Samples, already tokenized: sample number -> (codes int64 [N] of one crop, label, number,
    whether it stands in for a corrupt one). folder: where tokenize put them. The path, not the
    array, is what a loader's worker processes are sent."""

    def __init__(self, folder: Path, data: ImageData, seed: int):
        self.folder = folder
        self.data = data
        self.seed = seed

    def __getitem__(self, position: int) -> tuple[Tensor, int, int, bool]:
        codes = map_file(self.folder / "codes.npy")
        sources = map_file(self.folder / "sources.npy")
        index = data_index(position, len(self.data), self.seed)
        # The same crop that one_crop draws.
        crop = sample_rng(self.seed, position).integers(codes.shape[1])
        tokens = torch.from_numpy(codes[index, crop].astype(np.int64))
        source = int(sources[index])
        return tokens, self.data.labels[source], position, source != index


# ------------------------------------------------------------------------------
# What is measured


def entropy(counts: np.ndarray) -> float:
    """Nats of the empirical distributions in the rows of counts, averaged over rows."""
    p = counts / counts.sum(-1, keepdims=True)
    return float(-(p * np.log(np.maximum(p, 1e-300))).sum(-1).mean())


def unigram_entropies(codes: np.ndarray, vocab_size: int) -> dict[str, float]:
    """Nats a token if tokens were drawn independently: from one distribution, or from one for each
    position. codes: [..., N]."""
    codes = codes.reshape(-1, codes.shape[-1])
    counts = np.zeros((codes.shape[1], vocab_size), np.int64)
    for start in range(0, len(codes), 10_000):  # in the order in which they lie on the disk
        part = codes[start : start + 10_000]
        for i in range(codes.shape[1]):
            counts[i] += np.bincount(part[:, i], minlength=vocab_size)
    return {"unigram": entropy(counts.sum(0)[None]), "unigram_by_position": entropy(counts)}


@torch.no_grad()
def held_out(
    model: dar.ARTransformer, codes: np.ndarray, labels: np.ndarray, processes: Processes, autocast
) -> dict[str, float]:
    """Nats a token with the right labels, with shuffled ones, and by group of tokens with the right
    ones. The processes share the images: codes [images, N]."""
    device, rank, world = processes
    shuffled = labels[np.random.default_rng(0).permutation(len(labels))]
    losses = []
    for classes in (labels, shuffled):
        total = torch.zeros(codes.shape[1], device=device)
        for start in range(250 * rank, len(codes), 250 * world):
            part = torch.from_numpy(codes[start : start + 250].astype(np.int64)).to(device)
            part_labels = torch.from_numpy(classes[start : start + 250]).to(device)
            with autocast:
                logits = model(part[:, :-1], part_labels)
            total += F.cross_entropy(logits.transpose(1, 2), part, reduction="none").sum(0)
        losses.append(processes.all_reduce(total) / len(codes))
    row = {"val_loss": losses[0].mean().item(), "val_shuffled": losses[1].mean().item()}
    groups = losses[0].view(model.tokenizer.config.num_groups, -1).mean(1).tolist()
    return row | {f"val_group_{k}": loss for k, loss in enumerate(groups)}


def sample_picture(model: dar.ARTransformer, cfg, device: torch.device) -> Image.Image:
    """Samples of up to ten classes, a column a class, always from the same seeds: the same pictures
    getting better."""
    columns = min(10, model.config.num_classes)
    labels = torch.arange(columns, device=device).repeat(4)
    steps = list(dar.stream(model, model.tokenizer, labels, cfg=cfg, seeds=0))
    return tile(steps[-1].x, columns)


# ------------------------------------------------------------------------------
# The training


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Constant, then linear to 1e-5 over the last sixth (section 5: 50 of 300 epochs); warm-up if
    asked for."""
    rising = min(1.0, (step + 1) / max(args.warmup, 1))
    falling = min(1.0, (args.steps - step) / max(args.steps / 6, 1))
    lowest = min(1e-5, args.lr)
    return rising * (lowest + (args.lr - lowest) * falling)


def draw_dropped(seed: int, step: int, batch: int, class_dropout: float) -> Tensor:
    """Which images of a step's whole batch, of all processes, lose their class: bool [batch]."""
    rng = np.random.default_rng([seed, 3, step])
    return torch.from_numpy(rng.random(batch) < class_dropout)


def build_model(
    args: argparse.Namespace, tokenizer: dar.SequentialDiffusionTokenizer, class_names: list[str]
) -> dar.ARTransformer:
    """A Llama for the tokenizer's codes, fresh or with --init's weights; of another number of
    classes each starts as "no class" was. Raises ValueError naming the fields in which --init's
    differs otherwise."""
    torch.manual_seed(args.seed)
    preset = dar.AR_PRESETS[args.preset]
    config = dar.ARConfig(
        width=args.width or preset.width,
        layers=args.layers or preset.layers,
        vocab_size=tokenizer.config.codebook_size,
        num_classes=len(class_names),
        num_tokens=tokenizer.config.num_tokens,
        dropout=args.dropout,
    )
    model = dar.ARTransformer(config)
    if args.init and not will_resume(args):
        source = dar.load_ar(args.init, dtype=torch.float32)
        refuse_other_shape(args.init, source.config, config, free=("dropout", "num_classes"))
        weights = source.state_dict()
        before = source.config.num_classes
        if before != config.num_classes:
            no_class = weights["cls_embedding.weight"][-1:]
            weights["cls_embedding.weight"] = no_class.repeat(config.num_classes + 1, 1)
            say(
                f"--init {args.init}: has {before} classes, this run {config.num_classes}: each "
                'starts as its "no class"'
            )
        model.load_state_dict(weights)
    model.class_names = class_names
    model.attach_tokenizer(tokenizer)
    return model


def main() -> int:
    args = parse_arguments()
    fill_in(args, RECIPES[args.preset])
    if not args.tokenizer:
        raise ValueError("--tokenizer is missing; --help lists all arguments")
    cfg = args.cfg[0] if len(args.cfg) == 1 else tuple(args.cfg)
    dar.guidance_schedule(cfg, 1)  # refuses now what the first picture would stumble over
    processes = start_processes(args.device)
    device, rank, world = processes
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, for tokenizing: a fifth of the time
    micro_batch, accumulate = divide_batch(args, world)
    tokenizer = dar.load_tokenizer(args.tokenizer, device)
    size = tokenizer.config.image_size
    data = processes.first_alone(lambda: ImageData(args.data, size))
    val = ImageData(args.val, size, held_out=True) if args.val else None
    if val and val.class_names != data.class_names:
        raise ValueError(f"--val {args.val}: its classes are not those of {args.data}")
    if args.steps is None:
        args.steps = max(1, int(args.epochs * len(data) / args.batch))
    fill_in_warmups(args, RECIPES[args.preset])

    model = build_model(args, tokenizer, data.class_names).to(device)
    ema = None
    if args.ema:
        memo = {id(tokenizer): tokenizer}  # which is not copied: it is not trained
        ema = copy.deepcopy(model, memo).requires_grad_(False).eval()
    if device.type == "cuda" and not args.checkpoint_blocks:
        available = torch.cuda.get_device_properties(device).total_memory
        refuse_if_too_large(model, args.ema, ar_cost(model.config), micro_batch, available)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, args.lr, (0.9, 0.95), fused=device.type != "mps")
    dtype = pick_dtype(args.precision, device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    # Go on where the run in --out stopped, if it is the same run.
    folder = Path(args.out)
    names = ["loss", "grad_norm"]
    settings = {f"model {name}": value for name, value in dataclasses.asdict(model.config).items()}
    settings |= {"data": data.digest, "tokenizer": fingerprint([tokenizer])}
    settings |= {"seed": args.seed, "batch": args.batch, "ema": args.ema}
    settings["class_dropout"] = args.class_dropout
    settings["init"] = args.init and os.path.normpath(args.init)
    state = State(LossScaler(dtype == torch.float16))
    state.sums = torch.zeros(len(names) + 1, dtype=torch.float64)  # the last one counts steps
    if rank == 0:
        lock_folder(folder)
    if args.resume == "auto":
        resume_run(folder, state, settings, model, ema, optimizer)
    processes.refuse_if_different(step=state.step, classes=data.class_names, settings=settings)
    columns = ["step", *names, *RUN_COLUMNS]
    columns += ["val_loss", "val_shuffled", "unigram", "unigram_by_position"]
    columns += [f"val_group_{k}" for k in range(tokenizer.config.num_groups)]
    log = Log(folder, columns, state, processes)
    for found in filter(None, (data, val)):
        say(found.describe())
    say(describe_recipe(args))
    threads = Threads(args.threads, device, again=not args.compile)
    threads.start(model.config.width, state.threads)

    # Tokenizing may take hours. What cannot work has been refused by now.
    if args.on_the_fly:
        crop = functools.partial(one_crop, size=size)
        samples = Samples(data, crop, args.seed)
    else:
        codes, _ = tokenize(tokenizer, data, folder / "codes", False, processes)
        samples = CodeSamples(folder / "codes", data, args.seed)
    if val:
        val_codes, sources = tokenize(tokenizer, val, folder / "codes-val", True, processes)
        chosen = np.sort(np.random.default_rng(0).permutation(len(val))[:HELD_OUT])
        val_codes = val_codes[chosen, 0]
        val_labels = val.labels[sources[chosen]]
        counted = val_codes if args.on_the_fly else codes
        unigram = unigram_entropies(counted, tokenizer.config.codebook_size)

    parallel = wrap_model(model, args, processes)
    steps = range(state.step, args.steps)
    numbers = sample_numbers(steps, args.batch, micro_batch, rank, world)
    workers = count_workers(size) if args.workers is None else args.workers
    batches = iterate_batches(samples, numbers, workers, device)
    stop_signal = StopSignal()  # from here on a signal is noted, and the step is finished
    stop = 0
    bar = tqdm(total=args.steps, initial=state.step, disable=rank > 0, unit="step")
    log.restart_clock(state.step)

    for step in steps:
        threads.look_again()
        model.train()
        # Dropout's: a step that is taken again after resuming draws the same numbers.
        torch.manual_seed((args.seed * 1_000_003 + step) * world + rank)

        # One step of eq. 6 on args.batch images: each process takes its part, a micro-batch at a
        # time, and gradients add up.
        dropped = draw_dropped(args.seed, step, args.batch, args.class_dropout).to(device)
        loss_sum = torch.zeros(1, device=device)
        unreadable = 0
        optimizer.zero_grad()
        for i in range(accumulate):
            codes_or_images, labels, positions, newly_unreadable = next(batches)
            unreadable += newly_unreadable
            codes = codes_or_images
            if args.on_the_fly:
                codes = tokenizer.encode(to_float(codes_or_images))
            no_class = dropped[positions - step * args.batch]
            labels = labels.masked_fill(no_class, model.config.num_classes)
            with sync_gradients(parallel, wanted=i + 1 == accumulate):
                with autocast:
                    loss = dar.ar_loss(parallel, codes, labels) / accumulate
                (state.scaler.scale * loss).backward()
            loss_sum += loss.detach()

        # accept() says whether losses and gradients are finite, the same in all processes. If they
        # are not, it lowers float16's loss scale and the step is skipped, or it raises.
        grad_norm = clip_gradients(model, state.scaler.scale, args.clip)
        means, unreadable, stop = all_reduce_stats(
            loss_sum, unreadable, stop_signal.number, processes
        )
        measured = dict(zip(names, [*means, grad_norm]))
        if state.scaler.accept(measured, step):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args)
            optimizer.step()
            if ema is not None:
                dar.update_ema(ema, model, step - state.scaler.skipped)
            state.sums += torch.tensor([*measured.values(), 1], dtype=torch.float64)
        state.step += 1
        state.unreadable += unreadable
        bar.update()

        # Log, picture, checkpoint.
        picture_due = is_due(step, args.picture_every, args.steps)
        if picture_due or is_due(step, args.log_every, args.steps):
            data.refuse_if_corrupt(state.unreadable, state.step * args.batch)
            row = run_row(state, args, optimizer, log, names)
            bar.set_postfix(loss=f"{row['loss']:.3f}", images_s=f"{row['images_per_s']:.0f}")
            shown = ema or model.eval()
            if picture_due and rank == 0:
                sample_picture(shown, cfg, device).save(folder / f"step-{state.step}.png")
            if picture_due and val:
                row |= held_out(shown, val_codes, val_labels, processes, autocast) | unigram
            log.write(row)
            log.restart_clock(state.step)
            state.sums.zero_()
        keep_copy = args.keep_every > 0 and state.step % args.keep_every == 0
        if rank == 0 and (stop or keep_copy or is_due(step, args.save_every, args.steps)):
            save_run(folder, state, settings, model, ema, optimizer, keep_copy)
        if stop:
            break

    bar.close()
    processes.barrier()  # nobody leaves while process 0 may still be saving
    following = ["sample.py", "--ckpt", str(folder / "last.pt")]
    return say_goodbye(state, stop, args, following)


if __name__ == "__main__":
    command_line(main)

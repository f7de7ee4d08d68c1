"""What the two trainings share, as functions that they call where one expects it.

    Data             ImageData lists labelled images, Samples prepares them, iterate_batches serves
    them Precision        LossScaler, for float16 Stopping         StopSignal; what all processes
    agree on Saving           State, save_run, resume_run, Log

A training of several days is killed and started many times, and goes on as if nothing had been, bit
for bit. So a checkpoint holds all that decides the next steps: the weights, their average, the
optimizer's moments, the loss scale, the step's number, and what the log needs. It holds no state
of a random generator, because none outlives a step: what is random in a sample comes from new
generators seeded with the sample's number, and what is random in a step from one seeded with the
step's. So step 1000 draws the same numbers before and after a kill, with one process or with
sixteen. One thing is no part of this: the number of threads, by which sums are rounded. It is
saved, and a run goes on with it, but while other programs come and go it changes
(common/threads.py); --threads fixes it.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import hashlib
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute_in_backward

import dar
from common.cli import integer, real, say
from common.distributed import Processes
from common.files import write_atomically
from common.images import list_images, read_image
from common.speed import quiet_compile, use_fast_attention
from common.threads import add_threads_option

# ------------------------------------------------------------------------------
# Data

# Polygons to draw: how many corners, the radius of every second one, and where the first is.
SHAPES = {
    "circle": (48, 1.0, 0.0),
    "triangle": (3, 1.0, 0.75),
    "square": (4, 1.0, 0.125),
    "star": (10, 0.45, 0.75),
}
COLOURS = "red", "orange", "limegreen", "deepskyblue", "blue", "purple", "black", "deeppink"


def draw_shape(index: int, size: int) -> Image.Image:
    """Picture `index` of a drawn dataset, classes in turn: a shape of any size and one of eight
    colours in the middle of a white ground. More colours, places and angles are too much to learn
    in minutes."""
    rng = np.random.default_rng(index)
    scale = 4 * size  # drawn large and averaged down, which gives smooth edges
    colour = COLOURS[rng.integers(len(COLOURS))]
    radius = scale * rng.uniform(0.32, 0.47)
    corners, inner, turn = list(SHAPES.values())[index % len(SHAPES)]
    i = np.arange(corners)
    radii = radius * np.where(i % 2, inner, 1)
    angles = 2 * math.pi * (turn + i / corners)
    x = scale / 2 + radii * np.cos(angles)
    y = scale / 2 + radii * np.sin(angles)
    image = Image.new("RGB", (scale, scale), "white")
    ImageDraw.Draw(image).polygon(list(zip(x, y)), fill=colour)
    return image.resize((size, size), Image.BOX)


SPLITS = {"train", "val", "valid", "validation", "test"}  # whose parent is no dataset


class ImageData:
    """Labelled images: a folder with one sub-folder a class, or the word "shapes" (draw_shape).
    labels: int64 [n]. digest: how many images, and a hash of their names and of the sizes of a
    thousand files. Raises OSError or ValueError if there is nothing to train on."""

    def __init__(self, source: str, size: int, held_out: bool = False):
        self.source = source
        self.size = size
        if source == "shapes":
            self.first = 10**6 if held_out else 0
            self.class_names = list(SHAPES)
            self.labels = np.arange(1000 if held_out else 10_000) % len(SHAPES)
            self.digest = source
            return
        names = list_images(source)
        for name in names:
            if "/" not in name:
                raise ValueError(f"{source}/{name}: expected a sub-folder for each class")
        # One array of bytes, which worker processes share; a list of strings they would copy.
        self.names = np.array([os.fsencode(name) for name in names])
        # Other pictures often have the same names. All sizes would take long on a network disk.
        sizes = [file_size(os.path.join(source, name)) for name in names[:: len(names) // 1000 + 1]]
        digest = hashlib.sha256(b"\0".join(self.names) + repr(sizes).encode()).hexdigest()
        self.digest = f"{len(names)} images, {digest[:8]}"
        folders = [name.split("/")[0] for name in names]
        classes, self.labels = np.unique(folders, return_inverse=True)
        self.class_names = classes.tolist()
        if "train" in classes and SPLITS.issuperset(classes):
            raise ValueError(
                f"{source}: {', '.join(classes)} are no classes; take one, as {source}/train"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def describe(self) -> str:
        """What was found, in a line."""
        drawn = "drawn " if self.source == "shapes" else ""
        names = self.class_names
        classes = f"{len(names)} classes, {names[0]} ... {names[-1]}"
        if len(names) == 1:
            classes = f"one class, {names[0]}"
        return f"{self.source}: {len(self)} {drawn}images in {classes}"

    def image(self, index: int) -> Image.Image:
        """Image `index` in RGB. Raises ValueError or OSError if its file cannot be read."""
        if self.source == "shapes":
            return draw_shape(self.first + index, self.size)
        return read_image(os.path.join(self.source, os.fsdecode(self.names[index])))

    def next_readable(self, index: int) -> tuple[Image.Image, int]:
        """The first image from `index` on that can be read, and its index. Warns of the others."""
        for i in range(len(self)):
            candidate = (index + i) % len(self)
            try:
                return self.image(candidate), candidate
            except (ValueError, FileNotFoundError, PermissionError) as error:
                print(f"warning: {error}; the next image takes its place", file=sys.stderr)
        raise ValueError(f"{self.source}: not one of its {len(self)} images can be read")

    def refuse_if_corrupt(self, unreadable: int, read: int) -> None:
        """Raises ValueError if over 1% of the images were unreadable: that is no accident."""
        if unreadable > 0.01 * max(read, len(self)):
            raise ValueError(f"{self.source}: {unreadable} unreadable images, over 1%")


def file_size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:  # whoever reads it will say so
        return 0


# Step n of batch size B takes the samples number n·B ... n·B + B - 1, for any number of processes.


@functools.lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, 0, epoch]).permutation(count)


def data_index(position: int, count: int, seed: int) -> int:
    """Which of count images sample number `position` is: every epoch takes each image once, in an
    order of its own."""
    epoch, i = divmod(position, count)
    return int(epoch_order(count, seed, epoch)[i])


def sample_rng(seed: int, position: int) -> np.random.Generator:
    """For one sample's crop and mirror."""
    return np.random.default_rng([seed, 1, position])


class Samples(torch.utils.data.Dataset):
    """Sample number -> (uint8 image [3, H, W], label, number, whether it stands in for a corrupt
    one). transform: (PIL image, numpy generator) -> PIL image, crops and perhaps mirrors."""

    def __init__(self, data: ImageData, transform: Callable, seed: int):
        self.data = data
        self.transform = transform
        self.seed = seed

    def __getitem__(self, position: int) -> tuple[Tensor, int, int, bool]:
        index = data_index(position, len(self.data), self.seed)
        image, source = self.data.next_readable(index)
        crop = self.transform(image, sample_rng(self.seed, position))
        pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1)
        return pixels, self.data.labels[source], position, source != index


def sample_numbers(
    steps: range, batch: int, micro_batch: int, rank: int, world: int
) -> Iterator[range]:
    """The numbers of one process's samples, a micro-batch at a time."""
    images_per_rank = batch // world
    for step in steps:
        start = step * batch + rank * images_per_rank
        for first in range(start, start + images_per_rank, micro_batch):
            yield range(first, first + micro_batch)


def iterate_batches(
    samples: torch.utils.data.Dataset, numbers: Iterator[range], workers: int, device: torch.device
) -> Iterator[tuple]:
    """(images or codes, labels, sample numbers, how many were corrupt) of each micro-batch, on the
    device; `workers` processes prepare them in advance."""
    pin = device.type == "cuda"
    loader = torch.utils.data.DataLoader(
        samples,
        batch_sampler=numbers,
        num_workers=workers,
        worker_init_fn=leave_signals_to_the_parent,
        pin_memory=pin,
        generator=torch.Generator(),  # it draws when it starts: not from the generator of dropout
    )
    try:
        for images, labels, positions, corrupt in loader:
            images = images.to(device, non_blocking=pin)
            labels = labels.to(device, non_blocking=pin)
            yield images, labels, positions, int(corrupt.sum())
    except Exception as error:
        if "DataLoader worker" not in str(error):
            raise
        reason = str(error).splitlines()[-1]  # after the worker's traceback
        raise OSError(f"a process that prepares images failed: {reason}") from None


# Ctrl-C; a closed terminal; what schedulers send. Windows has two of them.
NAMES = "SIGINT", "SIGHUP", "SIGUSR1", "SIGTERM"
STOP_SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]


def leave_signals_to_the_parent(worker: int) -> None:
    """Schedulers and Ctrl-C signal all processes at once, but only the training itself answers: it
    still needs its workers to finish the step."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def count_workers(image_size: int) -> int:
    """Processes that decode images, for each training process: up to 8; none for small images."""
    if image_size < 64:
        return 0
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


# ------------------------------------------------------------------------------
# The command line that both trainings have


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Numbers whose default is "the recipe's" are None until fill_in."""
    add = parser.add_argument
    add("--data", help="folder with a sub-folder of images for each class, or: shapes")
    add("--val", help="the same, held out: measured every --picture-every steps")
    add("--out", help="folder of the run; an existing run there is continued")
    add("--steps", type=integer(1), help="optimisation steps (default: the recipe's)")
    add("--batch", type=integer(1), help="images a step, over all processes (the recipe's)")
    add("--micro-batch", type=integer(1), help="images a process takes at once (the recipe's)")
    add("--lr", type=real(1e-12), help="learning rate (default: the recipe's)")
    add(
        "--warmup",
        type=integer(0),
        help="steps over which the rate rises (the recipe's, but at most a tenth of --steps)",
    )
    add("--clip", type=real(0), default=1.0, help="largest gradient norm; 0: any (default: 1)")
    add("--seed", type=integer(0), default=0, help="of all that is random (default: 0)")
    add(
        "--precision",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="of products in training (auto: bfloat16 where fast, else float32)",
    )
    add("--compile", action="store_true", help="torch.compile the model")
    add("--checkpoint-blocks", action="store_true", help="less memory, more time: recompute")
    add(
        "--device",
        default="auto",
        choices=["auto", "cpu", "cuda", "mps"],
        help="auto: a GPU, if there is one",
    )
    add_threads_option(add)
    add("--workers", type=integer(0, 256), help="processes that decode images (default: up to 8)")
    add("--log-every", type=integer(1), default=50, help="steps between rows of log.csv (50)")
    add("--picture-every", type=integer(1), help="steps between pictures (default: the recipe's)")
    add("--save-every", type=integer(1), help="steps between checkpoints (the recipe's)")
    add("--keep-every", type=integer(0), default=0, help="keep every n-th step's checkpoint (0)")
    add("--resume", default="auto", choices=["auto", "never"], help="never: start anew in --out")


WARMUPS = ("warmup", "codebook_warmup")


def fill_in(args: argparse.Namespace, recipe: dict) -> None:
    """Gives the recipe's values to the arguments that are None, but warm-ups. Raises ValueError if
    one that the user must give is missing, or if the run would lie among its images."""
    for name in ("data", "out"):
        if not getattr(args, name):
            raise ValueError(f"--{name} is missing; --help lists all arguments")
    for folder in (args.data, args.val):
        if folder in (None, "shapes"):
            continue
        if Path(args.out).resolve().is_relative_to(Path(folder).resolve()):
            raise ValueError(f"--out {args.out}: lies inside {folder}, where it would be a class")
    for name, value in recipe.items():
        if getattr(args, name) is None and name not in WARMUPS:
            setattr(args, name, value)


def fill_in_warmups(args: argparse.Namespace, recipe: dict) -> None:
    """The recipe's warm-ups, but at most a tenth of the run: what is shorter than its warm-up
    learns nothing. Raises ValueError if the user's own is not shorter than the run."""
    for name in WARMUPS:
        if name not in recipe:
            continue
        steps = getattr(args, name)
        if steps is None:
            setattr(args, name, min(recipe[name], args.steps // 10))
        elif steps >= args.steps:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} {steps}: the run has only {args.steps} steps")


def describe_recipe(args: argparse.Namespace) -> str:
    """What the training will do, in a line."""
    line = f"{args.steps} steps of {args.batch} images, rate {args.lr:g}"
    if args.warmup > 0:
        line += f", warm-up {args.warmup} steps"
    if getattr(args, "codebook_warmup", 0) > 0:
        line += f", codebook warm-up {args.codebook_warmup} steps"
    return line


def divide_batch(args: argparse.Namespace, world: int) -> tuple[int, int]:
    """How many images a process takes at once, and how many times in a step. Raises ValueError if
    the processes cannot share the batch."""
    images_per_rank = max(1, args.batch // world)
    micro_batch = min(args.micro_batch or images_per_rank, images_per_rank)
    accumulate = images_per_rank // micro_batch
    if world * micro_batch * accumulate != args.batch:
        raise ValueError(
            f"--batch {args.batch} is not divided by {world} processes times --micro-batch "
            f"{micro_batch}"
        )
    return micro_batch, accumulate


def is_due(step: int, every: int, steps: int) -> bool:
    """Whether step (counted from 0) is one of every `every`, or the last."""
    return (step + 1) % every == 0 or step + 1 == steps


# ------------------------------------------------------------------------------
# The model in training


def refuse_other_shape(file: str, before, now, free: tuple[str, ...]) -> None:
    """Raises ValueError naming the fields in which the config of --init's file differs from this
    run's, but for those that are free to."""
    differences = []
    for name, value in dataclasses.asdict(now).items():
        old = getattr(before, name)
        if old != value and name not in free:
            differences.append(f"{name} = {old}, this run {value}")
    if differences:
        raise ValueError(f"--init {file}: has {'; '.join(differences)}")


def wrap_model(model: nn.Module, args: argparse.Namespace, processes: Processes) -> nn.Module:
    """What a training calls in the model's place: compiled, with gradients averaged over
    processes."""
    use_fast_attention()
    if args.checkpoint_blocks:
        for block in model.modules():
            if isinstance(block, dar.GatedBlock | dar.DiffusionBlock | dar.LlamaBlock):
                forward = block.forward
                block.forward = functools.partial(
                    recompute_in_backward, forward, use_reentrant=False
                )
    if args.compile:
        model = quiet_compile(model)
    if processes.world > 1:
        devices = [processes.device.index] if processes.device.type == "cuda" else None
        # torch.compile cuts a model where a bucket of gradients ends. So buckets are large, in MB.
        model = nn.parallel.DistributedDataParallel(
            model, device_ids=devices, gradient_as_bucket_view=True, bucket_cap_mb=200
        )
    return model


def sync_gradients(model: nn.Module, wanted: bool):
    """A context for backward: processes average their gradients only with the last micro-batch."""
    if wanted or not isinstance(model, nn.parallel.DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()


def clip_gradients(model: nn.Module, scale: float, clip: float) -> float:
    """Divides the gradients by the loss scale, then shortens them to the norm `clip` (0: any).
    Returns the norm before."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if scale != 1:
        torch._foreach_div_(gradients, scale)
    return nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf).item()


@dataclasses.dataclass
class LossScaler:
    """float16 rounds gradients below 6e-8 to 0. So the loss is multiplied by a large scale before
    the backward pass, and the gradients are divided by it after. If they overflow, the step is
    skipped and the scale halved; after 2000 steps without overflow it doubles. Other precisions
    need none of this, and the scale is 1."""

    enabled: bool
    scale: float = 65536.0
    good: int = 0  # steps since the last overflow
    skipped: int = 0  # steps in all

    def __post_init__(self):
        if not self.enabled:
            self.scale = 1.0

    def accept(self, numbers: dict[str, float], step: int) -> bool:
        """Whether the step may reach the weights: all numbers (losses, gradient norm) are finite.
        Raises FloatingPointError if they are not, and no scale can be blamed."""
        finite = all(math.isfinite(value) for value in numbers.values())
        if finite and self.enabled:
            self.good += 1
            if self.good % 2000 == 0:
                self.scale *= 2
        if finite:
            return True
        if not self.enabled or self.scale < 1e-3:
            values = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
            raise FloatingPointError(
                f"step {step + 1}: not finite ({values}); a lower --lr may help"
            )
        self.scale /= 2
        self.good = 0
        self.skipped += 1
        return False


# ------------------------------------------------------------------------------
# Stopping


class StopSignal:
    """SIGTERM or SIGUSR1, as schedulers send them, SIGHUP of a closed terminal, and Ctrl-C stop a
    training after its step, saved. `number` is the signal that came to this process, 0 if none did.
    A second Ctrl-C stops at once."""

    def __init__(self):
        self.number = 0
        for number in STOP_SIGNALS:
            by_nohup = signal.getsignal(number) == signal.SIG_IGN and number != signal.SIGINT
            if not by_nohup:
                signal.signal(number, self.remember)

    def remember(self, number: int, frame) -> None:
        by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ  # it sends every Ctrl-C twice
        if number == self.number == signal.SIGINT and not by_torchrun:
            raise KeyboardInterrupt
        self.number = number


def all_reduce_stats(
    losses: Tensor, unreadable: int, signal_number: int, processes: Processes
) -> tuple[list[float], int, int]:
    """A step's one message to the other processes: the means of the losses [n], the sum of the
    corrupt files, and a signal that came to any of them, so that all stop after the same step."""
    came = [signal_number == number for number in STOP_SIGNALS]
    message = losses.new_tensor([unreadable, *came])
    message = torch.cat((losses / processes.world, message))
    total = processes.all_reduce(message).tolist()
    means = total[: len(losses)]
    unreadable, *came = total[len(losses) :]
    agreed = 0
    for number, count in zip(STOP_SIGNALS, came):
        if count > 0:
            agreed = number
    return means, int(unreadable), agreed


# ------------------------------------------------------------------------------
# Saving and going on


@dataclasses.dataclass
class State:
    """What a checkpoint holds beside weights and optimizer."""

    scaler: LossScaler
    step: int = 0  # steps that are done
    unreadable: int = 0  # corrupt files that were met
    sums: Tensor | None = None  # float64, of the losses since the last row of the log
    threads: int | None = None  # of the CPU, that it was saved with


def save_run(folder: Path, state: State, settings: dict, model, ema, optimizer, keep: bool) -> None:
    """Writes last.pt, and with keep the same as step-N.pt. Raises OSError, and last.pt is what it
    was."""
    training = {
        "settings": settings,
        "step": state.step,
        "unreadable": state.unreadable,
        "sums": state.sums,
        "threads": torch.get_num_threads(),
        "optimizer": optimizer.state_dict(),
        "scaler": dataclasses.asdict(state.scaler),
    }
    if keep:
        path = folder / f"step-{state.step}.pt"
        write_atomically(path, lambda file: dar.save_checkpoint(file, model, ema, training))
    path = folder / "last.pt"
    write_atomically(path, lambda file: dar.save_checkpoint(file, model, ema, training))


def will_resume(args: argparse.Namespace) -> bool:
    """Whether resume_run will find all weights, so that --init may be gone."""
    return args.resume == "auto" and Path(args.out, "last.pt").exists()


def resume_run(folder: Path, state: State, settings: dict, model, ema, optimizer) -> None:
    """Goes on from last.pt; without one nothing changes. Raises ValueError if it is damaged, or of
    another run, naming what differs."""
    path = folder / "last.pt"
    if not path.exists():
        return
    checkpoint = dar.read_checkpoint(path)
    training = checkpoint.get("training")
    if training is None:
        raise ValueError(f"{path}: no training can go on from it; take another --out")
    for name, value in settings.items():
        before = training["settings"].get(name)
        if before != value:
            raise ValueError(
                f"{path}: another run ({name} was {before}, is {value}); take another --out, or "
                "--resume never"
            )
    model.load_state_dict(checkpoint["model"])
    if ema is not None:
        ema.load_state_dict(checkpoint["ema"])
    if next(model.parameters()).device.type == "cpu":
        training = copy.deepcopy(training)  # out of the mapped file, which will be replaced
    # The parameter groups are this command line's, so that its weight decay counts.
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict(training["optimizer"] | {"param_groups": groups})
    if training["scaler"]["enabled"] == state.scaler.enabled:  # else the precision is another
        state.scaler = LossScaler(**training["scaler"])
    state.scaler.skipped = training["scaler"]["skipped"]
    state.step = training["step"]
    state.unreadable = training["unreadable"]
    state.sums = training["sums"]
    state.threads = training.get("threads")  # files of older releases lack it


def saved_setting(folder: Path, name: str, default):
    """A setting of the run in this folder; without one the default."""
    if not (folder / "last.pt").exists():
        return default
    training = dar.read_checkpoint(folder / "last.pt").get("training") or {}
    return training.get("settings", {}).get(name, default)


class Log:
    """log.csv, written by process 0. Going on keeps the rows up to the checkpoint's step: the steps
    after it are taken again, and would stand there twice."""

    def __init__(self, folder: Path, columns: list[str], state: State, processes: Processes):
        self.path = folder / "log.csv"
        self.columns = columns
        self.writes = processes.rank == 0
        self.restart_clock(state.step)
        if not self.writes:
            return
        folder.mkdir(parents=True, exist_ok=True)
        lines = [",".join(columns)]
        if state.step > 0 and self.path.exists():
            rows = self.path.read_text(errors="replace").splitlines()[1:]
            lines += [row for row in rows if self.is_whole(row, state.step)]
        text = "\n".join(lines) + "\n"
        write_atomically(self.path, lambda file: file.write_text(text))

    def is_whole(self, row: str, last_step: int) -> bool:
        words = row.split(",")
        return len(words) == len(self.columns) and words[0].isdigit() and int(words[0]) <= last_step

    def restart_clock(self, step: int) -> None:
        self.started = time.perf_counter()
        self.first_step = step

    def steps_per_second(self, step: int) -> float:
        """Since the last row; pictures and measurements do not count."""
        seconds = time.perf_counter() - self.started
        return (step - self.first_step) / max(seconds, 1e-9)

    def write(self, row: dict) -> None:
        """Appends a row; a column without a value stays empty."""
        words = []
        for column in self.columns:
            value = row.get(column, "")
            if isinstance(value, float):
                value = f"{value:.6g}"
            words.append(str(value))
        if self.writes:
            try:
                with open(self.path, "a") as file:
                    file.write(",".join(words) + "\n")
            except OSError as error:
                raise OSError(f"{self.path}: a row cannot be written ({error.strerror})") from None


RUN_COLUMNS = ["lr", "images_per_s", "memory_mb", "unreadable", "skipped"]


def run_row(state: State, args: argparse.Namespace, optimizer, log: Log, names: list[str]) -> dict:
    """A row of the log: the means of the losses since the row before, and how the run is doing."""
    means = (state.sums[:-1] / state.sums[-1]).tolist()
    row = {"step": state.step} | dict(zip(names, means))
    row["lr"] = optimizer.param_groups[0]["lr"]
    row["images_per_s"] = args.batch * log.steps_per_second(state.step)
    if torch.cuda.is_available():
        row["memory_mb"] = torch.cuda.max_memory_allocated() / 2**20
    row["unreadable"] = state.unreadable
    row["skipped"] = state.scaler.skipped
    return row


def say_goodbye(
    state: State, signal_number: int, args: argparse.Namespace, following: list[str]
) -> int:
    """Says how the run ended, and the command that follows. Returns the exit code."""
    pictures = Path(args.out) / "step-*.png"
    message = f"done; pictures: {pictures}; next: {shlex.join(['python', *following])}"
    code = 0
    if signal_number:
        message = f"stopped after step {state.step}, saved; the same command goes on"
        if args.resume == "never":
            message = message.replace("goes on", "without --resume never goes on")
        code = 128 + signal_number
    say(message)
    return code

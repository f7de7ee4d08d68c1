"""What the two trainings share: data, averages, and a training run that may be killed at any moment.

    Data             ImageData lists labelled images, Samples prepares them for a training
    EMA, LossScaler  averaged weights; what float16 needs
    Arguments        the command line that both trainings have
    TrainingRun      the optimisation step, the loop, the log, saving and resuming

A training of several days is killed and started many times, and goes on as if nothing had been, bit for bit. So a
checkpoint holds all that decides the next steps: the weights, their average, the optimizer's moments, the loss scale,
the step's number, and what the log needs (its length, the sums of its next row). It holds no random generator's state,
because none outlives a step: sample p's image, crop, time and noise come from new generators seeded with p, and the
Llama's dropout from one seeded with the step's number. So step 1000 draws the same numbers before and after a kill; and
the same command on the same machines sums in the same order, which gives the same bits.
"""

import argparse
import contextlib
import copy
import dataclasses
import hashlib
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute_in_backward
from tqdm import tqdm

import dar

STOP_SIGNALS = signal.SIGTERM, signal.SIGINT  # a scheduler's, and Ctrl-C

# Data. Polygons to draw: how many corners, the radius of every second one, and where the first is.
SHAPES = {"circle": (48, 1.0, 0.0), "triangle": (3, 1.0, 0.75), "square": (4, 1.0, 0.125), "star": (10, 0.45, 0.75)}
COLOURS = "red", "orange", "limegreen", "deepskyblue", "blue", "purple", "black", "deeppink"


def draw_shape(index: int, size: int) -> Image.Image:
    """Picture `index` of a drawn dataset, classes in turn: a shape of any size and one of eight colours, in the middle
    of a white ground. More colours, places and angles are too much to learn in minutes."""
    rng, scale = np.random.default_rng(index), 4 * size  # drawn large and averaged down: smooth edges
    colour, radius = COLOURS[rng.integers(len(COLOURS))], scale * rng.uniform(0.32, 0.47)
    corners, inner, turn = list(SHAPES.values())[index % len(SHAPES)]
    i, middle = np.arange(corners), scale / 2
    spokes = radius * np.where(i % 2, inner, 1) * np.exp(2j * math.pi * (turn + i / corners))
    image = Image.new("RGB", (scale, scale), "white")
    ImageDraw.Draw(image).polygon([(middle + p.real, middle + p.imag) for p in spokes], fill=colour)
    return image.resize((size, size), Image.BOX)


class ImageData:
    """Labelled images: a folder with one sub-folder a class, or the word "shapes" (see draw_shape). labels: int64 [n].
    digest: of the list of files. Raises OSError or ValueError if there is nothing to train on."""

    def __init__(self, source: str, size: int, held_out: bool = False):
        self.source, self.size = source, size
        if source == "shapes":
            self.digest, self.class_names, self.first = source, list(SHAPES), 10**6 * held_out
            self.labels = np.arange(1000 if held_out else 10_000) % len(SHAPES)
            return
        names = dar.list_images(source)
        for name in names:
            dar.require("/" in name, f"{source}/{name}: expected a sub-folder for each class in {source}")
        self.names = np.array([os.fsencode(name) for name in names])  # one array, which worker processes share
        self.digest = hashlib.sha256(b"\0".join(self.names)).hexdigest()[:16]
        classes, self.labels = np.unique([name.split("/")[0] for name in names], return_inverse=True)
        self.class_names = classes.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """Image `index` in RGB. Raises ValueError if its file is corrupt."""
        if self.source == "shapes":
            return draw_shape(self.first + index, self.size)
        return dar.load_rgb(os.path.join(self.source, os.fsdecode(self.names[index])))

    def next_readable(self, index: int) -> tuple[Image.Image, int]:
        """The first image from `index` on that can be read, and its index. Warns about corrupt files."""
        for i in range(len(self)):
            found = (index + i) % len(self)
            try:
                return self.image(found), found
            except ValueError as error:
                print(f"warning: {error}; the next image takes its place", file=sys.stderr)
        raise ValueError(f"{self.source}: not one of its {len(self)} images can be read")

    def refuse_if_corrupt(self, bad: int, read: int) -> None:
        """Raises ValueError if over 1% of the images were unreadable: that is no accident any more."""
        dar.require(bad <= 0.01 * max(read, len(self)), f"{self.source}: {bad} unreadable images, over 1%")


# Step n of batch size B takes the samples number nB ... nB + B - 1, whatever the number of processes.
@lru_cache(maxsize=2)
def _epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, 0, epoch]).permutation(count)


def data_index(position: int, count: int, seed: int) -> int:
    """Which of count images sample `position` is: every epoch takes each once, in an order of its own."""
    epoch, place = divmod(position, count)
    return int(_epoch_order(count, seed, epoch)[place])


def sample_rng(seed: int, position: int) -> np.random.Generator:
    """For one sample's crop and mirror."""
    return np.random.default_rng([seed, 1, position])


class Samples(torch.utils.data.Dataset):
    """Sample number -> (uint8 image [3, H, W], label, number, whether it stands in for a corrupt one).
    transform(PIL image, the sample's own numpy generator) crops the image and perhaps mirrors it."""

    def __init__(self, data: ImageData, transform, seed: int):
        self.data, self.transform, self.seed = data, transform, seed

    def __getitem__(self, position: int) -> tuple[Tensor, int, int, bool]:
        index = data_index(position, len(self.data), self.seed)
        image, found = self.data.next_readable(index)
        crop = self.transform(image, sample_rng(self.seed, position))
        pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1)
        return pixels, self.data.labels[found], position, found != index


def leave_signals_to_the_parent(worker: int) -> None:
    """For processes that decode images: only the training itself answers a Ctrl-C."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class EMA:
    """Exponential moving average of a model's weights: a second model, in eval mode."""

    def __init__(self, model: nn.Module):
        tokenizer = getattr(model, "tokenizer", None)  # a Llama's, which needs no copy
        self.model = copy.deepcopy(model, {id(tokenizer): tokenizer}).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, model: nn.Module, updates: int) -> None:  # updates: how many there were before
        decay = min(0.999, (1 + updates) / (10 + updates))  # small at first, to forget the random weights
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)


@dataclasses.dataclass
class LossScaler:
    """float16 rounds gradients below 6e-8 to 0. So the loss is multiplied by a large scale before the backward pass,
    and the gradients are divided by it after. If they overflow, the step is skipped and the scale halved; after 2000
    steps without overflow it doubles. Other precisions need none of this."""

    enabled: bool
    scale: float = 65536.0
    good: int = 0  # steps since the last overflow
    skipped: int = 0  # steps in all

    def update(self, finite: bool) -> None:
        if not finite:
            self.scale, self.good, self.skipped = self.scale / 2, 0, self.skipped + 1
        elif self.enabled:
            self.good += 1
            self.scale *= 2 if self.good % 2000 == 0 else 1


def option(help: str, default=None, least=-math.inf, most=10**9, required=False, **words):
    """A field of a dataclass of arguments. least, most: the range of a number. words: what argparse is told."""
    more = dict(least=least, most=most, required=required, words=words | {"help": help})
    return dataclasses.field(default=default, metadata=more)


@dataclasses.dataclass
class Arguments:
    """The command line of both trainings. A number that is None will be the recipe's."""

    data: str | None = option("folder with a sub-folder of images for each class, or: shapes", required=True)
    val: str | None = option("the same, held out: measured every --picture-every steps")
    out: str | None = option("folder of the run; an existing run there is continued", required=True)
    steps: int | None = option("optimisation steps", least=1)
    batch: int | None = option("images a step, over all processes", least=1)
    micro_batch: int | None = option("images that one process takes at once (default: all)", least=1)
    lr: float | None = option("learning rate", least=0)
    warmup: int | None = option("steps over which the rate rises", least=0)
    clip: float = option("largest gradient norm; 0: any (default: 1)", 1.0, least=0)
    seed: int = option("of all that is random (default: 0)", 0, least=0, most=2**31 - 1)
    precision: str = option("auto: bfloat16 where it is fast", "auto", choices="auto float32 bfloat16 float16".split())
    compile: bool = option("torch.compile the model", False)
    checkpoint_blocks: bool = option("recompute activations in backward: less memory, more time", False)
    device: str = option("auto: the fastest there is", "auto", choices=["auto", "cpu", "cuda", "mps"])
    workers: int | None = option("processes that decode images (default: up to 8)", least=0, most=256)
    log_every: int = option("steps from row to row of log.csv (default: 50)", 50, least=1)
    picture_every: int = option("steps from picture to picture (default: 500)", 500, least=1)
    save_every: int = option("steps from checkpoint to checkpoint (default: 500)", 500, least=1)
    keep_every: int = option("keep a checkpoint every so many steps, step-N.pt (default: none)", 0, least=0)
    resume: str = option("auto: go on with the run in --out if there is one", "auto", choices=["auto", "never"])


def parse_arguments(kind: type, description: str):
    """The command line as an instance of kind, a dataclass whose fields are options."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(kind):
        value_type = getattr(field.type, "__args__", [field.type])[0]  # int of int | None
        how = {"action": "store_true"} if value_type is bool else {"type": value_type, "default": field.default}
        parser.add_argument(f"--{field.name.replace('_', '-')}", **how, **field.metadata["words"])
    return kind(**vars(parser.parse_args()))


def check_arguments(args: Arguments, recipe: dict) -> None:
    """Fills in the recipe. Raises ValueError naming an argument that is missing or out of its range."""
    for field in dataclasses.fields(args):
        if getattr(args, field.name) is None:
            setattr(args, field.name, recipe.get(field.name))
        name, value = f"--{field.name.replace('_', '-')}", getattr(args, field.name)
        least, most, required = (field.metadata[key] for key in ("least", "most", "required"))
        dar.require(value or not required, f"{name} is missing; --help lists all arguments")
        fits = not isinstance(value, int | float) or least <= value <= most
        dar.require(fits, f"{name} {value}: expected {least} ... {most}")


class TrainingRun:
    """A training and its folder --out: last.pt, previous.pt (the checkpoint before it), log.csv and pictures.
    settings: {what: value} that must not change from one start to the next; other arguments may (then bits differ).
    terms: of the loss. columns: more of log.csv. next: the command for afterwards. Raises ValueError if processes
    cannot share the batch, or naming what differs from the run in the folder."""

    COUNTED = "step", "unreadable", "sums", "log_length"

    def __init__(self, args, processes: dar.Processes, model, ema, optimizer, settings, terms, columns=(), next=""):
        dar.keep_freed_memory()
        self.args, self.processes, self.folder, self.next = args, processes, Path(args.out), next
        self.model, self.ema, self.optimizer = model, ema, optimizer
        self.settings = {"seed": args.seed, "batch": args.batch, "ema": ema is not None} | settings
        self.share = max(1, args.batch // processes.world)  # images that one process takes in a step
        self.micro = args.micro_batch or self.share
        fits, world = args.batch % (processes.world * self.micro) == 0, processes.world
        dar.require(fits, f"--batch {args.batch} is not divided by {world} processes times --micro-batch {self.micro}")
        fast = "bfloat16" if dar.has_fast_bfloat16(processes.device) else "float32"
        self.dtype = getattr(torch, fast if args.precision == "auto" else args.precision)
        self.autocast = partial(torch.autocast, processes.device.type, self.dtype, self.dtype != torch.float32)
        self.scaler = LossScaler(self.dtype == torch.float16)
        self.step = self.unreadable = self.newly_unreadable = self.log_length = 0
        self.received = self.signal = 0  # a signal to this process; one for which all stop
        self.fastest, self.slow = math.inf, 0  # seconds of the fastest step; slow steps less others
        self.means = ["loss", *terms, "grad_norm"]  # columns of log.csv
        self.sums = torch.zeros(len(self.means) + 1, dtype=torch.float64)  # since the last row; then the steps
        self.columns = ["step", *self.means, *"lr images_per_s memory_mb unreadable skipped".split(), *columns]
        if args.resume == "auto":
            self.restore()
        self.clock = self.step, time.time()
        for block in model.modules() if args.checkpoint_blocks else ():
            if isinstance(block, dar.GatedBlock | dar.DiffusionBlock | dar.LlamaBlock):
                block.forward = partial(recompute_in_backward, block.forward, use_reentrant=False)
        self.parallel = dar.quiet_compile(model) if args.compile else model  # what a training calls
        if processes.world > 1:  # DDP averages gradients during the backward pass
            devices = [processes.device.index] if processes.device.type == "cuda" else None
            self.parallel = nn.parallel.DistributedDataParallel(self.parallel, devices, gradient_as_bucket_view=True)

    def optimise(self, losses, chunks: list, rate: float) -> None:
        """One step at learning rate `rate`. chunks: this process's micro-batches. losses(chunk) -> {term: scalar};
        their sum, added up over chunks and averaged over processes, is the loss of the batch. Raises
        FloatingPointError if it or a gradient is not finite, before that reaches the weights."""
        scale = self.scaler.scale if self.scaler.enabled else 1.0
        totals = torch.zeros(len(self.means) - 1, device=self.processes.device)  # the loss, and its terms
        self.optimizer.zero_grad()
        for i, chunk in enumerate(chunks):
            exchange = self.processes.world == 1 or i + 1 == len(chunks)  # of gradients: with the last chunk
            with contextlib.nullcontext() if exchange else self.parallel.no_sync():
                with self.autocast():
                    found = losses(chunk)
                loss = sum(found.values())
                (scale * loss).backward()  # adds to the gradients of the chunks before
            totals += torch.stack([loss, *(found[name] for name in self.means[1:-1])]).detach()
        torch._foreach_div_([p.grad for p in self.model.parameters() if p.grad is not None], scale)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip or math.inf).item()

        totals = self.share_news(totals)  # the same in all processes, which therefore decide the same
        finite = math.isfinite(totals[0] + norm)
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            if self.ema is not None:
                self.ema.update(self.model, self.step - self.scaler.skipped)  # the updates so far
            self.sums += torch.tensor([*totals, norm, 1], dtype=torch.float64)
        elif not self.scaler.enabled or scale < 1e-3:
            values = ", ".join(f"{name} {value:.4g}" for name, value in zip(self.means, [*totals, norm]))
            raise FloatingPointError(f"step {self.step + 1}: not finite ({values}); a lower --lr may help")
        self.scaler.update(finite)

    def share_news(self, totals: Tensor) -> list[float]:
        """A step's one message: averages totals over the processes, counts their corrupt files, and tells all of a
        signal that reached one, so that they stop after the same step."""
        got = [self.received == number for number in STOP_SIGNALS]
        mine = totals.new_tensor([self.newly_unreadable, *got])
        news = self.processes.reduce(torch.cat((totals / self.processes.world, mine)), "SUM")
        *totals, unreadable, terminated, interrupted = news.tolist()
        self.unreadable, self.newly_unreadable = self.unreadable + int(unreadable), 0
        self.signal = signal.SIGTERM if terminated else signal.SIGINT if interrupted else 0
        return totals

    def steps(self, samples: Samples) -> Iterator[tuple[int, list]]:
        """Yields each step and this process's micro-batches: (images, labels, sample numbers). Saves after a step if
        that is due or a signal came, which also ends the loop."""
        args, device, first = self.args, self.processes.device, self.processes.rank == 0
        self.data = samples.data
        if first:
            self.cut_log()
        for number in STOP_SIGNALS:
            signal.signal(number, self.remember_signal)
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = 0 if self.data.size < 64 else min(8, cores)
        options = dict(num_workers=workers if args.workers is None else args.workers)
        options |= dict(worker_init_fn=leave_signals_to_the_parent, pin_memory=device.type == "cuda")
        loader = iter(torch.utils.data.DataLoader(samples, batch_sampler=self.positions(), **options))
        with tqdm(total=args.steps, initial=self.step, disable=not first, unit="step") as self.bar:
            while self.step < args.steps and not self.signal:
                chunks, began = [], time.perf_counter()
                for _ in range(self.share // self.micro):
                    images, labels, positions, corrupt = next(loader)
                    chunks.append((images.to(device, non_blocking=True), labels.to(device), positions))
                    self.newly_unreadable += int(corrupt.sum())
                yield self.step, chunks
                self.notice_slowness(time.perf_counter() - began)
                self.step += 1
                self.bar.update()
                if first and (self.step % args.save_every == 0 or self.step == args.steps or self.signal):
                    self.save()
        self.processes.barrier()  # nobody leaves while the first process may still be saving
        if self.signal and first:
            print(f"stopped after step {self.step}, saved; the same command goes on", file=sys.stderr)
        elif first:
            print(f"done; pictures: {self.folder / 'step-*.png'}; next: python {self.next}", file=sys.stderr)

    def notice_slowness(self, seconds: float) -> None:
        """Says once that a CPU's steps have become slow. Threads that wait spin, and take other programs' time."""
        self.fastest = min(self.fastest, seconds)
        self.slow = max(0, self.slow + (1 if seconds > 2 * self.fastest else -1))
        if self.slow == 10 and self.processes.device.type == "cpu" and torch.get_num_threads() > 1:
            advice = "beside another busy program OMP_NUM_THREADS=1 or OMP_WAIT_POLICY=PASSIVE helps"
            print(f"warning: {seconds:.2g} s a step, the fastest took {self.fastest:.2g}; {advice}", file=sys.stderr)
            self.fastest = 0.0  # all steps are slow from now on, so this is said once

    def remember_signal(self, number: int, frame) -> None:
        # A second Ctrl-C does not wait for the step to end; but torchrun sends every one twice.
        if self.received == number == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise KeyboardInterrupt
        self.received = number

    def positions(self) -> Iterator[range]:
        """The numbers of this process's samples, a micro-batch at a time."""
        for step in range(self.step, self.args.steps):
            first = step * self.args.batch + self.processes.rank * self.share
            for start in range(first, first + self.share, self.micro):
                yield range(start, start + self.micro)

    def due(self, every: int) -> bool:
        """Whether the step being finished is one of every `every`, or the last."""
        return (self.step + 1) % every == 0 or self.step + 1 == self.args.steps

    def row(self) -> dict | None:
        """A row of log.csv, means since the row before, if one or a picture is due; else None."""
        if not self.due(self.args.log_every) and not self.due(self.args.picture_every):
            return None
        done, (before, since) = self.step + 1, self.clock
        self.data.refuse_if_corrupt(self.unreadable, done * self.args.batch)
        row = dict(zip(self.means, (self.sums[:-1] / self.sums[-1]).tolist()))
        row |= {"step": done, "unreadable": self.unreadable, "skipped": self.scaler.skipped}
        row["lr"] = self.optimizer.param_groups[0]["lr"]
        row["images_per_s"] = self.args.batch * (done - before) / (time.time() - since)
        if self.processes.device.type == "cuda":
            row["memory_mb"] = torch.cuda.max_memory_allocated() / 2**20
        self.bar.set_postfix(loss=f"{row['loss']:.3f}", images_s=f"{row['images_per_s']:.0f}")
        return row

    def log(self, row: dict) -> None:
        """Appends a row to log.csv; a column without a value stays empty."""
        words = [f"{row[c]:.6g}" if isinstance(row.get(c), float) else str(row.get(c, "")) for c in self.columns]
        if self.processes.rank == 0:
            with open(self.folder / "log.csv", "a") as file:
                file.write("\n" + ",".join(words))
        self.sums.zero_()
        self.clock = self.step + 1, time.time()  # pictures and measurements do not count as training

    def cut_log(self) -> None:
        """log.csv gets back its length at the checkpoint. No row is read: a torn or edited one stops no run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "log.csv", "ab") as file:
            if file.truncate(min(self.log_length, file.tell())) == 0:
                file.write(",".join(self.columns).encode())

    def save(self) -> None:
        """Writes last.pt; the one before becomes previous.pt. Every --keep-every steps it also writes step-N.pt."""
        with open(self.folder / "log.csv", "ab") as log:
            self.log_length = log.tell()
        training = {name: getattr(self, name) for name in ("settings", *self.COUNTED)}
        training |= {"optimizer": self.optimizer.state_dict(), "scaler": dataclasses.asdict(self.scaler)}
        models = self.model, self.ema and self.ema.model
        if self.args.keep_every and self.step % self.args.keep_every == 0:
            dar.save_checkpoint(self.folder / f"step-{self.step}.pt", *models, training)
        dar.save_checkpoint(self.folder / "last.pt", *models, training, before=self.folder / "previous.pt")

    def restore(self) -> None:
        """Goes on from last.pt, or previous.pt if that is damaged or missing. A new folder changes nothing."""
        damaged = []
        for path in (self.folder / "last.pt", self.folder / "previous.pt"):
            try:
                checkpoint = dar.read_checkpoint(path)
            except FileNotFoundError:  # a kill between write_atomically's two renames
                continue
            except ValueError as error:
                damaged.append(str(error))
                continue
            before = checkpoint.get("training", {}).get("settings", {})
            new = [f"{k} was {before.get(k)}, is {v}" for k, v in self.settings.items() if before.get(k) != v]
            dar.require(not new, f"{path}: another run ({'; '.join(new)}); take another --out, or --resume never")
            self.model.load_state_dict(checkpoint["model"])
            if self.ema is not None:
                self.ema.model.load_state_dict(checkpoint["ema"])
            training = copy.deepcopy(checkpoint["training"])  # out of the mapped file, which will be replaced
            groups = self.optimizer.state_dict()["param_groups"]  # with this command line's weight decay
            self.optimizer.load_state_dict(training["optimizer"] | {"param_groups": groups})
            self.scaler = LossScaler(**training["scaler"] | {"enabled": self.scaler.enabled})
            vars(self).update({name: training[name] for name in self.COUNTED})
            return
        dar.require(not damaged, f"{'; '.join(damaged)}; --resume never starts anew")

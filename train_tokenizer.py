"""Trains the sequential diffusion tokenizer (sections 3.1, 4 and 5 of the paper).

From nothing:
    python train_tokenizer.py --preset shapes --data shapes --out runs/shapes
On images, a folder with a sub-folder for each class:
    python train_tokenizer.py --data cifar10/train --val cifar10/test --out runs/tokenizer
The paper's, on eight GPUs; on two nodes the same on each:
    torchrun --nproc_per_node=8 train_tokenizer.py --preset v1 --data imagenet/train --out runs/v1
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_id=v1 \\
        --rdzv_endpoint=FIRST_NODE:29500 \\
        train_tokenizer.py --preset v1 --data imagenet/train --out runs/v1
Where the nodes have no internet, this beforehand, where there is some:
    python train_tokenizer.py --prefetch

The same command again goes on where the run stopped, with any number of processes. RUN/last.pt is
the checkpoint (averaged weights inside), RUN/log.csv the losses, RUN/step-*.png originals beside
what comes back.
"""

import argparse
import copy
import dataclasses
import functools
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import dar
from common import frozen
from common.cli import command_line, integer, real, say
from common.distributed import Processes, start_processes
from common.files import lock_folder
from common.images import center_crop, center_crops, psnr, shrink, tile, to_float
from common.plan import refuse_if_too_large, tokenizer_cost
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
    save_run,
    saved_setting,
    say_goodbye,
    sync_gradients,
    will_resume,
    wrap_model,
)

# "v1" and "lite" are the paper's (section 5, appendix III); the others are ours, found by trials
# (experiments/README.md). times, codebook_warmup: see chapter 5 of dar.py. decay: the last share of
# the steps, over which the rate falls to 0. lpips, repa: weights of these terms in eq. 7.
PAPER = {
    "lr": 2e-4,
    "warmup": 5000,
    "codebook_warmup": 0,
    "times": 1,
    "decay": 0.0,
    "lpips": 0.5,
    "repa": 0.5,
    "micro_batch": 32,
    "picture_every": 5000,
    "save_every": 5000,
}
OURS = {
    "batch": 32,
    "lr": 1.5e-3,
    "warmup": 100,
    "codebook_warmup": 200,
    "times": 2,
    "decay": 0.5,
    "lpips": 0.0,
    "repa": 0.0,
    "picture_every": 500,
    "save_every": 500,
}
SHAPES = {"steps": 2000, "lr": 4e-3, "warmup": 50, "codebook_warmup": 150, "times": 4, "decay": 0.9}
RECIPES = {
    "v1": PAPER | {"batch": 1024, "steps": 210_000},
    "lite": PAPER | {"batch": 256, "steps": 50_000},
    "tiny": OURS | {"steps": 2800},
    "cifar10": OURS | {"steps": 5000},
    "shapes": OURS | SHAPES,
}


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
    add("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="change the preset's fields")
    add("--times", type=integer(1), help="diffusion times for each encoded image (the recipe's)")
    add(
        "--codebook-warmup",
        type=integer(0),
        help="steps before tokens are quantized (the recipe's, but at most a tenth of --steps)",
    )
    add("--decay", type=real(0, 1), help="last share of the steps, over which the rate falls to 0")
    add("--no-flip", action="store_true", help="do not mirror images at random")
    add("--lpips", type=real(0), help="weight of LPIPS; 0: without (default: the recipe's)")
    add("--repa", type=real(0), help="weight of REPA; 0: without (default: the recipe's)")
    add("--vgg", help="torchvision's VGG-16 weights for LPIPS (default: fetched by torch.hub)")
    add("--dinov2", help="DINOv2 ViT-B/14 weights for REPA (default: fetched by torch.hub)")
    add("--dinov2-repo", help="a clone of DINOv2's repository (default: fetched by torch.hub)")
    add("--init", help="start from this tokenizer's weights, or a Llama's tokenizer's")
    add("--prefetch", action="store_true", help="fetch what LPIPS and REPA need, and stop")
    return parser.parse_args()


def build_config(args: argparse.Namespace) -> dar.TokenizerConfig:
    """The preset with --set's changes. Raises ValueError naming what is wrong."""
    config = dar.TOKENIZER_PRESETS[args.preset]
    types = {field.name: type(getattr(config, field.name)) for field in dataclasses.fields(config)}
    types["repa_layer"] = int
    changes = {}
    for item in args.set:
        name, _, value = item.partition("=")
        if name not in types:
            raise ValueError(f"--set {item}: no such field; there are {', '.join(types)}")
        try:
            changes[name] = types[name](value)
        except ValueError:
            raise ValueError(f"--set {item}: expected {name}={types[name].__name__}") from None
    config = dataclasses.replace(config, **changes)
    if args.repa and config.repa_layer is None:
        raise ValueError(f"--repa {args.repa}: this model has no REPA head; add --set repa_layer=4")
    return config


# Fields of the config on which no weight's shape depends.
SHAPELESS = (
    "image_size",
    "num_groups",
    "num_steps",
    "time_shift",
    "data_scale",
    "group_rule",
    "commit_weight",
    "init_std",
)


def build_model(
    args: argparse.Namespace, config: dar.TokenizerConfig
) -> dar.SequentialDiffusionTokenizer:
    """A fresh tokenizer, or one with --init's weights. Raises ValueError naming the fields that
    shape the weights and differ."""
    torch.manual_seed(args.seed)
    model = dar.SequentialDiffusionTokenizer(config)
    if config.repa_layer is not None and not args.repa:
        model.diffusion.repa_head.requires_grad_(False)
    if args.init and not will_resume(args):
        source = dar.load_tokenizer(args.init, dtype=torch.float32)
        refuse_other_shape(args.init, source.config, config, SHAPELESS)
        model.load_state_dict(source.state_dict())
    return model


# ------------------------------------------------------------------------------
# What is drawn at random


def random_crop(image: Image.Image, rng: np.random.Generator, size: int, flip: bool) -> Image.Image:
    """ADM's augmentation: short side to 1-1.25 times the size, a random square, a random mirror.
    Images of the wanted size, and small ones (CIFAR-10), are only mirrored."""
    if image.size != (size, size) and min(image.size) < 64:
        image = center_crop(image, size)
    if image.size != (size, size):
        image = shrink(image, int(rng.integers(size, int(1.25 * size) + 1)))
        x = rng.integers(0, image.width - size + 1)
        y = rng.integers(0, image.height - size + 1)
        image = image.crop((x, y, x + size, y + size))
    if flip and rng.random() < 0.5:
        image = image.transpose(Image.FLIP_LEFT_RIGHT)
    return image


def draw_times(seed: int, step: int, batch: int, times: int) -> Tensor:
    """The uniform times s of a step's whole batch, of all processes: float32 [batch, times]."""
    rng = np.random.default_rng([seed, 2, step])
    return torch.from_numpy(rng.random((batch, times), np.float32))


def draw_noise(
    seed: int, positions: Tensor, shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """Standard normal noise, float32 [len(positions), *shape], each sample's from its own seed."""
    generator = torch.Generator(device)
    noise = torch.empty(len(positions), *shape, dtype=torch.float32, device=device)
    for row, position in zip(noise, positions.tolist()):
        # Odd multipliers permute the 32-bit numbers: no two samples of a run share a seed.
        generator.manual_seed((position * 2654435761 + seed * 40503 + 12345) % 2**32)
        row.normal_(generator=generator)
    return noise


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then constant (section 5); with --decay it falls to 0 at the end."""
    rising = min(1.0, (step + 1) / max(args.warmup, 1))
    falling = min(1.0, (args.steps - step) / max(args.decay * args.steps, 1))
    return args.lr * rising * falling


@torch.no_grad()
def start_codebook(model, ema, samples: Samples, position: int, device: torch.device) -> None:
    """Ends the codebook warm-up (chapter 5): the codes become features of the images from sample
    `position` on, the same ones in every process."""
    config = model.config
    count = 4 * config.codebook_size // config.num_tokens + 1  # images, four features for each code
    images = torch.stack([samples[position + i][0] for i in range(count)])
    features = [model.encoder(to_float(part.to(device))) for part in images.split(64)]
    torch.manual_seed(position)
    model.quantize.start_from(torch.cat(features).flatten(0, 1))
    ema.quantize.load_state_dict(model.quantize.state_dict())


# ------------------------------------------------------------------------------
# What is measured


def load_crops(data: ImageData, indices) -> Tensor:
    """Centre crops of the images with these indices, float32 [n, 3, size, size] in [-1, 1]."""
    images = [data.next_readable(int(i))[0] for i in indices]
    return center_crops(images, data.size)


@torch.no_grad()
def held_out(
    model, data: ImageData, count: int, processes: Processes, autocast
) -> dict[str, float]:
    """PSNR (ab2, S = K, noise from the image's index) and share of the codebook in use, over
    `count` images, which the processes share."""
    device, rank, world = processes
    order = np.random.default_rng(0).permutation(len(data))[:count]
    psnr_sum = torch.zeros(1, device=device)
    used = torch.zeros(model.config.codebook_size, device=device)
    for start in range(50 * rank, len(order), 50 * world):
        indices = order[start : start + 50]
        images = load_crops(data, indices).to(device)
        noise = dar.initial_noise(indices.tolist(), data.size, device)
        with autocast:
            codes = model.encode(images)
            decoded = model.decode(codes, noise)
        psnr_sum += psnr(decoded, images).sum()
        used[codes] = 1
    psnr_sum = processes.all_reduce(psnr_sum)
    used = processes.all_reduce(used, "MAX")
    return {"val_psnr": psnr_sum.item() / len(order), "val_code_use": used.mean().item()}


@torch.no_grad()
def reconstruction_picture(model, data: ImageData, device: torch.device, count: int = 8):
    """A row an image, class by class: original, the preview after each step, reconstruction."""
    count = min(count, len(data))
    by_class = np.argsort(data.labels, kind="stable")
    chosen = [by_class[i * len(data) // count] for i in range(count)]
    images = load_crops(data, chosen).to(device)
    codes = model.encode(images)
    noise = dar.initial_noise(list(range(count)), data.size, device)
    columns = [images, *model.previews(codes, noise), model.decode(codes, noise)]
    return tile(torch.stack(columns, 1).flatten(0, 1), len(columns))


# ------------------------------------------------------------------------------
# The training


def main() -> int:
    args = parse_arguments()
    if args.prefetch:
        frozen.load_lpips(args.vgg)
        frozen.load_dinov2(args.dinov2_repo, args.dinov2)
        print(f"VGG-16 (LPIPS) and DINOv2 (REPA) lie in {torch.hub.get_dir()}")
        return 0
    recipe = dict(RECIPES[args.preset])
    if args.init:
        recipe["codebook_warmup"] = 0  # its codebook is good
    fill_in(args, recipe)
    is_given = args.codebook_warmup is not None
    fill_in_warmups(args, recipe)
    config = build_config(args)
    processes = start_processes(args.device)
    device, rank, world = processes
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, for DINOv2: a fifth of the time
    micro_batch, accumulate = divide_batch(args, world)
    data = processes.first_alone(lambda: ImageData(args.data, config.image_size))
    val = ImageData(args.val, config.image_size, held_out=True) if args.val else None

    # The frozen networks of eq. 7.
    lpips = None
    dinov2 = None
    if args.lpips:
        network = processes.first_alone(lambda: frozen.load_lpips(args.vgg)).to(device)
        lpips = frozen.in_float32(network)
    if args.repa:
        load = functools.partial(frozen.load_dinov2, args.dinov2_repo, args.dinov2)
        network = processes.first_alone(load).to(device)
        grid = min(config.image_size // config.diffusion_patch, dar.DiffusionDecoder.REPA_GRID)
        dinov2 = frozen.in_float32(functools.partial(frozen.dinov2_features, network, grid))

    model = build_model(args, config).to(device)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    if device.type == "cuda" and not args.checkpoint_blocks:
        cost = tokenizer_cost(config, args.times, args.lpips > 0, args.repa > 0)
        available = torch.cuda.get_device_properties(device).total_memory
        refuse_if_too_large(model, True, cost, micro_batch, available)
    optimizer = torch.optim.Adam(trained, args.lr, (0.9, 0.95), fused=device.type != "mps")
    dtype = pick_dtype(args.precision, device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    # Go on where the run in --out stopped, if it is the same run.
    folder = Path(args.out)
    if args.resume == "auto" and not is_given:  # a longer run's would be another
        args.codebook_warmup = saved_setting(folder, "codebook_warmup", args.codebook_warmup)
    names = ["loss", "fm", "vq", "commit"]
    names += ["lpips"] if args.lpips else []
    names += ["repa"] if args.repa else []
    names += ["grad_norm"]
    settings = {f"model {name}": value for name, value in dataclasses.asdict(config).items()}
    settings |= {"data": data.digest, "seed": args.seed, "batch": args.batch, "ema": True}
    for name in ("times", "no_flip", "lpips", "repa", "codebook_warmup"):
        settings[name] = getattr(args, name)
    settings["init"] = args.init and os.path.normpath(args.init)
    state = State(LossScaler(dtype == torch.float16))
    state.sums = torch.zeros(len(names) + 1, dtype=torch.float64)  # the last one counts steps
    if rank == 0:
        lock_folder(folder)
    if args.resume == "auto":
        resume_run(folder, state, settings, model, ema, optimizer)
    processes.refuse_if_different(step=state.step, classes=data.class_names, settings=settings)
    columns = ["step", *names, *RUN_COLUMNS, "code_use", "val_psnr", "val_code_use"]
    log = Log(folder, columns, state, processes)
    for found in filter(None, (data, val)):
        say(found.describe())
    say(describe_recipe(args))
    threads = Threads(args.threads, device, again=not args.compile)
    threads.start(config.diffusion_width, state.threads)

    parallel = wrap_model(model, args, processes)
    crop = functools.partial(random_crop, size=config.image_size, flip=not args.no_flip)
    samples = Samples(data, crop, args.seed)
    steps = range(state.step, args.steps)
    numbers = sample_numbers(steps, args.batch, micro_batch, rank, world)
    workers = count_workers(config.image_size) if args.workers is None else args.workers
    batches = iterate_batches(samples, numbers, workers, device)
    used = torch.zeros(config.codebook_size, device=device)  # 1 for the codes since the last row
    stop_signal = StopSignal()  # from here on a signal is noted, and the step is finished
    stop = 0
    bar = tqdm(total=args.steps, initial=state.step, disable=rank > 0, unit="step")

    for step in steps:
        threads.look_again()
        if step == args.codebook_warmup and args.codebook_warmup > 0:
            start_codebook(model, ema, samples, step * args.batch, device)

        # One step of eq. 7 on args.batch images: each process takes its part, a micro-batch at a
        # time, and gradients add up.
        s_batch = draw_times(args.seed, step, args.batch, args.times).to(device)  # [batch, R]
        kept = model.kept_tokens(s_batch).sum()  # tokens, in the whole batch
        losses = torch.zeros(len(names) - 1, device=device)
        unreadable = 0
        optimizer.zero_grad()
        for i in range(accumulate):
            images, _, positions, newly_unreadable = next(batches)
            unreadable += newly_unreadable
            images = to_float(images)
            s = s_batch[positions - step * args.batch]  # [micro-batch, R]
            noise = draw_noise(args.seed, positions, (args.times, *images.shape[1:]), device)
            code_noise = None
            if step < args.codebook_warmup:
                shape = (config.num_tokens, config.code_dim)
                code_noise = draw_noise(args.seed + 1, positions, shape, device) * dar.WARMUP_NOISE
            repa_target = dinov2(images) if dinov2 else None
            with sync_gradients(parallel, wanted=i + 1 == accumulate):
                with autocast:
                    out = parallel(images, s, noise, code_noise)
                    terms = dar.tokenizer_loss(
                        out, images, lpips, args.lpips, repa_target, args.repa
                    )
                # Means over this micro-batch become shares of the mean over the whole batch: the
                # quantizer's over all tokens that are kept, the others over images. Micro-batches
                # and processes add up, and DDP divides by the number of processes.
                for name in terms:
                    share = 1 / accumulate
                    if name in ("vq", "commit"):
                        share = out["kept"] * world / kept
                    terms[name] = terms[name] * share
                loss = sum(terms.values())
                (state.scaler.scale * loss).backward()
            losses += torch.stack([loss, *terms.values()]).detach()
            used[out["codes"]] = 1

        # accept() says whether losses and gradients are finite, the same in all processes. If they
        # are not, it lowers float16's loss scale and the step is skipped, or it raises.
        grad_norm = clip_gradients(model, state.scaler.scale, args.clip)
        means, unreadable, stop = all_reduce_stats(
            losses, unreadable, stop_signal.number, processes
        )
        measured = dict(zip(names, [*means, grad_norm]))
        if state.scaler.accept(measured, step):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args)
            optimizer.step()
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
            row["code_use"] = processes.all_reduce(used, "MAX").mean().item()
            bar.set_postfix(loss=f"{row['loss']:.3f}", images_s=f"{row['images_per_s']:.0f}")
            if picture_due and rank == 0:
                picture = reconstruction_picture(ema, val or data, device)
                picture.save(folder / f"step-{state.step}.png")
            if picture_due and val:
                row |= held_out(ema, val, 250, processes, autocast)
            log.write(row)
            log.restart_clock(state.step)
            state.sums.zero_()
            used.zero_()
        keep_copy = args.keep_every > 0 and state.step % args.keep_every == 0
        if rank == 0 and (stop or keep_copy or is_due(step, args.save_every, args.steps)):
            save_run(folder, state, settings, model, ema, optimizer, keep_copy)
        if stop:
            break

    bar.close()
    processes.barrier()  # nobody leaves while process 0 may still be saving
    following = ["train_ar.py", "--data", args.data, "--tokenizer", str(folder / "last.pt")]
    following += ["--preset", args.preset if args.preset in dar.AR_PRESETS else "XL"]
    following += ["--out", f"{folder}-ar"]
    return say_goodbye(state, stop, args, following)


if __name__ == "__main__":
    command_line(main)

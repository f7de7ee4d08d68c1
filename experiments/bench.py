"""Measures speed, and how far it is from what this machine can do at best.

The small models:            python experiments/bench.py
What a figure's models cost: python experiments/bench.py --models v1 L XL --rows encode decode generate --dtype bfloat16
Waiting for a picture:       python experiments/bench.py --models v1 XL --rows stream --batch 1 --compile
One training step:           python experiments/bench.py --models v1 --rows train --batch 32 --compile
The data loader:             python experiments/bench.py --rows loader --data imagenet/train --workers 8

Every figure stands beside its limit, measured in the same run: arithmetic (the fastest way there is here to multiply
matrices of the model's shapes and type) or memory (reading a large array once). "share" is limit / measured, and keeps
its meaning on another machine. Weights are random: speed does not depend on them.
"""

import argparse
import functools
import itertools
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dar
import training

ROWS = ("encode", "decode", "generate", "stream", "train", "loader")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    names = list(dict.fromkeys([*dar.TOKENIZER_PRESETS, *dar.AR_PRESETS]))
    add("--models", nargs="+", default=["tiny"], choices=names, help="presets; a name may be tokenizer and Llama")
    add("--rows", nargs="+", default=list(ROWS), choices=ROWS, help="what to measure; stream: tokenizer with Llama")
    add("--batch", nargs="+", type=int, default=[1, 8], help="images at once, a row each (default: 1 8)")
    add(
        "--tokens", type=int, default=64, help="tokens that are generated, at most: a whole image takes N (default: 64)"
    )
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="auto: bfloat16 where it is fast")
    add("--seconds", type=float, default=2.0, help="how long a row is repeated at least (default: 2)")
    add("--compile", action="store_true", help="torch.compile; CUDA graphs too on a GPU")
    add("--checkpoint-blocks", action="store_true", help="recompute activations in the training step")
    add("--data", help="folder for the loader row (default: 64 photographs' worth of drawn JPEGs of 512 pixels)")
    add("--workers", type=int, default=0, help="of the loader (default: none)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    add("--json", metavar="FILE", help="also write the rows there")
    args = parser.parse_args()
    if min(args.batch) < 1 or args.tokens < 1 or args.seconds <= 0 or args.workers < 0:
        raise ValueError("--batch, --tokens and --seconds: expected numbers above 0; --workers: 0 or more")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise ValueError(f"--json {args.json}: expected a file in a folder that exists")
    return args


# Measuring


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(action, device: torch.device, least: float) -> float:
    """Seconds of one call, the median of calls repeated for `least` seconds, after one that is not counted."""
    action()
    times, start = [], time.perf_counter()
    while not times or time.perf_counter() - start < least:
        wait(device)
        before = time.perf_counter()
        action()
        wait(device)
        times.append(time.perf_counter() - before)
    return float(np.median(times))


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of resident memory starts anew


def peak_mb(device: torch.device) -> float:
    """Peak memory since reset_peak: what tensors took on a GPU; on a CPU what the whole process has, freed or not."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), float("nan"))


class Limits:
    """The machine's limits, each measured once: operations a second for products of given shapes; bytes a second."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype, self.known = device, dtype, {}

    @torch.no_grad()
    def operations(self, rows: int, width: int) -> float:
        """Of [rows, width] times [width, 4 width], the shape of the MLPs: the best of the ways torch has."""
        key = (rows, width)
        if key not in self.known:
            x = torch.randn(rows, width, device=self.device, dtype=self.dtype)
            w = torch.randn(4 * width, width, device=self.device, dtype=self.dtype)
            wt, ways = w.t().contiguous(), [lambda: F.linear(x, w), lambda: x @ wt]
            if self.device.type == "cpu" and torch.backends.mkldnn.is_available():
                packed = torch.ops.mkldnn._reorder_linear_weight(w, rows)
                ways.append(lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""))
            best = min(seconds_of(way, self.device, 0.3) for way in ways)
            self.known[key] = 2 * rows * width * 4 * width / best
        return self.known[key]

    def bytes(self) -> float:
        """Of reading a 1 GB array once, by all threads; here as the sum of its elements."""
        if "bytes" not in self.known:
            array = torch.ones(2**28, device=self.device)
            self.known["bytes"] = array.nbytes / seconds_of(array.sum, self.device, 1.0)
        return self.known["bytes"]


# Operations (a multiplication and an addition are two), counted by torch on its meta device, where nothing is computed


@functools.cache
def build_meta(config) -> torch.nn.Module:
    with torch.device("meta"):
        tokenizer = isinstance(config, dar.TokenizerConfig)
        return (dar.SequentialDiffusionTokenizer if tokenizer else dar.ARTransformer)(config).requires_grad_(False)


def count_operations(action) -> float:
    with torch.device("meta"), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops()


@functools.cache
def encode_operations(c: dar.TokenizerConfig) -> float:
    """Of one image: encoder, and the search through the codebook."""
    model, images = build_meta(c), torch.empty(1, 3, c.image_size, c.image_size, device="meta")
    return count_operations(lambda: model.encoder(images)) + 2 * c.num_tokens * c.code_dim * c.codebook_size


@functools.cache
def causal_operations(c: dar.TokenizerConfig) -> float:
    """Of z' of one image, all tokens at once."""
    model, z = build_meta(c), torch.empty(1, c.num_tokens, c.code_dim, device="meta")
    return count_operations(lambda: model.causal_decoder(z))


@functools.cache
def denoise_operations(c: dar.TokenizerConfig) -> float:
    """Of one step of one image."""
    model, x = build_meta(c), torch.empty(1, 3, c.image_size, c.image_size, device="meta")
    t, tokens = torch.empty(1, device="meta"), torch.empty(1, c.group_size, c.decoder_width, device="meta")
    return count_operations(lambda: model.velocity(x, t, tokens))


@functools.cache
def ar_operations(c: dar.ARConfig, n: int) -> float:
    """Of the Llama on n places of one image at once; a mask saves nothing."""
    model, codes = build_meta(c), torch.empty(1, n - 1, dtype=torch.int64, device="meta")
    return count_operations(lambda: model(codes, torch.empty(1, dtype=torch.int64, device="meta")))


# Rows: each yields (what, seconds, limit in seconds, the limit's kind, figures)


def build(model_class, config, device, dtype, compiled=False):
    with torch.device("meta"):
        model = model_class(config)
    model = model.to_empty(device=device).to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return dar.prepare_for_sampling(model.eval(), compiled)


def denoise_limit(c: dar.TokenizerConfig, batch: int, limits: Limits) -> float:
    """Seconds of a denoising step and its share of the causal decoder."""
    steps, patches = c.num_steps or c.num_groups, (c.image_size // c.diffusion_patch) ** 2
    operations = batch * (denoise_operations(c) + causal_operations(c) / steps)
    return operations / limits.operations(batch * patches, c.diffusion_width)


def token_limit(c: dar.ARConfig, rows: int, count: int, limits: Limits) -> tuple[float, str]:
    """Seconds of a token, and what limits it: every weight is read once, and the keys and values of all tokens before
    it, count/2 on average, for each of `rows` pictures (guidance: twice as many); or the multiplications."""
    size, named = torch.tensor([], dtype=limits.dtype).element_size(), build_meta(c).named_parameters()
    weights = sum(p.numel() for name, p in named if p.ndim == 2 and "embedding" not in name)
    cache = rows * c.layers * 2 * c.width * (count + 1) / 2
    multiplying = rows * ar_operations(c, count) / count / limits.operations(rows, c.width)
    return max(((weights + cache) * size / limits.bytes(), "memory"), (multiplying, "arithmetic"))


def tokenizer_rows(name: str, args, limits: Limits):
    c, device, dtype = dar.TOKENIZER_PRESETS[name], limits.device, limits.dtype
    tokenizer = build(dar.SequentialDiffusionTokenizer, c, device, dtype, args.compile)
    for batch in args.batch:
        images = torch.rand(batch, 3, c.image_size, c.image_size, device=device) * 2 - 1
        codes = tokenizer.encode(images)
        if "encode" in args.rows:
            tokens = batch * ((c.image_size // c.encoder_patch) ** 2 + c.num_tokens)
            limit = batch * encode_operations(c) / limits.operations(tokens, c.encoder_width)
            seconds = seconds_of(partial(tokenizer.encode, images), device, args.seconds)
            yield f"{name} encode, batch {batch}", seconds, limit, "arithmetic", {"images/s": batch / seconds}
        if "decode" in args.rows:
            steps = c.num_steps or c.num_groups
            limit = steps * denoise_limit(c, batch, limits)
            seconds = seconds_of(partial(tokenizer.decode, codes, images), device, args.seconds)
            figures = {"images/s": batch / seconds, "ms/step": 1000 * seconds / steps}
            yield f"{name} decode, batch {batch}", seconds, limit, "arithmetic", figures


def ar_rows(name: str, args, limits: Limits):
    c, device = dar.AR_PRESETS[name], limits.device
    ar = build(dar.ARTransformer, c, device, limits.dtype, args.compile)
    count = min(args.tokens, c.num_tokens)
    for batch in args.batch:
        for cfg, half in ((4.0, 2), (None, 1)):
            limit, kind = token_limit(c, half * batch, count, limits)
            labels = torch.zeros(batch, dtype=torch.int64, device=device)
            seconds = seconds_of(partial(ar.generate, labels, count, cfg, 0), device, args.seconds)
            figures = {"ms/token": 1000 * seconds / count, "images/s": batch * count / c.num_tokens / seconds}
            what = f"{name} generate, batch {batch}, {'guided' if cfg else 'no guidance'}"
            yield what, seconds, count * limit, kind, figures


def belong_together(tokenizer: str, llama: str) -> bool:
    t, c = dar.TOKENIZER_PRESETS.get(tokenizer), dar.AR_PRESETS.get(llama)
    return bool(t and c) and (t.codebook_size, t.num_tokens) == (c.vocab_size, c.num_tokens)


def stream_rows(tokenizer_name: str, name: str, args, limits: Limits):
    """From the call to the first preview, and to the picture: all tokens, guided, and a denoising step each group."""
    c, t, device = dar.AR_PRESETS[name], dar.TOKENIZER_PRESETS[tokenizer_name], limits.device
    ar = build(dar.ARTransformer, c, device, limits.dtype, args.compile)
    tokenizer = build(dar.SequentialDiffusionTokenizer, t, device, limits.dtype, args.compile)

    def draw(labels, groups):
        *_, step = itertools.islice(dar.stream(ar, tokenizer, labels, 4.0, 0), groups)
        return step.x.cpu()

    for batch in args.batch:
        labels = torch.zeros(batch, dtype=torch.int64, device=device)
        for groups, what in ((1, "first preview"), (t.num_groups, "picture")):
            token, kind = token_limit(c, 2 * batch, groups * t.group_size, limits)
            limit = groups * (t.group_size * token + denoise_limit(t, batch, limits))
            seconds = seconds_of(partial(draw, labels, groups), device, args.seconds)
            yield f"{tokenizer_name} and {name} to the {what}, batch {batch}", seconds, limit, kind, {}


def train_row(name: str, kind: str, batch: int, args, limits: Limits):
    """A step as the training scripts take it: forward, backward (twice the operations), clip, Adam, EMA."""
    device, times = limits.device, 2  # of each image, as in the tiny recipe
    with tempfile.TemporaryDirectory() as folder:
        precision = str(limits.dtype).removeprefix("torch.")
        settings = training.Arguments(
            out=folder, batch=batch, steps=10**6, precision=precision, compile=args.compile, resume="never"
        )
        settings.checkpoint_blocks = args.checkpoint_blocks
        if kind == "tokenizer":
            c = dar.TOKENIZER_PRESETS[name]
            model, terms = dar.SequentialDiffusionTokenizer(c).to(device), ["fm", "vq", "commit"]
            images = torch.rand(batch, 3, c.image_size, c.image_size, device=device) * 2 - 1
            s = torch.rand(batch, times, device=device)
            noise = torch.randn(batch, times, *images.shape[1:], device=device)
            operations = batch * (encode_operations(c) + causal_operations(c) + times * denoise_operations(c))
            rows, width = batch * times * (c.image_size // c.diffusion_patch) ** 2, c.diffusion_width

            def losses(_):
                return dar.tokenizer_loss(run.parallel(images, s, noise), images)

        else:
            c, terms = dar.AR_PRESETS[name], []
            model = dar.ARTransformer(c).to(device)
            codes = torch.randint(c.vocab_size, (batch, c.num_tokens), device=device)
            labels = torch.zeros(batch, dtype=torch.int64, device=device)
            operations, rows, width = batch * ar_operations(c, c.num_tokens), batch * c.num_tokens, c.width

            def losses(_):
                return {"loss": dar.ar_loss(run.parallel, codes, labels)}

        optimizer = torch.optim.Adam(model.parameters(), 1e-4, fused=device.type == "cuda")
        run = training.TrainingRun(settings, dar.Processes(device), model, training.EMA(model), optimizer, {}, terms)
        seconds = seconds_of(lambda: run.optimise(losses, [None], 1e-4), device, args.seconds)
    figures = {"images/s": batch / seconds}
    if kind == "Llama":
        figures["tokens/s"] = batch * c.num_tokens / seconds
    limit = 3 * operations / limits.operations(rows, width)
    yield f"{name} {kind} training step, batch {batch}", seconds, limit, "arithmetic", figures


def crop(image, rng):
    return dar.center_crop(image, 256)


def loader_row(args):
    """Decoding, ADM's centre crop to 256 pixels. Its limit is what one process can decode alone, times the
    processes at work: sample by sample in a loop, without a loader."""
    with tempfile.TemporaryDirectory() as folder:
        source = args.data
        if source is None:
            source = Path(folder, "data")
            (source / "shapes").mkdir(parents=True)
            for i in range(64):
                training.draw_shape(i, 512).save(source / "shapes" / f"{i}.jpg", quality=90)
        samples = training.Samples(training.ImageData(str(source), 256), crop, seed=0)
        alone = seconds_of(lambda: [samples[i] for i in range(32)], torch.device("cpu"), args.seconds) / 32
        batches = (range(i, i + 32) for i in range(0, 10**9, 32))
        options = dict(num_workers=args.workers, worker_init_fn=training.leave_signals_to_the_parent)
        loader = iter(torch.utils.data.DataLoader(samples, batch_sampler=batches, **options))
        seconds = seconds_of(partial(next, loader), torch.device("cpu"), args.seconds) / 32
        del loader  # its processes end before their files do
        yield (
            f"loader, {args.workers} workers",
            seconds,
            alone / max(args.workers, 1),
            "one process",
            {"images/s": 1 / seconds},
        )


def main() -> None:
    args = parse_arguments()
    device = dar.pick_device(args.device)
    fast = dar.has_fast_bfloat16(device) if args.dtype == "auto" else args.dtype == "bfloat16"
    limits = Limits(device, torch.bfloat16 if fast else torch.float32)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{where}, {str(limits.dtype)[6:]}, torch {torch.__version__}; reads {limits.bytes() / 1e9:.0f} GB/s")
    print(f"{'':48}{'measured':>12}{'limit':>12}  {'share':>6}  limited by   peak MB")
    dar.keep_freed_memory()  # not before: the large array that was just read is given back
    found = []

    def sources():
        for name in args.models:
            if name in dar.TOKENIZER_PRESETS and {"encode", "decode"} & set(args.rows):
                yield tokenizer_rows(name, args, limits)
            if name in dar.AR_PRESETS and "generate" in args.rows:
                yield ar_rows(name, args, limits)
            for batch in args.batch if "train" in args.rows else ():
                if name in dar.TOKENIZER_PRESETS:
                    yield train_row(name, "tokenizer", batch, args, limits)
                if name in dar.AR_PRESETS:
                    yield train_row(name, "Llama", batch, args, limits)
        if "stream" in args.rows:
            pairs = [pair for pair in itertools.product(args.models, repeat=2) if belong_together(*pair)]
            if not pairs:
                print("stream: no tokenizer and Llama among --models belong together (v1 and XL would)")
            for pair in pairs:
                yield stream_rows(*pair, args, limits)
        if "loader" in args.rows:
            yield loader_row(args)

    for rows in sources():
        reset_peak(device)
        for what, seconds, limit, kind, figures in rows:
            row = {
                "row": what,
                "seconds": seconds,
                "limit_seconds": limit,
                "share": limit / seconds,
                "limited_by": kind,
            }
            row |= {"peak_mb": peak_mb(device)} | figures
            more = ", ".join(f"{value:.3g} {unit}" for unit, value in figures.items())
            times = f"{1000 * seconds:9.1f} ms{1000 * limit:9.1f} ms  {limit / seconds:6.0%}"
            print(f"{what:48}{times}  {kind:11}{row['peak_mb']:8.0f}   {more}", flush=True)
            found.append(row)
            reset_peak(device)
    if args.json:
        dar.write_atomically(args.json, lambda file: file.write(json.dumps(found, indent=1).encode()))


if __name__ == "__main__":
    dar.command_line(main)

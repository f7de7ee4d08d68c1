"""How fast the models are, and how far that is from the best that this machine can do.

    python experiments/bench.py
    python experiments/bench.py --models v1 --rows encode decode --dtype float32 bfloat16
    python experiments/bench.py --models L XL --rows generate --dtype bfloat16
    python experiments/bench.py --models cifar10 --rows train --batch 32 --mode eager compiled

Every figure stands beside a limit that is measured in the same run: arithmetic, the fastest way
that torch has here to multiply matrices of the model's shapes; or memory, reading a large array
once. "share" is limit / measured, and keeps its meaning on another machine. Weights are random:
speed does not depend on them.
"""

import argparse
import copy
import functools
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dar
from common.cli import command_line, integer, real
from common.distributed import Processes, pick_device
from common.speed import pick_dtype, prepare_for_sampling
from common.training import clip_gradients, wrap_model
from train_tokenizer import RECIPES


class Setup(NamedTuple):
    """How everything is run."""

    device: torch.device
    dtype: torch.dtype
    compiled: bool
    seconds: float  # that a measurement is repeated for, at least
    tokens: int  # that are generated


class Row(NamedTuple):
    name: str
    seconds: float
    limit: float  # seconds
    limited_by: str
    rate: str


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    presets = list(dict.fromkeys([*dar.TOKENIZER_PRESETS, *dar.AR_PRESETS]))
    rows = ["encode", "decode", "generate", "train"]
    add("--models", nargs="+", default=["cifar10"], choices=presets, help="tokenizers and Llamas")
    add("--rows", nargs="+", default=rows, choices=rows, help="what to measure (default: all)")
    add("--batch", nargs="+", type=integer(1), default=[1, 8], help="images at once (1 8)")
    add("--dtype", nargs="+", default=["auto"], choices=["auto", "float32", "bfloat16"])
    add("--mode", nargs="+", default=["eager"], choices=["eager", "compiled"])
    add("--tokens", type=integer(1), default=32, help="tokens to generate (default: 32)")
    add("--seconds", type=real(0), default=2.0, help="to repeat each for, at least (default: 2)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    return parser.parse_args()


def median_seconds(action: Callable, device: torch.device, at_least: float) -> float:
    """Of one call; calls are repeated for some seconds, after one that is not counted."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    action()
    times = []
    while not times or sum(times) < at_least:
        wait()
        start = time.perf_counter()
        action()
        wait()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


# ------------------------------------------------------------------------------
# The machine's limits, each measured once


@functools.cache
@torch.no_grad()
def operations_per_second(rows: int, width: int, setup: Setup) -> float:
    """Of the product [rows, width] times [width, 4 width], an MLP's, in the best of three ways."""
    x = torch.randn(rows, width, device=setup.device, dtype=setup.dtype)
    linear = nn.Linear(width, 4 * width, bias=False, device=setup.device, dtype=setup.dtype)
    transposed = linear.weight.t().contiguous()
    packed = prepare_for_sampling(copy.deepcopy(linear))
    ways = [lambda: linear(x), lambda: x @ transposed, lambda: packed(x)]
    seconds = min(median_seconds(way, setup.device, 0.3) for way in ways)
    return 2 * rows * width * 4 * width / seconds


@functools.cache
def bytes_per_second(device: torch.device) -> float:
    """Of reading 1 GB once, with all threads: its sum."""
    array = torch.ones(2**28, device=device)
    return array.nbytes / median_seconds(array.sum, device, 1.0)


# ------------------------------------------------------------------------------
# What a model needs. Operations (a multiplication and an addition are two) are counted by torch on
# its meta device, where nothing is computed.


def model_class(config) -> type[nn.Module]:
    if isinstance(config, dar.TokenizerConfig):
        return dar.SequentialDiffusionTokenizer
    return dar.ARTransformer


@functools.cache
def build_meta(config) -> nn.Module:
    with torch.device("meta"):
        return model_class(config)(config).requires_grad_(False)


def count_operations(action: Callable[[], object]) -> float:
    counter = FlopCounterMode(display=False)
    with torch.device("meta"), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        action()
    return counter.get_total_flops()


@functools.cache
def encode_operations(config: dar.TokenizerConfig) -> float:
    """Of one image: encoder, and the search in the codebook."""
    model = build_meta(config)
    images = torch.empty(1, 3, config.image_size, config.image_size, device="meta")
    search = 2 * config.num_tokens * config.code_dim * config.codebook_size
    return count_operations(lambda: model.encoder(images)) + search


@functools.cache
def causal_operations(config: dar.TokenizerConfig) -> float:
    """Of z' of one image, all tokens at once."""
    model = build_meta(config)
    z = torch.empty(1, config.num_tokens, config.code_dim, device="meta")
    return count_operations(lambda: model.causal_decoder(z))


@functools.cache
def flow_operations(config: dar.TokenizerConfig) -> float:
    """Of one step of the flow of one image."""
    model = build_meta(config)
    x = torch.empty(1, 3, config.image_size, config.image_size, device="meta")
    t = torch.empty(1, device="meta")
    group_z = torch.empty(1, config.group_size, config.decoder_width, device="meta")
    return count_operations(lambda: model.velocity(x, t, group_z))


@functools.cache
def llama_operations(config: dar.ARConfig, n: int) -> float:
    """Of n positions of one image at once; that attention is causal saves nothing."""
    model = build_meta(config)
    codes = torch.empty(1, n - 1, dtype=torch.int64, device="meta")
    labels = torch.empty(1, dtype=torch.int64, device="meta")
    return count_operations(lambda: model(codes, labels))


def patch_count(config: dar.TokenizerConfig) -> int:
    return (config.image_size // config.diffusion_patch) ** 2


# ------------------------------------------------------------------------------
# Rows: encoding, decoding, generating


@functools.lru_cache(maxsize=1)
def build_for_sampling(config, setup: Setup) -> nn.Module:
    with torch.device("meta"):
        model = model_class(config)(config)
    model = model.to_empty(device=setup.device).to(setup.dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return prepare_for_sampling(model.eval(), setup.compiled)


def random_images(config: dar.TokenizerConfig, batch: int, device: torch.device) -> Tensor:
    return torch.rand(batch, 3, config.image_size, config.image_size, device=device) * 2 - 1


def measure_encode(name: str, batch: int, setup: Setup) -> Row:
    config = dar.TOKENIZER_PRESETS[name]
    tokenizer = build_for_sampling(config, setup)
    images = random_images(config, batch, setup.device)
    seconds = median_seconds(lambda: tokenizer.encode(images), setup.device, setup.seconds)
    patches = (config.image_size // config.encoder_patch) ** 2
    rows = batch * (patches + config.num_tokens)
    speed = operations_per_second(rows, config.encoder_width, setup)
    limit = batch * encode_operations(config) / speed
    return Row(f"{name} encode", seconds, limit, "arithmetic", f"{batch / seconds:.3g} images/s")


def measure_decode(name: str, batch: int, setup: Setup) -> Row:
    config = dar.TOKENIZER_PRESETS[name]
    tokenizer = build_for_sampling(config, setup)
    noise = random_images(config, batch, setup.device)
    codes = torch.randint(config.codebook_size, (batch, config.num_tokens), device=setup.device)
    seconds = median_seconds(lambda: tokenizer.decode(codes, noise), setup.device, setup.seconds)
    steps = config.num_steps or config.num_groups
    speed = operations_per_second(batch * patch_count(config), config.diffusion_width, setup)
    operations = causal_operations(config) + steps * flow_operations(config)
    limit = batch * operations / speed
    return Row(f"{name} decode", seconds, limit, "arithmetic", f"{batch / seconds:.3g} images/s")


def measure_generate(name: str, batch: int, setup: Setup) -> Row:
    """Guided: two rows of the batch for each picture."""
    config = dar.AR_PRESETS[name]
    ar = build_for_sampling(config, setup)
    count = min(setup.tokens, config.num_tokens)
    labels = torch.zeros(batch, dtype=torch.int64, device=setup.device)
    seconds = median_seconds(
        lambda: ar.generate(labels, count, cfg=4.0, seeds=0), setup.device, setup.seconds
    )
    limit, limited_by = token_limit(config, 2 * batch, count, setup)
    rate = f"{1000 * seconds / count:.3g} ms/token"
    return Row(f"{name} generate, guided", seconds, count * limit, limited_by, rate)


def token_limit(config: dar.ARConfig, rows: int, count: int, setup: Setup) -> tuple[float, str]:
    """Seconds of a token, and what limits it. Memory: every weight is read once, and for each row
    the keys and values of the tokens before, count / 2 on average. Or arithmetic."""
    weights = 0
    for name, parameter in build_meta(config).named_parameters():
        if parameter.ndim == 2 and "embedding" not in name:
            weights += parameter.numel()
    keys_and_values = rows * config.layers * 2 * config.width * (count + 1) / 2
    size = torch.empty(0, dtype=setup.dtype).element_size()
    reading = (weights + keys_and_values) * size / bytes_per_second(setup.device)
    operations = rows * llama_operations(config, count) / count
    multiplying = operations / operations_per_second(rows, config.width, setup)
    if reading > multiplying:
        return reading, "memory"
    return multiplying, "arithmetic"


# ------------------------------------------------------------------------------
# Rows: a training step as the scripts take it, without LPIPS and REPA. A backward pass takes twice
# the operations of the forward pass.


def measure_step(model: nn.Module, loss_of: Callable[[nn.Module], Tensor], setup: Setup) -> float:
    """Seconds of forward, backward, clipping, Adam and the average of the weights. loss_of is given
    the model as it is trained, compiled perhaps."""
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4, fused=setup.device.type != "mps")
    options = argparse.Namespace(compile=setup.compiled, checkpoint_blocks=False)
    parallel = wrap_model(model, options, Processes(setup.device))
    is_mixed = setup.dtype != torch.float32
    autocast = torch.autocast(setup.device.type, setup.dtype, enabled=is_mixed)

    def step() -> None:
        optimizer.zero_grad()
        with autocast:
            loss = loss_of(parallel)
        loss.backward()
        clip_gradients(model, scale=1.0, clip=1.0)
        optimizer.step()
        dar.update_ema(ema, model, updates=1000)

    return median_seconds(step, setup.device, setup.seconds)


def measure_tokenizer_step(name: str, batch: int, setup: Setup) -> Row:
    config = dar.TOKENIZER_PRESETS[name]
    times = RECIPES[name]["times"]
    model = dar.SequentialDiffusionTokenizer(config).to(setup.device)
    images = random_images(config, batch, setup.device)
    s = torch.rand(batch, times, device=setup.device)
    noise = torch.randn(batch, times, *images.shape[1:], device=setup.device)

    def loss_of(parallel: nn.Module) -> Tensor:
        return sum(dar.tokenizer_loss(parallel(images, s, noise), images).values())

    seconds = measure_step(model, loss_of, setup)
    rows = batch * times * patch_count(config)
    speed = operations_per_second(rows, config.diffusion_width, setup)
    forward = encode_operations(config) + causal_operations(config)
    forward += times * flow_operations(config)
    limit = 3 * batch * forward / speed
    rate = f"{batch / seconds:.3g} images/s"
    return Row(f"{name} tokenizer training step", seconds, limit, "arithmetic", rate)


def measure_llama_step(name: str, batch: int, setup: Setup) -> Row:
    config = dar.AR_PRESETS[name]
    model = dar.ARTransformer(config).to(setup.device)
    codes = torch.randint(config.vocab_size, (batch, config.num_tokens), device=setup.device)
    labels = torch.zeros(batch, dtype=torch.int64, device=setup.device)
    seconds = measure_step(model, lambda parallel: dar.ar_loss(parallel, codes, labels), setup)
    speed = operations_per_second(batch * config.num_tokens, config.width, setup)
    limit = 3 * batch * llama_operations(config, config.num_tokens) / speed
    rate = f"{batch / seconds:.3g} images/s"
    return Row(f"{name} Llama training step", seconds, limit, "arithmetic", rate)


# ------------------------------------------------------------------------------
# The table

TOKENIZER_ROWS = {
    "encode": measure_encode,
    "decode": measure_decode,
    "train": measure_tokenizer_step,
}
LLAMA_ROWS = {"generate": measure_generate, "train": measure_llama_step}


def measure(args: argparse.Namespace, setup: Setup) -> Iterator[tuple[Row, int]]:
    """The rows, each with its batch."""
    for name in args.models:
        for kind in args.rows:
            for batch in args.batch:
                if name in dar.TOKENIZER_PRESETS and kind in TOKENIZER_ROWS:
                    yield TOKENIZER_ROWS[kind](name, batch, setup), batch
                if name in dar.AR_PRESETS and kind in LLAMA_ROWS:
                    yield LLAMA_ROWS[kind](name, batch, setup), batch


def main() -> None:
    args = parse_arguments()
    device = pick_device(args.device)
    where = f"{torch.get_num_threads()} CPU threads"
    if device.type == "cuda":
        where = torch.cuda.get_device_name()
    bandwidth = bytes_per_second(device) / 1e9
    print(f"{where}, torch {torch.__version__}; reads {bandwidth:.0f} GB/s")
    print(f"{'':34}{'batch':>6}{'dtype':>10}{'mode':>10}{'measured':>12}{'limit':>12}   share")
    for name in args.dtype:
        dtype = pick_dtype(name, device)
        for mode in args.mode:
            setup = Setup(device, dtype, mode == "compiled", args.seconds, args.tokens)
            for row, batch in measure(args, setup):
                what = f"{row.name:34}{batch:6}{str(dtype)[6:]:>10}{mode:>10}"
                times = f"{1000 * row.seconds:9.2f} ms{1000 * row.limit:9.2f} ms"
                share = f"{row.limit / row.seconds:7.1%}"
                print(f"{what}{times} {share}  {row.limited_by}, {row.rate}", flush=True)


if __name__ == "__main__":
    command_line(main)

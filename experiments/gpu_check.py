"""For whoever first has a GPU: one page that says what of this code works on it, in ten minutes.

    python experiments/gpu_check.py                     # on the fastest device there is
    python experiments/gpu_check.py --device cpu        # its own test, with small models

Each line is a check: what was compared, what was found, what is expected. Send us the page.
"""

import argparse
import copy
import csv
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import dar
from common.cli import command_line
from common.distributed import pick_device
from common.plan import ar_cost, needed_bytes, tokenizer_cost
from common.speed import prepare_for_sampling
from sample import SHIPPED

ROOT = Path(__file__).resolve().parent.parent


def random_tokenizer(preset: str) -> dar.SequentialDiffusionTokenizer:
    """With weights that all matter: fresh ones are zero in many places."""
    torch.manual_seed(0)
    model = dar.SequentialDiffusionTokenizer(dar.TOKENIZER_PRESETS[preset])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def gradients(model: nn.Module, images, s, noise, device: torch.device, dtype: torch.dtype):
    """The sum of the losses, and all gradients in one vector, float32 on the CPU."""
    model.zero_grad()
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        out = model(images, s, noise)
        loss = sum(dar.tokenizer_loss(out, images).values())
    loss.backward()
    parts = [p.grad.float().flatten().cpu() for p in model.parameters() if p.grad is not None]
    return loss.item(), torch.cat(parts)


def check_tokenizer(preset: str, device: torch.device) -> str:
    """Encoding, decoding, loss and gradients on the device, beside those of the CPU."""
    model = random_tokenizer(preset)
    size = model.config.image_size
    images = 2 * torch.rand(2, 3, size, size) - 1
    s = torch.rand(2, 1)
    noise = torch.randn(2, 1, 3, size, size)
    there = copy.deepcopy(model).to(device)
    codes = model.encode(images)
    same = (there.encode(images.to(device)).cpu() == codes).float().mean().item()
    decoded = model.decode(codes, noise[:, 0])
    error = (there.decode(codes.to(device), noise[:, 0].to(device)).cpu() - decoded).abs().max()
    loss, gradient = gradients(model, images, s, noise, torch.device("cpu"), torch.float32)
    inputs = [x.to(device) for x in (images, s, noise)]
    loss_there, gradient_there = gradients(there, *inputs, device, torch.float32)
    loss_half, gradient_half = gradients(there, *inputs, device, torch.bfloat16)
    cosine = torch.cosine_similarity(gradient, gradient_there, dim=0).item()
    cosine_half = torch.cosine_similarity(gradient, gradient_half, dim=0).item()
    return (
        f"codes equal {same:.1%} (> 99%), decoding off by {error:.1e} (< 1e-3)\n"
        f"    loss {loss:.5f}, {loss_there:.5f}, bfloat16 {loss_half:.5f}; gradients' cosine "
        f"{cosine:.6f} (> 0.999), bfloat16 {cosine_half:.4f} (> 0.98)"
    )


def check_compiled(device: torch.device) -> str:
    """Tokens of the shipped Llama, plain and with CUDA graphs."""
    labels = torch.arange(10, device=device)
    ar = dar.load_ar(SHIPPED, device, torch.float32)
    seconds = []
    codes = []
    for _ in range(2):
        started = time.perf_counter()
        codes.append(ar.generate(labels, cfg=4.0, seeds=0))
        seconds.append(time.perf_counter() - started)
    plain_seconds = seconds[-1]
    prepare_for_sampling(ar, compile=True)
    for _ in range(3):
        started = time.perf_counter()
        codes.append(ar.generate(labels, cfg=4.0, seeds=0))
        seconds.append(time.perf_counter() - started)
    same = (codes[0] == codes[-1]).float().mean().item()
    return (
        f"tokens equal {same:.1%} (most); plain {plain_seconds:.2f} s, compiled "
        f"{seconds[-1]:.2f} s, its first run {seconds[2]:.0f} s"
    )


def train(folder: Path, *words: str, kill_at: int = 0, processes: int = 1) -> list[dict]:
    """Runs train_tokenizer.py on shapes; returns the rows of its log. kill_at: SIGKILL after the
    log has so many rows, then the same command again."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [str(ROOT / "train_tokenizer.py"), "--preset", "shapes", "--data", "shapes"]
    command += ["--out", str(folder), *words]
    if kill_at:
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(read_log(folder)) < kill_at:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-500:])
    return read_log(folder)


def read_log(folder: Path) -> list[dict]:
    if not (folder / "log.csv").exists():
        return []
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def check_training(device: torch.device, folder: Path, steps: int) -> str:
    words = ["--device", device.type, "--val", "shapes", "--steps", str(steps)]
    row = train(folder / "whole", *words)[-1]
    return (
        f"{steps} steps of shapes: held out {float(row['val_psnr']):.1f} dB (28.3 after 2000), "
        f"{float(row['images_per_s']):.0f} images/s"
    )


def check_resume(device: torch.device, folder: Path) -> str:
    words = ["--device", device.type, "--steps", "30", "--log-every", "1", "--save-every", "5"]
    words += ["--codebook-warmup", "5"]
    whole = train(folder / "unbroken", *words)
    broken = train(folder / "broken", *words, kill_at=12)
    differences = [abs(float(a["loss"]) - float(b["loss"])) for a, b in zip(whole, broken)]
    return (
        f"killed and continued: {len(broken)} rows (30), losses differ by at most "
        f"{max(differences):.1e} (0: bit for bit)"
    )


def check_processes(device: torch.device, folder: Path, count: int) -> str:
    words = ["--device", device.type, "--steps", "5", "--log-every", "1", "--codebook-warmup", "2"]
    one = train(folder / "one", *words)
    many = train(folder / "many", *words, processes=count)
    differences = [abs(float(a["loss"]) - float(b["loss"])) for a, b in zip(one, many)]
    return f"{count} processes: losses differ from one's by {max(differences):.1e} (< 1e-3)"


def check_step(name: str, device: torch.device, micro_batch: int) -> str:
    """Memory and time of a training step in bfloat16, beside what common/plan.py says."""
    torch.manual_seed(0)
    if name in dar.TOKENIZER_PRESETS:
        model = dar.SequentialDiffusionTokenizer(dar.TOKENIZER_PRESETS[name]).to(device)
        cost = tokenizer_cost(model.config, times=1, lpips=False, repa=False)
        size = model.config.image_size
        images = 2 * torch.rand(micro_batch, 3, size, size, device=device) - 1

        def loss():
            return sum(dar.tokenizer_loss(model(images), images).values())
    else:
        model = dar.ARTransformer(dar.AR_PRESETS[name]).to(device)
        cost = ar_cost(model.config)
        c = model.config
        codes = torch.randint(c.vocab_size, (micro_batch, c.num_tokens), device=device)
        labels = torch.randint(c.num_classes, (micro_batch,), device=device)

        def loss():
            return dar.ar_loss(model, codes, labels)

    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            value = loss()
        value.backward()
        optimizer.step()
        value.item()  # waits for the GPU
        seconds.append(time.perf_counter() - started)
    flops = micro_batch * (cost.products + cost.attention)
    rate = flops / min(seconds) / 1e12
    line = f"{name}, {micro_batch} images: {min(seconds):.3f} s, {rate:.1f} TFLOP/s"
    if device.type == "cuda":
        used = torch.cuda.max_memory_allocated() / 1e9
        planned = needed_bytes(model, False, cost, micro_batch) / 1e9
        line += f"; memory {used:.1f} GB, planned {planned:.1f} GB"
    return line


def report(name: str, check: Callable[[], str]) -> None:
    """Prints the check's line, or how it failed: the other checks still run."""
    started = time.perf_counter()
    try:
        line = check()
    except Exception as error:  # whatever a first GPU may show is what this page is for
        line = f"FAILED, {type(error).__name__}: {error}"
    print(f"{name} ({time.perf_counter() - started:.0f} s)\n    {line}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    args = parser.parse_args()
    device = pick_device(args.device)
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}, device {device}")
    on_gpu = device.type == "cuda"
    if on_gpu:
        print(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    large = "v1" if on_gpu else "tiny"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        report(f"{large} beside the CPU", lambda: check_tokenizer(large, device))
        report("compiled generation", lambda: check_compiled(device))
        report("training", lambda: check_training(device, folder, 2000 if on_gpu else 20))
        report("resuming", lambda: check_resume(device, folder))
        count = max(2, torch.cuda.device_count()) if not on_gpu else torch.cuda.device_count()
        report("processes", lambda: check_processes(device, folder, count))
        report("a step", lambda: check_step(large, device, 32 if on_gpu else 2))
        report("a step", lambda: check_step("XL" if on_gpu else "tiny", device, 64))


if __name__ == "__main__":
    command_line(main)

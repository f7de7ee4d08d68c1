"""README.md here, "The released weights": time and memory of the full-size models on random weights in released layout.

    python experiments/full_size.py FOLDER        (needs 5 GB there; writes v1.pt, L.pt and XL.pt once)

Each row is a process of its own. Memory is the peak of anonymous memory (RssAnon) above the interpreter with torch
imported, in MB and as a multiple of the weights that are kept.
"""

import argparse
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import dar

RELEASED = {  # beginning of a name of ours -> in the authors' files
    "quant_in.": "quant_in_conv.",
    "quant_out.": "quant_out_conv.",
    "diffusion.patch_in.": "diff_decoder.net.conv_in.",
    "diffusion.patch_out.": "diff_decoder.net.conv_out.",
    "diffusion.repa_head.": "diff_decoder.net.repa_out.",
    "diffusion.": "diff_decoder.net.",
    "cls_embedding.": "cls_embedding.embedding_table.",
}


def write_released(path: Path, model: torch.nn.Module) -> None:
    """A file as the authors' are: {"model"} in their names, with 1x1 convolutions where we have Linears."""
    state = {}
    for name, value in model.state_dict().items():
        value = torch.randn(value.shape).mul_(0.02) if value.ndim > 1 else torch.ones(value.shape)
        ours = next((prefix for prefix in RELEASED if name.startswith(prefix)), None)
        theirs = RELEASED[ours] + name[len(ours) :] if ours else name
        if re.search("quant_(in|out)_conv.weight|conv_(in|out).weight", theirs):
            value = value[:, :, None, None]
        state[theirs] = value
    torch.save({"model": state}, path)


def anonymous_mb() -> float:
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) / 1024


def measure(label: str, action, weights_mb: float | None = None):
    """Runs action, prints its seconds and the peak of anonymous memory above the one before; returns its result."""
    before, peak, done = anonymous_mb(), [0.0], threading.Event()

    def watch():
        while not done.wait(0.005):
            peak[0] = max(peak[0], anonymous_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    result = action()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    ratio = f", {(peak[0] - before) / weights_mb:.2f} x the weights" if weights_mb else ""
    print(f"{label:44} {seconds:7.2f} s   {peak[0] - before:7.0f} MB{ratio}", flush=True)
    return result


def row(kind: str, path: Path, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    with torch.device("meta"):
        config = (dar.TOKENIZER_PRESETS if kind == "v1" else dar.AR_PRESETS)[kind]
        model = (dar.SequentialDiffusionTokenizer if kind == "v1" else dar.ARTransformer)(config).to(dtype)
    weights_mb = sum(p.nbytes for p in model.parameters()) / 2**20
    load = dar.load_tokenizer if kind == "v1" else dar.load_ar
    prepared = lambda: dar.prepare_for_sampling(load(path, dtype=dtype))  # noqa: E731
    model = measure(f"{kind} {name}: load and prepare", prepared, weights_mb)
    torch.manual_seed(0)
    if kind == "v1":
        image = torch.rand(1, 3, 256, 256) * 2 - 1
        codes = measure(f"v1 {name}: encode one image", lambda: model.encode(image))
        measure(f"v1 {name}: decode one image, 8 steps", lambda: model.decode(codes))
    else:
        for count in (1, 2):
            what = f"{kind} {name}: 256 tokens, guided, {count} image{'s' * (count - 1)}"
            measure(what, lambda: model.generate(torch.arange(count), seeds=0))  # noqa: B023 (called at once)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--row", nargs=2, metavar=("MODEL", "DTYPE"), help="one row only, in this process")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.row:
        return row(args.row[0], args.folder / f"{args.row[0]}.pt", getattr(torch, args.row[1]))
    for kind in ("v1", "L", "XL"):
        if not (args.folder / f"{kind}.pt").exists():
            with torch.device("meta"):
                config = (dar.TOKENIZER_PRESETS if kind == "v1" else dar.AR_PRESETS)[kind]
                model = (dar.SequentialDiffusionTokenizer if kind == "v1" else dar.ARTransformer)(config)
            write_released(args.folder / f"{kind}.pt", model)
    for kind, dtype in (("v1", "float32"), ("v1", "bfloat16"), ("L", "float32"), ("L", "bfloat16"), ("XL", "bfloat16")):
        subprocess.run([sys.executable, __file__, str(args.folder), "--row", kind, dtype], check=True)


if __name__ == "__main__":
    dar.command_line(main)

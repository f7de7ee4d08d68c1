"""What fid.py costs: its metrics at the size that papers use, and its network beside pytorch-fid's.

    python experiments/fid_timing.py metrics                   # 50,000 samples, 10,000 references, random features
    python experiments/fid_timing.py network                   # images/s of both networks, in turns
    python experiments/fid_timing.py network --device cuda     # and what --half gains, and changes

Both print one JSON object. The weights are the golden files' synthetic ones: speed does not depend on them.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "data")]

import synthetic  # noqa: E402

import dar  # noqa: E402
import fid  # noqa: E402


def measure_metrics(samples: int, references: int, device: torch.device) -> dict:
    """Everything that fid.py does after the network, on random features made outside of the measured time."""
    results, generator = {"samples": samples, "references": references}, torch.Generator().manual_seed(0)

    def timed(name, function, *arguments):
        began, began_cpu = time.perf_counter(), time.process_time()
        value = function(*arguments)
        if device.type == "cuda":
            torch.cuda.synchronize()
        for key, spent in ((name, time.perf_counter() - began), (f"{name}_cpu", time.process_time() - began_cpu)):
            results[key] = results.get(key, 0) + spent
        return value

    pools, gaussians = [], []
    for count in (references, samples):
        # The samples lie off the references by a little, else precision and recall would be trivially 0 or 1.
        pool = torch.randn(count, 2048, generator=generator).mul_(1 if count == references else 0.99).to(device)
        pools.append(pool)
        for width in (2048, 2023):
            total = None
            for start in range(0, count, 64):  # as the images come, in batches
                part = pool[start : start + 64, :width]
                total = timed("moments_s", fid.moments, part, total)
            n, mean, square = total
            gaussians.append((mean, square / (n - 1)))
    results["fid"] = timed("fid_s", fid.frechet_distance, *gaussians[0], *gaussians[2])
    results["sfid"] = timed("sfid_s", fid.frechet_distance, *gaussians[1], *gaussians[3])
    probs = torch.randn(samples, 1008, generator=generator).softmax(1)
    results["inception_score"] = timed("inception_score_s", fid.inception_score, probs)
    results["precision"], results["recall"] = timed("precision_recall_s", fid.precision_recall, *pools)
    for end in ("_s", "_s_cpu"):  # seconds on the clock, and of all cores together: what another program did not take
        results[f"total{end}"] = sum(value for name, value in results.items() if name.endswith(end))
    results["peak_memory_GB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return results


def measure_network(batch: int, size: int, rounds: int, device: torch.device) -> dict:
    """images/s from bytes to pool_3, each network with its own resize; the networks take turns, so noise hits all."""
    import pytorch_fid.inception

    state = synthetic.synthetic_state_dict(synthetic.load_golden("inception_small.npz"), "inception")
    torch.hub.load_state_dict_from_url = pytorch_fid.inception.load_state_dict_from_url = lambda *a, **k: state
    ours, theirs = fid.load_inception().to(device), pytorch_fid.inception.InceptionV3().eval().to(device)
    images = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
    networks = {"fid.py": lambda: ours(images), "pytorch-fid": lambda: theirs(images.float().contiguous() / 255)}
    results = {"batch": batch, "size": size, "rounds": rounds}
    if device.type == "cuda":
        half = fid.load_inception().to(device, torch.float16)
        networks["fid.py --half"] = lambda: half(images)
    with torch.inference_mode():
        if device.type == "cuda":
            for name, exact, rounded in zip(("pool_3", "spatial", "logits"), ours(images), half(images)):
                results[f"half_error_{name}"] = ((rounded - exact).norm() / exact.norm()).item()
        seconds = {name: [] for name in networks}
        for turn in range(rounds + 1):
            for name, network in networks.items():
                began = time.perf_counter()
                network()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if turn > 0:  # the first one warms up
                    seconds[name].append(time.perf_counter() - began)
    for name, times in seconds.items():
        results[f"{name} images/s"] = batch / statistics.median(times)
        ratios = [other / own for other, own in zip(seconds["pytorch-fid"], times)]
        results[f"{name} over pytorch-fid"] = statistics.median(ratios)
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["metrics", "network"])
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--references", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=16, help="images at once, for network")
    parser.add_argument("--size", type=int, default=256, help="of the images, for network")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each network")
    parser.add_argument("--device", default="cpu", choices=["auto", "cpu", "cuda"])
    args = parser.parse_args()
    device = dar.pick_device(args.device)
    if args.what == "metrics":
        results = measure_metrics(args.samples, args.references, device)
    else:
        results = measure_network(args.batch, args.size, args.rounds, device)
    print(json.dumps({"device": str(device), "threads": torch.get_num_threads(), "torch": torch.__version__} | results))


if __name__ == "__main__":
    dar.command_line(main)

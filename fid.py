"""FID, sFID, Inception score, precision and recall: the numbers of ADM's TensorFlow evaluator, from PyTorch.

    python fid.py VIRTUAL_imagenet256_labeled.npz samples.npz          # the reference comes first, then the samples
    python fid.py photographs/ reconstructions/ --device cuda          # folders do as well; this one is rFID
    python fid.py photographs/ --save-stats photographs.npz            # a reference's statistics, for later runs
    torchrun --nproc_per_node=8 fid.py reference.npz samples.npz --json

They look at images through one network, the Inception v3 of 2015-12-05. FID fits a Gaussian to the features of each set
and measures how far apart the two are; sFID takes features that know where in the image they are; the Inception score
asks whether each image is recognised and all classes occur (mean over each 5,000 in file order: low for files sorted by
class); precision is the share of samples near a reference, recall that of references near a sample. How it is all
resized, pooled and rounded moves these numbers, and follows "Diffusion Models Beat GANs" (ADM).
"""

import argparse
import contextlib
import io
import json
import math
import os
import pickle
import sys
import zipfile
import zlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from tqdm import tqdm

import dar

URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
STATISTICS = {"mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023)}

# ---------------------------------------------------------------------------------------------------------------------
# The network. Attribute names are the keys of the public weights file. Three things differ from torchvision's v3: the
# average pools do not count the padding, block 7c max-pools instead, and there are 1008 classes and no auxiliary head.
#
# A mixed block concatenates branches: a name and convolutions, channels:kernel, of which the last may fork. `_pool`
# starts with a 3x3 pool, the average except in 6a, 7a and 7c. 6a and 7a halve the grid in the last step, unpadded.
MIXED = {
    "5": "1x1 64:1x1, 5x5 48:1x1 64:5x5, 3x3dbl 64:1x1 96:3x3 96:3x3, _pool {0}:1x1",
    "6a": "3x3 384:3x3, 3x3dbl 64:1x1 96:3x3 96:3x3, _pool",
    "6": "1x1 192:1x1, 7x7 {0}:1x1 {0}:1x7 192:7x1, 7x7dbl {0}:1x1 {0}:7x1 {0}:1x7 {0}:7x1 192:1x7, _pool 192:1x1",
    "7a": "3x3 192:1x1 320:3x3, 7x7x3 192:1x1 192:1x7 192:7x1 192:3x3, _pool",
    "7": "1x1 320:1x1, 3x3 384:1x1 384:1x3|3x1, 3x3dbl 448:1x1 384:3x3 384:1x3|3x1, _pool 192:1x1",
}


def conv_bn(inputs, outputs, kernel, stride=1, padding=0):
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(outputs, eps=1e-3), relu=nn.ReLU(inplace=True)))


class Mixed(nn.Module):
    def __init__(self, inputs, branches, pool=None):
        super().__init__()
        self.pool, self.branches = pool or nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False), []
        for branch, *steps in (text.split() for text in branches.split(", ")):
            channels, chain = inputs, []
            for i, step in enumerate(steps, start=1):
                outputs, *kernels = step.replace("|", ":").split(":")
                name = f"branch{branch}_{i}" if len(steps) > 1 else f"branch{branch}"
                chain.append([name] if len(kernels) == 1 else [f"{name}a", f"{name}b"])
                for fork, kernel in zip(chain[-1], kernels):
                    kernel, halve = [int(side) for side in kernel.split("x")], self.pool.stride == 2 and i == len(steps)
                    stride, padding = (2, 0) if halve else (1, [side // 2 for side in kernel])
                    self.add_module(fork, conv_bn(channels, int(outputs), kernel, stride, padding))
                channels = int(outputs)
            self.branches.append(chain)

    def forward(self, x):
        outputs = []
        for chain in self.branches:
            y = [self.pool(x) if chain is self.branches[-1] else x]
            for names in chain:
                y = [getattr(self, name)(y[0]) for name in names]
            outputs += y
        return torch.cat(outputs, 1)


def resize_tf1(x: torch.Tensor, size: int = 299) -> torch.Tensor:
    """TensorFlow 1's bilinear resize: float [B, C, H, W] -> [B, C, size, size]. Output i reads from i * in / out, with
    no half-pixel offset and no antialiasing; beyond the border the last pixel is repeated."""
    for dim in (3, 2):
        source = torch.arange(size, device=x.device, dtype=torch.float32) * (x.shape[dim] / size)
        low, weight = source.long(), source.frac()
        high = (low + 1).clamp(max=x.shape[dim] - 1)
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, high), weight if dim == 3 else weight[:, None])
    return x


class InceptionV3(nn.Module):
    """The 2015-12-05 Inception graph, for looking only: in eval mode, without gradients, its weights still to load."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = conv_bn(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = conv_bn(32, 32, 3)
        self.Conv2d_2b_3x3 = conv_bn(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = conv_bn(64, 80, 1)
        self.Conv2d_4a_3x3 = conv_bn(80, 192, 3)
        self.Mixed_5b = Mixed(192, MIXED["5"].format(32))
        self.Mixed_5c = Mixed(256, MIXED["5"].format(64))
        self.Mixed_5d = Mixed(288, MIXED["5"].format(64))
        self.Mixed_6a = Mixed(288, MIXED["6a"], nn.MaxPool2d(3, stride=2))
        self.Mixed_6b = Mixed(768, MIXED["6"].format(128))
        self.Mixed_6c = Mixed(768, MIXED["6"].format(160))
        self.Mixed_6d = Mixed(768, MIXED["6"].format(160))
        self.Mixed_6e = Mixed(768, MIXED["6"].format(192))
        self.Mixed_7a = Mixed(768, MIXED["7a"], nn.MaxPool2d(3, stride=2))
        self.Mixed_7b = Mixed(1280, MIXED["7"])
        self.Mixed_7c = Mixed(2048, MIXED["7"], nn.MaxPool2d(3, stride=1, padding=1))
        self.fc = nn.Linear(2048, 1008)
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """uint8 [B, 3, H, W] -> pool_3 [B, 2048], spatial [B, 2023], logits without bias [B, 1008]; float32."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"InceptionV3 takes uint8 [B, 3, H, W], not {images.dtype} {list(images.shape)}")
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # its default, TF32, is not what papers report
            x = ((resize_tf1(images.float()) - 128) / 128).to(self.fc.weight.dtype)  # [B, 3, 299, 299]
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # [B, 64, 147, 147]
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(torch.max_pool2d(x, 3, stride=2)))  # [B, 192, 71, 71]
            x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(torch.max_pool2d(x, 3, stride=2))))  # [B, 288, 35, 35]
            x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # [B, 768, 17, 17], branch1x1 in front
            spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1).float()
            x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))  # [B, 2048, 8, 8]
        pool_3 = x.float().mean((2, 3))
        return pool_3, spatial, pool_3 @ self.fc.weight.float().T


def load_inception(weights: str | Path | None = None) -> InceptionV3:
    """The network with the public weights: from the file `weights`, else downloaded once into torch.hub's cache.
    BatchNorm is folded into the convolutions, which computes the same in less time. ValueError without weights."""
    model = InceptionV3()
    options = {"map_location": "cpu", "weights_only": True}
    try:
        with contextlib.redirect_stdout(sys.stderr):  # torch.hub says there that it downloads
            fetch = torch.hub.load_state_dict_from_url
            state = torch.load(weights, **options) if weights else fetch(URL, check_hash=True, **options)
        model.load_state_dict(state)
    except Exception as e:  # from the network, the file, the unpickler or load_state_dict, each with types of its own
        reason = "no PyTorch weights file" if isinstance(e, pickle.UnpicklingError) else " ".join(str(e).split())
        file = weights or Path(torch.hub.get_dir(), "checkpoints", Path(URL).name)
        hint = "delete it, or get" if not weights and file.exists() else "get"
        raise ValueError(f"no weights in {file} ({reason or 'empty':.240}): {hint} {URL} for --weights FILE") from e
    for module in list(model.modules()):
        if isinstance(module, nn.Sequential):
            module.conv, module.bn = nn.utils.fuse_conv_bn_eval(module.conv, module.bn), nn.Identity()
    return model


# ---------------------------------------------------------------------------------------------------------------------
# The metrics, in float64. Arguments may be tensors or numpy arrays.


def moments(features: torch.Tensor, total: tuple | None = None) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Adds [N, D] features to the float64 moments `total`, which it uses up: N, mean, sum (x - mean)(x - mean)^T."""
    x, d = features.double(), features.shape[1]
    count, mean, square = total or (0, x.new_zeros(d), x.new_zeros(d, d))
    n, delta = len(x), x.mean(0) - mean
    # Chan, Golub and LeVeque 1979: the two means' distance counts like one more row.
    rows = torch.cat([x - x.mean(0), delta[None] * (n * count / (n + count)) ** 0.5])
    return count + n, mean + delta * (n / (n + count)), square.addmm_(rows.T, rows)


def merge_moments(*parts: tuple) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Moments of all parts together."""
    count = sum(n for n, _, _ in parts)
    mean = sum(n / count * mean for n, mean, _ in parts)
    return count, mean, sum(torch.addr(square, m - mean, m - mean, alpha=n) for n, m, square in parts)


def frechet_distance(mu1, sigma1, mu2, sigma2) -> float:
    """Squared distance of two Gaussians: |mu1 - mu2|^2 + Tr sigma1 + Tr sigma2 - 2 Tr (sigma1 sigma2)^1/2.
    mu: [D], sigma: [D, D]. The last trace is the sum of the singular values of A^T B, where A A^T and B B^T are the
    covariances, by symmetric eigenvalues: stable when they are singular (fewer images than dimensions). At D = 2048 and
    rank 700 it is 1e-11 off; eigenvalues of A^T sigma2 A, whose roots magnify rounding, and ADM's sqrtm 2e-4."""
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(x).double().cpu() for x in (mu1, sigma1, mu2, sigma2))
    dim, shapes = mu1.numel(), [tuple(x.shape) for x in (mu1, sigma1, mu2, sigma2)]
    fits = shapes == 2 * [(dim,), (dim, dim)]
    dar.require(fits, f"mean and covariance of both sets must be (D,) and (D, D), not {shapes}")
    finite = all(x.isfinite().all() for x in (mu1, sigma1, mu2, sigma2))
    dar.require(finite, "a mean or covariance holds NaN or infinite values")
    eigen = [torch.linalg.eigh((sigma + sigma.T) / 2) for sigma in (sigma1, sigma2)]
    roots = [(v * e.sqrt())[:, e > e[-1] * dim * 2e-16] for e, v in eigen]  # smaller eigenvalues are rounding
    overlap = torch.linalg.svdvals(roots[0].T @ roots[1]).sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * overlap
    return max(distance.item(), 0.0)  # a set's distance to itself may come out as -1e-13


def inception_score(probs, split_size: int = 5000) -> float:
    """Class probabilities [N, classes] in file order -> exp(mean KL from the split's average), mean over the splits."""
    probs = torch.as_tensor(probs)
    if probs.ndim != 2 or len(probs) == 0 or not ((probs.sum(1) - 1).abs() < 1e-3).all():
        raise ValueError(f"probabilities {list(probs.shape)} must be [N, classes] with rows that sum to 1 (a softmax)")
    entr = torch.special.entr  # -p ln p; the mean KL is the entropy of the average less the average entropy
    scores = [(entr(p.mean(0)).sum() - entr(p).sum(1).mean()).exp() for p in probs.double().split(split_size)]
    return torch.stack(scores).mean().item()


def precision_recall(reference_features, sample_features, k: int = 3, block: int = 2048) -> tuple[float, float]:
    """[N, D], [M, D] -> share of samples in some reference's ball, share of references in some sample's ball.
    A ball reaches to its centre's k-th neighbour in its own set, itself not counted (Kynkäänniemi et al. 2019). Runs
    where the features are, `block` x `block` distances at a time, in float64, as |a|^2 + |b|^2 - 2ab cancels: float32
    errors would be as wide as the gaps between neighbours (ADM's float16 moves both shares by up to 0.01)."""
    reference, samples = torch.as_tensor(reference_features), torch.as_tensor(sample_features)
    fits = all(x.ndim == 2 and len(x) > k and x.shape[1] == reference.shape[1] for x in (reference, samples))
    dar.require(fits, f"features must be [N, D], [M, D] with N, M > {k}, not {[*reference.shape]}, {[*samples.shape]}")
    finite = all(x.sum(dtype=torch.float64).isfinite() for x in (reference, samples))
    dar.require(finite, "the features hold NaN or infinite values")
    centre = reference.mean(0, dtype=torch.float64)  # leaves the distances as they are and makes the norms small

    def blocks(x, first=0):
        for i in range(first, len(x), block):
            yield slice(i, i + block), x[i : i + block].double() - centre

    def distances(a, b, slack=0.0):  # squared; [n, D], [m, D] -> [n, m]
        norm_a, norm_b = a.square().sum(1) * (1 - slack), b.square().sum(1) * (1 - slack)
        return torch.addmm(norm_b, a, b.T, alpha=-2).add_(norm_a[:, None])

    def radii(x):  # squared; [N]
        nearest = torch.full((len(x), k + 1), torch.inf, dtype=torch.float64, device=x.device)  # one of them itself
        for i, a in blocks(x):
            for j, b in blocks(x, first=i.start):  # the matrix is symmetric: half of its blocks do
                d = distances(a, b)
                nearest[i] = torch.cat([nearest[i], d], 1).topk(k + 1, largest=False).values
                if j != i:
                    nearest[j] = torch.cat([nearest[j].T, d], 0).topk(k + 1, dim=0, largest=False).values.T
        return nearest.amax(1)

    reference_radii, sample_radii = radii(reference), radii(samples)
    inside, reached = (torch.zeros(len(x), dtype=torch.bool, device=x.device) for x in (samples, reference))
    for i, a in blocks(reference):
        for j, b in blocks(samples):
            # Copies of an image have radius and distance 0 but for rounding; 1e-12 off the norms keeps these ties in.
            d = distances(a, b, slack=1e-12)
            inside[j] |= (d <= reference_radii[i, None]).any(0)
            reached[i] |= (d <= sample_radii[j]).any(1)
    return inside.double().mean().item(), reached.double().mean().item()


# ---------------------------------------------------------------------------------------------------------------------
# From files to features


@contextlib.contextmanager
def npz_trouble(path):  # whatever can be wrong with the archive becomes one ValueError that names it
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, MemoryError, RuntimeError, ValueError) as e:
        raise ValueError(f"{path} is not a usable .npz: {e}") from e


class ImageSet:
    """A folder of images, or an .npz with arr_0 (uint8 [N, H, W, 3]) and/or the statistics mu, sigma, mu_s, sigma_s;
    count is 0 with statistics only. Raises ValueError or FileNotFoundError, naming the file."""

    def __init__(self, path: str | Path):
        self.path, self.files, self.statistics, self.count, self.shape = Path(path), [], {}, 0, None
        if self.path.is_dir():
            self.files = [self.path / name for name in dar.list_images(self.path)]
            self.count, self.shape = len(self.files), np.asarray(dar.load_rgb(self.files[0])).shape
            for file in self.files:  # their heads tell: nobody shall wait for the network to find this
                try:
                    with Image.open(file) as image:
                        shape = image.height, image.width, 3
                except Exception:  # in Pillow's words; these name the file
                    shape = np.asarray(dar.load_rgb(file)).shape
                if shape != self.shape:
                    raise ValueError(f"{file} is {shape}, but {self.files[0]} {self.shape}: a set must have one size")
        else:
            with npz_trouble(path):
                self.open(zipfile.ZipFile(path))
        enough = f"{path} holds {self.count} image(s), but precision and recall (k = 3) need at least 4"
        dar.require(not 0 < self.count < 4, enough)

    def open(self, archive):
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        for name in [name for name in STATISTICS if name in names]:
            self.statistics[name] = np.lib.format.read_array(archive.open(f"{name}.npy"), allow_pickle=False)
        shapes = {name: value.shape for name, value in self.statistics.items()}
        fits = shapes in ({}, STATISTICS, {name: STATISTICS[name] for name in ("mu", "sigma")})
        dar.require(fits, f"its statistics are {shapes}, expected {STATISTICS} or the first two")
        finite = all(value.dtype.kind in "fiu" and np.isfinite(value).all() for value in self.statistics.values())
        dar.require(finite, "its statistics are not all finite numbers")
        if "arr_0" in names:
            self.stream = archive.open("arr_0.npy")  # never read as a whole: it may exceed the memory
            short = np.lib.format.read_magic(self.stream) == (1, 0)
            header = np.lib.format.read_array_header_1_0 if short else np.lib.format.read_array_header_2_0
            shape, columns_first, dtype = header(self.stream)
            if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or min(shape) < 1:
                wanted = "expected uint8 (N, H, W, 3); x in [-1, 1] becomes clip(127.5 * x + 128, 0, 255).astype(uint8)"
                raise ValueError(f"arr_0 is {dtype} {shape}, {wanted}")
            there = archive.getinfo("arr_0.npy").file_size - self.stream.tell()
            dar.require(there >= math.prod(shape), f"arr_0 is {shape}, but holds {there} bytes: it is cut off")
            if columns_first:  # but in this order it has to be
                self.stream = io.BytesIO(np.load(self.path)["arr_0"].tobytes())  # tobytes() writes row by row
            self.count, self.shape, self.first = shape[0], shape[1:], self.stream.tell()
        elif not self.statistics:
            raise ValueError(f"neither arr_0 (images) nor mu and sigma are in it: {', '.join(names[:9]) or 'nothing'}")

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Images start to stop - 1 in file order, uint8 [B, 3, H, W]. Fast in this order: an .npz is a stream."""
        if self.files:
            with ThreadPoolExecutor() as threads:  # PIL decodes outside of the interpreter's lock
                pixels = np.stack(list(map(np.asarray, threads.map(dar.load_rgb, self.files[start:stop]))))
        else:
            with npz_trouble(self.path):
                self.stream.seek(self.first + start * np.prod(self.shape))
                data = bytearray(self.stream.read((stop - start) * np.prod(self.shape)))
                pixels = np.frombuffer(data, np.uint8).reshape(stop - start, *self.shape)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)


@torch.inference_mode()
def look_at(images: ImageSet, model: InceptionV3, batch_size: int, device: torch.device, rank: int = 0, world: int = 1):
    """Adds to a set its pool (pool_3, [N, 2048]), its probs ([N, 1008]) and the statistics that its file lacks.
    Each of `world` processes takes a range of the batches, so the numbers are those of one; rank 0 gets them."""
    start, stop = (-(-images.count // batch_size) * r // world * batch_size for r in (rank, rank + 1))
    exact = torch.device("cpu") if device.type == "mps" else device  # Apple's GPUs have no float64
    pools, probs, sums = [torch.empty(0, 2048, device=device)], [torch.empty(0, 1008, device=device)], [None, None]
    for i in tqdm(range(start, stop, batch_size), desc=images.path.name, unit="batch", disable=rank > 0):
        pool, spatial, logits = model(images.read(i, min(i + batch_size, images.count)).to(device))
        sums = [moments(x.to(exact), total) for x, total in zip((pool, spatial), sums)]
        pools.append(pool)
        probs.append(logits.softmax(1))
    part = (torch.cat(pools).cpu(), torch.cat(probs).cpu(), *[s and (s[0], s[1].cpu(), s[2].cpu()) for s in sums])
    parts = [part] * world if rank == 0 else None
    if world > 1:
        torch.distributed.gather_object(part, parts)
    if rank > 0:
        return
    pools, probs, *sums = zip(*parts)
    images.pool, images.probs = torch.cat(pools).to(exact), torch.cat(probs)
    if not images.pool.isfinite().all():
        raise ValueError(f"{images.path}: the network's features are NaN or infinite: damaged weights, or --half?")
    for end, totals in zip(("", "_s"), sums):
        count, mean, square = merge_moments(*filter(None, totals))
        images.statistics = {f"mu{end}": mean.numpy(), f"sigma{end}": square.numpy() / (count - 1)} | images.statistics


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("reference", metavar="REFERENCE", help=".npz or folder of images to compare with")
    add("samples", metavar="SAMPLES", nargs="?", help=".npz or folder of images to judge")
    add("--weights", metavar="FILE", help="the Inception weights (default: downloaded once)")
    add("--batch-size", type=int, default=64, help="images at once, in each process (default: 64)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="default: the fastest there is")
    add("--half", action="store_true", help="run the network in float16 (CUDA only); moves features by 1e-3")
    add("--save-stats", type=Path, metavar="FILE", help="write REFERENCE's statistics to a new .npz, SAMPLES or not")
    add("--json", action="store_true", help="print one JSON object instead of the five lines")
    args = parser.parse_args()
    device = dar.pick_device(args.device)
    dar.require(args.samples or args.save_stats, "SAMPLES are missing (only --save-stats FILE goes without)")
    dar.require(args.batch_size > 0, f"--batch-size {args.batch_size}: must be at least 1")
    dar.require(not args.half or device.type == "cuda", f"--half needs a CUDA device, not {device}")
    if (file := args.save_stats) and (file.exists() or not os.access(file.absolute().parent, os.W_OK)):
        raise ValueError(f"--save-stats {file}: must be a new file in an existing folder that may be written to")
    sets = [ImageSet(path) for path in (args.reference, args.samples) if path is not None]
    looked = [images for images in sets if images.count]
    if len({images.shape for images in looked}) > 1:
        raise ValueError(f"images differ in size: {', '.join(f'{images.path} {images.shape}' for images in looked)}")
    device, rank, world = dar.Processes.start(device)
    model = looked and load_inception(args.weights).to(device, torch.float16 if args.half else torch.float32)
    dar.keep_freed_memory()
    for images in looked:
        if rank == 0 and images.count < 2048 and "mu" not in images.statistics:
            print(f"warning: FID is biased below 2048 images; {images.path} has {images.count}", file=sys.stderr)
        look_at(images, model, args.batch_size, device, rank, world)
    if rank == 0 and args.save_stats:
        dar.write_atomically(args.save_stats, lambda file: np.savez(file, **sets[0].statistics))
    if rank > 0 or args.samples is None:
        return
    (reference, samples), results = sets, dict.fromkeys(("Inception Score", "FID", "sFID", "Precision", "Recall"))
    if samples.count:
        results["Inception Score"] = inception_score(samples.probs)
    for label, names in {"FID": ("mu", "sigma"), "sFID": ("mu_s", "sigma_s")}.items():
        if set(names) <= reference.statistics.keys() & samples.statistics.keys():
            results[label] = frechet_distance(*(images.statistics[name] for images in sets for name in names))
    if len(looked) == 2:
        results["Precision"], results["Recall"] = precision_recall(reference.pool, samples.pool)
    if missing := [label for label, value in results.items() if value is None]:
        print(f"left out for want of images (arr_0) in one of the sets: {', '.join(missing)}", file=sys.stderr)
    if args.json:
        print(json.dumps({label.lower().replace(" ", "_"): value for label, value in results.items()}))
    else:
        print("\n".join(f"{label}: {value}" for label, value in results.items() if value is not None))


if __name__ == "__main__":
    dar.command_line(main)

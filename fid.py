"""FID, sFID, Inception score, precision and recall, as ADM's TensorFlow evaluator computes them.

    python fid.py VIRTUAL_imagenet256_labeled.npz samples.npz     # the reference first
    python fid.py photographs/ reconstructions/ --device cuda     # folders do as well: rFID
    python fid.py photographs/ --save-stats photographs.npz       # a reference for later runs
    torchrun --nproc_per_node=8 fid.py reference.npz samples.npz --json

All five look at images through one network, the Inception v3 of 2015-12-05.
* FID fits a Gaussian to the features of each set and measures how far apart the two are.
* sFID does so with features that know where in the image they are.
* The Inception score asks whether each image is recognised, and whether all classes occur. It is
  the mean over each 5,000 images in file order, and so is low for files that are sorted by class.
* Precision is the share of samples that lie near a reference: are they good?
* Recall is the share of references that lie near a sample: is everything there?

The resize, the pools and the rounding move these numbers. They follow ADM, "Diffusion Models Beat
GANs" (Dhariwal and Nichol 2021), whose numbers papers compare with.
"""

import argparse
import contextlib
import json
import math
import os
import sys
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from common.cli import command_line, integer
from common.distributed import Processes, start_processes
from common.files import save_npz, write_atomically
from common.images import check_images, list_images, read_image
from common.threads import Threads, add_threads_option

WEIGHTS_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)

# ------------------------------------------------------------------------------------------------
# The network
#
# Names are the keys of the public weights file. Three things differ from torchvision's Inception
# v3: the average pools do not count the padding, block 7c max-pools instead, and there are 1008
# classes and no auxiliary head.


class ConvNorm(nn.Module):
    """Convolution, BatchNorm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel_size, stride: int = 1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel_size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def average_pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class InceptionA(nn.Module):
    """[B, inputs, 35, 35] -> [B, 224 + pool_outputs, 35, 35]."""

    def __init__(self, inputs: int, pool_outputs: int):
        super().__init__()
        self.branch1x1 = ConvNorm(inputs, 64, 1)

        self.branch5x5_1 = ConvNorm(inputs, 48, 1)
        self.branch5x5_2 = ConvNorm(48, 64, 5, padding=2)

        self.branch3x3dbl_1 = ConvNorm(inputs, 64, 1)
        self.branch3x3dbl_2 = ConvNorm(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3, padding=1)

        self.branch_pool = ConvNorm(inputs, pool_outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        branch1x1 = self.branch1x1(x)
        branch5x5 = self.branch5x5_2(self.branch5x5_1(x))
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        branch_pool = self.branch_pool(average_pool(x))
        return torch.cat([branch1x1, branch5x5, branch3x3dbl, branch_pool], dim=1)


class InceptionB(nn.Module):
    """[B, 288, 35, 35] -> [B, 768, 17, 17]."""

    def __init__(self):
        super().__init__()
        self.branch3x3 = ConvNorm(288, 384, 3, stride=2)

        self.branch3x3dbl_1 = ConvNorm(288, 64, 1)
        self.branch3x3dbl_2 = ConvNorm(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        branch3x3 = self.branch3x3(x)
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        branch_pool = F.max_pool2d(x, 3, stride=2)
        return torch.cat([branch3x3, branch3x3dbl, branch_pool], dim=1)


class InceptionC(nn.Module):
    """[B, 768, 17, 17] -> the same shape; 7x7 convolutions as 1x7 and 7x1."""

    def __init__(self, width: int):
        super().__init__()
        self.branch1x1 = ConvNorm(768, 192, 1)

        self.branch7x7_1 = ConvNorm(768, width, 1)
        self.branch7x7_2 = ConvNorm(width, width, (1, 7), padding=(0, 3))
        self.branch7x7_3 = ConvNorm(width, 192, (7, 1), padding=(3, 0))

        self.branch7x7dbl_1 = ConvNorm(768, width, 1)
        self.branch7x7dbl_2 = ConvNorm(width, width, (7, 1), padding=(3, 0))
        self.branch7x7dbl_3 = ConvNorm(width, width, (1, 7), padding=(0, 3))
        self.branch7x7dbl_4 = ConvNorm(width, width, (7, 1), padding=(3, 0))
        self.branch7x7dbl_5 = ConvNorm(width, 192, (1, 7), padding=(0, 3))

        self.branch_pool = ConvNorm(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        branch1x1 = self.branch1x1(x)
        branch7x7 = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        branch7x7dbl = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        branch7x7dbl = self.branch7x7dbl_5(self.branch7x7dbl_4(branch7x7dbl))
        branch_pool = self.branch_pool(average_pool(x))
        return torch.cat([branch1x1, branch7x7, branch7x7dbl, branch_pool], dim=1)


class InceptionD(nn.Module):
    """[B, 768, 17, 17] -> [B, 1280, 8, 8]."""

    def __init__(self):
        super().__init__()
        self.branch3x3_1 = ConvNorm(768, 192, 1)
        self.branch3x3_2 = ConvNorm(192, 320, 3, stride=2)

        self.branch7x7x3_1 = ConvNorm(768, 192, 1)
        self.branch7x7x3_2 = ConvNorm(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = ConvNorm(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = ConvNorm(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        branch3x3 = self.branch3x3_2(self.branch3x3_1(x))
        branch7x7x3 = self.branch7x7x3_2(self.branch7x7x3_1(x))
        branch7x7x3 = self.branch7x7x3_4(self.branch7x7x3_3(branch7x7x3))
        branch_pool = F.max_pool2d(x, 3, stride=2)
        return torch.cat([branch3x3, branch7x7x3, branch_pool], dim=1)


class InceptionE(nn.Module):
    """[B, inputs, 8, 8] -> [B, 2048, 8, 8]; two of its branches fork."""

    def __init__(self, inputs: int, max_pool: bool):
        super().__init__()
        self.max_pool = max_pool
        self.branch1x1 = ConvNorm(inputs, 320, 1)

        self.branch3x3_1 = ConvNorm(inputs, 384, 1)
        self.branch3x3_2a = ConvNorm(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = ConvNorm(384, 384, (3, 1), padding=(1, 0))

        self.branch3x3dbl_1 = ConvNorm(inputs, 448, 1)
        self.branch3x3dbl_2 = ConvNorm(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = ConvNorm(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = ConvNorm(384, 384, (3, 1), padding=(1, 0))

        self.branch_pool = ConvNorm(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        branch1x1 = self.branch1x1(x)

        branch3x3 = self.branch3x3_1(x)
        branch3x3_a = self.branch3x3_2a(branch3x3)
        branch3x3_b = self.branch3x3_2b(branch3x3)

        branch3x3dbl = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branch3x3dbl_a = self.branch3x3dbl_3a(branch3x3dbl)
        branch3x3dbl_b = self.branch3x3dbl_3b(branch3x3dbl)

        if self.max_pool:
            pooled = F.max_pool2d(x, 3, stride=1, padding=1)
        else:
            pooled = average_pool(x)
        branch_pool = self.branch_pool(pooled)

        branches = [
            branch1x1,
            branch3x3_a,
            branch3x3_b,
            branch3x3dbl_a,
            branch3x3dbl_b,
            branch_pool,
        ]
        return torch.cat(branches, dim=1)


class InceptionV3(nn.Module):
    """The 2015-12-05 graph, in eval mode and without gradients. Its weights are still to load."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3)
        self.Mixed_5b = InceptionA(192, pool_outputs=32)
        self.Mixed_5c = InceptionA(256, pool_outputs=64)
        self.Mixed_5d = InceptionA(288, pool_outputs=64)
        self.Mixed_6a = InceptionB()
        self.Mixed_6b = InceptionC(width=128)
        self.Mixed_6c = InceptionC(width=160)
        self.Mixed_6d = InceptionC(width=160)
        self.Mixed_6e = InceptionC(width=192)
        self.Mixed_7a = InceptionD()
        self.Mixed_7b = InceptionE(1280, max_pool=False)
        self.Mixed_7c = InceptionE(2048, max_pool=True)
        self.fc = nn.Linear(2048, 1008)
        self.eval()
        self.requires_grad_(False)
        self.to(memory_format=torch.channels_last)  # A quarter faster on a CPU.

    # cuDNN's default for convolutions is TF32, which is not what papers report.
    @torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """uint8 [B, 3, H, W] -> what FID, sFID and the Inception score need, in float32: pool_3
        [B, 2048], spatial [B, 2023], logits without their bias [B, 1008].
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"images are {images.dtype} {list(images.shape)}, expected uint8 [B, 3, H, W]"
            )
        x = (resize_tf1(images.float()) - 128) / 128  # [B, 3, 299, 299]
        x = self.Conv2d_1a_3x3(x)  # [B, 32, 149, 149]
        x = self.Conv2d_2a_3x3(x)  # [B, 32, 147, 147]
        x = self.Conv2d_2b_3x3(x)  # [B, 64, 147, 147]
        x = F.max_pool2d(x, 3, stride=2)  # [B, 64, 73, 73]
        x = self.Conv2d_3b_1x1(x)  # [B, 80, 73, 73]
        x = self.Conv2d_4a_3x3(x)  # [B, 192, 71, 71]
        x = F.max_pool2d(x, 3, stride=2)  # [B, 192, 35, 35]
        x = self.Mixed_5b(x)  # [B, 256, 35, 35]
        x = self.Mixed_5c(x)  # [B, 288, 35, 35]
        x = self.Mixed_5d(x)  # [B, 288, 35, 35]
        x = self.Mixed_6a(x)  # [B, 768, 17, 17]
        x = self.Mixed_6b(x)
        x = self.Mixed_6c(x)
        x = self.Mixed_6d(x)
        # sFID's features: the first 7 channels, which branch1x1 gave, with the channel last.
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # [B, 17 * 17 * 7]
        x = self.Mixed_6e(x)
        x = self.Mixed_7a(x)  # [B, 1280, 8, 8]
        x = self.Mixed_7b(x)  # [B, 2048, 8, 8]
        x = self.Mixed_7c(x)
        pool_3 = x.mean((2, 3))
        logits = pool_3 @ self.fc.weight.T
        return pool_3, spatial, logits


def resize_tf1(x: Tensor, size: int = 299) -> Tensor:
    """TensorFlow 1's bilinear resize: float [B, C, H, W] -> [B, C, size, size].

    Output i reads from position i * in / out, with no half-pixel offset and no antialiasing. Beyond
    the border the last pixel is repeated.
    """

    def neighbours(length):
        position = torch.arange(size, device=x.device) * (length / size)
        low = position.long()
        high = (low + 1).clamp(max=length - 1)
        return low, high, position - low

    left, right, weight = neighbours(x.shape[3])
    x = torch.lerp(x[:, :, :, left], x[:, :, :, right], weight)
    top, bottom, weight = neighbours(x.shape[2])
    return torch.lerp(x[:, :, top], x[:, :, bottom], weight[:, None])


def load_inception(weights: str | Path | None = None) -> InceptionV3:
    """The network with the public weights: from the file `weights`, else downloaded once into
    torch.hub's cache. Raises ValueError if they cannot be had.
    """
    cached = Path(torch.hub.get_dir(), "checkpoints", Path(WEIGHTS_URL).name)
    model = InceptionV3()
    try:
        if weights is None:
            # torch.hub prints that it downloads. Standard output is for the numbers alone.
            with contextlib.redirect_stdout(sys.stderr):
                state = torch.hub.load_state_dict_from_url(
                    WEIGHTS_URL, map_location="cpu", check_hash=True, weights_only=True
                )
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        model.load_state_dict(state)
    except Exception as error:  # The network, the file and the unpickler have types of their own.
        raise ValueError(
            f"no weights in {weights or cached} ({str(error)[:240]}); get {WEIGHTS_URL} and name "
            f"it with --weights FILE"
        ) from error
    return model


# ------------------------------------------------------------------------------------------------
# The metrics, in float64. Arguments may be tensors or numpy arrays.


def mean_and_covariance(features) -> tuple[Tensor, Tensor]:
    """Features [N, D] -> their mean [D] and unbiased covariance [D, D], in float64."""
    features = torch.as_tensor(features)
    mean = features.mean(0, dtype=torch.float64)
    products = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=mean.device)
    for rows in features.split(4096):  # All at once would take N * D * 8 bytes.
        centred = rows.double() - mean
        products += centred.T @ centred
    return mean, products / (len(features) - 1)


def frechet_distance(mu1, sigma1, mu2, sigma2) -> float:
    """The squared distance of two Gaussians, with means [D] and covariances [D, D]:

        |mu1 - mu2|^2 + Tr sigma1 + Tr sigma2 - 2 Tr (sigma1 sigma2)^1/2

    With A A^T = sigma1 and B B^T = sigma2 the last trace is the sum of the singular values of
    A^T B. This stays exact when the covariances are singular, as they are with fewer images than
    dimensions: 1e-11 off at D = 2048 and rank 700, where the square root of a matrix (scipy's
    sqrtm, in ADM) is 2e-4 off. Raises ValueError for other shapes, and for NaN and infinity.
    """
    gaussians = [torch.as_tensor(x).double().cpu() for x in (mu1, sigma1, mu2, sigma2)]
    mu1, sigma1, mu2, sigma2 = gaussians

    dim = mu1.numel()
    shapes = [tuple(x.shape) for x in gaussians]
    if shapes != [(dim,), (dim, dim), (dim,), (dim, dim)]:
        raise ValueError(f"mean and covariance of both sets must be (D,) and (D, D), not {shapes}")
    if not all(x.isfinite().all() for x in gaussians):
        raise ValueError("a mean or a covariance holds NaN or infinite values")

    overlap = torch.linalg.svdvals(square_root(sigma1).T @ square_root(sigma2)).sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * overlap
    return max(distance.item(), 0.0)  # A set's distance to itself may come out as -1e-13.


def square_root(covariance: Tensor) -> Tensor:
    """[D, D] of rank R -> A, [D, R], with A A^T = covariance."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    is_rounding = values <= values[-1] * len(values) * 2e-16
    return vectors[:, ~is_rounding] * values[~is_rounding].sqrt()


def inception_score(probs, split_size: int = 5000) -> float:
    """Class probabilities [N, classes] in file order -> the mean over splits of `split_size` rows
    (the last may be shorter) of exp(mean KL divergence of the rows from their average).

    Raises ValueError for rows that do not sum to 1.
    """
    probs = torch.as_tensor(probs).double()
    if probs.ndim != 2 or len(probs) == 0 or (probs.sum(1) - 1).abs().max() > 1e-3:
        raise ValueError(f"probabilities {list(probs.shape)} must be [N, classes], rows of sum 1")

    scores = []
    for split in probs.split(split_size):
        # The mean divergence is the entropy of the average less the average entropy.
        entropy_of_average = torch.special.entr(split.mean(0)).sum()
        average_entropy = torch.special.entr(split).sum(1).mean()
        scores.append((entropy_of_average - average_entropy).exp())
    return torch.stack(scores).mean().item()


def precision_recall(
    reference_features, sample_features, k: int = 3, block: int = 1024
) -> tuple[float, float]:
    """Features [N, D] and [M, D] -> the share of samples that lie in some reference's ball, and the
    share of references that lie in some sample's ball (Kynkäänniemi et al. 2019).

    A ball reaches to its centre's k-th neighbour in its own set, itself not counted. Computed where
    the features are, `block` rows of distances at a time. Raises ValueError for other shapes, for
    sets of k or fewer, and for NaN and infinity.
    """
    reference = torch.as_tensor(reference_features)
    samples = torch.as_tensor(sample_features)

    shapes = f"{list(reference.shape)} and {list(samples.shape)}"
    if reference.ndim != 2 or samples.ndim != 2 or reference.shape[1] != samples.shape[1]:
        raise ValueError(f"features must be [N, D] and [M, D], not {shapes}")
    if min(len(reference), len(samples)) <= k:
        raise ValueError(f"features must be [N, D] and [M, D] with N, M > {k}, not {shapes}")
    if not (reference.isfinite().all() and samples.isfinite().all()):
        raise ValueError("the features hold NaN or infinite values")

    # Float32 errors would be as wide as the gaps between neighbours. (ADM's distances are float16,
    # which moves both shares by up to 0.01.)
    reference = reference.double()
    samples = samples.double()
    reference_radii = squared_radii(reference, k, block)
    sample_radii = squared_radii(samples, k, block)

    sample_is_inside = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    reference_is_inside = []
    for rows, radii in zip(reference.split(block), reference_radii.split(block)):
        distances = squared_distances(rows, samples)
        sample_is_inside |= (distances <= radii[:, None]).any(0)
        reference_is_inside.append((distances <= sample_radii).any(1))

    precision = sample_is_inside.double().mean().item()
    recall = torch.cat(reference_is_inside).double().mean().item()
    return precision, recall


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """[n, D] and [m, D] -> [n, m], as |a|^2 + |b|^2 - 2 ab."""
    norms = a.square().sum(1)[:, None] + b.square().sum(1)
    return torch.addmm(norms, a, b.T, alpha=-2)


def squared_radii(x: Tensor, k: int, block: int) -> Tensor:
    """[N, D] -> the squared distance of each row to its k-th neighbour among the others, [N]."""
    nearest = [
        squared_distances(rows, x).topk(k + 1, largest=False).values for rows in x.split(block)
    ]
    radii = torch.cat(nearest).amax(1)  # One of the k + 1 is the row itself.
    # Copies of an image have radius and distance 0 but for rounding; this keeps them inside.
    return radii + 1e-12 * x.square().sum(1)


# ------------------------------------------------------------------------------------------------
# Images and statistics from files
#
# A set of images has a path, its number of images `count`, their `shape` (H, W, 3), the
# `statistics` that its file holds, and read(start, stop). Damage to its files is found when it is
# opened, before the network looks at the first image.

STATISTICS = {"mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023)}


class ImageFolder:
    """A folder of images of one size. Raises ValueError or OSError, which name the file."""

    def __init__(self, path: Path):
        self.path = path
        self.statistics = {}
        self.files = [path / name for name in list_images(path)]
        self.count = len(self.files)

        sizes = check_images(self.files)
        for file, size in zip(self.files, sizes):
            if size != sizes[0]:
                raise ValueError(f"{file} has {size} pixels, {self.files[0]} has {sizes[0]}")
        width, height = sizes[0]
        self.shape = (height, width, 3)

    def read(self, start: int, stop: int) -> Tensor:
        """Images start ... stop - 1 in the order of their names: uint8 [B, 3, H, W]."""
        with ThreadPoolExecutor() as threads:
            images = list(threads.map(read_image, self.files[start:stop]))
        pixels = np.stack([np.asarray(image) for image in images])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)


class ImageArchive:
    """An .npz with images, arr_0 (uint8 [N, H, W, 3]), or statistics, or both."""

    def __init__(self, path: Path):
        self.path = path
        self.count = 0
        self.shape = None

        archive = zipfile.ZipFile(path)
        damaged = archive.testzip()  # Compares the checksums: 0.4 s a GB, once it is in memory.
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")
        arrays = np.load(path)
        if "arr_0" not in arrays and "mu" not in arrays:
            raise ValueError(f"neither arr_0 (images) nor mu and sigma are in it: {arrays}")

        self.statistics = {name: arrays[name] for name in STATISTICS if name in arrays}
        check_statistics(self.statistics)

        if "arr_0" in arrays:
            self.open_stream(archive)

    def open_stream(self, archive: zipfile.ZipFile):
        # The images are read as a stream, since they may exceed the memory.
        self.stream = archive.open("arr_0.npy")
        np.lib.format.read_magic(self.stream)
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(self.stream)
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or shape[0] == 0:
            raise ValueError(
                f"arr_0 is {dtype} {shape}, expected uint8 (N, H, W, 3); x in [-1, 1] becomes "
                f"clip(127.5 * x + 128, 0, 255).astype(uint8)"
            )
        if fortran_order:
            raise ValueError("arr_0 is in Fortran order; save np.ascontiguousarray(arr_0)")

        self.count = shape[0]
        self.shape = shape[1:]
        self.first_byte = self.stream.tell()
        num_bytes = archive.getinfo("arr_0.npy").file_size - self.first_byte
        if num_bytes != math.prod(shape):
            raise ValueError(f"arr_0 is {shape}, but has {num_bytes} bytes")

    def read(self, start: int, stop: int) -> Tensor:
        """Images start ... stop - 1: uint8 [B, 3, H, W]. Only file order is quick."""
        image_bytes = math.prod(self.shape)
        self.stream.seek(self.first_byte + start * image_bytes)
        data = bytearray(self.stream.read((stop - start) * image_bytes))
        pixels = torch.frombuffer(data, dtype=torch.uint8).view(stop - start, *self.shape)
        return pixels.permute(0, 3, 1, 2)


def check_statistics(statistics: dict[str, np.ndarray]):
    """Raises ValueError unless there are none, or mu and sigma, or all four, and all finite."""
    shapes = {name: value.shape for name, value in statistics.items()}
    pool_3_shapes = {name: STATISTICS[name] for name in ("mu", "sigma")}
    if shapes not in ({}, pool_3_shapes, STATISTICS):
        raise ValueError(f"its statistics are {shapes}, expected {STATISTICS} or the first two")
    for name, value in statistics.items():
        if value.dtype.kind not in "fiu" or not np.isfinite(value).all():
            raise ValueError(f"{name} does not hold finite numbers")


def open_images(path: Path) -> ImageFolder | ImageArchive:
    """The images or statistics at `path`. Raises ValueError or OSError, which name the file."""
    if path.is_dir():
        images = ImageFolder(path)
    else:
        try:
            images = ImageArchive(path)
        # What zipfile, zlib and numpy raise for a damaged archive.
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
            raise ValueError(f"{path} is not a usable .npz: {error}") from error

    if 0 < images.count < 4:
        raise ValueError(f"{path}: {images.count} image(s); precision and recall (k = 3) need 4")
    return images


# ------------------------------------------------------------------------------------------------
# From images to numbers


class Features(NamedTuple):
    """What the network says of N images."""

    pool: Tensor  # pool_3, float32 [N, 2048]
    spatial: Tensor  # float32 [N, 2023]
    probs: Tensor  # float32 [N, 1008]


@torch.inference_mode()
def extract_features(
    images: ImageFolder | ImageArchive, model: InceptionV3, batch_size: int, processes: Processes
) -> Features:
    """The features of a set of images in file order. Each process looks at some of the batches, and
    all get the features of all. Raises ValueError if they are not finite.
    """
    device = processes.device
    if device.type == "mps":
        device = torch.device("cpu")  # Apple's GPUs lack float64, which the metrics compute in.
    features = Features(
        pool=torch.zeros(images.count, 2048, device=device),
        spatial=torch.zeros(images.count, 2023, device=device),
        probs=torch.zeros(images.count, 1008, device=device),
    )

    starts = range(0, images.count, batch_size)
    first = len(starts) * processes.rank // processes.world
    last = len(starts) * (processes.rank + 1) // processes.world
    for start in tqdm(starts[first:last], images.path.name, disable=processes.rank > 0):
        stop = min(start + batch_size, images.count)
        batch = images.read(start, stop).to(processes.device)
        pool, spatial, logits = model(batch)
        if not pool.isfinite().all():
            raise ValueError(f"{images.path}: features are NaN or infinite; damaged weights?")
        features.pool[start:stop] = pool
        features.spatial[start:stop] = spatial
        features.probs[start:stop] = logits.softmax(1)

    # Here the rows of other processes are still zero, so the sum puts the parts together.
    return Features(*(processes.all_reduce(part, "SUM") for part in features))


class Evaluation(NamedTuple):
    features: Features | None  # None if the file holds statistics only
    statistics: dict[str, np.ndarray]  # as STATISTICS; from pytorch-fid's files only mu and sigma


def evaluate(
    images: ImageFolder | ImageArchive,
    model: InceptionV3 | None,
    batch_size: int,
    processes: Processes,
) -> Evaluation:
    """The features and statistics of a set. Statistics in its file go before those of its images:
    ADM's reference has those of all of ImageNet, and 10,000 images for precision and recall.
    """
    if images.count == 0:
        return Evaluation(None, images.statistics)

    if images.count < 2048 and "mu" not in images.statistics and processes.rank == 0:
        warning = f"FID is biased below 2048 images; {images.path} has {images.count}"
        print(f"warning: {warning}", file=sys.stderr)
    features = extract_features(images, model, batch_size, processes)
    mu, sigma = mean_and_covariance(features.pool)
    mu_s, sigma_s = mean_and_covariance(features.spatial)
    computed = {"mu": mu, "sigma": sigma, "mu_s": mu_s, "sigma_s": sigma_s}
    computed = {name: value.cpu().numpy() for name, value in computed.items()}
    return Evaluation(features, computed | images.statistics)


def compare(reference: Evaluation, samples: Evaluation) -> dict[str, float | None]:
    """ADM's five numbers, under its names and in its order; None for those that need images (or
    statistics) which a set does not hold.
    """
    results = dict.fromkeys(["Inception Score", "FID", "sFID", "Precision", "Recall"])

    if samples.features is not None:
        results["Inception Score"] = inception_score(samples.features.probs)

    for label, mean, covariance in (("FID", "mu", "sigma"), ("sFID", "mu_s", "sigma_s")):
        if mean in reference.statistics and mean in samples.statistics:
            results[label] = frechet_distance(
                reference.statistics[mean],
                reference.statistics[covariance],
                samples.statistics[mean],
                samples.statistics[covariance],
            )

    if reference.features is not None and samples.features is not None:
        precision, recall = precision_recall(reference.features.pool, samples.features.pool)
        results["Precision"] = precision
        results["Recall"] = recall

    return results


def print_results(results: dict[str, float | None], as_json: bool):
    missing = [label for label, value in results.items() if value is None]
    if missing:
        print(f"left out, as a set has no images: {', '.join(missing)}", file=sys.stderr)

    if as_json:
        by_name = {label.lower().replace(" ", "_"): value for label, value in results.items()}
        print(json.dumps(by_name))
        return
    for label, value in results.items():
        if value is not None:
            print(f"{label}: {value}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("reference", type=Path, help=".npz or folder of images to compare with")
    add("samples", type=Path, nargs="?", help=".npz or folder of images to judge")
    add("--weights", type=Path, metavar="FILE", help="of Inception (default: downloaded once)")
    add(
        "--batch-size",
        type=integer(1),
        default=64,
        help="images at once, in each process (default: 64)",
    )
    add(
        "--device",
        default="auto",
        choices=["auto", "cpu", "cuda", "mps"],
        help="auto: a GPU, if there is one",
    )
    add_threads_option(add)
    add("--save-stats", type=Path, metavar="FILE", help="write the reference's statistics to FILE")
    add("--json", action="store_true", help="print one JSON object instead of five lines")
    args = parser.parse_args()

    if args.samples is None and args.save_stats is None:
        raise ValueError("SAMPLES are missing (only --save-stats FILE goes without)")
    if args.save_stats is not None:
        folder = args.save_stats.absolute().parent
        if args.save_stats.exists() or not os.access(folder, os.W_OK):
            raise ValueError(f"--save-stats {args.save_stats}: no new file in a writable folder")

    paths = [path for path in (args.reference, args.samples) if path is not None]
    sets = [open_images(path) for path in paths]
    shapes = {str(images.path): images.shape for images in sets if images.count > 0}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"images differ in size: {shapes}")

    processes = start_processes(args.device)
    Threads(args.threads, processes.device).start()
    model = None
    if shapes:  # Statistics alone need no network.
        model = processes.first_alone(lambda: load_inception(args.weights))
        model.to(processes.device)
    evaluations = [evaluate(images, model, args.batch_size, processes) for images in sets]

    if processes.rank > 0:
        return
    if args.save_stats is not None:
        statistics = evaluations[0].statistics
        write_atomically(args.save_stats, lambda path: save_npz(path, statistics))
    if args.samples is not None:
        print_results(compare(*evaluations), args.json)


if __name__ == "__main__":
    command_line(main)

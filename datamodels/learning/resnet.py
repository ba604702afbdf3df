"""ResNet-18 and ResNet-50 (He et al., 2016) with the names of torchvision's parameters, so that its weights fit.

`stem="cifar"` is the usual change for 32 × 32 images: a 3 × 3 convolution without stride, and no pooling behind it.
"""

from __future__ import annotations

import torch
from torch import nn

from datamodels.errors import DatamodelsError

STEMS = ("imagenet", "cifar")


def resnet18(num_classes: int = 1000, stem: str = "imagenet") -> nn.Module:
    """11.7 M parameters with 1,000 classes."""
    return ResNet(Basic, (2, 2, 2, 2), num_classes, stem)


def resnet50(num_classes: int = 1000, stem: str = "imagenet") -> nn.Module:
    """25.6 M parameters with 1,000 classes."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, stem)


def _convolution(channels: int, out: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out, size, stride=stride, padding=size // 2, bias=False)


def _shortcut(channels: int, out: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and channels == out:
        return None
    return nn.Sequential(_convolution(channels, out, 1, stride), nn.BatchNorm2d(out))


class Basic(nn.Module):
    """Two 3 × 3 convolutions, and the way past them."""

    growth = 1

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _convolution(channels, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _convolution(width, width, 3), nn.BatchNorm2d(width)
        self.downsample = _shortcut(channels, width, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        past = x if self.downsample is None else self.downsample(x)
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + past)


class Bottleneck(nn.Module):
    """1 × 1, 3 × 3 and 1 × 1 convolutions, the stride in the middle as torchvision has it, and the way past them."""

    growth = 4

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = width * self.growth
        self.conv1, self.bn1 = _convolution(channels, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _convolution(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = _convolution(width, out, 1), nn.BatchNorm2d(out)
        self.downsample = _shortcut(channels, out, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        past = x if self.downsample is None else self.downsample(x)
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return torch.relu(self.bn3(self.conv3(x)) + past)


class ResNet(nn.Module):
    """Images (n, 3, h, w), normalised, to logits (n, num_classes)."""

    def __init__(
        self, block: type[Basic] | type[Bottleneck], blocks: tuple[int, int, int, int], num_classes: int, stem: str
    ) -> None:
        super().__init__()
        if stem not in STEMS:
            raise DatamodelsError(f"resnet: expected a stem of {', '.join(STEMS)}, got {stem!r}")
        self.conv1 = _convolution(3, 64, 7, 2) if stem == "imagenet" else _convolution(3, 64, 3)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if stem == "imagenet" else nn.Identity()
        channels = 64
        for number, (count, width) in enumerate(zip(blocks, (64, 128, 256, 512), strict=True), 1):
            layer = nn.Sequential()
            for place in range(count):
                stride = 2 if number > 1 and place == 0 else 1
                layer.append(block(channels, width, stride))
                channels = width * block.growth
            self.add_module(f"layer{number}", layer)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        for number in range(1, 5):
            x = self.get_submodule(f"layer{number}")(x)
        return self.fc(x.mean((2, 3)))

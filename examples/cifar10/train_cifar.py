"""A row is one ResNet-9 trained on the CIFAR-10 images of its mask; its outcome is the margin of every test image.

    python -m datamodels.pool --worker.logdir=DIR --worker.main_import=examples.cifar10.train_cifar \\
           --data.dir=FOLDER_OF_THE_BATCHES

Trains on the GPU that CUDA_VISIBLE_DEVICES leaves visible, in bfloat16; without one on the CPU, in float32.
"""

import functools

import numpy as np
import torch
from fastargs import Param, Section, get_current_config
from fastargs.validation import And, InRange, OneOf
from torch import nn

from datamodels.learning import data, loop, outputs
from datamodels.learning.models import Seeded

Section("data", "what is learned").params(
    dir=Param(str, "folder with the python or the binary batches of CIFAR-10", required=True),
)
Section("training", "how one network is trained").params(
    lr=Param(And(float, InRange(min=0)), "highest learning rate", default=0.5),
    epochs=Param(And(int, InRange(min=1)), "passes over the kept images", default=24),
    lr_peak_epoch=Param(And(float, InRange(min=0)), "epoch in which the learning rate is highest", default=5.0),
    batch_size=Param(And(int, InRange(min=1)), "images per update", default=512),
    momentum=Param(And(float, InRange(0, 1)), "momentum of SGD", default=0.9),
    weight_decay=Param(And(float, InRange(min=0)), "weight decay of SGD", default=5e-4),
    label_smoothing=Param(And(float, InRange(0, 1)), "share of the target spread over all classes", default=0.1),
    lr_tta=Param(bool, "test on each image and its mirror image, and average the logits", default=True),
    margin=Param(OneOf(outputs.MARGIN_KINDS), "what the right class's logit is held against", default="logsumexp"),
    width=Param(And(int, InRange(min=1)), "channels of the first layer", default=64),
)

# Of the 50,000 training images, per channel, for pixels in [0, 1].
MEAN = (0.4914, 0.4822, 0.4465)
DEVIATION = (0.2470, 0.2435, 0.2616)
SMOKE_BATCHES = 3
TEST_BATCH = 1_000


def main(*, mask: np.ndarray, seed: int, smoke: bool = False) -> dict[str, np.ndarray]:
    """Train one ResNet-9 on the mask (training images,); margins (test images,), float32."""
    config = get_current_config()
    epochs = config["training.epochs"]
    recipe = loop.Recipe(
        epochs=epochs,
        batch_size=config["training.batch_size"],
        lr=config["training.lr"],
        momentum=config["training.momentum"],
        weight_decay=config["training.weight_decay"],
        label_smoothing=config["training.label_smoothing"],
        warmup=min(1.0, config["training.lr_peak_epoch"] / epochs),
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train, test, num_classes = _tensors(config["data.dir"], device)
    architecture = Seeded(functools.partial(ResNet9, num_classes, config["training.width"]))
    model = architecture(seed).to(device, memory_format=torch.channels_last)
    limit = SMOKE_BATCHES if smoke else None
    with torch.backends.cudnn.flags(benchmark=True):  # one batch size, so its search pays
        loop.train(model, *train, mask, recipe, seed=seed, augment=data.Augment(), max_batches=limit)
        logits = predict(model, test[0], mirror=config["training.lr_tta"])
    return {"margins": outputs.margins(logits, test[1], config["training.margin"]).cpu().numpy()}


class ResNet9(nn.Module):
    """Eight convolutions and a linear layer, two residual blocks; images (n, 3, 32, 32) to logits (n, classes).

    The convolutions run in bfloat16 on a GPU, the logits come out in float32: margins are differences of them.
    """

    def __init__(self, num_classes: int, width: int = 64) -> None:
        super().__init__()
        self.features = nn.Sequential(
            convolution(3, width),
            convolution(width, 2 * width, size=5, stride=2, padding=2),
            Residual(convolution(2 * width, 2 * width), convolution(2 * width, 2 * width)),
            convolution(2 * width, 4 * width),
            nn.MaxPool2d(2),
            Residual(convolution(4 * width, 4 * width), convolution(4 * width, 4 * width)),
            convolution(4 * width, 2 * width, padding=0),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(2 * width, num_classes, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            features = self.features(images)
        return self.head(features.float()) / 5  # logits this small let the learning rate be this large


class Residual(nn.Sequential):
    """x + the modules, one after the other, of x."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


def convolution(channels: int, out: int, *, size: int = 3, stride: int = 1, padding: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    weights = nn.Conv2d(channels, out, size, stride=stride, padding=padding, bias=False)
    return nn.Sequential(weights, nn.BatchNorm2d(out), nn.ReLU(inplace=True))


@torch.no_grad()
def predict(model: nn.Module, images: torch.Tensor, *, mirror: bool) -> torch.Tensor:
    """Logits (n, classes) of a model in eval mode; with `mirror` the mean of those of the image and of its mirror."""
    logits = []
    for batch in images.split(TEST_BATCH):
        batch = batch.contiguous(memory_format=torch.channels_last)
        out = model(batch)
        logits.append((out + model(batch.flip(3))) / 2 if mirror else out)  # axis 3 is left to right
    return torch.cat(logits)


@functools.cache
def _tensors(folder: str, device: str) -> tuple[tuple, tuple, int]:
    """Training and test (inputs, labels) on the device; each channel of CIFAR-10 has mean 0 and deviation 1."""
    dataset = data.load("cifar10", folder)
    mean, deviation = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, DEVIATION))
    train, test = (
        ((torch.from_numpy(split.inputs).to(device) - mean) / deviation, torch.from_numpy(split.labels).to(device))
        for split in (dataset.train, dataset.test)
    )
    return train, test, dataset.num_classes

"""The networks of the examples: float, with batch normalization, for square images of any size from 8 x 8.

Nothing in them knows of quantization: torchqat.prepare and the optimizer see to that.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def lenet5(channels: int, size: int, classes: int) -> nn.Sequential:
    """LeNet-5 as it is used for MNIST today: two convolutions, 32 and 64 wide, and two linear layers.

    Images narrower than 16 pixels are pooled once only, after the second convolution.
    """
    pools = [nn.MaxPool2d(2)] if size >= 16 else []
    width = 64 * (size // (4 if pools else 2)) ** 2
    return nn.Sequential(
        *_conv(channels, 32, 5),
        *pools,
        *_conv(32, 64, 5),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(width, 512, bias=False),
        nn.BatchNorm1d(512),
        nn.ReLU(),
        nn.Linear(512, classes),
    )


def vgg11(channels: int, size: int, classes: int) -> nn.Sequential:
    """VGG-11 with one linear layer, as it is used for CIFAR-10; pools while there is something to pool."""
    layers: list[nn.Module] = []
    for widths in ([64], [128], [256, 256], [512, 512], [512, 512]):
        for width in widths:
            layers += _conv(channels, width, 3)
            channels = width
        if size > 1:
            layers.append(nn.MaxPool2d(2))
            size //= 2
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def resnet20(channels: int, size: int, classes: int) -> nn.Sequential:
    """ResNet-20 for small images (He et al. 2016, section 4.2), with shortcuts that have no weights."""
    layers, width = [*_conv(channels, 16, 3)], 16
    for out in (16, 32, 64):
        for _ in range(3):
            layers.append(_Residual(width, out))
            width = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


MODELS = {"lenet5": lenet5, "vgg11": vgg11, "resnet20": resnet20}


def _conv(channels: int, width: int, kernel: int) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(width), nn.ReLU()]


class _Residual(nn.Module):
    """Two convolutions and a shortcut. `relu` is called twice; torchqat.prepare makes two modules of it."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.stride, self.grow = (1 if width == channels else 2), width - channels
        self.conv1 = nn.Conv2d(channels, width, 3, self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.grow))
        return self.relu(y + shortcut)


def class_scores(model: nn.Module, images: Tensor, batch_size: int = 1000) -> Tensor:
    """The outputs of a model in eval mode for any number of images."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(batch) for batch in images.split(batch_size)])

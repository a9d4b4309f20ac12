"""The networks of the examples: float, with batch normalization, for square images of any size from 8 x 8.

Nothing in them knows of quantization: torchqat.prepare and the optimizer see to that. `width` multiplies the
number of channels.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def lenet5(channels: int, size: int, classes: int, width: float = 1) -> nn.Sequential:
    """LeNet-5 as it is used for MNIST today: two convolutions, 32 and 64 wide, and two linear layers.

    Images narrower than 16 pixels are pooled once only, after the second convolution.
    """
    pools = [nn.MaxPool2d(2)] if size >= 16 else []
    first, second, third = (round(width * n) for n in (32, 64, 512))
    return nn.Sequential(
        *_conv(channels, first, 5),
        *pools,
        *_conv(first, second, 5),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(second * (size // (4 if pools else 2)) ** 2, third, bias=False),
        nn.BatchNorm1d(third),
        nn.ReLU(),
        nn.Linear(third, classes),
    )


def vgg11(channels: int, size: int, classes: int, width: float = 1) -> nn.Sequential:
    """VGG-11 with one linear layer, as it is used for CIFAR-10; pools while there is something to pool."""
    layers: list[nn.Module] = []
    for widths in ([64], [128], [256, 256], [512, 512], [512, 512]):
        for out in (round(width * n) for n in widths):
            layers += _conv(channels, out, 3)
            channels = out
        if size > 1:
            layers.append(nn.MaxPool2d(2))
            size //= 2
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def resnet20(channels: int, size: int, classes: int, width: float = 1) -> nn.Sequential:
    """ResNet-20 for small images (He et al. 2016, section 4.2), with shortcuts that have no weights."""
    widths = [round(width * n) for n in (16, 32, 64)]
    layers, before = [*_conv(channels, widths[0], 3)], widths[0]
    for out in widths:
        for _ in range(3):
            layers.append(_Residual(before, out))
            before = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


def resnet18(channels: int, size: int, classes: int, width: float = 1) -> nn.Sequential:
    """ResNet-18 (He et al. 2016), whose shortcuts are convolutions where the width grows. Images narrower
    than 64 pixels begin with a 3 x 3 convolution and are not pooled, as is usual for CIFAR-10."""
    widths = [round(width * n) for n in (64, 128, 256, 512)]
    layers, before = _conv(channels, widths[0], 3), widths[0]
    if size >= 64:
        layers = [*_conv(channels, widths[0], 7, stride=2), nn.MaxPool2d(3, stride=2, padding=1)]
    for out in widths:
        for _ in range(2):
            layers.append(_Residual(before, out, projection=True))
            before = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


def mobilenet(channels: int, size: int, classes: int, width: float = 1) -> nn.Sequential:
    """Small: depthwise convolutions, each followed by one across channels (Howard et al. 2017)."""
    first, second, third, fourth = (round(width * n) for n in (32, 64, 128, 256))
    layers, before = _conv(channels, first, 3, stride=2 if size >= 64 else 1), first
    for out, stride in ((second, 1), (third, 2), (third, 1), (fourth, 2), (fourth, 1)):
        layers += [*_conv(before, before, 3, stride, groups=before), *_conv(before, out, 1)]
        before = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


def cnn4(channels: int, size: int, classes: int, width: float = 1) -> nn.Sequential:
    """Four convolutions, 16 to 64 wide; the first has 5 x 5 weights and takes every second pixel."""
    return _cnn4(_conv(channels, round(width * 16), 5, stride=2), classes, width)


def cnn4_fine(channels: int, size: int, classes: int, width: float = 1) -> nn.Sequential:
    """The same, whose first convolution has 3 x 3 weights and sees every pixel: four times the work."""
    return _cnn4([*_conv(channels, round(width * 16), 3), nn.MaxPool2d(2)], classes, width)


def cnn4_strided(channels: int, size: int, classes: int, width: float = 1) -> nn.Sequential:
    """Four convolutions, 32 to 128 wide, of which three take every second pixel; no pooling between them."""
    first, second, third, fourth = (round(width * n) for n in (32, 64, 64, 128))
    return nn.Sequential(
        *_conv(channels, first, 5, stride=2),
        *_conv(first, second, 3, stride=2),
        *_conv(second, third, 3),
        *_conv(third, fourth, 3, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(fourth, classes),
    )


def _cnn4(stem: list[nn.Module], classes: int, width: float) -> nn.Sequential:
    first, second, third, fourth = (round(width * n) for n in (16, 32, 32, 64))
    return nn.Sequential(
        *stem,
        *_conv(first, second, 3),
        nn.MaxPool2d(2),
        *_conv(second, third, 3),
        *_conv(third, fourth, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(fourth, classes),
    )


MODELS = {
    "lenet5": lenet5,
    "vgg11": vgg11,
    "resnet20": resnet20,
    "resnet18": resnet18,
    "mobilenet": mobilenet,
    "cnn4": cnn4,
    "cnn4-fine": cnn4_fine,
    "cnn4-strided": cnn4_strided,
}


def maps(model: nn.Sequential) -> Iterator[str]:
    """The names of what puts out feature maps that a ReLU has passed, first to last."""
    for name, module in model.named_children():
        if isinstance(module, nn.Flatten):
            return
        if isinstance(module, (nn.ReLU, _Residual)):
            yield name


def _conv(channels: int, width: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    padding = kernel // 2
    convolution = nn.Conv2d(channels, width, kernel, stride, padding, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(width), nn.ReLU()]


class _Residual(nn.Module):
    """Two convolutions and a shortcut, which is a convolution or has no weights. `relu` is called twice;
    torchqat.prepare makes two modules of it."""

    def __init__(self, channels: int, width: int, projection: bool = False):
        super().__init__()
        self.stride, self.grow = (1 if width == channels else 2), width - channels
        self.conv1 = nn.Conv2d(channels, width, 3, self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.shortcut = None
        if projection and self.grow:
            convolution = nn.Conv2d(channels, width, 1, self.stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.shortcut is not None:
            return self.relu(y + self.shortcut(x))
        return self.relu(y + F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.grow)))


def class_scores(model: nn.Module, images: Tensor, batch_size: int = 1000) -> Tensor:
    """The outputs of a model in eval mode for any number of images."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(batch) for batch in images.split(batch_size)])

"""Modules."""

from torchqat.nn.feature_affinity import FastFeatureAffinityLoss, FeatureAffinityLoss
from torchqat.nn.quant_layers import (
    QuantBatchNorm1d,
    QuantBatchNorm2d,
    QuantConv1d,
    QuantConv2d,
    QuantLinear,
    QuantMaxPool2d,
)
from torchqat.nn.staircase_relu import OPTIMAL_ALPHA as OPTIMAL_ALPHA
from torchqat.nn.staircase_relu import StaircaseReLU

__all__ = [
    "FastFeatureAffinityLoss",
    "FeatureAffinityLoss",
    "QuantBatchNorm1d",
    "QuantBatchNorm2d",
    "QuantConv1d",
    "QuantConv2d",
    "QuantLinear",
    "QuantMaxPool2d",
    "StaircaseReLU",
]

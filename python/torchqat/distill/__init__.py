"""Distillation of a float teacher into a quantized student, with labels or without."""

from torchqat.distill.connector import Connector, LazyConnector, resize_like
from torchqat.distill.distiller import Distilled, Distiller
from torchqat.distill.loss import FAQDLoss, FAQDTerms
from torchqat.distill.taps import FeatureTaps

__all__ = [
    "Connector",
    "Distilled",
    "Distiller",
    "FAQDLoss",
    "FAQDTerms",
    "FeatureTaps",
    "LazyConnector",
    "resize_like",
]

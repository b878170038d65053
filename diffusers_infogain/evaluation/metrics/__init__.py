"""Metrics of sets of images as torchmetrics: they accumulate over batches and over ranks, also with unequal numbers of batches.

Images are uint8 (B, 3, H, W) throughout; features come from the modules of `features`. Besides torchmetrics' interface every
metric has `figures()`, its values by the names that reports print.
"""

from .distances import Cmmd, FrechetDistance, FrechetDistanceAtInfinity, frechet_distance, kid, squared_mmd
from .scores import ClipScore, PreferenceScore, inception_score
from .spread import CaptionVariety, Diversity, PrecisionRecall

__all__ = [
    "CaptionVariety",
    "ClipScore",
    "Cmmd",
    "Diversity",
    "FrechetDistance",
    "FrechetDistanceAtInfinity",
    "PrecisionRecall",
    "PreferenceScore",
    "frechet_distance",
    "inception_score",
    "kid",
    "squared_mmd",
]

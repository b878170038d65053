"""Compositional accuracy on the demo world, in GenEval's categories: whether an image shows what its prompt says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..demo.checker import check_image
from ..demo.shapes import CATEGORIES, parse_caption
from .photographs import decode
from .runs import FinishedImage
from .statistics import Figure, clustered_mean


def check_composition(images: Sequence[FinishedImage]) -> list[bool]:
    """For each image, whether the checker finds what its prompt says.

    Raises:
        ValueError: For a prompt that is no caption of the demo world, or images that cannot be read.
    """
    captions = [parse_caption(image.request.prompt.text) for image in images]
    return [check_image(_pixels(image.path), caption).holds for image, caption in zip(images, captions, strict=True)]


def _pixels(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(decode(path))).permute(2, 0, 1) / 255


def composition_report(images: Sequence[FinishedImage], right: Sequence[bool]) -> dict[str, Figure]:
    """Shares of right images: per category, the mean of the categories as "overall" (as GenEval does), over all images as
    "images", and, where both kinds occur, "trained" and "held-out" combinations apart.
    """
    captions = [parse_caption(image.request.prompt.text) for image in images]
    clusters = [image.request.prompt_index for image in images]
    values = [float(holds) for holds in right]

    def share(wanted: Sequence[bool]) -> Figure:
        chosen = [i for i, yes in enumerate(wanted) if yes]
        return clustered_mean([values[i] for i in chosen], [clusters[i] for i in chosen])

    present = [name for name in CATEGORIES if any(caption.category == name for caption in captions)]
    report = {name: share([caption.category == name for caption in captions]) for name in present}
    error = sum(report[name].standard_error ** 2 for name in present) ** 0.5 / len(present)
    report["overall"] = Figure(sum(report[name].value for name in present) / len(present), error, len(values))
    report["images"] = clustered_mean(values, clusters)
    held_out = [caption.held_out for caption in captions]
    if any(held_out) and not all(held_out):
        report["trained"] = share([not yes for yes in held_out])
        report["held-out"] = share(held_out)
    return report

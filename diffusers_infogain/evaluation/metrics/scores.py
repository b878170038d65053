"""Scores of generated images without real ones: the Inception score, and how well images fit their prompts."""

from __future__ import annotations

import os
from typing import Any

import torch

from ..features import ClipFeatures, FeatureExtractor, torchvision_explained
from .accumulation import FeatureLists, one_each, require, seeded, without_warning_of_memory

with torchvision_explained():
    from torchmetrics import Metric
    from torchmetrics.image.inception import InceptionScore


class _SeededInceptionScore(FeatureLists, InceptionScore):
    title = "Inception score"

    def __init__(self, extractor: FeatureExtractor, splits: int, seed: int, **kwargs: Any):
        super().__init__(feature=extractor, splits=splits, normalize=False, **kwargs)
        self.seed = seed
        self._empty = {"features": torch.empty(0, extractor.num_features)}

    def compute(self) -> tuple[torch.Tensor, torch.Tensor]:
        count = len(self._stored("features"))
        # `chunk` makes fewer parts without a warning where the images do not fill them
        if count == 0 or len(torch.empty(count).chunk(self.splits)) != self.splits:
            raise ValueError(f"`splits` must be a number of parts that {count} images fill, got {self.splits}.")
        with seeded(self.seed):
            return super().compute()

    def figures(self) -> dict[str, torch.Tensor]:
        return {self.title: self.compute()[0]}


def inception_score(extractor: FeatureExtractor, *, splits: int = 10, seed: int = 0, **kwargs: Any) -> _SeededInceptionScore:
    """torchmetrics' Inception score (Salimans et al. 2016): mean and standard deviation over the splits of the images.

    The splits depend only on `seed`, and the global generators are left as they are. `compute` raises a ValueError if there are
    too few images to fill the splits.

    Args:
        extractor: Its features are taken as logits: `InceptionFeatures("logits")` for the score as published.

    Raises:
        ValueError: If `splits` is below 2, where there is no standard deviation.
    """
    if splits < 2:
        raise ValueError(f"`splits` must be at least 2, got {splits}.")
    with without_warning_of_memory():
        return _SeededInceptionScore(extractor, splits, seed, **kwargs)


class ClipScore(Metric):
    """Mean of 100 · max(cos(image, text), 0) over images and their prompts (Hessel et al. 2021), with any CLIP on disk.

    torchmetrics' `CLIPScore` sets only a negative mean to 0, not the negative terms, and agrees where there are none.

    Args:
        model: Folder or Hub id, or the `ClipFeatures` of one.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    score: torch.Tensor
    num_images: torch.Tensor

    def __init__(self, model: str | os.PathLike | ClipFeatures, **kwargs: Any):
        super().__init__(**kwargs)
        self.extractor = model if isinstance(model, ClipFeatures) else ClipFeatures(model)
        self.add_state("score", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_images", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, images: torch.Tensor, texts: list[str]) -> None:
        """Adds images and the text that belongs to each.

        Raises:
            ValueError: If the images are not uint8, or not as many as the texts.
        """
        embedded = self.extractor.text_features(one_each(texts, images))
        cosine = torch.nn.functional.cosine_similarity(self.extractor(images), embedded)
        self.score += 100 * cosine.clamp(min=0).double().sum()
        self.num_images += len(images)

    def compute(self) -> torch.Tensor:
        """The mean over all images, a float64 scalar."""
        require("CLIP score", 1, captioned=self.num_images)
        return self.score / self.num_images

    def figures(self) -> dict[str, torch.Tensor]:
        """The mean as "CLIP score"."""
        return {"CLIP score": self.compute()}

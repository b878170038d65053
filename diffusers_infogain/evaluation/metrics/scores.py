"""Scores of generated images without real ones: the Inception score, and how well images fit their prompts."""

from __future__ import annotations

import os
from typing import Any

import torch

from ..features import ClipFeatures, FeatureExtractor, torchvision_explained
from ..preference import PreferenceModel
from .accumulation import FeatureLists, one_each, require, seeded, without_warning_of_memory

with torchvision_explained():
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


class TextImageScore(FeatureLists):
    """The mean of scores, one for every image and its text, which are kept for a standard error. Subclasses define `score`."""

    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    title: str
    scores: list[torch.Tensor]

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self._empty = {"scores": torch.empty(0, dtype=torch.float64)}
        self.add_state("scores", [], dist_reduce_fx="cat")

    def score(self, images: torch.Tensor, texts: list[str]) -> torch.Tensor:
        """The scores (B,) of images by the text that belongs to each."""
        raise NotImplementedError

    def update(self, images: torch.Tensor, texts: list[str]) -> None:
        """Adds images and the text that belongs to each.

        Raises:
            ValueError: If the images are not uint8, or not as many as the texts.
        """
        self.scores.append(self.score(images, one_each(texts, images)).double())

    def compute(self) -> torch.Tensor:
        """The mean over all images, a float64 scalar."""
        scores = self._stored("scores")
        require(self.title, 1, captioned=len(scores))
        return scores.mean()

    def figures(self) -> dict[str, torch.Tensor]:
        """The mean by the score's title."""
        return {self.title: self.compute()}

    def values(self) -> dict[str, torch.Tensor]:
        """The scores of all images (N,), float64, in the order in which they were added, by the title of their mean."""
        return {self.title: self._stored("scores")}


class PreferenceScore(TextImageScore):
    """Mean score of images and their prompts by a network that judges as people do.

    Args:
        model: The network, such as from `preference.load_preference`.
    """

    def __init__(self, model: PreferenceModel, **kwargs: Any):
        super().__init__(**kwargs)
        self.model = model
        self.title = model.title

    def score(self, images: torch.Tensor, texts: list[str]) -> torch.Tensor:
        """The network's scores, (B,)."""
        return self.model(images, texts)


class ClipScore(TextImageScore):
    """Mean of 100 · max(cos(image, text), 0) over images and their prompts (Hessel et al. 2021), with any CLIP on disk.

    torchmetrics' `CLIPScore` sets only a negative mean to 0, not the negative terms, and agrees where there are none.

    Args:
        model: Folder or Hub id, or the `ClipFeatures` of one.
    """

    title = "CLIP score"

    def __init__(self, model: str | os.PathLike | ClipFeatures, **kwargs: Any):
        super().__init__(**kwargs)
        self.extractor = model if isinstance(model, ClipFeatures) else ClipFeatures(model)

    def score(self, images: torch.Tensor, texts: list[str]) -> torch.Tensor:
        """100 · max(cos, 0) for every image, (B,)."""
        cosine = torch.nn.functional.cosine_similarity(self.extractor(images), self.extractor.text_features(texts))
        return 100 * cosine.clamp(min=0)

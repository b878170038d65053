"""How images are spread: precision and recall, diversity, and variety within a caption."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch

from ..features import FeatureExtractor
from .accumulation import FeatureLists, mean_distance, one_each, pairwise_distances, require


def _share_inside(points: torch.Tensor, centres: torch.Tensor, k: int) -> torch.Tensor:
    """Share of the points that lie in some centre's ball, which reaches to the centre's k-th nearest other centre."""
    # k + 1, since the nearest centre of all is the centre itself
    radii = torch.cat([block.kthvalue(k + 1, dim=1).values for block in pairwise_distances(centres, centres)])
    return torch.cat([(block <= radii).any(1) for block in pairwise_distances(points, centres)]).double().mean()


class PrecisionRecall(FeatureLists):
    """Improved precision and recall (Kynkäänniemi et al. 2019).

    Precision is the share of generated images that lie in the real ones' manifold, the union of balls around their features that
    reach to the k-th nearest neighbor; recall is the share of real images in the manifold of the generated ones.

    Args:
        reset_real_features: Whether `reset` forgets the real images too; as in torchmetrics' own metrics.
    """

    is_differentiable = False
    full_state_update = False

    extractor: FeatureExtractor
    real_features: list[torch.Tensor]
    fake_features: list[torch.Tensor]

    def __init__(self, extractor: FeatureExtractor, k: int = 3, reset_real_features: bool = True, **kwargs: Any):
        super().__init__(**kwargs)
        if k < 1:
            raise ValueError(f"`k` must be at least 1, got {k}.")
        self.extractor = extractor
        self.k = k
        self.reset_real_features = reset_real_features
        self._empty = dict.fromkeys(("real_features", "fake_features"), torch.empty(0, extractor.num_features))
        for name in self._empty:
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, images: torch.Tensor, real: bool) -> None:
        """Adds real or generated images."""
        (self.real_features if real else self.fake_features).append(self.extractor(images))

    def reset(self) -> None:
        """Forgets the generated images, and the real ones if `reset_real_features` is True."""
        if self.reset_real_features:
            super().reset()
            return
        default = self._defaults.pop("real_features")
        super().reset()
        self._defaults["real_features"] = default

    def compute(self) -> dict[str, torch.Tensor]:
        """`precision` and `recall`.

        Raises:
            ValueError: For fewer than k + 1 real or generated images.
        """
        real, fake = self._stored("real_features"), self._stored("fake_features")
        require("Precision and recall", self.k + 1, real=len(real), generated=len(fake))
        return {"precision": _share_inside(fake, real, self.k), "recall": _share_inside(real, fake, self.k)}

    def figures(self) -> dict[str, torch.Tensor]:
        """`precision` and `recall`."""
        return self.compute()


class Diversity(FeatureLists):
    """How much images differ: the mean distance of their features, and the share of distinct images.

    With groups, such as the images of one prompt each, only images of the same group are compared.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    extractor: FeatureExtractor
    features: list[torch.Tensor]
    keys: list[torch.Tensor]

    def __init__(self, extractor: FeatureExtractor, **kwargs: Any):
        super().__init__(**kwargs)
        self.extractor = extractor
        self._empty = {
            "features": torch.empty(0, extractor.num_features),
            "keys": torch.empty(0, 3, dtype=torch.long),  # the group and 128 bits that stand for the pixels
        }
        for name in self._empty:
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, images: torch.Tensor, groups: torch.Tensor | list[int] | None = None) -> None:
        """Adds images, and for each the number of its group (None: all are of group 0).

        Raises:
            ValueError: If the images are not uint8, or `groups` is not one number for each.
        """
        numbers = torch.zeros(len(images), dtype=torch.long) if groups is None else torch.as_tensor(groups).cpu().long()
        if numbers.shape != (len(images),):
            raise ValueError(f"`groups` must be of shape ({len(images)},), got {tuple(numbers.shape)}.")
        self.features.append(self.extractor(images))
        digests = [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images.cpu().numpy()]
        pixels = torch.tensor([np.frombuffer(digest, dtype=np.int64).tolist() for digest in digests], dtype=torch.long)
        self.keys.append(torch.cat([numbers[:, None], pixels.view(-1, 2)], 1).to(images.device))

    def compute(self) -> dict[str, torch.Tensor]:
        """`distance`, the mean over all pairs of images of one group, and `distinct`, the share of images left without repeats.

        Raises:
            ValueError: If no two images are of one group.
        """
        features, keys = self._stored("features"), self._stored("keys")
        total, pairs = torch.zeros((), dtype=torch.float64, device=features.device), 0
        for group in keys[:, 0].unique():
            members = features[keys[:, 0] == group]
            total += sum(block.double().sum() for block in pairwise_distances(members, members)) / 2
            pairs += len(members) * (len(members) - 1) // 2
        if pairs == 0:
            raise ValueError(f"Diversity needs at least 2 images of one group, got {len(keys)} images without a pair.")
        distinct = torch.tensor(len(keys.unique(dim=0)) / len(keys), dtype=torch.float64, device=keys.device)
        return {"distance": total / pairs, "distinct": distinct}

    def figures(self) -> dict[str, torch.Tensor]:
        """The mean distance with the extractor's name, and the share as "distinct images"."""
        values = self.compute()
        return {f"pairwise distance ({self.extractor.name})": values["distance"], "distinct images": values["distinct"]}


class CaptionVariety(FeatureLists):
    """How the generated images of a caption are spread, compared with real images of the same caption.

    With X, X' two generated and Y, Y' two real images of a caption, distances of features, and means over all images:

    - `variety` is E|X - X'| / E|Y - Y'|: 1 if generated images differ as much as real ones do, less if they are all alike.
    - `energy` is the energy distance (Székely and Rizzo 2013), (2 E|X - Y| - E|X - X'| - E|Y - Y'|) / E|Y - Y'|: 0 if both are
      distributed alike, and about 0 or slightly below for samples of the same distribution, since X and X' are different samples.

    Captions with fewer than two generated or two real images do not count.
    """

    is_differentiable = False
    full_state_update = False

    extractor: FeatureExtractor
    real_features: list[torch.Tensor]
    fake_features: list[torch.Tensor]
    real_captions: list[torch.Tensor]
    fake_captions: list[torch.Tensor]

    def __init__(self, extractor: FeatureExtractor, reset_real_features: bool = True, **kwargs: Any):
        super().__init__(**kwargs)
        self.extractor = extractor
        self.reset_real_features = reset_real_features
        self._empty = {}
        for kind in ("real", "fake"):
            self._empty[f"{kind}_features"] = torch.empty(0, extractor.num_features)
            self._empty[f"{kind}_captions"] = torch.empty(0, dtype=torch.long)  # 64 bits that stand for each text
        for name in self._empty:
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, images: torch.Tensor, texts: list[str], real: bool) -> None:
        """Adds real or generated images, and the caption of each.

        Raises:
            ValueError: If the images are not uint8, or not as many as the texts.
        """
        digests = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in one_each(texts, images)]
        captions = torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in digests], dtype=torch.long)
        (self.real_features if real else self.fake_features).append(self.extractor(images))
        (self.real_captions if real else self.fake_captions).append(captions.to(images.device))

    def reset(self) -> None:
        """Forgets the generated images, and the real ones if `reset_real_features` is True."""
        kept = [list(self.real_features), list(self.real_captions)]  # `Metric.reset` empties the lists themselves
        super().reset()
        if not self.reset_real_features:
            self.real_features, self.real_captions = kept

    def compute(self) -> dict[str, torch.Tensor]:
        """`variety` and `energy`.

        Raises:
            ValueError: If no caption has two generated and two real images.
        """
        real, fake = self._stored("real_features"), self._stored("fake_features")
        sums, count = torch.zeros(3, dtype=torch.float64, device=fake.device), 0
        for caption in self._stored("fake_captions").unique():
            x, y = fake[self._stored("fake_captions") == caption], real[self._stored("real_captions") == caption]
            if len(x) > 1 and len(y) > 1:
                sums += len(x) * torch.stack([mean_distance(x), mean_distance(y), mean_distance(x, y)])
                count += len(x)
        if count == 0:
            raise ValueError(
                f"Variety within a caption needs at least 2 generated and 2 real images of one, got {len(fake)} generated and "
                f"{len(real)} real images without such a caption."
            )
        within, within_real, between = sums
        return {"variety": within / within_real, "energy": (2 * between - within - within_real) / within_real}

    def figures(self) -> dict[str, torch.Tensor]:
        """The two as "variety within a caption" and "energy distance within a caption"."""
        values = self.compute()
        return {"variety within a caption": values["variety"], "energy distance within a caption": values["energy"]}

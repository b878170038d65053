"""What can be measured of a set of images, and how: the table of metrics, and the settings of a measurement."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from ..checks import check_choice, check_integer
from ..choices import FEATURES, METRICS, RESIZES
from ..extras import missing
from ..files import digest, regular_file
from .photographs import image_files
from .reference import ReferenceStatistics, read_reference


@dataclass(frozen=True)
class ImageMetric:
    """What a metric needs.

    Attributes:
        builder: The name in `metrics` of what builds it from an extractor.
        reference: Real images that it compares with: None, "images", "statistics" where their mean and covariance do as well, or
            "captioned" where every real image has to be of a prompt, as only renderings are.
        network: The network of its features, if that is part of its definition; None: `MeasureSettings.features`.
        output: Which of that network's outputs it takes, for Inception and the demo model's encoder.
        settings: `MeasureSettings` that it is built with, and that its figures depend on.
        captions: Whether it takes the prompts too.
        biased: Whether its figures depend strongly on the number of images where there are few.
    """

    builder: str
    reference: Literal["images", "statistics", "captioned"] | None = None
    network: str | None = None
    output: Literal["pool", "spatial", "logits"] = "pool"
    settings: tuple[str, ...] = ()
    captions: bool = False
    biased: bool = False


IMAGE_METRICS = {
    "frechet": ImageMetric("FrechetDistance", reference="statistics", biased=True),
    "spatial": ImageMetric("FrechetDistance", reference="statistics", network="inception", output="spatial", biased=True),
    "kid": ImageMetric("kid", reference="images", settings=("subset_size", "seed")),
    "inception_score": ImageMetric("inception_score", network="inception", output="logits", settings=("seed",), biased=True),
    "precision_recall": ImageMetric("PrecisionRecall", reference="images"),
    "clip_score": ImageMetric("ClipScore", network="clip", captions=True),
    "diversity": ImageMetric("Diversity"),
    "caption_variety": ImageMetric("CaptionVariety", reference="captioned", network="demo", output="spatial", captions=True),
}
"""All of `choices.METRICS` but "composition", which the checker of the demo world decides image by image (see `composition`)."""

_DEFAULT_RESIZE = "bicubic"
_DEMO_VQ = Path(__file__).parents[1] / "demo" / "model" / "vqvae"
# torch-fidelity's file of FID's weights; the name that it is published under ends with these first digits of its SHA-256.
_PUBLISHED_INCEPTION = "6726825d"


@dataclass(frozen=True)
class MeasureSettings:
    """How images are measured.

    Attributes:
        features: "inception", "clip" or "demo", for "frechet", "kid", "precision_recall" and "diversity"; "spatial" and
            "inception_score" take Inception's by definition.
        reference: Real images: a folder, statistics in ADM's .npz format (for "frechet" and "spatial" only), or "demo" for one
            rendering of every prompt of the demo world.
        inception_weights: File of FID's weights; None: torch-fidelity's, which are downloaded once.
        clip_model: Folder or Hub id, for the features "clip" and for "clip_score".
        resize: How images are resized to the network's size, one of `choices.RESIZES`. None: as the images behind the
            reference's statistics were, which is "network" for a file from elsewhere; without statistics "bicubic".
        save_statistics: .npz file for the statistics of the reference, or of the images if there is no reference.
        subset_size: Images in each of the 100 subsets of the kernel distance; None: 1000, or all if there are fewer.
    """

    features: str = "inception"
    reference: str | None = None
    inception_weights: Path | None = None
    clip_model: str | None = None
    resize: str | None = None
    save_statistics: Path | None = None
    subset_size: int | None = None
    batch_size: int = 64
    device: str = "cpu"
    seed: int = 0

    def check(self, metrics: Sequence[str]) -> None:
        """Checks the settings and that all files and packages are there, without loading a network.

        Raises:
            ValueError: For an unknown metric, or one that these settings do not allow.
            ModuleNotFoundError: If a metric needs a package that is not installed.
            OSError: If a file is missing or cannot be read.
        """
        for name in metrics:
            if name not in METRICS:
                raise ValueError(f"A metric must be one of {', '.join(METRICS)}, got {name!r}.")
        check_choice("features", self.features, FEATURES)
        if self.resize is not None:
            check_choice("resize", self.resize, RESIZES)
        check_integer("batch_size", self.batch_size, 1)
        check_integer("seed", self.seed, 0)
        if self.subset_size is not None:
            check_integer("subset_size", self.subset_size, 2)
        of_captions = with_reference(metrics, "captioned")
        if of_captions and self.reference != "demo":
            names = ", ".join(of_captions)
            raise ValueError(f"`reference` must be 'demo', renderings of the prompts, for {names}, got {self.reference}.")
        compared = with_reference(metrics)
        if compared and self.reference is None:
            names = ", ".join(compared)
            raise ValueError(f"`reference` must be given for {names}: a folder of real images or an .npz file.")
        of_images = with_reference(metrics, "images")
        if of_images and self._of_statistics:
            raise ValueError(f"`reference` must be a folder of images for {', '.join(of_images)}, got {self.reference}.")
        networks = self._networks(metrics) | ({self.features} if self.save_statistics is not None else set())
        if self.clip_model is None and "clip" in networks:
            raise ValueError("`clip_model` must be given for CLIP's score or features: a folder or a Hub id.")
        if self.save_statistics is not None:
            self._check_target(self.save_statistics)
        if "inception" in networks:
            if not importlib.util.find_spec("torch_fidelity"):
                raise missing("FID's network needs", "torch-fidelity", "inception", "torch_fidelity")
            if self.inception_weights is not None and not self.inception_weights.is_file():
                raise ValueError(f"`inception_weights` must be a file, got {self.inception_weights}.")
        if compared or (self.save_statistics is not None and self.reference is not None):
            self._check_reference(metrics)

    def _check_target(self, path: Path) -> None:
        if path.suffix != ".npz":
            raise ValueError(f"`save_statistics` must be a file whose name ends with .npz, got {path}.")
        if not path.parent.is_dir():
            raise ValueError(f"`save_statistics` must be a file in a folder that exists, got {path}.")
        if self._of_statistics:
            raise ValueError(f"`save_statistics` must be left out where the reference is statistics already ({self.reference}).")

    def _check_reference(self, metrics: Sequence[str]) -> None:
        if self.reference == "demo":
            return
        if self.statistics is None:
            image_files(Path(str(self.reference)))
            return
        if "spatial" in metrics and self.statistics.mu_s is None:
            raise ValueError(f"`reference` must hold `mu_s` and `sigma_s` for spatial, got {self.reference} without them.")
        origin = self.statistics.origin
        if origin is None:
            return
        # Spatial features are Inception's too, so a file of Inception's holds both.
        for name in with_reference(metrics, "statistics"):
            network = self.network_of(name)
            if origin.network != network:
                raise ValueError(
                    f"`reference` must be statistics of {network} for {name}, got {self.reference} of {origin.network}."
                )
            if origin.weights != self.weights_of(network):
                raise ValueError(f"`reference` must be made with the same weights of {network}, got {self.reference} of others.")
        if origin.resize != self.resize_used:
            raise ValueError(
                f"`reference` must be statistics of images resized by {self.resize_used!r}, "
                f"got {self.reference} of images resized by {origin.resize!r}."
            )

    @property
    def _of_statistics(self) -> bool:
        return str(self.reference).endswith(".npz")

    @property
    def statistics(self) -> ReferenceStatistics | None:
        """The statistics that `reference` names; None if it names images."""
        if not self._of_statistics:
            return None
        state = regular_file(str(self.reference)).stat()
        return _read_once(str(self.reference), state.st_mtime_ns, state.st_size)

    @property
    def resize_used(self) -> str:
        """`resize`, with the meaning of None filled in."""
        if self.resize is not None:
            return self.resize
        if self.statistics is None:
            return _DEFAULT_RESIZE
        return "network" if self.statistics.origin is None else self.statistics.origin.resize

    def identity(self, metrics: Sequence[str]) -> dict[str, dict[str, Any]]:
        """For records: per metric everything besides the images that its figures depend on, as JSON takes it.

        Figures with the same identity can be compared; a figure with another one must not stand in for it. Files count by their
        content, wherever they are; a model of the Hub by its name.
        """
        weights = {network: self.weights_of(network) for network in self._networks(metrics)}
        reference = self._reference_digest() if with_reference(metrics) else None
        found: dict[str, dict[str, Any]] = {}
        for name in metrics:
            found[name] = {}
            metric = IMAGE_METRICS.get(name)
            if metric is None:
                continue
            network = self.network_of(name)
            found[name] |= {"network": network, "weights": weights[network], "resize": self.resize_used}
            if metric.reference is not None:
                found[name]["reference"] = reference
            found[name] |= {setting: getattr(self, setting) for setting in metric.settings}
            if metric.reference is not None and self.reference == "demo":
                found[name]["seed"] = self.seed
        return found

    def _networks(self, metrics: Sequence[str]) -> set[str]:
        """The networks of these metrics."""
        return {self.network_of(name) for name in metrics if name in IMAGE_METRICS}

    def network_of(self, metric: str) -> str:
        """The name of the network that a metric takes its features from."""
        return IMAGE_METRICS[metric].network or self.features

    def weights_of(self, network: str) -> str:
        """What identifies the weights of a network: a digest of their files, or the name of a model on the Hub."""
        if network == "demo":
            return digest(sorted(_DEMO_VQ.iterdir()))
        if network == "inception":
            found = _PUBLISHED_INCEPTION if self.inception_weights is None else digest([self.inception_weights])
            return _PUBLISHED_INCEPTION if found.startswith(_PUBLISHED_INCEPTION) else found
        folder = Path(self.clip_model or "")
        if not folder.is_dir():
            return str(self.clip_model)
        return digest(sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json", ".txt")))

    def _reference_digest(self) -> str | None:
        if self.reference is None or self.reference == "demo":
            return self.reference
        path = Path(self.reference)
        return digest([path] if self._of_statistics else image_files(path))


def with_reference(metrics: Iterable[str], reference: str | None = None) -> list[str]:
    """Those of the metrics that compare with a reference, of any type or of this one."""
    types = ("images", "statistics", "captioned") if reference is None else (reference,)
    return [name for name in metrics if name in IMAGE_METRICS and IMAGE_METRICS[name].reference in types]


@cache
def _read_once(path: str, time: int, size: int) -> ReferenceStatistics:
    """The statistics in a file, read again only after it has changed: they take some 60 MB and are used in several places."""
    return read_reference(path)

"""What can be measured of a set of images, and how: the table of metrics, and the settings of a measurement."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from ..checks import check_choice, check_integer
from ..choices import FEATURES, METRICS, RESIZES
from ..extras import missing
from ..files import digest, regular_file
from .features import CMMD_MODEL, DINOV2_MODEL, check_pretrained
from .known_references import KNOWN_REFERENCES, find_file, sha256
from .photographs import image_files
from .preference import PREFERENCES, check_preference, preference_identity
from .reference import ReferenceStatistics, StatisticsOrigin, read_reference


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
    **{name: ImageMetric("PreferenceScore", network=name, captions=True) for name in PREFERENCES},
    "diversity": ImageMetric("Diversity"),
    "caption_variety": ImageMetric("CaptionVariety", reference="captioned", network="demo", output="spatial", captions=True),
    "fd_dinov2": ImageMetric("FrechetDistance", reference="statistics", network="dinov2", biased=True),
    "fd_infinity": ImageMetric("FrechetDistanceAtInfinity", reference="statistics", settings=("seed",), biased=True),
    "cmmd": ImageMetric("Cmmd", reference="images", network="cmmd"),
}
"""All of `choices.METRICS` but "composition", which the checker of the demo world decides image by image (see `composition`)."""

PREFERENCE_SETTINGS = tuple(
    dict.fromkeys([f"{name}_weights" for name in PREFERENCES] + [preference.reader for preference in PREFERENCES.values()])
)
"""The `MeasureSettings` that name networks which judge as people do; also those of the command line's flags."""

_DEFAULT_RESIZE = "bicubic"
_DEMO_VQ = Path(__file__).parents[1] / "demo" / "model" / "vqvae"
# torch-fidelity's file of FID's weights; the name that it is published under ends with these first digits of its SHA-256.
_PUBLISHED_INCEPTION = "6726825d"
# Networks of transformers: the setting that names the model, and what kind of model it is.
_MODELS = {"clip": ("clip_model", "CLIP"), "dinov2": ("dinov2_model", "DINOv2"), "cmmd": ("cmmd_model", "CLIP")}
# Figures of few images get a kernel distance beside them, unless that would keep the features of more real images than this.
_MOST_KEPT = 50_000
LEAST_AT_INFINITY = 30
"""The fewest generated images for FD∞."""
FEW_IMAGES = 10_000
"""With fewer images figures of 1000 and more dimensions depend strongly on how many there are."""


@dataclass(frozen=True)
class MeasureSettings:
    """How images are measured.

    Attributes:
        features: "inception", "clip", "dinov2" or "demo", for "frechet", "fd_infinity", "kid", "precision_recall" and
            "diversity"; other metrics have features by definition.
        reference: Real images: a folder, statistics in ADM's .npz format (for Fréchet distances only), the name of statistics
            that others publish (`known_references`), or "demo" for one rendering of every prompt of the demo world.
        reference_file: The file of the statistics that `reference` names, or a folder that holds it; None: it is looked for in
            the folder that the environment variable INFOGAIN_REFERENCES names.
        inception_weights: File of FID's weights; None: torch-fidelity's, which are downloaded once.
        clip_model: Folder or Hub id, for the features "clip" and for "clip_score".
        dinov2_model: Folder or Hub id, for the features "dinov2" and for "fd_dinov2".
        cmmd_model: Folder or Hub id of the CLIP model for "cmmd".
        pick_score_weights: Folder or Hub id in transformers' format; None: yuvalkirstain/PickScore_v1.
        hps_v2_weights: File, or a folder or Hub id that holds it; None: HPS_v2_compressed.pt of xswu/HPSv2.
        hps_v2_1_weights: The same; None: HPS_v2.1_compressed.pt of xswu/HPSv2.
        image_reward_weights: The same; None: ImageReward.pt of THUDM/ImageReward.
        clip_h_processor: Folder or Hub id of the tokenizer of "pick_score", "hps_v2" and "hps_v2_1", and of the first one's
            processor of images; None: laion/CLIP-ViT-H-14-laion2B-s32B-b79K.
        bert_tokenizer: Folder or Hub id of the tokenizer of "image_reward"; None: google-bert/bert-base-uncased.
        resize: How images are resized to the network's size, one of `choices.RESIZES`. None: as the images behind the
            reference's statistics were, which is "network" for a file from elsewhere; without statistics "bicubic". Networks that
            judge as people do always resize as their authors do.
        save_statistics: .npz file for the statistics of the reference, or of the images if there is no reference.
        subset_size: Images in each of the 100 subsets of the kernel distance; None: 1000, or all if there are fewer.
    """

    features: str = "inception"
    reference: str | None = None
    inception_weights: Path | None = None
    clip_model: str | None = None
    dinov2_model: str = DINOV2_MODEL
    cmmd_model: str = CMMD_MODEL
    reference_file: Path | None = None
    pick_score_weights: str | None = None
    hps_v2_weights: str | None = None
    hps_v2_1_weights: str | None = None
    image_reward_weights: str | None = None
    clip_h_processor: str | None = None
    bert_tokenizer: str | None = None
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
        if self.reference_file is not None and self.reference not in KNOWN_REFERENCES:
            raise ValueError(
                f"`reference_file` must be left out unless `reference` names published statistics, got {self.reference_file} for "
                f"the reference {self.reference}."
            )
        networks = self._networks(metrics) | ({self.features} if self.save_statistics is not None else set())
        if self.clip_model is None and "clip" in networks:
            raise ValueError("`clip_model` must be given for CLIP's score or features: a folder or a Hub id.")
        for network in sorted(networks & set(_MODELS)):
            argument, kind = _MODELS[network]
            check_pretrained(argument, getattr(self, argument), kind)
        for name in networks & PREFERENCES.keys():
            check_preference(name, self.preference_sources(name)[0])
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
            folder = Path(str(self.reference))
            close = [] if folder.exists() else difflib.get_close_matches(str(folder), KNOWN_REFERENCES, n=1)
            if close:
                raise ValueError(f"`reference` must be a folder, a file or a name such as {close[0]}, got {self.reference}.")
            image_files(folder)
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
        return self.reference in KNOWN_REFERENCES or str(self.reference).endswith(".npz")

    @property
    def statistics_file(self) -> Path | None:
        """The file of statistics that `reference` names; None if it names images.

        Raises:
            ValueError: If the file of statistics known by name is missing, or another one.
        """
        if self.reference in KNOWN_REFERENCES:
            return find_file(str(self.reference), self.reference_file)
        return Path(str(self.reference)) if self._of_statistics else None

    @property
    def statistics(self) -> ReferenceStatistics | None:
        """The statistics that `reference` names; None if it names images."""
        path = self.statistics_file
        if path is None:
            return None
        state = regular_file(path).stat()
        found = _read_once(str(path), state.st_mtime_ns, state.st_size)
        known = KNOWN_REFERENCES.get(str(self.reference))
        if known is None or found.origin is not None:
            return found
        count = FEW_IMAGES if known.num_images is None else known.num_images
        return replace(found, origin=StatisticsOrigin(count, known.resize, "inception", _PUBLISHED_INCEPTION))

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
            resize = "own" if network in PREFERENCES else self.resize_used
            found[name] |= {"network": network, "weights": weights[network], "resize": resize}
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

    def model_of(self, network: str) -> str:
        """Folder or Hub id of a network of transformers."""
        return getattr(self, _MODELS[network][0]) or ""

    def weights_of(self, network: str) -> str:
        """What identifies the weights of a network: a digest of their files, or the name of a model on the Hub."""
        if network in PREFERENCES:
            return preference_identity(network, *self.preference_sources(network))
        if network == "demo":
            return digest(sorted(_DEMO_VQ.iterdir()))
        if network == "inception":
            found = _PUBLISHED_INCEPTION if self.inception_weights is None else digest([self.inception_weights])
            return _PUBLISHED_INCEPTION if found.startswith(_PUBLISHED_INCEPTION) else found
        folder = Path(self.model_of(network))
        if not folder.is_dir():
            return self.model_of(network)
        return digest(sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json", ".txt")))

    def preference_sources(self, metric: str) -> tuple[str | None, str | None]:
        """The weights of a metric that judges as people do, and what reads its texts; None: as published."""
        return getattr(self, f"{metric}_weights"), getattr(self, PREFERENCES[metric].reader)

    def _reference_digest(self) -> str | None:
        if self.reference is None or self.reference == "demo":
            return self.reference
        file = self.statistics_file
        return digest(image_files(Path(self.reference))) if file is None else sha256(file)[:32]

    def kid_beside(self, metrics: Sequence[str], count: int) -> bool:
        """Whether a kernel distance, which the number of images does not bias, belongs beside the Fréchet distance of so few.

        Not where it was asked for anyway, where there is no folder of real images, or where it would keep too many features.
        """
        of_folder = self.reference not in (None, "demo") and not self._of_statistics
        if not of_folder or "frechet" not in metrics or "kid" in metrics or not 2 <= count < FEW_IMAGES:
            return False
        return 2 <= len(image_files(Path(str(self.reference)))) <= _MOST_KEPT


def with_reference(metrics: Iterable[str], reference: str | None = None) -> list[str]:
    """Those of the metrics that compare with a reference, of any type or of this one."""
    types = ("images", "statistics", "captioned") if reference is None else (reference,)
    return [name for name in metrics if name in IMAGE_METRICS and IMAGE_METRICS[name].reference in types]


@cache
def _read_once(path: str, time: int, size: int) -> ReferenceStatistics:
    """The statistics in a file, read again only after it has changed: they take some 60 MB and are used in several places."""
    return read_reference(path)

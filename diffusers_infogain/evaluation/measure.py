"""Measures sets of images by several metrics of `metrics` together.

Images are read one by one, and every network sees each of them once. Memory holds a batch, the sums of the Fréchet distances,
the scores of single images, and for all other metrics the features of all images (FD∞: of the generated ones): 4 bytes per
dimension and image, 8 KB an image for Inception's 2048, 160 MB for 20,000 images.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import PIL.Image
import torch

from ..demo.shapes import Scenes, parse_caption, render, sample_scenes
from .features import ClipFeatures, CmmdFeatures, DemoFeatures, Dinov2Features, FeatureExtractor, InceptionFeatures
from .measure_settings import FEW_IMAGES, IMAGE_METRICS, MeasureSettings, with_reference
from .photographs import batches, image_files
from .preference import PREFERENCES, PreferenceModel, load_preference
from .prompts import Prompt
from .reference import ReferenceStatistics, StatisticsOrigin, set_reference, write_reference


@dataclass(frozen=True)
class Measured:
    """A set of images by one metric.

    Attributes:
        figures: The values by the names under which reports print them.
        standard_errors: Of the figures of a metric that can tell.
        values: Of a metric that scores images one by one: for each name the scores of all images, in their order.
    """

    figures: dict[str, float]
    standard_errors: dict[str, float] = field(default_factory=dict)
    values: dict[str, list[float]] = field(default_factory=dict)

    @property
    def recorded_values(self) -> dict[str, list[float]]:
        """The values as records keep them, rounded to 6 digits after the point."""
        return {title: [round(value, 6) for value in values] for title, values in self.values.items()}


class Measurement:
    """Metrics with their networks loaded. Measures any number of sets of images against one reference, which is read once.

    Raises:
        ValueError: For what `MeasureSettings.check` refuses, or if a network's file is not of that network.
        ImportError: If a metric needs a package that is not installed.
        OSError: If a file is missing or cannot be read.
    """

    def __init__(self, metrics: Sequence[str], settings: MeasureSettings):
        settings.check(metrics)
        self.settings = settings
        self._asked = [name for name in metrics if name in IMAGE_METRICS]
        self._extractors: dict[str, FeatureExtractor | PreferenceModel] = {}
        # ADM's files hold pool and spatial features, which are both Inception's.
        both = settings.features == "inception"
        self._saved = [] if settings.save_statistics is None else ["frechet", "spatial"] if both else ["frechet"]
        names = dict.fromkeys(self._asked + self._saved)
        self._metrics: dict[str, Any] = {name: self._build(name) for name in names}
        # Once the reference is read: the prompts whose renderings it consists of, or "" for any other reference than "demo".
        self._reference: list[str] | str | None = None
        if settings.statistics is not None:
            self._load_statistics(settings.statistics)

    def _extractor(self, name: str) -> Any:
        """The network of a metric. Metrics of the same features share one, which runs once per batch for all of them."""
        network = self.settings.network_of(name)
        key = f"{network} {IMAGE_METRICS[name].output}"
        if key not in self._extractors:
            extractor = self._load(network, IMAGE_METRICS[name].output)
            if isinstance(extractor, FeatureExtractor):
                extractor.forward = _last_remembered(extractor.forward)  # type: ignore[method-assign, assignment]
            self._extractors[key] = extractor
        return self._extractors[key]

    def _load(self, network: str, output: Literal["pool", "spatial", "logits"]) -> FeatureExtractor | PreferenceModel:
        if network in PREFERENCES:
            return load_preference(network, *self.settings.preference_sources(network))
        unrounded = self.settings.resize_used == "clean"
        if network == "demo":
            return DemoFeatures("spatial" if output == "spatial" else "pool", unrounded)
        of_transformers = {"clip": ClipFeatures, "cmmd": CmmdFeatures, "dinov2": Dinov2Features}
        if network in of_transformers:
            return of_transformers[network](self.settings.model_of(network), unrounded)
        return InceptionFeatures(output, self.settings.inception_weights, unrounded)

    def _build(self, name: str) -> Any:
        from . import metrics as library  # here, since importing torchmetrics may fail (see `torchvision_explained`)

        metric = IMAGE_METRICS[name]
        # Only this process measures, so nothing is gathered from others, which would wait for them forever.
        arguments: dict[str, Any] = {"sync_on_compute": False}
        arguments |= {setting: getattr(self.settings, setting) for setting in metric.settings}
        if metric.reference is not None:
            arguments["reset_real_features"] = False
        return getattr(library, metric.builder)(self._extractor(name), **arguments)

    def _load_statistics(self, statistics: ReferenceStatistics) -> None:
        for name in with_reference(self._metrics, "statistics"):
            set_reference(self._metrics[name], statistics)
        self._reference = ""
        self._warn_of_few(FEW_IMAGES if statistics.origin is None else statistics.origin.num_images, "reference")

    def read_reference(self, prompts: Sequence[Prompt] | None = None) -> None:
        """Reads the reference, unless that was done before, and saves its statistics if the settings name a file for them.

        Called before a long run it finds whatever is wrong with the reference; otherwise `measure` reads it.

        Args:
            prompts: For the reference "demo", which is rendered again for other prompts.

        Raises:
            ValueError: If there are too few images or some cannot be read, or `prompts` are missing or no captions.
        """
        names = with_reference(self._metrics)
        if self.settings.reference is None or not names:
            return
        origin: list[str] | str = ""
        if self.settings.reference == "demo":
            if prompts is None:
                raise ValueError("`prompts` must be given for the reference 'demo': one for each image.")
            origin = [prompt.text for prompt in prompts]
        if self._reference == origin:
            return
        self._metrics = {name: self._build(name) for name in self._metrics}
        sources: Iterable[Path | PIL.Image.Image]
        if isinstance(origin, str):
            sources = paths = image_files(Path(self.settings.reference))
            count = len(paths)
        else:
            sources = _renderings(origin, self.settings.seed)
            count = len(origin)
        self._warn_of_few(count, "reference")
        with self._on_device():
            texts = origin if isinstance(origin, list) else None
            self._update(sources, count, "reference", {name: {"real": True} for name in names}, texts)
            self._save_statistics(count, real=True)
        self._reference = origin

    def measure(self, paths: Sequence[Path], prompts: Sequence[Prompt] | None = None) -> dict[str, float]:
        """The figures of a set of images by all metrics, in one dictionary; see `measure_each`."""
        each = self.measure_each(paths, prompts)
        return {title: value for measured in each.values() for title, value in measured.figures.items()}

    def measure_each(self, paths: Sequence[Path], prompts: Sequence[Prompt] | None = None) -> dict[str, Measured]:
        """The figures of a set of images by every metric.

        Args:
            paths: Images of any sizes.
            prompts: One for each image, for metrics that compare with captions and the reference "demo".

        Raises:
            ValueError: If there are too few images, or some cannot be read, naming them, or `prompts` are missing.
        """
        if not self._metrics:
            return {}
        texts = None if prompts is None else [prompt.text for prompt in prompts]
        for name in self._metrics:
            if texts is None and IMAGE_METRICS[name].captions:
                raise ValueError(f"`prompts` must be given for {name}: one for each image.")
        if texts is not None and len(texts) != len(paths):
            raise ValueError(f"`prompts` must be one for each of the {len(paths)} images, got {len(texts)}.")
        self.read_reference(prompts)
        self._warn_of_few(len(paths), "measured")
        for metric in self._metrics.values():
            metric.reset()
        arguments: dict[str, dict[str, Any]] = {name: {} for name in self._metrics}
        arguments |= {name: {"real": False} for name in with_reference(arguments)}
        with self._on_device():
            self._update(paths, len(paths), "images", arguments, texts)
            if self.settings.reference is None:
                self._save_statistics(len(paths), real=False)
            return {name: _measured(self._metrics[name]) for name in self._asked}

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Moves networks and features to the device for the block, and back to the CPU afterwards, to free its memory."""
        for metric in self._metrics.values():
            metric.to(self.settings.device)
        try:
            yield
        finally:
            for metric in self._metrics.values():
                metric.to("cpu")

    def _update(
        self,
        sources: Iterable[Path | PIL.Image.Image],
        count: int,
        description: str,
        arguments: dict[str, dict[str, Any]],
        texts: Sequence[str] | None = None,
    ) -> None:
        """Updates the metrics that `arguments` names, with further arguments for each, by images and their captions."""
        sizes = {name: self._extractor(name).input_size or 0 for name in arguments}
        resize, batch_size = self.settings.resize_used, self.settings.batch_size
        first = 0
        for batch in batches(sources, count, set(sizes.values()), resize, batch_size, description):
            images = {size: pixels.to(self.settings.device) for size, pixels in batch.items()}
            last = first + len(next(iter(images.values())))
            for name in arguments:
                captions = [list(texts or ())[first:last]] if IMAGE_METRICS[name].captions else []
                self._metrics[name].update(images[sizes[name]], *captions, **arguments[name])
            first = last

    def _save_statistics(self, count: int, real: bool) -> None:
        path, network = self.settings.save_statistics, self.settings.features
        if path is None:
            return
        origin = StatisticsOrigin(count, self.settings.resize_used, network, self.settings.weights_of(network))
        moments = [value.cpu().numpy() for name in self._saved for value in self._metrics[name].statistics(real)]
        arrays = dict(zip(("mu", "sigma", "mu_s", "sigma_s"), moments, strict=False))
        write_reference(path, ReferenceStatistics(**arrays, origin=origin))

    def _warn_of_few(self, count: int, description: str) -> None:
        """Warns that figures of distributions are biased if estimated from few images, most so in many dimensions."""
        for name in self._asked:
            metric = IMAGE_METRICS[name]
            if not metric.biased or (description == "reference" and metric.reference is None):
                continue
            dimensions = self._extractor(name).num_features
            enough = FEW_IMAGES if dimensions >= 1000 else 2 * dimensions
            if count < enough:
                hint = metric.reference == "statistics" and "kid" not in self._asked and self.settings.statistics is None
                beside = "; the kernel distance (kid) has no such bias" if hint else ""
                warnings.warn(
                    f"{self._metrics[name].title} with {count} {description} images depends strongly on their number (below "
                    f"about {enough}): compare it at equal numbers only{beside}.",
                    stacklevel=3,
                )


def _measured(metric: Any) -> Measured:
    figures, errors, values = (
        getattr(metric, name)() if hasattr(metric, name) else {} for name in ("figures", "standard_errors", "values")
    )
    return Measured(
        {title: float(value) for title, value in figures.items()},
        {title: float(value) for title, value in errors.items()},
        {title: scores.tolist() for title, scores in values.items()},
    )


def _last_remembered(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function with a cache of one entry: for the very same tensor as in the last call it returns the same result."""
    last: list[torch.Tensor] = []

    def remembering(images: torch.Tensor) -> torch.Tensor:
        if not last or last[0] is not images:
            last[:] = [images, function(images)]
        return last[1]

    return remembering


def _renderings(texts: Sequence[str], seed: int) -> Iterator[PIL.Image.Image]:
    """A rendering of every caption."""
    scenes = sample_scenes([parse_caption(text) for text in texts], torch.Generator().manual_seed(seed))
    for first in range(0, len(texts), 64):
        some = Scenes(*(getattr(scenes, field.name)[first : first + 64] for field in fields(Scenes)))
        for image in (255 * render(some)).round().byte():
            yield PIL.Image.fromarray(image.permute(1, 2, 0).numpy())

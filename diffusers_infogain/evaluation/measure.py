"""All metrics of a set of images at once, each by the module of `metrics`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..demo.shapes import parse_caption, render, sample_scenes
from .prompts import Prompt
from .runs import image_files, load_images

METRICS = ("composition", "frechet", "spatial", "kid", "inception_score", "precision_recall", "clip_score", "diversity")
"""What can be asked for; "composition" is checked image by image (see `composition`), the others are measured here."""
WITH_REFERENCE = ("frechet", "spatial", "kid", "precision_recall")
FEATURES = ("inception", "clip", "demo")
_DEMO_VQ = Path(__file__).parents[1] / "demo" / "model" / "vqvae"
# torch-fidelity's file of FID's weights; the name that it is published under ends with these first digits of its SHA-256.
_PUBLISHED_INCEPTION = "6726825d"


@dataclass(frozen=True)
class MeasureSettings:
    """How images are measured.

    Attributes:
        features: Of "frechet", "kid", "precision_recall" and "diversity": "inception", "clip" or "demo". "spatial" and
            "inception_score" are Inception's by definition.
        reference: Real images: a folder, statistics in ADM's .npz format (for "frechet" and "spatial" only), or "demo" for one
            rendering of every prompt of the demo world.
        inception_weights: File of FID's weights; None lets torch-fidelity download them.
        clip_model: Folder or Hub id, for the features "clip" and for "clip_score".
        subset_size: Images in each of the 100 subsets of the kernel distance; None: 1000, or all if there are fewer.
    """

    features: str = "inception"
    reference: str | None = None
    inception_weights: Path | None = None
    clip_model: str | None = None
    subset_size: int | None = None
    batch_size: int = 64
    device: str = "cpu"
    seed: int = 0

    def check(self, metrics: Sequence[str]) -> None:
        """Raises a ValueError for a metric that does not exist, or that these settings cannot give."""
        for name in metrics:
            if name not in METRICS:
                raise ValueError(f"A metric must be one of {', '.join(METRICS)}, got {name!r}.")
        if self.features not in FEATURES:
            raise ValueError(f"`features` must be one of {', '.join(FEATURES)}, got {self.features!r}.")
        needy = [name for name in metrics if name in WITH_REFERENCE]
        if needy and self.reference is None:
            raise ValueError(f"`reference` must be given for {', '.join(needy)}: a folder of real images or an .npz file.")
        of_images = [name for name in needy if name in ("kid", "precision_recall")]
        if of_images and str(self.reference).endswith(".npz"):
            raise ValueError(f"`reference` must be a folder of images for {', '.join(of_images)}, got {self.reference}.")
        if self.clip_model is None and ("clip_score" in metrics or self.features == "clip"):
            raise ValueError("`clip_model` must be given for CLIP's score or features: a folder or a Hub id.")

    def identity(self, metrics: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Per metric, everything besides the images that its figures depend on, as JSON takes it, for records.

        Two figures with one identity can be compared, and a figure with another one must not stand in for it. Files count by
        their content, wherever they lie; a model of the Hub by its name.
        """
        networks = {network: self._weights(network) for network in {self._network(name) for name in metrics} if network}
        reference = self._reference_digest() if any(name in WITH_REFERENCE for name in metrics) else None
        found: dict[str, dict[str, Any]] = {}
        for name in metrics:
            network = self._network(name)
            found[name] = {} if network is None else {"network": network, "weights": networks[network]}
            if name in WITH_REFERENCE:
                found[name]["reference"] = reference
            if name == "kid":
                found[name]["subset_size"] = self.subset_size
            if name in ("kid", "inception_score") or (name in WITH_REFERENCE and self.reference == "demo"):
                found[name]["seed"] = self.seed
        return found

    def _network(self, metric: str) -> str | None:
        """What a metric's features come from."""
        if metric == "composition":
            return None
        return {"spatial": "inception", "inception_score": "inception", "clip_score": "clip"}.get(metric, self.features)

    def _weights(self, network: str) -> str:
        if network == "demo":
            return _digest(sorted(_DEMO_VQ.iterdir()))
        if network == "inception":
            digest = _PUBLISHED_INCEPTION if self.inception_weights is None else _digest([self.inception_weights])
            return _PUBLISHED_INCEPTION if digest.startswith(_PUBLISHED_INCEPTION) else digest
        folder = Path(self.clip_model or "")
        if not folder.is_dir():
            return str(self.clip_model)
        return _digest(sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json", ".txt")))

    def _reference_digest(self) -> str | None:
        if self.reference is None or self.reference == "demo":
            return self.reference
        path = Path(self.reference)
        return _digest([path] if path.suffix == ".npz" else image_files(path))


def _digest(paths: Iterable[Path]) -> str:
    """The first half of the SHA-256 of the files' contents, one after the other; that of one file is the file's own."""
    content = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(2**20):
                content.update(block)
    return content.hexdigest()[:32]


class _Extractors:
    """Builds each network once."""

    def __init__(self, settings: MeasureSettings):
        self.settings = settings
        self.built: dict[str, Any] = {}

    def __call__(self, kind: str) -> Any:
        from . import features

        if kind not in self.built:
            if kind == "demo":
                built: Any = features.DemoFeatures()
            elif kind == "clip":
                built = features.ClipFeatures(self.settings.clip_model or "")
            else:
                output: Any = {"inception": "pool"}.get(kind, kind)
                built = features.InceptionFeatures(output, self.settings.inception_weights)
            self.built[kind] = built.to(self.settings.device)
        return self.built[kind]


def measure(
    paths: Sequence[Path], prompts: Sequence[Prompt] | None, metrics: Sequence[str], settings: MeasureSettings
) -> dict[str, float]:
    """The figures of a set of images, by the names under which reports print them.

    Args:
        paths: The images; all of one size.
        prompts: One for each image, for "clip_score" and a "demo" reference.

    Raises:
        ValueError: If a metric cannot be had (see `MeasureSettings.check`), there are too few images, or some cannot be read.
    """
    settings.check(metrics)
    wanted = [name for name in metrics if name != "composition"]
    if not wanted:
        return {}
    if prompts is None and ("clip_score" in wanted or settings.reference == "demo"):
        raise ValueError("`prompts` must be given for clip_score or the reference 'demo': one for each image.")
    images = load_images(paths)
    real = _real_images(prompts, settings) if any(name in WITH_REFERENCE for name in wanted) else None
    extractors, figures = _Extractors(settings), dict[str, Any]()
    for name in wanted:
        figures |= _measure_one(name, images, real, prompts, settings, extractors)
    return {name: float(value) for name, value in figures.items()}


def _real_images(prompts: Sequence[Prompt] | None, settings: MeasureSettings) -> torch.Tensor | None:
    """The reference as images; None for statistics."""
    if str(settings.reference).endswith(".npz"):
        return None
    if settings.reference == "demo":
        captions = [parse_caption(prompt.text) for prompt in prompts or ()]
        pixels = render(sample_scenes(captions, torch.Generator().manual_seed(settings.seed)))
        return (255 * pixels).round().byte()
    return load_images(image_files(Path(str(settings.reference))))


def _batches(images: torch.Tensor, name: str, settings: MeasureSettings) -> Iterator[torch.Tensor]:
    for batch in tqdm(images.split(settings.batch_size), desc=name, unit="batch", leave=False):
        yield batch.to(settings.device)


def _measure_one(
    name: str,
    images: torch.Tensor,
    real: torch.Tensor | None,
    prompts: Sequence[Prompt] | None,
    settings: MeasureSettings,
    extractors: _Extractors,
) -> dict[str, Any]:
    from . import metrics as library
    from .reference import read_reference, with_reference

    # Only this process measures, so nothing is gathered from others, which would wait for them forever.
    local = {"sync_on_compute": False}
    if name == "clip_score":
        score = library.ClipScore(extractors("clip"), **local).to(settings.device)
        texts = [prompt.text for prompt in prompts or ()]
        for i, batch in enumerate(_batches(images, name, settings)):
            score.update(batch, texts[i * settings.batch_size :][: len(batch)])
        return {"CLIP score": score.compute()}
    if name == "inception_score":
        metric: Any = library.inception_score(extractors("logits"), seed=settings.seed, **local).to(settings.device)
        for batch in _batches(images, name, settings):
            metric.update(batch)
        return {"Inception score": metric.compute()[0]}
    extractor = extractors("spatial" if name == "spatial" else settings.features)
    if name == "diversity":
        diversity = library.Diversity(extractor, **local).to(settings.device)
        for batch in _batches(images, name, settings):
            diversity.update(batch)
        values = diversity.compute()
        return {f"pairwise distance ({extractor.name})": values["distance"], "distinct images": values["distinct"]}
    if name == "kid":
        fewest = min(len(images), len(real if real is not None else ()))
        metric = library.kid(extractor, subset_size=settings.subset_size or min(1000, fewest), seed=settings.seed, **local)
    elif name == "precision_recall":
        metric = library.PrecisionRecall(extractor, **local)
    else:
        metric = library.FrechetDistance(extractor, **local)
    metric = metric.to(settings.device)
    if real is None:
        with_reference(metric, read_reference(str(settings.reference)))
    else:
        for batch in _batches(real, f"{name}, reference", settings):
            metric.update(batch, real=True)
    for batch in _batches(images, name, settings):
        metric.update(batch, real=False)
    values = metric.compute()
    if name == "kid":
        title = "KID" if settings.features == "inception" else f"kernel distance ({extractor.name})"
        return {title: values[0]}
    return values if name == "precision_recall" else {metric.title: values}

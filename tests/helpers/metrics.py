"""Imports the metrics where torchvision is missing; small extractors, images and models made on the spot."""

import importlib.util
import sys
from functools import cache
from pathlib import Path
from unittest import mock

import torch
import transformers
from safetensors.torch import load_file, save_file

from diffusers_infogain.evaluation.features import FeatureExtractor
from helpers.amused import make_tokenizer


def import_torch_fidelity() -> None:
    """Imports it, where it is installed, also without torchvision.

    Importing torchmetrics imports torch-fidelity, whose package imports torchvision for data sets and networks that the tests do
    not use; and torchvision's wheels on PyPI do not fit a CPU build of torch. So empty modules stand in for it, for this import.
    """
    if not importlib.util.find_spec("torch_fidelity") or importlib.util.find_spec("torchvision"):
        return
    names = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")
    sys.modules.update({name: mock.MagicMock() for name in names})
    try:
        importlib.import_module("torch_fidelity")
    finally:
        for name in names:
            del sys.modules[name]


import_torch_fidelity()
metrics = importlib.import_module("diffusers_infogain.evaluation.metrics")
FrechetInceptionDistance = importlib.import_module("torchmetrics.image.fid").FrechetInceptionDistance


def torchmetrics_fid(extractor: FeatureExtractor, **kwargs) -> FrechetInceptionDistance:
    """torchmetrics' own Fréchet distance: the value of `FrechetDistance`, by torchmetrics' arithmetic."""
    return FrechetInceptionDistance(feature=extractor, normalize=False, **kwargs)


class TinyFeatures(FeatureExtractor):
    """A random convolution, with batch normalisation that would tell if the network ever left evaluation mode."""

    def __init__(self, num_features: int = 6, seed: int = 0):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = torch.nn.Sequential(
                torch.nn.Conv2d(3, num_features, 3), torch.nn.BatchNorm2d(num_features), torch.nn.Tanh(), torch.nn.Dropout()
            )
        super().__init__(network.train(), num_features, "tiny")
        self.calls = 0

    def extract(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.network(images / 64).mean((2, 3))


def save_tiny_dinov2(folder: Path) -> str:
    """The tiny DINOv2 of tests/golden, in the format of a local folder."""
    folder.mkdir(exist_ok=True)
    weights = {name.removeprefix("weights."): value for name, value in golden().items() if name.startswith("weights.")}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2, "image_size": 518}
    transformers.Dinov2Config(**shape, patch_size=14).save_pretrained(folder)
    return str(folder)


@cache
def golden() -> dict[str, torch.Tensor]:
    """What the public code of distances makes of tiny inputs."""
    return load_file(Path(__file__).parents[1] / "golden" / "distances_tiny.safetensors")


def random_images(num: int, seed: int = 0, size: int = 8, low: int = 0, high: int = 256) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # images that differ in more than noise, so that features spread
    base = torch.randint(low, high, (num, 3, 1, 1), generator=generator)
    noise = torch.randint(-20, 21, (num, 3, size, size), generator=generator)
    return (base + noise).clamp(0, 255).byte()


def save_tiny_clip(folder: Path, seed: int = 0) -> str:
    """A random CLIP of 12 tokens' context, in the format of a local folder."""
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = make_tokenizer()
    ends = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("eos", "bos", "pad")}
    config = transformers.CLIPConfig(
        text_config={**text, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": 12, "projection_dim": 8},
        vision_config={**text, "image_size": 16, "patch_size": 8, "projection_dim": 8},
        projection_dim=8,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformers.CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    transformers.CLIPImageProcessor(**size).save_pretrained(folder)
    return str(folder)

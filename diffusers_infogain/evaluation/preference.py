"""Networks that judge images as people do, trained on which of two images people prefer for a prompt: PickScore, HPSv2 and
HPSv2.1, ImageReward.

Each resizes images as its authors do, so that scores are comparable with published ones.
"""

from __future__ import annotations

import contextlib
import html
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image

from ..checkpoints.clip import open_clip_model, open_open_clip
from ..checkpoints.repository import local_folder
from ..checkpoints.saved import load_tokenizer
from ..checkpoints.weights import PICKLES, has_weights
from ..files import digest, regular_file
from ..models.image_reward import MAX_LENGTH, ImageReward, open_image_reward
from .features import check_images, cut_tokens, open_image_processor, pictures_of, pooled

_STRAIGHT = str.maketrans(dict.fromkeys("\u02bc\u2018\u2019\u201a\u201b", "'") | dict.fromkeys("\u201c\u201d\u201e\u201f", '"'))
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class PreferenceModel(torch.nn.Module):
    """A frozen network in evaluation mode that scores images by their prompts; higher is better.

    Subclasses define `score`.

    Attributes:
        title: The name in reports.
        input_size: None: it takes images of any size.
    """

    input_size: None = None

    def __init__(self, network: torch.nn.Module, title: str):
        super().__init__()
        self.network = network.requires_grad_(False)
        self.title = title
        self.eval()

    def train(self, mode: bool = True) -> PreferenceModel:
        """Has no effect: in training mode scores would depend on dropout."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor, texts: list[str]) -> torch.Tensor:
        """Scores (B,), float32, of images (B, 3, H, W) by the text that belongs to each.

        Raises:
            ValueError: If the images are not uint8 of this shape.
        """
        check_images(images)
        return self.score(images, texts).float()

    def score(self, images: torch.Tensor, texts: list[str]) -> torch.Tensor:
        """The scores of images that `forward` has checked."""
        raise NotImplementedError


class _ClipPreference(PreferenceModel):
    """Scores by the cosine of a CLIP's features of image and text."""

    def __init__(self, network: transformers.CLIPModel, title: str, processor: Path):
        super().__init__(network, title)
        self.tokenizer = _open_tokenizer(transformers.CLIPTokenizer, processor, network.config.text_config.vocab_size)

    def cosines(self, pixels: torch.Tensor, texts: list[str]) -> torch.Tensor:
        """Cosines (B,) of images, as the network takes them, and texts."""
        network: Any = self.network
        encoded = cut_tokens(self.tokenizer, texts, network.config.text_config.max_position_embeddings, self.title)
        image = pooled(network.get_image_features(pixel_values=pixels.to(network.device)))
        return F.cosine_similarity(image, pooled(network.get_text_features(**encoded.to(network.device))))


class PickScore(_ClipPreference):
    """PickScore (Kirstain et al. 2023, arXiv 2305.01569): the logit of a CLIP that was trained on what users of Pick-a-Pic chose.

    The softmax over images of one prompt predicts the share of people who prefer each.

    Args:
        network: The CLIP.
        processor: Folder of its tokenizer and processor of images.
    """

    def __init__(self, network: transformers.CLIPModel, processor: Path):
        super().__init__(network, "PickScore", processor)
        self.image_processor = open_image_processor(processor)

    def score(self, images: torch.Tensor, texts: list[str]) -> torch.Tensor:
        """The cosine times exp(logit_scale), (B,)."""
        network: Any = self.network
        pixels = self.image_processor(pictures_of(images), return_tensors="pt")["pixel_values"]
        return network.logit_scale.exp() * self.cosines(pixels, texts)


class HumanPreferenceScore(_ClipPreference):
    """HPSv2 (Wu et al. 2023, arXiv 2306.09341): 100 times the cosine of a CLIP that was trained on people's rankings.

    The authors' benchmark has that factor too, their function `score` has not. Images are resized as torchvision resizes
    tensors since its version 0.17, bicubic with antialiasing. Of the repairs that the authors leave to the package ftfy, curly
    quotes become straight, and HTML entities become characters; texts that were decoded wrongly stay as they are.

    Args:
        network: The CLIP.
        title: "HPSv2" or "HPSv2.1", which cannot be compared with each other.
        processor: Folder of its tokenizer.
    """

    def score(self, images: torch.Tensor, texts: list[str]) -> torch.Tensor:
        """100 cos, (B,)."""
        network: Any = self.network
        size = network.config.vision_config.image_size
        height, width = _scaled(images.shape[2], images.shape[3], size)
        pixels = F.interpolate(images.float() / 255, (height, width), mode="bicubic", antialias=True, align_corners=False)
        top, left = _margin(height, size), _margin(width, size)
        pixels = _normalised(pixels[..., top : top + size, left : left + size])
        return 100 * self.cosines(pixels, [html.unescape(html.unescape(text)).translate(_STRAIGHT) for text in texts])


class ImageRewardScore(PreferenceModel):
    """ImageReward (Xu et al. 2023, arXiv 2304.05977): the reward that BLIP with linear layers gives, about 0 ± 1.

    Args:
        network: BLIP with linear layers.
        tokenizer: Folder of BERT's tokenizer.
    """

    def __init__(self, network: ImageReward, tokenizer: Path):
        super().__init__(network, "ImageReward")
        # the network's two last tokens belong to other tasks of BLIP
        self.tokenizer = _open_tokenizer(transformers.BertTokenizer, tokenizer, network.text_model.config.vocab_size - 2)

    def score(self, images: torch.Tensor, texts: list[str]) -> torch.Tensor:
        """The rewards, (B,)."""
        network: Any = self.network
        size = network.vision_model.config.image_size
        height, width = _scaled(images.shape[2], images.shape[3], size)
        top, left = _margin(height, size), _margin(width, size)
        squares = []
        for picture in pictures_of(images):
            resized = picture.resize((width, height), Image.Resampling.BICUBIC)
            squares.append(np.array(resized.crop((left, top, left + size, top + size))))
        pixels = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).to(images.device)
        pixels = _normalised(pixels / 255)
        return network(pixels, **cut_tokens(self.tokenizer, texts, MAX_LENGTH, self.title).to(images.device))


def _open_tokenizer(cls: Any, folder: Path, size: int) -> Any:
    tokenizer = load_tokenizer(cls, folder)
    if len(tokenizer) != size:
        raise ValueError(f"The tokenizer in {folder} must have the {size} tokens of the network, got {len(tokenizer)}.")
    return tokenizer


def _scaled(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width with the shorter side scaled to `size`, as torchvision rounds the longer one."""
    short, long = sorted((height, width))
    scaled = int(size * long / short)
    return (size, scaled) if height <= width else (scaled, size)


def _margin(side: int, size: int) -> int:
    """Pixels before a centred square, as torchvision rounds them."""
    return round((side - size) / 2)


def _normalised(pixels: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(value, device=pixels.device).view(3, 1, 1) for value in (_MEAN, _STD))
    return (pixels - mean) / std


@dataclass(frozen=True)
class Preference:
    """A published network of this kind.

    Attributes:
        title: Its name.
        repository: Where on the Hub its weights are.
        file: Which file there, without its suffix; None: a folder in transformers' format.
        reader: The setting of `MeasureSettings` that names what reads its texts.
        reader_repository: Where on the Hub that is.
        build: Makes it from the file or folder of its weights and the folder of what reads its texts.
    """

    title: str
    repository: str
    file: str | None
    reader: str
    reader_repository: str
    build: Callable[[Path, Path], PreferenceModel]

    @property
    def published(self) -> str:
        """What to get, for errors."""
        return self.repository if self.file is None else f"{self.file}.pt of {self.repository}"


def _human_preference(file: Path, processor: Path, title: str) -> PreferenceModel:
    return HumanPreferenceScore(open_open_clip(file).load(torch.float32), title, processor)


_CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
_HPS = "xswu/HPSv2"

PREFERENCES = {
    "pick_score": Preference(
        "PickScore",
        "yuvalkirstain/PickScore_v1",
        None,
        "clip_h_processor",
        _CLIP_H,
        lambda folder, processor: PickScore(open_clip_model(folder).load(torch.float32), processor),
    ),
    "hps_v2": Preference(
        "HPSv2", _HPS, "HPS_v2_compressed", "clip_h_processor", _CLIP_H, partial(_human_preference, title="HPSv2")
    ),
    "hps_v2_1": Preference(
        "HPSv2.1", _HPS, "HPS_v2.1_compressed", "clip_h_processor", _CLIP_H, partial(_human_preference, title="HPSv2.1")
    ),
    "image_reward": Preference(
        "ImageReward",
        "THUDM/ImageReward",
        "ImageReward",
        "bert_tokenizer",
        "google-bert/bert-base-uncased",
        lambda file, tokenizer: ImageRewardScore(open_image_reward(file).load(torch.float32), tokenizer),
    ),
}
"""By the names of the metrics, which are also those of the networks."""

_SUFFIXES = (".safetensors", *PICKLES)
_READER_FILES = ("tokenizer*.json", "special_tokens_map.json", "vocab.*", "merges.txt", "pre*processor_config.json")


def _is_file(name: str) -> bool:
    return Path(name).suffix in _SUFFIXES


def check_preference(metric: str, weights: str | None) -> None:
    """Raises a ValueError for a file of weights that is missing, without looking on the Hub."""
    if weights is not None and PREFERENCES[metric].file is not None and _is_file(weights):
        regular_file(weights)


def load_preference(metric: str, weights: str | None = None, reader: str | None = None) -> PreferenceModel:
    """Loads a network; what is not here is downloaded from the Hub, once.

    Args:
        metric: One of `PREFERENCES`.
        weights: File, or a folder or Hub id that holds it under its published name; for "pick_score" a folder or Hub id in
            transformers' format. None: as published. Pickles are read with `weights_only=True`.
        reader: Folder or Hub id of what reads its texts: a CLIP's tokenizer and processor of images, or BERT's tokenizer.
            None: as published.

    Raises:
        ValueError: If a file holds another network, or is damaged.
        OSError: If something is missing, naming what to get.
    """
    preference = PREFERENCES[metric]
    with _named(f"{metric} needs its weights, {preference.published} on the Hub", f"{metric}_weights"):
        found = _find_weights(preference, weights or preference.repository)
    with _named(f"{metric} needs the tokenizer of {preference.reader_repository} on the Hub", preference.reader):
        folder = local_folder(reader or preference.reader_repository, _READER_FILES)
        return preference.build(found, folder)


@contextlib.contextmanager
def _named(what: str, setting: str) -> Iterator[None]:
    """Says before an OSError what to get, and which flag names another place than the Hub."""
    try:
        yield
    except OSError as error:
        flag = f"--{setting.replace('_', '-')}"
        first = str(error).strip().splitlines()[0].rstrip(".")
        raise OSError(f"{what} ({flag} names another place): {first}.") from error


def _find_weights(preference: Preference, name: str) -> Path:
    """The file of the weights, or the folder in transformers' format."""
    if preference.file is None:
        folder = local_folder(name, ["config.json", "model*.safetensors*"])
        if has_weights(folder, ["model.safetensors"]):
            return folder
        return local_folder(name, ["config.json", "pytorch_model*.bin*"])
    if _is_file(name):
        return regular_file(name)
    files = [f"{preference.file}{suffix}" for suffix in (".safetensors", ".pt")]
    folder = local_folder(name, files)
    for file in files:
        if (folder / file).exists():
            return folder / file
    raise OSError(f"{name} has none of {', '.join(files)}.")


def preference_identity(metric: str, weights: str | None, reader: str | None) -> str:
    """What identifies a network and what reads its texts: a digest of their files, or names on the Hub."""
    preference = PREFERENCES[metric]
    return f"{_identity(weights or preference.repository)}, {_identity(reader or preference.reader_repository)}"


def _identity(name: str) -> str:
    path = Path(name)
    if path.is_dir():
        kinds = (*_SUFFIXES, ".json", ".txt")
        return digest(sorted(file for file in path.iterdir() if file.suffix in kinds))
    return digest([path]) if path.is_file() else name

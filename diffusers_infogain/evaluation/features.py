"""Feature extractors for metrics of images: Inception, CLIP and the demo model's encoder, all as `FeatureExtractor`."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from diffusers import VQModel
from PIL import Image

from ..demo.shapes import IMAGE_SIZE
from ..extras import missing
from ..tensor_files import read_safetensors, read_tensors

INCEPTION_OUTPUTS = {"pool": ("2048", 2048), "spatial": ("768", 17 * 17 * 7), "logits": ("logits_unbiased", 1008)}
"""For each output of `InceptionFeatures`: torch-fidelity's name for the features it takes, and its number of dimensions."""

_SPATIAL_CHANNELS = 7
_DEMO_MODEL = Path(__file__).parents[1] / "demo" / "model"


class FeatureExtractor(torch.nn.Module):
    """A frozen network in evaluation mode that turns uint8 images (B, 3, H, W) into float32 features (B, D).

    Subclasses define `extract`. Metrics, including torchmetrics' own, take any such module.

    Attributes:
        num_features: The number D of dimensions.
        name: The name in reports.
        input_size: Height and width in pixels that the network resizes images to, or None if it takes any size.
    """

    num_features: int
    name: str
    input_size: int | None

    def __init__(self, network: torch.nn.Module, num_features: int, name: str, input_size: int | None = None):
        super().__init__()
        self.network = network.requires_grad_(False)
        self.num_features = num_features
        self.name = name
        self.input_size = input_size
        self.eval()

    def train(self, mode: bool = True) -> FeatureExtractor:
        """Has no effect: in training mode features would depend on the batch and on dropout."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features (B, D) of images (B, 3, H, W).

        Raises:
            ValueError: If the images are not uint8 of this shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                "`images` must be uint8 of shape (B, 3, H, W), values from 0 to 255 (from floats in [0, 1]: "
                f"`(255 * images).round().byte()`), got {images.dtype} of shape {tuple(images.shape)}."
            )
        return self.extract(images).float()

    def extract(self, images: torch.Tensor) -> torch.Tensor:
        """The features of images that `forward` has checked."""
        raise NotImplementedError


@contextlib.contextmanager
def torchvision_explained() -> Iterator[None]:
    """Explains an import that fails for torchvision, which torch-fidelity needs, which torchmetrics imports if it is installed.

    A torchvision built for another torch fails with whatever its operators raise, hence `except Exception`.
    """
    try:
        yield
    except Exception as error:
        if "torchvision" not in str(error):
            raise
        raise ImportError(
            f"torch-fidelity is installed, but not the torchvision it needs that fits torch {torch.__version__} ({error})."
        ) from error


def _inception_class() -> Any:
    try:
        with torchvision_explained():
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ModuleNotFoundError as error:
        raise missing("`InceptionFeatures` needs", "torch-fidelity", "inception", error.name) from error
    return FeatureExtractorInceptionV3


def _downloaded_inception() -> Path:
    """torch-fidelity's file of FID's weights; downloaded first, to torch-fidelity's own place, if it is not there yet."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    url = URL_INCEPTION_V3
    path = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rpartition("-")[2], progress=sys.stderr.isatty())
        except OSError as error:
            raise OSError(
                f"FID's weights cannot be downloaded from {url} ({error}); with --inception-weights they can be given as a file."
            ) from error
    return path


def _load_checkpoint(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    return read_safetensors(path) if Path(path).suffix == ".safetensors" else read_tensors(path)


class InceptionFeatures(FeatureExtractor):
    """torch-fidelity's InceptionV3, with the weights of the original FID and TensorFlow 1's way of resizing.

    Args:
        output: "pool" (2048, for FID and KID), "logits" (1008, without the bias, for the Inception score) or "spatial" (2023,
            for sFID): the first 7 channels of `mixed_6/conv`, in the order (row, column, channel), as in OpenAI's evaluator
            for ADM, so that its reference files apply.
        weights: torch-fidelity's checkpoint as .pth or .safetensors; None: it is downloaded, once.

    Raises:
        ModuleNotFoundError: Without torch-fidelity.
        ImportError: Without a working torchvision, which torch-fidelity imports.
        ValueError: If `output` is unknown, or the checkpoint belongs to another network.
        OSError: If the weights cannot be downloaded or read.
    """

    def __init__(self, output: Literal["pool", "spatial", "logits"] = "pool", weights: str | os.PathLike | None = None):
        if output not in INCEPTION_OUTPUTS:
            raise ValueError(f"`output` must be one of {', '.join(INCEPTION_OUTPUTS)}, got {output!r}.")
        computed, num_features = INCEPTION_OUTPUTS[output]
        network_class = _inception_class()
        # torch-fidelity unpickles its file without restrictions, so it gets a copy of what the safe loader has read.
        source = io.BytesIO()
        torch.save(_load_checkpoint(_downloaded_inception() if weights is None else weights), source)
        source.seek(0)
        try:
            network = network_class("inception-v3-compat", [computed], feature_extractor_weights_path=source)
        except (RuntimeError, TypeError) as error:
            first = str(error).splitlines()[0]
            raise ValueError(f"`weights` must be torch-fidelity's InceptionV3 checkpoint, got {weights}: {first}") from error
        super().__init__(network, num_features, f"InceptionV3 {output} (torch-fidelity)", network.INPUT_IMAGE_SIZE)
        self.output = output

    def extract(self, images: torch.Tensor) -> torch.Tensor:
        """The chosen output of the network."""
        if self.output != "spatial":
            return self.network(images)[0]
        found: list[torch.Tensor] = []
        # TensorFlow's mixed_4 ... mixed_7 are 6b ... 6e here; its `conv` is the ReLU output of the 1x1 branch.
        network: Any = self.network
        with network.Mixed_6d.branch1x1.register_forward_hook(
            lambda module, args, output: found.append(output[:, :_SPATIAL_CHANNELS])
        ):
            self.network(images)
        return found[0].permute(0, 2, 3, 1).flatten(1)


class ClipFeatures(FeatureExtractor):
    """Projected image features of a CLIP model, and its text features.

    Pillow resizes the images even if torchvision is installed, so that figures do not depend on the installation.

    Args:
        model: Folder or Hub id in transformers' format, with weights in safetensors.

    Raises:
        OSError: If there is no such model.
    """

    def __init__(self, model: str | os.PathLike):
        try:
            network = transformers.CLIPModel.from_pretrained(model, use_safetensors=True).float()
        except OSError as error:
            first = str(error).strip().splitlines()[0].rstrip(".")
            raise OSError(f"`model` must be a folder or Hub id of a CLIP model in safetensors, got {model}: {first}.") from error
        name, size = f"CLIP image features ({Path(model).name})", network.config.vision_config.image_size
        super().__init__(network, network.config.projection_dim, name, size)
        # transformers 5 has the Pillow version under a name of its own
        processor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
        self.image_processor = processor.from_pretrained(model)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(model)

    def extract(self, images: torch.Tensor) -> torch.Tensor:
        """Image features, not normalised."""
        pictures = [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()]
        pixels = self.image_processor(pictures, return_tensors="pt")["pixel_values"]
        network: Any = self.network
        return _pooled(network.get_image_features(pixel_values=pixels.to(images.device)))

    @torch.no_grad()
    def text_features(self, texts: list[str]) -> torch.Tensor:
        """Text features (B, D), not normalised.

        Texts longer than the model's context (77 tokens for OpenAI's) are truncated before the end token, with a warning.
        """
        network: Any = self.network
        length = network.config.text_config.max_position_embeddings
        cut = sum(len(ids) > length for ids in self.tokenizer(texts, verbose=False)["input_ids"])
        if cut:
            warnings.warn(
                f"{cut} of {len(texts)} texts are longer than the {length} tokens CLIP reads, and are cut.", stacklevel=2
            )
        encoded = self.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt").to(network.device)
        ids, mask = encoded["input_ids"], encoded["attention_mask"]
        return _pooled(network.get_text_features(input_ids=ids, attention_mask=mask)).float()


def _pooled(output: Any) -> torch.Tensor:
    """transformers 4 returns the projected features, transformers 5 an output that holds them."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


class DemoFeatures(FeatureExtractor):
    """Features of the demo world's 64 x 64 images from the demo model's own VQ encoder, without a download.

    They are the 64 channels after the last down block, where the receptive field of a position is about as large as an object.
    The encoder's output would not do: it is trained to predict the nearest ideal patch, and so to ignore blur.

    Args:
        output: "pool" for the mean of each channel over the image, which reacts to missing objects, and to blurred, shifted or
            discolored ones. With 64 dimensions a few hundred images are enough for a covariance of full rank; distances are
            comparable only at the same number of images. "spatial" for the channels at all positions, which also tell where
            objects are.
    """

    def __init__(self, output: Literal["pool", "spatial"] = "pool") -> None:
        network = VQModel.from_pretrained(_DEMO_MODEL, subfolder="vqvae")
        channels = network.config.block_out_channels[-1]
        positions = (IMAGE_SIZE // 2 ** (len(network.config.block_out_channels) - 1)) ** 2
        size, name = {"pool": (channels, "channel means"), "spatial": (channels * positions, "channels")}[output]
        super().__init__(network.encoder, size, f"demo VQ encoder, {name}", IMAGE_SIZE)
        self.output = output

    def extract(self, images: torch.Tensor) -> torch.Tensor:
        """Channel means (B, 64) after the last down block, or its channels at all positions (B, D)."""
        if images.shape[2:] != (IMAGE_SIZE, IMAGE_SIZE):
            size = " x ".join(map(str, images.shape[2:]))
            raise ValueError(f"`images` must be demo images of {IMAGE_SIZE} x {IMAGE_SIZE} pixels, got {size}.")
        encoder: Any = self.network
        hidden = encoder.conv_in(images / 255)
        for block in encoder.down_blocks:
            hidden = block(hidden)
        return hidden.mean((2, 3)) if self.output == "pool" else hidden.flatten(1)

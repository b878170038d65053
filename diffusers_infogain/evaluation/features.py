"""Feature extractors for metrics of images: Inception, CLIP, DINOv2 and the demo model's encoder, all as `FeatureExtractor`."""

from __future__ import annotations

import contextlib
import io
import math
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from diffusers import VQModel
from PIL import Image

from ..demo.shapes import IMAGE_SIZE
from ..extras import missing
from ..tensor_files import read_safetensors, read_tensors

INCEPTION_OUTPUTS = {"pool": ("2048", 2048), "spatial": ("768", 17 * 17 * 7), "logits": ("logits_unbiased", 1008)}
"""For each output of `InceptionFeatures`: torch-fidelity's name for the features it takes, and its number of dimensions."""

DINOV2_MODEL = "facebook/dinov2-large"
"""The model behind published figures of FD-DINOv2, on the Hub."""
CMMD_MODEL = "openai/clip-vit-large-patch14-336"
"""The CLIP model behind published figures of CMMD, on the Hub."""

_SPATIAL_CHANNELS = 7
_DINOV2_SIZE = 224
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_DEMO_MODEL = Path(__file__).parents[1] / "demo" / "model"


def check_images(images: torch.Tensor) -> None:
    """Raises a ValueError unless the images are uint8 of shape (B, 3, H, W)."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            "`images` must be uint8 of shape (B, 3, H, W), values from 0 to 255 (from floats in [0, 1]: "
            f"`(255 * images).round().byte()`), got {images.dtype} of shape {tuple(images.shape)}."
        )


class FeatureExtractor(torch.nn.Module):
    """A frozen network in evaluation mode that turns images (B, 3, H, W) into float32 features (B, D).

    Images are uint8 of any size. An extractor that is built with `unrounded=True` takes float32 images of its own size instead,
    values from 0 to 255, which `photographs.resized(image, input_size, "clean")` makes.

    Subclasses define `extract`. Metrics, including torchmetrics' own, take any such module.

    Attributes:
        num_features: The number D of dimensions.
        name: The name in reports.
        input_size: Height and width in pixels that the network resizes images to, or None if it takes any size.
        unrounded: Whether it takes float32 images of its own size.
    """

    num_features: int
    name: str
    input_size: int | None
    unrounded: bool

    def __init__(
        self, network: torch.nn.Module, num_features: int, name: str, input_size: int | None = None, unrounded: bool = False
    ):
        super().__init__()
        self.network = network.requires_grad_(False)
        self.num_features = num_features
        self.name = name
        self.input_size = input_size
        self.unrounded = unrounded
        self.eval()

    def train(self, mode: bool = True) -> FeatureExtractor:
        """Has no effect: in training mode features would depend on the batch and on dropout."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features (B, D) of images (B, 3, H, W).

        Raises:
            ValueError: If the images are not of this type and shape.
        """
        size = self.input_size
        if self.unrounded:
            if images.dtype != torch.float32 or images.ndim != 4 or images.shape[1:] != (3, size, size):
                raise ValueError(
                    f"`images` must be float32 of shape (B, 3, {size}, {size}), values from 0 to 255, for an extractor of "
                    f"unrounded images, got {images.dtype} of shape {tuple(images.shape)}."
                )
        else:
            check_images(images)
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


def _pretrained(cls: Any, model: str | os.PathLike, kind: str) -> Any:
    """A transformers model in float32 with the weights of a folder or of a repository on the Hub, all of them.

    Raises:
        OSError: If there is no such model, or its weights are not in safetensors.
        ValueError: If it is another model than a `kind`, or tensors are missing.
    """
    check_pretrained("model", model, kind)
    try:
        network, report = cls.from_pretrained(model, use_safetensors=True, output_loading_info=True)
    except OSError as error:
        raise _no_such_model("model", model, kind, error) from error
    if report["missing_keys"]:
        names = sorted(report["missing_keys"])
        raise ValueError(f"`model` must hold all weights of a {kind} model, got {model} without {len(names)}, as {names[0]}.")
    return network.float()


def check_pretrained(argument: str, model: str | os.PathLike, kind: str) -> None:
    """Reads the configuration of a model, in a folder or on the Hub, to see whether it is there and of the right kind.

    Args:
        argument: What gave the model, for errors.
        kind: "CLIP" or "DINOv2".

    Raises:
        OSError: If there is no such model, or a folder has no weights in safetensors.
        ValueError: If it is another kind of model.
    """
    folder = Path(model)
    try:
        settings, _ = transformers.PretrainedConfig.get_config_dict(model)
    except OSError as error:
        raise _no_such_model(argument, model, kind, error) from error
    found = settings.get("model_type")
    if found is None:  # transformers takes a missing file for an empty one
        raise _no_such_model(argument, model, kind, OSError("it has no config.json that names a model type"))
    if found != kind.lower():
        raise ValueError(f"`{argument}` must be a {kind} model, got {model}, whose config.json says {found}.")
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise OSError(
            f"`{argument}` must be a folder or Hub id of a {kind} model in safetensors, got {model} without model.safetensors."
        )


def _no_such_model(argument: str, model: str | os.PathLike, kind: str, error: OSError) -> OSError:
    first = str(error).strip().splitlines()[0].rstrip(".")
    return OSError(f"`{argument}` must be a folder or Hub id of a {kind} model in safetensors, got {model}: {first}.")


def _load_checkpoint(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    return read_safetensors(path) if Path(path).suffix == ".safetensors" else read_tensors(path)


class InceptionFeatures(FeatureExtractor):
    """torch-fidelity's InceptionV3, with the weights of the original FID and TensorFlow 1's way of resizing.

    Args:
        output: "pool" (2048, for FID and KID), "logits" (1008, without the bias, for the Inception score) or "spatial" (2023,
            for sFID): the first 7 channels of `mixed_6/conv`, in the order (row, column, channel), as in OpenAI's evaluator
            for ADM, so that its reference files apply.
        weights: torch-fidelity's checkpoint as .pth or .safetensors; None: it is downloaded, once.
        unrounded: Whether images come as float32 of 299 x 299 pixels, as clean-fid resizes them.

    Raises:
        ModuleNotFoundError: Without torch-fidelity.
        ImportError: Without a working torchvision, which torch-fidelity imports.
        ValueError: If `output` is unknown, or the checkpoint belongs to another network.
        OSError: If the weights cannot be downloaded or read.
    """

    def __init__(
        self,
        output: Literal["pool", "spatial", "logits"] = "pool",
        weights: str | os.PathLike | None = None,
        unrounded: bool = False,
    ):
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
        name = f"InceptionV3 {output} (torch-fidelity)"
        super().__init__(network, num_features, name, network.INPUT_IMAGE_SIZE, unrounded)
        self.output = output

    def extract(self, images: torch.Tensor) -> torch.Tensor:
        """The chosen output of the network."""
        if self.output != "spatial":
            return self._run(images)
        found: list[torch.Tensor] = []
        # TensorFlow's mixed_4 ... mixed_7 are 6b ... 6e here; its `conv` is the ReLU output of the 1x1 branch.
        network: Any = self.network
        with network.Mixed_6d.branch1x1.register_forward_hook(
            lambda module, args, output: found.append(output[:, :_SPATIAL_CHANNELS])
        ):
            self._run(images)
        return found[0].permute(0, 2, 3, 1).flatten(1)

    def _run(self, images: torch.Tensor) -> torch.Tensor:
        network: Any = self.network
        if not self.unrounded:
            return network(images)[0]
        # torch-fidelity's network takes uint8 images only, so these take the place of what reaches its first layer.
        with network.Conv2d_1a_3x3.register_forward_pre_hook(lambda module, args: ((images - 128) / 128,)):
            return network(images.new_zeros((len(images), 3, 1, 1), dtype=torch.uint8))[0]


class ClipFeatures(FeatureExtractor):
    """Projected image features of a CLIP model, and its text features.

    Pillow resizes the images even if torchvision is installed, so that figures do not depend on the installation.

    Args:
        model: Folder or Hub id in transformers' format, with weights in safetensors.
        unrounded: Whether images come as float32 of the model's size, as clean-fid resizes them.

    Raises:
        OSError: If there is no such model.
        ValueError: If it is no CLIP model, or tensors are missing.
    """

    def __init__(self, model: str | os.PathLike, unrounded: bool = False):
        network = _pretrained(transformers.CLIPModel, model, "CLIP")
        name, size = f"CLIP image features ({Path(model).name})", network.config.vision_config.image_size
        super().__init__(network, network.config.projection_dim, name, size, unrounded)
        self.image_processor = open_image_processor(model)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(model)

    def extract(self, images: torch.Tensor) -> torch.Tensor:
        """Image features, not normalised."""
        network: Any = self.network
        if self.unrounded:
            processor = self.image_processor
            pixels = _standardised(images, processor.image_mean, processor.image_std)
            return pooled(network.get_image_features(pixel_values=pixels))
        pixels = self.image_processor(pictures_of(images), return_tensors="pt")["pixel_values"]
        return pooled(network.get_image_features(pixel_values=pixels.to(images.device)))

    @torch.no_grad()
    def text_features(self, texts: list[str]) -> torch.Tensor:
        """Text features (B, D), not normalised.

        Texts longer than the model's context (77 tokens for OpenAI's) are truncated before the end token, with a warning.
        """
        network: Any = self.network
        encoded = cut_tokens(self.tokenizer, texts, network.config.text_config.max_position_embeddings, "CLIP")
        return pooled(network.get_text_features(**encoded.to(network.device))).float()


class CmmdFeatures(ClipFeatures):
    """Normalised image features of CLIP, as CMMD takes them (Jayasumana et al. 2024, arXiv 2401.09603).

    Of images of another size the largest centred square is cut out, and resized by Pillow's bicubic filter, as the authors do.

    Args:
        model: Folder or Hub id in transformers' format, with weights in safetensors.
        unrounded: Whether images come as float32 of the model's size, as clean-fid resizes them.

    Raises:
        OSError: If there is no such model.
        ValueError: If it is no CLIP model, or tensors are missing.
    """

    def __init__(self, model: str | os.PathLike = CMMD_MODEL, unrounded: bool = False):
        super().__init__(model, unrounded)

    def extract(self, images: torch.Tensor) -> torch.Tensor:
        """Image features (B, D) of length 1."""
        size, side = self.input_size or 0, min(images.shape[2:])
        if images.shape[2:] != (size, size):
            top, left = ((length - side) // 2 for length in images.shape[2:])
            images = _by_pillow(images[..., top : top + side, left : left + side], size)
        return torch.nn.functional.normalize(super().extract(images), dim=1)


def _by_pillow(images: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 images (B, 3, H, W) at `size` x `size` pixels by Pillow's bicubic filter, squeezed if they are not square."""
    resized = [np.array(picture.resize((size, size), Image.Resampling.BICUBIC)) for picture in pictures_of(images)]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).to(images.device)


def open_image_processor(model: str | os.PathLike) -> Any:
    """The processor of images in a folder or Hub repository in transformers' format, by Pillow."""
    # transformers 5 has the Pillow version under a name of its own
    processor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    return processor.from_pretrained(model)


def pictures_of(images: torch.Tensor) -> list[Image.Image]:
    """uint8 images (B, 3, H, W) as Pillow has them."""
    return [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()]


def cut_tokens(tokenizer: Any, texts: list[str], length: int, reader: str) -> Any:
    """Token ids and mask (B, T) of texts; those with more than `length` tokens are cut before their last, with a warning."""
    cut = sum(len(ids) > length for ids in tokenizer(texts, verbose=False)["input_ids"])
    if cut:
        warnings.warn(
            f"{cut} of {len(texts)} texts are longer than the {length} tokens {reader} reads, and are cut.", stacklevel=3
        )
    encoded = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
    return transformers.BatchEncoding({name: encoded[name] for name in ("input_ids", "attention_mask")})


def pooled(output: Any) -> torch.Tensor:
    """transformers 4 returns the projected features, transformers 5 an output that holds them."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def _standardised(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Pixels from 0 to 255 scaled to [0, 1], less the mean, over the standard deviation of each channel."""
    shift, scale = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (mean, std))
    return (images / 255 - shift) / scale


class Dinov2Features(FeatureExtractor):
    """The class token of DINOv2 after its last layer norm (arXiv 2304.07193), as dgm-eval takes it for FD-DINOv2.

    Images come to 224 x 224 pixels by Pillow's bicubic filter, squeezed if they are not square, and are standardised by
    ImageNet's mean and standard deviation, whatever the model's own processor does (it crops). Position embeddings are
    interpolated as in DINOv2's own code. Stein et al. 2023 (arXiv 2306.04675) chose the ViT-L/14: `facebook/dinov2-large`.

    Args:
        model: Folder or Hub id in transformers' format, with weights in safetensors.
        unrounded: Whether images come as float32 of 224 x 224 pixels, as clean-fid resizes them (dgm-eval's `--clean_resize`).

    Raises:
        OSError: If there is no such model.
        ValueError: If it is no DINOv2 model, or tensors are missing.
    """

    def __init__(self, model: str | os.PathLike = DINOV2_MODEL, unrounded: bool = False):
        network = _pretrained(transformers.Dinov2Model, model, "DINOv2")
        embeddings = network.embeddings
        positions = _dinov2_positions(embeddings.position_embeddings.detach(), _DINOV2_SIZE // network.config.patch_size)
        embeddings.position_embeddings = torch.nn.Parameter(positions)
        name = f"DINOv2 class token ({Path(model).name})"
        super().__init__(network, network.config.hidden_size, name, _DINOV2_SIZE, unrounded)

    def extract(self, images: torch.Tensor) -> torch.Tensor:
        """The class token (B, D), normalised by the last layer norm."""
        if images.shape[2:] != (_DINOV2_SIZE, _DINOV2_SIZE):
            images = _by_pillow(images, _DINOV2_SIZE)
        network: Any = self.network
        return network(pixel_values=_standardised(images, _IMAGENET_MEAN, _IMAGENET_STD)).pooler_output


def _dinov2_positions(embeddings: torch.Tensor, side: int) -> torch.Tensor:
    """Position embeddings (1, 1 + n², D) for n = `side`, from those of another number of patches.

    DINOv2's own code adds 0.1 to the wanted side where it computes the scale, which shifts all positions a little; transformers
    interpolates without.
    """
    own = math.isqrt(embeddings.shape[1] - 1)
    if own == side:
        return embeddings
    grid = embeddings[:, 1:].reshape(1, own, own, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, scale_factor=(side + 0.1) / own, mode="bicubic")
    return torch.cat([embeddings[:, :1], grid.flatten(2).transpose(1, 2)], 1)


class DemoFeatures(FeatureExtractor):
    """Features of the demo world's 64 x 64 images from the demo model's own VQ encoder, without a download.

    They are the 64 channels after the last down block, where the receptive field of a position is about as large as an object.
    The encoder's output would not do: it is trained to predict the nearest ideal patch, and so to ignore blur.

    Args:
        output: "pool" for the mean of each channel over the image, which reacts to missing objects, and to blurred, shifted or
            discolored ones. With 64 dimensions a few hundred images are enough for a covariance of full rank; distances are
            comparable only at the same number of images. "spatial" for the channels at all positions, which also tell where
            objects are.
        unrounded: Whether images come as float32, as clean-fid resizes them.
    """

    def __init__(self, output: Literal["pool", "spatial"] = "pool", unrounded: bool = False) -> None:
        network = VQModel.from_pretrained(_DEMO_MODEL, subfolder="vqvae")
        channels = network.config.block_out_channels[-1]
        positions = (IMAGE_SIZE // 2 ** (len(network.config.block_out_channels) - 1)) ** 2
        size, name = {"pool": (channels, "channel means"), "spatial": (channels * positions, "channels")}[output]
        super().__init__(network.encoder, size, f"demo VQ encoder, {name}", IMAGE_SIZE, unrounded)
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

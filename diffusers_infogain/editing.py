"""Image to image, inpainting and outpainting: which tokens of an image are decoded anew, and which of its pixels stay."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import PIL.Image
import PIL.ImageFilter
import PIL.ImageOps
import torch
from torch.nn.functional import pad

from .candidates import uniforms
from .checks import check_integer, check_list, check_number, check_type
from .choices import MOST_BLUR, SIDES
from .printing import shown

ImageInput: TypeAlias = PIL.Image.Image | np.ndarray | torch.Tensor | Sequence[Any]
"""One image or a list of them: PIL images, arrays (H, W, 3) or (B, H, W, 3), tensors (3, H, W) or (B, 3, H, W), as floating point
in [0, 1] or as uint8."""

DEFAULT_STRENGTH = 0.5
"""Of image to image, as in diffusers."""

_DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
"""Pillow's modes of more than 8 bits, which it cannot convert to RGB without clipping."""
_STREAM = 0x5EED0FED17
"""Turns the seed of an image into another one, so that which tokens stay and what is decoded are drawn independently."""


@dataclass(frozen=True)
class EditArguments:
    """What a call edits, and how: the arguments of `InfoGainImagePipeline.__call__` of these names.

    Raises:
        ValueError: For the first argument that does not fit; what depends on the sizes of images is checked later.
    """

    image: Any
    mask_image: Any
    strength: float | None
    outpaint: Mapping[str, int] | None
    mask_coverage: float
    mask_blur: float

    def __post_init__(self) -> None:
        check_number("mask_coverage", self.mask_coverage, 0, 1)
        check_number("mask_blur", self.mask_blur, 0, MOST_BLUR)
        check_number("strength", self.strength, 0, 1, optional=True)
        if self.image is None:
            for name in ("mask_image", "strength", "outpaint"):
                if getattr(self, name) is not None:
                    raise ValueError(f"`{name}` must be None without `image`, got {shown(getattr(self, name))}.")
        if self.strength == 0:
            raise ValueError("`strength` must be above 0: at 0 nothing is decoded anew.")
        if self.mask_coverage and self.mask_image is None:
            raise ValueError(f"`mask_coverage` must be 0 without `mask_image`, got {self.mask_coverage}.")
        if self.mask_coverage == 1:
            raise ValueError("`mask_coverage` must be below 1: no token can have more than all of its pixels masked.")
        if self.mask_blur and self.mask_image is None and self.outpaint is None:
            raise ValueError(f"`mask_blur` must be 0 without `mask_image` or `outpaint`, got {self.mask_blur}.")
        if self.mask_image is None and self.image is not None:
            if self.outpaint is not None and self.strength is not None:
                raise ValueError(
                    f"`strength` must be None with `outpaint` and no `mask_image`, got {self.strength}: the padding is decoded "
                    "as a whole, and the image stays."
                )
            if self.strength == 1:
                raise ValueError("`strength` must be below 1 without `mask_image`: at 1 nothing of `image` would be kept.")

    @property
    def is_image_to_image(self) -> bool:
        """Whether a share of the whole image is decoded anew, and all of it is shown as decoded."""
        return self.mask_image is None and self.outpaint is None

    @property
    def share(self) -> float:
        """The share of the tokens in question that is decoded anew, in (0, 1]."""
        if self.strength is not None:
            return self.strength
        return DEFAULT_STRENGTH if self.is_image_to_image else 1.0

    def margins(self, unit: int) -> tuple[int, int, int, int]:
        """Pixels that are added on the left, at the top, on the right and at the bottom.

        Raises:
            ValueError: For an unknown side, or pixels that are no multiple of `unit`, a token's.
        """
        if self.outpaint is None:
            return (0, 0, 0, 0)
        check_type("outpaint", self.outpaint, Mapping, 'pixels by side, such as {"left": 64}, or None')
        for side, pixels in self.outpaint.items():
            if side not in SIDES:
                raise ValueError(f"`outpaint` must have the sides {', '.join(SIDES)} only, got {shown(side)}.")
            check_integer(f"outpaint[{side!r}]", pixels, 0)
            if pixels % unit:
                raise ValueError(f"`outpaint[{side!r}]` must be a multiple of {unit}, the pixels of a token, got {pixels}.")
        if not any(self.outpaint.values()):
            raise ValueError(f"`outpaint` must add pixels on some side, got {shown(dict(self.outpaint))}.")
        left, top, right, bottom = (self.outpaint.get(side, 0) for side in SIDES)
        return left, top, right, bottom


def _as_list(name: str, value: Any, described: str) -> list[Any]:
    kinds = (PIL.Image.Image, np.ndarray, torch.Tensor)
    return [value] if isinstance(value, kinds) else check_list(name, value, kinds, described)


def _unit_range(name: str, values: torch.Tensor) -> torch.Tensor:
    """Values of uint8 or floating point as float32 in [0, 1], on the CPU."""
    if values.dtype == torch.uint8:
        return values.cpu().float() / 255
    if values.dtype == torch.bool:
        return values.cpu().float()
    if not values.is_floating_point():
        raise ValueError(f"`{name}` must be uint8, or floating point in [0, 1], got {shown(values)}.")
    values = values.detach().cpu().float()
    if values.numel() and not bool(((values >= 0) & (values <= 1)).all()):  # NaN is not, either
        low, high = values.min().item(), values.max().item()
        raise ValueError(f"`{name}` must be floating point in [0, 1], got values from {low:g} to {high:g}.")
    return values


def _from_pil(name: str, image: PIL.Image.Image, mode: str) -> torch.Tensor:
    """(C, H, W) float32 in [0, 1]."""
    if image.mode in _DEEP_MODES:
        raise ValueError(f"`{name}` must have 8 bits per channel, got a PIL image of mode {image.mode!r}.")
    array = np.array(image.convert(mode))
    return torch.from_numpy(array[..., None] if array.ndim == 2 else array).movedim(-1, 0).float() / 255


def read_images(name: str, value: Any) -> list[torch.Tensor]:
    """The images of an `ImageInput`, each (3, H, W) float32 in [0, 1] on the CPU. Grey images get three equal channels.

    Raises:
        ValueError: For anything else, naming the argument.
    """
    described = "a PIL image, an array (H, W, 3) or (B, H, W, 3), a tensor (3, H, W) or (B, 3, H, W), or a list of them"
    images: list[torch.Tensor] = []
    for item in _as_list(name, value, described):
        if isinstance(item, PIL.Image.Image):
            images.append(_from_pil(name, item, "RGB"))
            continue
        channels = -1 if isinstance(item, np.ndarray) else -3
        if item.ndim not in (3, 4) or item.shape[channels] not in (1, 3) or 0 in item.shape:
            raise ValueError(f"`{name}` must be {described}, got {shown(item)}.")
        tensor = _unit_range(name, torch.from_numpy(item).movedim(-1, -3) if isinstance(item, np.ndarray) else item)
        images += list(tensor.expand(*tensor.shape[:-3], 3, *tensor.shape[-2:]).reshape(-1, 3, *tensor.shape[-2:]))
    return images


def read_masks(name: str, value: Any) -> list[torch.Tensor]:
    """The masks of one or several images, each (H, W) bool on the CPU: True where a value is at least a half.

    Args:
        value: As an `ImageInput`, with one channel or none; PIL images are converted to grey.

    Raises:
        ValueError: For anything else, naming the argument.
    """
    described = (
        "a PIL image, an array (H, W), (H, W, 1) or (B, H, W), a tensor (H, W), (1, H, W) or (B, 1, H, W), or a list of them"
    )
    masks: list[torch.Tensor] = []
    for item in _as_list(name, value, described):
        if isinstance(item, PIL.Image.Image):
            tensor = _from_pil(name, item, "L")
        else:
            tensor = torch.from_numpy(item) if isinstance(item, np.ndarray) else item
            channels = -1 if isinstance(item, np.ndarray) else -3
            if tensor.ndim == 4 and tensor.shape[channels] == 1:
                tensor = tensor.squeeze(channels)
            elif tensor.ndim == 3 and tensor.shape[-1] == 1:
                tensor = tensor.squeeze(-1)
            if tensor.ndim not in (2, 3) or 0 in tensor.shape:
                raise ValueError(f"`{name}` must be {described}, got {shown(item)}.")
            tensor = _unit_range(name, tensor)
        masks += list((tensor >= 0.5).reshape(-1, *tensor.shape[-2:]))
    return masks


def fit_image(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """An image (3, H, W), resized and cropped at its centre to (3, height, width); unchanged if it has that size."""
    if image.shape[1:] == (height, width):
        return image
    pil = PIL.Image.fromarray((image * 255).round().byte().movedim(0, -1).numpy())
    return _from_pil("image", PIL.ImageOps.fit(pil, (width, height), PIL.Image.Resampling.LANCZOS), "RGB")


def closest_grid(height: int, width: int, area: int) -> tuple[int, int]:
    """Rows and columns of the grid that is closest in shape to an image, among those of about `area` cells.

    These are the grids of c columns, for every c, whose rows are from area // (c + 1) to area // c, and that are at most four
    times as long as wide.
    """
    grids = [
        (rows, columns)
        for columns in range(1, area + 1)
        for rows in range(max(1, area // (columns + 1)), area // columns + 1)
        if max(rows, columns) <= 4 * min(rows, columns)
    ]

    def likeness(grid: tuple[int, int]) -> tuple[float, int, int]:
        scales = grid[1] / width, grid[0] / height
        return min(scales) / max(scales), grid[1], grid[0]

    return max(grids, key=likeness)


def digest_of(pixels: torch.Tensor) -> Any:
    """The SHA-256 of pixels in [0, 1], as bytes."""
    return hashlib.sha256((pixels * 255).round().byte().numpy().tobytes())


def fit_mask(mask: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """A mask (H, W) bool, resized and cropped as `fit_image` does; a pixel is masked if it covers any masked one."""
    if mask.shape == (height, width):
        return mask
    pil = PIL.Image.fromarray(mask.byte().numpy() * 255)
    return torch.from_numpy(np.array(PIL.ImageOps.fit(pil, (width, height), PIL.Image.Resampling.BOX))) > 0


def token_mask(mask: torch.Tensor, pixels_per_token: int, coverage: float = 0.0) -> torch.Tensor:
    """The tokens of which more than the share `coverage` of the pixels is masked: (B, H, W) bool to (B, h, w) bool."""
    cells = mask.unflatten(-1, (-1, pixels_per_token)).unflatten(-3, (-1, pixels_per_token))
    return cells.double().mean((-3, -1)) > coverage


def draw_share(cells: torch.Tensor, share: float, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """A share of the True cells (B, h, w) of every sample, at random: round(share · K) of its K, and at least one."""
    flat = cells.flatten(1)
    counts = (share * flat.sum(-1).double()).round().clamp(min=1)
    own = [torch.Generator(source.device).manual_seed(source.initial_seed() ^ _STREAM) for source in generators]
    uniform = uniforms(own, len(flat), flat.shape[1:]).to(cells.device)
    rank = uniform.masked_fill(~flat, torch.inf).argsort(-1).argsort(-1)
    return (flat & (rank < counts[:, None])).view(cells.shape)


def seam(mask: torch.Tensor, blur: float) -> torch.Tensor:
    """How much of the decoded image shows, (B, 1, H, W) float32 in [0, 1]: 1 in the mask (B, H, W), and 0 outside.

    With `blur` > 0 it falls to 0 outside the mask like a Gaussian's flank, over some 2 · `blur` pixels.
    """
    inside = mask[:, None].float()
    if not blur:
        return inside
    filtered = [
        np.array(PIL.Image.fromarray(one.byte().numpy() * 255).filter(PIL.ImageFilter.GaussianBlur(blur))) for one in mask.cpu()
    ]
    # At a straight edge the blurred mask is one half.
    outside = torch.from_numpy(np.stack(filtered))[:, None].float() / 255 * 2
    return inside.maximum(outside.clamp(max=1).to(mask.device))


@dataclass(frozen=True)
class Edit:
    """The images of a call that are edited.

    Attributes:
        tokens: (B, h, w) long, with the mask id where a token is decoded anew.
        pixels: (B, 3, H, W) float32 in [0, 1], the input on the canvas of the output.
        shows: (B, 1, H, W) float32 in [0, 1], how much of the decoded image shows. None in image to image: all of it.
        settings: The arguments of the call that are numbers, for the record.
    """

    tokens: torch.Tensor
    pixels: torch.Tensor
    shows: torch.Tensor | None
    settings: Mapping[str, Any]

    def record(self, index: int) -> dict[str, Any]:
        """What an edited image records in its file: the settings, and the digest of the input's pixels."""
        digest = digest_of(self.pixels[index])
        if self.shows is not None:
            digest.update((self.shows[index] * 255).round().byte().numpy().tobytes())
        return {"image_sha256": digest.hexdigest(), **self.settings}

    def take(self, samples: Sequence[int]) -> Edit:
        """The edit of some of the images."""
        index = list(samples)
        return replace(
            self, tokens=self.tokens[index], pixels=self.pixels[index], shows=None if self.shows is None else self.shows[index]
        )

    def paste(self, decoded: torch.Tensor) -> torch.Tensor:
        """Decoded images (B, 3, H, W) in [0, 1], with the pixels of the input where these stay; in float32, if any do."""
        if self.shows is None:
            return decoded
        decoded = decoded.float()  # half precision would change the pixels that stay
        return torch.lerp(self.pixels.to(decoded.device), decoded, self.shows.to(decoded.device))


def _check_cells(cells: torch.Tensor, share: float) -> None:
    """Raises a ValueError for the first image of which no token is to be decoded, or all are."""
    covered = cells.flatten(1)
    for index in range(len(cells)):
        of_which = f" of image {index}" if len(cells) > 1 else ""
        if not covered[index].any():
            raise ValueError(f"`mask_image` must mask something, but covers no token{of_which}.")
        if share == 1 and covered[index].all():
            raise ValueError(f"`mask_image` must leave something of `image`, but covers all tokens{of_which}.")


def begin_edit(
    arguments: EditArguments,
    encode: Callable[[torch.Tensor], torch.Tensor],
    size: tuple[int, int],
    pixels_per_token: int,
    mask_token_id: int,
    prompt_index: torch.Tensor,
    generators: Sequence[torch.Generator],
) -> Edit:
    """Encodes the images of a call and masks the tokens that are decoded anew.

    Args:
        arguments: The call's.
        encode: Pixels (K, 3, H, W) in [0, 1] to tokens (K, h, w).
        size: (height, width) of the output, in pixels.
        prompt_index: (B,) long, the number of the prompt of each image of the batch.
        generators: (B,) of the images.

    Raises:
        ValueError: If the number of images or the size of a mask does not fit, or a mask covers nothing or everything.
    """
    left, top, right, bottom = arguments.margins(pixels_per_token)
    height, width = size[0] - top - bottom, size[1] - left - right
    if height <= 0 or width <= 0:
        sides = shown(dict(arguments.outpaint or {}))
        raise ValueError(f"`outpaint` must leave room for the image in {size[1]} x {size[0]} pixels, got {sides}.")
    num_prompts = int(prompt_index.max()) + 1
    originals = read_images("image", arguments.image)
    check_count("image", originals, num_prompts)
    pixels = torch.stack([fit_image(image, height, width) for image in originals])
    tokens = _of_prompts(encode(pixels), prompt_index)
    if arguments.mask_image is None:
        masked = torch.full((len(tokens), height, width), arguments.is_image_to_image)
    else:
        masked = _of_prompts(_fitted_masks(arguments.mask_image, originals, num_prompts, height, width), prompt_index)
    # On a line of tokens the image is one cell, of which all of them are.
    cells = token_mask(masked, pixels_per_token, arguments.mask_coverage).to(tokens.device).expand(tokens.shape)
    if arguments.mask_image is not None:
        _check_cells(cells, arguments.share)
    if arguments.share < 1:
        cells = draw_share(cells, arguments.share, generators)
    margins = (left, right, top, bottom)
    in_tokens = [side // pixels_per_token for side in margins]
    return Edit(
        tokens=pad(tokens.masked_fill(cells, mask_token_id), in_tokens, value=mask_token_id),
        pixels=pad(_of_prompts(pixels, prompt_index), margins),
        shows=None if arguments.is_image_to_image else seam(pad(masked, margins, value=True), arguments.mask_blur),
        settings={
            "strength": arguments.share,
            "outpaint": None if arguments.outpaint is None else dict(arguments.outpaint),
            "mask_coverage": arguments.mask_coverage,
            "mask_blur": arguments.mask_blur,
        },
    )


def _of_prompts(values: torch.Tensor, prompt_index: torch.Tensor) -> torch.Tensor:
    """(B, ...) from one entry for all prompts, or one for each."""
    return values[prompt_index.to(values.device) if len(values) > 1 else torch.zeros_like(prompt_index, device=values.device)]


def check_count(name: str, values: Sequence[Any], num_prompts: int) -> None:
    """Raises a ValueError if there is neither one value for all prompts nor one for each."""
    if len(values) not in (1, num_prompts):
        raise ValueError(f"`{name}` must be one, or one for each of the {num_prompts} prompts, got {len(values)}.")


def _fitted_masks(mask_image: Any, originals: Sequence[torch.Tensor], num_prompts: int, height: int, width: int) -> torch.Tensor:
    """(K, H, W) bool, one mask for all prompts or one for each, fitted as their images are."""
    masks = read_masks("mask_image", mask_image)
    check_count("mask_image", masks, num_prompts)
    count = max(len(masks), len(originals))
    masks, images = ([values[0]] * count if len(values) == 1 else list(values) for values in (masks, originals))
    for mask, image in zip(masks, images, strict=True):
        if mask.shape != image.shape[1:]:
            sizes = [f"{shape[1]} x {shape[0]}" for shape in (image.shape[1:], mask.shape)]
            raise ValueError(f"`mask_image` must have the size of `image`, {sizes[0]} pixels, got {sizes[1]}.")
    return torch.stack([fit_mask(mask, height, width) for mask in masks])

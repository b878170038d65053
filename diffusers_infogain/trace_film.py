"""The film of a decoding: states of an image as frames, and frames as a file."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.features
import PIL.Image
import torch

from .checks import check_integer, check_number
from .extras import missing
from .files import replacing

SUFFIXES = (".gif", ".webp", ".mp4")
"""Of files that `save_film` writes."""
_SMALLEST = 256
"""Pixels along the longer side, below which frames are enlarged."""
_LOSSLESS = 512
"""Pixels along the longer side, up to which WebP loses nothing: borders are thin there."""
_DARK, _LIGHT, _NEW = (104, 104, 110), (136, 136, 142), (255, 149, 0)
_SECONDS, _SECONDS_IN_ALL = 0.25, 8.0


def frame_size(width: int, height: int, size: int | None) -> tuple[int, int]:
    """The size of the frames of an image, as `frames` documents it."""
    longer = max(width, height)
    if size is None:
        size = longer * math.ceil(_SMALLEST / longer)
    check_integer("size", size, 1, 2**14)
    return max(round(width * size / longer), 1), max(round(height * size / longer), 1)


def enlarged(image: PIL.Image.Image, size: int | None = None) -> PIL.Image.Image:
    """The image in the size of its frames: pixels stay sharp where it grows."""
    target = frame_size(*image.size, size)
    grows = target[0] >= image.width
    return image.convert("RGB").resize(target, PIL.Image.Resampling.NEAREST if grows else PIL.Image.Resampling.LANCZOS)


def draw_frames(
    images: Sequence[PIL.Image.Image], masked: torch.Tensor, selected: torch.Tensor, size: int | None
) -> list[PIL.Image.Image]:
    """Frames of the images of T + 1 states.

    Args:
        masked: (T + 1, h, w) bool, the cells that are masked in each state.
        selected: (T, h, w) bool, the cells that each step decoded.
        size: As in `frames`.
    """
    marked = torch.cat([torch.zeros_like(masked[:1]), selected & ~masked[1:]])
    marked[-1] = False
    return [_frame(enlarged(image, size), *cells) for image, *cells in zip(images, masked.numpy(), marked.numpy(), strict=True)]


def _frame(image: PIL.Image.Image, masked: np.ndarray, marked: np.ndarray) -> PIL.Image.Image:
    pixels = np.array(image)
    rows, columns = np.arange(image.height), np.arange(image.width)
    cell = rows[:, None] * masked.shape[0] // image.height, columns[None] * masked.shape[1] // image.width
    side = image.width / masked.shape[1]
    stripe = max(round(side / 4), 2)
    hatched = ((rows[:, None] + columns[None]) // stripe % 2).astype(bool)
    hidden = masked[cell]
    pixels[hidden & hatched] = _LIGHT
    pixels[hidden & ~hatched] = _DARK
    pixels[_border(marked[cell], max(round(side / 12), 1))] = _NEW
    return PIL.Image.fromarray(pixels)


def _border(inside: np.ndarray, width: int) -> np.ndarray:
    """The pixels of a region that have one outside of it at most `width` away, along a row or a column."""
    core = np.pad(inside, width, constant_values=False)
    for axis in (0, 1):
        core = np.logical_and.reduce([np.roll(core, shift, axis) for shift in range(-width, width + 1)])
    return inside & ~core[width:-width, width:-width]


def check_film(path: str | os.PathLike[str], seconds_per_step: float | None, seconds_at_end: float) -> None:
    """Checks what a film is to be, before its frames are made.

    Raises:
        ValueError: For another kind of file, or a number that is none.
        ModuleNotFoundError: For .mp4 without imageio-ffmpeg.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"`path` of a film must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, got {str(path)!r}.")
    if seconds_per_step is not None:
        check_number("seconds_per_step", seconds_per_step, 0.02, 60)
    check_number("seconds_at_end", seconds_at_end, 0, 600)
    if suffix == ".webp" and not PIL.features.check("webp"):
        raise ValueError(f"`path` of a film must end in .gif or .mp4 with this Pillow, which has no WebP, got {str(path)!r}.")
    if suffix == ".mp4":
        _ffmpeg()


def _ffmpeg() -> Any:
    try:
        import imageio_ffmpeg
    except ModuleNotFoundError as error:
        raise missing("Films in .mp4 need", "imageio-ffmpeg", "film", "imageio_ffmpeg") from error
    return imageio_ffmpeg


def save_film(
    frames: Sequence[PIL.Image.Image],
    path: str | os.PathLike[str],
    seconds_per_step: float | None = None,
    seconds_at_end: float = 2.0,
) -> Path:
    """Writes frames as a film, atomically; arguments as in `DecodingTrace.film`."""
    path = Path(path)
    seconds = seconds_per_step or max(min(_SECONDS, _SECONDS_IN_ALL / len(frames)), 0.02)
    with replacing(path) as file:
        if path.suffix.lower() == ".mp4":
            with tempfile.TemporaryDirectory() as folder:
                part = Path(folder) / "film.mp4"
                _write_mp4(frames, part, seconds, seconds_at_end)
                with part.open("rb") as content:
                    shutil.copyfileobj(content, file)
        else:
            milliseconds = [round(1000 * seconds)] * (len(frames) - 1) + [round(1000 * (seconds + seconds_at_end))]
            options = {"save_all": True, "append_images": frames[1:], "duration": milliseconds, "loop": 0}
            if path.suffix.lower() == ".gif":
                frames[0].save(file, "GIF", **options)
            else:
                lossless = max(frames[0].size) <= _LOSSLESS
                frames[0].save(file, "WEBP", quality=90, lossless=lossless, **options)
    return path


def _write_mp4(frames: Sequence[PIL.Image.Image], path: Path, seconds: float, seconds_at_end: float) -> None:
    # Players expect sides that are even: H.264 halves the resolution of colors.
    width, height = (side + side % 2 for side in frames[0].size)
    repeated = [*frames, *[frames[-1]] * math.ceil(seconds_at_end / seconds)]
    writer = _ffmpeg().write_frames(str(path), (width, height), fps=1 / seconds, quality=8, macro_block_size=2)
    writer.send(None)
    for frame in repeated:
        writer.send(np.ascontiguousarray(frame.resize((width, height), PIL.Image.Resampling.NEAREST)))
    writer.close()

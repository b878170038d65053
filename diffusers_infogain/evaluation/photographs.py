"""Loads photographs for feature extractors: finds them in folders, decodes, turns upright and resizes them, in batches.

Only one batch is in memory, however many images there are.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch

from ..image_files import open_image
from ..progress import Progress

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""The suffixes of files that are read as images."""
# A file's content has to be one of these, whatever its suffix: Pillow's other decoders start programs (EPS) or are rarely tested.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
# Files with these suffixes are an error: to skip them would silently measure a part of the set only.
_UNREAD_SUFFIXES = (".heic", ".heif", ".avif", ".jp2", ".jxl", ".ppm", ".pgm", ".dng", ".tga")

_FILTERS = {"bicubic": PIL.Image.Resampling.BICUBIC, "bilinear": PIL.Image.Resampling.BILINEAR}

# The pixels of a batch of images that keep their own size: somewhat more than 64 images of 299 x 299 have.
_MOST_PIXELS = 2**23
_THREADS = min(8, os.cpu_count() or 1)  # Pillow decodes outside the interpreter's lock
_LISTED = 10


def image_files(folder: Path) -> list[Path]:
    """The images in a folder and its subfolders, sorted by name. Hidden files and files of other types are skipped.

    Raises:
        ValueError: If there are no images, or images in a format that cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder of images.")
    files = sorted(_regular_files(folder))
    unread = [str(path) for path in files if path.suffix.lower() in _UNREAD_SUFFIXES]
    if unread:
        raise ValueError(f"{folder} holds {len(unread)} images in formats that are not read: {listed(unread)}.")
    paths = [path for path in files if path.suffix.lower() in SUFFIXES]
    if not paths:
        raise ValueError(f"{folder} holds no images ({', '.join(SUFFIXES)}).")
    return paths


def _regular_files(folder: Path) -> Iterator[Path]:
    """Follows links to folders, which data sets assembled from several places have, but visits each folder once."""
    visited = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        yield from (path for name in names if not name.startswith(".") and (path := Path(place, name)).is_file())


def listed(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def decode(path: Path) -> PIL.Image.Image:
    """Decodes an image as 8-bit RGB, upright by its EXIF orientation, transparency on white; of an animation the first frame.

    Of 16-bit pixels the upper 8 bits are kept, as Pillow does for colors.

    Raises:
        ValueError: If the file is missing, damaged, or of a format or pixel type that cannot be read, with its name and why.
    """
    try:
        return _as_rgb(PIL.ImageOps.exif_transpose(open_image(path, _FORMATS)))
    except MemoryError:
        raise
    except OSError as error:
        raise ValueError(f"{path} (not readable)") from error
    except _UnreadKindError as error:
        raise ValueError(f"{path} ({error})") from error
    except Exception as error:  # damaged EXIF data makes Pillow raise nearly anything
        raise ValueError(f"{path} ({'damaged' if path.exists() else 'missing'})") from error


class _UnreadKindError(ValueError):
    pass


def _as_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode == "F":
        raise _UnreadKindError("floating-point pixels")
    if image.mode.startswith("I"):
        gray = np.asarray(image)
        if gray.min() < 0 or gray.max() >= 2**16:
            raise _UnreadKindError("pixels of more than 16 bits")
        return PIL.Image.fromarray((gray // 256).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        # RGBA is the only mode that Pillow converts RGBa and La to
        white = PIL.Image.new("RGBA", image.size, "white")
        return PIL.Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def resized(image: PIL.Image.Image, size: int, resize: str) -> torch.Tensor:
    """Crops the largest centred square and resizes it to uint8 (3, size, size); "network" and the size 0 keep the image.

    "clean" is clean-fid's way (arXiv 2104.11222): Pillow's bicubic filter on the whole image, which squeezes it if it is not
    square, one channel after the other in floating point, and cut to [0, 255] but not rounded: float32 (3, size, size).
    """
    if size > 0 and resize == "clean":
        channels = [channel.convert("F").resize((size, size), PIL.Image.Resampling.BICUBIC) for channel in image.split()]
        return torch.from_numpy(np.stack([np.asarray(channel) for channel in channels]).clip(0, 255))
    if size > 0 and resize != "network":
        image = PIL.ImageOps.fit(image, (size, size), _FILTERS[resize])
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def batches(
    sources: Iterable[Path | PIL.Image.Image],
    total: int,
    sizes: Collection[int],
    resize: str,
    batch_size: int,
    description: str,
) -> Iterator[dict[int, torch.Tensor]]:
    """Yields images in their order, in batches of at most `batch_size`: for each of `sizes` a tensor (B, 3, H, W) of uint8, or of
    float32 with the resize "clean".

    With the resize "network", or the size 0 among `sizes`, a batch holds consecutive images of equal size.

    Args:
        sources: Files, or RGB images.
        sizes: Heights (and widths) to resize to; 0 for the image as it is.
        resize: One of `choices.RESIZES`.
        total: The number of sources, for the progress bar.

    Raises:
        ValueError: At the end, if some images cannot be read, naming them. After the first of them no batch is yielded.
    """
    batch: list[dict[int, torch.Tensor]] = []
    bad: list[str] = []

    def load(source: Path | PIL.Image.Image) -> dict[int, torch.Tensor] | str:
        try:
            image = decode(source) if isinstance(source, Path) else source
        except ValueError as error:
            return str(error)
        return {size: resized(image, size, resize) for size in sizes}

    remaining = iter(sources)
    with (
        ThreadPoolExecutor(_THREADS) as pool,
        Progress(total=total, desc=description, unit="image", leave=False) as progress,
    ):
        # a few at a time, since `map` on everything would decode all images far ahead of their use
        while next_sources := list(itertools.islice(remaining, _THREADS)):
            for image in pool.map(load, next_sources):
                progress.update()
                if isinstance(image, str):
                    bad.append(image)
                elif not bad:
                    if batch and not _fits(image, batch, batch_size, resize):
                        yield _stacked(batch)
                        batch = []
                    batch.append(image)
    if bad:
        raise ValueError(f"{len(bad)} of {total} images cannot be read: {listed(bad)}.")
    if batch:
        yield _stacked(batch)


def _fits(image: dict[int, torch.Tensor], batch: Sequence[dict[int, torch.Tensor]], batch_size: int, resize: str) -> bool:
    if len(batch) == batch_size:
        return False
    unchanged = [size for size in image if size == 0 or resize == "network"]
    return all(
        image[size].shape == batch[0][size].shape and (len(batch) + 1) * image[size][0].numel() <= _MOST_PIXELS
        for size in unchanged
    )


def _stacked(batch: Sequence[dict[int, torch.Tensor]]) -> dict[int, torch.Tensor]:
    return {size: torch.stack([image[size] for image in batch]) for size in batch[0]}

"""The folders of images that the scripts of benchmarks read: how files are named, and what stands beside them.

- GenEval (arXiv 2310.11513): a folder per prompt, with its line of the prompts' file.
- DPG-Bench (arXiv 2403.05135): a picture per prompt, of four images, named after the file of the prompt.
- T2I-CompBench (arXiv 2307.06350): files that are named after their prompts, with a number that counts all images.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image

from ..checks import check_choice
from ..choices import LAYOUTS
from ..image_files import open_image, read_png_metadata, save_png
from ..printing import shown

GRIDS = "grids"
"""The folder of DPG-Bench's pictures, beside that of the images."""
_IMAGES_OF_A_GRID = 4

# DPG-Bench takes what stands before the first dot for the name.
_NAME = re.compile(r"[^./\\\0]{1,200}")
_LONGEST = 240
"""Bytes of a prompt in a file name: file systems take 255 with the number and the suffix."""


def check_layout(layout: str, texts: Sequence[str], names: Sequence[Any], num_images: int) -> None:
    """Checks that a layout can hold the images of some prompts.

    Args:
        texts: The prompts.
        names: Those of their files, or None.
        num_images: Images per prompt.

    Raises:
        ValueError: If it is unknown, or for the first prompt that it cannot name a file after.
    """
    check_choice("layout", layout, LAYOUTS)
    if layout == "dpg":
        _check_dpg(texts, names, num_images)
    if layout == "t2i_compbench":
        for text in texts:
            refused = any(part in text for part in ("_", "/", "\\", "\0", "\n", ".png"))
            if refused or not 0 < len(text.encode()) <= _LONGEST:
                raise ValueError(
                    f"The layout t2i_compbench names files after prompts, which must have at most {_LONGEST} bytes, no slash, no "
                    f"underscore, no line break and no '.png', got {shown(text)}."
                )


def _check_dpg(texts: Sequence[str], names: Sequence[Any], num_images: int) -> None:
    if num_images != _IMAGES_OF_A_GRID:
        raise ValueError(
            f"`num_images` must be {_IMAGES_OF_A_GRID} for the layout dpg, a grid for every prompt, got {num_images}."
        )
    for text, name in zip(texts, names, strict=True):
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(
                "`prompts` must be a folder of .txt files for the layout dpg, whose pictures have their names, without dots, "
                f"got {shown(text)} named {shown(name)}."
            )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"`prompts` must have a name each for the layout dpg, got {shown(twice)} twice.")


def file_of(layout: str, text: str, name: Any, prompt_index: int, sample: int, index: int) -> str:
    """The file of an image relative to the folder of images.

    Args:
        text: Its prompt.
        name: That of the prompt's file, or None.
        sample: Its number among the images of its prompt.
        index: Its number among all images.
    """
    if layout == "geneval":
        return f"{prompt_index:05d}/samples/{sample:04d}.png"
    if layout == "dpg":
        return f"{name}/{sample}.png"
    if layout == "t2i_compbench":
        return f"samples/{text}_{index:06d}.png"
    return f"{index:06d}.png"


def write_grid(files: Sequence[Path], path: Path, metadata: Mapping[str, Any]) -> None:
    """Writes four images as two rows of two, unless the file is there already, with the same metadata.

    Raises:
        ValueError: If they are not squares of one size, naming the first of them.
    """
    if path.exists() and _metadata(path) == metadata:
        return
    pictures = [open_image(file, ("PNG",)).convert("RGB") for file in files]
    side = pictures[0].height
    if any(picture.size != (side, side) for picture in pictures):
        sizes = ", ".join(sorted({f"{picture.width} x {picture.height}" for picture in pictures}))
        raise ValueError(f"The layout dpg must have square images of one size, got {files[0]} and others of {sizes}.")
    grid = PIL.Image.new("RGB", (2 * side, 2 * side))
    for number, picture in enumerate(pictures):
        grid.paste(picture, (number % 2 * side, number // 2 * side))
    path.parent.mkdir(exist_ok=True)
    save_png(grid, path, metadata)


def _metadata(path: Path) -> dict[str, Any] | None:
    """What a PNG says of itself; None if it is damaged, so that it is made again."""
    try:
        return read_png_metadata(path)
    except ValueError:
        return None

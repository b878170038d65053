"""Reads prompts from files in common formats, and lists the images that a run makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checks import check_type
from ..choices import SEED_STRIDE
from ..files import parse_json, read_json, read_text
from ..printing import shown
from .layouts import check_layout, file_of

MAX_LENGTH = 100_000
"""The largest number of characters that a prompt in a file may have."""


@dataclass(frozen=True)
class Prompt:
    """A prompt, and all other fields of its line in the file."""

    text: str
    metadata: dict[str, Any] = field(default_factory=dict)


def read_prompts(path: Path, template: str = "{}") -> list[Prompt]:
    """Reads the prompts of a file, in its order, or of a folder.

    - `.jsonl`: one object per line with the key "prompt", as in GenEval's `evaluation_metadata.jsonl`; other keys are kept.
    - `.json`: a list of strings, or a mapping from class ids to names such as a model configuration's `id2label` (or the
      configuration itself). A name like "tench, Tinca tinca" is cut at its first comma.
    - Any other file is text with one prompt or class name per line; empty lines are skipped.
    - A folder has one prompt in each of its .txt files, as DPG-Bench's has; their names, in whose order they are, are kept.

    Args:
        template: A sentence around each prompt, e.g. "a photo of a {}" for class names.

    Raises:
        ValueError: For a file or folder without prompts, an invalid line, a prompt that is too long, or a template without "{}".
    """
    check_type("path", path, Path, "a pathlib.Path")
    check_type("template", template, str, "a string")
    if template.count("{}") != 1:
        raise ValueError(f"`template` must hold the place of the prompt, {{}}, once, got {shown(template)}.")
    if path.is_dir():
        prompts = [_prompt_of_file(file) for file in sorted(path.glob("*.txt"))]
    elif path.suffix == ".json":
        prompts = [Prompt(name) for name in _names(read_json(path, (list, dict)), path)]
    else:
        lines = [(number, line.strip()) for number, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
        of_line = _prompt_of_line if path.suffix == ".jsonl" else lambda line, number, path: Prompt(line)
        prompts = [of_line(line, number, path) for number, line in lines]
    if not prompts:
        raise ValueError(f"{path} holds no prompts.")
    for number, prompt in enumerate(prompts, 1):
        if len(prompt.text) > MAX_LENGTH:
            raise ValueError(f"Prompt {number} of {path} must have at most {MAX_LENGTH} characters, got {len(prompt.text)}.")
    return [Prompt(template.replace("{}", prompt.text), prompt.metadata) for prompt in prompts]


def _prompt_of_line(line: str, number: int, path: Path) -> Prompt:
    value = parse_json(line, f"Line {number} of {path}")
    if not isinstance(value.get("prompt"), str):
        raise ValueError(f'Line {number} of {path} is not a JSON object with a string "prompt".')
    return Prompt(value["prompt"], value)


def _prompt_of_file(file: Path) -> Prompt:
    text = read_text(file).strip()
    if not text:
        raise ValueError(f"{file} holds no prompt.")
    return Prompt(text, {"name": file.stem, "prompt": text})


def _names(value: Any, path: Path) -> list[str]:
    if isinstance(value, dict):
        value = value.get("id2label", value)
    if isinstance(value, dict) and all(key.isdecimal() and len(key) < 10 for key in value):
        value = [value[key] for key in sorted(value, key=int)]
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{path} must hold a list of strings or a mapping from class ids to names.")
    return [name.split(",")[0].strip() for name in value]


@dataclass(frozen=True)
class ImageRequest:
    """One image of a run: its prompt, its seed, and its file relative to the folder of images, as the run's layout has it."""

    index: int
    prompt: Prompt
    prompt_index: int
    seed: int
    file: str
    layout: str = "plain"


def requests(prompts: Sequence[Prompt], num_images: int = 1, seed: int = 0, layout: str = "plain") -> list[ImageRequest]:
    """Lists `num_images` images per prompt. Image i of the run has the seed `seed` + i, so that no two share their noise.

    Args:
        layout: "plain" (000000.png, 000001.png, ...), or that of a benchmark (see `layouts`).

    Raises:
        ValueError: For a layout that is unknown or cannot hold these prompts, `num_images` < 1, or more images than there are
            seeds between two runs.
    """
    if num_images < 1:
        raise ValueError(f"`num_images` must be an integer >= 1, got {num_images}.")
    if len(prompts) * num_images > SEED_STRIDE:
        raise ValueError(f"A run has at most {SEED_STRIDE} images, got {len(prompts)} prompts x {num_images}.")
    names = [prompt.metadata.get("name") for prompt in prompts]
    check_layout(layout, [prompt.text for prompt in prompts], names, num_images)
    found = []
    for prompt_index, prompt in enumerate(prompts):
        for sample in range(num_images):
            index = prompt_index * num_images + sample
            file = file_of(layout, prompt.text, names[prompt_index], prompt_index, sample, index)
            found.append(ImageRequest(index, prompt, prompt_index, seed + index, file, layout))
    return found

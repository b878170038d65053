"""Every reader of files on files that are damaged, or of another kind: what is read is right, or refused in one sentence."""

from __future__ import annotations

import io
import json
import pickle
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import save

from diffusers_infogain import files, image_files, tensor_files
from diffusers_infogain.evaluation import image_comparison, photographs, runs, tables, text_comparison
from diffusers_infogain.evaluation.prompts import Prompt, read_prompts, requests
from diffusers_infogain.evaluation.reference import read_reference
from diffusers_infogain.evaluation.text_cache import TextCache

METADATA = {
    **{"prompt": "a", "seed": 0, "num_decoded": [1, 1], "cost": [1.5, 0.0], "log_probability": [-1.0, 0.0], "winner": [0, 0]},
    **{"num_compared": [0, 0], "num_states": [1, 1], "num_evaluations": [2, 2], "num_passes": [1, 1]},
}
TEXT_RUN = {
    **{
        "task": "sudoku",
        "sampler": "maskgit",
        "tokens_per_step": 1,
        "seed": 0,
        "looks_ahead": False,
        "scheduler": {"top_k": None},
    },
    **{
        "right": "10",
        "cumulative_entropies": [1.0, 2.5],
        "num_states": [1, 2],
        "num_evaluations": [1, 2],
        "steps": [1, 2],
        "product_first": [None, 0.5],
    },
    **{"distinct": 2, "distinct_right": 1, "seconds": 0.5},
}
IMAGE_RUN = {
    **{"sampler": "maskgit", "steps": 2, "num_candidates": None, "guidance_scale": 1.5, "seed": 0, "looks_ahead": False},
    **{
        "num_images_per_prompt": 1,
        "scheduler": {},
        "num_states": 2.0,
        "num_evaluations": 2.0,
        "sequential_passes": 2.0,
        "cumulative_entropies": [1.0],
    },
    **{"entropy_by_step": [0.5, 1.0], "decisions_by_step": [0, 0], "other_winner_by_step": [0, 0], "seconds_per_image": 0.1},
    **{"peak_memory": None, "right": "1", "metrics": {"kid": {"identity": {}, "figures": {"KID": 1.0}}}},
}
KEPT_TEXT = {
    **{"key": "k", "text": "t", "task": "a", "doc_id": 0, "repeat": 0, "seed": 1, "max_new_tokens": 4, "num_evaluations": 2},
    **{"cumulative_entropy": 0.5, "seconds": 0.1},
}


def text(value: Any) -> bytes:
    return json.dumps(value).encode()


def archive(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def pickled(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def png() -> bytes:
    file = io.BytesIO()
    image = PIL.Image.effect_noise((8, 8), 50).convert("RGB")
    information = PIL.PngImagePlugin.PngInfo()
    information.add_text("infogain", json.dumps(METADATA))
    image.save(file, "PNG", pnginfo=information)
    return file.getvalue()


def jpeg() -> bytes:
    file = io.BytesIO()
    PIL.Image.effect_noise((8, 8), 50).convert("RGB").save(file, "JPEG")
    return file.getvalue()


def image_run(path: Path) -> None:
    image = runs.FinishedImage(requests([Prompt("a")])[0], path, image_files.read_png_metadata(path))
    image_comparison.describe_run([image])


def image_results(path: Path) -> None:
    results = image_comparison.Results(path, {"prompts": ["a"], "num_images_per_prompt": 1})
    image_comparison.image_groups(results.records)
    results.cells({"mask_token_id": 0})


def text_results(path: Path) -> None:
    tables.text_tables(text_comparison.text_groups(text_comparison.read_records(path, 2)))


def timing(path: Path) -> None:
    runs.read_timing(path.parent)


def run_settings(path: Path) -> None:
    runs.refuse_differences(path, files.read_json(path), {"prompts": ["a", "b"], "scheduler": {"top_k": 1}})


READERS: dict[str, tuple[str, bytes, Callable[[Path], Any]]] = {
    "configuration": ("config.json", text({"model_type": "x", "id2label": {"0": "a"}}), files.read_json),
    "settings": ("run.json", text({"prompts": ["a", "b"], "scheduler": {"top_k": 1}}), run_settings),
    "images": ("image.png", png(), image_run),
    "photographs": ("photo.jpg", jpeg(), photographs.decode),
    "timing": ("timing-0.jsonl", text({"images": 2, "seconds": 0.5, "peak_memory": None}) + b"\n", timing),
    "results": ("results.json", text({"summary": [], "runs": [IMAGE_RUN]}), image_results),
    "text results": ("results.jsonl", text(TEXT_RUN) + b"\n" + text(TEXT_RUN | {"seed": 1}) + b"\n", text_results),
    "kept texts": ("texts.jsonl", text(KEPT_TEXT) + b"\n" + text(KEPT_TEXT) + b"\n", TextCache),
    "prompts": ("prompts.txt", "a red circle\nein größerer Kreis\n".encode(), read_prompts),
    "prompts in lines": ("prompts.jsonl", text({"prompt": "a", "tag": 1}) + b"\n", read_prompts),
    "class names": ("classes.json", text({"id2label": {"0": "tench, Tinca", "1": "goldfish"}}), read_prompts),
    "statistics": ("statistics.npz", archive(mu=np.arange(3.0), sigma=np.eye(3)), read_reference),
    "pickled tensors": ("weights.pth", pickled({"a": torch.ones(3)}), tensor_files.read_tensors),
    "tensors": ("weights.safetensors", save({"a": torch.ones(3)}), tensor_files.read_safetensors),
}

VALUES = [None, True, -1, 0, 5, 0.5, 1e308, 10**30, "", "x", "1", [], [[]], [1], ["x"], {}, {"a": 1}, {"id2label": 5}]
WHOLE = [
    *(b"", b"\n", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"5", b"[]", b"{}", b"null", b"NaN", b"[" * 100_000, b'{"a":' * 100_000),
    *(b"1" * 100_000, b"{" + b'"a":' + b"9" * 10_000 + b"}", rb'{"a": "\ud800"}', rb'"\ud800"', b"x" * 200_000),
    *(pickle.dumps({"a": 1}), pickle.dumps([1], 0), b"(lp0\nI1\na.", b"cos\nsystem\n"),
    *(b"PK\x05\x06" + bytes(18), b"\x89PNG\r\n\x1a\n", b"\x93NUMPY\x01\x00"),
]


def changed_value(rng: random.Random, value: Any) -> Any:
    """The same JSON with one value of it replaced, removed or added."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        if rng.random() < 0.2:
            return {name: one for name, one in value.items() if name != key}
        return {**value, key: changed_value(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.6:
        place = rng.randrange(len(value))
        return [*value[:place], changed_value(rng, value[place]), *value[place + rng.randint(0, 1) :]]
    return rng.choice(VALUES)


def damaged(rng: random.Random, content: bytes, others: list[bytes]) -> bytes:
    kind = rng.randrange(7)
    if kind == 0:
        return rng.choice(WHOLE)
    if kind == 1:
        return rng.choice(others)
    if kind == 2:
        return content[: rng.randrange(len(content))]
    if kind == 3:
        place = rng.randrange(len(content))
        return content[:place] + bytes(rng.randrange(256) for _ in range(rng.randint(1, 8))) + content[place:]
    if kind == 4:
        place, size = rng.randrange(len(content)), rng.randint(1, 16)
        return content[:place] + content[place + size :]
    if kind == 5 and content.lstrip()[:1] in (b"{", b"["):
        lines = [json.loads(line) for line in content.splitlines()]
        place = rng.randrange(len(lines))
        lines[place] = changed_value(rng, lines[place])
        return b"".join(text(line) + b"\n" for line in lines)
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(len(changed))] = rng.choice([0, 255, 10, 0x80, rng.randrange(256)])
    return bytes(changed)


def fuzz(name: str, seed: int, count: int, folder: Path) -> int:
    """Reads `count` damaged files; returns how many were refused."""
    file, content, read = READERS[name]
    path, others = folder / file, [other for _, other, _ in READERS.values()]
    path.write_bytes(content)
    read(path)
    rng, refused = random.Random(f"{name} {seed}"), 0
    for _ in range(count):
        hostile = damaged(rng, content, others)
        path.write_bytes(hostile)
        begun = time.monotonic()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read(path)
        except (ValueError, OSError) as error:
            refused += 1
            problem = None if str(folder) in str(error) and len(str(error)) < 800 else error
        except Exception as error:
            problem = error
        else:
            problem = None
        if problem is not None:
            raise AssertionError(f"{type(problem).__name__} for {hostile[:300]!r}: {problem}") from problem
        assert time.monotonic() - begun < 10
    return refused


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_refused_in_one_sentence(name, tmp_path):
    assert fuzz(name, 0, 80, tmp_path) > 20


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize("name", READERS)
def test_many_damaged_files_are_refused_in_one_sentence(name, seed, tmp_path):
    fuzz(name, seed, 400, tmp_path)

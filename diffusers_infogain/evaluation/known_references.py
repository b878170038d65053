"""Statistics of real images that others publish, by name: where they come from, and how they were made.

Nothing is downloaded. A checksum stands here only if several public sources agree on it; no publisher of these files gives one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..files import regular_file

FOLDER_VARIABLE = "INFOGAIN_REFERENCES"
"""The environment variable that names the folder in which files of known statistics are looked for."""

_ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches"
_CLEAN_FID = "https://www.cs.cmu.edu/~clean-fid/stats"
_T2I = "https://github.com/boomb0om/text2image-benchmark/releases/download/v0.0.1"
_IMAGENET_TRAIN = 1_281_167


@dataclass(frozen=True)
class KnownReference:
    """Statistics of Inception's pool features in an .npz file with the keys `mu` and `sigma`.

    Attributes:
        url: Where its publisher has it; the last part is the file's name.
        num_images: How many images are behind it, or None if its publisher does not say.
        resize: How they were resized to Inception's size, one of `choices.RESIZES`.
        sha256: Of the file, where public sources agree on it.
    """

    url: str
    num_images: int | None
    resize: str
    sha256: str | None = None

    @property
    def file_name(self) -> str:
        """The name of the file as published."""
        return self.url.rpartition("/")[2]


def _clean_fid() -> Iterator[tuple[str, KnownReference]]:
    """clean-fid's data sets, resized its own way, and as TensorFlow 1 does ("legacy")."""
    sets: dict[str, tuple[tuple[int, ...], dict[str, int]]] = {
        "cifar10": ((32,), {"train": 50_000, "test": 10_000}),
        "ffhq": ((256, 1024), {"trainval": 50_000, "trainval70k": 70_000}),
        "lsun_church": ((256,), {"train": 50_000}),
        "lsun_horse": ((256,), {"train": 50_000}),
        "lsun_cat": ((256,), {"train": 50_000, "trainfull": 1_657_264}),
        "afhq_cat": ((512,), {"train": 5153}),
        "afhq_dog": ((512,), {"train": 4739}),
        "afhq_wild": ((512,), {"train": 4738}),
        "brecahad": ((512,), {"train": 1944}),
        "metfaces": ((1024,), {"train": 1336}),
        "horse2zebra": ((256,), {"test": 140}),
        "cat2dog": ((256,), {"test": 500}),
    }
    modes = (("clean-fid", "clean", "clean"), ("clean-fid-legacy", "legacy_tensorflow", "network"))
    for name, (sizes, splits) in sets.items():
        for size in sizes:
            for split, count in splits.items():
                for prefix, mode, resize in modes:
                    url = f"{_CLEAN_FID}/{name}_{mode}_{split}_{size}.npz"
                    yield f"{prefix}-{name.replace('_', '-')}-{split}-{size}", KnownReference(url, count, resize)


KNOWN_REFERENCES: dict[str, KnownReference] = {
    "adm-imagenet64": KnownReference(f"{_ADM}/imagenet/64/VIRTUAL_imagenet64_labeled.npz", _IMAGENET_TRAIN, "network"),
    "adm-imagenet128": KnownReference(f"{_ADM}/imagenet/128/VIRTUAL_imagenet128_labeled.npz", _IMAGENET_TRAIN, "network"),
    "adm-imagenet256": KnownReference(
        f"{_ADM}/imagenet/256/VIRTUAL_imagenet256_labeled.npz",
        _IMAGENET_TRAIN,
        "network",
        "b32732719497e42660a9affb4a966068cba0855ac449b82015e34ec376d20758",
    ),
    "adm-imagenet512": KnownReference(f"{_ADM}/imagenet/512/VIRTUAL_imagenet512.npz", _IMAGENET_TRAIN, "network"),
    "adm-lsun-bedroom256": KnownReference(f"{_ADM}/lsun/bedroom/VIRTUAL_lsun_bedroom256.npz", None, "network"),
    "adm-lsun-cat256": KnownReference(f"{_ADM}/lsun/cat/VIRTUAL_lsun_cat256.npz", None, "network"),
    "adm-lsun-horse256": KnownReference(f"{_ADM}/lsun/horse/VIRTUAL_lsun_horse256.npz", None, "network"),
    "t2i-coco30k": KnownReference(f"{_T2I}/MS-COCO_val2014_fid_stats.npz", 30_000, "bicubic"),
    **dict(_clean_fid()),
}
"""By name: those of OpenAI's evaluator for ADM, which hold `mu_s` and `sigma_s` for sFID too; of text2image-benchmark for FID-30k
on COCO; and of clean-fid, for its own resizing and, with "legacy", for TensorFlow 1's."""


def find_file(name: str, given: Path | None) -> Path:
    """The file of known statistics: the one given, or the one by its published name in a folder.

    Args:
        given: The file, or a folder that holds it; None: the folder that the environment variable names.

    Raises:
        ValueError: If it is not there, or is another file than its checksum says.
    """
    known = KNOWN_REFERENCES[name]
    folder = os.environ.get(FOLDER_VARIABLE)
    if given is None and not folder:
        raise ValueError(
            f"`reference_file` must be given for {name}, or the folder of its file in ${FOLDER_VARIABLE}: download {known.url}."
        )
    path = Path(folder or "") if given is None else given
    if path.is_dir():
        path = path / known.file_name
    if not path.exists():
        raise ValueError(f"`reference_file` must be the file of {name}, got {path}, which is missing: download {known.url}.")
    if known.sha256 is not None and sha256(path) != known.sha256:
        raise ValueError(f"`reference_file` must have the SHA-256 {known.sha256} of {name}, got {path} with {sha256(path)}.")
    return path


def sha256(path: Path) -> str:
    """The SHA-256 of a file, computed again only after it has changed: some have 2 GB.

    Raises:
        ValueError: If it is no regular file.
    """
    state = regular_file(path).stat()
    return _sha256_once(path, state.st_mtime_ns, state.st_size)


@cache
def _sha256_once(path: Path, time: int, size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

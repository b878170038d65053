"""The 1000 classes of ImageNet (ILSVRC 2012) by name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import cache

from ..checks import is_integer
from ..printing import shown
from .imagenet_names import NAMES

NUM_CLASSES = 1000


@cache
def _names() -> tuple[str, ...]:
    return tuple(" ".join(NAMES.split()).split("; "))


@cache
def _ids_by_lemma() -> dict[str, list[int]]:
    """The ids of the classes with a given name, for all names in lower case."""
    ids: dict[str, list[int]] = {}
    for class_id, name in enumerate(_names()):
        for lemma in name.lower().split(", "):
            ids.setdefault(lemma, []).append(class_id)
    return ids


def imagenet_class_name(class_id: int) -> str:
    """All names of a class, such as "tench, Tinca tinca" for 0.

    Raises:
        ValueError: For an id outside [0, 999].
    """
    return _names()[_checked_id(class_id)]


def imagenet_class_ids(labels: str | int | Sequence[str | int]) -> list[int]:
    """The ids of classes, each given by id (207 or "207"), by one of its names, or by all names as in `imagenet_class_name`.

    Case does not matter.

    Raises:
        ValueError: For an unknown name, a name that several classes share, or an id outside [0, 999].
    """
    if isinstance(labels, (str, int)):
        labels = [labels]
    return [_class_id(label) for label in labels]


def _checked_id(class_id: int) -> int:
    if not is_integer(class_id) or not 0 <= class_id < NUM_CLASSES:
        raise ValueError(
            f"`class_labels`: the id of an ImageNet class must be an integer in [0, {NUM_CLASSES - 1}], got {shown(class_id)}."
        )
    return class_id


def _class_id(label: str | int) -> int:
    if not isinstance(label, str):
        return _checked_id(label)
    wanted = " ".join(label.lower().split())
    if wanted.isdecimal():
        return _checked_id(int(wanted))
    ids = _ids_by_lemma().get(wanted) or [i for i, name in enumerate(_names()) if name.lower() == wanted]
    if len(ids) == 1:
        return ids[0]
    if ids:
        meanings = "; ".join(f"{i} ({imagenet_class_name(i)})" for i in ids)
        raise ValueError(f"`class_labels`: {label!r} is the name of several ImageNet classes: give an id, one of {meanings}.")
    nearest = difflib.get_close_matches(wanted, _ids_by_lemma(), cutoff=0.5)
    hint = f": did you mean {', '.join(map(repr, nearest))}?" if nearest else "."
    raise ValueError(f"`class_labels`: {shown(label)} is not the name of an ImageNet class{hint}")

#!/usr/bin/env python
"""Draws five icon sets as pictures of 64 x 64 pixels with captions, in splits: the emoji world.

    python examples/emoji/world.py --sets noto twemoji emojione fluent-emoji-flat fxemoji --output runs/emoji

`--sets` are unpacked packages of npm (`@iconify-json/noto` and so on), each with an `icons.json`; docs/emoji.md has the commands.
Writes `pictures.npy` (N, 64, 64, 3) of bytes, and `world.json`: the set, name, skin tone, caption and split of each picture.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from tqdm.auto import tqdm

from diffusers_infogain.choices import SPLITS
from diffusers_infogain.extras import missing
from diffusers_infogain.files import read_json, replacing, save_json

IMAGE_SIZE = 64
SKIN_TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
# Shares of the units that are held out.
HELD_OUT_PAIRS = 0.06
HELD_OUT_TONES = 0.08
HELD_OUT_NAMES = 0.03

_TONE = "medium-light|medium-dark|light|medium|dark"


@dataclass(frozen=True)
class Picture:
    """What a picture shows.

    Args:
        icon: Its key in the set's file.
        name: What it shows, the same in all sets, such as "woman firefighter".
        tone: One of `SKIN_TONES`, or None.
        split: "train"; or one of `SPLITS` for a known name, or such a split with " unseen" for a name held out altogether.
    """

    set: str
    icon: str
    name: str
    tone: str | None
    split: str = "train"

    @property
    def caption(self) -> str:
        """Such as "woman firefighter, medium-dark skin tone, noto style"."""
        tone = [f"{self.tone} skin tone"] if self.tone else []
        return ", ".join([self.name, *tone, f"{self.set} style"])


def parse_icon(icon: str, icons: Iterable[str]) -> tuple[str, str | None] | None:
    """The name and the skin tone of an icon among those of its set; None if it has several skin tones.

    Most sets write "-medium-dark-skin-tone", one of them only "-medium-dark" after the key of the icon without it.
    """
    tones = re.findall(rf"-({_TONE})-skin-tone", icon)
    name = re.sub(rf"-({_TONE})-skin-tone", "", icon)
    if len(tones) > 1:
        return None
    short = re.fullmatch(rf"(.+?)-({_TONE})", icon)
    if short and short[1] in icons:
        name, tones = short[1], [short[2]]
    name = re.sub(r"^flag-for-(flag-)?", "flag-", name).replace("blonde", "blond")
    return name.replace("-", " "), tones[0] if tones else None


def name_pictures(sets: dict[str, dict[str, Any]]) -> list[Picture]:
    """The pictures of all names that at least two sets draw, sorted.

    A set that writes names without hyphens takes its names from the others. Icons marked as hidden are former versions.
    """
    found: list[Picture] = []
    for name, content in sets.items():
        for icon, entry in content["icons"].items():
            parsed = parse_icon(icon, content["icons"])
            if parsed and not entry.get("hidden"):
                found.append(Picture(name, icon, *parsed))
    spelled = {picture.name.replace(" ", ""): picture.name for picture in found if " " in picture.name}
    found = [Picture(p.set, p.icon, spelled.get(p.name, p.name), p.tone) for p in found]
    drawn_by = Counter(name for name, _ in {(p.name, p.set) for p in found})
    kept = [picture for picture in found if drawn_by[picture.name] > 1]
    return sorted(kept, key=lambda p: (p.set, -drawn_by[p.name], p.name, p.tone or "", p.icon))


def unit(seed: int, *words: str | None) -> float:
    """A number in [0, 1) that depends on nothing but the arguments."""
    return int.from_bytes(hashlib.blake2b(repr((seed, words)).encode(), digest_size=6).digest()) / 2**48


def split_of(picture: Picture, seed: int) -> str:
    """The split of a picture: names, pairs of name and set, and triples with a skin tone are held out, each as a whole."""

    def one_of_three(*words: str | None) -> str:
        return SPLITS[int(len(SPLITS) * unit(seed + 1, *words))]

    if unit(seed, picture.name) < HELD_OUT_NAMES:
        return f"{one_of_three(picture.name)} unseen"
    if unit(seed, picture.name, picture.set) < HELD_OUT_PAIRS:
        return one_of_three(picture.name, picture.set)
    if picture.tone and unit(seed, picture.name, picture.set, picture.tone) < HELD_OUT_TONES:
        return one_of_three(picture.name, picture.set, picture.tone)
    return "train"


def svg(content: dict[str, Any], icon: str) -> str:
    """A square SVG with the icon in its middle; sizes are those of the icon, else of its set."""

    def size(key: str, default: float) -> float:
        return content["icons"][icon].get(key, content.get(key, default))

    width, height = size("width", 16), size("height", 16)
    side = max(width, height)
    corner = f"{size('left', 0) - (side - width) / 2} {size('top', 0) - (side - height) / 2}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{IMAGE_SIZE}" height="{IMAGE_SIZE}" viewBox="{corner} {side} {side}">{content["icons"][icon]["body"]}</svg>'
    )


def draw(text: str) -> np.ndarray:
    """An SVG on white, (64, 64, 3) bytes."""
    try:
        import resvg_py
    except ModuleNotFoundError as error:
        raise missing("Drawing icons needs", "resvg-py", "emoji", error.name) from error
    png = bytes(resvg_py.svg_to_bytes(svg_string=text, background="#ffffff", skip_system_fonts=True))
    return np.asarray(PIL.Image.open(io.BytesIO(png)).convert("RGB"))


def read_set(folder: Path) -> dict[str, Any]:
    """The contents of a package's `icons.json`."""
    path = folder / "icons.json"
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("icons"), dict) or "prefix" not in content:
        raise ValueError(f"{path} must be the `icons.json` of a package @iconify-json/NAME.")
    return content


def make_world(folders: Sequence[Path], seed: int) -> tuple[np.ndarray, list[Picture]]:
    """The pictures (N, 64, 64, 3) of the packages in the folders, and what they show; equal ones in a set are one."""
    contents = [read_set(folder) for folder in folders]
    sets = {content["prefix"].split("-")[0]: content for content in contents}
    drawn: dict[tuple[str, bytes], tuple[np.ndarray, Picture]] = {}
    for picture in tqdm(name_pictures(sets), desc="draw", mininterval=5):
        pixels = draw(svg(sets[picture.set], picture.icon))
        drawn.setdefault((picture.set, pixels.tobytes()), (pixels, picture))
    pictures = [Picture(p.set, p.icon, p.name, p.tone, split_of(p, seed)) for _, p in drawn.values()]
    return np.stack([pixels for pixels, _ in drawn.values()]), pictures


def load_world(folder: Path) -> tuple[np.ndarray, list[Picture]]:
    """The pictures and what they show, as `make_world` gives them, from the files in the folder."""
    pictures = [
        Picture(**{key: p[key] for key in Picture.__dataclass_fields__}) for p in read_json(folder / "world.json")["pictures"]
    ]
    # Not `np.load`, which takes pickles into account.
    return np.array(np.lib.format.open_memmap(folder / "pictures.npy", mode="r")), pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sets", type=Path, nargs="+", required=True, help="folders of unpacked @iconify-json packages")
    parser.add_argument("--output", type=Path, default=Path("runs/emoji"), help="folder of the world")
    parser.add_argument("--seed", type=int, default=0, help="of the splits")
    args = parser.parse_args()
    pixels, pictures = make_world(args.sets, args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    with replacing(args.output / "pictures.npy") as file:
        np.save(file, pixels)
    records = [asdict(picture) | {"caption": picture.caption} for picture in pictures]
    save_json({"seed": args.seed, "image_size": IMAGE_SIZE, "pictures": records}, args.output / "world.json")
    print(f"{len(pictures)} pictures of {len({p.name for p in pictures})} names:")
    for key, count in sorted(Counter((p.split, p.set) for p in pictures).items()):
        print(*key, count)
    print(json.dumps(Counter(p.split for p in pictures)))


if __name__ == "__main__":
    main()

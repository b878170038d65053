"""Runs that make many images, over several processes if wanted, and go on where they were killed."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from tqdm.auto import tqdm

from ..files import METADATA_KEY, save_json, save_png, save_text
from .photographs import listed
from .prompts import ImageRequest

MakeImages = Callable[[list[str], list[int]], tuple[list[PIL.Image.Image], list[dict[str, Any]]]]
"""Prompts and seeds to images and, per image, what is known about how it was made (kept in the file, so JSON)."""


@dataclass(frozen=True)
class Process:
    """Which of how many processes this is."""

    index: int = 0
    count: int = 1


def check_settings(output: Path, settings: dict[str, Any]) -> None:
    """Records what a run is, in a folder's run.json or beside a file; an output that holds another run is refused.

    Raises:
        ValueError: If it does, naming the first setting that differs.
    """
    path, settings = output / "run.json", json.loads(json.dumps(settings))
    if not output.is_dir():
        path = output.with_name(f"{output.name}.run.json")
    if not path.exists():
        save_json(settings, path)
        return
    for name, found, asked in _differences(json.loads(path.read_text(encoding="utf-8")), settings):
        raise ValueError(
            f"{output} holds a run with another `{name}`: {_short(found)} there, {_short(asked)} now. "
            "Choose another output, or the same settings to go on with that run."
        )


def _differences(found: dict[str, Any], settings: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in sorted(found.keys() | settings.keys()):
        before, now = found.get(name), settings.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            yield from ((f"{name} {inner}", *rest) for inner, *rest in _differences(before, now))
        elif before != now:
            yield name, before, now


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def read_metadata(path: Path) -> dict[str, Any] | None:
    """What a PNG of a run says about itself; None if the file is missing, damaged or not of a run."""
    try:
        with PIL.Image.open(path) as image:
            image.load()
            return json.loads(image.text[METADATA_KEY])  # type: ignore[attr-defined]
    except (OSError, SyntaxError, KeyError, ValueError, AttributeError):
        return None


def _finished(folder: Path, request: ImageRequest) -> bool:
    path = folder / "images" / request.file
    metadata = read_metadata(path)
    if metadata is None and path.exists():
        tqdm.write(f"{path} is damaged and is made again.", file=sys.stderr)
    return metadata is not None and metadata["seed"] == request.seed and metadata["prompt"] == request.prompt.text


def make_missing(
    every: Sequence[ImageRequest],
    make: MakeImages,
    folder: Path,
    batch_size: int,
    process: Process = Process(),
    description: str = "images",
) -> None:
    """Makes those images of a run that are not on disk yet, each written as soon as its batch is done.

    Batches are always the same ones, and a batch of which any image is missing is made as a whole: kernels may round otherwise
    in a batch of another size, and a run that was killed has to end with the bits of one that was not. For the same reason
    processes share out whole batches.
    """
    batches = [every[first : first + batch_size] for first in range(0, len(every), batch_size)]
    with tqdm(total=sum(map(len, batches[process.index :: process.count])), desc=description, unit="image") as progress:
        for batch in batches[process.index :: process.count]:
            missing = [request for request in batch if not _finished(folder, request)]
            if missing:
                watch = _Watch()
                images, records = make([request.prompt.text for request in batch], [request.seed for request in batch])
                watch.record(folder / f"timing-{process.index}.jsonl", len(batch))
                for request, image, record in zip(batch, images, records, strict=True):
                    if request in missing:
                        path = folder / "images" / request.file
                        path.parent.mkdir(parents=True, exist_ok=True)
                        save_png(image, path, {"prompt": request.prompt.text, "seed": request.seed, **record})
            progress.update(len(batch))


class _Watch:
    """Seconds, and the most memory held meanwhile: of the GPU where there is one, else of the process (on Linux)."""

    def __init__(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        elif _CLEAR_PEAK.exists():
            _CLEAR_PEAK.write_text("5")
        self.start = time.perf_counter()

    def record(self, path: Path, num_images: int) -> None:
        memory = None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            memory = torch.cuda.max_memory_allocated()
        elif _CLEAR_PEAK.exists():
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            memory = 1024 * int(status["VmHWM"].split()[0])
        seconds = time.perf_counter() - self.start
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"images": num_images, "seconds": seconds, "peak_memory": memory}) + "\n")


_CLEAR_PEAK = Path("/proc/self/clear_refs")  # writing 5 makes the peak of the resident memory start anew


@dataclass
class Timing:
    """Seconds per image, and the peak memory in bytes of the process that needed most (None where it is not known)."""

    seconds_per_image: float
    peak_memory: int | None


def read_timing(folder: Path) -> Timing:
    """What making the images took, over all processes and interruptions.

    Raises:
        ValueError: If nothing was recorded.
    """
    lines = [line for path in sorted(folder.glob("timing-*.jsonl")) for line in path.read_text().splitlines()]
    records = [record for record in map(_complete, lines) if record]
    if not records:
        raise ValueError(f"{folder} holds no timing records (timing-*.jsonl).")
    return Timing(
        sum(record["seconds"] for record in records) / sum(record["images"] for record in records),
        max((record["peak_memory"] for record in records if record["peak_memory"] is not None), default=None),
    )


def _complete(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except ValueError:  # the last line of a process that was killed
        return None


@dataclass
class FinishedImage:
    """An image of a run, with what its file says about how it was made."""

    request: ImageRequest
    path: Path
    metadata: dict[str, Any]


def finish(every: Sequence[ImageRequest], folder: Path) -> list[FinishedImage]:
    """Checks that every image of a run is there and readable, and lists them in images.jsonl.

    Raises:
        ValueError: If not, naming the files.
    """
    images, bad = [], []
    for request in every:
        path = folder / "images" / request.file
        metadata = read_metadata(path)
        if metadata is None:
            bad.append(f"{path} ({'damaged' if path.exists() else 'missing'})")
        else:
            images.append(FinishedImage(request, path, metadata))
    if bad:
        raise ValueError(f"{len(bad)} of {len(every)} images cannot be read: {listed(bad)}.")
    lines = [json.dumps({"file": i.request.file, **i.metadata, **_extra(i.request)}) for i in images]
    save_text("".join(line + "\n" for line in lines), folder / "images.jsonl")
    for image in images:
        if image.request.file.count("/"):
            metadata = image.request.prompt.metadata or {"prompt": image.request.prompt.text}
            save_text(json.dumps(metadata) + "\n", image.path.parent.parent / "metadata.jsonl")
    return images


def _extra(request: ImageRequest) -> dict[str, Any]:
    return {"metadata": request.prompt.metadata} if request.prompt.metadata else {}

"""Making many images, shared among processes: with `generate_images`, or on disk with `make_run`, which resumes a run that was
killed."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image
import torch
from tqdm.auto import tqdm

from ..files import append_json_lines, check_fields, cut_unfinished, read_json, read_json_lines, save_json, save_text
from ..image_files import read_png_metadata, save_png
from ..processes import ALONE, Processes, batches_of
from ..trace import DecodingTrace
from .layouts import GRIDS, write_grid
from .machine import PeakMemory, wait_for
from .photographs import listed
from .prompts import ImageRequest

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

MakeImages = Callable[[list[str], list[int]], tuple[list[PIL.Image.Image], list[dict[str, Any]]]]
"""Prompts and seeds to images and, per image, a record for JSON of how it was made, which its file keeps."""


@dataclass
class Generated:
    """Images and what they took; their traces, which grow with every token, are not kept.

    Attributes:
        images: N of them, or what `finished` returned for each.
        seeds: Those of the images.
        num_states: (N,) long, states that went through the model.
        num_evaluations: (N,) long, NFE: rows of the network, two for a guided state.
        sequential_passes: (N,) long, sequential forward passes.
        cumulative_entropy: (N,) float32, H~ in nats.
        seconds: For all of them.
    """

    images: list[Any]
    seeds: list[int]
    num_states: torch.Tensor
    num_evaluations: torch.Tensor
    sequential_passes: torch.Tensor
    cumulative_entropy: torch.Tensor
    seconds: float


def generate_images(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    batch_size: int,
    description: str,
    finished: Callable[[int, PIL.Image.Image], Any] | None = None,
    processes: Processes = ALONE,
    **call: Any,
) -> Generated:
    """One image per prompt and seed, in batches, under one progress bar. An image depends only on its own prompt and seed.

    Args:
        description: Shown beside the progress bar.
        finished: Called with the index and the image after every image, by the process that made it. What it returns is kept
            in place of the image, and has to be JSON if there are several processes.
        processes: Those that share the work. Only the main process gets all images and their figures, the others get none.
        call: Further arguments of the pipeline's call.
    """
    pipe.set_progress_bar_config(disable=True)

    def make(batch: list[int]) -> tuple[list[Any], ...]:
        images, trace = _call(pipe, [prompts[index] for index in batch], [seeds[index] for index in batch], call)
        kept = images if finished is None else [finished(index, image) for index, image in zip(batch, images, strict=True)]
        rows = (trace.num_states.sum(0), trace.num_evaluations.sum(0), trace.sequential_passes, trace.cumulative_entropy)
        return kept, *(row.tolist() for row in rows)

    start = time.perf_counter()
    columns: tuple[list[Any], ...] = ([], [], [], [], [])
    for made in processes.map(make, batches_of(range(len(prompts)), batch_size), description, "image"):
        for column, values in zip(columns, made, strict=True):
            column += values
    every, states, evaluations, passes, entropies = columns
    counts = [torch.tensor(values, dtype=torch.long) for values in (states, evaluations, passes)]
    return Generated(every, list(seeds), counts[0], counts[1], counts[2], torch.tensor(entropies), time.perf_counter() - start)


def _call(
    pipe: DiffusionPipeline, prompts: Sequence[str], seeds: Sequence[int], call: dict[str, Any]
) -> tuple[list[PIL.Image.Image], DecodingTrace]:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(list(prompts), generator=generators, return_dict=False, **call)


def check_settings(output: Path, settings: dict[str, Any], begun: bool = False) -> None:
    """Records the settings of a run in the run.json of a folder, or beside a file, and refuses an output with another run.

    The version of this package counts as a setting.

    Args:
        begun: Whether the output already has results, which need a record of how they were made.

    Raises:
        ValueError: If the output holds another run, naming the first setting that differs, or if its record is missing or
            damaged.
    """
    from .. import __version__

    settings = json.loads(json.dumps({**settings, "version": __version__}))
    path = output / "run.json" if output.is_dir() else output.with_name(f"{output.name}.run.json")
    if not begun and not output.is_dir():
        path.unlink(missing_ok=True)  # left behind by an output that was removed
    if path.exists():
        refuse_differences(output, read_json(path), settings)
    elif begun:
        raise ValueError(f"{path}, which would say how {output} was made, is missing: choose another output.")
    else:
        save_json(settings, path)


def refuse_differences(output: Path | str, found: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raises a ValueError that names the first setting in which an output differs from the present ones."""
    for name, before, now in _differences(found, settings):
        there, here = excerpts(before, now)
        raise ValueError(
            f"{output} holds a run with another {name}: {there} there, {here} now. "
            "Choose another output, or the same settings to go on with that run."
        )


def _differences(found: dict[str, Any], settings: dict[str, Any], outer: str = "") -> Iterator[tuple[str, Any, Any]]:
    for name in sorted(found.keys() | settings.keys()):
        before, now, full = found.get(name), settings.get(name), f"{outer}{name}"
        if isinstance(before, dict) and isinstance(now, dict):
            yield from _differences(before, now, f"{full} ")
        elif before != now and full == "prompts" and isinstance(before, list) and isinstance(now, list):
            pairs = enumerate(zip(before, now, strict=False), 1)
            number, pair = next(((number, pair) for number, pair in pairs if pair[0] != pair[1]), (0, (len(before), len(now))))
            yield f"`prompts` number {number}" if number else "number of `prompts`", *pair
        elif before != now:
            yield f"`{full}`", before, now


def excerpts(first: Any, second: Any, length: int = 80) -> tuple[str, str]:
    """Two values as JSON, cut to at most `length` characters around the first one in which they differ."""
    texts = [json.dumps(value, ensure_ascii=False) for value in (first, second)]
    shared = next((index for index, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    start = max(0, shared - length // 2) if max(map(len, texts)) > length else 0
    before = "..." if start > 0 else ""
    cut = [f"{before}{text[start : start + length]}{'...' if start + length < len(text) else ''}" for text in texts]
    return cut[0], cut[1]


def _finished(folder: Path, request: ImageRequest) -> bool:
    """Whether the file of an image exists and is complete.

    Raises:
        ValueError: If it holds another image.
    """
    path = folder / "images" / request.file
    if not path.exists():
        return False
    try:
        metadata = read_png_metadata(path)
    except ValueError:
        tqdm.write(f"{path} is damaged and is made again.", file=sys.stderr)
        return False
    _check_image(path, metadata, request)
    return True


def _check_image(path: Path, metadata: dict[str, Any], request: ImageRequest) -> None:
    for name, expected in (("prompt", request.prompt.text), ("seed", request.seed)):
        if metadata.get(name) != expected:
            there, here = excerpts(metadata.get(name), expected)
            raise ValueError(f"{path} is not of this run: its `{name}` is {there}, that of the run is {here}.")


def make_missing(
    requests: Sequence[ImageRequest],
    make: MakeImages,
    folder: Path,
    batch_size: int,
    processes: Processes = ALONE,
    description: str = "images",
) -> None:
    """Makes those images of a run that are not on disk yet, and writes each as soon as its batch is done.

    The main process returns when all of them are there, the others as soon as nothing is left for them to do.

    Batches are always the same, and a batch with any image missing is made as a whole: kernels may round differently in a batch
    of another size, and a run that was killed has to end with the same bits as one that was not. For the same reason processes
    share whole batches.
    """
    timing = folder / f"timing-{processes.index}.jsonl"
    cut_unfinished(timing, _TIMING)

    def make_batch(batch: list[ImageRequest]) -> None:
        missing = [request for request in batch if not _finished(folder, request)]
        if not missing:
            return
        watch = _Watch()
        images, records = make([request.prompt.text for request in batch], [request.seed for request in batch])
        watch.record(timing, len(batch))
        for request, image, record in zip(batch, images, records, strict=True):
            if request in missing:
                path = folder / "images" / request.file
                path.parent.mkdir(parents=True, exist_ok=True)
                save_png(image, path, {"prompt": request.prompt.text, "seed": request.seed, **record})

    for _ in processes.map(make_batch, batches_of(requests, batch_size), description, "image"):
        pass


def make_run(
    pipe: DiffusionPipeline,
    requests: Sequence[ImageRequest],
    folder: Path,
    processes: Processes,
    batch_size: int,
    description: str,
    call: dict[str, Any],
) -> None:
    """Makes the missing images of a run with a pipeline, as `make_missing`.

    Args:
        call: Further arguments of the pipeline's call.
    """
    pipe.set_progress_bar_config(disable=True)

    def make(prompts: list[str], seeds: list[int]) -> tuple[list[PIL.Image.Image], list[dict[str, Any]]]:
        images, trace = _call(pipe, prompts, seeds, call)
        drawn = [{"trace": trace.of_sample(sample).record()} for sample in range(len(images))]
        return images, [record | own for record, own in zip(trace.records(), drawn, strict=True)]

    make_missing(requests, make, folder, batch_size, processes, description)


class _Watch:
    """Measures seconds and peak memory: the GPU's if there is one, else the process's (on Linux only).

    The peak is that of one batch, hence not `resource.getrusage`, whose peak cannot be reset.
    """

    def __init__(self) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        wait_for(self.device)
        self.memory = PeakMemory(self.device)
        self.start = time.perf_counter()

    def record(self, path: Path, num_images: int) -> None:
        wait_for(self.device)
        seconds = time.perf_counter() - self.start
        append_json_lines([{"images": num_images, "seconds": seconds, "peak_memory": self.memory.peak()}], path)


_TIMING = '{"images": '


@dataclass
class Timing:
    """Seconds per image, and the peak memory in bytes of the process that needed most (None if it is not known)."""

    seconds_per_image: float
    peak_memory: int | None


def read_timing(folder: Path) -> Timing:
    """The time and memory that making the images of a run took, over all processes and interruptions.

    Raises:
        ValueError: If nothing was recorded, or a record is damaged.
    """
    records = []
    for path in sorted(folder.glob("timing-*.jsonl")):
        for number, record in enumerate(read_json_lines(path, begin=_TIMING), 1):
            fields = {"images": int, "seconds": float, "peak_memory": (int, type(None))}
            check_fields(record, f"Line {number} of {path}", fields)
            records.append(record)
    if sum(record["images"] for record in records) < 1:
        raise ValueError(f"{folder} holds no timing records (timing-*.jsonl).")
    return Timing(
        sum(record["seconds"] for record in records) / sum(record["images"] for record in records),
        max((record["peak_memory"] for record in records if record["peak_memory"] is not None), default=None),
    )


@dataclass
class FinishedImage:
    """An image of a run, with the metadata that its file has about how it was made."""

    request: ImageRequest
    path: Path
    metadata: dict[str, Any]


def finish(requests: Sequence[ImageRequest], folder: Path) -> list[FinishedImage]:
    """Checks that all images of a run exist and can be read, lists them in images.jsonl, and writes what their layout adds.

    Raises:
        ValueError: If some cannot be read, naming the files, or if one is of another run.
    """
    images, bad = [], []
    for request in requests:
        path = folder / "images" / request.file
        try:
            metadata = read_png_metadata(path)
        except ValueError:
            bad.append(f"{path} ({'damaged' if path.exists() else 'missing'})")
            continue
        _check_image(path, metadata, request)
        images.append(FinishedImage(request, path, metadata))
    if bad:
        raise ValueError(f"{len(bad)} of {len(requests)} images cannot be read: {listed(bad)}.")
    lines = [json.dumps({"file": i.request.file, **_without_trace(i.metadata), **_extra(i.request)}) for i in images]
    save_text("".join(line + "\n" for line in lines), folder / "images.jsonl")
    _write_beside(images, folder)
    return images


def _write_beside(images: Sequence[FinishedImage], folder: Path) -> None:
    """Writes what the layout of a finished run has besides its images: GenEval's metadata.jsonl, DPG-Bench's grids."""
    by_prompt: dict[int, list[FinishedImage]] = {}
    for image in images:
        by_prompt.setdefault(image.request.prompt_index, []).append(image)
    for own in by_prompt.values():
        request, files = own[0].request, [image.path for image in own]
        prompt = request.prompt
        if request.layout == "geneval":
            save_text(json.dumps(prompt.metadata or {"prompt": prompt.text}) + "\n", files[0].parent.parent / "metadata.jsonl")
        if request.layout == "dpg":
            metadata = {"prompt": prompt.text, "seeds": [image.request.seed for image in own]}
            write_grid(files, folder / GRIDS / f"{prompt.metadata['name']}.png", metadata)


def _without_trace(metadata: dict[str, Any]) -> dict[str, Any]:
    """What a file says, but for the steps of its tokens, of which there are thousands."""
    return {name: value for name, value in metadata.items() if name != "trace"}


def _extra(request: ImageRequest) -> dict[str, Any]:
    return {"metadata": request.prompt.metadata} if request.prompt.metadata else {}

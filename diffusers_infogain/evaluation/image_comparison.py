"""Comparisons on images: samplers x steps x candidates x guidance x seeds on the same prompts."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import __version__
from ..files import check_fields, read_json, save_text
from ..image_files import METADATA_KEY
from ..scheduling_infogain import InfoGainScheduler
from ..trace import RECORDED
from . import runs
from .composition import check_composition
from .groups import Cell, Column, Group, Record, as_json, per_item, per_run, summarize
from .runs import FinishedImage
from .samplers import SamplerSpec, check_recorded_sampler, parse_sampler

if TYPE_CHECKING:
    from .measure import Measured, Measurement

_PLAIN = re.compile(r"[A-Za-z0-9_.=]+(:[A-Za-z0-9_.=,]+)?")


@dataclass(frozen=True)
class ImageCell(Cell):
    """All prompts with one sampler and one seed. `num_candidates` is None for a rule that does not look ahead."""

    sampler: SamplerSpec
    steps: int
    num_candidates: int | None
    guidance_scale: float
    seed: int

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of its scheduler that differ from the pipeline's own."""
        settings = self.sampler.scheduler
        return settings if self.num_candidates is None else {**settings, "num_candidates": self.num_candidates}

    @property
    def name(self) -> str:
        """The name of its folder."""
        candidates = "" if self.num_candidates is None else f"-n{self.num_candidates}"
        words = re.sub(r"[^A-Za-z0-9_.=]", "-", self.sampler.name)
        if len(words) > 100 or not _PLAIN.fullmatch(self.sampler.name):  # others could come to the same words
            words = f"{words[:100]}-{hashlib.sha256(self.sampler.name.encode()).hexdigest()[:8]}"
        scale = repr(float(self.guidance_scale)).removesuffix(".0")  # all digits: other scales are other runs
        return f"{words}-steps{self.steps}{candidates}-g{scale}-seed{self.seed}"


def grid(
    samplers: Iterable[SamplerSpec],
    steps: Iterable[int],
    num_candidates: Sequence[int] | None,
    guidance_scales: Iterable[float],
    seeds: Iterable[int],
    config: Mapping[str, Any],
) -> list[ImageCell]:
    """All runs, each once, cheap ones first within a seed.

    Args:
        num_candidates: Numbers of candidates for the samplers that look ahead; None: each preset's own, else the pipeline's.
            A sampler that sets `num_candidates` or `guidance_scale` in its name runs with that number only.
        config: The configuration of the pipeline's own scheduler.
    """
    own = InfoGainScheduler.from_config(dict(config)).config["num_candidates"]
    cells = []
    specs = [sampler.for_pipeline(config) for sampler in samplers]
    for seed, guidance_scale, count, sampler in itertools.product(seeds, guidance_scales, steps, specs):
        if not sampler.looks_ahead:
            numbers: Sequence[int | None] = [None]
        elif num_candidates is None or "num_candidates=" in sampler.name:
            numbers = [sampler.scheduler.get("num_candidates", own)]
        else:
            numbers = num_candidates
        scale = sampler.call.get("guidance_scale", guidance_scale)
        cells += [ImageCell(sampler, count, number, scale, seed) for number in numbers]
    return sorted(dict.fromkeys(cells), key=lambda cell: (cell.seed, cell.steps * (cell.num_candidates or 1)))


_IN_NATS = ("cost", "log_probability")


def cell_of(group: Group, seed: int) -> ImageCell:
    """The run of a greedy rule's group with this seed."""
    return ImageCell(parse_sampler(group["sampler"]), group["steps"], None, group["guidance_scale"], seed)


def describe_run(images: Sequence[FinishedImage]) -> dict[str, Any]:
    """What decoding cost in a run, its entropies, and how often a candidate other than the first won, from the images' metadata.

    Returns:
        Fields of the run's record, figures per image. "num_evaluations" (NFE: rows of the network, two for a guided state) is the
        cost on a device that one state keeps busy, "sequential_passes" that on one that evaluates candidates side by side.

    Raises:
        ValueError: If the metadata of an image does not record its decoding, naming the file.
    """
    for image in images:
        where = f"The text chunk {METADATA_KEY!r} of {image.path}"
        check_fields(image.metadata, where, {name: [float if name in _IN_NATS else int] for name in RECORDED})
        if len({len(image.metadata[name]) for name in RECORDED}) > 1:
            raise ValueError(f"{where} must have lists of one length in {', '.join(RECORDED)}.")
    records = [image.metadata for image in images]
    steps = max(len(record["cost"]) for record in records)
    costs = [record["cost"] + [0.0] * (steps - len(record["cost"])) for record in records]
    decisions, others = [0] * steps, [0] * steps
    for record in records:
        for step, (compared, winner) in enumerate(zip(record["num_compared"], record["winner"], strict=True)):
            decisions[step] += compared > 1
            others[step] += winner != 0

    def per_image(name: str) -> float:
        return sum(sum(record[name]) for record in records) / len(records)

    totals = list(itertools.accumulate(sum(step) / len(records) for step in zip(*costs, strict=True)))
    return {
        "num_states": per_image("num_states"),
        "num_evaluations": per_image("num_evaluations"),
        "sequential_passes": per_image("num_passes"),
        "cumulative_entropies": [round(sum(cost), 3) for cost in costs],
        "entropy_by_step": [round(total, 4) for total in totals],
        "decisions_by_step": decisions,
        "other_winner_by_step": others,
    }


KEY = ("sampler", "steps", "num_candidates", "guidance_scale")
_COLUMNS = {
    "right": per_item("right"),
    "cumulative_entropy": per_item("cumulative_entropies"),
    **{name: per_run(name) for name in ("num_states", "num_evaluations", "sequential_passes")},
    **{name: per_run(name) for name in ("seconds_per_image", "peak_memory")},
}


def image_groups(records: Iterable[Record]) -> list[Group]:
    """Groups the records of `Results` by configuration. A metric by which runs were measured in different ways is left out."""
    records = list(records)
    return summarize(records, KEY, _COLUMNS | _metric_columns(records))


def _metric_columns(records: Sequence[Record]) -> dict[str, Column]:
    identities: dict[str, list[Any]] = {}
    columns: dict[str, dict[str, Column]] = {}
    for record in records:
        for metric, measured in record["metrics"].items():
            known = identities.setdefault(metric, [])
            if measured["identity"] not in known:
                known.append(measured["identity"])
            titles = columns.setdefault(metric, {})
            titles |= {title: _metric_column(metric, title) for title in measured["figures"]}
    return {title: column for metric in columns if len(identities[metric]) == 1 for title, column in columns[metric].items()}


def _metric_column(metric: str, title: str) -> Column:
    """The mean over all images where they were scored one by one, else over the seeds."""
    of_images, of_runs = per_item("metrics", metric, "values", title), per_run("metrics", metric, "figures", title)
    return lambda records: of_images(records) or of_runs(records)


_FIELDS: dict[str, Any] = {
    "sampler": str,
    "steps": int,
    "num_candidates": (int, type(None)),
    "guidance_scale": float,
    "seed": int,
    "looks_ahead": bool,
    "num_images_per_prompt": int,
    "scheduler": dict,
    "num_states": float,
    "num_evaluations": float,
    "sequential_passes": float,
    "cumulative_entropies": [float],
    "entropy_by_step": [float],
    "decisions_by_step": [int],
    "other_winner_by_step": [int],
    "seconds_per_image": float,
    "peak_memory": (int, type(None)),
    "right": (str, type(None)),
    "metrics": dict,
}


class Results:
    """results.json: the records of all finished runs and a summary of them, rewritten as a whole after every run.

    Args:
        settings: What all runs share, with "prompts" and "num_images_per_prompt" among them.

    Raises:
        ValueError: If the file holds anything but records of runs with these settings, naming the run.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path = path
        self.settings = settings
        self.records: list[Record] = []
        if path.exists():
            content = read_json(path)
            check_fields(content, str(path), {"runs": [dict]})
            self.records = content["runs"]
        for number, record in enumerate(self.records, 1):
            self._check(record, f"Run {number} of {path}")

    def _check(self, record: Record, where: str) -> None:
        check_fields(record, where, _FIELDS)
        check_recorded_sampler(record["sampler"], where)
        count = len(self.settings["prompts"]) * self.settings["num_images_per_prompt"]
        for name, measured in record["metrics"].items():
            about = f"The metric {name} of {where}"
            check_fields(measured, about, {"identity": dict, "figures": dict})
            check_fields(measured["figures"], about, dict.fromkeys(measured["figures"], float))
            values = measured.get("values", {})
            check_fields(values, about, {title: [float] for title in values})
            if any(len(scores) != count for scores in values.values()):
                raise ValueError(f"{about} must have the scores of {count} images.")
        if len(record["cumulative_entropies"]) != count or len(record["right"] or "0" * count) != count:
            raise ValueError(f"{where} must have figures of {count} images.")

    def of(self, cells: Sequence[ImageCell]) -> list[Record]:
        """The records of those of these runs that are finished, in the order of the file."""
        wanted = [record for cell in cells if (record := cell.find(self.records)) is not None]
        return [record for record in self.records if any(record is other for other in wanted)]

    def cells(self, config: dict[str, Any]) -> list[ImageCell]:
        """The finished runs as cells, in which they could be made again.

        Args:
            config: The configuration of the pipeline's own scheduler.
        """
        samplers = {record["sampler"]: parse_sampler(record["sampler"]).for_pipeline(config) for record in self.records}
        return [ImageCell(samplers[record["sampler"]], *(record[name] for name in (*KEY[1:], "seed"))) for record in self.records]

    def has(self, cell: ImageCell, scheduler: dict[str, Any], identities: dict[str, Any]) -> bool:
        """Whether a run is finished and was measured by these metrics in exactly this way.

        Raises:
            ValueError: If it was made with other settings of the scheduler, because its sampler's name had another meaning.
        """
        record = cell.find(self.records)
        if record is None:
            return False
        runs.refuse_differences(f"{self.path} ({cell.name})", {"scheduler": record["scheduler"]}, {"scheduler": scheduler})
        measured = {name: metric["identity"] for name, metric in record["metrics"].items()}
        return measured | identities == measured

    def add(
        self,
        cell: ImageCell,
        images: Sequence[FinishedImage],
        folder: Path,
        scheduler: dict[str, Any],
        identities: dict[str, Any],
        measurement: Measurement,
    ) -> None:
        """Measures a finished run and stores its record; earlier measurements by other metrics stay in it."""
        timing = runs.read_timing(folder)
        before = cell.find(self.records)
        right = before["right"] if before else None
        if "composition" in identities:
            right = "".join("1" if holds else "0" for holds in check_composition(images))
        found = measurement.measure_each([image.path for image in images], [image.request.prompt for image in images])
        measured = {name: {"identity": identities[name], **_recorded(found.get(name))} for name in identities}
        record = {
            **cell.key,
            "looks_ahead": cell.sampler.looks_ahead,
            "num_images_per_prompt": self.settings["num_images_per_prompt"],
            "scheduler": scheduler,
            **describe_run(images),
            "seconds_per_image": timing.seconds_per_image,
            "peak_memory": timing.peak_memory,
            "right": right,
            "metrics": (before["metrics"] if before else {}) | measured,
        }
        self.records = [other for other in self.records if other is not before] + [record]
        self.save([])

    def save(self, groups: Sequence[Group]) -> None:
        """Writes the file with a summary of these groups, and one line per run."""
        versions = {"diffusers_infogain": __version__, "torch": torch.__version__}
        head = {"versions": versions, "settings": self.settings, "summary": as_json(groups)}
        lines = ",\n".join(json.dumps(record, allow_nan=False) for record in self.records)
        save_text(json.dumps(head, allow_nan=False)[:-1] + ',\n"runs": [\n' + lines + "\n]}\n", self.path)


def _recorded(measured: Measured | None) -> dict[str, Any]:
    """What a record says of a metric; None for one that is decided image by image, in the record's own fields."""
    if measured is None:
        return {"figures": {}}
    values = measured.recorded_values
    return {"figures": measured.figures, **({"values": values} if values else {})}


def read_rivals(path: Path, settings: dict[str, Any]) -> list[Group]:
    """The groups of another comparison, from which `groups.best_greedy` may choose rivals for the present one.

    Args:
        path: Its results.json.
        settings: The present comparison's, with "prompts" and "weights" among them.

    Raises:
        ValueError: If the file is damaged, of another model, or if the comparisons share a prompt: what was chosen on the same
            prompts would owe its rank to luck.
    """
    there = read_json(path).get("settings")
    fields = {"prompts": [str], "num_images_per_prompt": int, "weights": str, "model": str}
    check_fields(there, f"The settings of {path}", fields)
    if there["weights"] != settings["weights"]:
        raise ValueError(f"The rivals in {path} must be of the same weights as this comparison, got those of {there['model']}.")
    shared = sorted(set(there["prompts"]) & set(settings["prompts"]))
    if shared:
        raise ValueError(
            f"The rivals in {path} must be chosen on other prompts than those of this comparison, got {len(shared)} of the same, "
            f"such as {shared[0]!r}."
        )
    return image_groups(Results(path, there).records)

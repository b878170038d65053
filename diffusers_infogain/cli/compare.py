"""`diffusers-infogain compare`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

import diffusers_infogain

from ..evaluation import comparison, prompts, report, runs
from ..evaluation.measure import Measurement, MeasureSettings
from ..files import check_fields, read_json, save_text, writable_folder
from ..progress import Progress
from ..scheduling_infogain import InfoGainScheduler
from . import common


def compare(args: argparse.Namespace) -> None:
    """Samplers x steps x candidates x guidance x seeds on the same prompts: figures, a table and plots in one folder."""
    metrics, measuring = common.metrics_of(args)
    report.load_pyplot()
    every_prompt = common.run_prompts(args)
    samplers = [comparison.parse_sampler(text) for text in args.samplers]
    identities = measuring.identity(metrics)
    state = common.start_process(args)
    with common.owned_by(state, args.output):
        _compare(args, state, every_prompt, samplers, metrics, measuring, identities)


def _compare(
    args: argparse.Namespace,
    state: PartialState,
    every_prompt: list[prompts.Prompt],
    samplers: list[comparison.SamplerSpec],
    metrics: list[str],
    measuring: MeasureSettings,
    identities: dict[str, Any],
) -> None:
    folder, pipe = args.output, common.load_pipeline(args)
    guidance_scales = args.guidance_scales or [pipe.default_guidance_scale]
    base = dict(pipe.scheduler.config)
    settings = {
        **common.identity(args, pipe),
        "prompts": [prompt.text for prompt in every_prompt],
        "num_images_per_prompt": args.num_images,
        "batch_size": args.batch_size,
        "lookahead_batch_size": args.lookahead_batch_size,
        "height": args.height,
        "width": args.width,
    }
    path = folder / "results.json"
    if state.is_main_process:
        runs.check_settings(folder, settings, begun=path.exists())
    state.wait_for_everyone()
    results = Results(path, settings)
    cells = comparison.grid(samplers, args.steps, args.num_candidates, guidance_scales, args.seeds, base)
    if args.everything:
        cells = list(dict.fromkeys([*cells, *results.cells(base)]))
    schedulers = {cell: InfoGainScheduler.from_config(base, **_scheduler(cell)) for cell in cells}
    settled = {cell: common.scheduler_record(schedulers[cell]) for cell in cells}
    missing = [cell for cell in cells if not results.has(cell, settled[cell], identities)]
    measurement = None
    if state.is_main_process and missing:
        measurement = Measurement(metrics, common.on_device(measuring, args.device))
        measurement.read_reference([request.prompt for request in prompts.requests(every_prompt, args.num_images, 0)])
    state.wait_for_everyone()  # all have read what is there before one writes
    for number, cell in enumerate(Progress(missing, desc="compare", unit="run", disable=not state.is_main_process), 1):
        pipe.scheduler = schedulers[cell]
        requests = prompts.requests(every_prompt, args.num_images, prompts.SEED_STRIDE * cell.seed)
        run_folder = folder / "runs" / cell.name
        if state.is_main_process:
            writable_folder(run_folder)
            runs.check_settings(run_folder, {**settings, "scheduler": settled[cell], "cell": cell.name})
        state.wait_for_everyone()
        call = {
            "num_inference_steps": cell.steps,
            "guidance_scale": cell.guidance_scale,
            "height": args.height,
            "width": args.width,
            "lookahead_batch_size": args.lookahead_batch_size,
            **cell.sampler.call,
        }
        runs.make_run(pipe, requests, run_folder, state, args.batch_size, f"{number}/{len(missing)} {cell.name}", call)
        if measurement is not None:
            images = runs.finish(requests, run_folder)
            results.add(cell, images, run_folder, settled[cell], identities, measurement)
        state.wait_for_everyone()
    if state.is_main_process:
        write_report(args.report or folder, results, results.of(cells))


def _scheduler(cell: comparison.Cell) -> dict[str, Any]:
    settings = cell.sampler.scheduler
    return settings if cell.num_candidates is None else {**settings, "num_candidates": cell.num_candidates}


_KEY = ("sampler", "steps", "num_candidates", "guidance_scale", "seed")
_FIELDS: dict[str, Any] = {
    "sampler": str,
    "steps": int,
    "num_candidates": (int, type(None)),
    "guidance_scale": float,
    "seed": int,
    "looks_ahead": bool,
    "num_images_per_prompt": int,
    "scheduler": dict,
    "model_rows": float,
    "model_calls": float,
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
    """results.json: what every finished run gave, and the summary of them; rewritten as a whole after every run."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path, self.settings = path, settings
        self.runs: list[dict[str, Any]] = []
        if path.exists():
            content = read_json(path)
            check_fields(content, str(path), {"runs": [dict]})
            self.runs = content["runs"]
        for number, run in enumerate(self.runs, 1):
            where = f"Run {number} of {path}"
            check_fields(run, where, _FIELDS)
            comparison.check_recorded_sampler(run["sampler"], where)
            for name, measured in run["metrics"].items():
                check_fields(measured, f"The metric {name} of {where}", {"identity": dict, "figures": dict})
                check_fields(measured["figures"], f"The metric {name} of {where}", dict.fromkeys(measured["figures"], float))
            count = len(settings["prompts"]) * settings["num_images_per_prompt"]
            if len(run["cumulative_entropies"]) != count or len(run["right"] or "0" * count) != count:
                raise ValueError(f"{where} must have figures of {count} images.")

    @staticmethod
    def _key(cell: comparison.Cell) -> tuple[Any, ...]:
        return (*cell.group, cell.seed)

    def of(self, cells: Sequence[comparison.Cell]) -> list[dict[str, Any]]:
        """The results of these runs, as far as they are finished."""
        wanted = {self._key(cell) for cell in cells}
        return [run for run in self.runs if tuple(run[key] for key in _KEY) in wanted]

    def cells(self, config: dict[str, Any]) -> list[comparison.Cell]:
        """The finished runs as such that could be made again.

        Args:
            config: Of the pipeline's own scheduler.
        """
        specs = {run["sampler"]: comparison.parse_sampler(run["sampler"]).for_pipeline(config) for run in self.runs}
        return [comparison.Cell(specs[run["sampler"]], *(run[key] for key in _KEY[1:])) for run in self.runs]

    def has(self, cell: comparison.Cell, scheduler: dict[str, Any], identities: dict[str, Any]) -> bool:
        """Whether a run is finished and was measured by these metrics in this very way.

        Raises:
            ValueError: If it was made with other settings of the scheduler, as those of a name that stands for others now.
        """
        found = self.of([cell])
        for run in found:
            runs.refuse_differences(f"{self.path} ({cell.name})", {"scheduler": run["scheduler"]}, {"scheduler": scheduler})
        measured = [{name: one["identity"] for name, one in run["metrics"].items()} for run in found]
        return any(one | identities == one for one in measured)

    def add(
        self,
        cell: comparison.Cell,
        images: Sequence[runs.FinishedImage],
        folder: Path,
        scheduler: dict[str, Any],
        identities: dict[str, Any],
        measurement: Measurement,
    ) -> None:
        """Measures a finished run and stores what it gave; what it was measured by before stays."""
        timing = runs.read_timing(folder)
        before = next(iter(self.of([cell])), None)
        result = {
            "sampler": cell.sampler.name,
            "steps": cell.steps,
            "num_candidates": cell.num_candidates,
            "guidance_scale": cell.guidance_scale,
            "seed": cell.seed,
            "looks_ahead": cell.sampler.looks_ahead,
            "num_images_per_prompt": self.settings["num_images_per_prompt"],
            "scheduler": scheduler,
            **comparison.describe_run(images, cell.sampler.looks_ahead),
            "seconds_per_image": timing.seconds_per_image,
            "peak_memory": timing.peak_memory,
            "right": before["right"] if before else None,
        }
        if "composition" in identities:
            from ..evaluation.composition import check_composition

            result["right"] = "".join("1" if right else "0" for right in check_composition(images))
        every, paths = [image.request.prompt for image in images], [image.path for image in images]
        figures = measurement.measure_each(paths, every)
        result["metrics"] = before["metrics"] if before else {}
        result["metrics"] |= {name: {"identity": identities[name], "figures": figures.get(name, {})} for name in identities}
        self.runs = [run for run in self.runs if run is not before] + [result]
        self.save([])

    def save(self, summary: list[dict[str, Any]]) -> None:
        """Writes the file; one line per run."""
        versions = {"diffusers_infogain": diffusers_infogain.__version__, "torch": torch.__version__}
        head = {"versions": versions, "settings": self.settings, "summary": summary}
        lines = ",\n".join(json.dumps(run, allow_nan=False) for run in self.runs)
        save_text(json.dumps(head, allow_nan=False)[:-1] + ',\n"runs": [\n' + lines + "\n]}\n", self.path)


def write_report(folder: Path, results: Results, asked_for: Sequence[dict[str, Any]]) -> None:
    """Summary, table and plots of some of the runs."""
    groups = comparison.summarize(asked_for)
    quality = comparison.choose_quality(groups)
    results.save(comparison.as_json(groups))
    description = f"Model {results.settings['model']}, {len(results.settings['prompts'])} prompts."
    text = report.comparison_report(groups, quality, description)
    save_text(text, writable_folder(folder) / "table.md")
    report.write_plots(groups, quality, folder)
    print(text)
    print(f"Table and plots are in {folder}, all figures in {results.path}.")

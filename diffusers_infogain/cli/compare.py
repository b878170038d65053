"""`diffusers-infogain compare`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

import diffusers_infogain

from ..evaluation import comparison, prompts, report, runs
from ..evaluation.measure import Measurement
from ..files import save_text, writable_folder
from ..loading import image_pipeline_class
from ..scheduling_infogain import InfoGainScheduler
from . import common

DEFAULT_SAMPLERS = ("uniform", "halton", "confidence", "maskgit", "entropy", "margin", "lookum", "paper", "default")


def compare(args: argparse.Namespace) -> None:
    """Samplers x steps x candidates x guidance x seeds on the same prompts: figures, a table and plots in one folder."""
    common.require_positive(args, "batch_size", "num_images")
    metrics, measuring = common.metrics_of(args)
    report.load_pyplot()
    every_prompt = common.run_prompts(args)
    samplers = [comparison.parse_sampler(text) for text in args.samplers]
    guidance_scales = args.guidance_scales or [common.default_guidance_scale(args.model, image_pipeline_class(args.model))]
    cells = comparison.grid(samplers, args.steps, args.num_candidates, guidance_scales, args.seeds)
    folder = writable_folder(args.output)
    settings = {
        **common.model_settings(args),
        "prompts": [prompt.text for prompt in every_prompt],
        "num_images_per_prompt": args.num_images,
        "batch_size": args.batch_size,
        "lookahead_batch_size": args.lookahead_batch_size,
        "height": args.height,
        "width": args.width,
    }
    runs.check_settings(folder, settings)
    results = Results(folder / "results.json", settings)
    state = common.start_process(args)
    measurement = None
    if state.is_main_process and not all(results.has(cell, metrics) for cell in cells):
        measurement = Measurement(metrics, common.on_device(measuring, args.device))
        measurement.read_reference([request.prompt for request in prompts.requests(every_prompt, args.num_images, 0)])
    pipe = common.load_pipeline(args)
    base = dict(pipe.scheduler.config)
    schedulers = {cell: InfoGainScheduler.from_config(base, **_scheduler(cell)) for cell in cells}
    for number, cell in enumerate(tqdm(cells, desc="compare", unit="run", disable=not state.is_main_process), 1):
        if results.has(cell, metrics):
            continue
        pipe.scheduler = schedulers[cell]
        requests = prompts.requests(every_prompt, args.num_images, prompts.SEED_STRIDE * cell.seed)
        run_folder = writable_folder(folder / "runs" / cell.name)
        runs.check_settings(run_folder, {**settings, "scheduler": common.scheduler_config(pipe), "cell": cell.name})
        call = {
            "num_inference_steps": cell.steps,
            "guidance_scale": cell.guidance_scale,
            "height": args.height,
            "width": args.width,
            "lookahead_batch_size": args.lookahead_batch_size,
            **cell.sampler.call,
        }
        common.make_run(pipe, requests, run_folder, state, args.batch_size, f"{number}/{len(cells)} {cell.name}", call)
        if measurement is not None:
            results.add(cell, runs.finish(requests, run_folder), run_folder, common.scheduler_config(pipe), metrics, measurement)
        state.wait_for_everyone()
    if state.is_main_process:
        asked_for = results.runs if args.everything else results.of(cells)
        write_report(args.report or folder, results, asked_for)


def _scheduler(cell: comparison.Cell) -> dict[str, Any]:
    settings = cell.sampler.scheduler
    return settings if cell.num_candidates is None else {**settings, "num_candidates": cell.num_candidates}


class Results:
    """results.json: what every finished run gave, and the summary of them; rewritten as a whole after every run."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path, self.settings = path, settings
        self.runs: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []

    @staticmethod
    def _key(cell: comparison.Cell) -> tuple[Any, ...]:
        return (*cell.group, cell.seed)

    def of(self, cells: Sequence[comparison.Cell]) -> list[dict[str, Any]]:
        """The results of these runs, as far as they are finished."""
        wanted = {self._key(cell) for cell in cells}
        keys = ("sampler", "steps", "num_candidates", "guidance_scale", "seed")
        return [run for run in self.runs if tuple(run[key] for key in keys) in wanted]

    def has(self, cell: comparison.Cell, metrics: Sequence[str]) -> bool:
        """Whether a run is finished and was measured by all of `metrics`."""
        return any(set(metrics) <= set(run["measured"]) for run in self.of([cell]))

    def add(
        self,
        cell: comparison.Cell,
        images: Sequence[runs.FinishedImage],
        folder: Path,
        scheduler: dict[str, Any],
        metrics: Sequence[str],
        measurement: Measurement,
    ) -> None:
        """Measures a finished run and stores what it gave."""
        timing = runs.read_timing(folder)
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
            "measured": list(metrics),
            "right": None,
        }
        if "composition" in metrics:
            from ..evaluation.composition import check_composition

            result["right"] = "".join("1" if right else "0" for right in check_composition(images))
        every = [image.request.prompt for image in images]
        result["metrics"] = measurement.measure([image.path for image in images], every)
        self.runs = [run for run in self.runs if run not in self.of([cell])] + [result]
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


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The command's flags."""
    common.add_prompt_flags(command)
    common.add_metric_flags(command)
    common.add_model_flags(command)
    command.add_argument("--output", type=Path, default=Path("outputs/comparison"), help="folder (default: outputs/comparison)")
    command.add_argument(
        "--samplers",
        nargs="+",
        default=list(DEFAULT_SAMPLERS),
        metavar="NAME[:KEY=VALUE,...]",
        help="samplers or presets with settings of the scheduler, or num_beams / num_runs, such as maskgit:token_temperature=0.7 "
        f"(default: {' '.join(DEFAULT_SAMPLERS)})",
    )
    command.add_argument("--steps", type=int, nargs="+", default=[8, 16], help="numbers of steps (default: 8 16)")
    command.add_argument("--num-candidates", type=int, nargs="+", default=[8], help="of those that look ahead (default: 8)")
    command.add_argument("--guidance-scales", type=float, nargs="+", help="(default: 1.2 for demo, else the pipeline's)")
    command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    command.add_argument("--num-images", type=int, default=1, help="images per prompt (default: 1)")
    command.add_argument("--everything", action="store_true", help="report all runs in the folder, not only those asked for")
    command.add_argument("--report", type=Path, help="folder for table and plots (default: that of --output)")
    command.add_argument("--height", type=int, help="in pixels (default: the model's)")
    command.add_argument("--width", type=int)
    common.add_device_flags(command, batch_size=16)
    command.add_argument("--lookahead-batch-size", type=int, default=16, help="most states at once (default: 16)")

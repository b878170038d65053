"""`diffusers-infogain compare`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..evaluation import groups, image_comparison, plots, prompts, runs, sample_sheet, tables
from ..evaluation.groups import Group
from ..evaluation.identity import scheduler_record
from ..evaluation.image_comparison import ImageCell, Results
from ..evaluation.measure import Measurement
from ..evaluation.measure_settings import MeasureSettings
from ..evaluation.samplers import SamplerSpec, parse_sampler
from ..files import save_text
from ..output_folders import owned, writable_folder
from ..progress import Progress
from ..scheduling_infogain import InfoGainScheduler
from . import common


def compare(args: argparse.Namespace) -> None:
    """Runs all combinations of samplers, steps, candidates, guidance scales and seeds, and writes figures, a table and plots."""
    metrics, measuring = common.metrics_of(args)
    plots.load_pyplot()
    prompt_set = common.prompt_set(args)
    samplers = [parse_sampler(text) for text in args.samplers]
    identities = measuring.identity(metrics)
    with owned(args.output, main=args.processes.is_main):
        _compare(args, prompt_set, samplers, metrics, measuring, identities)


def _compare(
    args: argparse.Namespace,
    prompt_set: list[prompts.Prompt],
    samplers: list[SamplerSpec],
    metrics: list[str],
    measuring: MeasureSettings,
    identities: dict[str, Any],
) -> None:
    folder, pipe, processes = args.output, common.load_pipeline(args), args.processes
    guidance_scales = args.guidance_scales or [pipe.default_guidance_scale]
    base = dict(pipe.scheduler.config)
    negative = {name: prompt for name, prompt in common.negative_prompt(args, pipe).items() if prompt is not None}
    settings = {
        **common.identity(args, pipe),
        "prompts": [prompt.text for prompt in prompt_set],
        "num_images_per_prompt": args.num_images,
        "batch_size": args.batch_size,
        "lookahead_batch_size": args.lookahead_batch_size,
        "height": args.height,
        "width": args.width,
        **negative,
    }
    rivals = image_comparison.read_rivals(args.rivals, settings) if args.rivals is not None else []
    to_beat = groups.possible_rivals(rivals, groups.RIGHT, tables.LIMITS)
    path = folder / "results.json"
    if processes.is_main:
        runs.check_settings(folder, settings, begun=path.exists())
    results = Results(path, settings)
    processes.to_main()  # which writes results only after all have read them
    cells = image_comparison.grid(samplers, args.steps, args.num_candidates, guidance_scales, args.seeds, base)
    cells += [image_comparison.cell_of(group, seed) for group in to_beat for seed in args.seeds]
    if args.everything:
        cells += results.cells(base)
    cells = list(dict.fromkeys(cells))
    schedulers = {cell: InfoGainScheduler.from_config(base, **cell.settings) for cell in cells}
    settled = {cell: scheduler_record(schedulers[cell]) for cell in cells}
    missing = [cell for cell in cells if not results.has(cell, settled[cell], identities)]
    for cell in missing if processes.is_main else ():
        run_folder = writable_folder(folder / "runs" / cell.name)
        runs.check_settings(run_folder, {**settings, "scheduler": settled[cell], "cell": cell.name})
    measurement = Measurement(metrics, measuring) if processes.is_main and missing else None
    processes.from_main()
    if measurement is not None:  # while the others begin
        measurement.read_reference([request.prompt for request in prompts.requests(prompt_set, args.num_images, 0)])
    for number, cell in enumerate(Progress(missing, desc="compare", unit="run", disable=not processes.is_main), 1):
        pipe.scheduler = schedulers[cell]
        requests = prompts.requests(prompt_set, args.num_images, prompts.SEED_STRIDE * cell.seed)
        run_folder = folder / "runs" / cell.name
        call = {
            "num_inference_steps": cell.steps,
            "guidance_scale": cell.guidance_scale,
            "height": args.height,
            "width": args.width,
            "lookahead_batch_size": args.lookahead_batch_size,
            **negative,
            **cell.sampler.call,
        }
        runs.make_run(pipe, requests, run_folder, processes, args.batch_size, f"{number}/{len(missing)} {cell.name}", call)
        if measurement is not None:
            images = runs.finish(requests, run_folder)
            results.add(cell, images, run_folder, settled[cell], identities, measurement)
    if processes.is_main:
        report = args.report or folder
        write_report(report, results, cells, rivals)
        if args.grid:
            shown = prompt_set[: args.grid]
            sample_sheet.write_sheet(report / "samples.jpg", folder, cells, results.of(cells), shown, args.num_images)


def write_report(folder: Path, results: Results, cells: Sequence[ImageCell], rivals: Sequence[Group]) -> None:
    """Writes a table and plots of these runs to a folder, and their summary to the results."""
    chosen = image_comparison.image_groups(results.of(cells))
    quality = groups.choose_quality(chosen)
    results.save(chosen)
    description = f"Model {results.settings['model']}, {len(results.settings['prompts'])} prompts."
    text = tables.image_report(chosen, quality, description, rivals)
    save_text(text, writable_folder(folder) / "table.md")
    plots.write_plots(chosen, quality, folder)
    print(text)
    print(f"Table and plots are in {folder}, all figures in {results.path}.")

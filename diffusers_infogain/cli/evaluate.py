"""`diffusers-infogain evaluate`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..choices import DEMO_PROMPTS
from ..evaluation import image_comparison, prompts, runs, tables
from ..evaluation.identity import scheduler_record
from ..evaluation.known_references import sha256
from ..evaluation.measure import Measured, Measurement
from ..evaluation.measure_settings import IMAGE_METRICS, MeasureSettings
from ..evaluation.photographs import image_files
from ..evaluation.statistics import Figure, clustered_mean, figures_as_json
from ..files import digest, read_json, save_json, save_text
from ..image_files import read_png_metadata
from ..output_folders import owned, unused
from ..scheduling_infogain import InfoGainScheduler
from . import common


def evaluate(args: argparse.Namespace) -> None:
    """Generates the missing images of a run, or takes those of --images, and reports their metrics."""
    metrics, measuring = common.metrics_of(args)
    how = {"metrics": measuring.identity(metrics), **_readable(measuring)}
    if args.images is not None:
        if not metrics and args.save_statistics is None:
            raise ValueError("--images is for measuring: name at least one of --metrics, or give --save-statistics.")
        if not args.processes.is_main:
            return
        paths = image_files(args.images)
        with owned(args.output):
            settings: dict[str, Any] = {"images": str(args.images), "content": digest(paths)}
            given = _prompts_of(args, paths, metrics)
            if given is not None:
                settings["prompts"] = [prompt.text for prompt in given]
            sources = settings.get("prompts", paths)
            clusters = {source: number for number, source in enumerate(dict.fromkeys(sources))}
            found = Measurement(metrics, measuring).measure_each(paths, given)
            figures = measured(found, [clusters[source] for source in sources])
            write_report(args.output, settings, how, figures, {}, scores(found))
        return
    prompt_set = common.prompt_set(args)
    chosen = common.scheduler_settings(args)
    requests = prompts.requests(prompt_set, args.num_images, args.seed, args.layout)
    with owned(args.output, main=args.processes.is_main):
        _evaluate(args, chosen, prompt_set, requests, metrics, measuring, how)


def _prompts_of(args: argparse.Namespace, paths: Sequence[Path], metrics: Sequence[str]) -> list[prompts.Prompt] | None:
    """The prompts of images that are only measured: those of --prompts, in the order of the images' names, or else those that
    the images say they were made of. None if no metric asks.

    Raises:
        ValueError: If there is not a prompt for every image.
    """
    asking = [name for name in metrics if name in IMAGE_METRICS and IMAGE_METRICS[name].captions]
    if not asking:
        return None
    if args.prompts not in DEMO_PROMPTS:
        given = [request.prompt for request in prompts.requests(common.prompt_set(args), args.num_images)]
        if len(given) != len(paths):
            raise ValueError(f"--prompts and --num-images must make as many as there are images, {len(paths)}, got {len(given)}.")
        return given
    return [prompts.Prompt(_recorded_prompt(path, asking)) for path in paths]


def _recorded_prompt(path: Path, metrics: Sequence[str]) -> str:
    try:
        prompt = read_png_metadata(path).get("prompt")
    except ValueError:
        prompt = None
    if not isinstance(prompt, str):
        raise ValueError(f"--prompts must be given for {', '.join(metrics)}: {path} does not say what it was made of.")
    return prompt


def _evaluate(
    args: argparse.Namespace,
    chosen: dict[str, Any],
    prompt_set: list[prompts.Prompt],
    requests: list[prompts.ImageRequest],
    metrics: list[str],
    measuring: MeasureSettings,
    how: dict[str, Any],
) -> None:
    folder, processes = args.output, args.processes
    # The networks come first: where one is missing, that is found before anything is made, in any process.
    measurement = Measurement(metrics, measuring) if processes.is_main else None
    pipe = common.load_pipeline(args)
    pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, **chosen)
    call = common.call_arguments(args, pipe)
    settings = {
        **common.identity(args, pipe),
        **call,
        "scheduler": scheduler_record(pipe.scheduler),
        "prompts": [prompt.text for prompt in prompt_set],
        "num_images_per_prompt": args.num_images,
        "seed": args.seed,
        "batch_size": args.batch_size,
        "layout": args.layout,
    }
    if processes.is_main:
        runs.check_settings(folder, settings, begun=(folder / "images").exists())
    processes.from_main()
    prompt_of_image = [request.prompt for request in requests]
    if measurement is not None:  # while the others begin
        measurement.read_reference(prompt_of_image)
    runs.make_run(pipe, requests, folder, processes, args.batch_size, "evaluate", call)
    if measurement is None:
        return
    images = runs.finish(requests, folder)
    figures, composition = decoding_figures(images, folder), {}
    if "composition" in metrics:
        from ..evaluation.composition import check_composition, composition_report

        composition = composition_report(images, check_composition(images))
    found = measurement.measure_each([image.path for image in images], prompt_of_image)
    figures |= measured(found, [image.request.prompt_index for image in images])
    write_report(folder, settings, how, figures, composition, scores(found))


def _readable(measuring: MeasureSettings) -> dict[str, Any]:
    """The settings of the measurement for the report, without those of the machine."""
    machine = ("batch_size", "device", "save_statistics")
    values = {name: value for name, value in vars(measuring).items() if name not in machine}
    file = measuring.statistics_file
    if file is not None:
        values["reference_sha256"] = sha256(file)
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def measured(found: Mapping[str, Measured], clusters: Sequence[int]) -> dict[str, Figure]:
    """The figures of all metrics. Most of those of whole sets of images have no standard error, which would take several sets.

    Args:
        clusters: The number of its prompt for every image.
    """
    figures: dict[str, Figure] = {}
    for metric in found.values():
        errors = metric.standard_errors
        for title, value in metric.figures.items():
            figures[title] = Figure(value, errors.get(title, float("nan")), len(clusters))
        figures |= {title: clustered_mean(scores, clusters) for title, scores in metric.values.items()}
    return figures


def scores(found: Mapping[str, Measured]) -> dict[str, list[float]]:
    """The scores of single images, in the order of the images, by the names of their means."""
    return {title: values for metric in found.values() for title, values in metric.recorded_values.items()}


def decoding_figures(images: list[runs.FinishedImage], folder: Path) -> dict[str, Figure]:
    """The costs of decoding and its cumulative entropy, per image."""
    run, timing = image_comparison.describe_run(images), runs.read_timing(folder)
    clusters, n, unknown = [image.request.prompt_index for image in images], len(images), float("nan")
    figures = {
        "cumulative_entropy": clustered_mean(run["cumulative_entropies"], clusters),
        "num_states": Figure(run["num_states"], unknown, n),
        "num_evaluations": Figure(run["num_evaluations"], unknown, n),
        "sequential_passes": Figure(run["sequential_passes"], unknown, n),
        "seconds_per_image": Figure(timing.seconds_per_image, unknown, n),
    }
    if timing.peak_memory is not None:
        figures["peak_memory"] = Figure(timing.peak_memory, unknown, n)
    return figures


def write_report(
    folder: Path,
    settings: dict[str, Any],
    how: dict[str, Any],
    figures: dict[str, Figure],
    composition: dict[str, Figure],
    scores: dict[str, list[float]],
) -> None:
    """Writes report.json and report.md, or report-2.json and so on if there is a report of other images or measurements."""
    content = {"settings": settings, "measured": how, "figures": figures_as_json(figures)}
    content["composition"] = figures_as_json(composition)
    content["scores"] = scores
    content = json.loads(json.dumps(content))

    def same(path: Path) -> bool:
        found = read_json(path)
        return (found.get("settings"), found.get("measured")) == (content["settings"], content["measured"])

    path = unused(folder / "report.json", same)
    save_json(content, path)
    text = tables.figures_table(figures) + "\n"
    if composition:
        text += "\n" + tables.composition_table(composition) + "\n"
    save_text(text, path.with_suffix(".md"))
    print(text)
    print(f"Written to {folder}: {path.name} and {path.stem}.md.")

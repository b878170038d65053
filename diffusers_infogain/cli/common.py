"""From flags to what the commands work with: models, settings of schedulers and metrics, arguments of the pipeline's call."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline

from ..checkpoints.published import CheckedPipeline
from ..checks import check_search
from ..choices import PRESETS
from ..evaluation.identity import pipeline_digest
from ..evaluation.measure_settings import MeasureSettings
from ..evaluation.prompts import Prompt, read_prompts
from ..loading import image_pipeline_class
from ..output_folders import owned
from ..scheduling_infogain import InfoGainScheduler
from ..settings import SETTINGS


def loading_arguments(args: argparse.Namespace, cls: type[CheckedPipeline]) -> dict[str, Any]:
    """The flags of `add_loading_flags` that are given.

    Raises:
        ValueError: If the pipeline's `from_pretrained` does not take one of them.
    """
    given = {name: getattr(args, name) for name in ("variant", "vqvae") if getattr(args, name) is not None}
    for name in given:
        if name not in cls.repository_options:
            raise ValueError(f"--{name} is not for this kind of checkpoint.")
    return given


def model_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags say about the model, for records: two runs with the same settings have the same weights."""
    given = {name: getattr(args, name) for name in ("variant", "vqvae") if getattr(args, name) is not None}
    return {"model": args.model, **given, "dtype": args.dtype}


def identity(args: argparse.Namespace, pipe: DiffusionPipeline) -> dict[str, Any]:
    """The model and the kind of machine, for what a run is: what all figures depend on, whatever the model's name stands for."""
    return {**model_settings(args), "weights": pipeline_digest(pipe), "device": torch.device(args.device).type}


def load_pipeline(args: argparse.Namespace) -> DiffusionPipeline:
    """The model of the flags, with no code of the repository run."""
    kind = image_pipeline_class(args.model)
    options = loading_arguments(args, kind)
    return kind.from_pretrained(args.model, dtype=getattr(torch, args.dtype), **options).to(args.device)


def scheduler_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that the flags name; all others stay the model's.

    Raises:
        ValueError: For a setting that no model can have.
    """
    settings = dict(PRESETS[args.preset]) if args.preset else {}
    for name, setting in SETTINGS.items():
        value = getattr(args, name)
        if setting.type == "temperature" and value is not None:
            if len(value) > 2:
                raise ValueError(f"`{name}` must be one number or two (start end), got {len(value)}.")
            value = value[0] if len(value) == 1 else tuple(value)
        if value is not None:
            settings[name] = value
    InfoGainScheduler(mask_token_id=0, **settings).set_timesteps(1)  # checked before a model is loaded
    check_search(getattr(args, "num_beams", 1), getattr(args, "num_runs", 1), None)
    return settings


def call_arguments(args: argparse.Namespace, pipe: DiffusionPipeline) -> dict[str, Any]:
    """The arguments of the pipeline's call that the flags name.

    Raises:
        ValueError: If the model's pipeline does not take one of them.
    """
    kind, scale = type(pipe), args.guidance_scale
    call = {
        "num_inference_steps": args.steps,
        "guidance_scale": pipe.default_guidance_scale if scale is None else scale,
        "guidance_schedule": args.guidance_schedule,
        "negative_prompt": args.negative_prompt,
        "height": args.height,
        "width": args.width,
        "lookahead_batch_size": args.lookahead_batch_size,
        "num_beams": args.num_beams,
        "num_runs": args.num_runs,
    }
    if "negative_prompt" not in inspect.signature(kind.__call__).parameters and call.pop("negative_prompt") is not None:
        raise ValueError(f"`negative_prompt` is not an argument of {kind.__name__}.")
    return call


def prompts_of(args: argparse.Namespace) -> list[str]:
    """Prompts from the arguments, then from the file."""
    prompts = list(args.prompts)
    if args.prompts_file is not None:
        prompts += [prompt.text for prompt in read_prompts(args.prompts_file)]
    if not prompts:
        raise ValueError("No prompts: give them as arguments, or a file with one per line by --prompts-file.")
    return prompts


def run_prompts(args: argparse.Namespace) -> list[Prompt]:
    """The prompts that the flags name."""
    if args.prompts in ("demo", "demo-trained"):
        from ..demo.shapes import sample_captions

        generator = torch.Generator().manual_seed(args.prompts_seed)
        captions = sample_captions(args.num_prompts or 500, generator, held_out=args.prompts == "demo")
        return [Prompt(caption.text) for caption in captions]
    return read_prompts(Path(args.prompts), args.prompt_template)[: args.num_prompts]


@contextmanager
def owned_by(state: PartialState, folder: Path) -> Iterator[None]:
    """Keeps other commands away from a folder; the processes of this one go on when it is theirs, by the main process.

    Raises:
        ValueError: If another command writes there now.
    """
    with owned(folder, main=state.is_main_process):
        state.wait_for_everyone()
        yield


def start_process(args: argparse.Namespace) -> PartialState:
    """This process among those that `accelerate launch` started (or the only one); sets `args.device` to its own GPU."""
    state = PartialState(cpu=args.device == "cpu")
    if state.num_processes > 1 and args.device == "cuda":
        args.device = str(state.device)
    return state


def on_device(settings: MeasureSettings, device: str) -> MeasureSettings:
    """The settings on the device of this process, which is known once the processes are started."""
    return dataclasses.replace(settings, device=device)


def of_demo_world(args: argparse.Namespace) -> bool:
    """Whether the prompts are the demo world's captions, by the flags."""
    return args.prompts in ("demo", "demo-trained") and getattr(args, "images", None) is None


def metrics_of(args: argparse.Namespace) -> tuple[list[str], MeasureSettings]:
    """What the flags ask to measure, and how; wrong combinations are found before any image is made.

    Raises:
        ValueError: For a metric that does not exist or that the flags do not allow.
    """
    demo = of_demo_world(args)
    metrics = args.metrics
    if metrics is None:
        metrics = ["composition", "frechet", "precision_recall", "diversity"] if demo else []
    settings = MeasureSettings(
        features=args.features or ("demo" if demo else "inception"),
        reference=args.reference or ("demo" if demo else None),
        inception_weights=args.inception_weights,
        clip_model=args.clip_model,
        resize=args.resize,
        save_statistics=getattr(args, "save_statistics", None),
        device=args.device,
    )
    settings.check(metrics)
    if "composition" in metrics and not demo:
        raise ValueError("The metric composition is for the demo world's captions: --prompts demo or demo-trained.")
    if "composition" in metrics:
        from ..demo.checker import load_ndimage

        load_ndimage()
    return metrics, settings

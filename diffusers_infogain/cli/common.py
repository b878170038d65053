"""Turns flags into what commands work with: models, settings of schedulers and metrics, arguments of the pipeline's call."""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from diffusers import DiffusionPipeline
from PIL.ImageOps import exif_transpose
from transformers import LogitsProcessorList, NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

from ..checkpoints.published import CheckedPipeline
from ..checks import check_search
from ..choices import DEMO_PROMPTS, PRESETS, SPLITS
from ..evaluation.identity import pipeline_digest
from ..evaluation.known_references import KNOWN_REFERENCES, sha256
from ..evaluation.measure_settings import LEAST_AT_INFINITY, PREFERENCE_SETTINGS, MeasureSettings
from ..evaluation.photographs import image_files
from ..evaluation.prompts import Prompt, read_prompts
from ..files import read_text
from ..image_files import open_image
from ..loading import image_pipeline_class, pipeline_class
from ..pipeline_infogain_text import InfoGainTextPipeline
from ..scheduling_infogain import InfoGainScheduler
from ..settings import SETTINGS


def loading_arguments(args: argparse.Namespace, cls: type[CheckedPipeline]) -> dict[str, Any]:
    """--variant, --vqvae, --text-encoder and --language-model, if they are given.

    Raises:
        ValueError: If the pipeline's `from_pretrained` does not take one of them.
    """
    given = _loading_flags(args)
    for name in given:
        if name not in cls.repository_options:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} does not apply to {cls.__name__}, which this checkpoint is for.")
    return given


def _loading_flags(args: argparse.Namespace) -> dict[str, Any]:
    names = ("variant", "vqvae", "text_encoder", "language_model")
    return {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}


def identity(args: argparse.Namespace, pipe: DiffusionPipeline) -> dict[str, Any]:
    """The model and the type of device, for records of runs. The digest of the weights tells models of the same name apart."""
    return {
        "model": args.model,
        **_loading_flags(args),
        "dtype": args.dtype,
        **({"quantize": args.quantize} if args.quantize else {}),
        "weights": pipeline_digest(pipe),
        "device": torch.device(args.device).type,
    }


def load_pipeline(args: argparse.Namespace) -> DiffusionPipeline:
    """Loads the image model of the flags, without running code from its repository."""
    cls = image_pipeline_class(args.model)
    return _load(cls, args, **loading_arguments(args, cls))


def load_text_pipeline(args: argparse.Namespace) -> Any:
    """Loads the text model of the flags, without running code from its repository."""
    return _load(InfoGainTextPipeline, args)


def load_any_pipeline(args: argparse.Namespace) -> Any:
    """Loads the image or text model of the flags, without running code from its repository."""
    cls = pipeline_class(args.model)
    return _load(cls, args, **loading_arguments(args, cls))


def _load(cls: type[DiffusionPipeline], args: argparse.Namespace, **options: Any) -> DiffusionPipeline:
    if args.offload and torch.device(args.device).type == "cpu":
        raise ValueError(f"--offload must be used with a GPU, got --device {args.device}.")
    if args.offload and args.device_map:
        raise ValueError(f"--offload and --device-map must not both be given, got --device-map {args.device_map}.")
    if args.quantize and not args.offload:  # some kinds quantise on the GPU only
        options["device_map"] = args.device
    options |= {"quantization_config": args.quantize} if args.quantize else {}
    options |= {"device_map": args.device_map} if args.device_map else {}
    pipe = cls.from_pretrained(args.model, dtype=getattr(torch, args.dtype), **options)
    if args.offload:
        pipe.enable_model_cpu_offload(device=args.device)
    elif "device_map" not in options:
        pipe.to(args.device)
    if args.compile:
        pipe.compile()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def scheduler_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of the scheduler that the flags name, checked before a model is loaded.

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
    scheduler = InfoGainScheduler(mask_token_id=0, **settings)
    scheduler.set_timesteps(1)
    check_search(getattr(args, "num_beams", 1), getattr(args, "num_runs", 1), None, scheduler)
    return settings


def negative_prompt(args: argparse.Namespace, pipe: DiffusionPipeline) -> dict[str, Any]:
    """--negative-prompt as an argument of an image pipeline's call; empty for a pipeline that takes none.

    Raises:
        ValueError: If the flag is given for such a pipeline.
    """
    cls = type(pipe)
    if "negative_prompt" in inspect.signature(cls.__call__).parameters:
        return {"negative_prompt": args.negative_prompt}
    if args.negative_prompt is not None:
        raise ValueError(f"`negative_prompt` is not an argument of {cls.__name__}.")
    return {}


def call_arguments(args: argparse.Namespace, pipe: DiffusionPipeline) -> dict[str, Any]:
    """The arguments of an image pipeline's call that the flags name.

    Raises:
        ValueError: If the model's pipeline does not take one of them.
    """
    call = {
        "num_inference_steps": args.steps,
        "guidance_scale": pipe.default_guidance_scale if args.guidance_scale is None else args.guidance_scale,
        "guidance_schedule": pipe.default_guidance_schedule if args.guidance_schedule is None else args.guidance_schedule,
        "guidance_interval": args.guidance_interval,
        "guided_lookahead": not args.unguided_lookahead,
        **negative_prompt(args, pipe),
        "height": args.height,
        "width": args.width,
        "lookahead_batch_size": args.lookahead_batch_size,
        "num_beams": args.num_beams,
        "num_runs": args.num_runs,
    }
    if args.approximate_cache is not None:
        call["approximate_cache"] = args.approximate_cache
    return call


EDIT_SETTINGS = ("strength", "outpaint", "mask_coverage", "mask_blur")
"""The arguments of an edit that are no images, as flags and records name them."""


def edited_images(image: Path | None, mask: Path | None) -> dict[str, Any]:
    """The images of an edit by the argument of the call, each turned as its camera was held; None where there is no file.

    Raises:
        ValueError: If a file is no image.
    """
    files = {"image": image, "mask_image": mask}
    return {name: None if file is None else upright(file) for name, file in files.items()}


def upright(file: Path) -> PIL.Image.Image:
    """An image, turned as its camera was held.

    Raises:
        ValueError: If the file is no image.
    """
    return exif_transpose(open_image(file))


def task_arguments(args: argparse.Namespace, pipe: DiffusionPipeline) -> dict[str, Any]:
    """The arguments of an image pipeline's call that say what it does with images in the prompt; none without such flags.

    Raises:
        ValueError: If the pipeline does not take one of them, or a file is no image.
    """
    given = {name: getattr(args, name) for name in ("task", "style_image", "image_guidance_scale")}
    given = {name: value for name, value in given.items() if value is not None}
    cls = type(pipe)
    for name in given:
        if name not in inspect.signature(cls.__call__).parameters:
            raise ValueError(f"`{name}` is not an argument of {cls.__name__}.")
    if args.task is not None:
        given.setdefault("image_guidance_scale", pipe.task_image_guidance_scale)
        if args.guidance_scale is None:
            given["guidance_scale"] = pipe.task_guidance_scale
    if "style_image" in given:
        given["style_image"] = upright(given["style_image"])
    return given


WRITING = (
    "stop_strings",
    "think_end_token",
    "min_new_tokens",
    "eos_penalty",
    "postpone_eos",
    "suppress_tokens",
    "guidance_scale",
    "repetition_penalty",
    "no_repeat_ngram_size",
)
"""Arguments of a text pipeline's call that are the same for all samplers, the last two in numbers (see `with_processors`)."""


def text_call_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of a text pipeline's call that the flags name."""
    names = ("block_length", "lookahead_batch_size", "cache", "num_beams", "num_runs")
    return {"num_inference_steps": args.steps, **{name: getattr(args, name) for name in names}, **writing_arguments(args)}


def writing_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Those of them that say what may be written and where texts end, without those that are off."""
    given = {name: getattr(args, name, None) for name in WRITING}
    if given["guidance_scale"] == 1:
        del given["guidance_scale"]
    return {name: value for name, value in given.items() if value}


def with_processors(call: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call, with logits processors of transformers for "repetition_penalty" and "no_repeat_ngram_size"."""
    kinds = {
        "repetition_penalty": RepetitionPenaltyLogitsProcessor,
        "no_repeat_ngram_size": NoRepeatNGramLogitsProcessor,
    }
    made = LogitsProcessorList(kind(call[name]) for name, kind in kinds.items() if name in call)
    others = {name: value for name, value in call.items() if name not in kinds}
    return {**others, "logits_processor": made} if made else others


CHATS = ("chat_template", "chat_template_kwargs")
"""Arguments of the call that say how chats are laid out."""

BESIDE_PROMPTS = ("answer_begin", "negative_prompt")
"""Arguments of `prompt_arguments` beside the prompts."""


def prompt_settings(args: argparse.Namespace, chat: bool, how: str) -> dict[str, Any]:
    """`CHATS` and `BESIDE_PROMPTS`, without those that are not given; the template as its text, for records.

    Args:
        chat: Whether prompts are chats.
        how: The flag that makes them chats.

    Raises:
        ValueError: If one is given without chats, a variable is given twice, or the file of the template cannot be read.
    """
    given = {"chat_template": args.chat_template, "template_variable": args.template_variable, "answer_begin": args.answer_begin}
    for name, value in given.items():
        if value is not None and not chat:
            raise ValueError(f"--{name.replace('_', '-')} must be given only with {how}.")
    call: dict[str, Any] = {}
    if args.chat_template is not None:
        call["chat_template"] = read_text(args.chat_template)
    if args.template_variable is not None:
        call["chat_template_kwargs"] = dict(args.template_variable)
        if len(call["chat_template_kwargs"]) < len(args.template_variable):
            raise ValueError("--template-variable must name each variable once.")
    beside = {name: getattr(args, name) for name in BESIDE_PROMPTS}
    return call | {name: value for name, value in beside.items() if value is not None}


def given_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts on the command line, then those of --prompts-file.

    Raises:
        ValueError: If there are none, or the file cannot be read.
    """
    prompts = list(args.prompts)
    if args.prompts_file is not None:
        prompts += [prompt.text for prompt in read_prompts(args.prompts_file)]
    if not prompts:
        raise ValueError("No prompts: give them as arguments, or a file with one per line by --prompts-file.")
    return prompts


def prompt_set(args: argparse.Namespace) -> list[Prompt]:
    """The prompts of an evaluation: captions of the demo world, or those of a file.

    Raises:
        ValueError: If the file cannot be read.
    """
    if args.prompts in DEMO_PROMPTS:
        from ..demo.shapes import sample_captions

        kind = args.prompts.removeprefix("demo").removeprefix("-")
        split = kind if kind in SPLITS else None
        generator = torch.Generator().manual_seed(args.prompts_seed)
        captions = sample_captions(args.num_prompts or 500, generator, held_out=kind != "trained", split=split)
        return [Prompt(caption.text) for caption in captions]
    return read_prompts(Path(args.prompts), args.prompt_template)[: args.num_prompts]


def of_demo_world(args: argparse.Namespace) -> bool:
    """Whether the prompts are the demo world's captions."""
    return args.prompts in DEMO_PROMPTS and getattr(args, "images", None) is None


def metrics_of(args: argparse.Namespace) -> tuple[list[str], MeasureSettings]:
    """The metrics of the flags and how to measure them, checked before any image is made.

    Where few images are measured by --metrics frechet against a folder, kid joins it: the number of images does not bias it.

    Raises:
        ValueError: For a metric that does not exist or that the flags do not allow.
        ModuleNotFoundError: If a metric needs a package that is not installed.
    """
    demo = of_demo_world(args)
    metrics = args.metrics
    if metrics is None:
        metrics = ["composition", "frechet", "precision_recall", "diversity"] if demo else []
        metrics += ["caption_variety"] if demo and args.num_images > 1 else []
    settings = MeasureSettings(
        features=args.features or ("demo" if demo else "inception"),
        reference=args.reference or ("demo" if demo else None),
        inception_weights=args.inception_weights,
        clip_model=args.clip_model,
        **{name: value for name in _MODEL_FLAGS if (value := getattr(args, name)) is not None},
        reference_file=args.reference_file,
        resize=args.resize,
        save_statistics=getattr(args, "save_statistics", None),
        device=args.device,
    )
    settings.check(metrics)
    if args.metrics is not None and "frechet" in metrics and settings.kid_beside(metrics, _number_of_images(args)):
        place = metrics.index("frechet") + 1
        metrics = [*metrics[:place], "kid", *metrics[place:]]
    if "fd_infinity" in metrics and _number_of_images(args) < LEAST_AT_INFINITY:
        raise ValueError(f"The metric fd_infinity needs at least {LEAST_AT_INFINITY} images, got {_number_of_images(args)}.")
    if "composition" in metrics and not demo:
        raise ValueError(f"The metric composition is for the demo world's captions: --prompts {', '.join(DEMO_PROMPTS)}.")
    if "caption_variety" in metrics and args.num_images < 2:
        raise ValueError(f"--num-images must be at least 2 for the metric caption_variety, got {args.num_images}.")
    if "composition" in metrics:
        from ..demo.checker import load_ndimage

        load_ndimage()
    if args.processes.is_main:
        _say_reference(settings)
    return metrics, settings


_MODEL_FLAGS = ("dinov2_model", "cmmd_model", *PREFERENCE_SETTINGS)


def _number_of_images(args: argparse.Namespace) -> int:
    """How many images will be measured together."""
    images = getattr(args, "images", None)
    return len(prompt_set(args)) * args.num_images if images is None else len(image_files(images))


def _say_reference(settings: MeasureSettings) -> None:
    """Says which file stands for published statistics, and whether its checksum could be compared with a known one."""
    known, file = KNOWN_REFERENCES.get(settings.reference or ""), settings.statistics_file
    if known is None or file is None:
        return
    checked = "as public copies have" if known.sha256 else "for which no checksum is published"
    print(f"{settings.reference}: {file} ({known.url}), with the SHA-256 {sha256(file)}, {checked}.")


def use_color() -> bool:
    """Whether to print in color: on a terminal, unless NO_COLOR is set (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

"""`diffusers-infogain show`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from ..evaluation.identity import pipeline_digest
from ..evaluation.text_comparison import prompt_arguments
from ..files import check_fields, read_json, read_json_lines, replacing, save_text
from ..image_files import open_image, read_png_metadata
from ..loading import image_pipeline_class
from ..output_folders import writable_folder
from ..pipeline_infogain_text import InfoGainTextPipeline
from ..scheduling_infogain import InfoGainScheduler
from ..settings import SETTINGS
from ..trace_film import check_film
from ..trace_plot import as_png, plot_image
from ..trace_view import SampleTrace
from . import common

_OF_A_CALL = (
    "num_inference_steps",
    "guidance_scale",
    "guidance_schedule",
    "guidance_interval",
    "guided_lookahead",
    "height",
    "width",
    "num_beams",
    "num_runs",
    "approximate_cache",
)
_OF_A_TEXT = (
    "max_new_tokens",
    "num_inference_steps",
    "block_length",
    "cache",
    "num_beams",
    "num_runs",
    *common.WRITING,
    *common.CHATS,
)


def show(args: argparse.Namespace) -> None:
    """Draws how an image was decoded from what its file records, or runs the model again; shows a text in color."""
    if args.file.suffix.lower() == ".jsonl":
        _show_text(args)
    else:
        _show_image(args)


def _show_image(args: argparse.Namespace) -> None:
    record, image = _read_image(args.file), open_image(args.file)
    again = args.again or args.film is not None
    name = f"{args.file.stem}-decoding"
    film = None if args.film is None else args.output / f"{name}.{args.film}"
    if film is not None:
        check_film(film, None, 0)
    if "trace" not in record and not again:
        raise ValueError(f"{args.file} does not record how it was decoded: --again finds out by running the model again.")
    sample = None
    if "trace" in record:
        sample = SampleTrace.read(record["trace"], f"The field `trace` in the text chunk of {args.file}")
    writable_folder(args.output)
    if again:
        pipe, output = _run_again(args, record)
        if output.trace.decoded_nothing_of(0):
            raise ValueError(f"Nothing of {args.file} was decoded: there is nothing to show.")
        _compare(args, record, image, output.images[0], pipe)
        figure, steps = output.trace.plot(pipe=pipe), output.trace.of_sample()
    else:
        assert sample is not None
        if not sample.num_steps:
            raise ValueError(f"Nothing of {args.file} was decoded: there is nothing to show.")
        figure, steps = plot_image(sample, image.convert("RGB")), sample
    written = [args.output / f"{name}.png"]
    with replacing(written[0]) as file:
        file.write(as_png(figure))
    if film is not None:
        written.append(output.trace.film(film, size=args.size, pipe=pipe))
    about = ", ".join(str(record[name]) for name in ("prompt", "class_labels") if record.get(name) is not None)
    print(f"{about}\n{steps.took}" if about else steps.took)
    print(f"Written: {' and '.join(map(str, written))}.")


def _read_image(path: Path) -> dict[str, Any]:
    """What a PNG records, with the settings of the run that it belongs to, if it is one of `evaluate` or `compare`."""
    record = read_png_metadata(path)
    folders = [] if "scheduler" in record else list(path.resolve().parents)[:4]
    run = next((folder / "run.json" for folder in folders if (folder / "run.json").is_file()), None)
    return record if run is None else {**_settings_of_run(read_json(run)), **record}


def _settings_of_run(run: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in run.items() if name not in ("prompts", "seed")}


def _found(args: argparse.Namespace, flag: str, name: Any) -> Path | None:
    """The file that an edit began with: by its flag, or by the name that the record has."""
    given = getattr(args, flag)
    if given is not None or name is None:
        return given
    here = [folder / Path(str(name)).name for folder in (args.file.parent, Path())]
    found = next((path for path in here if path.is_file()), None)
    if found is None:
        raise ValueError(
            f"{args.file} is an edit with {name!r}, which is neither beside it nor in this folder: give it by "
            f"--{flag.replace('_', '-')}."
        )
    return found


def _edit_of(args: argparse.Namespace, record: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the call that edited an image; none if it was generated from nothing."""
    if "image" not in record and "image_sha256" not in record:
        return {}
    image, mask = _found(args, "image", record.get("image")), _found(args, "mask", record.get("mask_image"))
    if image is None:
        raise ValueError(f"{args.file} is an edit of an image that it does not hold: give that by --image (and --mask).")
    images = common.edited_images(image, mask)
    edit = {name: record[name] for name in common.EDIT_SETTINGS if name in record}
    if images["mask_image"] is None and "image_sha256" in record and edit.get("strength") == 1:
        edit["strength"] = None  # recorded as the share of the padding that is decoded: all of it
    style = _found(args, "style_image", record.get("style_image"))
    if style is not None:
        edit["style_image"] = common.upright(style)
    elif "style_image_sha256" in record:
        raise ValueError(f"{args.file} has the style of an image that it does not hold: give that by --style-image.")
    return {**images, **edit}


def _run_again(args: argparse.Namespace, record: dict[str, Any]) -> tuple[Any, Any]:
    """The pipeline, and its output for the settings that an image records."""
    where = f"The text chunk of {args.file}"
    if "cell" in record:
        raise ValueError(
            f"{args.file} is of a comparison, which does not record all arguments of its calls: without --again and --film "
            "its own record is drawn."
        )
    check_fields(record, where, {"seed": int, "scheduler": dict})
    edit = _edit_of(args, record)
    pipe = _load(args, record, image_pipeline_class)
    inputs = {name: record[name] for name in pipe.recorded_inputs if record.get(name) is not None}
    first, *_ = pipe.recorded_inputs
    if first not in inputs and record.get("prompt") is None:
        raise ValueError(f"{args.file} does not record its `{first}`, without which it cannot be made again.")
    inputs.setdefault(first, record.get("prompt"))
    call = {name: record[name] for name in _OF_A_CALL if record.get(name) is not None}
    pipe.scheduler = _scheduler_of(pipe, record)
    return pipe, pipe(**inputs, **call, **edit, generator=torch.Generator().manual_seed(record["seed"]))


def _load(args: argparse.Namespace, record: dict[str, Any], kind: Any) -> Any:
    """The model that a record names, or that of --model."""
    model = args.model or record.get("model")
    if not isinstance(model, str) or not model:
        raise ValueError(f"{args.file} does not name the model that made it: give that by --model.")
    if args.model is None and "/" not in model and model not in ("demo", "demo-text") and not Path(model).exists():
        raise ValueError(
            f"{args.file} was made by a model in a folder {model!r}, which is not here: give that folder by --model."
        )
    options = {
        name: record[name]
        for name in ("variant", "vqvae", "language_model")
        if args.model is None and record.get(name) is not None
    }
    dtype = args.dtype or record.get("dtype", "float32")
    pipe = kind(model).from_pretrained(model, dtype=getattr(torch, dtype), **options).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _scheduler_of(pipe: Any, record: dict[str, Any]) -> InfoGainScheduler:
    settings = {name: value for name, value in record["scheduler"].items() if name in SETTINGS}
    return InfoGainScheduler.from_config(pipe.scheduler.config, **settings)


def _compare(args: argparse.Namespace, record: dict[str, Any], before: PIL.Image.Image, now: PIL.Image.Image, pipe: Any) -> None:
    """Says in one sentence if the model did not make the same image again, and what may be the reason."""
    difference = "their sizes differ"
    if before.size == now.size:
        there, here = (np.array(image.convert("RGB")) for image in (before, now))
        share = (there != here).any(-1).mean()
        if share == 0:
            return
        difference = f"{100 * share:.1f} % of the pixels differ"
    reasons = []
    if record.get("device") not in (None, torch.device(args.device).type):
        reasons.append(f"it was made on {record['device']}, now it ran on {torch.device(args.device).type}")
    if "weights" in record and record["weights"] != pipeline_digest(pipe):
        reasons.append("the weights of the model are others")
    because = ", and ".join(reasons) or "other versions, another machine or arguments that it does not record may be the reason"
    print(f"The model made another image than {args.file} this time ({difference}): {because}.", file=sys.stderr)


# Texts


def _show_text(args: argparse.Namespace) -> None:
    for flag in ("film", "image", "mask", "size"):
        if getattr(args, flag) is not None:
            raise ValueError(f"--{flag} is for images, and {args.file} holds texts.")
    records = read_json_lines(args.file)
    if args.line > len(records):
        raise ValueError(f"--line must be at most {len(records)}, the number of texts in {args.file}, got {args.line}.")
    record = records[args.line - 1]
    check_fields(record, f"Line {args.line} of {args.file}", {"prompt": str, "seed": int, "text": str})
    run_file = args.file.with_name(f"{args.file.name}.run.json")
    if not run_file.exists():
        raise ValueError(f"{run_file}, which says how {args.file} was made, is missing.")
    run = read_json(run_file)
    check_fields(run, str(run_file), {"scheduler": dict, "max_new_tokens": int})
    writable_folder(args.output)
    pipe = _load(args, run, lambda _: InfoGainTextPipeline)
    pipe.scheduler = _scheduler_of(pipe, run)
    call = {name: run[name] for name in _OF_A_TEXT if run.get(name) is not None}
    generator = torch.Generator().manual_seed(record["seed"])
    beside = {name: run.get(name) for name in common.BESIDE_PROMPTS}
    asked = prompt_arguments([record["prompt"]], bool(run.get("chat")), **beside)
    output = pipe(**asked, generator=generator, **common.with_processors(call))
    if output.texts != [record["text"]]:
        print(f"The model wrote another text than line {args.line} of {args.file} this time.", file=sys.stderr)
    path = args.output / f"{args.file.stem}-{args.line}-decoding.html"
    save_text(output.trace.html(), path)
    print(output.trace.ansi(color=common.use_color()))
    print(f"Written: {path}.")

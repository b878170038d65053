"""The command line, `diffusers-infogain`."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import PIL.Image
import PIL.PngImagePlugin
import torch
from tqdm.auto import tqdm

from .decoding import DecodingTrace
from .pipeline_infogain import InfoGainPipeline
from .scheduling_infogain import InfoGainScheduler

# The rules that `demo` shows beside each other; everything not named is the scheduler's default.
DEMO_SAMPLERS: dict[str, dict[str, Any]] = {
    "confidence": {"sampler": "confidence"},
    "maskgit": {"sampler": "maskgit"},
    "entropy": {"sampler": "entropy"},
    "info_gain": {"sampler": "info_gain"},
}
DEMO_PROMPTS = (
    "a circle",
    "a square and a triangle",
    "three blue squares",
    "a yellow diamond",
    "a green triangle left of a yellow diamond",
    "a cyan square above a purple circle",
    "a red circle and a blue diamond",
)
# Guidance that the demo model does well with; aMUSEd's default of 10 is for aMUSEd.
DEMO_GUIDANCE_SCALE = 1.2

_SCHEDULER_FLAGS: dict[str, tuple[Any, str]] = {
    "sampler": (str, "rule that picks the tokens to decode"),
    "certainty": (str, "rule that proposes positions for the lookahead samplers"),
    "num_candidates": (int, "actions compared per step"),
    "token_temperature": (float, "of the token draws; 0 takes the most probable token"),
    "top_k": (int, "draw from the k most probable tokens"),
    "top_p": (float, "draw from the smallest set of tokens with this probability"),
    "confidence_threshold": (float, "commit tokens above this probability without lookahead"),
    "gain_weight": (float, "weight of the information gain against the cost"),
    "gain_reduction": (str, "mean or sum of the remaining entropies"),
    "masking_schedule": (str, "cosine, linear or arccos"),
    "tokens_per_step": (int, "fixed number of tokens per step"),
    "entropy_bound": (float, "of the sampler entropy_bound, in nats"),
    "klass_threshold": (float, "of the sampler klass, in nats"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


@dataclass
class Generated:
    """Images with the seeds they were made from, and what making them took."""

    images: list[PIL.Image.Image]
    seeds: list[int]
    traces: list[DecodingTrace]
    seconds: float

    @property
    def model_rows(self) -> torch.Tensor:
        """Per image: states that went through the model (twice that many rows with guidance)."""
        return torch.cat([trace.model_rows.sum(0) for trace in self.traces])

    @property
    def cumulative_entropy(self) -> torch.Tensor:
        """Per image, in nats."""
        return torch.cat([trace.cumulative_entropy for trace in self.traces])


def generate_images(
    pipe: InfoGainPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    batch_size: int,
    description: str,
    finished: Callable[[int, PIL.Image.Image], None] = lambda index, image: None,
    **call: Any,
) -> Generated:
    """One image per prompt and seed, in batches, under one progress bar. An image depends on its own prompt and seed only.

    Args:
        finished: Called with the index and the image as soon as an image is done.
        call: Arguments of the pipeline.
    """
    pipe.set_progress_bar_config(disable=True)
    result = Generated([], list(seeds), [], 0.0)
    start = time.perf_counter()
    with tqdm(total=len(prompts), desc=description, unit="image") as progress:
        for first in range(0, len(prompts), batch_size):
            rows = slice(first, first + batch_size)
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[rows]]
            images, trace = pipe(list(prompts[rows]), generator=generators, return_dict=False, **call)
            for i, image in enumerate(images, first):
                finished(i, image)
            result.images += images
            result.traces.append(trace)
            progress.update(len(images))
    result.seconds = time.perf_counter() - start
    return result


def save_png(image: PIL.Image.Image, path: Path, metadata: dict[str, Any]) -> None:
    """Writes a PNG in one go (an interrupted run leaves no half file), with `metadata` as JSON in its text chunk "infogain"."""
    information = PIL.PngImagePlugin.PngInfo()
    information.add_text("infogain", json.dumps(metadata))
    descriptor, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            image.save(file, "PNG", pnginfo=information)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    path.chmod(0o644)


def writable_folder(path: Path) -> Path:
    """Makes the folder, and finds out before hours of work whether files can be written there.

    Raises:
        OSError: If they cannot.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OSError(f"Cannot write to the output folder {str(path)!r}: {error.strerror}.") from error
    return path


def load_pipeline(args: argparse.Namespace) -> InfoGainPipeline:
    """The model of the flags, from safetensors only."""
    pipe = InfoGainPipeline.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    return pipe.to(args.device)


def scheduler_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that the flags name; all others stay the model's."""
    settings = {name: getattr(args, name) for name in _SCHEDULER_FLAGS if getattr(args, name) is not None}
    if args.position_temperature is not None:
        pair = args.position_temperature
        if len(pair) > 2:
            raise ValueError(f"`position_temperature` must be one number or two (start end), got {len(pair)}.")
        settings["position_temperature"] = pair[0] if len(pair) == 1 else tuple(pair)
    return settings


def read_prompts(args: argparse.Namespace) -> list[str]:
    """Prompts from the arguments, then from the file."""
    prompts = list(args.prompts)
    if args.prompts_file is not None:
        lines = args.prompts_file.read_text(encoding="utf-8").splitlines()
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError("No prompts: give them as arguments, or a file with one per line by --prompts-file.")
    return prompts


def _positive(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(args, name) < 1:
            raise ValueError(f"`{name}` must be an integer >= 1, got {getattr(args, name)}.")


def generate(args: argparse.Namespace) -> None:
    """Images from prompts, as PNG files that carry their settings."""
    _positive(args, "num_images", "batch_size")
    prompts, folder = read_prompts(args), writable_folder(args.output)
    pipe = load_pipeline(args)
    pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, **scheduler_settings(args))
    guidance_scale = args.guidance_scale
    if guidance_scale is None:
        guidance_scale = DEMO_GUIDANCE_SCALE if args.model == "demo" else 10.0
    call = {
        "num_inference_steps": args.steps,
        "guidance_scale": guidance_scale,
        "guidance_schedule": args.guidance_schedule,
        "negative_prompt": args.negative_prompt,
        "height": args.height,
        "width": args.width,
        "lookahead_batch_size": args.lookahead_batch_size,
    }
    every = [prompt for prompt in prompts for _ in range(args.num_images)]
    seeds = [args.seed + i for _ in prompts for i in range(args.num_images)]
    config = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    shared = {"model": args.model, "dtype": args.dtype, **call, "scheduler": config}

    def save(index: int, image: PIL.Image.Image) -> None:
        prompt, seed = every[index], seeds[index]
        words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]
        save_png(image, folder / f"{index:05d}-{words}-seed{seed}.png", {"prompt": prompt, "seed": seed, **shared})

    result = generate_images(pipe, every, seeds, args.batch_size, "generate", save, **call)
    if args.grid:
        from .visualization import GridCell, GridRow, labelled_grid

        per_prompt = [result.images[i : i + args.num_images] for i in range(0, len(every), args.num_images)]
        rows = [
            GridRow(f"seed {args.seed + i}", [], [GridCell(images[i]) for images in per_prompt]) for i in range(args.num_images)
        ]
        save_png(labelled_grid(prompts, rows), folder / "grid.png", {"prompts": prompts, "seed": args.seed, **shared})
    count = len(result.images)
    print(
        f"{count} images in {result.seconds:.1f} s ({result.seconds / count:.2f} s each), "
        f"{result.model_rows.double().mean():.1f} model rows and {result.cumulative_entropy.mean():.1f} nats of cumulative "
        f"entropy per image. Written to {folder}."
    )


def demo(args: argparse.Namespace) -> None:
    """A picture of the same prompts and seeds under four samplers, judged by the demo world's checker."""
    from .demo import checker, shapes
    from .visualization import GridCell, GridRow, labelled_grid

    _positive(args, "num_prompts", "batch_size", "steps")
    folder = writable_folder(args.output)
    args.model = "demo"
    pipe = load_pipeline(args)
    base = pipe.scheduler.config
    captions = [shapes.parse_caption(prompt) for prompt in DEMO_PROMPTS]
    sampled = shapes.sample_captions(args.num_prompts, torch.Generator().manual_seed(args.seed), held_out=True)
    prompts = [caption.text for caption in [*captions, *sampled]]
    seeds = [args.seed + i for i in range(len(prompts))]
    rows = []
    for name, settings in DEMO_SAMPLERS.items():
        pipe.scheduler = InfoGainScheduler.from_config(base, **settings)
        # On a CPU a chunk that stays in the cache is a quarter faster; images do not depend on it.
        call = {"num_inference_steps": args.steps, "guidance_scale": DEMO_GUIDANCE_SCALE, "lookahead_batch_size": 16}
        result = generate_images(pipe, prompts, seeds, args.batch_size, name, **call)
        verdicts = [checker.check_image(i, c) for i, c in zip(result.images, [*captions, *sampled], strict=True)]
        right = torch.tensor([verdict.holds for verdict in verdicts[len(captions) :]]).double()
        error = (right.var() / len(right)).sqrt().item() if len(right) > 1 else float("nan")
        lines = [
            f"{args.steps} steps, {result.model_rows.double().mean():.0f} model rows",
            f"{100 * right.mean():.0f} ± {100 * error:.0f} % of {len(right)} held-out prompts right",
            f"{result.cumulative_entropy[len(captions) :].mean():.1f} nats cumulative entropy",
        ]
        cells = [
            GridCell(image, verdict.reason or "right", verdict.holds)
            for image, verdict in zip(result.images[: len(captions)], verdicts[: len(captions)], strict=True)
        ]
        rows.append(GridRow(name, lines, cells))
        print(f"{name}: {', '.join(lines)}, {result.seconds / len(prompts):.2f} s per image", flush=True)
    path = folder / "demo.png"
    title = "Same prompts, same seeds, same model: four ways to choose the next tokens"
    save_png(labelled_grid([c.text for c in captions], rows, title), path, {"seed": args.seed, "steps": args.steps})
    print(f"Picture written to {path}.")


def exact(args: argparse.Namespace) -> None:
    """The table of all samplers on models with exact marginals."""
    from .evaluation.exact import compare_exact

    _positive(args, "num_samples")
    print(compare_exact(args.num_samples, args.seed))


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `run`."""
    parser = _Parser(prog="diffusers-infogain", description="Info-gain sampling for masked diffusion models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def add(name: str, run: Any) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run)
        return command

    def add_machine(command: argparse.ArgumentParser) -> None:
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="such as cpu or cuda")
        command.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
        command.add_argument("--batch-size", type=int, default=8, help="images decoded together (default: 8)")
        command.add_argument("--seed", type=int, default=0, help="of the first image (default: 0)")

    command = add("generate", generate)
    command.add_argument("prompts", nargs="*", help="what to draw")
    command.add_argument("--prompts-file", type=Path, help="text file with one prompt per line")
    command.add_argument("--model", default="demo", help="'demo', a folder or a Hub id in aMUSEd's format (default: demo)")
    command.add_argument("--output", type=Path, default=Path("outputs"), help="folder for the images (default: outputs)")
    command.add_argument("--grid", action="store_true", help="also write all images into one picture, grid.png")
    command.add_argument("--num-images", type=int, default=1, help="images per prompt, with seeds one after the other")
    command.add_argument("--steps", type=int, help="decoding steps (default: 12)")
    command.add_argument("--guidance-scale", type=float, help="1 switches guidance off (default: 1.2 for demo, else 10)")
    command.add_argument("--guidance-schedule", default="constant", help="constant, linear or cosine")
    command.add_argument("--negative-prompt")
    command.add_argument("--height", type=int, help="in pixels (default: the model's)")
    command.add_argument("--width", type=int)
    command.add_argument("--lookahead-batch-size", type=int, help="most states run through the model at once")
    add_machine(command)
    settings = command.add_argument_group("sampler", "settings of InfoGainScheduler; the model's where not given")
    for name, (kind, text) in _SCHEDULER_FLAGS.items():
        settings.add_argument("--" + name.replace("_", "-"), type=kind, help=text)
    settings.add_argument("--position-temperature", type=float, nargs="+", help="one number, or two: start end")

    command = add("demo", demo)
    command.add_argument("--output", type=Path, default=Path("outputs"), help="folder for demo.png (default: outputs)")
    command.add_argument("--steps", type=int, default=8, help="decoding steps (default: 8)")
    command.add_argument("--num-prompts", type=int, default=120, help="held-out prompts behind each accuracy (default: 120)")
    add_machine(command)

    command = add("exact", exact)
    command.add_argument("--num-samples", type=int, default=200, help="per sampler and task (default: 200)")
    command.add_argument("--seed", type=int, default=0)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; wrong input ends with one sentence on stderr and exit code 2."""
    args = build_parser().parse_args(arguments)
    try:
        args.run(args)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"diffusers-infogain: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("diffusers-infogain: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What the commands share: flags, loading, and the pipeline's call."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from ..decoding import DecodingTrace
from ..evaluation.identity import pipeline_digest
from ..evaluation.identity import scheduler_settings as scheduler_settings_of
from ..evaluation.measure import FEATURES, METRICS, MeasureSettings
from ..evaluation.photographs import RESIZES
from ..evaluation.prompts import ImageRequest, Prompt, read_prompts
from ..evaluation.runs import Process, make_missing
from ..files import owned
from ..loading import image_pipeline_class
from ..scheduling_infogain import PRESETS, InfoGainScheduler

# Guidance that the demo model does well with; aMUSEd's default of 10 is for aMUSEd.
DEMO_GUIDANCE_SCALE = 1.2

SCHEDULER_FLAGS: dict[str, tuple[Any, str]] = {
    "sampler": (str, "rule that picks the tokens to decode"),
    "certainty": (str, "rule that proposes positions for the lookahead samplers"),
    "num_candidates": (int, "actions compared per step"),
    "token_temperature": (float, "of the token draws; 0 takes the most probable token"),
    "top_k": (int, "draw from the k most probable tokens"),
    "top_p": (float, "draw from the smallest set of tokens with this probability"),
    "confidence_threshold": (
        float,
        "commit tokens above this probability without lookahead; of the samplers confidence_parallel and klass_parallel",
    ),
    "gain_weight": (float, "weight of the information gain against the cost"),
    "gain_reduction": (str, "mean, sum or kl: what the lookahead counts as gain"),
    "masking_schedule": (str, "cosine, linear or arccos"),
    "tokens_per_step": (int, "fixed number of tokens per step"),
    "entropy_bound": (float, "in nats; decode more tokens than the schedule asks for while they are this independent; 0: off"),
    "klass_threshold": (float, "of the samplers klass and klass_parallel, in nats"),
    "klass_history": (int, "of the sampler klass_parallel: steps on end that a position must have settled for"),
    "pc_frequencies": (str, "of the sampler pc_sampler: safetensors file with the frequency of every token"),
    "pc_decay": (float, "of the sampler pc_sampler: how fast it prefers earlier positions"),
    "pc_clip": (float, "of the sampler pc_sampler: the most that its confidence counts"),
}


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
    def model_calls(self) -> torch.Tensor:
        """Per image: how often the model ran in sequence."""
        return torch.cat([trace.model_calls for trace in self.traces])

    @property
    def cumulative_entropy(self) -> torch.Tensor:
        """Per image, in nats."""
        return torch.cat([trace.cumulative_entropy for trace in self.traces])


def generate_images(
    pipe: DiffusionPipeline,
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


def add_loading_flags(command: argparse.ArgumentParser) -> None:
    """What a published checkpoint needs beside its name."""
    text = "variant of the weights, such as fp16, or a MaskGIT's size (256_tiny to 384_large)"
    command.add_argument("--variant", help=text)
    text = "folder, file or Hub id of the image tokenizer, for checkpoints that are published without one"
    command.add_argument("--vqvae", help=text)


def loading_arguments(args: argparse.Namespace, load: Callable[..., Any]) -> dict[str, Any]:
    """The flags of `add_loading_flags` that are given.

    Raises:
        ValueError: If `load` does not take one of them.
    """
    given = {name: getattr(args, name) for name in ("variant", "vqvae") if getattr(args, name) is not None}
    parameters = inspect.signature(load).parameters
    for name in given:
        if name not in parameters:
            raise ValueError(f"--{name} is not for this kind of checkpoint.")
    return given


def add_model_flags(command: argparse.ArgumentParser) -> None:
    """The model and how to load it."""
    text = "'demo', a folder or a Hub id of any family that `load` knows (default: demo)"
    command.add_argument("--model", default="demo", help=text)
    add_loading_flags(command)


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
    options = loading_arguments(args, getattr(kind, "open_published", kind.from_pretrained))
    return kind.from_pretrained(args.model, dtype=getattr(torch, args.dtype), **options).to(args.device)


def scheduler_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that the flags name; all others stay the model's."""
    settings = dict(PRESETS[args.preset]) if args.preset else {}
    flags = (*SCHEDULER_FLAGS, "halton_randomize")
    settings |= {name: getattr(args, name) for name in flags if getattr(args, name) is not None}
    if args.position_temperature is not None:
        pair = args.position_temperature
        if len(pair) > 2:
            raise ValueError(f"`position_temperature` must be one number or two (start end), got {len(pair)}.")
        settings["position_temperature"] = pair[0] if len(pair) == 1 else tuple(pair)
    return settings


def default_guidance_scale(model: str, kind: type[DiffusionPipeline]) -> float:
    """What suits the model: its own for the demo model, else the default of its pipeline."""
    return DEMO_GUIDANCE_SCALE if model == "demo" else inspect.signature(kind.__call__).parameters["guidance_scale"].default


def require_positive(args: argparse.Namespace, *names: str) -> None:
    """Raises a ValueError for the first of these flags that is below 1."""
    for name in names:
        if getattr(args, name) < 1:
            raise ValueError(f"`{name}` must be an integer >= 1, got {getattr(args, name)}.")


def add_device_flags(command: argparse.ArgumentParser, batch_size: int, unit: str = "image") -> None:
    """Device, dtype and batch size."""
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="such as cpu or cuda")
    command.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    text = f"{unit}s decoded together (default: {batch_size})"
    command.add_argument("--batch-size", type=int, default=batch_size, help=text)


def add_machine_flags(command: argparse.ArgumentParser, unit: str = "image") -> None:
    """Device, dtype, batch size and seed."""
    add_device_flags(command, 8, unit)
    command.add_argument("--seed", type=int, default=0, help=f"of the first {unit} (default: 0)")


def add_call_flags(command: argparse.ArgumentParser) -> None:
    """Arguments of the pipeline's call."""
    command.add_argument("--steps", type=int, help="decoding steps (default: the pipeline's, 12 for demo)")
    command.add_argument("--guidance-scale", type=float, help="strength of guidance (default: 1.2 for demo, else the pipeline's)")
    command.add_argument("--guidance-schedule", default="constant", help="constant, linear or cosine")
    command.add_argument("--negative-prompt")
    command.add_argument("--height", type=int, help="in pixels (default: the model's)")
    command.add_argument("--width", type=int)
    command.add_argument("--lookahead-batch-size", type=int, help="most states run through the model at once")
    command.add_argument("--num-beams", type=int, default=1, help="above 1: beam search with that many beams")
    command.add_argument("--num-runs", type=int, default=1, help="above 1: the best of that many runs per image")


def call_arguments(args: argparse.Namespace, pipe: DiffusionPipeline) -> dict[str, Any]:
    """The arguments of the pipeline's call that the flags name.

    Raises:
        ValueError: If the model's pipeline does not take one of them.
    """
    kind, scale = type(pipe), args.guidance_scale
    call = {
        "num_inference_steps": args.steps,
        "guidance_scale": default_guidance_scale(args.model, kind) if scale is None else scale,
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


def add_sampler_flags(command: argparse.ArgumentParser) -> None:
    """One flag per setting of the scheduler."""
    settings = command.add_argument_group("sampler", "settings of InfoGainScheduler; the model's where not given")
    settings.add_argument("--preset", choices=tuple(PRESETS), help="settings by name, which single flags override")
    for name, (kind, text) in SCHEDULER_FLAGS.items():
        settings.add_argument("--" + name.replace("_", "-"), type=kind, help=text)
    text = "halton starts at a random place of its order, every image at its own"
    settings.add_argument("--halton-randomize", action=argparse.BooleanOptionalAction, default=None, help=text)
    settings.add_argument("--position-temperature", type=float, nargs="+", help="one number, or two: start end")


def scheduler_config(pipe: DiffusionPipeline) -> dict[str, Any]:
    """The settings of a pipeline's scheduler, for records."""
    return scheduler_record(pipe.scheduler)


def scheduler_record(scheduler: InfoGainScheduler) -> dict[str, Any]:
    """The settings of a scheduler, for records, as JSON gives them back."""
    return json.loads(json.dumps(scheduler_settings_of(scheduler.config)))


def add_prompt_flags(command: argparse.ArgumentParser) -> None:
    """Where the prompts of a run come from."""
    command.add_argument(
        "--prompts",
        default="demo",
        help="file: text with one prompt or class name per line, JSONL with the key 'prompt' (GenEval's "
        "evaluation_metadata.jsonl), JSON with a list or an id2label mapping; or 'demo' / 'demo-trained': captions of the demo "
        "world that the demo model was not / was trained on (default: demo)",
    )
    command.add_argument("--prompt-template", default="{}", help="sentence around every prompt, such as 'a photo of a {}'")
    command.add_argument("--num-prompts", type=int, help="the first so many prompts only (default: all; 500 captions for demo)")
    command.add_argument("--prompts-seed", type=int, default=1234, help="of the demo world's captions (default: 1234)")


def run_prompts(args: argparse.Namespace) -> list[Prompt]:
    """The prompts that the flags name."""
    if args.num_prompts is not None:
        require_positive(args, "num_prompts")
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


def make_run(
    pipe: DiffusionPipeline,
    every: Sequence[ImageRequest],
    folder: Path,
    state: PartialState,
    batch_size: int,
    description: str,
    call: dict[str, Any],
) -> None:
    """Makes the missing images of a run, shared out over the processes; returns when all processes are done."""
    pipe.set_progress_bar_config(disable=True)

    def make(prompts: list[str], seeds: list[int]) -> tuple[list[PIL.Image.Image], list[dict[str, Any]]]:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        images, trace = pipe(prompts, generator=generators, return_dict=False, **call)
        return images, trace.records()

    make_missing(every, make, folder, batch_size, Process(state.process_index, state.num_processes), description)
    state.wait_for_everyone()


def add_metric_flags(command: argparse.ArgumentParser) -> None:
    """What to measure, and by which networks."""
    group = command.add_argument_group("metrics")
    group.add_argument(
        "--metrics", nargs="*", help=f"among {', '.join(METRICS)} (default: what the demo world allows, else none)"
    )
    group.add_argument(
        "--reference", help="real images: a folder, ADM's statistics (.npz), or 'demo' for renderings of the prompts"
    )
    group.add_argument(
        "--features", choices=FEATURES, help="of the distances (default: demo for the demo's prompts, else inception)"
    )
    text = (
        "how images of any size come to that of the network: Pillow's filters with antialias on the largest centred square, or "
        "'network': by the network itself, as published FIDs have it (default: as --reference's statistics, else bicubic)"
    )
    group.add_argument("--resize", choices=RESIZES, help=text)
    group.add_argument("--inception-weights", type=Path, help="file of FID's weights (default: torch-fidelity downloads them)")
    group.add_argument("--clip-model", help="folder or Hub id of a CLIP model")


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

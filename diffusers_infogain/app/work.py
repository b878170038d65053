"""Requests of the page, run on the model one after the other: checked, bounded, watched, and stopped when asked."""

from __future__ import annotations

import copy
import inspect
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import PIL.Image
import torch
from diffusers import DiffusionPipeline

from ..checks import check_integer, check_number
from ..pipeline_infogain_text import InfoGainTextPipeline
from ..printing import shown
from ..scheduling_infogain import InfoGainScheduler
from ..trace import DecodingTrace

LARGEST_SEED = 2**31 - 1
"""What number fields of browsers hold without rounding, and to spare."""
LONGEST_PROMPT = 2000
"""In characters."""

Report = Callable[[float, str], Any]
"""`report(share, what)` is told how far a request is, a share in [0, 1]."""


@dataclass(frozen=True)
class Limits:
    """The largest request that the page takes, so that one visitor cannot keep the machine from the others.

    Attributes:
        steps: Decoding steps.
        samples: Images or texts.
        new_tokens: Tokens of a text.
        waiting: Requests that wait for their turn; further ones are turned away.
    """

    steps: int = 100
    samples: int = 8
    new_tokens: int = 256
    waiting: int = 16


class StoppedError(Exception):
    """A request was stopped before it had anything to show."""


@dataclass
class Job:
    """A request of a visitor, from the click until its result is there; another thread can stop it."""

    pipes: list[DiffusionPipeline] = field(default_factory=list)
    stopped: bool = False

    def stop(self) -> None:
        """Ends the decoding before its next step, and everything that was to come after it."""
        self.stopped = True
        for pipe in self.pipes:
            pipe._interrupt = True

    def check(self) -> None:
        """Raises `StoppedError` if the request was stopped."""
        if self.stopped:
            raise StoppedError


class Jobs:
    """The request of every visitor that waits or runs."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()

    def begin(self, visitor: str) -> Job:
        """A new request, which replaces the visitor's earlier one."""
        with self._lock:
            self._jobs[visitor] = Job()
            return self._jobs[visitor]

    def of(self, visitor: str) -> Job:
        """The visitor's request; a new one if there is none, as for programs that call the page's interface."""
        with self._lock:
            return self._jobs.setdefault(visitor, Job())

    def end(self, visitor: str) -> None:
        """Forgets a request that is done."""
        with self._lock:
            self._jobs.pop(visitor, None)

    def stop(self, visitor: str) -> bool:
        """Stops a request; returns whether there was one."""
        with self._lock:
            job = self._jobs.get(visitor)
        if job is not None:
            job.stop()
        return job is not None

    def stop_all(self) -> None:
        """Stops every request."""
        with self._lock:
            jobs = list(self._jobs.values())
        for job in jobs:
            job.stop()


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a visitor asks for.

    Attributes:
        prompt: What to draw or to write on.
        seed: Of the first sample; the others have consecutive ones.
        samples: How many images or texts.
        settings: The scheduler's, from `fields.settings_from`.
        steps: Decoding steps of an image; None for texts, whose settings say how many tokens a step decodes.
        as_chat: Whether the prompt is a user's turn in a chat.
        call: Further arguments of the pipeline's call.
    """

    prompt: str
    seed: int
    samples: int = 1
    settings: Mapping[str, Any]
    steps: int | None = None
    as_chat: bool = False
    call: Mapping[str, Any] = field(default_factory=dict)

    def check(self, limits: Limits) -> None:
        """Raises a ValueError for the first entry that is not allowed, naming it."""
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise ValueError("`prompt` must not be empty.")
        if len(self.prompt) > LONGEST_PROMPT:
            raise ValueError(f"`prompt` must have at most {LONGEST_PROMPT} characters, got {len(self.prompt)}.")
        check_integer("seed", self.seed, 0)
        check_integer("seed", self.seed, 0, LARGEST_SEED)
        check_integer("samples", self.samples, 1)
        check_integer("samples", self.samples, 1, limits.samples)
        if self.steps is not None:
            check_integer("num_inference_steps", self.steps, 1, limits.steps)
        if "max_new_tokens" in self.call:
            check_integer("max_new_tokens", self.call["max_new_tokens"], 0, limits.new_tokens)
        if "guidance_scale" in self.call:
            check_number("guidance_scale", self.call["guidance_scale"], 0, 100)


@dataclass(frozen=True)
class Result:
    """What came out.

    Attributes:
        output: The pipeline's output, with its trace.
        seconds: From the call of the pipeline to its images or texts.
        stopped: Whether it was stopped before it was finished.
    """

    output: Any
    seconds: float
    stopped: bool

    @property
    def trace(self) -> DecodingTrace:
        """How the samples were decoded."""
        return self.output.trace

    @property
    def figures(self) -> dict[str, float]:
        """What a sample took on average, and what the whole request did, by the name that the page shows."""
        trace, samples = self.trace, max(self.trace.winner.shape[1], 1)
        steps = (trace.num_decoded > 0).sum(0)
        return {
            "Steps": float(steps.sum()) / samples,
            "Model rows (NFE)": float(trace.num_evaluations.sum()) / samples,
            "Passes one after the other": float(trace.sequential_passes.sum()) / samples,
            "Cumulative entropy (nats)": float(trace.cumulative_entropy.sum()) / samples,
            "Seconds": self.seconds,
        }


class _Watched:
    """Stands in for the progress bar of a pipeline: tells the page how far it is."""

    disable = False

    def __init__(self, total: int, report: Callable[[float], Any]):
        self.total, self.n, self._report = max(total, 1), 0, report

    def __enter__(self) -> _Watched:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def update(self, n: int = 1) -> None:
        self.n += n
        self._report(min(self.n / self.total, 1.0))


def run(pipe: DiffusionPipeline, request: Request, limits: Limits, job: Job, report: Report, what: str = "") -> Result:
    """Runs one request.

    The pipeline that was loaded stays as it is: a copy, which shares its networks, gets the scheduler of the request.

    Args:
        pipe: An image or text pipeline.
        request: What is asked for.
        limits: The largest that is allowed.
        job: By which it can be stopped.
        report: Is told how far it is.
        what: What the report calls it, such as the name of the sampler.

    Raises:
        ValueError: For the first entry that is not allowed.
        StoppedError: If it was stopped before its first step.
    """
    request.check(limits)
    job.check()
    own = copy.copy(pipe)
    own.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, **request.settings)
    own.progress_bar = lambda total: _Watched(total, lambda share: report(share, what))
    generators = [torch.Generator().manual_seed(request.seed + i) for i in range(request.samples)]
    arguments: dict[str, Any] = {**request.call, "generator": generators}
    if request.as_chat:
        arguments["messages"] = [{"role": "user", "content": request.prompt}]
    else:
        arguments[prompt_argument(pipe)] = request.prompt
    if isinstance(pipe, InfoGainTextPipeline):
        arguments["num_texts_per_prompt"] = request.samples
    else:
        arguments |= {"num_images_per_prompt": request.samples, "num_inference_steps": request.steps}
    job.pipes.append(own)
    started = time.perf_counter()
    try:
        output = own(**arguments)
    finally:
        job.pipes.remove(own)
    result = Result(output, time.perf_counter() - started, job.stopped)
    if not result.trace.num_decoded.any():
        job.check()
    return result


def prompt_argument(pipe: DiffusionPipeline) -> str:
    """The name of the argument that says what to make: "prompt", or "class_labels" for models of classes."""
    return next(name for name in inspect.signature(type(pipe).__call__).parameters if name != "self")


def fills_in(pipe: InfoGainTextPipeline, prompt: str) -> bool:
    """Whether a prompt holds masks, which are filled in; nothing is written behind such a prompt."""
    return pipe.family.mask_token_id in pipe.encode(prompt)[0]


def takes(pipe: DiffusionPipeline, argument: str) -> bool:
    """Whether the pipeline's call has an argument of this name."""
    return argument in inspect.signature(type(pipe).__call__).parameters


def warm_up(pipe: DiffusionPipeline) -> None:
    """Runs the model once, so that the first visitor's seconds do not count what is only done once."""
    prompt: Any = 0 if prompt_argument(pipe) == "class_labels" else "a"
    length = {"max_new_tokens": 1} if isinstance(pipe, InfoGainTextPipeline) else {"num_inference_steps": 1}
    pipe(prompt, generator=torch.Generator().manual_seed(0), **length)


def random_seed() -> int:
    """A seed for the button that draws one."""
    return random.SystemRandom().randrange(1_000_000)


def whole(name: str, value: Any) -> int:
    """An integer from a number field, which gives 3 as 3.0 at times, and None when it is empty.

    Raises:
        ValueError: If it is anything else, naming the field.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"`{name}` must be a whole number, got {'nothing' if value is None else shown(value)}.")
    return value


def enlargement(size: Sequence[int], shown_at: int = 512) -> int:
    """By which whole factor a small image is enlarged for the page, so that its pixels stay crisp."""
    return max(1, shown_at // max(size))


def enlarged(image: PIL.Image.Image, shown_at: int = 512) -> PIL.Image.Image:
    """The image, each pixel a square of pixels if it is small."""
    factor = enlargement(image.size, shown_at)
    if factor == 1:
        return image
    return image.resize((image.width * factor, image.height * factor), PIL.Image.Resampling.NEAREST)

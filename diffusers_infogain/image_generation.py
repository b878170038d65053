"""What the image pipelines have in common: checks of a call, guidance, the decoding of a canvas of tokens.

A pipeline adds what differs between models: how a prompt becomes a condition, `denoise`, and how tokens become pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput

from . import __version__
from .callbacks import CallState, StepCallback, call_back, tensor_inputs
from .candidates import Generators, check_generator
from .checks import check_bool, check_choice, check_integer, check_number, check_search, check_type, prompt_list
from .components import converted_scheduler
from .decoding import DecodingOutput, DecodingStep, DecodingTrace, Denoise, decode_or_search
from .pictures import Picture
from .printing import shown, summary
from .scheduling_infogain import InfoGainScheduler

GUIDANCE_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda u: 1.0,
    "linear": lambda u: u,
    "cosine": lambda u: (1 - math.cos(math.pi * u)) / 2,
}
CALLBACK_TENSOR_INPUTS = ["latents", "logits", "scores"]
_STRONGEST = 1e6
_LARGEST_SIDE = 2**16


@dataclass
class InfoGainPipelineOutput(BaseOutput):
    """Images, and how they were decoded.

    Attributes:
        images: PIL images, whose PNG files carry their settings, a NumPy array (B, H, W, 3) or a tensor (B, 3, H, W) in [0, 1],
            or tokens (B, h, w), by `output_type`.
        trace: The decoding's `DecodingTrace`: cost, gain, winner, positions and model rows per step and image.
        seeds: Every image's own seed: `generator=torch.Generator(device).manual_seed(seed)` makes it again alone.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    trace: DecodingTrace
    seeds: list[int]

    def __repr__(self) -> str:
        return summary(self)


def as_infogain_scheduler(scheduler: Any) -> Any:
    """An `InfoGainScheduler` as it is, an `AmusedScheduler` converted; None stays None.

    Raises:
        ValueError: For any other scheduler.
    """
    scheduler = converted_scheduler(scheduler)
    return None if scheduler is None else _check_scheduler(scheduler)


def _check_scheduler(scheduler: Any) -> InfoGainScheduler:
    if not isinstance(scheduler, InfoGainScheduler):
        raise ValueError(
            f"`scheduler` must be an InfoGainScheduler or an AmusedScheduler, got {type(scheduler).__name__}: "
            "InfoGainScheduler.from_config(...) converts an AmusedScheduler's config."
        )
    return scheduler


def check_one_each(name: str, value: Any, num_prompts: int) -> None:
    """Raises a ValueError if `value` is a list or tensor with neither one entry nor one for each prompt."""
    if value is not None and not isinstance(value, str) and len(value) not in (1, num_prompts):
        raise ValueError(f"`{name}` must have one entry, or one for each of the {num_prompts} prompts, got {len(value)}.")


def check_prompts(prompt: Any, negative_prompt: Any) -> int:
    """The number of prompts; negative ones must be one for all or one each.

    Raises:
        ValueError: If they are not, or one of both is neither a string nor a list of strings.
    """
    num_prompts = len(prompt_list("prompt", prompt))
    if negative_prompt is not None:
        prompt_list("negative_prompt", negative_prompt)
        check_one_each("negative_prompt", negative_prompt, num_prompts)
    return num_prompts


def repeat_prompts(texts: str | list[str], num_prompts: int, num_images_per_prompt: int) -> list[str]:
    """One text per image, those of a prompt in a row; a single text serves all prompts."""
    every = [texts] if isinstance(texts, str) else texts
    every = every * num_prompts if len(every) == 1 else every
    return [text for text in every for _ in range(num_images_per_prompt)]


def check_latents(latents: torch.Tensor, shape: tuple[int, int, int], codebook_size: int, mask_token_id: int) -> None:
    """Raises a ValueError if `latents` are not (B, h, w) ids of the codebook or the mask id."""
    if not isinstance(latents, torch.Tensor) or latents.shape != shape or latents.dtype != torch.long:
        found = f"{latents.dtype} {tuple(latents.shape)}" if isinstance(latents, torch.Tensor) else shown(latents)
        raise ValueError(f"`latents` must be a long tensor of token ids of shape {shape}, got {found}.")
    known = latents[latents != mask_token_id]
    if known.numel() and not 0 <= int(known.min()) <= int(known.max()) < codebook_size:
        raise ValueError(
            f"`latents` must hold ids from 0 to {codebook_size - 1} or the mask id {mask_token_id}, got ids from "
            f"{int(known.min())} to {int(known.max())}."
        )


def guide(
    cond: torch.Tensor, uncond: torch.Tensor, tokens: torch.Tensor, mask_token_id: int, guidance_scale: float, schedule: str
) -> torch.Tensor:
    """uncond + g · (cond - uncond) in float32, g from 1 to `guidance_scale` with the share of the canvas that is decoded.

    Args:
        cond, uncond: Logits (R, L, V), or (M, V) at the M masks of `tokens`.
        tokens: (R, L) long.
        schedule: One of `GUIDANCE_SCHEDULES`.
    """
    masks = (tokens == mask_token_id).sum(-1)
    ramp = [GUIDANCE_SCHEDULES[schedule](u) for u in (1 - masks.double() / tokens.shape[1]).tolist()]
    scales = 1 + (guidance_scale - 1) * torch.tensor(ramp, dtype=torch.float32, device=tokens.device)
    scales = scales.repeat_interleave(masks)[:, None] if cond.ndim == 2 else scales[:, None, None]
    cond, uncond = cond.float(), uncond.float()
    return uncond + scales * (cond - uncond)


@dataclass(kw_only=True)
class ImageGeneration:
    """One call of an image pipeline: checked when it is made, then run.

    Attributes:
        pipe: The pipeline.
        codebook_size: Ids below it are image tokens.
        vocab_size: The scheduler's mask id is below it.
        scale_factor: Pixels a token, along one side.
        unit: What height and width must be multiples of, in pixels.
        default_size: Tokens along one side.
        default_num_inference_steps: Steps where neither the call nor the scheduler's `tokens_per_step` says how many.
        num_prompts: Each gives `num_images_per_prompt` images.
        guidance_offset: What the family's guidance scale is short of s in uncond + s · (cond - uncond): 1 where it counts from 0.
        asked: What the images show, by argument, one for all prompts or a list with one each; for their files.
        state: What callbacks and other threads may read and change while the call runs.

    The others are the arguments of the call. Height and width are numbers after the check.

    Raises:
        ValueError: For the first argument that does not fit.
    """

    pipe: DiffusionPipeline
    codebook_size: int
    vocab_size: int
    scale_factor: int
    unit: int
    default_size: int
    default_num_inference_steps: int
    num_prompts: int
    height: int | None
    width: int | None
    num_inference_steps: int | None
    guidance_scale: float
    guidance_schedule: str
    num_images_per_prompt: int
    generator: Generators
    latents: torch.Tensor | None
    output_type: str
    return_dict: bool
    callback_on_step_end: StepCallback
    callback_on_step_end_tensor_inputs: Sequence[str]
    lookahead_batch_size: int | None
    num_beams: int
    num_runs: int
    guidance_offset: float = 0.0
    asked: Mapping[str, Any] = field(default_factory=dict)
    state: CallState = field(init=False)

    def __post_init__(self) -> None:
        default = (self.default_size, self.default_size)
        if isinstance(self.latents, torch.Tensor) and self.latents.ndim == 3:
            default = (self.latents.shape[1], self.latents.shape[2])
        self.height = default[0] * self.scale_factor if self.height is None else self.height
        self.width = default[1] * self.scale_factor if self.width is None else self.width
        self._check(self.height, self.width)
        self.grid = (self.height // self.scale_factor, self.width // self.scale_factor)
        if self.latents is not None:
            self._check_latents(self.latents)
        self.state = CallState(self.guidance_scale, unguided=1 - self.guidance_offset)
        self.scheduler = self._scheduler()
        self.state.num_timesteps = len(self.scheduler.timesteps)

    @property
    def batch_size(self) -> int:
        """Number of images."""
        return self.num_prompts * self.num_images_per_prompt

    @property
    def mask_token_id(self) -> int:
        """The scheduler's."""
        return self.pipe.scheduler.config.mask_token_id

    def _check(self, height: int, width: int) -> None:
        mask_token_id = _check_scheduler(self.pipe.scheduler).config.mask_token_id
        if not self.codebook_size <= mask_token_id < self.vocab_size:
            raise ValueError(
                f"`mask_token_id` of the scheduler must be at least the codebook's size {self.codebook_size} and below the "
                f"transformer's vocabulary size {self.vocab_size}, got {mask_token_id}."
            )
        check_integer("num_images_per_prompt", self.num_images_per_prompt, 1)
        for name in ("num_inference_steps", "lookahead_batch_size"):
            check_integer(name, getattr(self, name), 1, optional=True)
        check_search(self.num_beams, self.num_runs, self.callback_on_step_end)
        for name, side in (("height", height), ("width", width)):
            check_type(name, side, int, "an integer or None")
        if height % self.unit or width % self.unit or height <= 0 or width <= 0:
            raise ValueError(f"`height` and `width` must be positive multiples of {self.unit}, got {height} and {width}.")
        if max(height, width) > _LARGEST_SIDE:
            raise ValueError(f"`height` and `width` must be at most {_LARGEST_SIDE}, got {height} and {width}.")
        check_number("guidance_scale", self.guidance_scale, -_STRONGEST, _STRONGEST)
        check_choice("guidance_schedule", self.guidance_schedule, tuple(GUIDANCE_SCHEDULES))
        check_choice("output_type", self.output_type, ("pil", "np", "pt", "latent"))
        check_bool("return_dict", self.return_dict)
        if isinstance(self.generator, (list, tuple)) and len(self.generator) != self.batch_size:
            raise ValueError(
                f"`generator` must have one entry for each of the {self.batch_size} images ({self.num_prompts} prompts x "
                f"{self.num_images_per_prompt} images per prompt), got a list of {len(self.generator)}."
            )
        check_generator(self.generator, self.batch_size)
        names = self.callback_on_step_end_tensor_inputs
        self.callback_on_step_end_tensor_inputs = tensor_inputs(
            self.callback_on_step_end, names, self.pipe._callback_tensor_inputs
        )

    def _scheduler(self) -> InfoGainScheduler:
        """A copy of the pipeline's, with this call's steps."""
        scheduler, length, steps = self.pipe.scheduler, self.grid[0] * self.grid[1], self.num_inference_steps
        if steps is None:
            per_step, masked = scheduler.config.tokens_per_step, length
            if self.latents is not None:
                masked = int((self.latents == self.mask_token_id).flatten(1).sum(-1).max())
            steps = max(1, math.ceil(masked / per_step)) if per_step else self.default_num_inference_steps
        # A step decodes one token at least. The canvas and not its masks, which others in the batch have more or fewer of.
        return scheduler.with_timesteps(min(steps, length), device=self.pipe._execution_device)

    def _check_latents(self, latents: torch.Tensor) -> None:
        check_latents(latents, (self.batch_size, *self.grid), self.codebook_size, self.mask_token_id)

    def check_sequence_length(self, length: int, limit: int) -> None:
        """Raises a ValueError if prompt and image together are more tokens than a language model takes."""
        if length > limit:
            raise ValueError(
                f"`height` {self.height} and `width` {self.width} need {self.grid[0] * self.grid[1]} image tokens, which make a "
                f"sequence of {length} with the prompt; the model takes {limit}."
            )

    @property
    def guided(self) -> bool:
        """Whether the next forward is guided: a callback may have changed it.

        Raises:
            ValueError: If it is, and the call began without guidance, and so without what it takes.
        """
        guided = self.state.do_classifier_free_guidance
        if guided and self.guidance_scale <= self.state.unguided:
            raise ValueError(
                f"`_guidance_scale` must stay at {self.state.unguided:g} or below in a call that began so, got "
                f"{self.state.guidance_scale}."
            )
        return guided

    def guide(self, cond: torch.Tensor, uncond: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Guided logits, by the call's schedule and its guidance scale as it is now."""
        scale = self.state.guidance_scale + self.guidance_offset
        return guide(cond, uncond, tokens, self.mask_token_id, scale, self.guidance_schedule)

    def run(
        self, denoise: Denoise, to_pixels: Callable[[torch.Tensor], torch.Tensor]
    ) -> InfoGainPipelineOutput | tuple[Any, DecodingTrace]:
        """Decodes the masks of `latents`, or a canvas of nothing but masks, and turns tokens into images.

        Where the call was interrupted, what is still masked is grey, or the mask id in "latent" output.

        Args:
            denoise: As in `decode`, for the tokens in raster order.
            to_pixels: Tokens (B, h, w) to pixels (B, 3, H, W), in the range that the pipeline's image processor takes.
        """
        with self.pipe.running(self.state):
            output = self._decode(denoise)
            tokens = output.tokens.unflatten(1, self.grid)
            images: Any = tokens
            if self.output_type != "latent":
                images = self.pipe.image_processor.postprocess(self._pixels(tokens, to_pixels), self.output_type)
            if self.output_type == "pil":
                images = [Picture.of(image, self._settings(i, output.seeds[i])) for i, image in enumerate(images)]
            self.pipe.maybe_free_model_hooks()
        if not self.return_dict:
            return images, output.trace
        return InfoGainPipelineOutput(images=images, trace=output.trace, seeds=output.seeds)

    def _settings(self, index: int, seed: int | None) -> dict[str, Any]:
        """How an image is made again, for its file; given embeddings and latents are not in it."""
        pipe, name = self.pipe, str(self.pipe.config.get("_name_or_path") or "")
        asked: dict[str, Any] = {}
        for what, value in self.asked.items():
            every = value if isinstance(value, list) else [value]
            one = every[0 if len(every) == 1 else index // self.num_images_per_prompt]
            asked |= {} if one is None else {what: one}
        # Of a folder its name only: the way to it says more of the machine than of the image.
        model = {"model": Path(name).name if Path(name).exists() else name} if name else {}
        return {
            **asked,
            "seed": seed,
            **model,
            "pipeline": type(pipe).__name__,
            "version": __version__,
            "num_inference_steps": len(self.scheduler.timesteps),
            "guidance_scale": self.guidance_scale,
            "guidance_schedule": self.guidance_schedule,
            "height": self.height,
            "width": self.width,
            "num_beams": self.num_beams,
            "num_runs": self.num_runs,
            "scheduler": {key: value for key, value in self.scheduler.config.items() if not key.startswith("_")},
        }

    def _pixels(self, tokens: torch.Tensor, to_pixels: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        masked = tokens == self.mask_token_id
        pixels = to_pixels(tokens.masked_fill(masked, 0))
        if not masked.any():
            return pixels
        grey = 0.0 if self.pipe.image_processor.config.do_normalize else 0.5
        cells = masked.repeat_interleave(self.scale_factor, 1).repeat_interleave(self.scale_factor, 2)
        return pixels.masked_fill(cells[:, None], grey)

    def _decode(self, denoise: Denoise) -> DecodingOutput:
        pipe, scheduler, device = self.pipe, self.scheduler, self.pipe._execution_device
        if self.latents is None:
            shape = (self.batch_size, self.grid[0] * self.grid[1])
            tokens = torch.full(shape, self.mask_token_id, dtype=torch.long, device=device)
        else:
            tokens = self.latents.to(device).flatten(1)
        total = int((tokens == self.mask_token_id).sum())

        with pipe.progress_bar(total=total) as progress_bar:

            def show(tokens: torch.Tensor) -> None:
                progress_bar.update(total - int((tokens == self.mask_token_id).sum()) - progress_bar.n)

            def after_step(step: DecodingStep) -> torch.Tensor | None:
                show(step.tokens)
                if self.callback_on_step_end is None:
                    return None
                latents, names = step.tokens.unflatten(1, self.grid), self.callback_on_step_end_tensor_inputs
                edited = call_back(pipe, self.callback_on_step_end, step, names, "latents", self.state, latents=latents)
                edited = latents if edited is None else edited
                self._check_latents(edited)
                return edited.flatten(1)

            output = decode_or_search(
                denoise,
                scheduler,
                tokens,
                num_beams=self.num_beams,
                num_runs=self.num_runs,
                callback=after_step,
                generator=self.generator,
                lookahead_batch_size=self.lookahead_batch_size,
                grid=self.grid,
                interrupted=lambda: self.state.interrupt,
            )
            show(output.tokens)
        self.state.num_timesteps = len(output.trace.winner)
        return output

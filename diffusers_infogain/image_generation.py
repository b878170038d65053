"""What the image pipelines have in common: checks of a call, guidance, the decoding of a canvas of tokens.

A pipeline adds what differs between models: how a prompt becomes a condition, `denoise`, and how tokens become pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import PIL.Image
import torch
from diffusers import AmusedScheduler, DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import BaseOutput

from .candidates import Generators
from .decoding import DecodingOutput, DecodingStep, DecodingTrace, Denoise, decode, decode_beam, decode_best_of
from .masked_logits import MaskedLogits
from .scheduling_infogain import InfoGainScheduler

GUIDANCE_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda u: 1.0,
    "linear": lambda u: u,
    "cosine": lambda u: (1 - math.cos(math.pi * u)) / 2,
}
CALLBACK_TENSOR_INPUTS = ["latents", "logits", "scores"]

StepCallback: TypeAlias = Callable[..., dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks | None


@dataclass
class InfoGainPipelineOutput(BaseOutput):
    """Images, and how they were decoded.

    Attributes:
        images: PIL images, a NumPy array (B, H, W, 3) or a tensor (B, 3, H, W) in [0, 1], or tokens (B, h, w), by `output_type`.
        trace: The decoding's `DecodingTrace`: cost, gain, winner, positions and model rows per step and image.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    trace: DecodingTrace


def as_infogain_scheduler(scheduler: Any) -> InfoGainScheduler:
    """An `InfoGainScheduler` as it is, an `AmusedScheduler` converted.

    Raises:
        ValueError: For any other scheduler.
    """
    if isinstance(scheduler, AmusedScheduler):
        scheduler = InfoGainScheduler.from_config(scheduler.config)
    return _check_scheduler(scheduler)


def _check_scheduler(scheduler: Any) -> InfoGainScheduler:
    if not isinstance(scheduler, InfoGainScheduler):
        raise ValueError(
            f"`scheduler` must be an InfoGainScheduler or an AmusedScheduler, got {type(scheduler).__name__}: "
            "InfoGainScheduler.from_config(...) converts an AmusedScheduler's config."
        )
    return scheduler


def count_prompts(name: str, prompt: Any) -> int:
    """How many prompts `prompt` is, a string or a list of strings that is not empty.

    Raises:
        ValueError: If it is anything else.
    """
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not (isinstance(texts, list) and texts and all(isinstance(one, str) for one in texts)):
        raise ValueError(f"`{name}` must be a string or a list of strings that is not empty, got {prompt!r}.")
    return len(texts)


def check_one_each(name: str, value: Any, num_prompts: int) -> None:
    """Raises a ValueError if `value` is a list or tensor with neither one entry nor one for each prompt."""
    if value is not None and not isinstance(value, str) and len(value) not in (1, num_prompts):
        raise ValueError(f"`{name}` must have one entry, or one for each of the {num_prompts} prompts, got {len(value)}.")


def repeat_prompts(texts: str | list[str], num_prompts: int, num_images_per_prompt: int) -> list[str]:
    """One text per image, those of a prompt in a row; a single text serves all prompts."""
    every = [texts] if isinstance(texts, str) else texts
    every = every * num_prompts if len(every) == 1 else every
    return [text for text in every for _ in range(num_images_per_prompt)]


def image_size(
    height: int | None, width: int | None, latents: torch.Tensor | None, scale_factor: int, default: int
) -> tuple[int, int]:
    """Height and width in pixels: as given, else what `latents` have, else the model's."""
    if latents is not None and latents.ndim == 3:
        height = latents.shape[1] * scale_factor if height is None else height
        width = latents.shape[2] * scale_factor if width is None else width
    return default if height is None else height, default if width is None else width


def tensor_inputs_of(callback: StepCallback, tensor_inputs: Sequence[str]) -> Sequence[str]:
    """Which tensors the callback gets: its own choice if it is a `PipelineCallback`, else `tensor_inputs`."""
    return callback.tensor_inputs if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)) else tensor_inputs


def check_call(
    scheduler: Any,
    *,
    codebook_size: int,
    vocab_size: int,
    num_prompts: int,
    num_images_per_prompt: int,
    height: int,
    width: int,
    unit: int,
    scale_factor: int,
    guidance_scale: float,
    guidance_schedule: str,
    generator: Generators,
    latents: torch.Tensor | None,
    output_type: str,
    callback_on_step_end: StepCallback,
    callback_on_step_end_tensor_inputs: Sequence[str],
    num_beams: int,
    num_runs: int,
) -> None:
    """Raises a ValueError for the first argument of an image pipeline's call that does not fit.

    Args:
        codebook_size: Ids below it are image tokens.
        vocab_size: The mask id is below it.
        unit: What height and width must be multiples of, in pixels.
        scale_factor: Pixels a token, along one side.
    """
    mask_token_id = _check_scheduler(scheduler).config.mask_token_id
    if not codebook_size <= mask_token_id < vocab_size:
        raise ValueError(
            f"`mask_token_id` of the scheduler must be at least the codebook's size {codebook_size} and below the "
            f"transformer's vocabulary size {vocab_size}, got {mask_token_id}."
        )
    for name, value in (("num_images_per_prompt", num_images_per_prompt), ("num_beams", num_beams), ("num_runs", num_runs)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be an integer >= 1, got {value!r}.")
    if num_beams > 1 and num_runs > 1:
        raise ValueError(f"`num_beams` and `num_runs` must not both be above 1, got {num_beams} and {num_runs}.")
    if callback_on_step_end is not None and (num_beams > 1 or num_runs > 1):
        raise ValueError("`callback_on_step_end` must be None with `num_beams` or `num_runs` above 1.")
    if height % unit or width % unit or height <= 0 or width <= 0:
        raise ValueError(f"`height` and `width` must be positive multiples of {unit}, got {height} and {width}.")
    if not math.isfinite(guidance_scale):
        raise ValueError(f"`guidance_scale` must be a finite number, got {guidance_scale!r}.")
    if guidance_schedule not in GUIDANCE_SCHEDULES:
        allowed = ", ".join(GUIDANCE_SCHEDULES)
        raise ValueError(f"`guidance_schedule` must be one of {allowed}, got {guidance_schedule!r}.")
    if output_type not in ("pil", "np", "pt", "latent"):
        raise ValueError(f"`output_type` must be one of pil, np, pt, latent, got {output_type!r}.")
    batch_size = num_prompts * num_images_per_prompt
    if isinstance(generator, Sequence) and len(generator) != batch_size:
        raise ValueError(
            f"`generator` must have one entry for each of the {batch_size} images ({num_prompts} prompts x "
            f"{num_images_per_prompt} images per prompt), got a list of {len(generator)}."
        )
    if latents is not None:
        check_latents(latents, (batch_size, height // scale_factor, width // scale_factor), codebook_size, mask_token_id)
    unknown = [name for name in callback_on_step_end_tensor_inputs if name not in CALLBACK_TENSOR_INPUTS]
    if unknown:
        raise ValueError(
            f"`callback_on_step_end_tensor_inputs` must be among {', '.join(CALLBACK_TENSOR_INPUTS)}, got {', '.join(unknown)}."
        )


def check_latents(latents: torch.Tensor, shape: tuple[int, int, int], codebook_size: int, mask_token_id: int) -> None:
    """Raises a ValueError if `latents` are not (B, h, w) ids of the codebook or the mask id."""
    if latents.shape != shape or latents.dtype != torch.long:
        raise ValueError(
            f"`latents` must be a long tensor of token ids of shape {shape}, got {latents.dtype} {tuple(latents.shape)}."
        )
    known = latents[latents != mask_token_id]
    if known.numel() and not 0 <= int(known.min()) <= int(known.max()) < codebook_size:
        raise ValueError(
            f"`latents` must hold ids from 0 to {codebook_size - 1} or the mask id {mask_token_id}, got ids from "
            f"{int(known.min())} to {int(known.max())}."
        )


def guidance_scales(tokens: torch.Tensor, mask_token_id: int, guidance_scale: float, schedule: str) -> torch.Tensor:
    """g per state (R,) of `tokens` (R, L): from 1 to `guidance_scale` with the share of the canvas that is decoded."""
    decoded = 1 - (tokens == mask_token_id).sum(-1) / tokens.shape[1]
    ramp = [GUIDANCE_SCHEDULES[schedule](u) for u in decoded.tolist()]
    return 1 + (guidance_scale - 1) * torch.tensor(ramp, device=tokens.device)


def guide_masked(cond: torch.Tensor, uncond: torch.Tensor, masked: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """uncond + g · (cond - uncond) in float32, for rows (M, V) at the M true positions of `masked` (R, L), g by state (R,)."""
    uncond = uncond.float()
    return uncond.lerp(cond.float(), scales.repeat_interleave(masked.sum(-1))[:, None])


def decode_canvas(
    pipe: DiffusionPipeline,
    denoise: Denoise,
    *,
    batch_size: int,
    grid: tuple[int, int],
    codebook_size: int,
    latents: torch.Tensor | None,
    num_inference_steps: int | None,
    default_num_inference_steps: int,
    device: torch.device,
    generator: Generators,
    lookahead_batch_size: int | None,
    num_beams: int,
    num_runs: int,
    callback_on_step_end: StepCallback,
    callback_on_step_end_tensor_inputs: Sequence[str],
) -> DecodingOutput:
    """Decodes the masks of `latents` (B, h, w), or a canvas of nothing but masks, under the pipeline's progress bar.

    Args:
        denoise: As in `decode`, for the tokens in raster order.
        num_inference_steps: None stands for the default, or for what the scheduler's `tokens_per_step` takes.

    Returns:
        Tokens (B, h · w) and the trace.
    """
    scheduler: InfoGainScheduler = pipe.scheduler
    mask_token_id = scheduler.config.mask_token_id
    if latents is None:
        tokens = torch.full((batch_size, grid[0] * grid[1]), mask_token_id, dtype=torch.long, device=device)
    else:
        tokens = latents.to(device).flatten(1)
    if num_inference_steps is None:
        per_step, masked = scheduler.config.tokens_per_step, int((tokens == mask_token_id).sum(-1).max())
        num_inference_steps = max(1, math.ceil(masked / per_step)) if per_step else default_num_inference_steps
    scheduler.set_timesteps(num_inference_steps, device=device)

    with pipe.progress_bar(total=num_inference_steps) as progress_bar:

        def after_step(step: DecodingStep) -> torch.Tensor | None:
            progress_bar.update()
            if callback_on_step_end is None:
                return None
            available: dict[str, Any] = {"latents": step.tokens.unflatten(1, grid), "logits": step.logits, "scores": step.scores}
            callback_kwargs = {name: available[name] for name in callback_on_step_end_tensor_inputs}
            if isinstance(callback_kwargs.get("logits"), MaskedLogits):
                callback_kwargs["logits"] = callback_kwargs["logits"].dense()
            returned = callback_on_step_end(pipe, step.index, step.timestep, callback_kwargs)
            edited = (returned or {}).get("latents", available["latents"])
            check_latents(edited, (batch_size, *grid), codebook_size, mask_token_id)
            return edited.flatten(1)

        options: dict[str, Any] = {"generator": generator, "lookahead_batch_size": lookahead_batch_size, "grid": grid}
        if num_beams > 1:
            output = decode_beam(denoise, scheduler, tokens, num_beams=num_beams, **options)
        elif num_runs > 1:
            output = decode_best_of(denoise, scheduler, tokens, num_runs=num_runs, **options)
        else:
            output = decode(denoise, scheduler, tokens, callback=after_step, **options)
        if num_beams > 1 or num_runs > 1:
            progress_bar.update(num_inference_steps)
    return output


@contextmanager
def in_float32(model: torch.nn.Module, needed: bool = True) -> Iterator[None]:
    """The model in float32 within the block, for decoders that overflow or blur in half precision."""
    dtype = next(model.parameters()).dtype
    if not needed or dtype == torch.float32:
        yield
        return
    model.float()
    try:
        yield
    finally:
        model.to(dtype)

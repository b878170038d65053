"""One call of an image pipeline: its arguments, checked, and the guidance and schedule that follow from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline

from .cache_settings import ContextCache, MaxLogitCache, parse_cache
from .callbacks import CallState, StepCallback, tensor_inputs
from .candidates import Generators, check_generator, split_generator
from .checks import check_bool, check_choice, check_integer, check_search, check_type
from .components import check_components, check_scheduler
from .editing import Edit, EditArguments, ImageInput, begin_edit, check_count
from .guidance import Negative, Rows, check_guidance, guidance_weights, number_conditions
from .printing import shown
from .scheduling_infogain import InfoGainScheduler

LARGEST_SIDE = 2**16

Condition = dict[str, torch.Tensor]
"""Tensors that a model is conditioned on, by their argument of the pipeline's `predict`, with one entry per image."""


@dataclass(frozen=True)
class Canvas:
    """The image tokens of a model.

    Attributes:
        codebook_size: The image codes are 0 to `codebook_size` - 1.
        vocab_size: Number of ids that the transformer knows; the scheduler's mask id is one of them, above the codes.
        side: Tokens along one side of an image, by default.
        multiple: Rows and columns of tokens must be multiples of this.
        only_side: Whether `side` is the only size that the model can generate.
        line: Number of tokens where they are a line, each of which belongs to all pixels: the image is then one cell (`side` 1).
            None where they are a grid of cells.
    """

    codebook_size: int
    vocab_size: int
    side: int
    multiple: int = 1
    only_side: bool = False
    line: int | None = None


def check_one_each(name: str, value: Any, num_prompts: int) -> None:
    """Raises a ValueError if `value` is a list or tensor with neither one entry nor one for each prompt."""
    if value is not None and not isinstance(value, str) and len(value) not in (1, num_prompts):
        raise ValueError(f"`{name}` must have one entry, or one for each of the {num_prompts} prompts, got {len(value)}.")


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


@dataclass(kw_only=True)
class ImageCall:
    """One running call of an image pipeline.

    It belongs to one thread, unlike the pipeline: nothing of a call is kept on the pipeline itself.

    Attributes:
        pipe: The pipeline.
        inputs: The arguments of the call that say what the images show, by name, such as `prompt`.
        num_prompts: Each of them gives `num_images_per_prompt` images.
        canvas: The pipeline's.
        grid: Rows and columns of image tokens, (h, w).
        scheduler: A copy of the pipeline's, with the timesteps of this call.
        state: What callbacks and other threads may read and change while the call runs.
        device: Where the pipeline computes. (diffusers walks through all modules to find out.)
        edit: The images that are edited, if there are.
        cache: What `approximate_cache` names.
        notes: What the files of images record besides the arguments, by name, with an entry per image.
        decoding: What the image tokenizer needs besides tokens, by argument of `to_pixels`, with an entry per image.

    The others are arguments of `InfoGainImagePipeline.__call__`; `height`, `width` and `num_inference_steps` are numbers after
    the checks.

    Raises:
        ValueError: For the first argument that does not fit.
    """

    pipe: DiffusionPipeline
    inputs: Mapping[str, Any]
    num_prompts: int
    height: int | None
    width: int | None
    num_inference_steps: int | None
    guidance_scale: float
    guidance_schedule: str
    guidance_interval: tuple[float, float]
    guided_lookahead: bool
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
    image: ImageInput | None
    mask_image: ImageInput | None
    strength: float | None
    outpaint: Mapping[str, int] | None
    mask_coverage: float
    mask_blur: float
    approximate_cache: str | None
    canvas: Canvas = field(init=False)
    grid: tuple[int, int] = field(init=False)
    scheduler: InfoGainScheduler = field(init=False)
    state: CallState = field(init=False)
    device: torch.device = field(init=False)
    edit: Edit | None = field(init=False, default=None)
    cache: ContextCache | MaxLogitCache | None = field(init=False)
    notes: dict[str, list[Any]] = field(init=False, default_factory=dict)
    decoding: Condition = field(init=False, default_factory=dict)
    _condition: Condition = field(init=False)
    _negatives: dict[str, Condition | None] = field(init=False)
    _numbers: dict[str, torch.Tensor] = field(init=False, default_factory=dict)
    _first_scales: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self.canvas = self.pipe.canvas()
        self.device = self.pipe._execution_device
        pixels = self.pipe.vae_scale_factor
        edit = EditArguments(**{option.name: getattr(self, option.name) for option in fields(EditArguments)})
        self._check_places()
        left, top, right, bottom = edit.margins(pixels)
        rows, columns = self.canvas.side, self.canvas.side
        if not self.canvas.only_side:
            rows, columns = rows + (top + bottom) // pixels, columns + (left + right) // pixels
        if isinstance(self.latents, torch.Tensor) and self.latents.ndim == 3 and self.canvas.line is None:
            rows, columns = self.latents.shape[1:]
        height = self.height = rows * pixels if self.height is None else self.height
        width = self.width = columns * pixels if self.width is None else self.width
        self._check_mask_token()
        check_integer("num_images_per_prompt", self.num_images_per_prompt, 1)
        for name in ("num_inference_steps", "lookahead_batch_size"):
            check_integer(name, getattr(self, name), 1, optional=True)
        check_search(self.num_beams, self.num_runs, self.callback_on_step_end, self.pipe.scheduler)
        self._check_size(height, width)
        self._check_choices()
        self.cache = self._own_cache()
        self._check_generator()
        self.callback_on_step_end_tensor_inputs = tensor_inputs(
            self.callback_on_step_end, self.callback_on_step_end_tensor_inputs, self.pipe._callback_tensor_inputs
        )
        self.grid = (height // pixels, width // pixels)
        side = self.canvas.side
        if self.canvas.only_side and self.grid != (side, side):
            raise ValueError(
                f"`height` and `width` must be {side * pixels}, the only size of this model, got {height} and {width}."
            )
        if self.canvas.line is not None:
            self.grid = (1, self.canvas.line)
        if edit.image is not None:
            self._begin_edit(edit, height, width)
        if self.latents is not None:
            self.check_latents(self.latents)
        self.state = CallState(self.guidance_scale, unguided=1 - self.pipe.guidance_offset)
        given = {name: self.inputs[name] for name in self.pipe.further_scales}
        self.state.further_scales = {name: self.state.unguided if value is None else value for name, value in given.items()}
        self._first_scales = self.scales
        self.scheduler = self._own_scheduler(edit.share if self.edit else 1.0)
        self.state.num_timesteps = len(self.scheduler.all_timesteps)

    def _check_places(self) -> None:
        if self.canvas.line is None:
            return
        for name in ("mask_image", "outpaint"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"`{name}` must be None for {type(self.pipe).__name__}, whose tokens have no place in the image, got "
                    f"{shown(getattr(self, name))}: `image` with `strength` decodes a share of them anew."
                )

    def _begin_edit(self, edit: EditArguments, height: int, width: int) -> None:
        if self.latents is not None:
            raise ValueError("`latents` must be None with `image`, whose tokens take their place.")
        check_components(self.pipe, "vqvae")
        # Its seed decides which tokens of an image stay, too.
        self.generator = split_generator(self.generator, self.batch_size)
        self.edit = begin_edit(
            edit,
            self.pipe._encode_pixels,
            (height, width),
            self.pipe.vae_scale_factor,
            self.mask_token_id,
            torch.tensor(self.per_image(list(range(self.num_prompts)))),
            self.generator,
        )
        self.latents = self.edit.tokens

    @property
    def batch_size(self) -> int:
        """Number of images."""
        return self.num_prompts * self.num_images_per_prompt

    @property
    def mask_token_id(self) -> int:
        """The scheduler's."""
        return self.pipe.scheduler.config.mask_token_id

    def _check_mask_token(self) -> None:
        mask_token_id = check_scheduler(self.pipe.scheduler).config.mask_token_id
        codebook_size, vocab_size = self.canvas.codebook_size, self.canvas.vocab_size
        if not codebook_size <= mask_token_id < vocab_size:
            raise ValueError(
                f"`mask_token_id` of the scheduler must be at least the codebook's size {codebook_size} and below the "
                f"transformer's vocabulary size {vocab_size}, got {mask_token_id}."
            )

    def _check_size(self, height: int, width: int) -> None:
        for name, side in (("height", height), ("width", width)):
            check_type(name, side, int, "an integer or None")
        unit = self.pipe.vae_scale_factor * self.canvas.multiple
        if height % unit or width % unit or height <= 0 or width <= 0:
            padded = "" if self.outpaint is None else ", with the padding of `outpaint`"
            raise ValueError(f"`height` and `width` must be positive multiples of {unit}, got {height} and {width}{padded}.")
        if max(height, width) > LARGEST_SIDE:
            raise ValueError(f"`height` and `width` must be at most {LARGEST_SIDE}, got {height} and {width}.")

    def _check_choices(self) -> None:
        check_guidance(self.guidance_scale, self.guidance_schedule, self.guidance_interval, self.guided_lookahead)
        check_choice("output_type", self.output_type, ("pil", "np", "pt", "latent"))
        check_bool("return_dict", self.return_dict)

    def _own_cache(self) -> ContextCache | MaxLogitCache | None:
        cache, scheduler, name = parse_cache(self.approximate_cache), self.pipe.scheduler, type(self.pipe).__name__
        if cache is None:
            return None
        if not self.pipe.runs_partial_rows:
            raise ValueError(
                f"`approximate_cache` must be None for {name}, which runs whole rows only, got {self.approximate_cache!r}; "
                "the pipelines of aMUSEd, MMaDA, Show-o and Lumina-DiMOO can reuse parts of rows."
            )
        if isinstance(cache, MaxLogitCache) and scheduler.looks_ahead:
            raise ValueError(
                f"`approximate_cache` must be 'context' or None with a sampler that looks ahead, got {self.approximate_cache!r} "
                f"with {scheduler.config.sampler!r}."
            )
        going_back = {
            "num_beams above 1": self.num_beams > 1,
            "num_runs above 1": self.num_runs > 1,
            "a scheduler that begins unlikely samples anew (`retry_...`)": scheduler.retries,
            "a corrector": scheduler.config.corrector is not None,
        }
        for what, there in going_back.items():
            if there:
                raise ValueError(f"`approximate_cache` must be None with {what}, got {self.approximate_cache!r}.")
        return cache

    def _check_generator(self) -> None:
        if isinstance(self.generator, (list, tuple)) and len(self.generator) != self.batch_size:
            raise ValueError(
                f"`generator` must have one entry for each of the {self.batch_size} images ({self.num_prompts} prompts x "
                f"{self.num_images_per_prompt} images per prompt), got a list of {len(self.generator)}."
            )
        check_generator(self.generator, self.batch_size)

    def check_latents(self, latents: torch.Tensor) -> None:
        """Raises a ValueError if these are not token ids (B, h, w) for the canvas of the call."""
        check_latents(latents, (self.batch_size, *self.grid), self.canvas.codebook_size, self.mask_token_id)

    def check_count(self, name: str, values: Sequence[Any]) -> None:
        """Raises a ValueError if there is neither one value for all prompts nor one for each."""
        check_count(name, values, self.num_prompts)

    def check_sequence_length(self, length: int, limit: int) -> None:
        """Raises a ValueError if prompt and image together are more tokens than a language model takes."""
        if length > limit:
            raise ValueError(
                f"`height` {self.height} and `width` {self.width} need {self.grid[0] * self.grid[1]} image tokens, which make a "
                f"sequence of {length} with the prompt; the model takes {limit}."
            )

    def _own_scheduler(self, share: float) -> InfoGainScheduler:
        """The scheduler with the steps of this call: where a share of an image is decoded anew, that share of the steps."""
        scheduler, length = self.pipe.scheduler_for_call(self.pipe.scheduler), self.grid[0] * self.grid[1]
        per_step = scheduler.config.tokens_per_step
        if self.num_inference_steps is None and per_step is not None:
            masked = length
            if self.latents is not None:
                masked = int((self.latents == self.mask_token_id).flatten(1).sum(-1).max())
            steps, share = max(1, math.ceil(masked / per_step)), 1.0
        else:
            steps = self.num_inference_steps or self.pipe.default_num_inference_steps
        # Every step decodes at least one token. The limit is the canvas, not its masks: their number differs within a batch.
        self.num_inference_steps = min(steps, length)
        return scheduler.with_timesteps(max(1, int(self.num_inference_steps * share)), device=self.device)

    def per_image(self, values: Any) -> list[Any]:
        """A value for every image, from one for all prompts or a list with one for each."""
        entries = list(values) if isinstance(values, (list, tuple)) else [values]
        entries = entries * self.num_prompts if len(entries) == 1 else entries
        return [entry for entry in entries for _ in range(self.num_images_per_prompt)]

    def start_tokens(self) -> torch.Tensor:
        """The canvas (B, L) that decoding starts from: `latents`, or nothing but masks."""
        device = self.device
        if self.latents is not None:
            return self.latents.to(device).flatten(1)
        return torch.full((self.batch_size, self.grid[0] * self.grid[1]), self.mask_token_id, dtype=torch.long, device=device)

    def wanted(self, tokens: torch.Tensor) -> torch.Tensor:
        """Where the call needs logits of `tokens`, a mask of that shape: at their masks, or everywhere for some correctors."""
        masked = tokens == self.mask_token_id
        return torch.ones_like(masked) if self.scheduler.corrector.reads_decoded else masked

    # Conditions and guidance

    def condition_on(self, condition: Condition, *negatives: Condition | None) -> None:
        """Sets what the model is conditioned on, and what guidance steers away from, a condition for each of the `scales`.

        None stands for a scale that is off. Callbacks can read and replace those tensors that the pipeline names in
        `_callback_tensor_inputs`.
        """
        self._condition = condition
        self._negatives = dict(zip(self.scales, negatives, strict=False))
        negative = negatives[0]
        named = {**condition, **{f"negative_{name}": negative and negative[name] for name in condition}}
        self.state.conditions = {name: value for name, value in named.items() if name in self.pipe._callback_tensor_inputs}

    def condition(self, sample_index: torch.Tensor) -> Condition:
        """The condition of some images, as callbacks have left it."""
        return {name: value[sample_index] for name, value in self._current_condition().items()}

    def negative(self, sample_index: torch.Tensor, scale: str = "guidance_scale") -> Condition:
        """The negative condition that belongs to one of the scales, of some images, as callbacks have left it."""
        return {name: value[sample_index] for name, value in self._current_negative(scale).items()}

    def conditions(self) -> list[torch.Tensor]:
        """Copies of everything that the images are conditioned on now."""
        every = [self._current_condition(), *map(self._current_negative, self._negatives)]
        return [value.clone() for condition in every for value in condition.values()]

    def _current_condition(self) -> Condition:
        return {name: self.state.conditions.get(name, value) for name, value in self._condition.items()}

    def _current_negative(self, scale: str) -> Condition:
        negative = self._negatives.get(scale) or {}
        if scale != "guidance_scale":
            return negative
        return {name: self.state.conditions.get(f"negative_{name}", value) for name, value in negative.items()}

    def _numbered(self, name: str, condition: Callable[[], Condition]) -> torch.Tensor:
        """(B,) long, equal for images with equal conditions; kept under a name until a callback runs."""
        if name not in self._numbers:
            self._numbers[name] = number_conditions(condition())
        return self._numbers[name]

    def rows(self, tokens: torch.Tensor, sample_index: torch.Tensor) -> Rows:
        """The rows that the network has to see for states (R, L) of the images `sample_index` (R,), under their conditions."""
        return Rows.of(tokens, self._numbered("", self._current_condition)[sample_index])

    def negatives(self, tokens: torch.Tensor, sample_index: torch.Tensor) -> list[Negative]:
        """The same under each of their negative conditions, for the states that it guides; none where it guides no state."""
        found = []
        for scale in self.scales:
            weights = self.guidance_weights(tokens, scale)
            needed = weights != 1
            if needed.any():
                numbers = self._numbered(scale, partial(self._current_negative, scale))
                found.append(Negative(scale, weights, Rows.of(tokens, numbers[sample_index], needed)))
        return found

    def forget_numbers(self) -> None:
        """After a callback, which may have changed conditions, also in place."""
        self._numbers.clear()

    @property
    def scales(self) -> dict[str, float]:
        """The guidance scale of each negative condition, by its argument, as callbacks have left it."""
        return {"guidance_scale": self.state.guidance_scale, **self.state.further_scales}

    @property
    def guided(self) -> bool:
        """`is_guided` by `guidance_scale`."""
        return self.is_guided("guidance_scale")

    def is_guided(self, scale: str) -> bool:
        """Whether the next forward pass is guided by this scale: a callback may have changed it.

        Raises:
            ValueError: If it is although the call began without this guidance, and so without a negative condition.
        """
        guided = self.scales[scale] > self.state.unguided
        if guided and self._first_scales[scale] <= self.state.unguided:
            raise ValueError(
                f"`_{scale}` must stay at {self.state.unguided:g} or below in a call that began so, got {self.scales[scale]}."
            )
        return guided

    def guidance_weights(self, tokens: torch.Tensor, scale: str = "guidance_scale") -> torch.Tensor:
        """g of states (R, L), (R,), in the form logits = uncond + g · (cond - uncond); 1 where no unconditional row is needed."""
        strength = self.scales[scale] + self.pipe.guidance_offset if self.is_guided(scale) else 1.0
        schedule = self.guidance_schedule, self.guidance_interval
        return guidance_weights(tokens, self.mask_token_id, strength, *schedule, steps_done=self._steps_done)

    def _steps_done(self, tokens: torch.Tensor) -> tuple[torch.Tensor, int]:
        """How many steps the schedule has before states (R, L) with so many masks, (R,), and how many it has in all."""
        total = len(self.scheduler.timesteps)
        return total - 1 - self.scheduler.timesteps_at(tokens), total


CALL_OPTIONS = tuple(
    option.name for option in fields(ImageCall) if option.init and option.name not in ("pipe", "inputs", "num_prompts")
)
"""The arguments that the calls of all families have."""

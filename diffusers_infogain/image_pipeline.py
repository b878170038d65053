"""The base class of the image pipelines: the call, guidance, callbacks, and images that know how they were made.

A family of models adds a constructor and what differs: its canvas, what its prompts become, `predict`, and its defaults.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

import PIL.Image
import torch
from diffusers.image_processor import VaeImageProcessor

from .callbacks import CallStateMixin, StepCallback, call_back
from .candidates import Generators
from .checkpoints.published import CheckedPipeline
from .checkpoints.stock import decode_vqvae, encode_vqvae
from .checks import LARGEST_NUMBER, check_integer, check_number, prompt_list
from .compiling import CompileMixin
from .components import (
    PUBLISHED_SCALE_FACTOR,
    as_infogain_scheduler,
    check_component_types,
    check_components,
    converted_scheduler,
    in_float32,
    scale_factor,
)
from .decoding import DecodingOutput, DecodingStep
from .devices import DevicesMixin
from .docstrings import with_arguments_of
from .editing import ImageInput, fit_image, read_images
from .image_cache import CachedRows, PartialPipeline
from .image_call import CALL_OPTIONS, LARGEST_SIDE, Canvas, Condition, ImageCall, check_one_each
from .image_output import InfoGainPipelineOutput, recorded
from .image_rows import ExactRows
from .pictures import Picture
from .progress import ProgressPipeline
from .search import decode_or_search
from .trace import DecodingTrace
from .trace_view import StateImages

CALLBACK_TENSOR_INPUTS = ["latents", "logits", "scores"]


class InfoGainImagePipeline(CallStateMixin, CompileMixin, DevicesMixin, ProgressPipeline, CheckedPipeline):
    """Base class of the pipelines that generate images.

    A family of models is a subclass that sets the class attributes below, calls `register_family` in its constructor, and defines
    `canvas`, `encode` and `predict`; it overrides `check_inputs`, `to_pixels` and `to_tokens` if the defaults do not suit it.
    A family that needs other arguments than `prompt` and `negative_prompt` also has its own `__call__`, which consists of the
    signature, a docstring for these arguments, and `return self.run_call(locals())`.

    Every component may be None until a call needs it. An `AmusedScheduler` that is set as `scheduler` is converted.

    Attributes:
        default_num_inference_steps: Number of steps of calls that give none.
        family_guidance_scale, family_guidance_schedule: `guidance_scale` and `guidance_schedule` of calls that give none, for
            models without a default of their own.
        guidance_offset: 0 for guidance with logits = uncond + g · (cond - uncond), which a scale of 1 or less switches off;
            1 for logits = (1 + g) · cond - g · uncond, which 0 or less switches off.
        further_scales: Arguments of the family's own that are guidance scales of further negative conditions, in the order in
            which `encode` returns these; off at the same values as `guidance_scale`.
        batches_guidance: Whether unconditional and conditional states go through the transformer in one batch, in this order.
            False if their conditions can differ in shape.
        pixel_range: Range of the pixels that `to_pixels` returns, (0, 1) or (-1, 1).
        recorded_inputs: The family's own arguments that PNG files record.
        runs_partial_rows: Whether the network can run at some positions only, by the methods of `image_cache.PartialPipeline`.
    """

    _optional_components = ["vqvae", "tokenizer", "text_encoder", "transformer", "scheduler"]
    _callback_tensor_inputs = CALLBACK_TENSOR_INPUTS

    default_num_inference_steps: ClassVar[int]
    family_guidance_scale: ClassVar[float]
    family_guidance_schedule: ClassVar[str] = "constant"
    guidance_offset: ClassVar[int] = 0
    further_scales: ClassVar[tuple[str, ...]] = ()
    batches_guidance: ClassVar[bool] = True
    pixel_range: ClassVar[tuple[int, int]] = (0, 1)
    recorded_inputs: ClassVar[tuple[str, ...]] = ("prompt", "negative_prompt")
    runs_partial_rows: ClassVar[bool] = False

    vqvae: Any
    transformer: Any
    scheduler: Any
    image_processor: VaeImageProcessor
    _scale_factor = PUBLISHED_SCALE_FACTOR

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Completes the docstring of a family's own `__call__` with the arguments that all families share, for `help`."""
        super().__init_subclass__(**kwargs)
        own = cls.__dict__.get("__call__")
        if own is not None and own.__doc__:
            own.__doc__ = with_arguments_of(own, super(cls, cls).__call__)

    # What a family defines

    def canvas(self) -> Canvas:
        """The image tokens of the model."""
        raise NotImplementedError(f"{type(self).__name__} must define `canvas`.")

    def check_inputs(self, prompt: Any, negative_prompt: Any) -> int:
        """Checks those arguments of a call that are the family's own; returns the number of prompts.

        Raises:
            ValueError: For prompts that are not strings, or several negative prompts that are not as many as the prompts.
        """
        num_prompts = len(prompt_list("prompt", prompt))
        if negative_prompt is not None:
            prompt_list("negative_prompt", negative_prompt)
            check_one_each("negative_prompt", negative_prompt, num_prompts)
        return num_prompts

    def encode(self, call: ImageCall, *args: Any, **inputs: Any) -> tuple[Condition, *tuple[Condition | None, ...]]:
        """Encodes what the images of a call show.

        Args:
            call: The call; `call.per_image` repeats prompts, and `call.guided` is whether guidance is on.
            inputs: The family's own arguments, such as `prompt` and `negative_prompt`.

        Returns:
            The condition: tensors with one entry per image, named as the arguments of `predict` that receive them. And the
            condition that guidance steers away from, which may be None if guidance is off; then one for each of `further_scales`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `encode`.")

    def predict(self, tokens: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Logits of some states, without guidance.

        Args:
            tokens: (R, h, w) long, image codes, or the scheduler's mask id.
            kwargs: The tensors of the condition, with R entries each, and the running `ImageCall` as `call`, which has this
                call's scheduler and arguments.

        Returns:
            (R, L, V), or (M, V) at the M positions of `call.wanted(tokens)`, in row-major order, which takes less memory.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `predict`.")

    def to_pixels(self, tokens: torch.Tensor) -> torch.Tensor:
        """Decodes tokens (B, h, w) into pixels (B, 3, H, W) in `pixel_range`; by default with a `VQModel` of diffusers."""
        vqvae = in_float32(self.vqvae, self.vqvae.config.force_upcast)
        return decode_vqvae(vqvae, tokens).clamp(*self.pixel_range)

    def to_tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encodes pixels (B, 3, H, W) in `pixel_range` into tokens (B, h, w); by default with a `VQModel` of diffusers."""
        # In half precision torch has no `cdist` to find the nearest codes.
        return encode_vqvae(in_float32(self.vqvae), pixels)

    # Components

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, converted_scheduler(value) if name == "scheduler" else value)

    def register_family(self, scheduler: Any, default_guidance_scale: float | None, **components: Any) -> None:
        """Checks and registers the components of a family, in its constructor.

        Args:
            scheduler: An `InfoGainScheduler`, an `AmusedScheduler`, which is converted, or None.
            default_guidance_scale: `guidance_scale` of calls that give none, which is saved with the model; None stands for the
                family's.
            components: The models and the tokenizer, by name.

        Raises:
            ValueError: If a component is of another type, or the scale is not a finite number.
        """
        check_component_types(components)
        if default_guidance_scale is not None:
            check_number("default_guidance_scale", default_guidance_scale, -LARGEST_NUMBER)
            self.register_to_config(default_guidance_scale=default_guidance_scale)
        self.register_modules(**components, scheduler=as_infogain_scheduler(scheduler))
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor, do_normalize=self.pixel_range == (-1, 1))

    @property
    def default_guidance_scale(self) -> float:
        """The `guidance_scale` of calls that give none: the one saved with the model, or else that of its family."""
        return self.config.get("default_guidance_scale", self.family_guidance_scale)

    @property
    def default_guidance_schedule(self) -> str:
        """The `guidance_schedule` of calls that give none, likewise."""
        return self.config.get("default_guidance_schedule", self.family_guidance_schedule)

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per token along one side: those of `vqvae`, or, without one, the last known, 16 at first."""
        if self.vqvae is not None:
            self._scale_factor = scale_factor(self.vqvae.config)
        return self._scale_factor

    @vae_scale_factor.setter
    def vae_scale_factor(self, value: int) -> None:
        check_integer("vae_scale_factor", value, 1)
        self._scale_factor = value

    # Images to tokens

    @torch.no_grad()
    def encode_image(self, image: ImageInput, height: int | None = None, width: int | None = None) -> torch.Tensor:
        """The tokens of images, by the model's own image tokenizer.

        Args:
            image: One or several, as in a call.
            height, width: To which images are resized and cropped, in pixels; by default the size that the model was trained on.

        Returns:
            (B, h, w) long. `latents` of a call, with the scheduler's `mask_token_id` where tokens are to be decoded anew.

        Raises:
            ValueError: For something that is no image, or a size that is no multiple of a token's.
        """
        check_components(self, "vqvae", "transformer")
        canvas, unit = self.canvas(), self.vae_scale_factor
        size = [canvas.side * unit if side is None else side for side in (height, width)]
        for name, side in zip(("height", "width"), size, strict=True):
            check_integer(name, side, 1, LARGEST_SIDE)
            if side % unit:
                raise ValueError(f"`{name}` must be a multiple of {unit}, the pixels of a token, got {side}.")
        tokens = self._encode_pixels(torch.stack([fit_image(one, *size) for one in read_images("image", image)]))
        self.maybe_free_model_hooks()
        return tokens

    def _encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """`to_tokens` of pixels (B, 3, H, W) in [0, 1]."""
        low, high = self.pixel_range
        tokens = self.to_tokens((pixels * (high - low) + low).to(self.device_of("vqvae")))
        return tokens.to(self._execution_device)

    # The call

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_schedule: str | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guided_lookahead: bool = True,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        lookahead_batch_size: int | None = None,
        num_beams: int = 1,
        num_runs: int = 1,
        image: ImageInput | None = None,
        mask_image: ImageInput | None = None,
        strength: float | None = None,
        outpaint: Mapping[str, int] | None = None,
        mask_coverage: float = 0.0,
        mask_blur: float = 0.0,
        approximate_cache: str | None = None,
    ) -> InfoGainPipelineOutput | tuple[Any, DecodingTrace]:
        r"""Generates images.

        The defaults of a family, its form of guidance and the sizes of its models stand in the docstring of its class.

        Args:
            prompt: The prompt or prompts.
            height, width: In pixels; by default the size that the model was trained on, or that of `latents`.
            num_inference_steps: By default the class's `default_num_inference_steps`, or, if the scheduler's `tokens_per_step` is
                set, as many as that takes.
            guidance_scale: g of classifier-free guidance; by default the pipeline's `default_guidance_scale`. The class's
                `guidance_offset` decides the form: with 0 logits = uncond + g · (cond - uncond), which 1 or less switches off;
                with 1 logits = (1 + g) · cond - g · uncond, which 0 or less switches off.
            guidance_schedule: How guidance grows to its full strength with the share of the image that is decoded: "constant"
                (full from the start), "linear" or "cosine"; or with the steps, "titok_linear", "titok_power_cosine",
                "maskgen_linear" or "maskgen_cosine". By default the pipeline's, which is "constant" in most families.
            guidance_interval: (start, stop): guidance is on only while the share of the image that is decoded is at least `start`
                and below `stop`. Elsewhere the model does not see the negative prompt, which saves half of its rows.
            guided_lookahead: Whether candidates are compared by guided logits. False: by those with the prompt alone, so that
                only the chosen one takes a negative row.
            negative_prompt: What to steer away from, instead of the empty prompt: one for all prompts, or one for each. Ignored
                without guidance.
            num_images_per_prompt: The images of a prompt follow each other in the output.
            generator: One `torch.Generator`, from which every image gets its own, or a list with one per image. An image then
                does not depend on the batch that it is generated in (up to rounding in the model).
            latents: Token ids (B, h, w), long, with the scheduler's `mask_token_id` where tokens are to be generated. Known
                tokens are kept.
            output_type: "pil", "np", "pt" or "latent" (tokens).
            return_dict: Whether to return an `InfoGainPipelineOutput` instead of a tuple.
            callback_on_step_end: `callback(pipeline, step, timestep, kwargs) -> kwargs`, called after each step. Changed
                "latents" replace the tokens, and the model runs again on them.
            callback_on_step_end_tensor_inputs: What `kwargs` holds: "latents" (B, h, w); "logits" (B, h · w, V) that the step
                decided on, 0 where the model computes none for known tokens; "scores" (B, N), the objective of every candidate;
                others that the class lists in `_callback_tensor_inputs`.
            lookahead_batch_size: The most states, images times candidates, that go through the transformer at once; guidance
                doubles them. By default all of them; lower it if memory runs out.
            num_beams: Above 1, decodes by Info-Gain beam search (`decode_beam`), with the sampler "info_gain" only.
            num_runs: Above 1, decodes every image that many times and keeps the best run by the scheduler's
                `best_run_by` (`decode_best_of`). Neither search can be combined with the other or with a callback.
            image: An image to edit, for all prompts, or a list with one for each: PIL images, arrays (H, W, 3) or tensors
                (3, H, W) in [0, 1] or uint8. They are resized, and cropped at their centres, to `height` x `width` less the
                padding.
            mask_image: What to decode anew: images or masks as large as `image`, where a pixel counts as masked from one half
                (white) on. A token is decoded anew if any of its pixels is masked. The other pixels of `image` come out as they
                were.
            strength: The share of the (masked) tokens that is decoded anew, at random, in that share of the steps: in (0, 1], by
                default 1. Without `mask_image` and `outpaint` in (0, 1), by default 0.5; all of the image is then decoded.
            outpaint: Pixels to add by side, "left", "top", "right" and "bottom", in multiples of a token's. `height` and `width`
                are those of the output; by default the padding is added to the default size if the model takes others.
            mask_coverage: A token is decoded anew if more than this share of its pixels is masked, in [0, 1).
            mask_blur: Width in pixels (σ) of a soft seam outside the mask, where decoded pixels fade into those of `image`.
            approximate_cache: Saves time, and changes the images, by reusing parts of earlier rows of the network: "context" for
                the keys and values of known tokens (in the manner of arXiv 2505.19089), until the share of tokens in
                "context:0.25" has changed; or "ml_cache", Lumina-DiMOO's own, for greedy samplers. None: every row is exact.

        Returns:
            `InfoGainPipelineOutput`, or (images, trace).

        Raises:
            ValueError: For the first argument that does not fit.
        """
        return self.run_call(locals())

    def run_call(self, arguments: dict[str, Any]) -> InfoGainPipelineOutput | tuple[Any, DecodingTrace]:
        """Runs a call: checks its arguments, encodes its prompts, decodes the canvas and turns the tokens into images.

        Args:
            arguments: All arguments of a `__call__` by name, as `locals()` gives them in its first line. Those that are the
                family's own are passed to `check_inputs` and `encode`.
        """
        options = {name: arguments[name] for name in CALL_OPTIONS}
        inputs = {name: value for name, value in arguments.items() if name not in ("self", *CALL_OPTIONS)}
        for name in ("guidance_scale", "guidance_schedule"):
            if options[name] is None:
                options[name] = getattr(self, f"default_{name}")
        tokens_only = isinstance(options["output_type"], str) and options["output_type"] == "latent"
        check_components(self, "transformer", "scheduler", *(() if tokens_only else ("vqvae",)))
        num_prompts = self.check_inputs(**inputs)
        call = ImageCall(pipe=self, inputs=inputs, num_prompts=num_prompts, **options)
        call.condition_on(*self.encode(call, **inputs))
        with self.running(call.state):
            output = self._decode(call)
            images = self._images(call, output)
            self.maybe_free_model_hooks()
        if not call.return_dict:
            return images, output.trace
        return InfoGainPipelineOutput(images=images, trace=output.trace, seeds=output.seeds)

    def _decode(self, call: ImageCall) -> DecodingOutput:
        tokens = call.start_tokens()
        total = int((tokens == call.mask_token_id).sum())

        start = time.perf_counter()
        with self.progress_bar(total=total) as progress_bar:
            cache = call.cache
            rows = CachedRows(cast(PartialPipeline, self), call, cache, tokens) if cache else ExactRows(self, call)

            def show(tokens: torch.Tensor) -> None:
                progress_bar.update(total - int((tokens == call.mask_token_id).sum()) - progress_bar.n)

            def after_step(step: DecodingStep) -> torch.Tensor | None:
                if not progress_bar.disable:  # counting makes a device wait
                    show(step.tokens)
                if call.callback_on_step_end is None:
                    rows.advance(step.tokens)
                    return None
                latents, names = step.tokens.unflatten(1, call.grid), call.callback_on_step_end_tensor_inputs
                edited = call_back(self, call.callback_on_step_end, step, names, "latents", call.state, latents=latents)
                call.forget_numbers()
                edited = latents if edited is None else edited
                call.check_latents(edited)
                rows.advance(edited.flatten(1))
                return edited.flatten(1)

            output = decode_or_search(
                rows.denoise,
                call.scheduler,
                tokens,
                num_beams=call.num_beams,
                num_runs=call.num_runs,
                callback=after_step,
                generator=call.generator,
                lookahead_batch_size=call.lookahead_batch_size,
                grid=call.grid,
                interrupted=lambda: call.state.interrupt,
                guide=None if call.guided_lookahead else rows.guide,
            )
            show(output.tokens)
        call.state.num_timesteps = len(output.trace.winner)
        seconds, images = time.perf_counter() - start, StateImages(self, call.edit, call.canvas.line is None, call.decoding)
        return replace(output, trace=output.trace.drawn_with(grid=call.grid, images=images, seconds=seconds))

    # Images

    @torch.no_grad()
    def state_images(
        self, tokens: torch.Tensor, paste: Callable[[torch.Tensor], torch.Tensor] | None = None, **decoding: torch.Tensor
    ) -> list[PIL.Image.Image]:
        """PIL images of tokens (R, h, w), grey where they hold the scheduler's mask id.

        Args:
            paste: Changes the images (R, 3, H, W) in [0, 1], such as `Edit.paste`.
            decoding: Further arguments of `to_pixels`, with R entries.
        """
        check_components(self, "vqvae", "scheduler")
        images = self._state_images(tokens.long(), self.scheduler.config.mask_token_id, paste, "pil", **decoding)
        self.maybe_free_model_hooks()
        return images

    def _state_images(
        self,
        tokens: torch.Tensor,
        mask_token_id: int,
        paste: Callable[[torch.Tensor], torch.Tensor] | None,
        output_type: str,
        **decoding: torch.Tensor,
    ) -> Any:
        tokens = tokens.to(self.device_of("vqvae"))
        masked = tokens == mask_token_id
        pixels = self.to_pixels(tokens.masked_fill(masked, 0), **decoding)
        if masked.any():
            cells = masked.repeat_interleave(self.vae_scale_factor, 1).repeat_interleave(self.vae_scale_factor, 2)
            pixels = pixels.masked_fill(cells[:, None], sum(self.pixel_range) / 2)
        images = self.image_processor.postprocess(pixels, "pt")
        if paste is not None:
            images = paste(images)
        return self.image_processor.postprocess(images, output_type, [False] * len(images))

    def _images(self, call: ImageCall, output: DecodingOutput) -> Any:
        """The decoded tokens as `output_type` asks for them; positions that an interruption left masked are grey."""
        tokens = output.tokens.unflatten(1, call.grid)
        if call.output_type == "latent":
            return tokens
        paste = call.edit.paste if call.edit else None
        images = self._state_images(tokens, call.mask_token_id, paste, call.output_type, **call.decoding)
        if call.output_type == "pil":
            traces = [output.trace.of_sample(i).record() for i in range(len(images))]
            settings = [{**recorded(self, call, i, output.seeds[i]), "trace": trace} for i, trace in enumerate(traces)]
            images = [Picture.of(*pair) for pair in zip(images, settings, strict=True)]
        return images

"""The base class of image pipelines whose prompts are encoded by CLIP: aMUSEd and Meissonic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.utils import logging
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from .callbacks import StepCallback
from .candidates import Generators
from .checks import LARGEST_NUMBER, check_bool, check_integer, check_number, check_tensor, is_number, prompt_list
from .components import check_components, tokenize
from .editing import ImageInput
from .image_call import Condition, ImageCall, check_one_each
from .image_output import InfoGainPipelineOutput
from .image_pipeline import CALLBACK_TENSOR_INPUTS, InfoGainImagePipeline
from .printing import shown
from .trace import DecodingTrace

logger = logging.get_logger("diffusers." + __name__)

EMBEDDINGS = ("prompt_embeds", "encoder_hidden_states", "negative_prompt_embeds", "negative_encoder_hidden_states")
"""What `encode_prompt` returns."""


def check_prompts(
    prompt: str | list[str] | None,
    negative_prompt: str | list[str] | None,
    prompt_embeds: torch.Tensor | None,
    encoder_hidden_states: torch.Tensor | None,
    negative_prompt_embeds: torch.Tensor | None,
    negative_encoder_hidden_states: torch.Tensor | None,
) -> int:
    """The number of prompts, of which either texts or embeddings are given.

    Raises:
        ValueError: For the first prompts or embeddings that do not fit.
    """
    if (prompt is None) == (prompt_embeds is None):
        raise ValueError("Either `prompt` or `prompt_embeds` must be given, and not both.")
    for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        if text is not None:
            prompt_list(name, text)
    pairs = (
        ("prompt_embeds", prompt_embeds, "encoder_hidden_states", encoder_hidden_states),
        ("negative_prompt_embeds", negative_prompt_embeds, "negative_encoder_hidden_states", negative_encoder_hidden_states),
    )
    for name, embeds, other, states in pairs:
        if (embeds is None) != (states is None):
            raise ValueError(f"`{name}` and `{other}` must be given together.")
        for argument, value, ndim, shape in ((name, embeds, 2, "(B, P)"), (other, states, 3, "(B, S, D)")):
            if value is not None and not (isinstance(value, torch.Tensor) and value.ndim == ndim and len(value)):
                raise ValueError(f"`{argument}` must be a tensor {shape} or None, got {shown(value)}.")
        if embeds is not None and states is not None and len(embeds) != len(states):
            raise ValueError(f"`{name}` and `{other}` must have the same length, got {len(embeds)} and {len(states)}.")
    if negative_prompt is not None and negative_prompt_embeds is not None:
        raise ValueError("`negative_prompt` and `negative_prompt_embeds` must not both be given.")
    num_prompts = len(prompt_embeds) if prompt_embeds is not None else len(prompt_list("prompt", prompt))
    check_one_each("negative_prompt", negative_prompt, num_prompts)
    check_one_each("negative_prompt_embeds", negative_prompt_embeds, num_prompts)
    return num_prompts


class ClipImagePipeline(InfoGainImagePipeline):
    """Base class of image pipelines whose transformer is conditioned on CLIP's embeddings of a prompt and on micro-conditions.

    `predict` gets the text encoder's projected embeddings `prompt_embeds` (R, P), its last but one hidden states
    `encoder_hidden_states` (R, S, D) and `micro_conds` (R, 5): width, height, crop coordinates and aesthetic score.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vqvae"
    _callback_tensor_inputs = [*CALLBACK_TENSOR_INPUTS, *EMBEDDINGS]

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModelWithProjection

    def check_inputs(  # type: ignore[override]
        self, micro_conditioning_aesthetic_score: Any, micro_conditioning_crop_coord: Any, **prompts: Any
    ) -> int:
        """Checks prompts, embeddings and micro-conditions; returns the number of prompts.

        Raises:
            ValueError: For the first of them that does not fit.
        """
        num_prompts = check_prompts(**prompts)
        check_number("micro_conditioning_aesthetic_score", micro_conditioning_aesthetic_score, -LARGEST_NUMBER)
        corner = micro_conditioning_crop_coord
        if not (isinstance(corner, (tuple, list)) and len(corner) == 2 and all(map(is_number, corner))):
            raise ValueError(f"`micro_conditioning_crop_coord` must be a pair of numbers, got {shown(corner)}.")
        return num_prompts

    def encode(
        self,
        call: ImageCall,
        micro_conditioning_aesthetic_score: float,
        micro_conditioning_crop_coord: tuple[int, int],
        **prompts: Any,
    ) -> tuple[Condition, Condition | None]:
        """The embeddings of the prompts, and of the negative prompts with guidance, with the micro-conditions."""
        pooled, hidden, negative_pooled, negative_hidden = self.encode_prompt(
            num_images_per_prompt=call.num_images_per_prompt,
            do_classifier_free_guidance=call.guided,
            device=call.device,
            **prompts,
        )
        micro_conds = torch.tensor(
            [[call.width, call.height, *micro_conditioning_crop_coord, micro_conditioning_aesthetic_score]],
            device=call.device,
            dtype=torch.float32,
        ).expand(call.batch_size, -1)
        condition = {"prompt_embeds": pooled, "encoder_hidden_states": hidden, "micro_conds": micro_conds}
        if negative_pooled is None or negative_hidden is None:
            return condition, None
        return condition, {**condition, "prompt_embeds": negative_pooled, "encoder_hidden_states": negative_hidden}

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_encoder_hidden_states: torch.Tensor | None = None,
        device: torch.device | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Text embeddings of the prompts, each repeated `num_images_per_prompt` times in a row.

        Embeddings that are given are only repeated. The negative prompt defaults to the empty text. `device` is by default the
        pipeline's.

        Returns:
            `prompt_embeds` (B, P), `encoder_hidden_states` (B, S, D), and the same two of the negative prompts (None without
            guidance).

        Raises:
            ValueError: For the first argument that does not fit, or a missing tokenizer or text encoder.
        """

        device = self._execution_device if device is None else device
        dtype = None if self.transformer is None else self.transformer.dtype

        def repeated(embeds: torch.Tensor) -> torch.Tensor:
            return embeds.to(device, dtype).repeat_interleave(num_images_per_prompt, 0)

        check_integer("num_images_per_prompt", num_images_per_prompt, 1)
        check_bool("do_classifier_free_guidance", do_classifier_free_guidance)
        pooled = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
        hidden = {
            "encoder_hidden_states": encoder_hidden_states,
            "negative_encoder_hidden_states": negative_encoder_hidden_states,
        }
        for names, ndim in ((pooled, 2), (hidden, 3)):
            for name, value in names.items():
                if value is not None:
                    check_tensor(name, value, [ndim], f"a tensor of {ndim} dimensions or None")
        if prompt is not None:
            prompt_embeds, encoder_hidden_states = self._encode_texts(prompt_list("prompt", prompt), device)
        if prompt_embeds is None or encoder_hidden_states is None:
            raise ValueError("Either `prompt`, or `prompt_embeds` and `encoder_hidden_states`, must be given.")
        negative: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        if do_classifier_free_guidance:
            if negative_prompt_embeds is None or negative_encoder_hidden_states is None:
                texts = [""] if negative_prompt is None else prompt_list("negative_prompt", negative_prompt)
                negative_prompt_embeds, negative_encoder_hidden_states = self._encode_texts(texts, device)
            if len(negative_prompt_embeds) == 1:
                negative_prompt_embeds = negative_prompt_embeds.expand(len(prompt_embeds), -1)
                negative_encoder_hidden_states = negative_encoder_hidden_states.expand(len(prompt_embeds), -1, -1)
            negative = repeated(negative_prompt_embeds), repeated(negative_encoder_hidden_states)
        return repeated(prompt_embeds), repeated(encoder_hidden_states), *negative

    def _encode_texts(self, texts: list[str], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        check_components(self, "tokenizer", "text_encoder")
        limit = min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)
        options = {"return_tensors": "pt", "padding": "max_length", "truncation": True, "max_length": limit}
        ids = tokenize(self.tokenizer, texts, **options).input_ids
        for text in texts:
            length = len(tokenize(self.tokenizer, text, verbose=False).input_ids)
            if length > limit:
                logger.warning(f"A prompt of {length} tokens was cut to the {limit} that the text encoder takes: {text!r}.")
        outputs = self.text_encoder(ids.to(device), return_dict=True, output_hidden_states=True)
        return outputs.text_embeds, outputs.hidden_states[-2]

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: str | list[str] | None = None,
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
        prompt_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_encoder_hidden_states: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        micro_conditioning_aesthetic_score: float = 6,
        micro_conditioning_crop_coord: tuple[int, int] = (0, 0),
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

        Args:
            prompt: The prompt or prompts; either they or `prompt_embeds` must be given.
            prompt_embeds, encoder_hidden_states: What `encode_prompt` returns, instead of `prompt`.
            negative_prompt_embeds, negative_encoder_hidden_states: The same for `negative_prompt`.
            micro_conditioning_aesthetic_score, micro_conditioning_crop_coord: The aesthetic score and the coordinates of the
                cropped corner that the model was trained to be conditioned on, besides the size of the image.

        Returns:
            `InfoGainPipelineOutput`, or (images, trace).

        Raises:
            ValueError: For the first argument that does not fit.
        """
        return self.run_call(locals())

"""What pipelines share whose prompts go through CLIP and whose tokens come from a VQGAN: aMUSEd and Meissonic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging

from .checkpoints.stock import decode_vqvae
from .checks import LARGEST_NUMBER, check_bool, check_integer, check_number, check_tensor, is_number, prompt_list
from .components import check_components, in_float32, tokenize
from .image_generation import CALLBACK_TENSOR_INPUTS as IMAGE_TENSOR_INPUTS
from .image_generation import ImageGeneration, InfoGainPipelineOutput, check_one_each
from .printing import shown

logger = logging.get_logger("diffusers." + __name__)

CONDITIONS = ["prompt_embeds", "encoder_hidden_states", "negative_prompt_embeds", "negative_encoder_hidden_states"]
CALLBACK_TENSOR_INPUTS = [*IMAGE_TENSOR_INPUTS, *CONDITIONS]

Predict = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Logits of tokens (R, L) under pooled embeddings (R, P), hidden states (R, S, D) and micro-conditions (R, 5)."""


def check_prompts(
    prompt: str | list[str] | None,
    negative_prompt: str | list[str] | None,
    prompt_embeds: torch.Tensor | None,
    encoder_hidden_states: torch.Tensor | None,
    negative_prompt_embeds: torch.Tensor | None,
    negative_encoder_hidden_states: torch.Tensor | None,
) -> int:
    """Raises a ValueError for prompts and embeddings that do not fit, naming the first; returns the number of prompts."""
    if (prompt is None) == (prompt_embeds is None):
        raise ValueError("Either `prompt` or `prompt_embeds` must be given, and not both.")
    for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        if text is not None:
            prompt_list(name, text)
    pairs = (
        ("prompt_embeds", prompt_embeds, "encoder_hidden_states", encoder_hidden_states),
        (
            "negative_prompt_embeds",
            negative_prompt_embeds,
            "negative_encoder_hidden_states",
            negative_encoder_hidden_states,
        ),
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


def encode_prompt(
    pipe: DiffusionPipeline,
    prompt: str | list[str] | None,
    num_images_per_prompt: int = 1,
    do_classifier_free_guidance: bool = True,
    negative_prompt: str | list[str] | None = None,
    prompt_embeds: torch.Tensor | None = None,
    encoder_hidden_states: torch.Tensor | None = None,
    negative_prompt_embeds: torch.Tensor | None = None,
    negative_encoder_hidden_states: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Text embeddings of the prompts, each repeated `num_images_per_prompt` times in a row.

    Embeddings that are given are only repeated. The negative prompt defaults to the empty text.

    Returns:
        `prompt_embeds` (B, P), `encoder_hidden_states` (B, S, D), and the same two of the negative prompts (None without
        guidance).
    """

    def encode(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        check_components(pipe, "tokenizer", "text_encoder")
        limit = min(pipe.tokenizer.model_max_length, pipe.text_encoder.config.max_position_embeddings)
        options = {"return_tensors": "pt", "padding": "max_length", "truncation": True, "max_length": limit}
        ids = tokenize(pipe.tokenizer, texts, **options).input_ids
        for text in texts:
            length = len(tokenize(pipe.tokenizer, text, verbose=False).input_ids)
            if length > limit:
                logger.warning(f"A prompt of {length} tokens was cut to the {limit} that the text encoder takes: {text!r}.")
        outputs = pipe.text_encoder(ids.to(pipe._execution_device), return_dict=True, output_hidden_states=True)
        return outputs.text_embeds, outputs.hidden_states[-2]

    def repeated(embeds: torch.Tensor) -> torch.Tensor:
        dtype = embeds.dtype if pipe.transformer is None else pipe.transformer.dtype
        return embeds.to(pipe._execution_device, dtype).repeat_interleave(num_images_per_prompt, 0)

    check_integer("num_images_per_prompt", num_images_per_prompt, 1)
    check_bool("do_classifier_free_guidance", do_classifier_free_guidance)
    pooled = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
    hidden = {"encoder_hidden_states": encoder_hidden_states, "negative_encoder_hidden_states": negative_encoder_hidden_states}
    for names, ndim in ((pooled, 2), (hidden, 3)):
        for name, value in names.items():
            if value is not None:
                check_tensor(name, value, [ndim], f"a tensor of {ndim} dimensions or None")
    if prompt is not None:
        prompt_embeds, encoder_hidden_states = encode(prompt_list("prompt", prompt))
    if prompt_embeds is None or encoder_hidden_states is None:
        raise ValueError("Either `prompt`, or `prompt_embeds` and `encoder_hidden_states`, must be given.")
    negative: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    if do_classifier_free_guidance:
        if negative_prompt_embeds is None or negative_encoder_hidden_states is None:
            texts = [""] if negative_prompt is None else prompt_list("negative_prompt", negative_prompt)
            negative_prompt_embeds, negative_encoder_hidden_states = encode(texts)
        if len(negative_prompt_embeds) == 1:
            negative_prompt_embeds = negative_prompt_embeds.expand(len(prompt_embeds), -1)
            negative_encoder_hidden_states = negative_encoder_hidden_states.expand(len(prompt_embeds), -1, -1)
        negative = repeated(negative_prompt_embeds), repeated(negative_encoder_hidden_states)
    return repeated(prompt_embeds), repeated(encoder_hidden_states), *negative


def generate(
    generation: ImageGeneration,
    predict: Predict,
    *,
    prompt: str | list[str] | None,
    negative_prompt: str | list[str] | None,
    prompt_embeds: torch.Tensor | None,
    encoder_hidden_states: torch.Tensor | None,
    negative_prompt_embeds: torch.Tensor | None,
    negative_encoder_hidden_states: torch.Tensor | None,
    micro_conditioning_aesthetic_score: float,
    micro_conditioning_crop_coord: tuple[int, int],
) -> InfoGainPipelineOutput | tuple[Any, ...]:
    """Encodes the prompts and runs the generation, with guidance where `guidance_scale` is above 1.

    Raises:
        ValueError: If the micro-conditions are no numbers.
    """
    check_number("micro_conditioning_aesthetic_score", micro_conditioning_aesthetic_score, -LARGEST_NUMBER)
    corner = micro_conditioning_crop_coord
    if not (isinstance(corner, (tuple, list)) and len(corner) == 2 and all(map(is_number, corner))):
        raise ValueError(f"`micro_conditioning_crop_coord` must be a pair of numbers, got {shown(corner)}.")
    pipe, state = generation.pipe, generation.state
    embeddings = pipe.encode_prompt(
        prompt,
        generation.num_images_per_prompt,
        generation.guided,
        negative_prompt,
        prompt_embeds,
        encoder_hidden_states,
        negative_prompt_embeds,
        negative_encoder_hidden_states,
    )
    state.conditions = dict(zip(CONDITIONS, embeddings, strict=True))
    micro_conds = torch.tensor(
        [[generation.width, generation.height, *corner, micro_conditioning_aesthetic_score]],
        device=pipe._execution_device,
        dtype=torch.float32,
    )

    def denoise(tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        pooled, hidden, negative_pooled, negative_hidden = (state.conditions[name] for name in CONDITIONS)
        if not generation.guided:
            return predict(tokens, pooled[rows], hidden[rows], micro_conds.expand(len(tokens), -1))
        both = torch.cat([negative_pooled[rows], pooled[rows]]), torch.cat([negative_hidden[rows], hidden[rows]])
        logits = predict(torch.cat([tokens, tokens]), *both, micro_conds.expand(2 * len(tokens), -1))
        uncond, cond = logits.chunk(2)
        return generation.guide(cond, uncond, tokens)

    def to_pixels(tokens: torch.Tensor) -> torch.Tensor:
        """In float32 where the VQ model asks for it, since half precision overflows in it."""
        return decode_vqvae(in_float32(pipe.vqvae, pipe.vqvae.config.force_upcast), tokens).clamp(0, 1)

    return generation.run(denoise, to_pixels)

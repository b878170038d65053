"""Text to image with aMUSEd-format models, decoded by `InfoGainScheduler`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UVit2DModel, VQModel
from diffusers.image_processor import VaeImageProcessor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from . import clip_generation
from .callbacks import StepCallback
from .candidates import Generators
from .checkpoints.published import CheckedPipeline
from .checkpoints.repository import EMBEDDED_MODELS
from .checks import check_type
from .components import ImagePipeline, check_components, check_given
from .image_generation import (
    ImageGeneration,
    InfoGainPipelineOutput,
    as_infogain_scheduler,
)
from .lora import AmusedLoraMixin
from .scheduling_infogain import InfoGainScheduler

DEMO_MODEL = EMBEDDED_MODELS["demo"]
"""Folder of the embedded demo model, for loaders that do not know the name "demo"."""

DEFAULT_NUM_INFERENCE_STEPS = 12


class InfoGainPipeline(ImagePipeline, CheckedPipeline, AmusedLoraMixin):
    r"""Text-to-image generation with models in aMUSEd's format, decoded by information gain or any rule it is compared with.

    Everything about the sampler is a setting of `scheduler`; an `AmusedScheduler`, as aMUSEd repositories have it, is converted
    to an `InfoGainScheduler` with its default settings. `from_pretrained("demo")` loads the small model that the package ships.

    Args:
        vqvae: Turns tokens into pixels.
        tokenizer: Of the text encoder.
        text_encoder: CLIP; its pooled embeddings and last hidden states but one condition the transformer.
        transformer: Predicts the tokens.
        scheduler: Decides which tokens to decode next, and with what.
        default_guidance_scale: `guidance_scale` of calls that give none; 10.0 by default.

    Raises:
        ValueError: If `scheduler` is neither an `InfoGainScheduler` nor an `AmusedScheduler`.
    """

    families = ("aMUSEd",)
    published_in_diffusers_format = True
    repository_options = ("variant",)
    saved_as = ("AmusedPipeline", "AmusedImg2ImgPipeline", "AmusedInpaintPipeline")
    model_cpu_offload_seq = "text_encoder->transformer->vqvae"
    _callback_tensor_inputs = clip_generation.CALLBACK_TENSOR_INPUTS
    family_guidance_scale = 10.0

    vqvae: VQModel
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModelWithProjection
    transformer: UVit2DModel
    scheduler: InfoGainScheduler

    def __init__(
        self,
        vqvae: VQModel | None,
        tokenizer: CLIPTokenizer | None,
        text_encoder: CLIPTextModelWithProjection | None,
        transformer: UVit2DModel | None,
        scheduler: InfoGainScheduler | None,
        default_guidance_scale: float | None = None,
    ):
        super().__init__()
        check_given({"vqvae": vqvae, "tokenizer": tokenizer, "text_encoder": text_encoder, "transformer": transformer})
        self.keep_default_guidance_scale(default_guidance_scale)
        self.register_modules(
            vqvae=vqvae,
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            transformer=transformer,
            scheduler=as_infogain_scheduler(scheduler),
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor, do_normalize=False)

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Writes `model_index.json` as an aMUSEd repository's."""
        # Hub repositories cannot name classes outside diffusers. Saved as aMUSEd's, the repository also loads without this
        # package, and the scheduler's own settings survive in its config, which `__init__` converts back.
        config = json.loads(self.to_json_string())
        config["_class_name"] = "AmusedPipeline"
        if self.scheduler is not None:
            config["scheduler"] = ["diffusers", "AmusedScheduler"]
        Path(json_file_path).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    encode_prompt = clip_generation.encode_prompt

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_schedule: str = "constant",
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
        cross_attention_kwargs: dict[str, Any] | None = None,
        micro_conditioning_aesthetic_score: float = 6,
        micro_conditioning_crop_coord: tuple[int, int] = (0, 0),
        lookahead_batch_size: int | None = None,
        num_beams: int = 1,
        num_runs: int = 1,
    ) -> InfoGainPipelineOutput | tuple[Any, ...]:
        r"""Generates images.

        Args:
            prompt: The prompt or prompts.
            height, width: In pixels; by default what the model was trained on, or what `latents` have.
            num_inference_steps: By default 12, or, if the scheduler's `tokens_per_step` is set, as many as that takes.
            guidance_scale: g of classifier-free guidance, logits = uncond + g · (cond - uncond); 1 or less switches it off.
                By default `default_guidance_scale`.
            guidance_schedule: How guidance grows from 1 to `guidance_scale` with the share of the image that is decoded:
                "constant" (full from the start), "linear" or "cosine".
            negative_prompt: What to steer away from; one for all prompts or one each. Ignored without guidance.
            num_images_per_prompt: The images of a prompt follow each other in the output.
            generator: One `torch.Generator`, from which every image gets its own, or a list with one per image; an image then
                comes out the same alone and in any batch (up to rounding in the model).
            latents: Token ids (B, h, w), long, with the scheduler's `mask_token_id` where tokens are to be generated. Known
                tokens stay as they are, so this also inpaints.
            prompt_embeds, encoder_hidden_states: What `encode_prompt` returns, instead of `prompt`.
            negative_prompt_embeds, negative_encoder_hidden_states: The same for `negative_prompt`.
            output_type: "pil", "np", "pt" or "latent" (tokens).
            return_dict: Whether to return an `InfoGainPipelineOutput` instead of a tuple.
            callback_on_step_end: `callback(pipeline, step, timestep, kwargs) -> kwargs`, called after each step. Changed
                "latents" replace the tokens, and the model runs on them anew.
            callback_on_step_end_tensor_inputs: What `kwargs` holds: "latents" (B, h, w), "logits" (B, h · w, V) that the step
                decided on, "scores" (B, N), the objective of every candidate.
            cross_attention_kwargs: Passed on to the attention processors of the transformer.
            micro_conditioning_aesthetic_score, micro_conditioning_crop_coord: As in aMUSEd.
            lookahead_batch_size: The most states that go through the transformer at once, images times candidates; guidance
                doubles the rows. By default all of them; lower it if memory runs out.
            num_beams: More than 1 decodes by Info-Gain beam search (`decode_beam`), with the sampler "info_gain" only.
            num_runs: More than 1 decodes every image that many times and keeps the run with the smallest cumulative entropy
                (`decode_best_of`). Neither search can be combined with the other or with a callback.

        Returns:
            `InfoGainPipelineOutput`, or (images, trace).

        Raises:
            ValueError: For arguments that do not fit, naming the first.
        """
        guidance_scale = self.default_guidance_scale if guidance_scale is None else guidance_scale
        check_components(
            self, "transformer", "scheduler", *(() if isinstance(output_type, str) and output_type == "latent" else ("vqvae",))
        )
        check_type("cross_attention_kwargs", cross_attention_kwargs, (dict, type(None)), "a dictionary or None")
        config = self.transformer.config
        prompts: dict[str, Any] = {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "prompt_embeds": prompt_embeds,
            "encoder_hidden_states": encoder_hidden_states,
            "negative_prompt_embeds": negative_prompt_embeds,
            "negative_encoder_hidden_states": negative_encoder_hidden_states,
        }
        generation = ImageGeneration(
            pipe=self,
            codebook_size=config.codebook_size,
            vocab_size=config.vocab_size,
            scale_factor=self.vae_scale_factor,
            unit=self.vae_scale_factor * (2 if config.downsample else 1),
            default_size=config.sample_size,
            default_num_inference_steps=DEFAULT_NUM_INFERENCE_STEPS,
            num_prompts=clip_generation.check_prompts(**prompts),
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_schedule=guidance_schedule,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            latents=latents,
            output_type=output_type,
            return_dict=return_dict,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            lookahead_batch_size=lookahead_batch_size,
            num_beams=num_beams,
            num_runs=num_runs,
            asked={"prompt": prompt, "negative_prompt": negative_prompt},
        )

        def predict(tokens: torch.Tensor, pooled: torch.Tensor, hidden: torch.Tensor, micro_conds: torch.Tensor) -> torch.Tensor:
            logits = self.transformer(
                tokens.unflatten(1, generation.grid),
                encoder_hidden_states=hidden,
                pooled_text_emb=pooled,
                micro_conds=micro_conds,
                cross_attention_kwargs=cross_attention_kwargs,
            )
            return logits.flatten(2).transpose(1, 2)

        return clip_generation.generate(
            generation,
            predict,
            **prompts,
            micro_conditioning_aesthetic_score=micro_conditioning_aesthetic_score,
            micro_conditioning_crop_coord=micro_conditioning_crop_coord,
        )

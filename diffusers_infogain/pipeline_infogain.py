"""Text to image with aMUSEd-format models, decoded by `InfoGainScheduler`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AmusedScheduler, DiffusionPipeline, UVit2DModel, VQModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import AmusedLoraLoaderMixin
from diffusers.utils import logging
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from .candidates import Generators
from .image_generation import (
    CALLBACK_TENSOR_INPUTS,
    InfoGainPipelineOutput,
    StepCallback,
    as_infogain_scheduler,
    check_call,
    check_one_each,
    count_prompts,
    decode_canvas,
    guidance_scales,
    image_size,
    in_float32,
    tensor_inputs_of,
)
from .scheduling_infogain import InfoGainScheduler

logger = logging.get_logger("diffusers." + __name__)

DEMO_MODEL = str(Path(__file__).parent / "demo" / "model")
"""Folder of the embedded demo model, for loaders that do not know the name "demo"."""

DEFAULT_NUM_INFERENCE_STEPS = 12


class InfoGainPipeline(DiffusionPipeline, AmusedLoraLoaderMixin):
    r"""Text-to-image generation with models in aMUSEd's format, decoded by information gain or any rule it is compared with.

    Everything about the sampler is a setting of `scheduler`; an `AmusedScheduler`, as aMUSEd repositories have it, is converted
    to an `InfoGainScheduler` with its default settings. `from_pretrained("demo")` loads the small model that the package ships.

    Args:
        vqvae: Turns tokens into pixels.
        tokenizer: Of the text encoder.
        text_encoder: CLIP; its pooled embeddings and last hidden states but one condition the transformer.
        transformer: Predicts the tokens.
        scheduler: Decides which tokens to decode next, and with what.

    Raises:
        ValueError: If `scheduler` is neither an `InfoGainScheduler` nor an `AmusedScheduler`.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vqvae"
    _callback_tensor_inputs = CALLBACK_TENSOR_INPUTS

    vqvae: VQModel
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModelWithProjection
    transformer: UVit2DModel
    scheduler: InfoGainScheduler

    def __init__(
        self,
        vqvae: VQModel,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModelWithProjection,
        transformer: UVit2DModel,
        scheduler: InfoGainScheduler | AmusedScheduler,
    ):
        super().__init__()
        self.register_modules(
            vqvae=vqvae,
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            transformer=transformer,
            scheduler=as_infogain_scheduler(scheduler),
        )
        self.vae_scale_factor = 2 ** (len(vqvae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor, do_normalize=False)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *, variant: str | None = None, **kwargs: Any
    ) -> InfoGainPipeline:
        """As `DiffusionPipeline.from_pretrained`; the name "demo" stands for the model that the package ships.

        Weights are read from safetensors only, unless `use_safetensors=False` is given.
        """
        kwargs.setdefault("use_safetensors", True)
        if pretrained_model_name_or_path == "demo":
            pretrained_model_name_or_path = DEMO_MODEL
        return super().from_pretrained(pretrained_model_name_or_path, variant=variant, **kwargs)

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Writes `model_index.json` as an aMUSEd repository's."""
        # Hub repositories cannot name classes outside diffusers. Saved as aMUSEd's, the repository also loads without this
        # package, and the scheduler's own settings survive in its config, which `__init__` converts back.
        config = json.loads(self.to_json_string())
        config |= {"_class_name": "AmusedPipeline", "scheduler": ["diffusers", "AmusedScheduler"]}
        Path(json_file_path).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Loads LoRA layers of the transformer and of the text encoder (needs peft: the extra "lora").

        Args:
            pretrained_model_name_or_path_or_dict: Hub id, folder, file or state dict.
            adapter_name: A name to address the adapter by.
            kwargs: As in `diffusers.loaders.AmusedLoraLoaderMixin.lora_state_dict`.

        Raises:
            ValueError: If keys are found that are not LoRA layers, or no peft is installed.
        """
        # The mixin's own method is Stable Diffusion's, which looks for a U-Net.
        state_dict, network_alphas = self.lora_state_dict(pretrained_model_name_or_path_or_dict, **kwargs)
        if not all("lora" in key for key in state_dict):
            raise ValueError("`pretrained_model_name_or_path_or_dict` must hold LoRA layers only, with 'lora' in every key.")
        shared = {"network_alphas": network_alphas, "adapter_name": adapter_name, "_pipeline": self}
        self.load_lora_into_transformer(state_dict, transformer=self.transformer, **shared)
        self.load_lora_into_text_encoder(
            state_dict, text_encoder=self.text_encoder, prefix="text_encoder", lora_scale=self.lora_scale, **shared
        )

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
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Text embeddings of the prompts, each repeated `num_images_per_prompt` times in a row.

        Embeddings that are given are only repeated. The negative prompt defaults to the empty text.

        Returns:
            `prompt_embeds` (B, P), `encoder_hidden_states` (B, S, D), and the same two of the negative prompts (None without
            guidance).
        """

        def encode(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
            limit = self.tokenizer.model_max_length
            ids = self.tokenizer(texts, return_tensors="pt", padding="max_length", truncation=True, max_length=limit).input_ids
            for text in texts:
                length = len(self.tokenizer(text, verbose=False).input_ids)
                if length > limit:
                    logger.warning(f"A prompt of {length} tokens was cut to the {limit} that the text encoder takes: {text!r}.")
            outputs = self.text_encoder(ids.to(self._execution_device), return_dict=True, output_hidden_states=True)
            return outputs.text_embeds, outputs.hidden_states[-2]

        def repeated(embeds: torch.Tensor) -> torch.Tensor:
            return embeds.to(self._execution_device, self.transformer.dtype).repeat_interleave(num_images_per_prompt, 0)

        if prompt is not None:
            prompt_embeds, encoder_hidden_states = encode([prompt] if isinstance(prompt, str) else prompt)
        if prompt_embeds is None or encoder_hidden_states is None:
            raise ValueError("Either `prompt`, or `prompt_embeds` and `encoder_hidden_states`, must be given.")
        negative: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        if do_classifier_free_guidance:
            if negative_prompt_embeds is None or negative_encoder_hidden_states is None:
                texts = negative_prompt if isinstance(negative_prompt, list) else [negative_prompt or ""]
                negative_prompt_embeds, negative_encoder_hidden_states = encode(texts)
            if len(negative_prompt_embeds) == 1:
                negative_prompt_embeds = negative_prompt_embeds.expand(len(prompt_embeds), -1)
                negative_encoder_hidden_states = negative_encoder_hidden_states.expand(len(prompt_embeds), -1, -1)
            negative = repeated(negative_prompt_embeds), repeated(negative_encoder_hidden_states)
        return repeated(prompt_embeds), repeated(encoder_hidden_states), *negative

    @staticmethod
    def _check_prompts(
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
                count_prompts(name, text)
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
            if embeds is not None and states is not None and len(embeds) != len(states):
                raise ValueError(f"`{name}` and `{other}` must have the same length, got {len(embeds)} and {len(states)}.")
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ValueError("`negative_prompt` and `negative_prompt_embeds` must not both be given.")
        num_prompts = len(prompt_embeds) if prompt_embeds is not None else count_prompts("prompt", prompt)
        check_one_each("negative_prompt", negative_prompt, num_prompts)
        check_one_each("negative_prompt_embeds", negative_prompt_embeds, num_prompts)
        return num_prompts

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 10.0,
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
        config = self.transformer.config
        default_size = config.sample_size * self.vae_scale_factor
        height, width = image_size(height, width, latents, self.vae_scale_factor, default_size)
        callback_on_step_end_tensor_inputs = tensor_inputs_of(callback_on_step_end, callback_on_step_end_tensor_inputs)
        num_prompts = self._check_prompts(
            prompt,
            negative_prompt,
            prompt_embeds,
            encoder_hidden_states,
            negative_prompt_embeds,
            negative_encoder_hidden_states,
        )
        check_call(
            self.scheduler,
            codebook_size=config.codebook_size,
            vocab_size=config.vocab_size,
            num_prompts=num_prompts,
            num_images_per_prompt=num_images_per_prompt,
            height=height,
            width=width,
            unit=self.vae_scale_factor * (2 if config.downsample else 1),
            scale_factor=self.vae_scale_factor,
            guidance_scale=guidance_scale,
            guidance_schedule=guidance_schedule,
            generator=generator,
            latents=latents,
            output_type=output_type,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            num_beams=num_beams,
            num_runs=num_runs,
        )
        batch_size, device = num_prompts * num_images_per_prompt, self._execution_device
        grid = (height // self.vae_scale_factor, width // self.vae_scale_factor)
        guided = guidance_scale > 1

        pooled, hidden, negative_pooled, negative_hidden = self.encode_prompt(
            prompt,
            num_images_per_prompt,
            guided,
            negative_prompt,
            prompt_embeds,
            encoder_hidden_states,
            negative_prompt_embeds,
            negative_encoder_hidden_states,
        )
        micro_conds = torch.tensor(
            [[width, height, *micro_conditioning_crop_coord, micro_conditioning_aesthetic_score]],
            device=device,
            dtype=torch.float32,
        )
        mask_token_id = self.scheduler.config.mask_token_id

        def transformer(tokens: torch.Tensor, pooled: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
            logits = self.transformer(
                tokens.unflatten(1, grid),
                encoder_hidden_states=hidden,
                pooled_text_emb=pooled,
                micro_conds=micro_conds.expand(len(tokens), -1),
                cross_attention_kwargs=cross_attention_kwargs,
            )
            return logits.flatten(2).transpose(1, 2)

        def denoise(tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            if negative_pooled is None or negative_hidden is None:
                return transformer(tokens, pooled[rows], hidden[rows])
            both = torch.cat([negative_pooled[rows], pooled[rows]]), torch.cat([negative_hidden[rows], hidden[rows]])
            uncond, cond = transformer(torch.cat([tokens, tokens]), *both).float().chunk(2)
            scales = guidance_scales(tokens, mask_token_id, guidance_scale, guidance_schedule)
            return uncond + scales[:, None, None] * (cond - uncond)

        output = decode_canvas(
            self,
            denoise,
            batch_size=batch_size,
            grid=grid,
            codebook_size=config.codebook_size,
            latents=latents,
            num_inference_steps=num_inference_steps,
            default_num_inference_steps=DEFAULT_NUM_INFERENCE_STEPS,
            device=device,
            generator=generator,
            lookahead_batch_size=lookahead_batch_size,
            num_beams=num_beams,
            num_runs=num_runs,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        latents = output.tokens.unflatten(1, grid)
        images = latents if output_type == "latent" else self._decode_images(latents, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, output.trace
        return InfoGainPipelineOutput(images=images, trace=output.trace)

    def _decode_images(self, latents: torch.Tensor, output_type: str) -> Any:
        """Tokens (B, h, w) to images; in float32 where the VQ model asks for it, since half precision overflows in it."""
        with in_float32(self.vqvae, self.vqvae.config.force_upcast):
            shape = (*latents.shape, self.vqvae.config.vq_embed_dim or self.vqvae.config.latent_channels)
            pixels = self.vqvae.decode(latents, force_not_quantize=True, shape=shape).sample.clamp(0, 1)
        return self.image_processor.postprocess(pixels, output_type)

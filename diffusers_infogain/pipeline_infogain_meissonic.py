"""Text to image with Meissonic and Monetico, decoded by `InfoGainScheduler`."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import VQModel
from diffusers.image_processor import VaeImageProcessor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from . import clip_generation
from .callbacks import StepCallback
from .candidates import Generators
from .checkpoints.errors import one_sentence
from .checkpoints.published import CheckedPipeline, PublishedPipeline
from .checkpoints.repository import MODEL_INDEX, HubArguments, Repository, local_folder
from .checkpoints.saved import load_tokenizer
from .checkpoints.source import ModelSource
from .checkpoints.stock import open_clip_text_encoder, open_vqvae
from .components import ImagePipeline, check_components, check_given
from .files import read_json
from .image_generation import (
    ImageGeneration,
    InfoGainPipelineOutput,
    as_infogain_scheduler,
)
from .models.meissonic_transformer import MeissonicTransformer2DModel, open_meissonic_transformer
from .scheduling_infogain import InfoGainScheduler

DEFAULT_NUM_INFERENCE_STEPS = 48


class InfoGainMeissonicPipeline(ImagePipeline, CheckedPipeline):
    r"""Text-to-image generation with Meissonic (arXiv 2410.08261) or Monetico, decoded by information gain or any other rule.

    `from_pretrained` loads the published repositories as they are (`MeissonFlow/Meissonic`, `Collov-Labs/Monetico`), running
    none of the code in them, or a folder that `save_pretrained` or `diffusers-infogain convert` wrote.

    The transformer is told the time as the number of the step, counted down. Here it is the number at which the schedule leaves
    as many masks as the state has, the step's own where a schedule is followed; so it also fits states that are only looked at.

    Args:
        vqvae: Turns tokens into pixels.
        tokenizer: Of the text encoder.
        text_encoder: CLIP-H; its pooled embeddings and last hidden states but one condition the transformer.
        transformer: Predicts the tokens.
        scheduler: Decides which tokens to decode next, and with what.
        default_guidance_scale: `guidance_scale` of calls that give none; 9.0 by default.

    Raises:
        ValueError: If `scheduler` is neither an `InfoGainScheduler` nor an `AmusedScheduler`.
    """

    families = ("Meissonic", "Monetico")
    repository_options = ("variant", "text_encoder")
    model_cpu_offload_seq = "text_encoder->transformer->vqvae"
    _callback_tensor_inputs = clip_generation.CALLBACK_TENSOR_INPUTS
    family_guidance_scale = 9.0

    vqvae: VQModel
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModelWithProjection
    transformer: MeissonicTransformer2DModel
    scheduler: InfoGainScheduler

    def __init__(
        self,
        vqvae: VQModel | None,
        tokenizer: CLIPTokenizer | None,
        text_encoder: CLIPTextModelWithProjection | None,
        transformer: MeissonicTransformer2DModel | None,
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

    @classmethod
    def is_published(cls, repository: Repository) -> bool:
        """Whether its model_index.json is Meissonic's or Monetico's."""
        index = repository.index or {}
        return index.get("_class_name") == "Pipeline" and "Transformer2DModel" in (index.get("transformer") or [])

    @classmethod
    def open_published(
        cls,
        repository: str | os.PathLike[str],
        *,
        variant: str | None = None,
        text_encoder: str | os.PathLike[str] | None = None,
        without: Collection[str] = (),
        **hub: Any,
    ) -> PublishedPipeline:
        """The published repository, opened to be loaded or converted.

        Args:
            repository: Folder or Hub id.
            variant: Of the transformer's weights, such as "fp16".
            text_encoder: Folder or Hub id of another text encoder than the repository's. Meissonic's authors sample with
                "laion/CLIP-ViT-H-14-laion2B-s32B-b79K" in its place.
            without: Models that are not opened, since others take their place or none is wanted.
            hub: `revision`, `cache_dir`, `token` and `local_files_only`, as in `huggingface_hub.snapshot_download`.

        Raises:
            ValueError: For a repository of another family.
        """
        patterns = ["*.json", "*/*.json", "tokenizer/*", "transformer/*.safetensors", "vqvae/*.safetensors"]
        if text_encoder is None and "text_encoder" not in without:
            patterns.append("text_encoder/*.safetensors")
        folder = local_folder(repository, patterns, HubArguments(**hub))
        if not cls.is_published(Repository(folder)):
            raise ValueError(f"{folder / MODEL_INDEX} is not that of Meissonic or Monetico.")
        schedule_file = folder / "scheduler" / "scheduler_config.json"
        schedule = read_json(schedule_file)
        known = {name: schedule[name] for name in ("mask_token_id", "masking_schedule") if name in schedule}
        with one_sentence(str(schedule_file)):
            scheduler = InfoGainScheduler(**known)

        def text_encoder_folder() -> Path:
            if text_encoder is None:
                return folder / "text_encoder"
            return local_folder(text_encoder, ["config.json", "model.safetensors"])

        openers: dict[str, Callable[[], ModelSource]] = {
            "transformer": lambda: open_meissonic_transformer(folder / "transformer", variant),
            "vqvae": lambda: open_vqvae(folder / "vqvae"),
            "text_encoder": lambda: open_clip_text_encoder(text_encoder_folder()),
        }
        models = {name: opened() for name, opened in openers.items() if name not in without}
        components = {"tokenizer": load_tokenizer(CLIPTokenizer, folder / "tokenizer"), "scheduler": scheduler}
        return PublishedPipeline(cls, models, components)

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
        micro_conditioning_aesthetic_score: float = 6,
        micro_conditioning_crop_coord: tuple[int, int] = (0, 0),
        lookahead_batch_size: int | None = None,
        num_beams: int = 1,
        num_runs: int = 1,
    ) -> InfoGainPipelineOutput | tuple[Any, ...]:
        r"""Generates images.

        Args:
            prompt: The prompt or prompts.
            height, width: In pixels, multiples of 32 for Meissonic and of 16 for Monetico; by default what the model was trained
                on (1024 and 512), or what `latents` have.
            num_inference_steps: By default 48, or, if the scheduler's `tokens_per_step` is set, as many as that takes.
            guidance_scale: g of classifier-free guidance, logits = uncond + g · (cond - uncond); 1 or less switches it off.
                By default `default_guidance_scale`.
            guidance_schedule, negative_prompt, num_images_per_prompt, generator, latents: As in `InfoGainPipeline`.
            prompt_embeds, encoder_hidden_states: As in `InfoGainPipeline`.
            negative_prompt_embeds, negative_encoder_hidden_states: As in `InfoGainPipeline`.
            output_type, return_dict: As in `InfoGainPipeline`.
            callback_on_step_end, callback_on_step_end_tensor_inputs: As in `InfoGainPipeline`; "logits" are 0 at known tokens.
            micro_conditioning_aesthetic_score, micro_conditioning_crop_coord: As in aMUSEd.
            lookahead_batch_size, num_beams, num_runs: As in `InfoGainPipeline`.

        Returns:
            `InfoGainPipelineOutput`, or (images, trace).

        Raises:
            ValueError: For arguments that do not fit, naming the first.
        """
        guidance_scale = self.default_guidance_scale if guidance_scale is None else guidance_scale
        check_components(
            self, "transformer", "scheduler", *(() if isinstance(output_type, str) and output_type == "latent" else ("vqvae",))
        )
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
            # Neither repository's configuration says it; the larger model is the one that works on a halved grid.
            default_size=64 if config.downsample else 32,
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
            return self.transformer(
                tokens.unflatten(1, generation.grid),
                encoder_hidden_states=hidden,
                pooled_text_emb=pooled,
                micro_conds=micro_conds,
                timestep=generation.scheduler.timesteps_at(tokens),
                where=tokens == generation.mask_token_id,
            )

        return clip_generation.generate(
            generation,
            predict,
            **prompts,
            micro_conditioning_aesthetic_score=micro_conditioning_aesthetic_score,
            micro_conditioning_crop_coord=micro_conditioning_crop_coord,
        )

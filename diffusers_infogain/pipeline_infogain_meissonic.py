"""Text to image with Meissonic and Monetico, decoded by `InfoGainScheduler`."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from diffusers import VQModel
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from .checkpoints.errors import one_sentence
from .checkpoints.published import PublishedPipeline
from .checkpoints.repository import MODEL_INDEX, HubArguments, Repository, local_folder
from .checkpoints.saved import load_tokenizer
from .checkpoints.source import ModelSource
from .checkpoints.stock import open_clip_text_encoder, open_vqvae
from .files import read_json
from .image_call import Canvas, ImageCall
from .image_pipeline_clip import ClipImagePipeline
from .lora import AmusedLoraMixin
from .models.meissonic_transformer import MeissonicTransformer2DModel, open_meissonic_transformer
from .scheduling_infogain import InfoGainScheduler


class InfoGainMeissonicPipeline(ClipImagePipeline, AmusedLoraMixin):
    r"""Text-to-image generation with Meissonic (arXiv 2410.08261) or Monetico, decoded by information gain or any other rule.

    `from_pretrained` loads the published repositories as they are (`MeissonFlow/Meissonic`, `Collov-Labs/Monetico`), running
    none of the code in them, or a folder that `save_pretrained` or `diffusers-infogain convert` wrote.

    The transformer is conditioned on a countdown timestep. It is inferred from the number of masks that are left, so that it also
    fits the states of the lookahead; on schedule it is the timestep of the step.

    Calls take 48 steps by default. Images have 1024 x 1024 pixels by default with Meissonic, 512 x 512 with Monetico; other sizes
    are multiples of 32 and 16. Guidance is logits = uncond + g · (cond - uncond), with g = 9 by default; 1 or less switches it
    off.

    Args:
        vqvae: Decodes tokens into pixels.
        tokenizer: Tokenizer of the text encoder.
        text_encoder: CLIP-H, whose pooled embeddings and penultimate hidden states condition the transformer.
        transformer: Predicts the tokens.
        scheduler: Chooses the tokens to decode in each step, and their values.
        default_guidance_scale: `guidance_scale` of calls that give none; by default 9.

    Raises:
        ValueError: If `scheduler` is neither an `InfoGainScheduler` nor an `AmusedScheduler`.
    """

    families = ("Meissonic", "Monetico")
    repository_options = ("variant", "text_encoder")
    default_num_inference_steps = 48
    family_guidance_scale = 9.0

    vqvae: VQModel
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
        self.register_family(
            scheduler,
            default_guidance_scale,
            vqvae=vqvae,
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            transformer=transformer,
        )

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

    def canvas(self) -> Canvas:
        """The image tokens of the model."""
        config = self.transformer.config
        # Neither repository's configuration says the size; the larger model is the one that works on a halved grid.
        side, multiple = (64, 2) if config.downsample else (32, 1)
        return Canvas(config.codebook_size, config.vocab_size, side, multiple)

    def predict(
        self,
        tokens: torch.Tensor,
        prompt_embeds: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        micro_conds: torch.Tensor,
        call: ImageCall,
    ) -> torch.Tensor:
        """Logits (M, V) of tokens (R, h, w) where the call wants them, without guidance."""
        sequence = tokens.flatten(1)
        return self.transformer(
            tokens,
            encoder_hidden_states=encoder_hidden_states,
            pooled_text_emb=prompt_embeds,
            micro_conds=micro_conds,
            timestep=call.scheduler.timesteps_at(sequence),
            where=call.wanted(sequence),
        )

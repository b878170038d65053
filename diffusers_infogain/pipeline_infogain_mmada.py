"""Text to image with MMaDA, decoded by `InfoGainScheduler`."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any

import torch
from diffusers.utils import logging
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .checkpoints.errors import one_sentence
from .checkpoints.published import PublishedPipeline
from .checkpoints.repository import HubArguments, Repository, local_folder
from .checkpoints.saved import load_tokenizer
from .checks import check_integer, prompt_list, shown
from .components import check_components, in_float32, tokenize
from .files import read_json
from .image_pipeline_sequence import SequenceImagePipeline
from .models.llada import BidirectionalLlama, open_llada, pad_prompts
from .models.magvit_v2 import MagvitV2Model, open_magvit_v2
from .scheduling_infogain import InfoGainScheduler

logger = logging.get_logger("diffusers." + __name__)

VQ_REPOSITORY = "showlab/magvitv2"
"""Where MMaDA's image tokenizer is published."""

DEFAULT_CODEBOOK_SIZE = 8192


class InfoGainMMaDAPipeline(SequenceImagePipeline):
    r"""Text-to-image generation with MMaDA (arXiv 2505.15809), decoded by information gain or any rule it is compared with.

    `from_pretrained` loads the published repositories as they are (`Gen-Verse/MMaDA-8B-MixCoT`), or a folder that
    `save_pretrained` or `diffusers-infogain convert` wrote.

    A sequence is `[task] [bos] prompt [eos] [image start] image tokens [image end]`; image code c is the token
    `image_token_offset + c`. `scheduler` sees only the image tokens, as codes, with the codebook's size as mask id.

    Calls take 15 steps by default. Images have 512 x 512 pixels by default, as in MMaDA's training; other sizes are multiples of
    16. Guidance is logits = (1 + g) · cond - g · uncond, with g = 3.5 by default; 0 or less switches it off.

    Args:
        vqvae: Decodes tokens into pixels.
        tokenizer: Tokenizer of the prompts.
        transformer: Predicts the tokens.
        scheduler: Chooses the tokens to decode in each step, and their values.
        image_token_offset: Id of image code 0; by default the tokenizer's length.
        task_token_id, image_start_token_id, image_end_token_id, pad_token_id: Special tokens of the layout; by default MMaDA's.
        max_prompt_length: Maximal number of tokens of task, prompt, bos and eos together; longer prompts are cut, as in MMaDA.
        sample_size: Image tokens along a side, by default.
        default_guidance_scale: `guidance_scale` of calls that give none; by default 3.5.

    Raises:
        ValueError: If `scheduler` is neither an `InfoGainScheduler` nor an `AmusedScheduler`, or if the image tokens do not fit
            into the transformer's vocabulary.
    """

    families = ("MMaDA",)
    repository_options = ("vqvae", "vqvae_revision")
    default_num_inference_steps = 15
    family_guidance_scale = 3.5
    pixel_range = (-1, 1)

    vqvae: MagvitV2Model
    tokenizer: PreTrainedTokenizerBase
    transformer: BidirectionalLlama
    scheduler: InfoGainScheduler

    def __init__(
        self,
        vqvae: MagvitV2Model | None,
        tokenizer: PreTrainedTokenizerBase | None,
        transformer: BidirectionalLlama | None,
        scheduler: InfoGainScheduler | None,
        image_token_offset: int | None = None,
        task_token_id: int = 126088,
        image_start_token_id: int = 126084,
        image_end_token_id: int = 126085,
        pad_token_id: int = 126093,
        max_prompt_length: int = 513,
        sample_size: int = 32,
        default_guidance_scale: float | None = None,
    ):
        super().__init__()
        check_integer("image_token_offset", image_token_offset, 0, optional=True)
        self.register_family(scheduler, default_guidance_scale, vqvae=vqvae, tokenizer=tokenizer, transformer=transformer)
        self.register_layout(
            len(tokenizer) if image_token_offset is None and tokenizer is not None else image_token_offset,
            sample_size,
            task_token_id=task_token_id,
            image_start_token_id=image_start_token_id,
            image_end_token_id=image_end_token_id,
            pad_token_id=pad_token_id,
            max_prompt_length=max_prompt_length,
        )

    @property
    def codebook_size(self) -> int:
        """Number of image codes: that of `vqvae`, or, without one, the scheduler's mask id, which follows the codes."""
        return self.scheduler.config.mask_token_id if self.vqvae is None else self.vqvae.codebook_size

    @classmethod
    def is_published(cls, repository: Repository) -> bool:
        """Whether its config.json is MMaDA's."""
        return repository.config is not None and repository.config.get("model_type") == "mmada"

    @classmethod
    def open_published(
        cls,
        repository: str | os.PathLike[str],
        *,
        vqvae: str | os.PathLike[str] = VQ_REPOSITORY,
        vqvae_revision: str | None = None,
        without: Collection[str] = (),
        **hub: Any,
    ) -> PublishedPipeline:
        """The published repository, opened to be loaded or converted.

        Args:
            repository: Folder or Hub id of the language model.
            vqvae: Folder or Hub id of the image tokenizer, which MMaDA publishes apart.
            vqvae_revision: Of its Hub repository.
            without: Models that are not opened, since others take their place or none is wanted.
            hub: `revision`, `cache_dir`, `token` and `local_files_only`, as in `huggingface_hub.snapshot_download`.

        Raises:
            ValueError: For a repository of another family.
        """
        folder = local_folder(repository, ["*.json", "*.safetensors", "*.bin", "*.txt", "*.model"], HubArguments(**hub))
        config = read_json(folder / "config.json")
        if config.get("model_type") != "mmada":
            raise ValueError(f"{folder / 'config.json'}: `model_type` must be 'mmada', got {config.get('model_type')!r}.")
        codebook_size = config.get("codebook_size", DEFAULT_CODEBOOK_SIZE)
        models = {} if "transformer" in without else {"transformer": open_llada(folder)}
        if "vqvae" not in without:
            place = local_folder(vqvae, ["*.json", "*.safetensors"], HubArguments(**{**hub, "revision": vqvae_revision}))
            models["vqvae"] = open_magvit_v2(place)
            codes = models["vqvae"].skeleton.codebook_size
            if config.get("codebook_size", codes) != codes:
                raise ValueError(
                    f"{folder / 'config.json'}: `codebook_size` {shown(codebook_size)} is not that of the image tokenizer "
                    f"{os.fspath(vqvae)!r}, {codes}."
                )
            codebook_size = codes
        with one_sentence(f"{folder / 'config.json'}: `codebook_size`"):
            scheduler = InfoGainScheduler(mask_token_id=codebook_size)
        components = {"tokenizer": load_tokenizer(PreTrainedTokenizerFast, folder), "scheduler": scheduler}
        return PublishedPipeline(cls, models, components)

    def encode_prompt(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids of `[task] [bos] prompt [eos]`, padded on the left.

        Prompts that are too long are cut as MMaDA does, with a warning.

        Returns:
            Ids (B, P) and a mask (B, P), False at padding.
        """
        check_components(self, "tokenizer")
        config, tokenizer = self.config, self.tokenizer
        rows = []
        for text in prompt_list("prompts", prompts):
            ids = tokenize(tokenizer, text).input_ids
            if ids[:1] != [tokenizer.bos_token_id]:
                ids = [tokenizer.bos_token_id, *ids]
            ids = [config.task_token_id, *ids, tokenizer.eos_token_id]
            if len(ids) > config.max_prompt_length:
                logger.warning(
                    f"A prompt of {len(ids)} tokens was cut to the {config.max_prompt_length} that MMaDA takes: {text!r}."
                )
                ids = [*ids[: config.max_prompt_length - 1], tokenizer.eos_token_id]
            rows.append(ids)
        return pad_prompts(rows, config.pad_token_id, self._execution_device)

    @property
    def max_length(self) -> int:
        """Maximal number of tokens of prompt and image together."""
        return self.transformer.config.max_position_embeddings

    def lay_out(self, image: torch.Tensor, where: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[image start] image tokens [image end]`."""
        codes = image.flatten(1)
        one = torch.ones_like(codes[:, :1])
        sequence = torch.cat([self.config.image_start_token_id * one, codes, self.config.image_end_token_id * one], dim=1)
        return sequence, torch.nn.functional.pad(where.flatten(1), (1, 1))

    def to_pixels(self, tokens: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) of tokens (B, h, w), in float32."""
        return in_float32(self.vqvae).decode(tokens)

    def to_tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        """Tokens (B, h, w) of pixels (B, 3, H, W) in [-1, 1], in float32."""
        return in_float32(self.vqvae).encode(pixels)

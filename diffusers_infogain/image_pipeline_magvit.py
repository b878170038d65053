"""The base class of image pipelines of language models whose image tokenizer is MAGVIT-v2: MMaDA and Show-o."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging

from .checkpoints.repository import HubArguments, local_folder
from .checkpoints.source import ModelSource
from .checks import prompt_list, shown
from .components import check_components, in_float32, tokenize
from .image_pipeline_sequence import SequenceImagePipeline
from .models.llada import pad_prompts
from .models.magvit_v2 import MagvitV2Model, open_magvit_v2

logger = logging.get_logger("diffusers." + __name__)

VQ_REPOSITORY = "showlab/magvitv2"
"""Where the image tokenizer is published."""


def open_image_tokenizer(
    vqvae: str | os.PathLike[str], hub: HubArguments, config: Mapping[str, Any], file: Path
) -> tuple[ModelSource, int]:
    """Opens the image tokenizer, which is published apart from the language model.

    Args:
        vqvae: Folder or Hub id.
        hub: Where on the Hub to look.
        config, file: The configuration of the language model, and where it is.

    Returns:
        The model, and the size of its codebook.

    Raises:
        ValueError: If the language model has another number of image codes.
    """
    source = open_magvit_v2(local_folder(vqvae, ["*.json", "*.safetensors"], hub))
    codes: int = source.skeleton.codebook_size
    if config.get("codebook_size", codes) != codes:
        raise ValueError(
            f"{file}: `codebook_size` {shown(config['codebook_size'])} is not that of the image tokenizer {os.fspath(vqvae)!r}, "
            f"{codes}."
        )
    return source, codes


class MagvitImagePipeline(SequenceImagePipeline):
    """Base class of image pipelines with sequences `[task] [bos] prompt [eos] [image start] image tokens [image end]`.

    The configuration of a family has `task_token_id`, `image_start_token_id`, `image_end_token_id`, `pad_token_id`, and
    `max_prompt_length`, the most tokens of task, prompt, bos and eos together.
    """

    pixel_range = (-1, 1)

    vqvae: MagvitV2Model

    @property
    def codebook_size(self) -> int:
        """Number of image codes: that of `vqvae`, or, without one, the scheduler's mask id, which follows the codes."""
        return self.scheduler.config.mask_token_id if self.vqvae is None else self.vqvae.codebook_size

    def encode_prompt(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids of `[task] [bos] prompt [eos]`, padded on the left.

        Prompts that are too long are cut as the published code does, with a warning.

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
                    f"A prompt of {len(ids)} tokens was cut to the {config.max_prompt_length} that {self.families[0]} takes: "
                    f"{text!r}."
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

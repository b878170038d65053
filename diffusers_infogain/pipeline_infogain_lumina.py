"""Text to image with Lumina-DiMOO, decoded by `InfoGainScheduler`."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from typing import Any

import torch
from diffusers import VQModel
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .checkpoints.published import PublishedPipeline
from .checkpoints.repository import HubArguments, Repository, local_folder
from .checkpoints.saved import load_tokenizer
from .checkpoints.source import ModelSource
from .checkpoints.stock import decode_vqvae, open_vqvae
from .checks import check_integer, is_integer, prompt_list, shown
from .components import check_components, in_float32, tokenize
from .files import read_json
from .image_pipeline_sequence import SequenceImagePipeline
from .models.llada import BidirectionalLlama, open_llada, pad_prompts
from .scheduling_infogain import InfoGainScheduler

PROMPT_TEMPLATE = "<system>Generate an image according to the text prompt.</system><user>{}</user>"
UNCONDITION = "<uncondition>"
"""The prompt of the unconditional branch."""


class InfoGainLuminaPipeline(SequenceImagePipeline):
    r"""Text-to-image generation with Lumina-DiMOO (arXiv 2510.06308), decoded by information gain or rules it is compared with.

    `from_pretrained` loads the published repository as it is (`Alpha-VLLM/Lumina-DiMOO`), or a folder that `save_pretrained` or
    `diffusers-infogain convert` wrote.

    A sequence is `prompt [answer start] [image start] rows [image end] [answer end]`, with the prompt in `PROMPT_TEMPLATE`. Each
    row of image tokens ends with a newline token, which is given and never decoded; image code c is the token
    `image_token_offset + c`. `scheduler` sees only the image tokens, as codes, with the codebook's size as mask id.

    Calls take 64 steps by default. Images have 1024 x 1024 pixels by default; other sizes are multiples of 16. The authors also
    show 1536 x 768, and trained on multiples of 32, up to four times as long as wide. Guidance is
    logits = (1 + g) · cond - g · uncond, with g = 4 by default; 0 or less switches it off. The model was trained with
    `UNCONDITION` as its only negative prompt, which also replaces empty ones.

    Args:
        vqvae: Decodes tokens into pixels.
        tokenizer: Tokenizer of the prompts.
        transformer: Predicts the tokens.
        scheduler: Chooses the tokens to decode in each step, and their values.
        image_token_offset: Id of image code 0.
        newline_token_id, image_start_token_id, image_end_token_id, answer_start_token_id, answer_end_token_id: Special tokens of
            the layout; by default Lumina-DiMOO's.
        max_sequence_length: Maximal number of tokens of prompt and image together; by default that of the published training.
        sample_size: Image tokens along a side, by default.
        default_guidance_scale: `guidance_scale` of calls that give none; by default 4.

    Raises:
        ValueError: If `scheduler` is neither an `InfoGainScheduler` nor an `AmusedScheduler`, or if the image tokens do not fit
            into the transformer's vocabulary.
    """

    families = ("Lumina-DiMOO",)
    default_num_inference_steps = 64
    family_guidance_scale = 4.0
    unconditional_prompt = UNCONDITION

    vqvae: VQModel
    tokenizer: PreTrainedTokenizerBase
    transformer: BidirectionalLlama
    scheduler: InfoGainScheduler

    def __init__(
        self,
        vqvae: VQModel | None,
        tokenizer: PreTrainedTokenizerBase | None,
        transformer: BidirectionalLlama | None,
        scheduler: InfoGainScheduler | None,
        image_token_offset: int = 126356,
        newline_token_id: int = 126084,
        image_start_token_id: int = 126349,
        image_end_token_id: int = 126350,
        answer_start_token_id: int = 126354,
        answer_end_token_id: int = 126355,
        max_sequence_length: int = 5120,
        sample_size: int = 64,
        default_guidance_scale: float | None = None,
    ):
        super().__init__()
        check_integer("image_token_offset", image_token_offset, 0)
        self.register_family(scheduler, default_guidance_scale, vqvae=vqvae, tokenizer=tokenizer, transformer=transformer)
        self.register_layout(
            image_token_offset,
            sample_size,
            newline_token_id=newline_token_id,
            image_start_token_id=image_start_token_id,
            image_end_token_id=image_end_token_id,
            answer_start_token_id=answer_start_token_id,
            answer_end_token_id=answer_end_token_id,
            max_sequence_length=max_sequence_length,
        )

    @classmethod
    def is_published(cls, repository: Repository) -> bool:
        """Whether its model_index.json is Lumina-DiMOO's."""
        return repository.index is not None and repository.class_name == "LuminaDiMOOPipeline"

    @classmethod
    def open_published(
        cls, repository: str | os.PathLike[str], *, without: Collection[str] = (), **hub: Any
    ) -> PublishedPipeline:
        """The published repository, opened to be loaded or converted.

        Args:
            repository: Folder or Hub id.
            without: Models that are not opened, since others take their place or none is wanted.
            hub: `revision`, `cache_dir`, `token` and `local_files_only`, as in `huggingface_hub.snapshot_download`.

        Raises:
            ValueError: For a repository of another family.
        """
        folder = local_folder(repository, ["*.json", "*.safetensors", "*.bin", "*.txt", "*.model"], HubArguments(**hub))
        config = read_json(folder / "config.json")
        if config.get("model_type") != "llada":
            raise ValueError(f"{folder / 'config.json'}: `model_type` must be 'llada', got {config.get('model_type')!r}.")
        vqvae_config = folder / "vqvae" / "config.json"
        codebook_size = read_json(vqvae_config).get("num_vq_embeddings")
        if not is_integer(codebook_size):
            raise ValueError(f"{vqvae_config}: `num_vq_embeddings` must be an integer, got {shown(codebook_size)}.")
        openers: dict[str, Callable[[], ModelSource]] = {
            "transformer": lambda: open_llada(folder),
            "vqvae": lambda: open_vqvae(folder / "vqvae"),
        }
        components = {
            "tokenizer": load_tokenizer(PreTrainedTokenizerFast, folder),
            "scheduler": InfoGainScheduler(mask_token_id=codebook_size),
        }
        return PublishedPipeline(cls, {name: opened() for name, opened in openers.items() if name not in without}, components)

    def encode_prompt(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids of prompts in `PROMPT_TEMPLATE`, padded on the left; none is cut.

        Returns:
            Ids (B, P) and a mask (B, P), False at padding.
        """
        check_components(self, "tokenizer")
        rows = [tokenize(self.tokenizer, PROMPT_TEMPLATE.format(text)).input_ids for text in prompt_list("prompts", prompts)]
        # Padding is hidden from every token, so any id will do.
        return pad_prompts(rows, 0, self._execution_device)

    @property
    def max_length(self) -> int:
        """Maximal number of tokens of prompt and image together."""
        return self.config.max_sequence_length

    def lay_out(self, image: torch.Tensor, where: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[answer start] [image start] rows [image end] [answer end]`, every row with a newline token at its end."""
        config, pad = self.config, torch.nn.functional.pad
        start = image.new_tensor([config.answer_start_token_id, config.image_start_token_id]).expand(len(image), -1)
        end = image.new_tensor([config.image_end_token_id, config.answer_end_token_id]).expand(len(image), -1)
        rows = pad(image, (0, 1), value=config.newline_token_id).flatten(1)
        return torch.cat([start, rows, end], dim=1), pad(pad(where, (0, 1)).flatten(1), (2, 2))

    def to_pixels(self, tokens: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) of tokens (B, h, w), in float32."""
        return decode_vqvae(in_float32(self.vqvae), tokens).clamp(0, 1)

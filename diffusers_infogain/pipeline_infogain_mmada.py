"""Text to image with MMaDA, decoded by `InfoGainScheduler`."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .checkpoints.errors import one_sentence
from .checkpoints.published import PublishedPipeline
from .checkpoints.repository import HubArguments, Repository, local_folder
from .checkpoints.saved import load_tokenizer
from .checks import check_integer
from .files import read_json
from .image_pipeline_magvit import VQ_REPOSITORY, MagvitImagePipeline, open_image_tokenizer
from .models.llada import BidirectionalLlama, open_llada
from .models.magvit_v2 import MagvitV2Model
from .scheduling_infogain import InfoGainScheduler

DEFAULT_CODEBOOK_SIZE = 8192


class InfoGainMMaDAPipeline(MagvitImagePipeline):
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
            place = HubArguments(**{**hub, "revision": vqvae_revision})
            models["vqvae"], codebook_size = open_image_tokenizer(vqvae, place, config, folder / "config.json")
        with one_sentence(f"{folder / 'config.json'}: `codebook_size`"):
            scheduler = InfoGainScheduler(mask_token_id=codebook_size)
        components = {"tokenizer": load_tokenizer(PreTrainedTokenizerFast, folder), "scheduler": scheduler}
        return PublishedPipeline(cls, models, components)

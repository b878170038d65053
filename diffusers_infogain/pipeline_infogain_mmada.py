"""Text to image with MMaDA, decoded by `InfoGainScheduler`."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import logging
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .callbacks import StepCallback
from .candidates import Generators
from .checkpoints.errors import one_sentence
from .checkpoints.published import CheckedPipeline, PublishedPipeline
from .checkpoints.repository import HubArguments, Repository, local_folder
from .checkpoints.saved import load_tokenizer
from .checks import check_integer, prompt_list, shown
from .components import ImagePipeline, check_components, check_given, in_float32, tokenize
from .files import read_json
from .image_generation import (
    CALLBACK_TENSOR_INPUTS,
    ImageGeneration,
    InfoGainPipelineOutput,
    as_infogain_scheduler,
    check_prompts,
    repeat_prompts,
)
from .models.llada import BidirectionalLlama, check_image_tokens, open_llada, pad_prompts, predict_after_prompts
from .models.magvit_v2 import MagvitV2Model, open_magvit_v2
from .scheduling_infogain import InfoGainScheduler

logger = logging.get_logger("diffusers." + __name__)

VQ_REPOSITORY = "showlab/magvitv2"
"""Where MMaDA's image tokenizer is published."""

DEFAULT_CODEBOOK_SIZE = 8192
DEFAULT_NUM_INFERENCE_STEPS = 15


class InfoGainMMaDAPipeline(ImagePipeline, CheckedPipeline):
    r"""Text-to-image generation with MMaDA (arXiv 2505.15809), decoded by information gain or any rule it is compared with.

    `from_pretrained` loads the published repositories as they are (`Gen-Verse/MMaDA-8B-MixCoT`), or a folder that
    `save_pretrained` or `diffusers-infogain convert` wrote.

    A sequence is `[task] [bos] prompt [eos] [image start] image tokens [image end]`; image code c is the token
    `image_token_offset + c`. `scheduler` sees the image tokens alone, as codes, with the codebook's size as mask id.

    Args:
        vqvae: Turns tokens into pixels.
        tokenizer: Of the prompts.
        transformer: Predicts the tokens.
        scheduler: Decides which tokens to decode next, and with what.
        image_token_offset: Id of image code 0; by default the tokenizer's length.
        task_token_id, image_start_token_id, image_end_token_id, pad_token_id: Of the layout; MMaDA's by default.
        max_prompt_length: Ids of task, prompt, bos and eos together, at most; longer prompts are cut, as MMaDA does.
        sample_size: Image tokens along a side, by default.
        default_guidance_scale: `guidance_scale` of calls that give none; 3.5 by default.

    Raises:
        ValueError: If `scheduler` is neither an `InfoGainScheduler` nor an `AmusedScheduler`, or if the image tokens do not fit
            into the transformer's vocabulary.
    """

    families = ("MMaDA",)
    repository_options = ("vqvae", "vqvae_revision")
    model_cpu_offload_seq = "transformer->vqvae"
    _callback_tensor_inputs = CALLBACK_TENSOR_INPUTS
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
        check_given({"vqvae": vqvae, "tokenizer": tokenizer, "transformer": transformer})
        integers = {
            "task_token_id": task_token_id,
            "image_start_token_id": image_start_token_id,
            "image_end_token_id": image_end_token_id,
            "pad_token_id": pad_token_id,
            "max_prompt_length": max_prompt_length,
            "sample_size": sample_size,
        }
        for name, value in integers.items():
            check_integer(name, value, 0)
        check_integer("image_token_offset", image_token_offset, 0, optional=True)
        self.keep_default_guidance_scale(default_guidance_scale)
        self.register_modules(
            vqvae=vqvae, tokenizer=tokenizer, transformer=transformer, scheduler=as_infogain_scheduler(scheduler)
        )
        if image_token_offset is None and tokenizer is not None:
            image_token_offset = len(tokenizer)
        if image_token_offset is not None and vqvae is not None and transformer is not None:
            check_image_tokens(image_token_offset, self.codebook_size, transformer.config.vocab_size)
        self.register_to_config(
            image_token_offset=image_token_offset,
            task_token_id=task_token_id,
            image_start_token_id=image_start_token_id,
            image_end_token_id=image_end_token_id,
            pad_token_id=pad_token_id,
            max_prompt_length=max_prompt_length,
            sample_size=sample_size,
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def image_token_offset(self) -> int:
        """Id of image code 0."""
        offset = self.config.image_token_offset
        return len(self.tokenizer) if offset is None else offset

    @property
    def codebook_size(self) -> int:
        """Number of image codes; without a `vqvae`, by the mask id of the scheduler, which follows them."""
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

    def predict(
        self, tokens: torch.Tensor, prompt_ids: torch.Tensor, prompt_mask: torch.Tensor, where: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits of the image codes, without guidance.

        No tensor with a column for every word of the vocabulary is made.

        Args:
            tokens: (R, L) long, codes, or the scheduler's mask id.
            prompt_ids, prompt_mask: (R, P) each, from `encode_prompt`.
            where: (R, L) bool, the positions whose logits are wanted; by default the masked ones.

        Returns:
            (M, V) for the M positions of `where`, in row-major order.
        """
        config = self.config
        masked = tokens == self.scheduler.config.mask_token_id
        where = masked if where is None else where
        image = torch.where(masked, self.transformer.config.mask_token_id, tokens + self.image_token_offset)
        one = torch.ones_like(tokens[:, :1])
        return predict_after_prompts(
            self.transformer,
            prompt_ids,
            prompt_mask,
            torch.cat([config.image_start_token_id * one, image, config.image_end_token_id * one], dim=1),
            torch.nn.functional.pad(where, (1, 1)),
            (self.image_token_offset, self.image_token_offset + self.codebook_size),
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_schedule: str = "constant",
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        lookahead_batch_size: int | None = None,
        num_beams: int = 1,
        num_runs: int = 1,
    ) -> InfoGainPipelineOutput | tuple[Any, ...]:
        r"""Generates images.

        Args:
            prompt: The prompt or prompts.
            height, width: In pixels, multiples of 16; by default 512, which MMaDA was trained on, or what `latents` have.
            num_inference_steps: By default 15, or, if the scheduler's `tokens_per_step` is set, as many as that takes.
            guidance_scale: g of classifier-free guidance in MMaDA's form, logits = (1 + g) · cond - g · uncond; 0 or less
                switches it off.
                By default `default_guidance_scale`.
            guidance_schedule: How guidance grows with the share of the image that is decoded: "constant" (full from the start),
                "linear" or "cosine".
            negative_prompt: What to steer away from, in place of the empty prompt; one for all prompts or one each. Ignored
                without guidance.
            num_images_per_prompt, generator, latents, output_type, return_dict: As in `InfoGainPipeline`.
            callback_on_step_end, callback_on_step_end_tensor_inputs: As in `InfoGainPipeline`; "logits" are 0 at known tokens.
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
        num_prompts = check_prompts(prompt, negative_prompt)
        generation = ImageGeneration(
            pipe=self,
            codebook_size=self.codebook_size,
            vocab_size=self.transformer.config.vocab_size,
            scale_factor=self.vae_scale_factor,
            unit=self.vae_scale_factor,
            default_size=self.config.sample_size,
            default_num_inference_steps=DEFAULT_NUM_INFERENCE_STEPS,
            num_prompts=num_prompts,
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
            guidance_offset=1,
        )
        prompt_ids, prompt_mask = self.encode_prompt(repeat_prompts(prompt, num_prompts, num_images_per_prompt))
        longest, negative = prompt_ids.shape[1], None
        if generation.guided:
            negative = self.encode_prompt(repeat_prompts(negative_prompt or "", num_prompts, num_images_per_prompt))
            longest = max(longest, negative[0].shape[1])
        length = longest + generation.grid[0] * generation.grid[1] + 2
        generation.check_sequence_length(length, self.transformer.config.max_position_embeddings)

        def denoise(tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            guided = generation.guided
            cond = self.predict(tokens, prompt_ids[rows], prompt_mask[rows])
            if negative is None or not guided:
                return cond
            # One after the other: the prompts' lengths differ, and neither branch then needs the other's padding.
            uncond = self.predict(tokens, negative[0][rows], negative[1][rows])
            return generation.guide(cond, uncond, tokens)

        def to_pixels(tokens: torch.Tensor) -> torch.Tensor:
            return in_float32(self.vqvae).decode(tokens)

        return generation.run(denoise, to_pixels)

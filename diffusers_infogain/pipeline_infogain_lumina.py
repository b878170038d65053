"""Text to image with Lumina-DiMOO, decoded by `InfoGainScheduler`."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from diffusers import VQModel
from diffusers.image_processor import VaeImageProcessor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .callbacks import StepCallback
from .candidates import Generators
from .checkpoints.published import CheckedPipeline, PublishedPipeline
from .checkpoints.repository import HubArguments, Repository, local_folder
from .checkpoints.saved import load_tokenizer
from .checkpoints.source import ModelSource
from .checkpoints.stock import decode_vqvae, open_vqvae
from .checks import check_integer, is_integer, prompt_list, shown
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
from .scheduling_infogain import InfoGainScheduler

PROMPT_TEMPLATE = "<system>Generate an image according to the text prompt.</system><user>{}</user>"
UNCONDITION = "<uncondition>"
"""Stands in the place of a prompt where there is none."""

DEFAULT_NUM_INFERENCE_STEPS = 64


class InfoGainLuminaPipeline(ImagePipeline, CheckedPipeline):
    r"""Text-to-image generation with Lumina-DiMOO (arXiv 2510.06308), decoded by information gain or rules it is compared with.

    `from_pretrained` loads the published repository as it is (`Alpha-VLLM/Lumina-DiMOO`), or a folder that `save_pretrained` or
    `diffusers-infogain convert` wrote.

    A sequence is `prompt [answer start] [image start] rows [image end] [answer end]`, with the prompt in `PROMPT_TEMPLATE`. Each
    row of image tokens ends with a newline token, which is given and never decoded; image code c is the token
    `image_token_offset + c`. `scheduler` sees the image tokens alone, as codes, with the codebook's size as mask id.

    Args:
        vqvae: Turns tokens into pixels.
        tokenizer: Of the prompts.
        transformer: Predicts the tokens.
        scheduler: Decides which tokens to decode next, and with what.
        image_token_offset: Id of image code 0.
        newline_token_id, image_start_token_id, image_end_token_id, answer_start_token_id, answer_end_token_id: Of the layout;
            Lumina-DiMOO's by default.
        max_sequence_length: Tokens of prompt and image together, at most; by default as many as its published training takes.
        sample_size: Image tokens along a side, by default.
        default_guidance_scale: `guidance_scale` of calls that give none; 4.0 by default.

    Raises:
        ValueError: If `scheduler` is neither an `InfoGainScheduler` nor an `AmusedScheduler`, or if the image tokens do not fit
            into the transformer's vocabulary.
    """

    families = ("Lumina-DiMOO",)
    model_cpu_offload_seq = "transformer->vqvae"
    _callback_tensor_inputs = CALLBACK_TENSOR_INPUTS
    family_guidance_scale = 4.0

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
        check_given({"vqvae": vqvae, "tokenizer": tokenizer, "transformer": transformer})
        integers = {
            "image_token_offset": image_token_offset,
            "newline_token_id": newline_token_id,
            "image_start_token_id": image_start_token_id,
            "image_end_token_id": image_end_token_id,
            "answer_start_token_id": answer_start_token_id,
            "answer_end_token_id": answer_end_token_id,
            "max_sequence_length": max_sequence_length,
            "sample_size": sample_size,
        }
        for name, value in integers.items():
            check_integer(name, value, 0)
        self.keep_default_guidance_scale(default_guidance_scale)
        self.register_modules(
            vqvae=vqvae, tokenizer=tokenizer, transformer=transformer, scheduler=as_infogain_scheduler(scheduler)
        )
        if vqvae is not None and transformer is not None:
            check_image_tokens(image_token_offset, self.codebook_size, transformer.config.vocab_size)
        self.register_to_config(
            image_token_offset=image_token_offset,
            newline_token_id=newline_token_id,
            image_start_token_id=image_start_token_id,
            image_end_token_id=image_end_token_id,
            answer_start_token_id=answer_start_token_id,
            answer_end_token_id=answer_end_token_id,
            max_sequence_length=max_sequence_length,
            sample_size=sample_size,
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor, do_normalize=False)

    @property
    def codebook_size(self) -> int:
        """Number of image codes; without a `vqvae`, by the mask id of the scheduler, which follows them."""
        return self.scheduler.config.mask_token_id if self.vqvae is None else self.vqvae.config.num_vq_embeddings

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

    def predict(
        self, tokens: torch.Tensor, prompt_ids: torch.Tensor, prompt_mask: torch.Tensor, where: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits of the image codes, without guidance.

        No tensor with a column for every word of the vocabulary is made.

        Args:
            tokens: (R, h, w) long, codes, or the scheduler's mask id.
            prompt_ids, prompt_mask: (R, P) each, from `encode_prompt`.
            where: (R, h, w) bool, the positions whose logits are wanted; by default the masked ones.

        Returns:
            (M, V) for the M positions of `where`, in row-major order.
        """
        config = self.config
        masked = tokens == self.scheduler.config.mask_token_id
        where = masked if where is None else where
        image = torch.where(masked, self.transformer.config.mask_token_id, tokens + config.image_token_offset)
        pad = torch.nn.functional.pad
        start = tokens.new_tensor([config.answer_start_token_id, config.image_start_token_id]).expand(len(tokens), -1)
        end = tokens.new_tensor([config.image_end_token_id, config.answer_end_token_id]).expand(len(tokens), -1)
        return predict_after_prompts(
            self.transformer,
            prompt_ids,
            prompt_mask,
            torch.cat([start, pad(image, (0, 1), value=config.newline_token_id).flatten(1), end], dim=1),
            pad(pad(where, (0, 1)).flatten(1), (2, 2)),
            (config.image_token_offset, config.image_token_offset + self.codebook_size),
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
            height, width: In pixels, multiples of 16; by default 1024, or what `latents` have. Its authors also show 1536 x 768,
                and prepare images for training in multiples of 32, up to four times as long as wide.
            num_inference_steps: By default 64, or, if the scheduler's `tokens_per_step` is set, as many as that takes.
            guidance_scale: g of classifier-free guidance in Lumina-DiMOO's form, logits = (1 + g) · cond - g · uncond; 0 or less
                switches it off.
                By default `default_guidance_scale`.
            guidance_schedule: How guidance grows with the share of the image that is decoded: "constant" (full from the start),
                "linear" or "cosine".
            negative_prompt: What to steer away from, in place of `UNCONDITION`, which also stands for an empty text; one for all
                prompts or one each. Ignored without guidance. The model was trained with `UNCONDITION` alone.
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
            texts = repeat_prompts(negative_prompt or UNCONDITION, num_prompts, num_images_per_prompt)
            negative = self.encode_prompt([text or UNCONDITION for text in texts])
            longest = max(longest, negative[0].shape[1])
        h, w = generation.grid
        generation.check_sequence_length(longest + h * (w + 1) + 4, self.config.max_sequence_length)

        def denoise(tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            image = tokens.unflatten(1, generation.grid)
            guided = generation.guided
            cond = self.predict(image, prompt_ids[rows], prompt_mask[rows])
            if negative is None or not guided:
                return cond
            # One after the other: the prompts' lengths differ, and neither branch then needs the other's padding.
            uncond = self.predict(image, negative[0][rows], negative[1][rows])
            return generation.guide(cond, uncond, tokens)

        def to_pixels(tokens: torch.Tensor) -> torch.Tensor:
            return decode_vqvae(in_float32(self.vqvae), tokens).clamp(0, 1)

        return generation.run(denoise, to_pixels)

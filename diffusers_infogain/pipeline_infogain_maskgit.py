"""ImageNet classes to images with Halton-MaskGIT's models, decoded by `InfoGainScheduler`."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import VQModel
from diffusers.image_processor import VaeImageProcessor

from .callbacks import StepCallback
from .candidates import Generators
from .checkpoints import llamagen_vq
from .checkpoints.llamagen_vq import open_llamagen_vq
from .checkpoints.published import CheckedPipeline, PublishedPipeline
from .checkpoints.repository import HubArguments, Repository, local_folder
from .checkpoints.stock import decode_vqvae
from .checks import check_list
from .components import ImagePipeline, check_components, check_given, in_float32
from .image_generation import (
    CALLBACK_TENSOR_INPUTS,
    ImageGeneration,
    InfoGainPipelineOutput,
    as_infogain_scheduler,
)
from .models.imagenet import imagenet_class_ids
from .models.maskgit_transformer import MaskGITTransformer2DModel, open_maskgit
from .scheduling_infogain import InfoGainScheduler

REPOSITORY = "llvictorll/Halton-MaskGIT"
"""Where the transformers are published, as files of several sizes."""

VQ_REPOSITORY = "FoundationVision/LlamaGen"
"""Where their image tokenizer is published."""

DEFAULT_VARIANT = "384_large"
DEFAULT_NUM_INFERENCE_STEPS = 32


class InfoGainMaskGITPipeline(ImagePipeline, CheckedPipeline):
    r"""Class-to-image generation on ImageNet with MaskGIT, decoded by information gain or any rule it is compared with.

    The models are those of "Halton Scheduler for Masked Generative Image Transformer" (arXiv 2503.17076); its own sampler is
    `InfoGainScheduler.from_config(pipe.scheduler.config, **PRESETS["maskgit_halton"])`.

    Args:
        vqvae: Turns tokens into pixels: LlamaGen's VQ-16.
        transformer: Predicts the tokens.
        scheduler: Decides which tokens to decode next, and with what.
        default_guidance_scale: `guidance_scale` of calls that give none; 0.5 by default.

    Raises:
        ValueError: If `scheduler` is neither an `InfoGainScheduler` nor an `AmusedScheduler`, or if `vqvae` has another codebook
            than `transformer`.
    """

    families = ("MaskGIT (Halton)",)
    repository_options = ("variant", "vqvae", "vqvae_revision")
    model_cpu_offload_seq = "transformer->vqvae"
    _callback_tensor_inputs = CALLBACK_TENSOR_INPUTS
    family_guidance_scale = 0.5

    vqvae: VQModel
    transformer: MaskGITTransformer2DModel
    scheduler: InfoGainScheduler

    def __init__(
        self,
        vqvae: VQModel | None,
        transformer: MaskGITTransformer2DModel | None,
        scheduler: InfoGainScheduler | None,
        default_guidance_scale: float | None = None,
    ):
        super().__init__()
        check_given({"vqvae": vqvae, "transformer": transformer})
        self.keep_default_guidance_scale(default_guidance_scale)
        if vqvae is not None and transformer is not None:
            codes, codebook_size = vqvae.config.num_vq_embeddings, transformer.config.codebook_size
            if codes != codebook_size:
                raise ValueError(f"`vqvae` must have the {codebook_size} codes of `transformer`, got {codes}.")
        self.register_modules(vqvae=vqvae, transformer=transformer, scheduler=as_infogain_scheduler(scheduler))
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str] = REPOSITORY, **kwargs: Any) -> Any:
        """As in `CheckedPipeline`, also from a published .pth file; by default from the published Hub repository."""
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def is_published(cls, repository: Repository) -> bool:
        """Whether this is a file or a folder of Halton-MaskGIT's, or their Hub repository."""
        path = repository.path
        return repository.name == REPOSITORY or (path.is_file() and path.suffix == ".pth") or any(path.glob("ImageNet_*.pth"))

    @classmethod
    def open_published(
        cls,
        repository: str | os.PathLike[str],
        *,
        variant: str | None = None,
        vqvae: str | os.PathLike[str] | None = None,
        vqvae_revision: str | None = None,
        without: Collection[str] = (),
        **hub: Any,
    ) -> PublishedPipeline:
        """The published weights, opened to be loaded or converted.

        Args:
            repository: Folder, Hub id or .pth file of the transformer.
            variant: Of a folder or Hub repository: "256_tiny", "256_small", "256_base", "384_small", "384_base" or "384_large",
                the default.
            vqvae: File, folder or Hub id of the image tokenizer, vq_ds16_c2i.pt; by default the one beside the transformer, or
                LlamaGen's repository.
            vqvae_revision: Of its Hub repository.
            without: Models that are not opened, since others take their place or none is wanted.
            hub: `revision`, `cache_dir`, `token` and `local_files_only`, as in `huggingface_hub.snapshot_download`.

        Raises:
            ValueError: If a file is not there, or is of another family.
        """
        file = Path(repository)
        if not file.is_file():
            name = f"ImageNet_{variant or DEFAULT_VARIANT}.pth"
            folder = local_folder(repository, [name], HubArguments(**hub))
            file = folder / name
            if not file.is_file():
                there = ", ".join(sorted(path.stem.removeprefix("ImageNet_") for path in folder.glob("ImageNet_*.pth")))
                raise ValueError(f"`variant` {variant or DEFAULT_VARIANT!r}: {folder} has no {name}, but {there or 'none'}.")
        elif variant is not None:
            raise ValueError(f"`variant` must not be given with a file, got {variant!r} with {file.name}.")
        models = {"transformer": open_maskgit(file)}
        mask_token_id = models["transformer"].skeleton.config.codebook_size
        if "vqvae" not in without:
            vq_file = file.parent / llamagen_vq.WEIGHT_NAME if vqvae is None else Path(vqvae)
            if not vq_file.is_file():
                place = VQ_REPOSITORY if vqvae is None else vqvae
                folder = local_folder(place, [llamagen_vq.WEIGHT_NAME], HubArguments(**{**hub, "revision": vqvae_revision}))
                vq_file = folder / llamagen_vq.WEIGHT_NAME
            models["vqvae"] = open_llamagen_vq(vq_file)
        return PublishedPipeline(cls, models, {"scheduler": InfoGainScheduler(mask_token_id=mask_token_id)})

    @torch.no_grad()
    def __call__(
        self,
        class_labels: str | int | list[str | int],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_schedule: str = "constant",
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
            class_labels: ImageNet classes, by id (207 or "207") or by name ("golden retriever").
            height, width: In pixels: the model's own size (256 or 384), the only one that it can do.
            num_inference_steps: By default 32, or, if the scheduler's `tokens_per_step` is set, as many as that takes.
            guidance_scale: w of classifier-free guidance in MaskGIT's form, logits = (1 + w) · cond - w · uncond; 0 or less
                switches it off. Published for the Halton sampler: 1.5 for tiny, 1.0 for small, 0.7 for base, 0.5 for large.
                By default `default_guidance_scale`.
            guidance_schedule: How guidance grows with the share of the image that is decoded: "constant" (full from the start),
                "linear" or "cosine".
            num_images_per_prompt: The images of a class follow each other in the output.
            generator, latents, output_type, return_dict: As in `InfoGainPipeline`.
            callback_on_step_end, callback_on_step_end_tensor_inputs: As in `InfoGainPipeline`; "logits" are 0 at known tokens.
            lookahead_batch_size, num_beams, num_runs: As in `InfoGainPipeline`.

        Returns:
            `InfoGainPipelineOutput`, or (images, trace).

        Raises:
            ValueError: For a class that does not exist (naming the nearest), or other arguments that do not fit.
        """
        guidance_scale = self.default_guidance_scale if guidance_scale is None else guidance_scale
        if not isinstance(class_labels, (str, int)):
            check_list("class_labels", class_labels, (str, int), "a class or a list of classes that is not empty")
        labels = imagenet_class_ids(class_labels)
        check_components(
            self, "transformer", "scheduler", *(() if isinstance(output_type, str) and output_type == "latent" else ("vqvae",))
        )
        config = self.transformer.config
        generation = ImageGeneration(
            pipe=self,
            codebook_size=config.codebook_size,
            vocab_size=config.vocab_size,
            scale_factor=self.vae_scale_factor,
            unit=self.vae_scale_factor,
            default_size=config.sample_size,
            default_num_inference_steps=DEFAULT_NUM_INFERENCE_STEPS,
            num_prompts=len(labels),
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
            asked={"class_labels": labels},
            guidance_offset=1,
        )
        if generation.grid != (config.sample_size, config.sample_size):
            side = config.sample_size * self.vae_scale_factor
            raise ValueError(
                f"`height` and `width` must be {side}, the only size of this model, got {generation.height} and "
                f"{generation.width}."
            )
        device = self._execution_device
        classes = torch.tensor(labels, device=device).repeat_interleave(num_images_per_prompt)
        no_class = torch.full_like(classes, config.num_classes)
        mask_token_id, model_mask_id = generation.mask_token_id, config.vocab_size - 1

        def denoise(tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            where = tokens == mask_token_id
            inputs = tokens.masked_fill(where, model_mask_id)
            if not generation.guided:
                return self.transformer(inputs, classes[rows], where)
            both = torch.cat([classes[rows], no_class[rows]])
            cond, uncond = self.transformer(torch.cat([inputs, inputs]), both, torch.cat([where, where])).chunk(2)
            return generation.guide(cond, uncond, tokens)

        def to_pixels(tokens: torch.Tensor) -> torch.Tensor:
            return decode_vqvae(in_float32(self.vqvae, self.vqvae.config.force_upcast), tokens).clamp(-1, 1)

        return generation.run(denoise, to_pixels)

"""ImageNet classes to images with Halton-MaskGIT's models, decoded by `InfoGainScheduler`."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from diffusers import VQModel

from .callbacks import StepCallback
from .candidates import Generators
from .checkpoints import llamagen_vq
from .checkpoints.llamagen_vq import open_llamagen_vq
from .checkpoints.published import PublishedPipeline
from .checkpoints.repository import HubArguments, Repository, local_folder
from .checks import check_list
from .editing import ImageInput
from .files import local_path
from .image_call import Canvas, Condition, ImageCall
from .image_output import InfoGainPipelineOutput
from .image_pipeline import InfoGainImagePipeline
from .models.imagenet import imagenet_class_ids
from .models.maskgit_transformer import MaskGITTransformer2DModel, open_maskgit
from .scheduling_infogain import InfoGainScheduler
from .trace import DecodingTrace

REPOSITORY = "llvictorll/Halton-MaskGIT"
"""Where the transformers are published, as files of several sizes."""

VQ_REPOSITORY = "FoundationVision/LlamaGen"
"""Where their image tokenizer is published."""

DEFAULT_VARIANT = "384_large"


class InfoGainMaskGITPipeline(InfoGainImagePipeline):
    r"""Class-to-image generation on ImageNet with MaskGIT, decoded by information gain or any rule it is compared with.

    The models are those of "Halton Scheduler for Masked Generative Image Transformer" (arXiv 2503.17076); its own sampler is
    `InfoGainScheduler.from_config(pipe.scheduler.config, **PRESETS["maskgit_halton"])`.

    Calls take 32 steps by default. A model generates images of one size only, 256 x 256 or 384 x 384 pixels. Guidance is
    logits = (1 + w) · cond - w · uncond, with w = 0.5 by default; 0 or less switches it off. Published for the Halton sampler are
    1.5 for tiny, 1.0 for small, 0.7 for base and 0.5 for large models.

    Args:
        vqvae: Decodes tokens into pixels: LlamaGen's VQ-16.
        transformer: Predicts the tokens.
        scheduler: Chooses the tokens to decode in each step, and their values.
        default_guidance_scale: `guidance_scale` of calls that give none; by default 0.5.

    Raises:
        ValueError: If `scheduler` is neither an `InfoGainScheduler` nor an `AmusedScheduler`, or if `vqvae` has another codebook
            than `transformer`.
    """

    families = ("MaskGIT (Halton)",)
    repository_options = ("variant", "vqvae", "vqvae_revision")
    model_cpu_offload_seq = "transformer->vqvae"
    default_num_inference_steps = 32
    family_guidance_scale = 0.5
    guidance_offset = 1
    pixel_range = (-1, 1)
    recorded_inputs = ("class_labels",)

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
        self.register_family(scheduler, default_guidance_scale, vqvae=vqvae, transformer=transformer)
        if vqvae is not None and transformer is not None:
            codes, codebook_size = vqvae.config.num_vq_embeddings, transformer.config.codebook_size
            if codes != codebook_size:
                raise ValueError(f"`vqvae` must have the {codebook_size} codes of `transformer`, got {codes}.")

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
        file = local_path(repository)
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
            vq_file = file.parent / llamagen_vq.WEIGHT_NAME if vqvae is None else local_path(vqvae)
            if not vq_file.is_file():
                place = VQ_REPOSITORY if vqvae is None else vqvae
                folder = local_folder(place, [llamagen_vq.WEIGHT_NAME], HubArguments(**{**hub, "revision": vqvae_revision}))
                vq_file = folder / llamagen_vq.WEIGHT_NAME
            models["vqvae"] = open_llamagen_vq(vq_file)
        return PublishedPipeline(cls, models, {"scheduler": InfoGainScheduler(mask_token_id=mask_token_id)})

    def canvas(self) -> Canvas:
        """The image tokens of the model."""
        config = self.transformer.config
        return Canvas(config.codebook_size, config.vocab_size, config.sample_size, only_side=True)

    def check_inputs(self, class_labels: list[int]) -> int:  # type: ignore[override]
        """The number of classes."""
        return len(class_labels)

    def encode(self, call: ImageCall, class_labels: list[int]) -> tuple[Condition, Condition]:
        """The ids of the classes, and that of no class."""
        class_ids = torch.tensor(call.per_image(class_labels), device=self._execution_device)
        return {"class_ids": class_ids}, {"class_ids": torch.full_like(class_ids, self.transformer.config.num_classes)}

    def predict(self, tokens: torch.Tensor, class_ids: torch.Tensor, call: ImageCall) -> torch.Tensor:
        """Logits (M, V) of tokens (R, h, w) where the call wants them, without guidance."""
        sequence = tokens.flatten(1)
        masks = sequence == call.mask_token_id
        sequence = sequence.masked_fill(masks, self.transformer.config.vocab_size - 1)
        return self.transformer(sequence, class_ids, call.wanted(tokens).flatten(1))

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        class_labels: str | int | list[str | int],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_schedule: str | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guided_lookahead: bool = True,
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
        image: ImageInput | None = None,
        mask_image: ImageInput | None = None,
        strength: float | None = None,
        outpaint: Mapping[str, int] | None = None,
        mask_coverage: float = 0.0,
        mask_blur: float = 0.0,
        approximate_cache: str | None = None,
    ) -> InfoGainPipelineOutput | tuple[Any, DecodingTrace]:
        r"""Generates images.

        Args:
            class_labels: ImageNet classes, by id (207 or "207") or by name ("golden retriever").
            height, width: In pixels: the model's own size, which is the only one.
            num_images_per_prompt: The images of a class follow each other in the output.

        Returns:
            `InfoGainPipelineOutput`, or (images, trace).

        Raises:
            ValueError: For a class that does not exist (naming the nearest), or for the first other argument that does not fit.
        """
        if not isinstance(class_labels, (str, int)):
            check_list("class_labels", class_labels, (str, int), "a class or a non-empty list of classes")
        return self.run_call({**locals(), "class_labels": imagenet_class_ids(class_labels)})

"""ImageNet classes to images with TiTok's models, decoded by `InfoGainScheduler`."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .callbacks import StepCallback
from .candidates import Generators
from .checkpoints.published import PublishedPipeline
from .checkpoints.repository import CONFIG, HubArguments, Repository, local_folder
from .checkpoints.weights import Checkpoint, find_weights
from .checks import check_list, shown
from .editing import ImageInput
from .files import local_path, read_json
from .image_call import Condition, ImageCall
from .image_output import InfoGainPipelineOutput
from .image_pipeline_line import LineImagePipeline
from .models.imagenet import imagenet_class_ids
from .models.titok_published import (
    GENERATORS,
    GUIDANCE,
    TOKENIZERS,
    VARIANTS,
    WEIGHT_NAMES,
    open_tokenizer,
    open_transformer,
    section,
)
from .models.titok_tokenizer import TiTokTokenizer
from .models.titok_transformer import TiTokBertTransformer, TiTokUViTTransformer
from .scheduling_infogain import InfoGainScheduler
from .trace import DecodingTrace

REPOSITORY = "yucornetto/generator_titok_l32_imagenet"
"""Where the first of the generators is published."""

PICKLES_REPOSITORY = "fun-research/TiTok"
"""Where all of them are, as pickles without a config."""

DEFAULT_VARIANT = "l32"

_PICKLE = re.compile(r"(?:generator|tokenizer)_titok_(\w+)\.bin")


class InfoGainTiTokPipeline(LineImagePipeline):
    r"""Class-to-image generation on ImageNet with TiTok (arXiv 2406.07550), decoded by information gain or any other rule.

    An image of 256 x 256 pixels is a line of 32, 64 or 128 tokens, none of which has a place in it. TiTok's own sampler is
    `InfoGainScheduler.from_config(pipe.scheduler.config, **PRESETS["titok_l32"])`, or "titok_b64" or "titok_s128".

    Guidance is logits = (1 + w) · cond - w · uncond; 0 or less switches it off. By default it grows with the steps, as published:
    to 4.5 for L-32 and 3 for B-64 ("titok_linear"), to 5.9 for S-128 ("titok_power_cosine", whose published 6.9 counts from 1).
    Calls take 8 steps by default, 64 with S-128.

    Args:
        vqvae: Decodes tokens into pixels.
        transformer: Predicts the tokens.
        scheduler: Chooses the tokens to decode in each step, and their values.
        default_guidance_scale, default_guidance_schedule, default_num_inference_steps: Of calls that give none; by default
            4.5, "titok_linear" and 8.

    Raises:
        ValueError: If `scheduler` is neither an `InfoGainScheduler` nor an `AmusedScheduler`, or if `vqvae` has other codes than
            `transformer`.
    """

    families = ("TiTok",)
    repository_options = ("variant", "vqvae", "vqvae_revision")
    model_cpu_offload_seq = "transformer->vqvae"
    family_num_inference_steps = 8
    family_guidance_scale = 4.5
    family_guidance_schedule = "titok_linear"
    guidance_offset = 1
    recorded_inputs = ("class_labels",)

    vqvae: TiTokTokenizer
    transformer: TiTokBertTransformer | TiTokUViTTransformer
    scheduler: InfoGainScheduler

    def __init__(
        self,
        vqvae: TiTokTokenizer | None,
        transformer: TiTokBertTransformer | TiTokUViTTransformer | None,
        scheduler: InfoGainScheduler | None,
        default_guidance_scale: float | None = None,
        default_guidance_schedule: str | None = None,
        default_num_inference_steps: int | None = None,
    ):
        super().__init__()
        self.register_family(scheduler, default_guidance_scale, vqvae=vqvae, transformer=transformer)
        self.register_defaults(default_guidance_schedule, default_num_inference_steps)
        self.check_codes(vqvae, transformer)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str] = REPOSITORY, **kwargs: Any) -> Any:
        """As in `CheckedPipeline`, also from a published .bin file; by default from the published Hub repository of L-32."""
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def is_published(cls, repository: Repository) -> bool:
        """Whether this is a published file or a folder of them, their Hub repository, or one with a generator's config.json."""
        path = repository.path
        if repository.name == PICKLES_REPOSITORY or (path.is_file() and _PICKLE.fullmatch(path.name)):
            return True
        if path.is_dir() and any(path.glob("generator_titok_*.bin")):
            return True
        model = (repository.config or {}).get("model")
        generator = model.get("generator") if isinstance(model, Mapping) else None
        return isinstance(generator, Mapping) and generator.get("model_type") in GENERATORS

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
            repository: Folder, Hub id or .bin file of the generator.
            variant: Of a folder or Hub repository of .bin files: "l32", the default, "b64" or "s128".
            vqvae: File, folder or Hub id of the image tokenizer; by default the file beside the generator's, or its published
                repository.
            vqvae_revision: Of its Hub repository.
            without: Models that are not opened, since others take their place or none is wanted.
            hub: `revision`, `cache_dir`, `token` and `local_files_only`, as in `huggingface_hub.snapshot_download`.

        Raises:
            ValueError: If a file is not there, or is of another family.
        """
        weights, config, where = _open_generator(repository, variant, HubArguments(**hub))
        models = {} if "transformer" in without else {"transformer": open_transformer(weights, config, where)}
        if "vqvae" not in without:
            place = _tokenizer_place(weights.files[0], config, where) if vqvae is None else vqvae
            models["vqvae"] = _open_vqvae(place, config, HubArguments(**{**hub, "revision": vqvae_revision}))
        codebook_size = section(config, "model.vq_model", where).get("codebook_size")
        return PublishedPipeline(cls, models, {"scheduler": InfoGainScheduler(codebook_size), **_defaults(config, where)})

    def check_inputs(self, class_labels: list[int]) -> int:  # type: ignore[override]
        """The number of classes."""
        return len(class_labels)

    def encode(self, call: ImageCall, class_labels: list[int]) -> tuple[Condition, Condition]:
        """The ids of the classes, and that of no class."""
        class_ids = torch.tensor(call.per_image(class_labels), device=self._execution_device)
        return {"class_ids": class_ids}, {"class_ids": torch.full_like(class_ids, self.transformer.config.num_classes)}

    def predict(self, tokens: torch.Tensor, class_ids: torch.Tensor, call: ImageCall) -> torch.Tensor:
        """Logits (M, V) of tokens (R, 1, N) where the call wants them, without guidance."""
        return self.transformer(tokens.flatten(1), class_ids, call.wanted(tokens).flatten(1))

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
            latents: Token ids (B, 1, N), long, with the scheduler's `mask_token_id` where tokens are to be generated. Known
                tokens are kept.
            mask_image, outpaint: None: tokens have no place in the image, so only `image` with `strength` can be given.

        Returns:
            `InfoGainPipelineOutput`, or (images, trace).

        Raises:
            ValueError: For a class that does not exist (naming the nearest), or for the first other argument that does not fit.
        """
        if not isinstance(class_labels, (str, int)):
            check_list("class_labels", class_labels, (str, int), "a class or a non-empty list of classes")
        return self.run_call({**locals(), "class_labels": imagenet_class_ids(class_labels)})


def _open_generator(
    repository: str | os.PathLike[str], variant: str | None, hub: HubArguments
) -> tuple[Checkpoint, dict[str, Any], Path]:
    """The weights of the generator, the configuration, and the file that it is in, or that stands for it in errors."""
    file = local_path(repository)
    pickled = _PICKLE.fullmatch(file.name) if file.is_file() else None
    if pickled is not None:
        if variant is not None:
            raise ValueError(f"`variant` must not be given with a file, got {variant!r} with {file.name}.")
        return Checkpoint([file]), _variant(pickled[1], str(file)), file
    if repository == PICKLES_REPOSITORY or (file.is_dir() and any(file.glob("generator_titok_*.bin"))):
        variant = DEFAULT_VARIANT if variant is None else variant
        config, name = _variant(variant, "`variant`"), f"generator_titok_{variant}.bin"
        folder = local_folder(repository, [name, f"tokenizer_titok_{variant}.bin"], hub)
        if not (folder / name).is_file():
            there = ", ".join(sorted(path.name for path in folder.glob("generator_titok_*.bin")))
            raise ValueError(f"`variant` {variant!r}: {folder} has no {name}, but {there or 'none'}.")
        return Checkpoint([folder / name]), config, folder / name
    if variant is not None:
        raise ValueError(f"`variant` must be None for a repository with a {CONFIG}, got {variant!r}.")
    folder = local_folder(repository, [CONFIG, *WEIGHT_NAMES], hub)
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} has no {CONFIG}.")
    return find_weights(folder, WEIGHT_NAMES), read_json(folder / CONFIG), folder / CONFIG


def _variant(name: str, what: str) -> dict[str, Any]:
    if name not in VARIANTS:
        raise ValueError(f"{what} must be of a published generator, one of {', '.join(VARIANTS)}, got {shown(name)}.")
    return VARIANTS[name]


def _tokenizer_place(generator: Path, config: Mapping[str, Any], where: Path) -> Path | str:
    """The image tokenizer that belongs to a generator: the file beside it, or a Hub id."""
    beside = generator.with_name(generator.name.replace("generator_", "tokenizer_"))
    if beside != generator and beside.is_file():
        return beside
    vq = section(config, "model.vq_model", where)
    variant = TOKENIZERS.get((str(vq.get("vit_enc_model_size")), vq.get("num_latent_tokens", 0)))
    if variant is None:
        raise ValueError(f"`vqvae` must be given: no published image tokenizer is known for the generator of {where}.")
    return f"yucornetto/tokenizer_titok_{variant}_imagenet"


def _open_vqvae(place: str | os.PathLike[str], config: Mapping[str, Any], hub: HubArguments) -> Any:
    """The image tokenizer in a file, whose configuration is the generator's, or in a repository, which has its own."""
    file = local_path(place)
    if file.is_file():
        return open_tokenizer(Checkpoint([file]), config, file)
    folder = local_folder(place, [CONFIG, *WEIGHT_NAMES], hub)
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} has no {CONFIG}.")
    return open_tokenizer(find_weights(folder, WEIGHT_NAMES), read_json(folder / CONFIG), folder / CONFIG)


def _defaults(config: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """What the generator is sampled with, as the pipeline's arguments."""
    generator = section(config, "model.generator", where)
    decay, scale = generator.get("guidance_decay"), generator.get("guidance_scale")
    if decay is not None and decay not in GUIDANCE:
        raise ValueError(f"{where}: `guidance_decay` must be one of {', '.join(GUIDANCE)}, got {shown(decay)}.")
    if decay == "power-cosine" and isinstance(scale, (int, float)):
        scale = round(scale - 1, 6)  # it counts from 1, where guidance is off
    return {
        "default_guidance_scale": scale,
        "default_guidance_schedule": None if decay is None else GUIDANCE[decay],
        "default_num_inference_steps": generator.get("num_steps"),
    }

"""Text to image with Show-o, decoded by `InfoGainScheduler`."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .checkpoints.published import PublishedPipeline
from .checkpoints.repository import HubArguments, Repository, local_folder
from .checkpoints.saved import load_tokenizer
from .checkpoints.source import ModelSource
from .checks import check_choice, check_integer, check_list, check_number, prompt_list, shown
from .choices import MOST_BLUR, SIDES
from .components import check_components
from .editing import Edit, ImageInput, fit_image, read_images, seam
from .files import read_json
from .image_call import Canvas
from .image_pipeline_magvit import VQ_REPOSITORY, MagvitImagePipeline, open_image_tokenizer
from .models.magvit_v2 import MagvitV2Model
from .models.omni_phi import OmniPhi, check_layout, open_omni_phi, special_token_id
from .scheduling_infogain import InfoGainScheduler

PHI_REPOSITORY = "microsoft/phi-1_5"
"""The language model that Show-o began as; its tokenizer and its sizes are not in Show-o's repository."""


_EDGES = {"left": (2, True), "top": (1, True), "right": (2, False), "bottom": (1, False)}
"""The axis of tokens (B, h, w) along which an image grows at a side, and whether it grows before its first one."""

_OF_WINDOWS = (
    *("height", "width", "num_images_per_prompt", "latents", "return_dict"),
    *("mask_image", "strength", "outpaint", "mask_coverage"),
)
"""Arguments of a call that are not those of `extrapolate`."""

GUIDANCE_OF_SIDE = {16: 1.75}
"""The published guidance, by image tokens along a side, where it is not the family's."""


class InfoGainShowoPipeline(MagvitImagePipeline):
    r"""Text-to-image generation with Show-o (arXiv 2408.12528), decoded by information gain or any rule it is compared with.

    `from_pretrained` loads the published repositories as they are (`showlab/show-o`, `showlab/show-o-512x512`), or a folder that
    `save_pretrained` or `diffusers-infogain convert` wrote.

    A sequence is `[task] [bos] prompt [eos] [image start] image tokens [image end]`, in which text sees only the text before it,
    and the image sees everything; image code c is the token `image_token_offset + c`. `scheduler` sees only the image tokens, as
    codes, with the codebook's size as mask id.

    Calls take 50 steps by default. Images have 256 x 256 or 512 x 512 pixels, the size that the model was trained on: nothing in
    a sequence marks where a row ends, so no other makes sense to it. Guidance is logits = (1 + g) · cond - g · uncond, by default
    with the published g, 1.75 at 256 pixels and 5 at 512; 0 or less switches it off.

    Args:
        vqvae: Decodes tokens into pixels.
        tokenizer: Tokenizer of the prompts.
        transformer: Predicts the tokens.
        scheduler: Chooses the tokens to decode in each step, and their values.
        image_token_offset: Id of image code 0.
        task_token_id, image_start_token_id, image_end_token_id, pad_token_id: Special tokens of the layout; by default Show-o's.
        max_prompt_length: Maximal number of tokens of task, prompt, bos and eos together; longer prompts are cut, as in Show-o.
        sample_size: Image tokens along a side.
        default_guidance_scale: `guidance_scale` of calls that give none; by default 5.

    Raises:
        ValueError: If `scheduler` is neither an `InfoGainScheduler` nor an `AmusedScheduler`, if the image tokens do not fit into
            the transformer's vocabulary, or if it knows the start and the end of images by other ids.
    """

    families = ("Show-o",)
    repository_options = ("vqvae", "vqvae_revision", "language_model", "language_model_revision")
    default_num_inference_steps = 50
    family_guidance_scale = 5.0

    vqvae: MagvitV2Model
    tokenizer: PreTrainedTokenizerBase
    transformer: OmniPhi
    scheduler: InfoGainScheduler

    def __init__(
        self,
        vqvae: MagvitV2Model | None,
        tokenizer: PreTrainedTokenizerBase | None,
        transformer: OmniPhi | None,
        scheduler: InfoGainScheduler | None,
        image_token_offset: int = 50305,
        task_token_id: int = 50300,
        image_start_token_id: int = 50296,
        image_end_token_id: int = 50297,
        pad_token_id: int = 50295,
        max_prompt_length: int = 129,
        sample_size: int = 16,
        default_guidance_scale: float | None = None,
    ):
        super().__init__()
        check_integer("image_token_offset", image_token_offset, 0)
        self.register_family(scheduler, default_guidance_scale, vqvae=vqvae, tokenizer=tokenizer, transformer=transformer)
        layout = {"image_start_token_id": image_start_token_id, "image_end_token_id": image_end_token_id}
        for name, value in layout.items():
            known = value if transformer is None else getattr(transformer.config, name, None)
            if known != value:
                raise ValueError(f"`{name}` must be that of `transformer`, {shown(known)}, got {shown(value)}.")
        self.register_layout(
            image_token_offset,
            sample_size,
            task_token_id=task_token_id,
            pad_token_id=pad_token_id,
            max_prompt_length=max_prompt_length,
            **layout,
        )

    @classmethod
    def is_published(cls, repository: Repository) -> bool:
        """Whether its config.json is Show-o's."""
        return repository.config is not None and repository.config.get("_class_name") == "Showo"

    @classmethod
    def open_published(
        cls,
        repository: str | os.PathLike[str],
        *,
        vqvae: str | os.PathLike[str] = VQ_REPOSITORY,
        vqvae_revision: str | None = None,
        language_model: str | os.PathLike[str] | None = None,
        language_model_revision: str | None = None,
        without: Collection[str] = (),
        **hub: Any,
    ) -> PublishedPipeline:
        """The published repository, opened to be loaded or converted.

        Args:
            repository: Folder or Hub id of the language model.
            vqvae: Folder or Hub id of the image tokenizer, which Show-o publishes apart.
            vqvae_revision: Of its Hub repository.
            language_model: Folder or Hub id of the model that Show-o began as, whose tokenizer and config.json are read; by
                default `PHI_REPOSITORY`.
            language_model_revision: Of its Hub repository.
            without: Models that are not opened, since others take their place or none is wanted.
            hub: `revision`, `cache_dir`, `token` and `local_files_only`, as in `huggingface_hub.snapshot_download`.

        Raises:
            ValueError: For a repository of another family, or with another layout.
        """
        folder = local_folder(repository, ["*.json", "*.safetensors", "*.bin"], HubArguments(**hub))
        file = folder / "config.json"
        config = read_json(file)
        if config.get("_class_name") != "Showo":
            raise ValueError(f"{file}: `_class_name` must be 'Showo', got {shown(config.get('_class_name'))}.")
        check_layout(config, file)
        side = math.isqrt(config["num_vq_tokens"])
        if side**2 != config["num_vq_tokens"]:
            raise ValueError(f"{file}: `num_vq_tokens` must be a square number, got {config['num_vq_tokens']}.")
        phi = _language_model(config, file, language_model, HubArguments(**{**hub, "revision": language_model_revision}))
        models: dict[str, ModelSource] = {} if "transformer" in without else {"transformer": open_omni_phi(folder, phi)}
        if "vqvae" not in without:
            place = HubArguments(**{**hub, "revision": vqvae_revision})
            models["vqvae"], _ = open_image_tokenizer(vqvae, place, config, file)
        tokenizer = load_tokenizer(PreTrainedTokenizerFast, phi)
        _check_tokenizer(tokenizer, phi, config["llm_vocab_size"])
        components = {
            "tokenizer": tokenizer,
            "scheduler": InfoGainScheduler(mask_token_id=config["codebook_size"]),
            "image_token_offset": config["vocab_size"] - 1 - config["codebook_size"],
            "task_token_id": special_token_id(config, "t2i"),
            "image_start_token_id": special_token_id(config, "soi"),
            "image_end_token_id": special_token_id(config, "eoi"),
            "pad_token_id": special_token_id(config, "pad"),
            "sample_size": side,
            "default_guidance_scale": GUIDANCE_OF_SIDE.get(side),
        }
        return PublishedPipeline(cls, models, components)

    def canvas(self) -> Canvas:
        """The image tokens of the model."""
        config = self.transformer.config
        return Canvas(self.codebook_size, config.vocab_size, self.config.sample_size, only_side=True)

    @torch.no_grad()
    def extrapolate(
        self,
        prompt: str | list[str],
        image: ImageInput,
        sides: Sequence[str],
        *,
        overlap: int | None = None,
        mask_blur: float = 0.0,
        output_type: str = "pil",
        **arguments: Any,
    ) -> Any:
        """Lets images grow beyond their edges, window by window, as Show-o's authors do.

        A window is as large as the model's images. It begins with the tokens at an edge of the image; the others are decoded.

        Args:
            prompt: What the windows show: one for all, or a list with one for each.
            image: One or several, which grow alike; resized and cropped as in a call. To grow one several times, repeat it.
            sides: Where the image grows, window after window: of "left" and "right", or of "top" and "bottom".
            overlap: Pixels of the image in every window, a multiple of a token's; by default half a window.
            mask_blur: As in a call, around the image.
            output_type: "pil", "np", "pt" or "latent" (tokens).
            arguments: Others of a call, such as `guidance_scale`, `num_inference_steps` and `generator`.

        Returns:
            The images, larger by a window less `overlap` for each of `sides`. The pixels of `image` are as they were.

        Raises:
            ValueError: For the first argument that does not fit.
            TypeError: For an argument of a call that the windows decide on, such as `height` or `latents`.
        """
        for name in _OF_WINDOWS:
            if name in arguments:
                raise TypeError(f"extrapolate() got an unexpected keyword argument {name!r}: the windows decide on it")
        check_list("sides", sides, str, "a non-empty list of left and right, or of top and bottom")
        for side in sides:
            check_choice("sides", side, SIDES)
        if len({side in ("left", "right") for side in sides}) > 1:
            raise ValueError(f"`sides` must be of left and right, or of top and bottom, got {', '.join(sides)}.")
        check_number("mask_blur", mask_blur, 0, MOST_BLUR)
        check_choice("output_type", output_type, ("pil", "np", "pt", "latent"))
        prompts = prompt_list("prompt", prompt)
        if len(prompts) not in (1, len(sides)):
            raise ValueError(f"`prompt` must be one, or one for each of the {len(sides)} windows, got {len(prompts)}.")
        prompts = prompts * len(sides) if len(prompts) == 1 else prompts
        check_components(self, "vqvae", "transformer", "scheduler")
        length, unit = self.canvas().side, self.vae_scale_factor
        check_integer("overlap", overlap, unit, (length - 1) * unit, optional=True)
        if overlap is not None and overlap % unit:
            raise ValueError(f"`overlap` must be a multiple of {unit}, the pixels of a token, got {overlap}.")
        shared = length // 2 if overlap is None else overlap // unit
        pixels = torch.stack([fit_image(one, length * unit, length * unit) for one in read_images("image", image)])
        tokens, margins = self._encode_pixels(pixels), dict.fromkeys(SIDES, 0)
        for text, side in zip(prompts, sides, strict=True):
            window, rest = _split_window(tokens, side, length, shared, self.scheduler.config.mask_token_id)
            decoded, _ = self([text] * len(tokens), latents=window, output_type="latent", return_dict=False, **arguments)
            axis, before = _EDGES[side]
            tokens = torch.cat([decoded, rest] if before else [rest, decoded], dim=axis)
            margins[side] += (length - shared) * unit
        if output_type == "latent":
            return tokens
        left, top, right, bottom = (margins[side] for side in SIDES)
        around = [left, right, top, bottom]
        known = torch.nn.functional.pad(torch.zeros_like(pixels[:, 0], dtype=torch.bool), around, value=True)
        edit = Edit(tokens, torch.nn.functional.pad(pixels, around), seam(known, mask_blur), {})
        images = self._state_images(tokens, self.scheduler.config.mask_token_id, edit.paste, output_type)
        self.maybe_free_model_hooks()
        return images


def _split_window(
    tokens: torch.Tensor, side: str, length: int, shared: int, mask_token_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The window at an edge of an image, and the tokens of the image that are not in it.

    Args:
        tokens: (B, h, w) long.
        side: Of the edge.
        length: Tokens along a side of the window.
        shared: How many rows or columns of the image it begins with; the others are masked.
    """
    axis, before = _EDGES[side]
    size = tokens.shape[axis]
    kept, rest = tokens.split([shared, size - shared] if before else [size - shared, shared], dim=axis)
    kept, rest = (kept, rest) if before else (rest, kept)
    masks = torch.full_like(tokens.narrow(axis, 0, 1), mask_token_id).repeat_interleave(length - shared, dim=axis)
    return torch.cat([masks, kept] if before else [kept, masks], dim=axis), rest


def _language_model(config: dict[str, Any], file: Path, language_model: str | os.PathLike[str] | None, hub: HubArguments) -> Path:
    """The folder of the language model that Show-o began as."""
    if language_model is None:
        named = config.get("llm_model_path", PHI_REPOSITORY)
        if not isinstance(named, str) or named.rstrip("/").rpartition("/")[2] != PHI_REPOSITORY.rpartition("/")[2]:
            raise ValueError(
                f"{file}: `llm_model_path` must be {PHI_REPOSITORY!r}, got {shown(named)}: give that model as `language_model`."
            )
        language_model = PHI_REPOSITORY
    return local_folder(language_model, ["config.json", "*token*.json", "vocab.json", "merges.txt"], hub)


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, num_words: int) -> None:
    """Raises a ValueError unless the tokenizer has as many tokens as Show-o expects, and marks where a text begins and ends."""
    if len(tokenizer) != num_words:
        raise ValueError(f"The tokenizer in {folder} must have {num_words} tokens (`llm_vocab_size`), got {len(tokenizer)}.")
    for name in ("bos_token", "eos_token"):
        if getattr(tokenizer, f"{name}_id") is None:
            raise ValueError(f"The tokenizer in {folder} must have a `{name}`, got None.")

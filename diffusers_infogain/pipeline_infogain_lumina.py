"""Text and images to image with Lumina-DiMOO, decoded by `InfoGainScheduler`."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import VQModel
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .callbacks import StepCallback
from .candidates import Generators
from .checkpoints.published import PublishedPipeline
from .checkpoints.repository import HubArguments, Repository, local_folder
from .checkpoints.saved import load_tokenizer
from .checkpoints.source import ModelSource
from .checkpoints.stock import decode_vqvae, open_vqvae
from .checks import check_choice, check_integer, is_integer, prompt_list, shown
from .components import check_components, in_float32, tokenize
from .editing import ImageInput, closest_grid, digest_of, fit_image, read_images
from .files import read_json
from .guidance import check_scale
from .image_call import Condition, ImageCall
from .image_output import InfoGainPipelineOutput
from .image_pipeline_sequence import Encoded, SequenceImagePipeline
from .models.llada import BidirectionalLlama, open_llada, pad_prompts
from .scheduling_infogain import InfoGainScheduler
from .trace import DecodingTrace

PROMPT_TEMPLATE = "<system>{}</system><user>{}</user>"
UNCONDITION = "<uncondition>"
"""The prompt of the unconditional branch."""
TEXT_TO_IMAGE = "Generate an image according to the text prompt."
TASKS = {
    "image_editing": "Generate an image applying the following editing instruction based on the original image.",
    "control_generation": "Generate an image according to the text prompt and the given control image.",
    "subject_generation": "Generate an image according to the text prompt and the given object image.",
    "style_transfer": "Transform the current image into the style of the provided image.",
    "dense_prediction": "Perform dense prediction on the given images.",
    "multi_view": "Generate a view-image based on the given image.",
    "general": "Generate an image according to the prompt and image.",
}
"""What the model is told to do with images in its prompt, by task."""


@dataclass(frozen=True)
class References:
    """The images in the prompts of a call, each (3, H, W) float32 in [0, 1]: one for all prompts, or one for each.

    Attributes:
        images: Fitted to the size of the output.
        styles: Those that follow them; each is fitted to the size closest to its own shape.
    """

    images: Sequence[torch.Tensor]
    styles: Sequence[torch.Tensor]


class InfoGainLuminaPipeline(SequenceImagePipeline):
    r"""Image generation with Lumina-DiMOO (arXiv 2510.06308), decoded by information gain or rules it is compared with.

    `from_pretrained` loads the published repository as it is (`Alpha-VLLM/Lumina-DiMOO`), or a folder that `save_pretrained` or
    `diffusers-infogain convert` wrote.

    A sequence is `prompt [answer start] [image start] rows [image end] [answer end]`, with the prompt in `PROMPT_TEMPLATE`. Each
    row of image tokens ends with a newline token, which is given and never decoded; image code c is the token
    `image_token_offset + c`. `scheduler` sees only the image tokens, as codes, with the codebook's size as mask id. With a `task`
    the prompt ends with images, `[image start] rows [image end]` each, before its last token.

    Calls take 64 steps by default. Images have 1024 x 1024 pixels by default; other sizes are multiples of 16. The authors also
    show 1536 x 768, and trained on multiples of 32, up to four times as long as wide. Guidance is
    logits = (1 + g) · cond - g · uncond, with g = 4 by default; 0 or less switches it off. The model was trained with
    `UNCONDITION` as its only negative prompt, which also replaces empty ones.

    With a `task` logits = cond + g · (cond - uncond) + h · (cond - imageless), where `uncond` has the images and the negative
    prompt, and `imageless` the prompt without images; g is `guidance_scale`, 2.5 by default, h `image_guidance_scale`, 4 by
    default. Images then have about 512 x 512 pixels by default, in the shape of `image`.

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
    task_guidance_scale = 2.5
    task_image_guidance_scale = 4.0
    further_scales = ("image_guidance_scale",)
    recorded_inputs = ("prompt", "negative_prompt", "task", "image_guidance_scale")
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

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_schedule: str | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guided_lookahead: bool = True,
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
        image: ImageInput | None = None,
        mask_image: ImageInput | None = None,
        strength: float | None = None,
        outpaint: Mapping[str, int] | None = None,
        mask_coverage: float = 0.0,
        mask_blur: float = 0.0,
        approximate_cache: str | None = None,
        task: str | None = None,
        style_image: ImageInput | None = None,
        image_guidance_scale: float | None = None,
    ) -> InfoGainPipelineOutput | tuple[Any, DecodingTrace]:
        r"""Generates images, from prompts alone or from prompts with images in them.

        Args:
            prompt: The prompt or prompts; with the task "image_editing" an instruction, such as "Add a hat to the dog."
            height, width: In pixels; by default the size that the model was trained on, or that of `latents`. With `task` that of
                about 512 x 512 pixels which is closest in shape to `image`.
            guidance_scale: g of classifier-free guidance; by default the pipeline's `default_guidance_scale`, with `task` 2.5.
                0 or less switches it off.
            image: With `task`, the image that the model sees in its prompt, for all prompts, or a list with one for each. It is
                resized, and cropped at its centre, to `height` x `width`. Without, an image to edit, as in every pipeline.
            mask_image: What to decode anew. With `task` the model sees all of `image`, and the pixels outside the mask stay.
            strength: The share of the (masked) tokens that is decoded anew, at random, in that share of the steps. With `task`
                only together with `mask_image`.
            outpaint: Pixels to add to `image` by side, without `task`.
            task: What the model does with `image`: "image_editing" (the prompt is an instruction), "control_generation" (a map of
                edges, depth or a pose), "subject_generation", "style_transfer", "dense_prediction", "multi_view" or "general". By
                default `image` is edited token by token, and the model sees what of it stays.
            style_image: The image whose style `image` gets with the task "style_transfer": one, or a list with one for each
                prompt.
            image_guidance_scale: h of guidance towards `image`, with `task` only; by default 4. 0 or less switches it off. The
                schedule and the interval of guidance are those of `guidance_scale`. It takes a row of the network more.

        Raises:
            ValueError: For the first argument that does not fit.
        """
        return self.run_call(self._with_task(locals()))

    def _with_task(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call as `run_call` takes them: with a task the images are `references`.

        Raises:
            ValueError: For those that do not fit the task.
        """
        self._check_task(arguments)
        if arguments["task"] is None:
            return {**arguments, "references": None}
        references = References(
            read_images("image", arguments["image"]),
            [] if arguments["style_image"] is None else read_images("style_image", arguments["style_image"]),
        )
        changed: dict[str, Any] = {"references": references}
        for name, default in (
            ("guidance_scale", self.task_guidance_scale),
            ("image_guidance_scale", self.task_image_guidance_scale),
        ):
            if arguments[name] is None:
                changed[name] = default
        if arguments["mask_image"] is None:
            changed["image"] = None
        if arguments["latents"] is None and None in (arguments["height"], arguments["width"]):
            sizes = {self._closest_size(image) for image in references.images}
            if len(sizes) > 1:
                found = " and ".join(f"{width} x {height}" for height, width in sorted(sizes))
                raise ValueError(
                    f"`height` and `width` must be given with images of different shapes, whose sizes would be {found} pixels."
                )
            (size,) = sizes
            for name, side in zip(("height", "width"), size, strict=True):
                if arguments[name] is None:
                    changed[name] = side
        return {**arguments, **changed}

    def _check_task(self, arguments: Mapping[str, Any]) -> None:
        task, image, style = (arguments[name] for name in ("task", "image", "style_image"))
        check_choice("task", task, tuple(TASKS), optional=True)
        if arguments["image_guidance_scale"] is not None:
            check_scale("image_guidance_scale", arguments["image_guidance_scale"])
            if task is None:
                raise ValueError(
                    f"`image_guidance_scale` must be None without `task`, such as 'image_editing', got "
                    f"{arguments['image_guidance_scale']}."
                )
        if task != "style_transfer" and style is not None:
            raise ValueError(f"`style_image` must be None without the task 'style_transfer', got {shown(style)}.")
        if task == "style_transfer" and style is None:
            raise ValueError("`style_image` must be given with the task 'style_transfer'.")
        if task is None:
            return
        if image is None:
            raise ValueError(f"`image` must be given with `task`, got None with {task!r}.")
        if arguments["outpaint"] is not None:
            raise ValueError(f"`outpaint` must be None with `task`, got {shown(dict(arguments['outpaint']))}.")
        if arguments["strength"] is not None and arguments["mask_image"] is None:
            raise ValueError(f"`strength` must be None with `task` and no `mask_image`, got {arguments['strength']}.")

    def _closest_size(self, image: torch.Tensor) -> tuple[int, int]:
        """Height and width of about half of the model's own, in multiples of two tokens, closest in shape to an image."""
        rows, columns = closest_grid(image.shape[1], image.shape[2], max(1, self.config.sample_size // 4) ** 2)
        return rows * 2 * self.vae_scale_factor, columns * 2 * self.vae_scale_factor

    def check_inputs(
        self,
        prompt: Any,
        negative_prompt: Any,
        task: str | None = None,
        style_image: Any = None,
        image_guidance_scale: float | None = None,
        references: References | None = None,
    ) -> int:
        """Checks prompts; returns their number."""
        return super().check_inputs(prompt, negative_prompt)

    def encode(
        self,
        call: ImageCall,
        prompt: Any,
        negative_prompt: Any,
        task: str | None = None,
        style_image: Any = None,
        image_guidance_scale: float | None = None,
        references: References | None = None,
    ) -> tuple[Condition, *tuple[Condition | None, ...]]:
        """The ids of the prompts, of the negative ones, and with `image_guidance_scale` of the prompts without images.

        Raises:
            ValueError: If prompt and image together are longer than the model takes.
        """
        prompts, images = call.per_image(prompt), None
        if references is not None:
            check_components(self, "vqvae")
            images = self._reference_ids(call, references)
        negatives = self._encode_with(self.negative_prompts(call, negative_prompt), task, images) if call.guided else None
        imageless = self._encode_with(prompts, task, None) if call.is_guided("image_guidance_scale") else None
        return self.conditions(call, self._encode_with(prompts, task, images), negatives, imageless)

    def _reference_ids(self, call: ImageCall, references: References) -> list[list[int]]:
        """The ids of all images in the prompt of each image of a call."""
        height, width = int(call.height or 0), int(call.width or 0)
        found: dict[str, tuple[list[torch.Tensor], list[list[int]]]] = {}
        for name, images in (("image", references.images), ("style_image", references.styles)):
            if images:
                call.check_count(name, images)
                sizes = [(height, width) if name == "image" else self._closest_size(image) for image in images]
                fitted = [fit_image(image, *size) for image, size in zip(images, sizes, strict=True)]
                found[name] = fitted, [self._reference_row(image) for image in fitted]
                call.notes[f"{name}_sha256"] = call.per_image([digest_of(image).hexdigest() for image in fitted])
        parts = [call.per_image(ids) for _, ids in found.values()]
        return [[token for part in image for token in part] for image in zip(*parts, strict=True)]

    def _reference_row(self, image: torch.Tensor) -> list[int]:
        """The ids of an image (3, H, W) in a prompt."""
        return self._bracketed(self._image_ids(self._encode_pixels(image[None])))[0].tolist()

    def _bracketed(self, ids: torch.Tensor) -> torch.Tensor:
        """Image token ids (B, h, w) as they stand in a sequence, (B, S): `[image start] rows [image end]`."""
        config, pad = self.config, torch.nn.functional.pad
        rows = pad(ids, (0, 1), value=config.newline_token_id).flatten(1)
        return pad(pad(rows, (1, 0), value=config.image_start_token_id), (0, 1), value=config.image_end_token_id)

    def encode_prompt(self, prompts: list[str], task: str | None = None) -> Encoded:
        """Ids of prompts in `PROMPT_TEMPLATE`, without images, padded on the left; none is cut.

        Args:
            prompts: The prompts.
            task: One of `TASKS`; by default text to image.

        Returns:
            Ids (B, P) and a mask (B, P), False at padding.

        Raises:
            ValueError: If prompts are no strings, or there is no such task.
        """
        check_choice("task", task, tuple(TASKS), optional=True)
        return self._encode_with(prompts, task, None)

    def _encode_with(self, prompts: list[str], task: str | None, images: Sequence[Sequence[int]] | None) -> Encoded:
        """The same with the ids of the images of each prompt, which stand before its last token."""
        check_components(self, "tokenizer")
        system = TEXT_TO_IMAGE if task is None else TASKS[task]
        texts = [PROMPT_TEMPLATE.format(system, text) for text in prompt_list("prompts", prompts)]
        rows = [list(tokenize(self.tokenizer, text).input_ids) for text in texts]
        if images is not None:
            rows = [[*ids[:-1], *image, *ids[-1:]] for ids, image in zip(rows, images, strict=True)]
        # Padding is hidden from every token, so any id will do.
        return pad_prompts(rows, 0, self._execution_device)

    @property
    def image_guidance_scale(self) -> float:
        """`image_guidance_scale` of the running call, or of the last one; 0 without a task."""
        return self._call("image_guidance_scale").further_scales["image_guidance_scale"]

    @property
    def _image_guidance_scale(self) -> float:
        return self.image_guidance_scale

    @_image_guidance_scale.setter
    def _image_guidance_scale(self, value: float) -> None:
        self._call("image_guidance_scale").further_scales["image_guidance_scale"] = value

    @property
    def max_length(self) -> int:
        """Maximal number of tokens of prompt and image together."""
        return self.config.max_sequence_length

    def lay_out(self, image: torch.Tensor, where: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[answer start] [image start] rows [image end] [answer end]`, every row with a newline token at its end."""
        config, pad = self.config, torch.nn.functional.pad
        answer = pad(self._bracketed(image), (1, 0), value=config.answer_start_token_id)
        answer = pad(answer, (0, 1), value=config.answer_end_token_id)
        return answer, pad(pad(where, (0, 1)).flatten(1), (2, 2))

    def to_pixels(self, tokens: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) of tokens (B, h, w), in float32."""
        return decode_vqvae(in_float32(self.vqvae), tokens).clamp(0, 1)

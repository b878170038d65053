"""Text to image with aMUSEd-format models, decoded by `InfoGainScheduler`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import UVit2DModel, VQModel
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from .callbacks import StepCallback
from .candidates import Generators
from .checkpoints.repository import EMBEDDED_MODELS
from .checks import check_type
from .editing import ImageInput
from .image_call import Canvas, Condition, ImageCall
from .image_output import InfoGainPipelineOutput
from .image_pipeline_clip import ClipImagePipeline
from .lora import AmusedLoraMixin
from .models.partial_rows import PartialRows, check_uvit, run_uvit
from .printing import shown
from .scheduling_infogain import InfoGainScheduler
from .trace import DecodingTrace

DEMO_MODEL = EMBEDDED_MODELS["demo"]
"""Folder of the embedded demo model, for loaders that do not know the name "demo"."""


class InfoGainPipeline(ClipImagePipeline, AmusedLoraMixin):
    r"""Text-to-image generation with models in aMUSEd's format, decoded by information gain or any rule it is compared with.

    Everything about the sampler is a setting of `scheduler`; an `AmusedScheduler`, as aMUSEd repositories have it, is converted
    to an `InfoGainScheduler` with its default settings. `from_pretrained("demo")` loads the small model that the package ships.

    Calls take 12 steps by default. Guidance is logits = uncond + g · (cond - uncond), with g = 10 by default; 1 or less switches
    it off.

    Args:
        vqvae: Decodes tokens into pixels.
        tokenizer: Tokenizer of the text encoder.
        text_encoder: CLIP, whose pooled embeddings and penultimate hidden states condition the transformer.
        transformer: Predicts the tokens.
        scheduler: Chooses the tokens to decode in each step, and their values.
        default_guidance_scale: `guidance_scale` of calls that give none; by default 10.

    Raises:
        ValueError: If `scheduler` is neither an `InfoGainScheduler` nor an `AmusedScheduler`.
    """

    families = ("aMUSEd",)
    published_in_diffusers_format = True
    repository_options = ("variant",)
    saved_as = ("AmusedPipeline", "AmusedImg2ImgPipeline", "AmusedInpaintPipeline")
    default_num_inference_steps = 12
    family_guidance_scale = 10.0
    runs_partial_rows = True

    vqvae: VQModel
    transformer: UVit2DModel
    scheduler: InfoGainScheduler

    def __init__(
        self,
        vqvae: VQModel | None,
        tokenizer: CLIPTokenizer | None,
        text_encoder: CLIPTextModelWithProjection | None,
        transformer: UVit2DModel | None,
        scheduler: InfoGainScheduler | None,
        default_guidance_scale: float | None = None,
    ):
        super().__init__()
        self.register_family(
            scheduler,
            default_guidance_scale,
            vqvae=vqvae,
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            transformer=transformer,
        )

    def saved_index(self) -> dict[str, Any]:
        """`model_index.json` as an aMUSEd repository's."""
        # Saved as aMUSEd's, the repository also loads without this package, and the scheduler's own settings survive in its
        # config, which `__init__` converts back.
        index = {**super().saved_index(), "_class_name": "AmusedPipeline"}
        return index if self.scheduler is None else {**index, "scheduler": ["diffusers", "AmusedScheduler"]}

    def canvas(self) -> Canvas:
        """The image tokens of the model."""
        config = self.transformer.config
        return Canvas(config.codebook_size, config.vocab_size, config.sample_size, multiple=2 if config.downsample else 1)

    def check_inputs(self, cross_attention_kwargs: Any, **inputs: Any) -> int:  # type: ignore[override]
        """As in `ClipImagePipeline`, with `cross_attention_kwargs`."""
        check_type("cross_attention_kwargs", cross_attention_kwargs, (dict, type(None)), "a dictionary or None")
        return super().check_inputs(**inputs)

    def encode(self, call: ImageCall, cross_attention_kwargs: Any, **inputs: Any) -> tuple[Condition, Condition | None]:  # type: ignore[override]
        """As in `ClipImagePipeline`; `predict` passes `cross_attention_kwargs` on.

        Raises:
            ValueError: With a cache, for these or attention processors of another kind, which only whole rows can use.
        """
        if call.cache is not None:
            check_uvit(self.transformer)
            if cross_attention_kwargs is not None:
                raise ValueError(
                    f"`cross_attention_kwargs` must be None with `approximate_cache`, got {shown(cross_attention_kwargs)}."
                )
        return super().encode(call, **inputs)

    def predict(
        self,
        tokens: torch.Tensor,
        prompt_embeds: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        micro_conds: torch.Tensor,
        call: ImageCall,
    ) -> torch.Tensor:
        """Logits (R, L, V) of tokens (R, h, w), without guidance."""
        logits = self.transformer(
            tokens,
            encoder_hidden_states=encoder_hidden_states,
            pooled_text_emb=prompt_embeds,
            micro_conds=micro_conds,
            cross_attention_kwargs=call.inputs["cross_attention_kwargs"],
        )
        return logits.flatten(2).transpose(1, 2)

    def positions(self, tokens: torch.Tensor, condition: Condition) -> tuple[torch.Tensor, torch.Tensor]:
        """All positions are image tokens."""
        everywhere = torch.ones_like(tokens.flatten(1), dtype=torch.bool)
        return everywhere, everywhere

    def run_rows(self, tokens: torch.Tensor, condition: Condition, where: torch.Tensor, rows: PartialRows) -> torch.Tensor:
        """Logits (M, V) of states (R, h, w) at the M positions of `where` (R, h * w)."""
        names = {"prompt_embeds": "pooled_text_emb"}
        arguments = {names.get(name, name): value for name, value in condition.items()}
        return run_uvit(self.transformer, tokens, **arguments, where=where, rows=rows)

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: str | list[str] | None = None,
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
        prompt_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_encoder_hidden_states: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        cross_attention_kwargs: dict[str, Any] | None = None,
        micro_conditioning_aesthetic_score: float = 6,
        micro_conditioning_crop_coord: tuple[int, int] = (0, 0),
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
        """Generates images.

        Args:
            cross_attention_kwargs: Passed on to the attention processors of the transformer.

        Returns:
            `InfoGainPipelineOutput`, or (images, trace).

        Raises:
            ValueError: For the first argument that does not fit.
        """
        return self.run_call(locals())

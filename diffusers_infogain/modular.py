"""Blocks for Modular Diffusers: encode the prompts, decode the tokens, turn them into pixels. For models in aMUSEd's format.

Modular Diffusers is young, and diffusers calls parts of it experimental; nothing else in this package depends on it.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UVit2DModel, VQModel
from diffusers.modular_pipelines import ModularPipelineBlocks, PipelineState, SequentialPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from .pipeline_infogain import InfoGainPipeline
from .scheduling_infogain import InfoGainScheduler

_COMPONENTS = {
    "vqvae": VQModel,
    "tokenizer": CLIPTokenizer,
    "text_encoder": CLIPTextModelWithProjection,
    "transformer": UVit2DModel,
    "scheduler": InfoGainScheduler,
}
_EMBEDDINGS = ("prompt_embeds", "encoder_hidden_states", "negative_prompt_embeds", "negative_encoder_hidden_states")


class _Block(ModularPipelineBlocks):
    """A block that works with some components of an `InfoGainPipeline`."""

    model_name = "infogain"
    uses: tuple[str, ...] = ()

    @property
    def expected_components(self) -> list[ComponentSpec]:
        """The components, by name and class."""
        return [ComponentSpec(name, _COMPONENTS[name]) for name in self.uses]

    def pipeline(self, components: Any) -> InfoGainPipeline:
        """A pipeline of the components that the block has."""
        pipe = InfoGainPipeline(**{name: getattr(components, name) if name in self.uses else None for name in _COMPONENTS})
        pipe.set_progress_bar_config(disable=True)
        return pipe


class InfoGainTextEncoderStep(_Block):
    """Encodes prompts and negative prompts with CLIP."""

    uses = ("tokenizer", "text_encoder")

    @property
    def description(self) -> str:
        """What the block does."""
        return "Encodes prompts and negative prompts with CLIP"

    @property
    def inputs(self) -> list[InputParam]:
        """Prompts, one or a list."""
        return [InputParam("prompt", required=True), InputParam("negative_prompt")]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """The embeddings that `InfoGainPipeline.encode_prompt` returns."""
        return [OutputParam(name, type_hint=torch.Tensor) for name in _EMBEDDINGS]

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        """Runs the block."""
        block = self.get_block_state(state)
        found = self.pipeline(components).encode_prompt(block.prompt, negative_prompt=block.negative_prompt)
        for name, value in zip(_EMBEDDINGS, found, strict=True):
            setattr(block, name, value)
        self.set_block_state(state, block)
        return components, state


class InfoGainDecodeStep(_Block):
    """Decodes the image tokens with the scheduler's sampler."""

    uses = ("vqvae", "transformer", "scheduler")
    options = (
        "height",
        "width",
        "num_inference_steps",
        "guidance_scale",
        "generator",
        "num_images_per_prompt",
        "lookahead_batch_size",
        "num_runs",
    )

    @property
    def description(self) -> str:
        """What the block does."""
        return "Decodes the image tokens: in every step the scheduler chooses positions and values"

    @property
    def inputs(self) -> list[InputParam]:
        """The embeddings, known tokens as `latents`, and arguments of `InfoGainPipeline.__call__` of the same names."""
        defaults = {"num_images_per_prompt": 1, "num_runs": 1}
        embeddings = [InputParam(name, required=True, type_hint=torch.Tensor) for name in _EMBEDDINGS]
        return [*embeddings, InputParam("latents"), *(InputParam(name, default=defaults.get(name)) for name in self.options)]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """Tokens (B, h, w), and how they were decoded."""
        return [OutputParam("latents", type_hint=torch.Tensor), OutputParam("trace")]

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        """Runs the block."""
        block = self.get_block_state(state)
        arguments = {name: getattr(block, name) for name in (*_EMBEDDINGS, "latents", *self.options)}
        block.latents, block.trace = self.pipeline(components)(**arguments, output_type="latent", return_dict=False)
        self.set_block_state(state, block)
        return components, state


class InfoGainPixelsStep(_Block):
    """Turns image tokens into images."""

    uses = ("vqvae",)

    @property
    def description(self) -> str:
        """What the block does."""
        return "Turns image tokens into images"

    @property
    def inputs(self) -> list[InputParam]:
        """Tokens (B, h, w), and "pil", "np" or "pt"."""
        return [InputParam("latents", required=True, type_hint=torch.Tensor), InputParam("output_type", default="pil")]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """The images."""
        return [OutputParam("images")]

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        """Runs the block."""
        block = self.get_block_state(state)
        pipe = self.pipeline(components)
        block.images = pipe.image_processor.postprocess(pipe.to_pixels(block.latents), block.output_type)
        self.set_block_state(state, block)
        return components, state


class InfoGainBlocks(SequentialPipelineBlocks):
    """Text to image: prompts, tokens, pixels."""

    model_name = "infogain"
    block_classes = [InfoGainTextEncoderStep, InfoGainDecodeStep, InfoGainPixelsStep]
    block_names = ["text_encoder", "decode", "pixels"]

    @property
    def description(self) -> str:
        """What the blocks do."""
        return "Text to image with models in aMUSEd's format, decoded by InfoGainScheduler"

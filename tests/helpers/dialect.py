"""One tiny pipeline of every family that makes images, and calls that suit them all."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch

from diffusers_infogain import (
    InfoGainMaskGITPipeline,
    InfoGainMeissonicPipeline,
    InfoGainPipeline,
    InfoGainScheduler,
    InfoGainTiTokPipeline,
)
from diffusers_infogain.models.maskgit_transformer import MaskGITTransformer2DModel
from diffusers_infogain.models.meissonic_transformer import MeissonicTransformer2DModel
from helpers.amused import make_components
from helpers.checkpoints import make_lumina_pipeline, make_mmada_pipeline, make_showo_pipeline, make_vqvae
from helpers.checkpoints_titok import make_tokenizer, make_transformer

CLIP_FAMILIES = ("amused", "meissonic")
CLASS_FAMILIES = ("maskgit", "titok")
LANGUAGE_MODELS = ("mmada", "showo", "lumina")
PROMPT = {
    **dict.fromkeys(CLIP_FAMILIES, "a cat"),
    **dict.fromkeys(CLASS_FAMILIES, 207),
    **dict.fromkeys(LANGUAGE_MODELS, "a red cat"),
}
OTHER = {**dict.fromkeys(CLIP_FAMILIES, "dogs"), **dict.fromkeys(CLASS_FAMILIES, 1), **dict.fromkeys(LANGUAGE_MODELS, "two dogs")}
FAMILIES = tuple(PROMPT)
WITHOUT_GUIDANCE = {**dict.fromkeys(FAMILIES, 0.0), **dict.fromkeys(CLIP_FAMILIES, 1.0)}
SIDE = 4
GRID_FAMILIES = tuple(family for family in FAMILIES if family != "titok")
"""Those whose tokens are cells of the image."""


@functools.cache
def _made(family: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if family == "amused":
            return InfoGainPipeline(**make_components())
        if family == "meissonic":
            components = make_components()
            components["transformer"] = MeissonicTransformer2DModel(
                attention_head_dim=8,
                axes_dims_rope=[2, 2, 4],
                codebook_size=24,
                downsample=False,
                guidance_embeds=False,
                in_channels=64,
                joint_attention_dim=16,
                num_attention_heads=2,
                num_layers=1,
                num_single_layers=1,
                patch_size=1,
                pooled_projection_dim=16,
                upsample=False,
                vocab_size=26,
            ).eval()
            components["transformer"].mlm_layer.conv2.weight.data.mul_(8)
            return InfoGainMeissonicPipeline(**components)
        if family == "maskgit":
            transformer = MaskGITTransformer2DModel(
                sample_size=SIDE,
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=16,
                codebook_size=32,
                vocab_size=33,
            ).eval()
            return InfoGainMaskGITPipeline(
                make_vqvae(codes=32, levels=2), transformer, InfoGainScheduler(mask_token_id=32, num_candidates=3)
            )
        if family == "titok":
            models = make_tokenizer(num_tokens=SIDE**2), make_transformer(num_tokens=SIDE**2)
            return InfoGainTiTokPipeline(
                *models, InfoGainScheduler(mask_token_id=32, num_candidates=3), default_guidance_schedule="constant"
            )
        return {"mmada": make_mmada_pipeline, "showo": make_showo_pipeline, "lumina": make_lumina_pipeline}[family]()


def make_pipe(family: str) -> Any:
    """A pipeline of its own with models of its own."""
    made = _made(family)
    pipe = type(made)(**copy.deepcopy(made.components), **made.parameters)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def family_of(pipe: Any) -> str:
    return type(pipe).__name__.removeprefix("InfoGain").removesuffix("Pipeline").lower() or "amused"


def grid_of(pipe: Any) -> tuple[int, int]:
    """(h, w) of the tokens of `call`."""
    return (1, SIDE**2) if family_of(pipe) == "titok" else (SIDE, SIDE)


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def call(pipe: Any, prompt: Any = None, **arguments: Any) -> Any:
    """A short call of 4 x 4 tokens; `prompt` by default the family's."""
    arguments = {"num_inference_steps": 3, "generator": seeded(0), "output_type": "latent", **arguments}
    side = {} if family_of(pipe) == "titok" else {"height": SIDE * pipe.vae_scale_factor, "width": SIDE * pipe.vae_scale_factor}
    if "prompt_embeds" not in arguments:
        name = "class_labels" if family_of(pipe) in CLASS_FAMILIES else "prompt"
        arguments[name] = PROMPT[family_of(pipe)] if prompt is None else prompt
    return pipe(**{**side, **arguments})

"""TiTok as published: folders with config.json and safetensors or pickles, one for the image tokenizer and one for the generator
(`yucornetto/tokenizer_titok_l32_imagenet`), and the pickles of `fun-research/TiTok`, which have no config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoints.source import ModelSource
from ..checkpoints.weights import Checkpoint
from ..checks import shown
from . import titok_tokenizer as tokenizer
from . import titok_transformer as transformer
from .titok_tokenizer import TiTokTokenizer
from .titok_transformer import TiTokBertTransformer, TiTokUViTTransformer

WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin")
HEAD_SIZE = 64
"""Of the transformers of all image tokenizers: 8, 12 and 16 heads of 512, 768 and 1024."""
PIXEL_GROUPS = 32
GENERATORS: dict[str, Any] = {"ViT": TiTokBertTransformer, "UViT": TiTokUViTTransformer}


def _config(num_tokens: int, size: str, generator: Mapping[str, Any]) -> dict[str, Any]:
    vq_model = {
        "codebook_size": 4096,
        "token_size": 12,
        "use_l2_norm": True,
        "vit_enc_model_size": size,
        "vit_enc_patch_size": 16,
        "vit_dec_patch_size": 16,
        "num_latent_tokens": num_tokens,
        "finetune_decoder": True,
    }
    usual = {"condition_num_classes": 1000, "num_attention_heads": 16, "num_steps": 8, "guidance_decay": "linear"}
    dataset = {"preprocessing": {"crop_size": 256}}
    return {"model": {"vq_model": vq_model, "generator": {**usual, **generator}}, "dataset": dataset}


_BERT = {"model_type": "ViT", "hidden_size": 768, "num_hidden_layers": 24, "intermediate_size": 3072}
_UVIT = {"model_type": "UViT", "hidden_size": 1024, "num_hidden_layers": 20, "intermediate_size": 4096}
VARIANTS: dict[str, dict[str, Any]] = {
    "l32": _config(32, "large", {**_BERT, "guidance_scale": 4.5, "randomize_temperature": 9.5}),
    "b64": _config(64, "base", {**_BERT, "guidance_scale": 3.0, "randomize_temperature": 11.0}),
    "s128": _config(
        128,
        "small",
        {**_UVIT, "num_steps": 64, "guidance_scale": 6.9, "guidance_decay": "power-cosine", "randomize_temperature": 2.8},
    ),
}
"""The configurations of the generators that were published, by their names in `fun-research/TiTok`."""

TOKENIZERS = {("large", 32): "l32", ("base", 64): "b64", ("small", 128): "s128"}
"""By `vit_enc_model_size` and `num_latent_tokens`, the published tokenizers that have generators."""

GUIDANCE = {"constant": "constant", "linear": "titok_linear", "power-cosine": "titok_power_cosine"}
"""The package's names of the published `guidance_decay`."""


def section(config: Mapping[str, Any], path: str, where: Path | str) -> dict[str, Any]:
    """A part of a published configuration, such as "model.vq_model".

    Raises:
        ValueError: If it is not there.
    """
    found: Any = config
    for name in path.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    if not isinstance(found, Mapping):
        raise ValueError(f"{where}: `{path}` must be an object, got {shown(found)}.")
    return dict(found)


def integer(settings: Mapping[str, Any], name: str, where: Path | str, lowest: int = 1) -> int:
    """A number of a published configuration.

    Raises:
        ValueError: If it is none, or below `lowest`.
    """
    value = settings.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value < 2**31:
        raise ValueError(f"{where}: `{name}` must be an integer >= {lowest}, got {shown(value)}.")
    return value


def tokenizer_config(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: Path | str) -> dict[str, Any]:
    """The arguments of `TiTokTokenizer` for a published configuration and the shapes of the published tensors.

    Raises:
        ValueError: For a configuration or tensors of another model.
    """
    vq = section(config, "model.vq_model", where)
    if vq.get("quantize_mode", "vq") != "vq":
        mode = shown(vq["quantize_mode"])
        raise ValueError(f"{where}: `quantize_mode` must be 'vq', got {mode}: continuous tokens cannot be masked.")
    legacy = bool(vq.get("is_legacy", True))
    if legacy != bool(vq.get("finetune_decoder", True)):
        raise ValueError(
            f"{where}: `finetune_decoder` must be {legacy} where `is_legacy` is, got {not legacy}: such a model makes no pixels."
        )
    patch_size = integer(vq, "vit_enc_patch_size", where)
    if vq.get("vit_dec_patch_size") != patch_size:
        other = shown(vq.get("vit_dec_patch_size"))
        raise ValueError(f"{where}: `vit_dec_patch_size` must be `vit_enc_patch_size` = {patch_size}, got {other}.")
    needed = {part: f"{part}.class_embedding" for part in ("encoder", "decoder")}
    if missing := [key for key in needed.values() if key not in shapes]:
        raise ValueError(f"{where}: the weights must be those of a TiTok tokenizer, but there is no {', '.join(missing)}.")
    settings: dict[str, Any] = {
        "image_size": integer(section(config, "dataset.preprocessing", where), "crop_size", where),
        "patch_size": patch_size,
        "num_tokens": integer(vq, "num_latent_tokens", where),
        "codebook_size": integer(vq, "codebook_size", where),
        "token_size": integer(vq, "token_size", where),
        "use_l2_norm": bool(vq.get("use_l2_norm")),
    }
    for part, key in needed.items():
        width = shapes[key][-1]
        layers = {name.split(".")[2] for name in shapes if name.startswith(f"{part}.transformer.")}
        settings |= {f"{part}_width": width, f"{part}_layers": len(layers), f"{part}_heads": max(width // HEAD_SIZE, 1)}
    if not legacy:
        return {**settings, "pixel_codebook_size": None, **_text(shapes)}
    codebook = shapes.get("pixel_quantize.embedding.weight", (1, 1))
    levels = {name.split(".")[2] for name in shapes if name.startswith("pixel_decoder.up.")}
    channels = [shapes.get(f"pixel_decoder.up.{i}.block.0.conv2.weight", (PIXEL_GROUPS,))[0] for i in range(len(levels))]
    pixels = {"pixel_codebook_size": codebook[0], "pixel_embed_dim": codebook[-1], "pixel_channels": tuple(channels)}
    blocks = len({name.split(".")[2] for name in shapes if name.startswith("pixel_decoder.mid.")})
    return {**settings, **pixels, "pixel_blocks": blocks, "pixel_groups": PIXEL_GROUPS}


def _text(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The text that a TA-TiTok reads."""
    projection = shapes.get("decoder.text_guidance_proj.weight")
    length = shapes.get("decoder.text_guidance_positional_embedding")
    return {} if projection is None or length is None else {"text_embed_dim": projection[-1], "text_length": length[0]}


def open_tokenizer(checkpoint: Checkpoint, config: Mapping[str, Any], where: Path | str) -> ModelSource:
    """Opens the image tokenizer.

    Raises:
        ValueError: For a configuration or tensors of another model.
    """
    settings = tokenizer_config(config, checkpoint.shapes, where)
    return ModelSource(
        checkpoint,
        lambda: TiTokTokenizer(**settings),
        tokenizer.probe,
        tokenizer.KEY_MAPPING,
        tokenizer.UNUSED_KEYS,
    )


def open_transformer(checkpoint: Checkpoint, config: Mapping[str, Any], where: Path | str) -> ModelSource:
    """Opens the generator.

    Raises:
        ValueError: For a configuration of another model, or the tensors of the image tokenizer.
    """
    if "latent_tokens" in checkpoint.shapes:
        raise ValueError(
            f"{checkpoint.described} holds an image tokenizer of TiTok: give the repository of the generator, and that of the "
            "tokenizer as `vqvae`."
        )
    generator, vq = (section(config, f"model.{name}", where) for name in ("generator", "vq_model"))
    model_type = generator.get("model_type")
    if model_type not in GENERATORS:
        raise ValueError(f"{where}: `model_type` must be one of {', '.join(GENERATORS)}, got {shown(model_type)}.")
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    settings = {name: integer(generator, name, where) for name in names}
    settings |= {
        "num_tokens": integer(vq, "num_latent_tokens", where),
        "codebook_size": integer(vq, "codebook_size", where),
        "num_classes": integer(generator, "condition_num_classes", where),
    }
    build = GENERATORS[model_type]
    return ModelSource(
        checkpoint,
        lambda: build(**settings),
        transformer.probe,
        transformer.KEY_MAPPING,
        transformer.UNUSED_KEYS,
    )

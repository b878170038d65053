"""Repositories with random weights in the very formats in which TiTok is published."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from diffusers_infogain import InfoGainMaskGenPipeline, InfoGainScheduler, InfoGainTiTokPipeline
from diffusers_infogain.models.maskgen_transformer import MaskGenTransformer
from diffusers_infogain.models.titok_tokenizer import TiTokTokenizer
from diffusers_infogain.models.titok_transformer import TiTokBertTransformer, TiTokUViTTransformer
from helpers.amused import make_components

PUBLISHED_NAMES = {
    r"^encoder\.latent_tokens$": "latent_tokens",
    r"\.norm([12])\.": r".ln_\1.",
    r"\.attn\.qkv\.(weight|bias)$": r".attn.in_proj_\1",
    r"\.attn\.proj\.": ".attn.out_proj.",
    r"\.mlp\.fc1\.": ".mlp.c_fc.",
    r"\.mlp\.fc2\.": ".mlp.c_proj.",
    r"^pixel_quantize\.": "pixel_quantize.embedding.",
}
"""Of the tokenizer, but for its pixel decoder."""
CODES, TOKENS = 32, 8
ENCODER = {"encoder_width": 64, "encoder_layers": 1, "encoder_heads": 1}
DECODER = {"decoder_width": 128, "decoder_layers": 2, "decoder_heads": 2}


def titok_config(uvit: bool = False, **vq_model: Any) -> dict[str, Any]:
    """As in the published config.json."""
    vq = {
        "codebook_size": CODES,
        "token_size": 4,
        "use_l2_norm": True,
        "commitment_cost": 0.25,
        "vit_enc_model_size": "large",
        "vit_dec_model_size": "large",
        "vit_enc_patch_size": 16,
        "vit_dec_patch_size": 16,
        "num_latent_tokens": TOKENS,
        "finetune_decoder": True,
        **vq_model,
    }
    generator = {
        "model_type": "UViT" if uvit else "ViT",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "dropout": 0.1,
        "num_steps": 6 if uvit else 4,
        "image_seq_len": "${model.vq_model.num_latent_tokens}",
        "condition_num_classes": 1000,
        "randomize_temperature": 2.8,
        "guidance_scale": 6.9 if uvit else 4.5,
        "guidance_decay": "power-cosine" if uvit else "linear",
    }
    model = {"vq_model": vq, "generator": generator}
    return {"experiment": {"output_dir": "x"}, "model": model, "dataset": {"preprocessing": {"crop_size": 32}}}


def make_tokenizer(**config: Any) -> TiTokTokenizer:
    """A tiny one, whose pixels are between 0 and 1 for the most part."""
    sizes = {"image_size": 32, "num_tokens": TOKENS, "codebook_size": CODES, "token_size": 4, **ENCODER, **DECODER}
    pixels = {"pixel_codebook_size": 16, "pixel_embed_dim": 8, "pixel_channels": (32,) * 5, "pixel_blocks": 1}
    model = TiTokTokenizer(**{**sizes, **pixels, **config}).eval().requires_grad_(False)
    last = model.decoder.conv_out if model.config.pixel_codebook_size is None else model.pixel_decoder.conv_out
    nn.init.constant_(last.bias, 0.5)
    return model


def make_transformer(uvit: bool = False, **config: Any) -> TiTokBertTransformer | TiTokUViTTransformer:
    """A tiny one with logits that differ."""
    sizes = {"num_tokens": TOKENS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model = (TiTokUViTTransformer if uvit else TiTokBertTransformer)(**{**sizes, "codebook_size": CODES, **config})
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=1.0 if "embed" in name else 0.3)
    return model.eval().requires_grad_(False)


def published_name(name: str) -> str:
    for pattern, replacement in PUBLISHED_NAMES.items() if not name.startswith("pixel_decoder.") else ():
        name = re.sub(pattern, replacement, name)
    return name


def tokenizer_weights(seed: int = 0, **config: Any) -> dict[str, torch.Tensor]:
    """Under the published names."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = make_tokenizer(**config).state_dict()
    return {published_name(name): tensor.clone() for name, tensor in state.items()}


def transformer_weights(uvit: bool = False, seed: int = 1) -> dict[str, torch.Tensor]:
    """Under the published names."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = make_transformer(uvit).state_dict()
    return {re.sub("^lm_head", "lm_head" if uvit else "model.lm_head", name): tensor.clone() for name, tensor in state.items()}


def write_folder(folder: Path, config: dict[str, Any], weights: dict[str, torch.Tensor], pickled: bool = False) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=4))
    if pickled:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_titok_repositories(folder: Path, uvit: bool = False, pickled: bool = False) -> tuple[Path, Path]:
    """The generator's and the image tokenizer's, which both have the configuration of both."""
    config = titok_config(uvit)
    generator = write_folder(folder / "generator", config, transformer_weights(uvit), pickled)
    return generator, write_folder(folder / "tokenizer", config, tokenizer_weights(), pickled)


def make_titok_pipeline(**options: Any) -> InfoGainTiTokPipeline:
    """A tiny one, with equal weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return InfoGainTiTokPipeline(make_tokenizer(), make_transformer(), InfoGainScheduler(mask_token_id=CODES), **options)


def make_maskgen_pipeline(**options: Any) -> InfoGainMaskGenPipeline:
    """A tiny one, with equal weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        words = {name: value for name, value in make_components().items() if name in ("tokenizer", "text_encoder")}
        width = words["text_encoder"].config.hidden_size
        length = words["text_encoder"].config.max_position_embeddings
        vqvae = make_tokenizer(pixel_codebook_size=None, use_l2_norm=False, text_embed_dim=width, text_length=length)
        sizes = {
            "num_tokens": TOKENS,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "codebook_size": CODES,
        }
        transformer = MaskGenTransformer(**sizes, text_embed_dim=width, micro_cond_embed_dim=8, num_unused=11)
        for name, parameter in transformer.named_parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=1.0 if "embed" in name else 0.3)
    transformer.eval().requires_grad_(False)
    pipe = InfoGainMaskGenPipeline(
        vqvae, transformer=transformer, scheduler=InfoGainScheduler(mask_token_id=CODES), **words, **options
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def maskgen_config(pipe: InfoGainMaskGenPipeline) -> dict[str, Any]:
    direct = {"use_l2_norm": False, "finetune_decoder": False, "is_legacy": False, "quantize_mode": "vq", "clustering_vq": False}
    config = titok_config(**direct, text_embed_dim=pipe.transformer.config.text_embed_dim)
    config["model"] = {
        "vq_model": config["model"]["vq_model"],
        "maskgen": {
            "decoder_embed_dim": 16,
            "decoder_depth": 2,
            "decoder_num_heads": 2,
            "micro_condition": True,
            "micro_condition_embed_dim": 8,
            "condition_num_classes": 10,
            "cfg": 11.0,
            "num_iter": 7,
            "sample_aesthetic_score": 6.25,
        },
    }
    return config


def write_maskgen_repositories(folder: Path, pickled: bool = False) -> list[str]:
    """The generator's, the image tokenizer's and the text encoder's."""
    pipe = make_maskgen_pipeline()
    config = maskgen_config(pipe)
    state = dict(pipe.transformer.state_dict())
    if pickled:
        state["lm_head.weight"] = state["embeddings.weight"]
    write_folder(folder / "generator", config, state, pickled)
    vq = pipe.vqvae.config
    own = {"pixel_codebook_size": None, "use_l2_norm": False, "text_embed_dim": vq.text_embed_dim, "text_length": vq.text_length}
    write_folder(folder / "tokenizer", config, tokenizer_weights(**own), pickled)
    pipe.text_encoder.save_pretrained(folder / "clip")
    pipe.tokenizer.save_pretrained(folder / "clip")
    return [str(folder / name) for name in ("generator", "tokenizer", "clip")]

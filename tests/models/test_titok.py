"""TiTok's image tokenizers and transformers, beside the public implementation's figures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusers_infogain.checkpoints.source import renamed
from diffusers_infogain.models import titok_tokenizer, titok_transformer
from diffusers_infogain.models.titok_tokenizer import TiTokTokenizer
from diffusers_infogain.models.titok_transformer import TiTokBertTransformer, TiTokTransformer, TiTokUViTTransformer

GOLDEN = Path(__file__).parents[1] / "golden"
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
CODES = {"num_tokens": 8, "codebook_size": 32}
GENERATORS = {"bert": TiTokBertTransformer, "uvit": TiTokUViTTransformer}
WIDTHS = {"width": 16, "layers": 2, "heads": 2}
VISION = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in WIDTHS.items()}
PIXELS = {"pixel_codebook_size": 16, "pixel_embed_dim": 8, "pixel_channels": (4, 4, 8, 8, 16), "pixel_groups": 2}
TOKENIZERS = {
    "legacy": {**VISION, **CODES, **PIXELS, "image_size": 32, "token_size": 4},
    "direct": {**VISION, **CODES, "pixel_codebook_size": None, "image_size": 32, "token_size": 6, "use_l2_norm": False},
}


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "titok_tiny.safetensors")


def weights(golden: dict[str, torch.Tensor], name: str, key_mapping: dict[str, str]) -> dict[str, torch.Tensor]:
    prefix = f"{name}."
    inner = ("codes", "pixels", "input", "labels", "cond", "uncond")
    stored = {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}
    return {renamed(key, key_mapping): value.float() for key, value in stored.items() if key not in inner}


def tokenizer(golden: dict[str, torch.Tensor], name: str) -> TiTokTokenizer:
    model = TiTokTokenizer(**TOKENIZERS[name]).eval().requires_grad_(False)
    model.load_state_dict(weights(golden, name, titok_tokenizer.KEY_MAPPING))
    return model


def generator(golden: dict[str, torch.Tensor], name: str) -> TiTokTransformer:
    model = GENERATORS[name](**SIZES, **CODES, num_classes=10).eval().requires_grad_(False)
    model.load_state_dict(weights(golden, name, titok_transformer.KEY_MAPPING))
    return model


@pytest.mark.parametrize("name", TOKENIZERS)
def test_codes_and_pixels_are_those_of_the_public_implementation(golden, name):
    model = tokenizer(golden, name)
    assert torch.equal(model.encode(golden["images"].float() / 255), golden[f"{name}.codes"])
    torch.testing.assert_close(model.decode(golden["tokens"]), golden[f"{name}.pixels"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", GENERATORS)
def test_logits_are_those_of_the_public_implementation(golden, name):
    model = generator(golden, name)
    tokens, labels = golden[f"{name}.input"], golden[f"{name}.labels"]
    torch.testing.assert_close(model(tokens, labels), golden[f"{name}.cond"], atol=1e-4, rtol=0)
    torch.testing.assert_close(model(tokens, torch.full_like(labels, 10)), golden[f"{name}.uncond"], atol=1e-4, rtol=0)
    where = tokens == 32
    torch.testing.assert_close(model(tokens, labels, where), golden[f"{name}.cond"][where], atol=1e-4, rtol=0)

"""Configurations of published models, by which random ones are built. Imports nothing, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ModelSize:
    """A model that a benchmark can build with random weights.

    Attributes:
        family: One of `IMAGE_FAMILIES`; for text a family of `TextFamily`, or for "masked_lm" the model type of transformers
            after a colon.
        config: Fields of the network's configuration.
        mask_token_id: Of the network.
        layout: Further arguments: of the image pipeline, of `TextFamily`, or of MaskGen's text encoder.
    """

    family: str
    config: dict[str, Any]
    mask_token_id: int
    layout: dict[str, Any] = field(default_factory=dict)

    @property
    def of_text(self) -> bool:
        """Whether the model writes text."""
        return self.family not in IMAGE_FAMILIES


IMAGE_FAMILIES = ("amused", "meissonic", "maskgit", "titok_bert", "titok_uvit", "maskgen", "mmada", "showo", "lumina")

_AMUSED: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 22,
    "num_attention_heads": 16,
    "intermediate_size": 2816,
    "in_channels": 768,
    "block_out_channels": 768,
    "block_num_heads": 12,
    "num_res_blocks": 3,
    "encoder_hidden_size": 768,
    "cond_embed_dim": 768,
    "micro_cond_encode_dim": 256,
    "micro_cond_embed_dim": 1280,
    "vocab_size": 8256,
    "codebook_size": 8192,
    "sample_size": 16,
    "downsample": False,
    "upsample": False,
}
_MEISSONIC: dict[str, Any] = {
    "num_layers": 14,
    "num_single_layers": 28,
    "attention_head_dim": 128,
    "num_attention_heads": 8,
    "joint_attention_dim": 1024,
    "pooled_projection_dim": 1024,
    "axes_dims_rope": (16, 56, 56),
    "vocab_size": 8256,
    "codebook_size": 8192,
    "downsample": True,
    "upsample": True,
}
_LLADA: dict[str, Any] = {
    "vocab_size": 126464,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
_QWEN3: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
}
_QWEN3_SMALL: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "tie_word_embeddings": True,
}
_BERT: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
}
_NANO_BLOCKS: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_NANO_TEXT: dict[str, Any] = {**_NANO_BLOCKS, "vocab_size": 40, "max_position_embeddings": 256}
_NANO_QWEN: dict[str, Any] = {**_NANO_TEXT, "num_key_value_heads": 1}
_NANO_LLADA: dict[str, Any] = {**_NANO_TEXT, "num_key_value_heads": 2}
_MMADA_TOKENS = {
    "task_token_id": 126088,
    "image_start_token_id": 126084,
    "image_end_token_id": 126085,
    "pad_token_id": 126093,
    "image_token_offset": 126349,
    "sample_size": 32,
}
_PHI: dict[str, Any] = {
    "vocab_size": 58498,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 2048,
    "partial_rotary_factor": 0.5,
    "qk_layernorm": True,
    "tie_word_embeddings": False,
    "image_start_token_id": 50296,
    "image_end_token_id": 50297,
}
_SHOWO_TOKENS = {
    "task_token_id": 50300,
    "image_start_token_id": 50296,
    "image_end_token_id": 50297,
    "pad_token_id": 50295,
    "image_token_offset": 50305,
}
_LUMINA_TOKENS = {
    "newline_token_id": 126084,
    "image_start_token_id": 126349,
    "image_end_token_id": 126350,
    "answer_start_token_id": 126354,
    "answer_end_token_id": 126355,
    "image_token_offset": 126356,
    "sample_size": 64,
}


def _maskgit(side: int, width: int, layers: int, heads: int, intermediate: int, codes: int = 16384) -> ModelSize:
    config = {
        "sample_size": side,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": intermediate,
        "codebook_size": codes,
        "vocab_size": codes + 1,
        "num_classes": 1000,
    }
    return ModelSize("maskgit", config, codes)


def _titok(family: str, num_tokens: int, width: int, layers: int, heads: int, intermediate: int, codes: int = 4096) -> ModelSize:
    config = {
        "num_tokens": num_tokens,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": intermediate,
        "codebook_size": codes,
        "num_classes": 1000,
    }
    return ModelSize(family, config, codes)


_CLIP_L: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}


def _maskgen(width: int, layers: int, heads: int, text: dict[str, Any], codes: int = 8192, num_tokens: int = 128) -> ModelSize:
    config = {
        "num_tokens": num_tokens,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "codebook_size": codes,
        "text_embed_dim": text["hidden_size"],
    }
    return ModelSize("maskgen", config, codes, text)


MODEL_SIZES: dict[str, ModelSize] = {
    "amused-256": ModelSize("amused", _AMUSED, 8255),
    "amused-512": ModelSize("amused", {**_AMUSED, "sample_size": 32, "downsample": True, "upsample": True}, 8255),
    "meissonic": ModelSize("meissonic", _MEISSONIC, 8255),
    "monetico": ModelSize("meissonic", {**_MEISSONIC, "downsample": False, "upsample": False}, 8255),
    "maskgit-256-tiny": _maskgit(16, 384, 6, 6, 1024),
    "maskgit-256-small": _maskgit(16, 512, 12, 6, 1536),
    "maskgit-256-base": _maskgit(16, 768, 12, 12, 2048),
    "maskgit-384-small": _maskgit(24, 512, 12, 6, 1536),
    "maskgit-384-base": _maskgit(24, 768, 12, 12, 2048),
    "maskgit-384-large": _maskgit(24, 1024, 24, 16, 2816),
    "titok-l32": _titok("titok_bert", 32, 768, 24, 16, 3072),
    "titok-b64": _titok("titok_bert", 64, 768, 24, 16, 3072),
    "titok-s128": _titok("titok_uvit", 128, 1024, 20, 16, 4096),
    "maskgen-l": _maskgen(1024, 16, 16, _CLIP_L),
    "maskgen-xl": _maskgen(1280, 20, 16, _CLIP_L),
    "mmada-8b": ModelSize("mmada", {**_LLADA, "vocab_size": 134656}, 126336, _MMADA_TOKENS),
    "showo-256": ModelSize("showo", _PHI, 58497, {**_SHOWO_TOKENS, "sample_size": 16}),
    "showo-512": ModelSize("showo", _PHI, 58497, {**_SHOWO_TOKENS, "sample_size": 32}),
    "lumina-dimoo": ModelSize("lumina", {**_LLADA, "vocab_size": 134548}, 126336, _LUMINA_TOKENS),
    "llada-8b": ModelSize("llada", _LLADA, 126336),
    "dream-7b": ModelSize(
        "dream",
        {
            **{name: value for name, value in _QWEN3.items() if name != "head_dim"},
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
        151666,
        {"shifted": True},
    ),
    "sdar-8b": ModelSize("sdar", _QWEN3, 151669, {"attention": "block_causal", "block_length": 4}),
    "a2d-0.6b": ModelSize("a2d", {**_QWEN3, **_QWEN3_SMALL}, 151669),
    "bert-base": ModelSize("masked_lm:bert", _BERT, 103),
    "modernbert-base": ModelSize(
        "masked_lm:modernbert",
        {**_BERT, "vocab_size": 50368, "intermediate_size": 1152, "num_hidden_layers": 22, "max_position_embeddings": 8192},
        50284,
    ),
    "amused-nano": ModelSize(
        "amused",
        {
            **_AMUSED,
            **_NANO_BLOCKS,
            **dict.fromkeys(("in_channels", "block_out_channels", "encoder_hidden_size", "cond_embed_dim"), 16),
            **{"block_num_heads": 2, "num_res_blocks": 1, "micro_cond_encode_dim": 8, "micro_cond_embed_dim": 40},
            **{"vocab_size": 26, "codebook_size": 24, "sample_size": 4},
        },
        25,
    ),
    "meissonic-nano": ModelSize(
        "meissonic",
        {
            **_MEISSONIC,
            **{"num_layers": 1, "num_single_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2},
            **{"joint_attention_dim": 16, "pooled_projection_dim": 16, "axes_dims_rope": (2, 2, 4)},
            **{"vocab_size": 26, "codebook_size": 24},
        },
        25,
    ),
    "maskgit-nano": _maskgit(4, 16, 2, 2, 24, codes=24),
    "titok-bert-nano": _titok("titok_bert", 16, 16, 2, 2, 24, codes=24),
    "titok-uvit-nano": _titok("titok_uvit", 16, 16, 2, 2, 24, codes=24),
    "maskgen-nano": _maskgen(
        16, 2, 2, {**_CLIP_L, **_NANO_BLOCKS, "vocab_size": 40, "projection_dim": 16}, codes=24, num_tokens=16
    ),
    "mmada-nano": ModelSize(
        "mmada",
        {**_NANO_LLADA, "vocab_size": 84},
        47,
        {
            **{"task_token_id": 43, "image_start_token_id": 44, "image_end_token_id": 45, "pad_token_id": 40},
            **{"image_token_offset": 50, "sample_size": 4},
        },
    ),
    "showo-nano": ModelSize(
        "showo",
        {
            **{**_PHI, **_NANO_TEXT, "num_key_value_heads": 2, "vocab_size": 83},
            **{"image_start_token_id": 44, "image_end_token_id": 45},
        },
        82,
        {
            **{"task_token_id": 43, "image_start_token_id": 44, "image_end_token_id": 45, "pad_token_id": 40},
            **{"image_token_offset": 50, "sample_size": 4},
        },
    ),
    "lumina-nano": ModelSize(
        "lumina",
        {**_NANO_LLADA, "vocab_size": 82},
        47,
        {
            **{"newline_token_id": 46, "image_start_token_id": 41, "image_end_token_id": 42, "answer_start_token_id": 43},
            **{"answer_end_token_id": 44, "image_token_offset": 50, "sample_size": 4},
        },
    ),
    "llada-nano": ModelSize("llada", _NANO_LLADA, 39),
    "dream-nano": ModelSize("dream", _NANO_QWEN, 39, {"shifted": True}),
    "sdar-nano": ModelSize("sdar", {**_NANO_QWEN, "head_dim": 8}, 39, {"attention": "block_causal", "block_length": 4}),
    "bert-nano": ModelSize("masked_lm:bert", _NANO_TEXT, 39),
}
"""By name. A random model has the shapes of its namesake, and so its speed; "nano" ones are for tests of a benchmark itself."""

"""A tiny model of every class of `AutoModelForMaskedLM`, with random weights."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

from helpers.checkpoints_text import random_weights

VOCABULARY = 40
CLASSES: dict[str, tuple[Any, type[PreTrainedModel]]] = {
    config.model_type: (config, kind) for config, kind in MODEL_FOR_MASKED_LM_MAPPING.items()
}

_SPECIAL = {"pad": 0, "unk": 1, "cls": 2, "bos": 2, "sep": 3, "eos": 3, "mask": 4}
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
    **{f"{name}_token_id": number for name, number in _SPECIAL.items()},
    **dict.fromkeys(("hidden_size", "d_model", "dim", "emb_dim", "embedding_size"), 16),
    **dict.fromkeys(("input_embedding_size", "output_embedding_size"), 16),
    **dict.fromkeys(("intermediate_size", "hidden_dim", "d_inner", "feed_forward_size"), 24),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 24),
    **dict.fromkeys(("num_hidden_layers", "n_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_heads", "n_head"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("head_dim", "d_head"), 8),
}
_TEXT = {name: _SIZES[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")}
_TEXT |= {name: _SIZES[name] for name in ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")}
_TEXT |= {name: number for name, number in _SIZES.items() if name.endswith("_token_id")}
_VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
_VISION |= {"image_size": 32, "patch_size": 8}
_OWN: dict[str, dict[str, Any]] = {
    "big_bird": {"block_size": 4},
    "esm": {"position_embedding_type": "rotary", "emb_layer_norm_before": False, "token_dropout": True},
    "funnel": {"block_sizes": [1, 1], "num_decoder_layers": 1},
    "longformer": {"attention_window": [4, 4]},
    "luke": {"entity_vocab_size": 10, "entity_emb_size": 8},
    "mobilebert": {"intra_bottleneck_size": 16, "true_hidden_size": 16, "num_feedforward_networks": 1},
    "modernbert": {"local_attention": 8},
    "modernvbert": {"text_config": {"model_type": "modernbert", **_TEXT}, "vision_config": _VISION, "image_token_id": 5},
    "neomme": {"hidden_size": 32, "head_dim": 16, "patch_size": 4, "num_key_value_heads": 1, "embedding_rank": 8},
    "perceiver": {
        **dict.fromkeys(("d_latents", "qk_channels", "v_channels"), 16),
        **dict.fromkeys(("num_self_attention_heads", "num_cross_attention_heads"), 2),
        **{"num_latents": 4, "num_blocks": 1, "num_self_attends_per_block": 1},
    },
    "reformer": {
        **{"attention_head_size": 8, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [8, 8], "is_decoder": False},
        **{"attn_layers": ["local", "local"], "local_attn_chunk_length": 4},
    },
    "roc_bert": {"pronunciation_vocab_size": 40, "shape_vocab_size": 40, "pronunciation_embed_dim": 8, "shape_embed_dim": 8},
    "ultravbert": {"text_config": {"model_type": "ultrabert", **_TEXT}, "vision_config": _VISION, "image_token_id": 5},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX", "de_DE"]},
}


def tiny_model(model_type: str, **changes: Any) -> PreTrainedModel:
    """A model with random weights."""
    config_class, kind = CLASSES[model_type]
    known = {*config_class().to_dict(), *inspect.signature(config_class.__init__).parameters}
    settings = {name: value for name, value in _SIZES.items() if name in known}
    torch.manual_seed(0)
    return random_weights(kind(config_class(**{**settings, **_OWN.get(model_type, {}), **changes})), seed=6)


def word_tokenizer(ends: bool = True) -> PreTrainedTokenizerFast:
    """[CLS] and [SEP] around a text, or around nothing."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(VOCABULARY - 5))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if ends:
        special = [("[CLS]", 2), ("[SEP]", 3)]
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def write_masked_lm(folder: Path, model_type: str, **changes: Any) -> PreTrainedModel:
    """The model, saved as transformers saves it, with a tokenizer."""
    model = tiny_model(model_type, **changes)
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return model

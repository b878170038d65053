"""Tiny random masked language models in the formats of their publishers, code that must not run included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from helpers.checkpoints import MMADA_CONFIG, llada_tensors, make_word_tokenizer, write_shards

GOLDEN = Path(__file__).parent.parent / "golden"

FORBIDDEN = "raise RuntimeError('code of the checkpoint was run')\n"
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
"""The 256 tokens of every tokenizer here that splits texts into bytes; special tokens follow."""

LLADA_CONFIG = {
    **{name: value for name, value in MMADA_CONFIG.items() if name not in ("codebook_size", "num_vq_tokens", "llm_vocab_size")},
    "architectures": ["LLaDAModelLM"],
    "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModel": "modeling_llada.LLaDAModelLM",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
    },
    "model_type": "llada",
    "eos_token_id": 61,
    "embedding_size": 64,
    "mask_token_id": 60,
    "pad_token_id": 61,
    "transformers_version": "4.46.3",
    "vocab_size": 64,
}
QWEN_SIZES: dict[str, Any] = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 16,
    "initializer_range": 0.02,
    "intermediate_size": 24,
    "max_window_layers": 28,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
}
DREAM_CONFIG = {
    **QWEN_SIZES,
    "architectures": ["DreamModel"],
    "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    "bos_token_id": 256,
    "eos_token_id": 256,
    "mask_token_id": 259,
    "max_position_embeddings": 131072,
    "model_type": "Dream",
    "pad_token_id": 256,
    "tie_word_embeddings": False,
    "transformers_version": "4.46.2",
    "use_cache": True,
    "use_mrope": False,
    "vocab_size": 264,
}
SDAR_CONFIG = {
    **QWEN_SIZES,
    "architectures": ["SDARForCausalLM"],
    "attention_bias": False,
    "auto_map": {
        "AutoConfig": "configuration_sdar.SDARConfig",
        "AutoModel": "modeling_sdar.SDARModel",
        "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
    },
    "block_size": 4,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "fuse_cross_entropy": True,
    "head_dim": 8,
    "max_position_embeddings": 32768,
    "model_type": "sdar",
    "tie_word_embeddings": False,
    "transformers_version": "4.52.3",
    "use_cache": True,
    "vocab_size": 264,
}
MDLM_QWEN3_CONFIG = {
    **{name: value for name, value in SDAR_CONFIG.items() if name not in ("auto_map", "block_size", "fuse_cross_entropy")},
    "architectures": ["A2DQwen3LMHeadModel"],
    "auto_map": {
        "AutoConfig": "modeling_qwen3.A2DQwen3Config",
        "AutoModel": "modeling_qwen3.A2DQwen3LMHeadModel",
        "AutoModelForMaskedLM": "modeling_qwen3.A2DQwen3LMHeadModel",
    },
    "dtype": "bfloat16",
    "layer_types": ["full_attention"] * 2,
    "model_type": "a2d-qwen3",
    "tie_word_embeddings": True,
}
BERT_CONFIG = {
    "architectures": ["BertForMaskedLM"],
    "attention_probs_dropout_prob": 0.1,
    "gradient_checkpointing": False,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 16,
    "initializer_range": 0.02,
    "intermediate_size": 24,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 64,
    "model_type": "bert",
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "transformers_version": "4.6.0.dev0",
    "type_vocab_size": 2,
    "use_cache": True,
    "vocab_size": 40,
}


def random_weights(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every parameter drawn anew, so that none keeps an initial 0 or 1; the model in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 0.5 * noise if parameter.ndim > 1 else 1 + 0.2 * noise
    return model.eval()


def _write_common(folder: Path, config: dict[str, Any], code: tuple[str, ...]) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name in code:
        (folder / name).write_text(FORBIDDEN)


def write_llada(folder: Path, **changes: Any) -> Path:
    """As `GSAI-ML/LLaDA-8B-Instruct`."""
    config = {**LLADA_CONFIG, **changes}
    _write_common(folder, config, ("configuration_llada.py", "modeling_llada.py"))
    write_shards(folder, llada_tensors(config), count=2)
    make_word_tokenizer(64, bos=62, eos=61).save_pretrained(folder)
    return folder


def _qwen_model(config: dict[str, Any], seed: int) -> torch.nn.Module:
    kind, settings = (Qwen2ForCausalLM, Qwen2Config) if config["model_type"] == "Dream" else (Qwen3ForCausalLM, Qwen3Config)
    names = [
        name for name in config if name not in ("auto_map", "architectures", "model_type", "torch_dtype", "dtype", "rope_scaling")
    ]
    return random_weights(kind(settings(**{name: config[name] for name in names})), seed)


def _write_qwen_weights(folder: Path, config: dict[str, Any], seed: int) -> None:
    tensors = _qwen_model(config, seed).state_dict()
    if config["tie_word_embeddings"]:
        tensors.pop("lm_head.weight")
    write_shards(folder, tensors, count=2)


def _write_fast_tokenizer(folder: Path, specials: tuple[str, ...], **roles: str) -> None:
    """tokenizer.json of single bytes, and these special tokens behind them."""
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(BYTES)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name) for name in specials])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>", **roles).save_pretrained(folder)


def _write_byte_tokenizer(folder: Path, specials: tuple[str, ...], tokenizer_class: str, auto_map: str | None) -> None:
    """vocab.json, merges.txt and tokenizer_config.json of Qwen2's tokenizer, without any merge."""
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(BYTES)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    settings: dict[str, Any] = {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(256 + i): {"content": name, **flags} for i, name in enumerate(specials)},
        "additional_special_tokens": list(specials[1:]),
        "bos_token": None,
        "chat_template": "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",
        "clean_up_tokenization_spaces": False,
        "eos_token": specials[0],
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": specials[0],
        "split_special_tokens": False,
        "tokenizer_class": tokenizer_class,
        "unk_token": None,
    }
    if auto_map:
        settings["auto_map"] = {"AutoTokenizer": [auto_map, None]}
        (folder / f"{auto_map.split('.')[0]}.py").write_text(FORBIDDEN)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_dream(folder: Path, **changes: Any) -> Path:
    """As `Dream-org/Dream-v0-Instruct-7B`: no tokenizer.json, and a tokenizer with code."""
    config = {**DREAM_CONFIG, **changes}
    _write_common(folder, config, ("configuration_dream.py", "modeling_dream.py"))
    _write_qwen_weights(folder, config, seed=1)
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>")
    _write_byte_tokenizer(folder, specials, "DreamTokenizer", "tokenization_dream.DreamTokenizer")
    return folder


def write_sdar(folder: Path, **changes: Any) -> Path:
    """As `JetLM/SDAR-8B-Chat` and `Gen-Verse/TraDo-8B-Instruct`; the mask token stands in the tokenizer alone."""
    config = {name: value for name, value in {**SDAR_CONFIG, **changes}.items() if value is not None}
    _write_common(folder, config, ("configuration_sdar.py", "modeling_sdar.py"))
    _write_qwen_weights(folder, config, seed=2)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 256], "pad_token_id": 256}))
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|MASK|>")
    _write_byte_tokenizer(folder, specials, "Qwen2Tokenizer", "tokenization_qwen2.Qwen2Tokenizer")
    return folder


def write_llada2(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """As `inclusionAI/LLaDA2.0-mini`, with the weights of tests/golden; the mask token stands in the tokenizer alone."""
    config = {**json.loads((GOLDEN / "llada2_tiny.json").read_text()), **changes}
    _write_common(folder, config, ("configuration_llada2_moe.py", "modeling_llada2_moe.py"))
    stored = load_file(GOLDEN / "llada2_tiny.safetensors")
    write_shards(folder, {key: value.to(dtype) for key, value in stored.items() if "." in key}, count=3)
    specials = ("<|endoftext|>", "<|startoftext|>", "<|role_end|>", "<|mask|>")
    _write_fast_tokenizer(folder, specials, eos_token="<|endoftext|>")
    return folder


def write_mdlm_qwen3(folder: Path, **changes: Any) -> Path:
    """As `dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1`: tied embeddings, and tokenizer.json with a mask token."""
    config = {**MDLM_QWEN3_CONFIG, **changes}
    _write_common(folder, config, ("modeling_qwen3.py",))
    _write_qwen_weights(folder, config, seed=3)
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>")
    _write_fast_tokenizer(folder, specials, eos_token="<|im_end|>", mask_token="<|mask|>")
    return folder


def write_bert(folder: Path, pickled: bool = False, **changes: Any) -> Path:
    """As `google-bert/bert-base-uncased`: old names of norms, and the heads of other tasks."""
    config = {**BERT_CONFIG, **changes}
    _write_common(folder, config, ())
    settings = {name: value for name, value in config.items() if name not in ("architectures", "model_type")}
    model = random_weights(BertForMaskedLM(BertConfig(**settings)), seed=4)
    tensors = {name: value for name, value in model.state_dict().items() if "decoder" not in name}
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta") for name in tensors}
    assert len(old) == len(tensors)
    tensors = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value.contiguous()
        for name, value in tensors.items()
    }
    tensors |= {
        "bert.pooler.dense.weight": torch.zeros(16, 16),
        "bert.pooler.dense.bias": torch.zeros(16),
        "cls.seq_relationship.weight": torch.zeros(2, 16),
        "cls.seq_relationship.bias": torch.zeros(2),
    }
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cat", *(f"w{i}" for i in range(32))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True, "model_max_length": 64}))
    return folder

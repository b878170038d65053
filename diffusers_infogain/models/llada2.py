"""LLaDA 2.x, a mixture of experts, as transformers' `Glm4MoeForCausalLM`.

Its block is GLM-4.5's under other names: grouped-query attention with norms of queries and keys, rotary embeddings of a part of
each head, experts chosen within groups by sigmoids with a bias, and a shared expert. Published files hold queries, keys and
values in one tensor and every expert in tensors of its own; in memory they are three, and the experts of a layer are one.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from ..checkpoints.configs import require_fields
from ..checkpoints.errors import first_few
from ..checkpoints.weights import Checkpoint, Combination, CombinedCheckpoint
from ..checks import is_integer, shown

KEY_MAPPING = {
    r"^model\.word_embeddings\.": "model.embed_tokens.",
    r"\.attention\.dense\.": ".self_attn.o_proj.",
    r"\.attention\.query_layernorm\.": ".self_attn.q_norm.",
    r"\.attention\.key_layernorm\.": ".self_attn.k_norm.",
    r"\.mlp\.gate\.expert_bias$": ".mlp.gate.e_score_correction_bias",
}
"""The names in `Glm4MoeForCausalLM` of the parts of LLaDA 2's keys; the others are equal."""

# A checkpoint that differs in any of these is another network.
_SUPPORTED = {
    "hidden_act": "silu",
    "use_qkv_bias": False,
    "use_bias": False,
    "use_qk_norm": True,
    "norm_head": False,
    "tie_word_embeddings": False,
    "score_function": "sigmoid",
    "rope_scaling": None,
    "use_sliding_window": False,
}
_COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "moe_intermediate_size",
    "num_experts",
    "num_experts_per_tok",
    "num_shared_experts",
    "n_group",
    "topk_group",
)


def glm4_moe_config(config: Mapping[str, Any], file: Path | str = "config.json") -> Glm4MoeConfig:
    """Converts LLaDA 2's configuration to transformers'.

    Raises:
        ValueError: For a value of a field that means another network, or a number that is missing.
    """
    require_fields(config, _SUPPORTED, file)
    for name in _COUNTS:
        if not (is_integer(config.get(name)) and config[name] > 0):
            raise ValueError(f"{file}: `{name}` must be an integer above 0, got {shown(config.get(name))}.")
    return Glm4MoeConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=config["num_attention_heads"],
        num_key_value_heads=config["num_key_value_heads"],
        head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        max_position_embeddings=config.get("max_position_embeddings", 16384),
        rms_norm_eps=config.get("rms_norm_eps", 1e-5),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": float(config.get("rope_theta", 10000.0)),
            "partial_rotary_factor": config.get("partial_rotary_factor", 0.5),
        },
        attention_bias=False,
        use_qk_norm=True,
        moe_intermediate_size=config["moe_intermediate_size"],
        n_routed_experts=config["num_experts"],
        n_shared_experts=config["num_shared_experts"],
        num_experts_per_tok=config["num_experts_per_tok"],
        n_group=config["n_group"],
        topk_group=config["topk_group"],
        first_k_dense_replace=config.get("first_k_dense_replace", 0),
        routed_scaling_factor=config.get("routed_scaling_factor", 2.5),
        norm_topk_prob=config["num_experts_per_tok"] > 1,  # the published code does not read this field
        tie_word_embeddings=False,
        eos_token_id=config.get("eos_token_id"),
        pad_token_id=config.get("pad_token_id"),
        use_cache=False,
        num_nextn_predict_layers=0,
    )


def combined_tensors(config: Glm4MoeConfig, checkpoint: Checkpoint) -> Checkpoint:
    """The tensors of LLaDA 2, or of a `Glm4MoeForCausalLM` that transformers saved, divided as in memory.

    Raises:
        ValueError: If a part of one is missing.
    """
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    sizes = [config.head_dim * number for number in heads]
    combinations: dict[str, Combination] = {}
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}"
        if f"{name}.self_attn.q_proj.weight" not in checkpoint.shapes:
            for i, part in enumerate("qkv"):
                combine = partial(_part_of_rows, sizes, i)
                combinations[f"{name}.self_attn.{part}_proj.weight"] = Combination(
                    (f"{name}.attention.query_key_value.weight",), combine
                )
        if layer >= config.first_k_dense_replace and f"{name}.mlp.experts.gate_up_proj" not in checkpoint.shapes:
            experts = [f"{name}.mlp.experts.{expert}" for expert in range(config.n_routed_experts)]
            pairs = tuple(f"{expert}.{part}_proj.weight" for expert in experts for part in ("gate", "up"))
            down = tuple(f"{expert}.down_proj.weight" for expert in experts)
            combinations[f"{name}.mlp.experts.gate_up_proj"] = Combination(pairs, _stacked_pairs)
            combinations[f"{name}.mlp.experts.down_proj"] = Combination(down, torch.stack)
    missing = list(dict.fromkeys(key for one in combinations.values() for key in one.keys if key not in checkpoint.shapes))
    if missing:
        raise ValueError(
            f"{checkpoint.described}: {len(missing)} tensors of the {Glm4MoeForCausalLM.__name__} are missing: "
            f"{first_few(missing)}."
        )
    return CombinedCheckpoint(checkpoint, combinations) if combinations else checkpoint


def _part_of_rows(sizes: list[int], index: int, stored: list[torch.Tensor]) -> torch.Tensor:
    (tensor,) = stored
    return tensor.split(sizes)[index]


def _stacked_pairs(stored: list[torch.Tensor]) -> torch.Tensor:
    """(E, 2 I, H) from the two tensors (I, H) of each of E experts."""
    return torch.stack([torch.cat(pair) for pair in zip(stored[::2], stored[1::2], strict=True)])

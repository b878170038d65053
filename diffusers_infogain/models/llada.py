"""LLaDA's language models (LLaDA, MMaDA, Lumina-DiMOO) as transformers' Llama without a causal mask.

Their block is Llama's under other names (RMS norms, rotary embeddings by halves, SwiGLU), but attention is bidirectional.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import torch
from accelerate.utils import align_module_device
from torch.nn.utils.rnn import pad_sequence

# Keep the name `PreTrainedModel` in this module: diffusers looks for it here to find out how to load a component.
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel  # noqa: F401

from ..checkpoints.configs import check_sizes, require_fields
from ..checkpoints.errors import one_sentence
from ..checkpoints.source import ModelSource
from ..checkpoints.weights import find_weights
from ..checks import shown
from ..files import read_json

WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin")
MODEL_TYPES = ("llada", "mmada")

KEY_MAPPING = {
    r"^(?:model\.)?transformer\.(?=(?:wte|ln_f|ff_out|blocks\.\d+\.\w+)\.weight$)": "model.",
    r"^model\.wte\.": "model.embed_tokens.",
    r"^model\.ln_f\.": "model.norm.",
    r"^model\.ff_out\.": "lm_head.",
    r"^model\.blocks\.": "model.layers.",
    r"(layers\.\d+)\.attn_norm\.": r"\1.input_layernorm.",
    r"(layers\.\d+)\.([qkv]_proj)\.": r"\1.self_attn.\2.",
    r"(layers\.\d+)\.attn_out\.": r"\1.self_attn.o_proj.",
    r"(layers\.\d+)\.ff_norm\.": r"\1.post_attention_layernorm.",
    r"(layers\.\d+)\.ff_proj\.": r"\1.mlp.gate_proj.",
    r"(layers\.\d+)\.up_proj\.": r"\1.mlp.up_proj.",
    r"(layers\.\d+)\.ff_out\.": r"\1.mlp.down_proj.",
}
"""The names in `LlamaForCausalLM` of the parts of LLaDA's keys."""

# A checkpoint that differs in any of these is another network.
_SUPPORTED = {
    "block_type": "llama",
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "rope": True,
    "alibi": False,
    "attention_layer_norm": False,
    "input_emb_norm": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "bias_for_layer_norm": False,
    "scale_logits": False,
    "weight_tying": False,
}


def llama_config(config: Mapping[str, Any], file: Path | str = "config.json") -> LlamaConfig:
    """Converts LLaDA's configuration to transformers'; keeps `mask_token_id` and MMaDA's `llm_vocab_size`.

    Raises:
        ValueError: For a model type, or a value of a field, that means another network.
    """
    if config.get("model_type") not in MODEL_TYPES:
        raise ValueError(f"{file}: `model_type` must be one of {', '.join(MODEL_TYPES)}, got {shown(config.get('model_type'))}.")
    require_fields(config, _SUPPORTED, file)
    needed = ("d_model", "n_heads", "n_layers", "mlp_hidden_size", "vocab_size", "mask_token_id")
    for name in needed:
        if not isinstance(config.get(name), int):
            raise ValueError(f"{file}: `{name}` must be an integer, got {shown(config.get(name))}.")
    return LlamaConfig(
        vocab_size=config.get("embedding_size") or config["vocab_size"],
        hidden_size=config["d_model"],
        intermediate_size=config["mlp_hidden_size"],
        num_hidden_layers=config["n_layers"],
        num_attention_heads=config["n_heads"],
        num_key_value_heads=config.get("n_kv_heads") or config["n_heads"],
        max_position_embeddings=config.get("max_sequence_length", 4096),
        rms_norm_eps=config.get("rms_norm_eps", 1e-5),
        rope_theta=config.get("rope_theta", 10000.0),
        attention_bias=False,
        mlp_bias=False,
        tie_word_embeddings=False,
        bos_token_id=config.get("bos_token_id"),
        eos_token_id=config.get("eos_token_id"),
        pad_token_id=config.get("pad_token_id"),
        is_causal=False,
        use_cache=False,
        mask_token_id=config["mask_token_id"],
        llm_vocab_size=config.get("llm_vocab_size"),
    )


@functools.lru_cache(maxsize=16)  # asked for in every pass
def cache_argument(forward: Callable[..., Any]) -> str:
    """The argument of the `forward` of a class of transformers that takes keys and values: versions name it differently."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def count_positions(real: torch.Tensor) -> torch.Tensor:
    """Positions (B, L) of tokens, counted from the first that is not padding; `real` (B, L) is False at padding."""
    return (real.cumsum(-1) - 1).clamp(min=0)


def additive_mask(visible: torch.Tensor, num_queries: int, dtype: torch.dtype) -> torch.Tensor:
    """The mask that transformers adds to attention logits, (B, 1, Q, K), from the keys that each query sees, (B, Q or 1, K) bool.

    The mask is explicit because the meaning of `is_causal=False` depends on the version of transformers.
    """
    hidden = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)
    return hidden[:, None].expand(-1, -1, num_queries, -1)


def is_plain_linear(layer: torch.nn.Module) -> TypeGuard[torch.nn.Linear]:
    """Whether a layer's weight alone is the layer: it is not adapted, quantised, or changed by diffusers' hooks when it runs."""
    return (
        type(layer) is torch.nn.Linear
        and type(layer.weight) is torch.nn.Parameter
        and layer.weight.is_floating_point()
        and not hasattr(layer, "_diffusers_hook")
    )


class VisibleTokensMixin:
    """`forward` of a causal language model of transformers in which tokens see what the class's `visible` says."""

    config: Any
    dtype: torch.dtype
    lm_head: torch.nn.Module
    model: torch.nn.Module

    def visible(self, input_ids: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Which tokens each token sees, (B, L, L) or (B, 1, L) bool; every token sees one, since a query without keys gives NaN.

        Args:
            input_ids: (B, L) long.
            real: (B, L) bool, False at padding.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `visible`.")

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        where: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        token_range: tuple[int, int] | None = None,
        position_ids: torch.Tensor | None = None,
        **cache: Any,
    ) -> torch.Tensor:
        """Logits, at position i for the token at position i.

        Args:
            input_ids: (B, L) long.
            attention_mask: (B, L) bool, False at padding, which no token attends to and which positions do not count; by default
                nothing is padding. Or an additive mask (B, 1, L, K) float, together with `position_ids`.
            where: (B, L) bool, or indices (M,) of samples and of positions. Only these M positions go through the head.
            token_range: (first, last + 1) of the token ids whose logits to compute; all by default.
            position_ids: (B, L) long; by default positions are counted from the first token that is not padding.
            cache: `past_key_values` and `use_cache`, as in transformers' class.

        Returns:
            (B, L, V), or (M, V) with `where`, in row-major order.
        """
        if attention_mask is None:
            attention_mask = torch.ones(input_ids.shape, dtype=torch.bool, device=input_ids.device)
        if attention_mask.ndim == 2:
            position_ids = count_positions(attention_mask) if position_ids is None else position_ids
            attention_mask = additive_mask(self.visible(input_ids, attention_mask), input_ids.shape[1], self.dtype)
        states = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **{"use_cache": False, **cache}
        ).last_hidden_state
        return token_logits(self.lm_head, states if where is None else states_at(states, where), token_range)


class BidirectionalLlama(VisibleTokensMixin, LlamaForCausalLM):
    """LLaDA's network: transformers' Llama with bidirectional attention.

    `from_pretrained` reads what `convert` or `save_pretrained` wrote; `open_llada` reads LLaDA's own format.
    """

    def visible(self, input_ids: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """All of them but padding, (B, 1, L) bool. Padding is hidden as keys only, so that it sees something itself."""
        return real[:, None, :]


def states_at(states: torch.Tensor, where: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Hidden states (M, D) of states (B, L, D), at M positions that may be named on another device: layers may lie on several."""
    at = where if isinstance(where, tuple) else (where,)
    return states[tuple(index.to(states.device) for index in at)]


def token_logits(head: torch.nn.Module, states: torch.Tensor, token_range: tuple[int, int] | None) -> torch.Tensor:
    """Logits of hidden states (..., D) for the token ids of `token_range` (first, last + 1), and no others; None for all."""
    if token_range is None:
        return head(states)
    first, last = token_range
    if not is_plain_linear(head):  # adapted or quantised: the weight alone is not the layer
        return head(states)[..., first:last]
    with align_module_device(head):
        bias = None if head.bias is None else head.bias[first:last]
        return torch.nn.functional.linear(states.to(head.weight.device), head.weight[first:last], bias)


def check_image_tokens(image_token_offset: int, codebook_size: int, vocab_size: int) -> None:
    """Raises a ValueError if the vocabulary ends before the last image token."""
    if image_token_offset + codebook_size > vocab_size:
        raise ValueError(
            f"`image_token_offset` {image_token_offset} and the {codebook_size} codes of `vqvae` do not fit into the vocabulary "
            f"of {vocab_size} tokens of `transformer`: `vqvae` and `transformer` come from different models."
        )


def pad_prompts(prompts: Sequence[Sequence[int]], pad_token_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Pads prompts of different lengths on the left.

    Returns:
        Ids (R, P) long, and a mask (R, P) bool, False at padding.
    """
    ids = [torch.tensor(prompt, dtype=torch.long, device=device) for prompt in prompts]
    pad = functools.partial(pad_sequence, batch_first=True, padding_side="left")
    return pad(ids, padding_value=pad_token_id), pad([torch.ones_like(prompt, dtype=torch.bool) for prompt in ids])


def predict_after_prompts(
    transformer: BidirectionalLlama,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    input_ids: torch.Tensor,
    where: torch.Tensor,
    token_range: tuple[int, int],
) -> torch.Tensor:
    """Logits at positions after a prompt, without ever computing those of the whole vocabulary.

    Args:
        transformer: The model.
        prompt_ids, prompt_mask: (B, P) each, from `pad_prompts`.
        input_ids: (B, L) long, the tokens after the prompts.
        where: (B, L) bool, the positions whose logits to compute.
        token_range: (first, last + 1) of the token ids whose logits to compute.

    Returns:
        (M, V) for the M positions of `where`, in row-major order.
    """
    # Columns that are padding for all samples are dropped, so a single prompt is never padded.
    first = int((~prompt_mask).all(0).sum())
    prompt_ids, prompt_mask = prompt_ids[:, first:], prompt_mask[:, first:]
    all_real = torch.ones_like(input_ids, dtype=torch.bool)
    return transformer(
        torch.cat([prompt_ids, input_ids], dim=1),
        None if prompt_mask.all() else torch.cat([prompt_mask, all_real], dim=1),
        where=torch.nn.functional.pad(where, (prompt_ids.shape[1], 0)),
        token_range=token_range,
    )


def open_llada(folder: Path) -> ModelSource:
    """Opens the language model of a repository in LLaDA's format.

    Raises:
        ValueError: As in `llama_config` and `find_weights`.
    """
    file = folder / "config.json"
    settings = read_json(file)
    weights = find_weights(folder, WEIGHT_NAMES)
    check_sizes(settings, weights, file)
    with one_sentence(str(file)):
        config = llama_config(settings, file)
    return ModelSource(weights, lambda: BidirectionalLlama(config), _probe, KEY_MAPPING)


@torch.no_grad()
def _probe(model: BidirectionalLlama) -> torch.Tensor:
    tokens = torch.arange(8)[None] * 11 % model.config.vocab_size
    return model(tokens, where=tokens % 3 == 0)

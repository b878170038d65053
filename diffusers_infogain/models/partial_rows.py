"""Rows of a transformer that run at some positions only, with what earlier rows have left of the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UVit2DModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.embeddings import get_timestep_embedding
from transformers import DynamicCache

from .llada import BidirectionalLlama, additive_mask, cache_argument, count_positions

Features = dict[int, tuple[torch.Tensor, ...]]
"""What rows have left in each layer, with one entry per slot: keys and values (slots, heads, P, d), for instance."""


@dataclass(frozen=True)
class PartialRows:
    """Which positions of R rows run, and what takes the place of the others. P positions.

    Attributes:
        features: What is kept, which rows that are kept change.
        num_slots: How many rows can be kept.
        slots: (R,) long, where what is kept for each row is, if only some of its positions run.
        kept: Rows, and the slots (K,) where their features are kept from now on, all different: two long tensors (K,).
        run: (R, P) bool, the positions that run; None for all, which needs no features.
    """

    features: Features
    num_slots: int
    slots: torch.Tensor
    kept: tuple[torch.Tensor, torch.Tensor]
    run: torch.Tensor | None

    def index(self) -> torch.Tensor | None:
        """(R, Q) long, the positions that run; a row with less than the longest names its first one several times."""
        if self.run is None:
            return None
        count = self.run.sum(-1)
        order = (~self.run).long().argsort(dim=-1, stable=True)[:, : int(count.max())]
        # Never another position: what a row runs must not depend on the rows beside it.
        real = torch.arange(order.shape[1], device=order.device) < count[:, None]
        return torch.where(real, order, order[:, :1])

    def exchange(self, layer: int, index: torch.Tensor | None, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Tensors (R, heads, Q, d) at the positions `index` (R, Q) with what is kept of the others, (R, heads, P, d)."""
        if index is not None:
            whole = [feature[self.slots] for feature in self.features[layer]]
            tensors = tuple(
                rest.scatter_(2, index[:, None, :, None].expand(tensor.shape), tensor)
                for rest, tensor in zip(whole, tensors, strict=True)
            )
        if layer not in self.features and len(self.kept[0]):
            self.features[layer] = tuple(tensor.new_zeros(self.num_slots, *tensor.shape[1:]) for tensor in tensors)
        kept_rows, kept_slots = self.kept
        if len(kept_rows):
            for feature, tensor in zip(self.features[layer], tensors, strict=True):
                feature[kept_slots] = tensor[kept_rows]
        return tensors

    def once(self, layer: int, compute: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
        """Tensors (R, ...) that depend on no token: computed in full rows, kept for others."""
        if self.run is not None:
            return tuple(feature[self.slots] for feature in self.features[layer])
        return self.exchange(layer, None, *compute())


class _ExchangingCache(DynamicCache):
    """The keys and values of `PartialRows`, as attention layers of transformers ask for them."""

    def __init__(self, rows: PartialRows, index: torch.Tensor | None):
        super().__init__()
        self._rows, self._index = rows, index

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, ...]:
        return self._rows.exchange(layer_idx, self._index, key_states, value_states)

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return 0


def run_llama(
    transformer: BidirectionalLlama,
    ids: torch.Tensor,
    real: torch.Tensor,
    where: torch.Tensor,
    token_range: tuple[int, int],
    rows: PartialRows,
) -> torch.Tensor:
    """Logits of sequences, of which some positions run.

    Args:
        transformer: The model.
        ids: (R, P) long.
        real: (R, P) bool, False at padding, which is on the left.
        where: (R, P) bool, the positions whose logits to compute, all of which run.
        token_range: (first, last + 1) of the token ids whose logits to compute.
        rows: What runs.

    Returns:
        (M, V) for the M positions of `where`, in row-major order.
    """
    index, positions = rows.index(), count_positions(real)
    visible = transformer.visible(ids, real)
    if index is not None:
        if visible.shape[1] > 1:  # not alike for all tokens
            visible = visible.gather(1, index[..., None].expand(-1, -1, visible.shape[-1]))
        ids, positions, where = ids.gather(1, index), positions.gather(1, index), where.gather(1, index)
        where = where & (torch.arange(index.shape[1], device=index.device) < rows.run.sum(-1, keepdim=True))  # type: ignore[union-attr]
    cache = {cache_argument(type(transformer.model).forward): _ExchangingCache(rows, index)}
    mask = additive_mask(visible, ids.shape[1], transformer.dtype)
    return transformer(ids, mask, where=where, token_range=token_range, position_ids=positions, **cache)


def check_uvit(transformer: UVit2DModel) -> None:
    """Raises a ValueError if attention is not diffusers' own, which alone can be run at some positions."""
    for processor in transformer.attn_processors.values():
        if type(processor) not in (AttnProcessor, AttnProcessor2_0):
            raise ValueError(
                f"`approximate_cache` needs diffusers' own attention processors in `transformer`, got a "
                f"{type(processor).__name__}."
            )


def run_uvit(
    transformer: UVit2DModel,
    tokens: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    pooled_text_emb: torch.Tensor,
    micro_conds: torch.Tensor,
    where: torch.Tensor,
    rows: PartialRows,
) -> torch.Tensor:
    """Logits of states, of which some positions run through the transformer layers.

    The convolutional blocks before and after them run everywhere, because their norm is over all positions.

    Args:
        transformer: The model; the arguments that follow are its own.
        tokens: (R, h, w) long.
        encoder_hidden_states: (R, S, D).
        pooled_text_emb: (R, E).
        micro_conds: (R, 5).
        where: (R, h * w) bool, the positions whose logits to compute.
        rows: What runs, of the h * w positions.

    Returns:
        (M, V) for the M positions of `where`, in row-major order.
    """
    hook = getattr(transformer, "_hf_hook", None)
    if hook is not None:  # of offloading, which otherwise runs only in `forward`
        hook.pre_forward(transformer)
    config = transformer.config
    texts = transformer.encoder_proj_layer_norm(transformer.encoder_proj(encoder_hidden_states))
    sizes = get_timestep_embedding(
        micro_conds.flatten(), config.micro_cond_encode_dim, flip_sin_to_cos=True, downscale_freq_shift=0
    )
    pooled = torch.cat([pooled_text_emb, sizes.reshape(len(tokens), -1)], dim=1).to(transformer.dtype)
    pooled = transformer.cond_embed(pooled).to(texts.dtype)
    blocks = {"pooled_text_emb": pooled, "encoder_hidden_states": texts, "cross_attention_kwargs": None}
    image = transformer.down_block(transformer.embed(tokens), **blocks)
    num_rows, channels, height, width = image.shape
    if rows.run is not None and height < tokens.shape[1]:  # a position of the layers is a square of tokens
        run = torch.nn.functional.max_pool2d(rows.run.unflatten(1, tokens.shape[1:]).float(), tokens.shape[1] // height)
        rows = PartialRows(rows.features, rows.num_slots, rows.slots, rows.kept, run.flatten(1).bool())
    index = rows.index()
    states = image.permute(0, 2, 3, 1).flatten(1, 2)
    if index is not None:
        states = _at(states, index)
    states = transformer.project_to_hidden(transformer.project_to_hidden_norm(states))
    for number, layer in enumerate(transformer.transformer_layers):
        states = _run_layer(layer, number, states, texts, pooled, rows, index)
    states = transformer.project_from_hidden(transformer.project_from_hidden_norm(states))
    (whole,) = rows.exchange(-1, index, states[:, None])
    if not where.any():
        return states.new_zeros(0, config.codebook_size)
    image = whole[:, 0].reshape(num_rows, height, width, channels).permute(0, 3, 1, 2)
    image = transformer.up_block(image, **blocks)
    wanted = image.permute(0, 2, 3, 1).flatten(1, 2)[where]
    # The head sees each position by itself: the wanted ones as a picture of their own.
    return transformer.mlm_layer(wanted.T[None, :, :, None])[0, :, :, 0].T


def _at(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The positions `index` (R, Q) of states (R, P, D)."""
    return states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))


def _heads(attention: Attention, states: torch.Tensor) -> torch.Tensor:
    """(R, Q, heads · d) as (R, heads, Q, d)."""
    return states.unflatten(-1, (attention.heads, -1)).transpose(1, 2)


def _attend(attention: Attention, states: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    query = _heads(attention, attention.to_q(states))
    seen = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    return attention.to_out[1](attention.to_out[0](seen.transpose(1, 2).flatten(2))) / attention.rescale_output_factor


def _keys_and_values(attention: Attention, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _heads(attention, attention.to_k(states)), _heads(attention, attention.to_v(states))


def _run_layer(
    layer: BasicTransformerBlock,
    number: int,
    states: torch.Tensor,
    texts: torch.Tensor,
    pooled: torch.Tensor,
    rows: PartialRows,
    index: torch.Tensor | None,
) -> torch.Tensor:
    """States (R, Q, D) after a layer of `UVit2DModel`."""
    normed = layer.norm1(states, pooled)
    keys, values = rows.exchange(2 * number, index, *_keys_and_values(layer.attn1, normed))
    states = states + _attend(layer.attn1, normed, keys, values)
    keys, values = rows.once(2 * number + 1, lambda: _keys_and_values(layer.attn2, texts))
    states = states + _attend(layer.attn2, layer.norm2(states, pooled), keys, values)
    return states + layer.ff(layer.norm3(states, pooled))

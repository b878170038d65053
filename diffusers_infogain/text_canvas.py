"""The layout of a batch of texts: prompts, masks and padding in columns, and the blocks and steps in which they are decoded.

Nothing here needs a model, a tensor or a random number: token ids and numbers go in, a `TextCanvas` comes out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BlockGroup:
    """Texts whose parts of a block are decoded as one batch.

    The random numbers of a decoding depend on its width and its number of steps. Both must be what they are for a text alone, so
    texts that differ in either are decoded apart.

    Attributes:
        sample_index: The texts of the batch, in ascending order.
        start, end: Columns `start` to `end` (exclusive).
        num_steps: Steps in which the group is decoded.
    """

    sample_index: tuple[int, ...]
    start: int
    end: int
    num_steps: int


@dataclass(frozen=True)
class TextCanvas:
    """B texts in L columns.

    Attributes:
        tokens: (B, L) ids: prompts, masks to be decoded, and padding.
        attention_mask: (B, L), False at padding.
        new_starts: (B,) columns of the first new token, just behind the prompt.
        new_end: The column behind the last new token; the end tokens of an encoder's prompt follow.
        infilled: (B,), whether the prompt itself holds masks.
        blocks: From left to right, each with the groups that are decoded one after the other. A block ends in the same column
            for all its groups.
    """

    tokens: list[list[int]]
    attention_mask: list[list[bool]]
    new_starts: list[int]
    new_end: int
    infilled: list[bool]
    blocks: list[list[BlockGroup]]


def share_steps(num_masks: Sequence[int], num_inference_steps: int | None, tokens_per_step: int) -> list[int]:
    """Steps for each block of one text, at most one for each mask.

    Args:
        num_masks: Masks of the text's blocks, at least one in each.
        num_inference_steps: Steps for the whole text, at least one for each block. They are shared evenly; earlier blocks get
            what is left over.
        tokens_per_step: Used if `num_inference_steps` is None.
    """
    if num_inference_steps is None:
        return [math.ceil(masks / tokens_per_step) for masks in num_masks]
    steps, left_over = divmod(num_inference_steps, max(len(num_masks), 1))
    return [min(steps + (block < left_over), masks) for block, masks in enumerate(num_masks)]


def lay_out(
    prompts: Sequence[Sequence[int]],
    *,
    mask_token_id: int,
    pad_token_id: int | None,
    max_new_tokens: int,
    num_end_tokens: int = 0,
    block_length: int | None = None,
    from_first_token: bool = False,
    num_inference_steps: int | None = None,
    tokens_per_step: int = 1,
) -> TextCanvas:
    """Lays out prompts, each with `max_new_tokens` masks behind it, and plans their decoding.

    Args:
        prompts: Token ids of B prompts. Masks among them are decoded too.
        mask_token_id: The token to be decoded.
        pad_token_id: Fills up shorter texts; any other token if this is None or the mask, which would be decoded.
        max_new_tokens: New tokens of each text.
        num_end_tokens: Tokens at the end of each prompt that stay behind the new ones, such as an encoder's [SEP].
        block_length: Columns of a block; by default all new tokens are one block.
        from_first_token: Whether blocks are counted from the first token of a text, as block-causal models need it, and texts are
            padded on the right. Otherwise blocks are counted from the end of the prompts, which end in one column since texts are
            padded on the left.
        num_inference_steps, tokens_per_step: As in `share_steps`.

    Raises:
        ValueError: If `num_inference_steps` is less than the blocks of a text.
    """
    if pad_token_id is None or pad_token_id == mask_token_id:
        pad_token_id = int(mask_token_id == 0)
    block_length = block_length or max(max_new_tokens, 1)
    prompt_ends = [len(prompt) - num_end_tokens for prompt in prompts]
    masks = [mask_token_id] * max_new_tokens
    texts = [[*prompt[:end], *masks, *prompt[end:]] for prompt, end in zip(prompts, prompt_ends, strict=True)]
    infilled = [mask_token_id in prompt for prompt in prompts]
    length = max(map(len, texts))
    if from_first_token:
        # Whole blocks only: the last block is then as wide for a text alone as in any batch.
        length = math.ceil(length / block_length) * block_length
    new_end = length - num_end_tokens

    def padded(values: list[Any], fill: Any) -> list[Any]:
        padding = [fill] * (length - len(values))
        return [*values, *padding] if from_first_token else [*padding, *values]

    if from_first_token:
        new_starts = prompt_ends
        first_columns = [0] * len(texts)
        borders = [*range(0, new_end, block_length), new_end]
    else:
        new_start = new_end - max_new_tokens
        new_starts = [new_start] * len(texts)
        # Masks within a prompt belong to the first block, which for that text begins with its prompt.
        first_columns = [length - len(text) if own else new_start for text, own in zip(texts, infilled, strict=True)]
        borders = [min(first_columns), *range(new_start + block_length, new_end, block_length), new_end]
    tokens = [padded(text, pad_token_id) for text in texts]
    attention_mask = [padded([True] * len(text), False) for text in texts]
    blocks = _plan(tokens, mask_token_id, first_columns, borders, num_inference_steps, tokens_per_step)
    return TextCanvas(tokens, attention_mask, new_starts, new_end, infilled, blocks)


def _plan(
    tokens: Sequence[Sequence[int]],
    mask_token_id: int,
    first_columns: Sequence[int],
    borders: Sequence[int],
    num_inference_steps: int | None,
    tokens_per_step: int,
) -> list[list[BlockGroup]]:
    """The groups of every block, from border to border, that holds masks; a text takes part from its first column on."""
    spans = list(itertools.pairwise(borders))
    num_masks = [[ids[start:end].count(mask_token_id) for start, end in spans] for ids in tokens]
    num_blocks = max(sum(masks > 0 for masks in counts) for counts in num_masks)
    if num_inference_steps is not None and num_inference_steps < num_blocks:
        raise ValueError(
            f"`num_inference_steps` must be at least 1 for each of the {num_blocks} blocks, got {num_inference_steps}."
        )
    blocks: list[dict[tuple[int, int], list[int]]] = [{} for _ in spans]
    for sample_index, counts in enumerate(num_masks):
        own_blocks = [block for block, masks in enumerate(counts) if masks]
        own_steps = share_steps([counts[block] for block in own_blocks], num_inference_steps, tokens_per_step)
        for block, num_steps in zip(own_blocks, own_steps, strict=True):
            start = max(spans[block][0], first_columns[sample_index])
            blocks[block].setdefault((start, num_steps), []).append(sample_index)
    return [
        [BlockGroup(tuple(samples), start, end, num_steps) for (start, num_steps), samples in sorted(groups.items())]
        for groups, (_, end) in zip(blocks, spans, strict=True)
        if groups
    ]

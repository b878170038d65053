"""How often each token occurs in reference text: the file that the rule "pc_sampler" reads."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from .checks import check_integer
from .files import replacing


def token_frequencies(token_ids: Iterable[Sequence[int]], vocab_size: int) -> torch.Tensor:
    """The share of each token in all sequences together, (vocab_size,) float32; the numbers add up to 1.

    Args:
        token_ids: Sequences of token ids, read one by one.
        vocab_size: V, the number of the model's logits.

    Raises:
        ValueError: If there is no token at all, or one outside the vocabulary.
    """
    check_integer("vocab_size", vocab_size, 1)
    counts = torch.zeros(vocab_size, dtype=torch.long)
    sequences = iter(token_ids)
    while part := list(itertools.islice(sequences, 1024)):  # together, since counting takes O(V)
        try:
            ids = torch.cat([torch.as_tensor(sequence) for sequence in part if len(sequence)] or [counts[:0]])
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"`token_ids` must be sequences of token ids, got others: {error}.") from error
        if ids.is_floating_point() or ids.ndim != 1:
            raise ValueError(f"`token_ids` must be sequences of integers, got {ids.dtype} of {ids.ndim} dimensions.")
        outside = ids[(ids < 0) | (ids >= vocab_size)]
        if len(outside):
            raise ValueError(f"`token_ids` must be in [0, {vocab_size}), got {int(outside[0])}.")
        counts += torch.bincount(ids, minlength=vocab_size)
    if not counts.any():
        raise ValueError("`token_ids` must hold at least one token, got none.")
    return (counts.double() / counts.sum()).float()


def save_token_frequencies(frequencies: torch.Tensor, path: str | Path) -> None:
    """Writes frequencies (V,) atomically, as a safetensors file with the float32 tensor "frequencies".

    ```python
    from diffusers_infogain.token_frequencies import save_token_frequencies, token_frequencies

    texts = (tokenizer(text)["input_ids"] for text in corpus)
    save_token_frequencies(token_frequencies(texts, vocab_size), "frequencies.safetensors")
    scheduler = InfoGainScheduler(mask_token_id, sampler="pc_sampler", pc_frequencies="frequencies.safetensors")
    ```

    Raises:
        ValueError: If they are not float32 of one dimension, in [0, 1] and not all 0.
    """
    if frequencies.ndim != 1 or frequencies.dtype != torch.float32:
        raise ValueError(f"`frequencies` must be float32 of shape (V,), got {frequencies.dtype} {tuple(frequencies.shape)}.")
    if not ((frequencies >= 0) & (frequencies <= 1)).all() or not frequencies.any():
        raise ValueError("`frequencies` must be numbers in [0, 1], not all of them 0.")
    with replacing(Path(path)) as file:
        file.write(save({"frequencies": frequencies.cpu().contiguous()}))


def read_surprisals(path: str | None) -> torch.Tensor:
    """-log f (V,) of the reference frequencies f in a file; a token that never occurs counts as the rarest one that does.

    Raises:
        ValueError: If there is no path, or the file holds anything else.
        FileNotFoundError: If there is no such file.
    """
    if path is None:
        raise ValueError(
            "`pc_frequencies` must be the path of a file with token frequencies for the rule 'pc_sampler', got None: build one "
            "with `token_frequencies` and `save_token_frequencies` of diffusers_infogain.token_frequencies."
        )
    return _read_surprisals(path, os.stat(path).st_mtime_ns)


@functools.lru_cache(maxsize=4)  # every call of a pipeline asks for them
def _read_surprisals(path: str, modified: int) -> torch.Tensor:
    try:
        frequencies = load_file(path).get("frequencies")
    except SafetensorError as error:
        raise ValueError(f"`pc_frequencies` must be the path of a safetensors file, got {path!r}: {error}.") from error
    if frequencies is None or frequencies.ndim != 1 or frequencies.dtype != torch.float32:
        got = "none" if frequencies is None else f"{frequencies.dtype} {tuple(frequencies.shape)}"
        raise ValueError(f'`pc_frequencies` must hold a float32 tensor "frequencies" of shape (V,), got {got} in {path!r}.')
    if not ((frequencies >= 0) & (frequencies <= 1)).all() or not frequencies.any():
        raise ValueError(f"`pc_frequencies` must hold numbers in [0, 1], not all of them 0, got others in {path!r}.")
    return -frequencies.clamp(min=frequencies[frequencies > 0].min()).log()

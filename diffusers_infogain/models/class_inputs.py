"""Checks of what transformers from classes to images are given."""

from __future__ import annotations

import torch


def check_class_inputs(
    tokens: torch.Tensor,
    class_labels: torch.Tensor,
    where: torch.Tensor | None,
    *,
    length: int,
    last_token: int,
    num_classes: int,
) -> None:
    """Checks the arguments of a forward pass; their values only where it is not being compiled.

    Args:
        tokens: (B, `length`), in [0, `last_token`].
        class_labels: (B,), in [0, `num_classes`], which stands for no class.
        where: (B, `length`) bool, or None.

    Raises:
        ValueError: For the first that does not fit.
    """
    if tokens.ndim != 2 or tokens.shape[1] != length:
        raise ValueError(f"`tokens` must have the shape (batch, {length}), got {tuple(tokens.shape)}.")
    if class_labels.shape != tokens.shape[:1]:
        raise ValueError(f"`class_labels` must have the shape ({len(tokens)},), got {tuple(class_labels.shape)}.")
    if where is not None and (where.dtype != torch.bool or where.shape != tokens.shape):
        raise ValueError(f"`where` must be bool of shape {tuple(tokens.shape)}, got {where.dtype} {tuple(where.shape)}.")
    if torch.compiler.is_compiling() or tokens.numel() == 0:
        return
    low, high, first, last = torch.stack([*tokens.aminmax(), *class_labels.to(tokens).aminmax()]).tolist()
    if low < 0 or high > last_token:
        raise ValueError(f"`tokens` must be in [0, {last_token}], got {low if low < 0 else high}.")
    if first < 0 or last > num_classes:
        raise ValueError(
            f"`class_labels` must be in [0, {num_classes}] ({num_classes} for no class), got {first if first < 0 else last}."
        )

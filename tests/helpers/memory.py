"""Sizes of the tensors that a model makes."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LargestTensors(TorchDispatchMode):
    """The most elements of any tensor that an operation makes, views of weights apart, by the size of its last dimension."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.elements: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.ndim and value.untyped_storage().data_ptr() not in self.weights:
                self.elements[value.shape[-1]] = max(self.elements.get(value.shape[-1], 0), value.numel())
        return result

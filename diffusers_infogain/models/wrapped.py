"""Finds the model inside wrappers of `torch.compile`, peft and data parallelism."""

from __future__ import annotations

from typing import Any

import torch
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import PreTrainedModel


def underlying(model: Any) -> PreTrainedModel:
    """The transformers model inside wrappers, which may be nested in any order.

    Raises:
        ValueError: If there is none, or if peft puts tokens before the text, which would shift positions.
    """
    inner = model
    while not isinstance(inner, PreTrainedModel):
        if isinstance(inner, OptimizedModule):
            inner = inner._orig_mod
        elif hasattr(inner, "get_base_model"):  # peft, which is optional
            if inner.active_peft_config.is_prompt_learning:
                raise ValueError(
                    f"`model` must keep the text's own positions, got a model of peft with a "
                    f"{type(inner.active_peft_config).__name__}, which puts tokens before it."
                )
            inner = inner.get_base_model()
        elif isinstance(getattr(inner, "module", None), torch.nn.Module):
            inner = inner.module
        else:
            raise ValueError(
                f"`model` must be a model of transformers, alone or as torch.compile, peft or DataParallel wrapped it, got "
                f"{type(model).__name__}."
            )
    return inner


def compiled(model: Any) -> OptimizedModule | None:
    """The outermost compiled module, which has to be called for its graph to be used, or None.

    Data-parallel wrappers around it are skipped.
    """
    while isinstance(model, (DataParallel, DistributedDataParallel)):
        model = model.module
    return model if isinstance(model, OptimizedModule) else None

"""Networks of text models as `TextCache` calls them: logits at the positions that are wanted, and at no others."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from .llada import BidirectionalLlama, cache_argument
from .wrapped import compiled, underlying

Positions = tuple[torch.Tensor, torch.Tensor]
"""M positions in a batch of sequences: which sequence, and which column of it, (M,) long each."""

SEES_PADDING = ("convbert", "funnel", "mobilebert", "nystromformer", "reformer", "yoso")
"""Model types that read padding whatever the attention mask says, through convolution, pooling or segments. Sequences of
different lengths are run apart."""


class TextNetwork:
    """A text model, perhaps wrapped. What its architecture says is looked up once, and nothing in it is changed.

    Args:
        model: From `open_text_model`, or as torch.compile, peft or data-parallel classes wrapped it.

    Raises:
        ValueError: If there is no model of transformers in it.
    """

    def __init__(self, model: Any):
        self.inner: PreTrainedModel = underlying(model)
        self._compiled = compiled(model)
        # Hooks that move weights or inputs call the module that they were made for, of which no copy can be narrowed.
        self._hooked = any(hasattr(self.inner, name) for name in ("_hf_hook", "_diffusers_hook"))
        self._path_to_head = _path_to_head(self.inner)
        self._keeps_columns = "logits_to_keep" in inspect.signature(type(self.inner).forward).parameters

    def decoder_logits(
        self, input_ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, read_at: Positions, cache: DynamicCache | None
    ) -> torch.Tensor:
        """Outputs (M, V) of a Llama, Qwen2 or Qwen3; the keys and values of the input are appended to `cache`.

        Args:
            input_ids: (R, Q) long.
            mask: Added to attention logits, (R or 1, 1, Q, K).
            positions: (R or 1, Q) long.
            read_at: The M positions.
            cache: Keys and values that come before those of the input.
        """
        arguments: dict[str, Any] = {"attention_mask": mask, "position_ids": positions, "use_cache": cache is not None}
        if cache is not None:
            arguments[cache_argument(type(self.inner.base_model).forward)] = cache
        return self._logits_at(read_at, input_ids=input_ids, **arguments)

    def encoder_logits(self, input_ids: torch.Tensor, real: torch.Tensor, read_at: Positions) -> torch.Tensor:
        """Outputs (M, V) of an `AutoModelForMaskedLM`.

        Args:
            input_ids: (R, L) long, with padding on the right only, where all architectures count positions as trained.
            real: (R, L) bool, False at padding.
            read_at: The M positions.
        """
        if self.inner.config.model_type not in SEES_PADDING:
            return self._logits_at(read_at, input_ids=input_ids, attention_mask=real.long())
        sequences, columns = read_at
        lengths = real.sum(-1)
        parts, parts_of = [], []
        for length in lengths.unique().tolist():
            same_length = lengths == length
            ids = input_ids[same_length, :length]
            own = same_length[sequences].nonzero()[:, 0]  # those of the M positions that lie in these sequences
            number = same_length.cumsum(0) - 1  # of a sequence among these
            at = number[sequences[own]], columns[own]
            parts.append(self._logits_at(at, input_ids=ids, attention_mask=torch.ones_like(ids)))
            parts_of.append(own)
        return torch.cat(parts)[torch.cat(parts_of).argsort()]

    def _logits_at(self, read_at: Positions, **arguments: Any) -> torch.Tensor:
        """Outputs (M, V). If the architecture allows it, only these positions go through the output embeddings."""
        own = self.inner if self._compiled is None and self._hooked else self._compiled
        if isinstance(self.inner, BidirectionalLlama):
            return (self.inner if own is None else own)(where=read_at, **arguments)
        if own is None:
            logits = self._narrowed(read_at, arguments["input_ids"].shape)(**arguments).logits
            return logits if logits.ndim == 2 else logits[read_at]
        if not self._keeps_columns:
            return own(**arguments).logits[read_at]
        # What was compiled or has hooks cannot be narrowed; it is asked for all columns in which any position is wanted.
        sequences, columns = read_at
        kept, kept_columns = columns.unique(return_inverse=True)
        return own(logits_to_keep=kept, **arguments).logits[sequences, kept_columns]

    def _narrowed(self, read_at: Positions, shape: torch.Size) -> PreTrainedModel:
        """The model with its output embeddings applied to some positions only; as it is if it has none.

        Neither copies nor changes anything that other calls may be using at the same time: only the few modules that lead to
        the output embeddings are other objects, with the same contents.
        """
        if not self._path_to_head:
            return self.inner
        narrowed: Any = _shallow(self.inner)
        parent, (*owners, last) = narrowed, self._path_to_head
        for name in owners:
            parent._modules[name] = _shallow(parent._modules[name])
            parent = parent._modules[name]
        parent._modules[last] = _HeadAtPositions(parent._modules[last], read_at, shape)
        return narrowed


class _HeadAtPositions(torch.nn.Module):
    """The output embeddings of a model, applied to some positions of its input only."""

    def __init__(self, head: torch.nn.Module, read_at: Positions, shape: torch.Size):
        super().__init__()
        self.head = head
        self.read_at = read_at
        self.shape = shape

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.head, name)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(R, L, H) to (M, V)."""
        return self.head(states[self.read_at] if states.shape[:-1] == self.shape else states)


def _path_to_head(model: PreTrainedModel) -> list[str]:
    """The names of the modules that lead to a model's output embeddings, from the top; empty if it has none."""
    head = model.get_output_embeddings()
    path = next((name for name, module in model.named_modules() if module is head), "") if head is not None else ""
    return path.split(".") if path else []


def _shallow(module: Any) -> Any:
    shallow = copy.copy(module)
    shallow._modules = dict(module._modules)
    return shallow

"""Logits of masked language models where they are wanted, and key/value caches for decoding block after block."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from ..choices import CACHES
from .llada import BidirectionalLlama, additive_mask, count_positions
from .text import TextFamily
from .wrapped import compiled, underlying

Places = tuple[torch.Tensor, torch.Tensor]
"""Rows and columns, each (M,) long."""

SEES_PADDING = ("convbert", "funnel", "mobilebert", "nystromformer", "reformer", "yoso")
"""Model types whose layers read padding whatever the attention mask says: by convolution, pooling or segments. Their texts of
different lengths are run apart."""


def fitting_caches(family: TextFamily) -> tuple[str, ...]:
    """The kinds of `TextCache` that go with a family."""
    if family.name == "masked_lm":
        return ("none",)
    return ("none", "exact" if family.attention == "block_causal" else "prefix")


def longest_text(model: PreTrainedModel) -> int | None:
    """How many tokens a model takes, None where its architecture sets no limit."""
    model = underlying(model)
    limit = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from behind the one of padding.
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    return limit


def masked_lm_logits(
    model: PreTrainedModel,
    family: TextFamily,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    where: torch.Tensor,
) -> torch.Tensor:
    """What a model predicts at some positions; only these go through its head.

    Row i of the result predicts token i, whatever the family: outputs of shifted ones are read one position before (at a row's
    first token, which nothing stands before, at the token itself).

    Args:
        input_ids: (R, L) long. Of a block-causal model L may end at any border between blocks: what follows is not seen.
        attention_mask: (R, L) bool, False at padding, on either side; by default there is none. No token sees padding, and
            positions (and so blocks) count from a row's first real token.
        where: (R, L) bool, M positions, none of them padding.

    Returns:
        (M, V), in row-major order, in the model's dtype; V is `family.num_text_tokens` where that is given.
    """
    real, positions = _layout(input_ids, attention_mask)
    places = _read_at(where, positions, family.shifted)
    if family.name == "masked_lm":
        return _encoder_logits(model, input_ids, real, places)
    visible = _visible(family, real, positions, real, positions)
    return _native_logits(model, input_ids, visible, positions, places)[:, : family.num_text_tokens]


def _layout(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens are no padding, (R, L) bool, and the tokens' positions, (R, L) long."""
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    return real, count_positions(real)


def _read_at(where: torch.Tensor, positions: torch.Tensor, shifted: bool) -> Places:
    """Where the network says what stands at the positions `where`."""
    rows, columns = where.nonzero(as_tuple=True)
    return rows, columns - (positions[rows, columns] > 0).long() if shifted else columns


def _visible(
    family: TextFamily, real: torch.Tensor, positions: torch.Tensor, key_real: torch.Tensor, key_positions: torch.Tensor
) -> torch.Tensor:
    """Which keys each query sees, (R, Q, K) bool, or (R, 1, K) where all queries see the same."""
    seen = key_real[:, None, :]
    if family.block_length is None:
        return seen
    seen = seen & (key_positions[:, None, :] // family.block_length <= positions[:, :, None] // family.block_length)
    return seen | ~real[:, :, None]  # padding sees everything, and nothing sees it: a query without any key would be NaN


def _native_logits(
    model: Any,
    input_ids: torch.Tensor,
    visible: torch.Tensor,
    positions: torch.Tensor,
    places: Places,
    cache: DynamicCache | None = None,
) -> torch.Tensor:
    """Outputs (M, V) of a Llama, Qwen2 or Qwen3; `cache` grows by the input."""
    inner = underlying(model)
    hidden = additive_mask(visible, input_ids.shape[1], inner.dtype)
    arguments: dict[str, Any] = {"attention_mask": hidden, "position_ids": positions, "use_cache": cache is not None}
    if cache is not None:
        names = inspect.signature(type(inner.base_model).forward).parameters
        arguments["cache" if "cache" in names else "past_key_values"] = cache
    return _logits_at(model, places, input_ids=input_ids, **arguments)


def _encoder_logits(model: Any, input_ids: torch.Tensor, real: torch.Tensor, places: Places) -> torch.Tensor:
    """Outputs (M, V) of an `AutoModelForMaskedLM`."""
    # Padding goes to the right: there every architecture counts positions as it was trained to.
    right = (~real).long().argsort(dim=-1, stable=True)
    rows, columns = places
    columns, input_ids, real = right.argsort(-1)[rows, columns], input_ids.gather(-1, right), real.gather(-1, right)
    lengths = real.sum(-1)
    if underlying(model).config.model_type not in SEES_PADDING:
        return _logits_at(model, (rows, columns), input_ids=input_ids, attention_mask=real.long())
    parts, order = [], []
    for length in lengths.unique().tolist():
        same = lengths == length
        here, number = same[rows].nonzero()[:, 0], same.cumsum(0) - 1
        ids = input_ids[same, :length]
        at = number[rows[here]], columns[here]
        parts.append(_logits_at(model, at, input_ids=ids, attention_mask=torch.ones_like(ids)))
        order.append(here)
    return torch.cat(parts)[torch.cat(order).argsort()]


def _logits_at(model: Any, places: Places, **arguments: Any) -> torch.Tensor:
    """Outputs (M, V) of a model; where its architecture lets us, only these positions go through the last matrix."""
    inner, own = underlying(model), compiled(model)
    if isinstance(inner, BidirectionalLlama):
        return (inner if own is None else own)(where=places, **arguments)
    rows, columns = places
    if own is None:
        logits = _narrowed(inner, places, arguments["input_ids"].shape)(**arguments).logits
        return logits if logits.ndim == 2 else logits[places]
    if "logits_to_keep" not in inspect.signature(type(inner).forward).parameters:
        return own(**arguments).logits[places]
    wanted, columns = columns.unique(return_inverse=True)
    return own(logits_to_keep=wanted, **arguments).logits[rows, columns]


class _AtPlaces(torch.nn.Module):
    """A model's last matrix, on some positions of its input alone."""

    def __init__(self, head: torch.nn.Module, places: Places, shape: torch.Size):
        super().__init__()
        self.head, self.places, self.shape = head, places, shape

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.head, name)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(R, L, H) to (M, V)."""
        return self.head(states[self.places] if states.shape[:-1] == self.shape else states)


def _narrowed(model: PreTrainedModel, places: Places, shape: torch.Size) -> PreTrainedModel:
    """The model, but with its last matrix on some positions alone.

    Neither copies nor changes anything that other calls may be using at the same time: only the few modules that lead to the last
    matrix are other objects, with the same contents.
    """
    head = model.get_output_embeddings()
    path = next((name for name, module in model.named_modules() if module is head), "") if head is not None else ""
    if not path:
        return model
    own: Any = _shallow(model)
    inner, (*owners, last) = own, path.split(".")
    for name in owners:
        inner._modules[name] = _shallow(inner._modules[name])
        inner = inner._modules[name]
    inner._modules[last] = _AtPlaces(head, places, shape)
    return own


def _shallow(module: Any) -> Any:
    own = copy.copy(module)
    own._modules = dict(module._modules)
    return own


class TextCache:
    """Logits of one block after the other, with or without keys and values kept between them.

    One object serves one batch of R rows from the first block to the last:

        cache = TextCache(model, family, kind="exact")
        for start, end in blocks:                                   # columns, left to right
            cache.begin_block(sequences, attention_mask, start, end)
            while masks are left in the block:
                logits = cache.logits(states, rows, where)          # (S, end - start), (S,), (S, end - start) -> (M, V)
            sequences[:, start:end] = decoded                       # begin_block of the next block reads them

    `logits` never changes what is kept: any number of states of any rows, in any order, may be asked for. Rows with padding on
    the left or right work with every kind; a block is a range of columns, and may hold prompt tokens and padding.

    Kinds:
        "none": every call runs the whole row (of a block-causal model: up to the end of the block). Every family.
        "exact": block-causal models: keys and values of finished blocks are kept, and a call runs the active block alone. The
            logits are those of "none" up to rounding. Columns that do not coincide with a row's own blocks are still exact: as
            many columns more as it takes are run on either side.
        "prefix": full attention: an approximation. The first call of a block runs the whole rows, as `begin_block` saw them, and
            keeps what lies before the block; calls run the block and all that follows. With the tokens that `begin_block` saw
            they give the logits of "none"; the prefix does not see what is decoded in the block later.

    Args:
        model, family: As from `load_text_model`.
        kind: One of `CACHES`.
        packed: With "exact" or "prefix": states of one row share one sequence and one copy of the row's keys and values, and do
            not see each other. By default every state is a row of a batch, with a copy of its own.

    Raises:
        ValueError: If `kind` is unknown or does not go with the family.
    """

    def __init__(self, model: PreTrainedModel, family: TextFamily, kind: str = "none", packed: bool = False):
        if kind not in CACHES:
            raise ValueError(f"`kind` must be one of {', '.join(CACHES)}, got {kind!r}.")
        if kind not in fitting_caches(family):
            raise ValueError(f"`kind` must be {' or '.join(fitting_caches(family))} for {family.name}, got {kind!r}.")
        if packed and kind == "none":
            raise ValueError("`packed` must be False without a cache, got True.")
        self.model = model
        self.family = family
        self.kind = kind
        self.packed = packed
        self._kept = DynamicCache()
        self._tokens = self._real = self._positions = torch.empty(0, 0)

    @property
    def length(self) -> int:
        """Columns whose keys and values are kept; 0 without a cache."""
        return int(self._kept.get_seq_length())

    def begin_block(self, sequences: torch.Tensor, attention_mask: torch.Tensor | None, start: int, end: int) -> None:
        """Makes columns `start` to `end` (exclusive) the active block.

        Tokens before `start` are final. Where they differ from those that were cached, keys and values are computed anew, so
        blocks may also be visited again. The tensors are copied.

        Args:
            sequences: (R, L) long, the whole rows. With "exact" R and L stay the same from block to block.
            attention_mask: (R, L) bool or None, as in `masked_lm_logits`.
            start, end: Columns.

        Raises:
            ValueError: If the columns lie outside, or R or L changed.
        """
        if not 0 <= start < end <= sequences.shape[1]:
            raise ValueError(f"`start` and `end` must be columns of the {sequences.shape[1]}, in order, got {start} and {end}.")
        if self.kind == "exact" and self._tokens.numel() and sequences.shape != self._tokens.shape:
            raise ValueError(f"`sequences` must keep the shape {tuple(self._tokens.shape)}, got {tuple(sequences.shape)}.")
        old_tokens, old_real = self._tokens, self._real
        self._tokens = sequences.clone()
        self._real, self._positions = _layout(sequences, attention_mask)
        self._start, self._end = start, end
        if self.family.attention == "full":
            self._first, self._last = max(start - self.family.shifted, 0), sequences.shape[1]
        else:
            self._first, self._last = self._own_block(start)[0], self._own_block(end - 1)[1]
            if self.family.shifted:
                self._first = max(min(self._first, start - 1), 0)
        if self.kind == "none":
            self._first = 0
        elif self.kind == "prefix":
            self._crop(0)
        else:
            self._crop(min(self._first, self._unchanged(sequences, old_tokens, old_real)))
            if self._first > self.length:
                self._fill(start, torch.zeros_like(self._real))

    def _own_block(self, column: int) -> tuple[int, int]:
        """The first column, and the last + 1, of the model's own block around a column, over all rows."""
        blocks = self._positions // (self.family.block_length or 1)
        own = self._real & self._real[:, column, None] & (blocks == blocks[:, column, None])
        columns = own.any(0).nonzero()[:, 0].tolist() or [column]
        return min(columns[0], column), max(columns[-1], column) + 1

    def _unchanged(self, tokens: torch.Tensor, old_tokens: torch.Tensor, old_real: torch.Tensor) -> int:
        """Columns whose keys and values are still those of the tokens."""
        if not torch.equal(old_real, self._real):
            return 0
        changed = (old_tokens != tokens)[:, : self.length].any(0).nonzero()[:, 0].tolist()
        return self._own_block(changed[0])[0] if changed else self.length

    def _fill(self, end: int, where: torch.Tensor) -> torch.Tensor:
        """Runs the columns from the kept ones to `end`, and keeps what lies before the columns that `logits` runs.

        Returns:
            (M, V), what stands at the positions `where` (R, L), none of which is kept.
        """
        queries, keys = slice(self.length, end), slice(0, end)
        real, positions = self._real, self._positions
        visible = _visible(self.family, real[:, queries], positions[:, queries], real[:, keys], positions[:, keys])
        places = _read_at(where[:, queries], positions[:, queries], self.family.shifted)
        logits = _native_logits(self.model, self._tokens[:, queries], visible, positions[:, queries], places, self._kept)
        self._crop(self._first)
        return logits

    def _crop(self, length: int) -> None:
        if length == 0:
            self._kept = DynamicCache()
        # Not `DynamicCache.crop`, whose argument means something else in every other version.
        for layer in self._kept.layers:
            layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]

    def _copy(self, rows: torch.Tensor) -> DynamicCache | None:
        """The cache of some rows, for a forward, which appends to what it is given even if it need not."""
        if not self.length:
            return None
        cache = copy.copy(self._kept)
        cache.layers = [copy.copy(layer) for layer in self._kept.layers]
        if rows.tolist() != list(range(self._positions.shape[0])):
            for layer in cache.layers:
                layer.batch_select_indices(rows)
        return cache

    def logits(self, states: torch.Tensor, rows: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """What the model predicts if the active block of some rows were other tokens.

        Args:
            states: (S, end - start) long, tokens of the block.
            rows: (S,) long, the row of `sequences` that each stands in; a row may occur any number of times, or not at all.
            where: (S, end - start) bool, the M positions that are wanted.

        Returns:
            (M, V), in row-major order.

        Raises:
            ValueError: If no block was begun, or shapes do not fit.
        """
        if not self._tokens.numel():
            raise ValueError("`begin_block` must be called before `logits`.")
        shape = (len(rows), self._end - self._start)
        for name, value in (("states", states), ("where", where)):
            if value.shape != shape:
                raise ValueError(f"`{name}` must have the shape {shape}, got {tuple(value.shape)}.")
        return self._logits(states, rows, where)[:, : self.family.num_text_tokens]

    def _logits(self, states: torch.Tensor, rows: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        if self.kind == "prefix" and self._first > self.length:
            every = torch.zeros_like(self._real)
            active = self._tokens[:, self._start : self._end]
            if rows.tolist() == list(range(len(active))) and torch.equal(states, active):
                every[:, self._start : self._end] = where
                return self._fill(self._tokens.shape[1], every)
            self._fill(self._tokens.shape[1], every)
        columns = slice(self._first, self._last)
        block = slice(self._start - self._first, self._end - self._first)
        tokens, positions = self._tokens[rows, columns], self._positions[rows, columns]
        wanted = torch.zeros_like(tokens, dtype=torch.bool)
        tokens[:, block], wanted[:, block] = states, where
        places = _read_at(wanted, positions, self.family.shifted)
        if self.family.name == "masked_lm":
            return _encoder_logits(self.model, tokens, self._real[rows, columns], places)
        if self.packed and len(rows):
            return self._packed_logits(tokens, rows, places)
        return _native_logits(self.model, tokens, self._sees(rows), positions, places, self._copy(rows))

    def _sees(self, rows: torch.Tensor) -> torch.Tensor:
        columns = slice(self._first, self._last)
        real, positions = self._real[rows, : self._last], self._positions[rows, : self._last]
        return _visible(self.family, real[:, columns], positions[:, columns], real, positions)

    def _packed_logits(self, tokens: torch.Tensor, rows: torch.Tensor, places: Places) -> torch.Tensor:
        """All states of a row behind each other: (S, Q) becomes (U, C · Q) for U rows with C states at most."""
        unique, owner, counts = rows.unique(return_inverse=True, return_counts=True)
        most, width = int(counts.max()), tokens.shape[1]
        order = owner.argsort(stable=True)
        slot = torch.empty_like(order)
        slot[order] = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[owner[order]]
        packed = tokens.new_zeros(len(unique), most, width)
        packed[owner, slot] = tokens
        sees = self._sees(unique).expand(-1, width, -1)
        before, own = sees[..., : self._first], sees[..., self._first :]
        same = torch.eye(most, dtype=torch.bool, device=rows.device)
        within = (own[:, None, :, None, :] & same[None, :, None, :, None]).reshape(len(unique), most * width, most * width)
        visible = torch.cat([before.repeat(1, most, 1), within], dim=-1)
        positions = self._positions[unique, self._first : self._last].repeat(1, most)
        state, column = places
        places = owner[state], slot[state] * width + column
        return _native_logits(self.model, packed.flatten(1), visible, positions, places, self._copy(unique))

    def keep_samples(self, rows: torch.Tensor) -> None:
        """Drops all rows but these, (K,) long; from then on they are rows 0 to K - 1, for `begin_block` too.

        Raises:
            ValueError: If no block was begun.
        """
        if not self._tokens.numel():
            raise ValueError("`begin_block` must be called before `keep_samples`.")
        self._kept = self._copy(rows) or DynamicCache()
        self._tokens, self._real, self._positions = self._tokens[rows], self._real[rows], self._positions[rows]

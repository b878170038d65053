"""Logits of masked language models at the positions that are wanted, with key/value caches for decoding block by block."""

from __future__ import annotations

import copy

import torch
from transformers import DynamicCache, PreTrainedModel

from ..choices import CACHES
from ..guidance import first_of_equal
from .llada import additive_mask, count_positions
from .text_family import TextFamily
from .text_network import Positions, TextNetwork
from .wrapped import underlying


def fitting_caches(family: TextFamily) -> tuple[str, ...]:
    """The modes of `TextCache` that work for a family."""
    if family.name == "masked_lm":
        return ("none",)
    return ("none", "exact") if family.attention == "block_causal" else ("none", "prefix", "dual")


def longest_text(model: PreTrainedModel) -> int | None:
    """The most tokens that a model takes, or None if its architecture sets no limit."""
    model = underlying(model)
    for name, module in model.named_modules():
        # RoBERTa and its relatives count positions from the one after padding's.
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    return getattr(model.config, "max_position_embeddings", None)


def _read_at(where: torch.Tensor, positions: torch.Tensor, shifted: bool) -> Positions:
    """The places at which the network outputs its predictions of the tokens at `where` (R, L), `positions` (R or 1, L).

    A shifted network predicts a token one position before. The first token of a sequence, which has nothing before it, is read
    at its own position.
    """
    sequences, columns = where.nonzero(as_tuple=True)
    return sequences, columns - (positions.expand_as(where)[sequences, columns] > 0).long() if shifted else columns


def _visible(
    family: TextFamily, real: torch.Tensor, positions: torch.Tensor, key_real: torch.Tensor, key_positions: torch.Tensor
) -> torch.Tensor:
    """Which keys each query sees, (R, Q, K) bool, or (R, 1, K) if all queries see the same keys.

    Args:
        real, positions: (R, Q), which queries are no padding, and their positions.
        key_real, key_positions: (R, K), the same of the keys.
    """
    visible = key_real[:, None, :]
    if family.block_length is None:
        return visible
    visible = visible & (key_positions[:, None, :] // family.block_length <= positions[:, :, None] // family.block_length)
    return visible | ~real[:, :, None]  # padding sees everything, and nothing sees it: a query without any key would be NaN


def _ends(states: torch.Tensor, num_first: int, num_last: int) -> torch.Tensor:
    """The first and the last columns of (B, heads, L, D)."""
    first = states[..., :num_first, :]
    return torch.cat([first, states[..., states.shape[-2] - num_last :, :]], dim=-2) if num_last else first


class TextCache:
    """Logits of one block after the other, with or without keys and values kept between them.

    One object serves one batch of B samples from the first block to the last:

        cache = TextCache(model, family, mode="exact")
        for start, end in blocks:                                    # columns, left to right
            cache.begin_block(sequences, attention_mask, start, end)
            while masks are left in the block:
                logits = cache.logits(states, sample_index, where)   # (S, end - start), (S,), (S, end - start) -> (M, V)
            sequences[:, start:end] = decoded                        # begin_block of the next block reads them

    `logits` never changes what is kept: any number of states of any samples may be asked for, in any order. Every mode allows
    padding on either side; a block is a range of columns, and may hold prompt tokens and padding.

    No token sees padding, and positions (and with them a model's own blocks) are counted from the first token that is none.

    Modes:
        "none": Every call runs whole sequences (of a block-causal model: up to the end of the block). For every family.
        "exact": For block-causal models. Keys and values of finished blocks are kept, and a call runs the active block alone. The
            logits are those of "none" up to rounding. This also holds if columns do not coincide with the blocks of the model:
            as many columns as needed are then run on either side.
        "prefix": For full attention, an approximation (arXiv 2505.22618). The first call of a block runs the whole sequences, as
            `begin_block` saw them, and keeps what lies before the block; later calls run the block and all that follows. With the
            tokens that `begin_block` saw they give the logits of "none"; the prefix does not see what is decoded in the block
            later.
        "dual": The same (there DualCache), but what follows the block is kept, too: later calls run the block alone.

    Args:
        model, family: From `open_text_model`.
        mode: One of `CACHES`.
        packed: With any mode but "none": the states of a sample share one sequence and one copy of the sample's keys and values,
            and do not see each other. By default every state is a sequence of a batch, with a copy of its own.

    Raises:
        ValueError: If `mode` is unknown or does not work for the family.
    """

    def __init__(self, model: PreTrainedModel, family: TextFamily, mode: str = "none", packed: bool = False):
        if mode not in CACHES:
            raise ValueError(f"`mode` must be one of {', '.join(CACHES)}, got {mode!r}.")
        if mode not in fitting_caches(family):
            raise ValueError(f"`mode` must be {' or '.join(fitting_caches(family))} for {family.name}, got {mode!r}.")
        if packed and mode == "none":
            raise ValueError("`packed` must be False without a cache, got True.")
        self.family = family
        self.mode = mode
        self.packed = packed
        self._network = TextNetwork(model)
        self._kept = DynamicCache()
        self._tokens = self._real = self._positions = torch.empty(0, 0)

    @property
    def length(self) -> int:
        """Columns whose keys and values are kept; 0 without a cache."""
        return int(self._kept.get_seq_length())

    def begin_block(self, sequences: torch.Tensor, attention_mask: torch.Tensor | None, start: int, end: int) -> None:
        """Makes columns `start` to `end` (exclusive) the active block.

        Tokens before `start` are final. Keys and values of tokens that have changed since they were cached are computed anew, so
        a block may be visited again. The tensors are copied.

        Args:
            sequences: (B, L) long. With "exact" B and L stay the same from block to block.
            attention_mask: (B, L) bool, False at padding; by default there is none.
            start, end: Columns.

        Raises:
            ValueError: If the columns lie outside, or B or L has changed.
        """
        if not 0 <= start < end <= sequences.shape[1]:
            raise ValueError(f"`start` and `end` must be columns of the {sequences.shape[1]}, in order, got {start} and {end}.")
        if self.mode == "exact" and self._tokens.numel() and sequences.shape != self._tokens.shape:
            raise ValueError(f"`sequences` must keep the shape {tuple(self._tokens.shape)}, got {tuple(sequences.shape)}.")
        old_tokens, old_real = self._tokens, self._real
        self._tokens = sequences.clone()
        self._real = torch.ones_like(sequences, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        self._positions = count_positions(self._real)
        self._start, self._end = start, end
        self._first, self._last = self._columns_to_run()
        # Columns behind those that run are seen by full attention only, and run with them unless they are kept.
        self._num_behind = sequences.shape[1] - self._last if self.mode == "dual" else 0
        if self.mode in ("prefix", "dual"):
            self._crop(0)  # the first call of `logits` fills it, and may get the logits of the block in the same forward
        elif self.mode == "exact":
            self._crop(min(self._first, self._unchanged(old_tokens, old_real)))
            if self._first > self.length:
                self._fill_prefix(start)
        self._look_up()

    def _look_up(self) -> None:
        """Looks up what the calls of a block have in common."""
        real, positions = self._real, self._positions
        columns = slice(self._first, self._last)
        self._run_tokens, self._run_positions = self._tokens[:, columns], positions[:, columns]
        # Without padding, say, samples have the same masks and positions, and one copy of them is enough for any batch.
        self._alike = bool((real == real[:1]).all())
        if self.family.name == "masked_lm":
            # The columns of an encoder as it takes them, padding last, and the new place of each column.
            self._order = None if real.all() else (~real).long().argsort(dim=-1, stable=True)
            self._place = None if self._order is None else self._order.argsort(-1)
            return
        behind = slice(real.shape[1] - self._num_behind, None)
        keys = [torch.cat([of[:, : self._first], of[:, behind], of[:, columns]], dim=1) for of in (real, positions)]
        # Which keys the columns that are run see, (B, Q or 1, K): those kept before and behind them, and then their own.
        self._run_visible = _visible(self.family, real[:, columns], self._run_positions, *keys)
        self._mask = self._additive(self._run_visible[:1])

    def _additive(self, visible: torch.Tensor) -> torch.Tensor:
        """`additive_mask` for the columns that are run."""
        return additive_mask(visible, self._last - self._first, self._network.inner.dtype)

    def _columns_to_run(self) -> tuple[int, int]:
        """The first column, and the last + 1, that `logits` runs for the active block; the others come from the cache."""
        if self.family.attention == "full":
            first, last = self._start, self._end if self.mode == "dual" else self._tokens.shape[1]
        else:
            # The tokens of a model's own block see each other, so whole blocks have to run; what follows is not seen.
            first, last = self._own_block(self._start)[0], self._own_block(self._end - 1)[1]
        if self.family.shifted:  # the first token of the block is predicted one column before
            first = max(min(first, self._start - 1), 0)
        return 0 if self.mode == "none" else first, last

    def _own_block(self, column: int) -> tuple[int, int]:
        """The first column, and the last + 1, of the block of the model that a column lies in, over all samples."""
        blocks = self._positions // (self.family.block_length or 1)
        same_block = self._real & self._real[:, column, None] & (blocks == blocks[:, column, None])
        columns = same_block.any(0).nonzero()[:, 0].tolist() or [column]
        return min(columns[0], column), max(columns[-1], column) + 1

    def _unchanged(self, old_tokens: torch.Tensor, old_real: torch.Tensor) -> int:
        """The number of columns, from the left, whose kept keys and values still belong to the tokens."""
        if not torch.equal(old_real, self._real):
            return 0
        changed = (old_tokens != self._tokens)[:, : self.length].any(0).nonzero()[:, 0].tolist()
        return self._own_block(changed[0])[0] if changed else self.length

    def _fill_prefix(self, end: int) -> None:
        """Runs the columns up to `end` that are not kept, and keeps those before the ones that `logits` runs."""
        seen = torch.cat([self._tokens[:, :end], self._real[:, :end].long()], dim=1)
        # At first, texts of a prompt are equal up to here.
        samples, kind = first_of_equal(seen) if self.length == 0 else (torch.arange(len(seen), device=seen.device),) * 2
        self._run(samples, end, torch.zeros_like(self._real[samples]))
        if len(samples) < len(seen):
            self._kept.batch_select_indices(kind)

    def _run(self, samples: torch.Tensor, end: int, where: torch.Tensor) -> torch.Tensor:
        """Runs the columns of some samples (K,) up to `end` that are not kept, and keeps all but the ones that `logits` runs.

        Args:
            where: (K, L) bool, M positions that are wanted, none of which is kept.

        Returns:
            (M, V), their logits.
        """
        queries, keys = slice(self.length, end), slice(0, end)
        real, positions = self._real[samples], self._positions[samples]
        visible = _visible(self.family, real[:, queries], positions[:, queries], real[:, keys], positions[:, keys])
        read_at = _read_at(where[:, queries], positions[:, queries], self.family.shifted)
        mask = additive_mask(visible, queries.stop - queries.start, self._network.inner.dtype)
        tokens = self._tokens[samples, queries]
        logits = self._network.decoder_logits(tokens, mask, positions[:, queries], read_at, self._kept)
        self._crop(self._first, self._num_behind)
        return logits

    def _crop(self, length: int, num_behind: int = 0) -> None:
        """Keeps the first `length` columns, and the last `num_behind`."""
        if length + num_behind == 0:
            self._kept = DynamicCache()
        # Not `DynamicCache.crop`, whose argument means something else in every other version.
        for layer in self._kept.layers:
            layer.keys = _ends(layer.keys, length, num_behind)
            layer.values = _ends(layer.values, length, num_behind)

    def _copy(self, sample_index: torch.Tensor) -> DynamicCache | None:
        """The cache of some samples, for a forward, which appends to what it is given even if it need not."""
        if not self.length:
            return None
        cache = copy.copy(self._kept)
        cache.layers = [copy.copy(layer) for layer in self._kept.layers]
        if len(self._tokens) == 1:  # appending makes the only copy
            for layer in cache.layers:
                layer.keys = layer.keys.expand(len(sample_index), -1, -1, -1)
                layer.values = layer.values.expand(len(sample_index), -1, -1, -1)
        elif not self._is_whole_batch(sample_index):
            for layer in cache.layers:
                layer.batch_select_indices(sample_index)
        return cache

    def _is_whole_batch(self, sample_index: torch.Tensor) -> bool:
        return torch.equal(sample_index, torch.arange(len(self._tokens), device=sample_index.device))

    def logits(self, states: torch.Tensor, sample_index: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """What the model predicts if the active block of some samples had other tokens.

        Row i of the result predicts token i, whatever the family: outputs of shifted ones are read one position before.

        Args:
            states: (S, end - start) long, tokens of the block.
            sample_index: (S,) long, the sample that each state belongs to; one may occur any number of times, or not at all.
            where: (S, end - start) bool, the M positions that are wanted, none of them padding.

        Returns:
            (M, V), in row-major order, in the model's dtype; V is `family.num_text_tokens` if that is given.

        Raises:
            ValueError: If no block was begun, or shapes do not fit.
        """
        if not self._tokens.numel():
            raise ValueError("`begin_block` must be called before `logits`.")
        shape = (len(sample_index), self._end - self._start)
        for name, value in (("states", states), ("where", where)):
            if value.shape != shape:
                raise ValueError(f"`{name}` must have the shape {shape}, got {tuple(value.shape)}.")
        return self._logits(states, sample_index, where)[:, : self.family.num_text_tokens]

    def _logits(self, states: torch.Tensor, sample_index: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        if self.mode in ("prefix", "dual") and self._first + self._num_behind > self.length:
            samples, length = torch.arange(len(self._tokens), device=states.device), self._tokens.shape[1]
            wanted = torch.zeros_like(self._real)
            if self._is_whole_batch(sample_index) and torch.equal(states, self._tokens[:, self._start : self._end]):
                # The forward that fills the cache is of just these states.
                wanted[:, self._start : self._end] = where
                return self._run(samples, length, wanted)
            self._run(samples, length, wanted)
        tokens, wanted = states, where
        if self._first < self._start or self._end < self._last:
            block = slice(self._start - self._first, self._end - self._first)
            tokens = self._run_tokens[sample_index]
            wanted = torch.zeros_like(tokens, dtype=torch.bool)
            tokens[:, block] = states
            wanted[:, block] = where
        positions = self._run_positions[:1] if self._alike else self._run_positions[sample_index]
        read_at = _read_at(wanted, positions, self.family.shifted)
        if self.family.name == "masked_lm":
            return self._encoder_logits(tokens, sample_index, read_at)
        if self.packed and len(sample_index):
            return self._packed_logits(tokens, sample_index, read_at)
        mask = self._mask if self._alike else self._additive(self._run_visible[sample_index])
        return self._network.decoder_logits(tokens, mask, positions, read_at, self._copy(sample_index))

    def _encoder_logits(self, tokens: torch.Tensor, sample_index: torch.Tensor, read_at: Positions) -> torch.Tensor:
        """Logits of whole sequences (S, L)."""
        real = self._real[sample_index]
        if self._order is None or self._place is None:
            return self._network.encoder_logits(tokens, real, read_at)
        order, (sequences, columns) = self._order[sample_index], read_at
        read_at = sequences, self._place[sample_index[sequences], columns]
        return self._network.encoder_logits(tokens.gather(-1, order), real.gather(-1, order), read_at)

    def _packed_logits(self, tokens: torch.Tensor, sample_index: torch.Tensor, read_at: Positions) -> torch.Tensor:
        """Logits of states (S, Q) that run as (U, C · Q): the states of each of U samples, C at most, behind each other.

        Every state sees what is kept of its sample, and itself as it would alone, but no other state.
        """
        samples, owner, counts = sample_index.unique(return_inverse=True, return_counts=True)
        most, width = int(counts.max()), tokens.shape[1]
        # The slot of a state is its number among the states of its sample: sorted by sample, its place less that of the
        # sample's first state.
        order = owner.argsort(stable=True)
        slot = torch.empty_like(order)
        slot[order] = torch.arange(len(owner), device=owner.device) - (counts.cumsum(0) - counts)[owner[order]]
        # Slots that no state fills hold token 0, which nothing sees and nobody reads.
        packed = tokens.new_zeros(len(samples), most, width)
        packed[owner, slot] = tokens
        # The mask for one state is (U, Q, kept + Q). Its left part is repeated for every slot; its right part goes on the
        # diagonal of a (C, C) grid of such parts, (U, C, Q, C, Q).
        visible = self._run_visible[samples].expand(-1, width, -1)
        kept, own = visible.tensor_split([self._first + self._num_behind], dim=-1)
        same_slot = torch.eye(most, dtype=torch.bool, device=owner.device)
        within = (own[:, None, :, None, :] & same_slot[None, :, None, :, None]).reshape(-1, most * width, most * width)
        visible = torch.cat([kept.repeat(1, most, 1), within], dim=-1)
        mask = additive_mask(visible, most * width, self._network.inner.dtype)
        positions = self._run_positions[samples].repeat(1, most)
        state, column = read_at
        read_at = owner[state], slot[state] * width + column
        return self._network.decoder_logits(packed.flatten(1), mask, positions, read_at, self._copy(samples))

    def keep_samples(self, sample_index: torch.Tensor) -> None:
        """Drops all samples but these, (K,) long; from then on they are samples 0 to K - 1, for `begin_block` too.

        Raises:
            ValueError: If no block was begun.
        """
        if not self._tokens.numel():
            raise ValueError("`begin_block` must be called before `keep_samples`.")
        self._kept = self._copy(sample_index) or DynamicCache()
        self._tokens = self._tokens[sample_index]
        self._real = self._real[sample_index]
        self._positions = self._positions[sample_index]
        self._look_up()

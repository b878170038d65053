"""How much memory a model takes, from its shapes alone: weights, a pass through the network, decisions.

The network runs on the device "meta", which has shapes but no numbers, while its tensors are counted as they come and go.
Attention counts as a fused kernel does, without the matrix of all pairs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .choices import QUANTIZATIONS
from .model_sizes import MODEL_SIZES, ModelSize
from .models.text_network import TextNetwork
from .random_models import CLIP_LENGTH, build_network
from .reductions import CPU_BLOCK, DEVICE_BLOCK

BITS = {"int8": 8, "fp8": 8, "int4": 4, "nf4": 4}
"""Bits of a quantised weight."""
_BLOCK = {"int4": 128, "nf4": 64}
"""Weights that share a scale; by default a row."""
_SCALE_BYTES = 4


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of the tensors that are made within the block, and those alive at once.

    Attributes:
        live: Bytes that are alive.
        peak: The most that were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operation and counts its results. A single number that is asked for, which "meta" does not have, is 0."""
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return False if args[0].dtype == torch.bool else 0
        given = {self._key(value) for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)}
        results = func(*args, **(kwargs or {}))
        for value in tree_leaves(results):
            if isinstance(value, torch.Tensor) and self._key(value) not in given | self._known:
                storage = value.untyped_storage()
                key, size = self._key(value), storage.nbytes()
                self._known.add(key)
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._forget, key, size)
        return results

    @staticmethod
    def _key(tensor: torch.Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class _WithoutNumbers(TorchFunctionMode):
    """Attention that makes its result and nothing else, and numbers that are 0 where checks ask for them."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, _, value = args[:3] if len(args) >= 3 else [(kwargs or {})[name] for name in ("query", "key", "value")]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        if func is torch.Tensor.tolist and args[0].is_meta:
            return torch.zeros(args[0].shape, dtype=args[0].dtype).tolist()
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class MemoryNeeds:
    """Bytes that decoding takes.

    Attributes:
        weights: Of the network, without image tokenizer and text encoder.
        network: The most that a pass through the network adds, its logits included.
        decisions: The most that reading those logits adds.
        kept: Logits of the states before the step, and of the best candidates, meanwhile.
    """

    weights: int
    network: int
    decisions: int
    kept: int

    @property
    def peak(self) -> int:
        """All that is alive at once, at most."""
        return self.weights + self.kept + max(self.network, self.decisions)


def weight_bytes(network: torch.nn.Module, dtype: torch.dtype, quantization: str | None = None) -> int:
    """Bytes of the weights in a dtype, those of linear layers quantised as `quantization_config` does.

    Args:
        network: On any device.
        dtype: Of all weights that are not quantised.
        quantization: One of `QUANTIZATIONS`, or None.
    """
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise ValueError(f"`quantization` must be one of {', '.join(QUANTIZATIONS)} or None, got {quantization!r}.")
    head = getattr(network, "get_output_embeddings", lambda: None)()
    quantised = {
        id(module.weight): module.weight
        for module in network.modules()
        if quantization is not None and isinstance(module, torch.nn.Linear) and module is not head
    }
    plain = sum(parameter.numel() for parameter in network.parameters() if id(parameter) not in quantised)
    total = plain * dtype.itemsize
    for weight in quantised.values():
        block = _BLOCK.get(quantization or "", weight.shape[1])
        total += weight.numel() * BITS[quantization or ""] // 8 + _SCALE_BYTES * weight.numel() // block
    return total


def memory_needs(
    name: str | ModelSize,
    *,
    dtype: torch.dtype = torch.bfloat16,
    quantization: str | None = None,
    num_candidates: int = 1,
    guided: bool = True,
    batch_size: int = 1,
    lookahead_batch_size: int | None = None,
    prompt_length: int = 128,
    num_masks: int | None = None,
    on_gpu: bool = True,
) -> MemoryNeeds:
    """What decoding takes at its beginning, when all tokens are masked.

    Args:
        name: One of `MODEL_SIZES`, or a size like them.
        dtype: In which the model computes.
        quantization: One of `QUANTIZATIONS`, or None.
        num_candidates: Candidates that are looked at for each sample; 1 does not look ahead.
        guided: Whether every state has a negative row; texts have none.
        batch_size: Images or texts.
        lookahead_batch_size: States in a pass, at most, as in a call.
        prompt_length: Tokens of the prompt of a language model.
        num_masks: Tokens that are decoded: by default those of an image, or a block of 32.
        on_gpu: Whether logits are read in the larger blocks of a GPU.
    """
    size = MODEL_SIZES[name] if isinstance(name, str) else name
    with torch.device("meta"):
        network = build_network(size).eval().requires_grad_(False)
    torch.nn.Module.to(network, dtype)
    guided = guided and not size.of_text
    states = batch_size * num_candidates
    states = states if lookahead_batch_size is None else min(states, lookahead_batch_size)
    rows = states * (2 if guided else 1)
    run, masks, vocabulary = _pass(size, network, rows, prompt_length, num_masks)
    with torch.no_grad(), _WithoutNumbers(), LiveTensors() as memory:
        logits = run()
        del logits
    element = dtype.itemsize
    # Guidance computes in float32: both logits are converted, and give a third tensor.
    steered = (2 * 4 * (element < 4) + 4) if guided else 0
    decisions = states * masks * vocabulary * (element * (2 if guided else 1) + steered)
    decisions += 4 * min(DEVICE_BLOCK if on_gpu else CPU_BLOCK, states * masks * vocabulary)
    kept = batch_size * masks * vocabulary * (4 if guided else element) * (2 if num_candidates > 1 else 0)
    return MemoryNeeds(weight_bytes(network, dtype, quantization), memory.peak, decisions, kept)


def _pass(
    size: ModelSize, network: Any, rows: int, prompt_length: int, num_masks: int | None
) -> tuple[Callable[[], Any], int, int]:
    """A pass of so many rows through a network on the device "meta", the masks of a row, and the tokens that have logits."""
    config, dtype = network.config, network.dtype

    def ids(*shape: int) -> torch.Tensor:
        return torch.empty(rows, *shape, dtype=torch.long, device="meta")

    def floats(*shape: int) -> torch.Tensor:
        return torch.empty(rows, *shape, dtype=dtype, device="meta")

    if size.family == "amused":
        side = config.sample_size
        text, pooled = floats(CLIP_LENGTH, config.encoder_hidden_size), floats(config.cond_embed_dim)
        return (lambda: network(ids(side, side), text, pooled, floats(5)).flatten(2)), side**2, config.codebook_size
    if size.family == "meissonic":
        side = 64 if config.downsample else 32
        text, pooled = floats(CLIP_LENGTH, config.joint_attention_dim), floats(config.pooled_projection_dim)
        times = torch.empty(rows, dtype=torch.double, device="meta")
        return (lambda: network(ids(side, side), text, pooled, floats(5), times)), side**2, config.codebook_size
    if size.family == "maskgit":
        length = config.sample_size**2
        return (lambda: network(ids(length), ids())), length, config.codebook_size
    if size.family.startswith("titok"):
        return (lambda: network(ids(config.num_tokens), ids())), config.num_tokens, config.codebook_size
    if size.family == "maskgen":
        text, pooled = floats(CLIP_LENGTH, config.text_embed_dim), floats(config.text_embed_dim)
        return (lambda: network(ids(config.num_tokens), text, pooled, floats())), config.num_tokens, config.codebook_size
    if size.of_text:
        masks = num_masks or 32
        length, vocabulary = prompt_length + masks, config.vocab_size
    else:
        side = size.layout["sample_size"]
        masks = side * (side + 1 if size.family == "lumina" else side)  # a newline ends each row
        length, masks = prompt_length + masks + 2, side**2
        offset = size.layout["image_token_offset"]
        vocabulary = min(8192, config.vocab_size - offset)
    row = torch.empty(rows * masks, dtype=torch.long, device="meta")
    if size.of_text:
        text_network = TextNetwork(network)
        mask, positions = floats(1, length, length)[:1], ids(length)[:1]
        if size.family.startswith("masked_lm"):
            return (lambda: text_network.encoder_logits(ids(length), ids(length).bool(), (row, row))), masks, vocabulary
        return (lambda: text_network.decoder_logits(ids(length), mask, positions, (row, row), None)), masks, vocabulary
    real = torch.empty(rows, length, dtype=torch.bool, device="meta")
    wanted = {"where": (row, row), "token_range": (offset, offset + vocabulary)}
    return (lambda: network(ids(length), real, **wanted)), masks, vocabulary


def published_sizes() -> list[str]:
    """The names of `MODEL_SIZES` that are published models, not those that are for trying commands."""
    return [name for name in MODEL_SIZES if "nano" not in name]

"""Draws N actions per sample: which masked positions, and which token at each.

All randomness comes in as uniform numbers, drawn from every sample's own generator and in an amount that depends on N and L
only, so that a sample comes out the same alone and in any batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .printing import shown

Generators = torch.Generator | Sequence[torch.Generator] | None


def check_generator(generator: Generators, batch_size: int) -> None:
    """Raises a ValueError if `generator` is no generator, no list with one for each sample of the batch, and not None."""
    if generator is None or isinstance(generator, torch.Generator):
        return
    if not isinstance(generator, (list, tuple)) or not all(isinstance(source, torch.Generator) for source in generator):
        raise ValueError(f"`generator` must be a torch.Generator, a list of them or None, got {shown(generator)}.")
    if len(generator) != batch_size:
        raise ValueError(f"`generator` is a list of {len(generator)} generators for a batch of {batch_size} samples.")


_SEEDS = 2**32
"""Seeds are drawn below this: more bits of a seed PyTorch's generator on the CPU does not use."""


def sample_seeds(generator: Generators, batch_size: int) -> list[int]:
    """One seed per sample. `torch.Generator(device).manual_seed(seed)` then makes the sample again, alone or in any batch.

    A generator nobody has drawn from yet gives its own seed to its first sample, so `generator` and `[generator]` are the same
    for one sample. Every other seed is drawn from it: that of sample b is the b-th number, whatever the batch size. In all cases
    the generator has moved on afterwards, so a second call with it makes other samples.

    Args:
        generator: One generator, a list with one per sample, or None for PyTorch's global one.

    Raises:
        ValueError: If it is anything else, or the list has another length than the batch.
    """
    check_generator(generator, batch_size)
    if isinstance(generator, Sequence):
        return [sample_seeds(source, 1)[0] for source in generator]
    source = torch.default_generator if generator is None else generator
    seed = source.initial_seed()
    untouched = torch.equal(source.get_state(), torch.Generator(source.device).manual_seed(seed).get_state())
    if generator is None and seed >= _SEEDS:  # not `torch.manual_seed`, but 64 random bits that PyTorch began with
        untouched = False
    drawn = [int(torch.randint(_SEEDS, (1,), generator=source, device=source.device)) for _ in range(batch_size)]
    return [seed, *drawn[1:]] if untouched and drawn else drawn


def split_generator(generator: Generators, batch_size: int) -> list[torch.Generator]:
    """A generator of its own for every sample, with the seeds of `sample_seeds`.

    Raises:
        ValueError: If a list has another length than the batch.
    """
    sources = generator if isinstance(generator, Sequence) else [generator] * batch_size
    seeds = sample_seeds(generator, batch_size)
    return [
        torch.Generator("cpu" if source is None else source.device).manual_seed(seed)
        for source, seed in zip(sources, seeds, strict=True)
    ]


def draw_uniforms(generator: Generators, batch_size: int, num_candidates: int, length: int) -> torch.Tensor:
    """Uniform numbers in [0, 1) of shape (B, N, 2, L), for tokens and for positions, on the generators' device.

    Candidate 0's come first, so they do not depend on N. A list gives each sample its own stream; one generator (or None, the
    global one) is drawn from sample after sample.
    """
    return uniforms(generator, batch_size, (num_candidates, 2, length))


def uniforms(generator: Generators, batch_size: int, shape: Sequence[int]) -> torch.Tensor:
    """Uniform numbers in [0, 1) of `shape` for every sample, (B, *shape), on the generators' device.

    Raises:
        ValueError: If `generator` is none, or a list of another length than the batch.
    """
    check_generator(generator, batch_size)
    if isinstance(generator, Sequence):
        draws = [torch.rand(tuple(shape), generator=own, dtype=torch.float32, device=own.device) for own in generator]
        return torch.stack(draws)
    device = generator.device if generator is not None else None
    return torch.rand((batch_size, *shape), generator=generator, dtype=torch.float32, device=device)


def draw_integers(generator: Generators, batch_size: int, highest: int) -> torch.Tensor:
    """One integer in [0, highest) per sample, (B,) long on the CPU, drawn as `uniforms` are.

    Raises:
        ValueError: If `generator` is none, or a list of another length than the batch.
    """
    check_generator(generator, batch_size)
    sources = generator if isinstance(generator, Sequence) else [generator or torch.default_generator] * batch_size
    return torch.cat([torch.randint(highest, (1,), generator=source, device=source.device).cpu() for source in sources])


def gumbel(uniform: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise from uniform numbers, float32."""
    tiny = torch.finfo(torch.float32).tiny
    return -torch.log(-torch.log(uniform.float().clamp(min=tiny)))


def keep_top_k(logits: torch.Tensor, top_k: int | None) -> torch.Tensor:
    """Leaves the `top_k` largest logits (..., V), and those equal to the smallest of them; -inf elsewhere."""
    if top_k is None or top_k >= logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(top_k, -1).values[..., -1:], -torch.inf)


def nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """The smallest set of tokens that holds the mass `top_p`, any of equal ones: logits (..., V) to bool (..., V)."""
    return _sorted_nucleus(logits, top_p) if logits.shape[-1] <= _SORTED else _bisected_nucleus(logits, top_p)


_SORTED = 1024
"""The largest vocabulary that is sorted; of larger ones that would take longer than everything else in a step."""


def _sorted_nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    ordered, order = logits.sort(-1, descending=True)
    p = ordered.softmax(-1)
    inside = p.cumsum(-1) - p < top_p
    return torch.zeros_like(inside).scatter(-1, order, inside)


def _bisected_nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Finds the threshold of log p by bisection, up to 1e-5; of the tokens within that, the earlier ones are taken."""
    log_p = logits.detach().log_softmax(-1)
    p = log_p.exp()
    inside = torch.empty_like(p)  # 1 and 0: vectorised, as masks of bools are not
    # Tokens below this one have less than 1 - top_p together.
    lowest = math.log((1 - top_p) / p.shape[-1])
    low, high = torch.full_like(p[..., :1], lowest), torch.zeros_like(p[..., :1])
    for _ in range(math.ceil(math.log2(-lowest / 1e-5))):
        middle = (low + high) / 2
        enough = torch.gt(log_p, middle, out=inside).mul_(p).sum(-1, keepdim=True) >= top_p
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    above = log_p > high
    mass = torch.where(above, p, 0.0).sum(-1, keepdim=True)
    last = torch.where((log_p > low) & ~above, p, 0.0)
    return above | ((last > 0) & (mass + last.cumsum(-1) - last < top_p))


def drawn_from(logits: torch.Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None) -> torch.Tensor:
    """logits / τ_token (..., V), -inf for tokens that top-k and top-p filtering leave out; τ_token = 0 filters the logits."""
    logits = keep_top_k(logits if temperature in (0, 1) else logits / temperature, top_k)
    if top_p is None or top_p >= 1:
        return logits
    return logits.masked_fill(~nucleus(logits, top_p), -torch.inf)


def sample_tokens(
    logits: torch.Tensor,
    uniform: torch.Tensor,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
) -> torch.Tensor:
    """v ~ softmax(logits / τ_token) by inverse CDF, after top-k and top-p filtering; τ_token = 0 is the arg-max.

    Args:
        logits: (..., V) float32.
        uniform: (..., N) in [0, 1).

    Returns:
        (..., N) token ids, never one of probability 0.
    """
    if temperature == 0:
        return logits.argmax(-1, keepdim=True).expand(uniform.shape)
    cdf = drawn_from(logits, temperature, top_k, top_p).softmax(-1).cumsum(-1)
    total = cdf[..., -1:].contiguous()
    tokens = torch.searchsorted(cdf, (uniform * total).contiguous(), right=True)
    # Rounding may bring u · total up to the total: the last token that has any mass is then meant.
    return torch.minimum(tokens, torch.searchsorted(cdf, total))


def select_positions(
    phi: torch.Tensor, entropies: torch.Tensor, count: torch.Tensor, bound: float = 0, bound_only: bool = False
) -> torch.Tensor:
    """A (B, N, L): the `count` (B,) best of φ (B, N, L), or as many more as an entropy bound allows.

    At equal φ the earlier position is better; -inf is never selected for the bound. Within the bound, Σ H - max H <= bound:
    decoding positions independently of each other costs at most that many nats, by which their joint entropy falls short of the
    sum of their own (Ben-Hamu et al., "Accelerated Sampling from Masked Diffusion Models via Entropy Bounded Unmasking", arXiv
    2505.24857). One position always is.

    Args:
        entropies: H_l (B, L).
        bound: In nats; 0 for none.
        bound_only: Whether the bound alone counts, and not `count`; positions where φ is inf are always selected.
    """
    ordered, order = phi.sort(dim=-1, descending=True, stable=True)
    best = ordered == torch.inf if bound_only else torch.arange(phi.shape[-1], device=phi.device) < count[:, None, None]
    if bound_only or bound > 0:
        costs = entropies[:, None].expand(phi.shape).gather(-1, order)
        best = best | ((costs.cumsum(-1) - costs.cummax(-1).values <= bound) & (ordered > -torch.inf))
    return torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, best.expand(order.shape))


def first_occurrence(candidates: torch.Tensor) -> torch.Tensor:
    """The index (B, N) of the first candidate (B, N, L) that leads to the same state."""
    if candidates.shape[1] == 1:
        return torch.zeros(candidates.shape[:2], dtype=torch.long, device=candidates.device)
    equal = (candidates[:, :, None] == candidates[:, None]).all(-1)
    return equal.int().argmax(-1)


def differ(compared: torch.Tensor, duplicate_of: torch.Tensor, masked: torch.Tensor, selected: torch.Tensor) -> bool:
    """Whether a lookahead has something to decide: candidates of a sample that is compared differ, and masks are left.

    Args:
        compared: (B,) bool.
        duplicate_of: (B, N), from `first_occurrence`.
        masked, selected: M_t (B, L) and A (B, N, L).
    """
    undecided = (masked[:, None] & ~selected).flatten(1).any(-1)
    return bool((compared & (duplicate_of > 0).any(-1) & undecided).any())

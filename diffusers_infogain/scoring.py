"""The mathematics of information-gain sampling, as pure functions on tensors.

Notation of "Improving Sampling for Masked Diffusion Models via Information Gain" (arXiv 2602.18176): z_t is a state, M_t its
masked positions, p_l the model's distribution at position l, H_l its entropy in nats, 𝓗(z_t) the uncertainty of the state,
C(a | z_t) the cost of an action a, IG(a; z_t) its information gain, J(a) the objective.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

NEGLIGIBLE = -110.0
"""Logits this far below the largest are as good as -inf: exp is exactly 0 in float32."""


def moments(
    logits: torch.Tensor, below: torch.Tensor | None = None, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """H_l in nats, max_v x_v and log Σ_v exp(x_v - max x) of logits x: (R, V) float32 to (R,) each. NaN stays NaN.

    H = log Z + Σ_v p_v (max x - x_v) with Z = Σ_v exp(x_v - max x): both terms are >= 0, so nothing cancels.

    Args:
        below, weights: (R, V), room to work in; by default new tensors.
    """
    top = logits.amax(-1)
    rest = torch.clamp(torch.sub(logits, top[:, None], out=below), min=NEGLIGIBLE, out=below)
    p = torch.exp(rest, out=weights)
    total = p.sum(-1)
    log_total = total.log()
    return log_total - torch.mul(p, rest, out=weights).sum(-1) / total, top, log_total


def divergence(
    logits: torch.Tensor, other_log_p: torch.Tensor, below: torch.Tensor | None = None, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(p ‖ q) in nats and max_v x_v, of logits x and the `floored_log_softmax` of others: (R, V) twice to (R,) each.

    Args:
        below, weights: As in `moments`.
    """
    top = logits.amax(-1)
    rest = torch.clamp(torch.sub(logits, top[:, None], out=below), min=NEGLIGIBLE, out=below)
    p = torch.exp(rest, out=weights)
    total = p.sum(-1)
    value = torch.mul(p, torch.sub(rest, other_log_p, out=below), out=weights).sum(-1) / total - total.log()
    # Where p > 0 and q = 0 the floor makes it larger than any divergence of finite logits.
    return value.clamp(min=0).masked_fill(value > _FINITE, torch.inf), top


_FINITE = 1e20


def floored_log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """log q(v), finite where q is 0, so that 0 · log q is 0: (R, V) to (R, V), float32."""
    return logits.float().log_softmax(-1).clamp(min=torch.finfo(torch.float32).min)


def _per_row(function: Callable[[torch.Tensor], torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
    """A function of (R, V) applied to (..., V), in float32."""
    return function(logits.float().reshape(-1, logits.shape[-1])).view(logits.shape[:-1])


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """H_l = -Σ_v p_l(v) log p_l(v) in nats, in float32: (..., V) to (...). Logits may be -inf, NaN stays NaN."""
    return _per_row(lambda rows: moments(rows)[0], logits)


def surprisal_variance(logits: torch.Tensor) -> torch.Tensor:
    """Var[-log p_l(v)] = Σ_v p_l(v) (log p_l(v))² - H_l² in nats², v drawn from p_l: (..., V) to (...). 0 log 0 = 0."""
    log_p = logits.float().log_softmax(-1)
    p = log_p.exp()
    second = torch.where(p == 0, 0.0, p * log_p.square()).sum(-1)
    return (second - entropy(logits).square()).clamp(min=0)


def log_probability(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """log p_l(v) of tokens: (..., V) and (..., N) long to (..., N)."""
    return logits.float().gather(-1, tokens) - logits.float().logsumexp(-1, keepdim=True)


def top_probability(logits: torch.Tensor) -> torch.Tensor:
    """max_v p_l(v): (..., V) to (...)."""
    return _per_row(lambda rows: (-moments(rows)[2]).exp(), logits)


def margin(logits: torch.Tensor) -> torch.Tensor:
    """p_(1) - p_(2), the lead of the most probable token over the second: (..., V) to (...)."""
    if logits.shape[-1] == 1:
        return torch.ones(logits.shape[:-1], dtype=torch.float32, device=logits.device)
    first, second = logits.float().softmax(-1).topk(2, dim=-1).values.unbind(-1)
    return first - second


def kl_divergence(logits: torch.Tensor, other_logits: torch.Tensor) -> torch.Tensor:
    """KL(p ‖ q) = Σ_v p(v) (log p(v) - log q(v)) in nats: (..., V) to (...). 0 log 0 = 0."""
    return _per_row(lambda rows: divergence(rows, floored_log_softmax(other_logits).view(rows.shape))[0], logits)


def action_cost(entropies: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
    """C(a | z_t) = Σ_{l in A} H_l(z_t): entropies and A (..., L) to (...)."""
    return torch.where(selected, entropies, 0.0).sum(-1)


def state_uncertainty(entropies: torch.Tensor, masked: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """𝓗(z_t): the mean (else the sum) of H_l over M_t, 0 where nothing is masked: (..., L) to (...)."""
    total = torch.where(masked, entropies, 0.0).sum(-1)
    return total / masked.sum(-1).clamp(min=1) if reduction == "mean" else total


def information_gain(uncertainty: torch.Tensor, next_uncertainty: torch.Tensor) -> torch.Tensor:
    """IG(a; z_t) = 𝓗(z_t) - 𝓗(z_{t-1}): (B,) and (B, N) to (B, N)."""
    return uncertainty[:, None] - next_uncertainty


def surprise(cost: torch.Tensor, divergences: torch.Tensor, next_masked: torch.Tensor) -> torch.Tensor:
    """IG_kl(a; z_t) = C(a | z_t) + Σ_{l in M_{t-1}} KL(p_l after a ‖ p_l before): (B, N) and (B, N, L) to (B, N).

    Over the action's tokens, KL and the fall of entropy have the same expectation, the mutual information; but a token that
    merely makes the others predictable is not preferred to one that changes them.
    """
    return cost + torch.where(next_masked, divergences, 0.0).sum(-1)


def objective(gain: torch.Tensor, cost: torch.Tensor, gain_weight: float = 1.0) -> torch.Tensor:
    """J(a) = w · IG(a; z_t) - C(a | z_t); the winner has the largest."""
    return gain_weight * gain - cost

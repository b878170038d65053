"""How likely a model finds an answer: the estimates of log-likelihoods that were published with masked language models.

The model is asked for answers of which a random part is masked. An estimate is a weighted sum of the log-probabilities of the
masked tokens; what is masked, and with what weights, is a matter of drawing numbers, apart from any model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import BaseOutput

from .candidates import Generators, check_generator, sample_seeds
from .checks import check_choice, check_integer, check_number
from .choices import LIKELIHOODS
from .components import tokenize
from .guidance import first_of_equal, guide
from .masked_logits import MaskedLogits
from .models.text_logits import TextCache, longest_text
from .printing import summary
from .reductions import Reader, statistics

DREAM_EPSILON = 1e-3
"""The least share of the tokens that "dream" expects to be masked."""
GROUP_SIZE = 8
"""Of the published evaluations of LLaDA."""


@dataclass
class InfoGainLikelihood(BaseOutput):
    """How likely answers are.

    Attributes:
        log_likelihood: (B,) float64, estimates of log p(answer | prompt) in nats.
        standard_error: (B,) float64, their standard errors in nats: 0 where the estimate takes no random numbers, NaN where one
            group of draws does not tell.
        num_evaluations: (B,) long, the rows of the network that each answer took; parts that were drawn twice are run once.
        is_greedy: With `check_greedy`, (B,) bool, whether decoding the most confident token in each step writes the answer.
    """

    log_likelihood: torch.Tensor
    standard_error: torch.Tensor
    num_evaluations: torch.Tensor
    is_greedy: torch.Tensor | None = None

    def __repr__(self) -> str:
        return summary(self)


@dataclass(frozen=True)
class MaskDraws:
    """What is masked of L tokens in n draws, and what their log-probabilities count.

    Attributes:
        masked: (n, L) bool.
        weights: (n, L) float64, 0 where a masked token does not count. A draw's value is Σ_l w_l log p_l.
        group_size: Draws that were drawn together; those of different groups are independent.
        exact: Whether there is nothing random in it.
    """

    masked: torch.Tensor
    weights: torch.Tensor
    group_size: int
    exact: bool = False


def draw_masks(
    length: int,
    likelihood: str = "llada",
    num_draws: int = 128,
    group_size: int | None = None,
    generator: torch.Generator | None = None,
) -> MaskDraws:
    """Draws which tokens of an answer are masked.

    - "llada" (arXiv 2502.09992): k is uniform on 1, ..., L, and k tokens are masked, each with the weight L / k. The k of the b
      draws of a group are spread evenly: round(k + j · L / b), counted around from L to 1, as published: halves are rounded to
      even numbers, so that with some lengths and groups not all k are equally frequent.
    - "dream" (evaluation of Dream): t is uniform on [0, 1), in a group spread evenly, and each token is masked for itself with
      the probability p = ε + (1 - ε) t, ε = 0.001, with the weight 1 / p.
    - "left_to_right", "right_to_left" (evaluation of Dream): log p of each token when those behind it (before it) are masked,
      too. Nothing is random, `num_draws` has no effect, and there are L draws.

    The expectation of "llada" is E[Σ_l log p(x_σ(l) | x_σ(1), ..., x_σ(l-1))] over all orders σ of the tokens. Like that of
    "dream", up to ε, it is a lower bound on the log-likelihood of the model as a diffusion (arXiv 2406.07524).

    Args:
        length: L >= 1.
        likelihood: One of these names.
        num_draws: n, a multiple of `group_size`.
        group_size: b; by default 8, or `num_draws` if that is less. The published evaluations take their batch size.
        generator: On the CPU; by default PyTorch's global one.

    Raises:
        ValueError: For an argument that does not fit, naming it.
    """
    check_integer("length", length, 1)
    group_size = check_draws(likelihood, num_draws, group_size)
    if likelihood in ("left_to_right", "right_to_left"):
        square = torch.ones(length, length, dtype=torch.bool)
        masked = square.triu() if likelihood == "left_to_right" else square.tril()
        return MaskDraws(masked, length * torch.eye(length, dtype=torch.float64), length, exact=True)
    groups = num_draws // group_size
    place = torch.arange(group_size)
    if likelihood == "dream":
        start = torch.rand(groups, 1, generator=generator)
        p = ((1 - DREAM_EPSILON) * ((start + place / group_size) % 1) + DREAM_EPSILON).view(-1, 1)
        masked = torch.rand(num_draws, length, generator=generator) < p
        return MaskDraws(masked, masked / p.double(), group_size)
    counts, ranks = [], []
    for _ in range(groups):  # in the order in which the published code draws
        k = int(torch.randint(1, length + 1, (), generator=generator))
        spread = torch.linspace(float(k), k + (group_size - 1) * (length / group_size), group_size)
        counts.append((spread.round().long() - 1) % length + 1)
        ranks += [torch.randperm(length, generator=generator) for _ in range(group_size)]
    count = torch.cat(counts)[:, None]
    masked = torch.stack(ranks) < count
    return MaskDraws(masked, masked * (length / count.double()), group_size, exact=length == 1)


def check_draws(likelihood: Any, num_draws: Any, group_size: Any) -> int:
    """The size of a group.

    Raises:
        ValueError: For the first of these arguments of `draw_masks` that does not fit.
    """
    check_choice("likelihood", likelihood, LIKELIHOODS)
    check_integer("num_draws", num_draws, 1)
    check_integer("group_size", group_size, 1, optional=True)
    group_size = min(GROUP_SIZE, num_draws) if group_size is None else group_size
    if num_draws % group_size:
        raise ValueError(f"`num_draws` must be a multiple of `group_size` = {group_size}, got {num_draws}.")
    return int(group_size)


def estimate(log_p: torch.Tensor, draws: MaskDraws) -> tuple[float, float]:
    """The mean of the draws' values, and its standard error from the means of their groups, in nats.

    Args:
        log_p: (n, L) log-probabilities of the answer's tokens; what is not masked is not read.
    """
    values = torch.where(draws.weights > 0, log_p.double() * draws.weights, 0.0).sum(-1)
    mean = float(values.mean())
    if draws.exact:
        return mean, 0.0
    groups = values.view(-1, draws.group_size).mean(-1)
    return mean, float(groups.std() / math.sqrt(len(groups))) if len(groups) > 1 else math.nan


@dataclass(frozen=True)
class Answer:
    """A prompt and its answer.

    Attributes:
        prompt, tokens: Ids; the prompt may be empty, the answer not.
        end: Ids that stay visible behind the answer, such as an encoder's [SEP].
    """

    prompt: list[int]
    tokens: list[int]
    end: tuple[int, ...] = ()

    @property
    def ids(self) -> list[int]:
        """All of them."""
        return [*self.prompt, *self.tokens, *self.end]


def encode_pair(pipe: Any, prompt: str, answer: str, add_special_tokens: bool = True) -> Answer:
    """Prompt and answer as lm-eval and the published evaluations split them: the answer begins with the spaces that end the
    prompt, and is what the ids of both together have behind those of the prompt. Without a prompt it follows the token that
    begins texts, or else the one that ends them.

    Raises:
        ValueError: If no token of an answer is left, or the mask is among the tokens.
    """
    text = prompt + answer
    prompt = prompt.rstrip()
    num_end = pipe._num_end_tokens() if add_special_tokens else 0
    whole = list(tokenize(pipe.tokenizer, text, add_special_tokens=add_special_tokens).input_ids)
    first = list(tokenize(pipe.tokenizer, prompt, add_special_tokens=add_special_tokens).input_ids)
    first = first[: len(first) - num_end]
    if not first:
        tokens = [pipe.tokenizer.bos_token_id, pipe.tokenizer.eos_token_id]
        first = [token for token in tokens if token is not None][:1]
        whole = [*first, *whole]
    found = Answer(first, whole[len(first) : len(whole) - num_end], tuple(whole[len(whole) - num_end :]))
    if not found.tokens:
        raise ValueError(f"`answer` must have at least one token behind `prompt`, got {answer!r} behind {prompt!r}.")
    check_answers(pipe, [found])
    return found


def check_answers(pipe: Any, answers: Sequence[Answer]) -> None:
    """Raises a ValueError for an answer that holds the mask, or is too long for the model together with its prompt."""
    limit, mask = longest_text(pipe.model), pipe.family.mask_token_id
    for answer in answers:
        if mask in answer.ids:
            raise ValueError(f"Prompts and answers must not have the model's mask token, got the ids {answer.ids}.")
        if limit is not None and len(answer.ids) > limit:
            raise ValueError(f"A prompt and its answer have {len(answer.ids)} tokens; the model takes {limit}.")


@dataclass(frozen=True)
class _Part:
    """Tokens `start` to `end` (exclusive) of one answer, of a sequence that a row of the network sees."""

    ids: list[int]
    num_prompt: int
    start: int
    end: int


def _parts(answer: Answer, block_length: int | None) -> list[_Part]:
    """The parts of an answer that are estimated by themselves: all of it, or block by block, each behind those before it."""
    num_prompt, stop = len(answer.prompt), len(answer.prompt) + len(answer.tokens)
    if block_length is None:
        return [_Part(answer.ids, num_prompt, num_prompt, stop)]
    borders = [num_prompt, *range(num_prompt // block_length * block_length + block_length, stop, block_length), stop]
    return [_Part(answer.ids[:end], num_prompt, start, end) for start, end in itertools.pairwise(borders)]


@dataclass(frozen=True)
class AnswerModel:
    """A model that is asked for masked tokens of answers.

    Attributes:
        pipe: The text pipeline.
        guidance_scale: g >= 1, as in the call of the pipeline: log-probabilities are those of guided logits.
        batch_size: Rows in one forward pass of the network, before guidance doubles them.
    """

    pipe: Any
    guidance_scale: float = 1.0
    batch_size: int = 8

    @property
    def rows_per_state(self) -> int:
        """Rows that a state takes."""
        return 1 if self.guidance_scale == 1 else 2

    def predictions(self, rows: Sequence[tuple[_Part, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """At the M masked positions of rows, in order: the log-probability of the true token, the most probable token, and
        its probability, (M,) each.

        Args:
            rows: Parts, each with (L,) bool, what is masked of its tokens.
        """
        found = [self._run(rows[start : start + self.batch_size]) for start in range(0, len(rows), self.batch_size)]
        log_p, top, confidence = map(torch.cat, zip(*found, strict=True))
        return log_p, top, confidence

    def _run(self, rows: Sequence[tuple[_Part, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        family, device = self.pipe.family, self.pipe._execution_device
        length = max(len(part.ids) for part, _ in rows)
        pad = int(family.mask_token_id == 0)  # any token but the mask
        tokens = torch.full((len(rows), length), pad)
        real, where, prompt = (torch.zeros(len(rows), length, dtype=torch.bool) for _ in range(3))
        for row, (part, masked) in enumerate(rows):
            first = length - len(part.ids)
            tokens[row, first:], real[row, first:] = torch.tensor(part.ids), True
            where[row, first + part.start : first + part.end] = masked
            prompt[row, first : first + part.num_prompt] = True
        tokens, real, where, prompt = (tensor.to(device) for tensor in (tokens, real, where, prompt))
        states = tokens.masked_fill(where, family.mask_token_id)
        logits = self._logits(states, real, where)
        if self.guidance_scale != 1:
            uncond = self._logits(states.masked_fill(prompt, family.mask_token_id), real, where)
            weights = torch.full((len(rows),), float(self.guidance_scale), device=device)
            logits = guide(logits, uncond, weights)  # type: ignore[assignment]  # masked logits, as these are
        reader = Reader(logits, where, family.mask_token_id)
        found = statistics(reader)
        reader.check(found.top, 0)
        top = torch.cat([reader.read(part).argmax(-1) for part in reader.blocks()])
        log_p = found.log_probability(reader.at(tokens[where][:, None]))[:, 0]
        return log_p.cpu(), top.cpu(), found.top_probability.cpu()

    def _logits(self, states: torch.Tensor, real: torch.Tensor, where: torch.Tensor) -> MaskedLogits:
        cache = TextCache(self.pipe.model, self.pipe.family)
        cache.begin_block(states, real, 0, states.shape[1])
        rows = torch.arange(len(states), device=states.device)
        return MaskedLogits.at(where, cache.logits(states, rows, where))


@torch.no_grad()
def log_likelihoods(
    model: AnswerModel,
    answers: Sequence[Answer],
    *,
    likelihood: str = "llada",
    num_draws: int = 128,
    group_size: int | None = None,
    generators: Sequence[torch.Generator],
) -> InfoGainLikelihood:
    """Estimates log p(answer | prompt) of every answer, with its own random numbers.

    For block-causal models it is the sum over the blocks that the answer has tokens in: each is masked by itself, behind
    complete blocks, as these models are trained. Answers of models with full attention are one block.

    Args:
        model: The model.
        answers: B answers.
        likelihood, num_draws, group_size: As in `draw_masks`, for each block.
        generators: One for each answer, on the CPU.

    Raises:
        ValueError: For an answer that `check_answers` refuses.
    """
    check_answers(model.pipe, answers)
    every: list[tuple[int, MaskDraws, torch.Tensor, torch.Tensor]] = []
    rows: list[tuple[_Part, torch.Tensor]] = []
    num_states = [0] * len(answers)
    for owner, (answer, generator) in enumerate(zip(answers, generators, strict=True)):
        for part in _parts(answer, model.pipe.family.block_length):
            draws = draw_masks(part.end - part.start, likelihood, num_draws, group_size, generator)
            # Equal states, of which short answers have many, are run once; those without a mask not at all.
            first, kind = first_of_equal(draws.masked)
            rows += [(part, draws.masked[index]) for index in first.tolist() if draws.masked[index].any()]
            num_states[owner] += int(draws.masked[first].any(-1).sum())
            every.append((owner, draws, first, kind))
    found = iter(model.predictions(rows)[0].split([int(masked.sum()) for _, masked in rows])) if rows else iter(())
    log_likelihood = torch.zeros(len(answers), dtype=torch.float64)
    variance = torch.zeros_like(log_likelihood)
    for owner, draws, first, kind in every:
        states = draws.masked[first]
        log_p = torch.zeros(states.shape, dtype=torch.float64)
        for row in states.any(-1).nonzero()[:, 0].tolist():
            log_p[row, states[row]] = next(found).double()
        mean, error = estimate(log_p[kind], draws)
        log_likelihood[owner] += mean
        variance[owner] += error**2
    num_evaluations = torch.tensor(num_states) * model.rows_per_state
    return InfoGainLikelihood(log_likelihood, variance.sqrt(), num_evaluations)


@torch.no_grad()
def are_greedy(model: AnswerModel, answers: Sequence[Answer]) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether decoding the most confident token in each step, without randomness, writes each answer.

    Each block of a block-causal model is decoded behind the ones before it. Decoding of an answer ends at its first wrong token.

    Returns:
        (B,) bool, and the rows of the network that each answer took, (B,) long.
    """
    parts = [_parts(answer, model.pipe.family.block_length) for answer in answers]
    masked = [[torch.ones(part.end - part.start, dtype=torch.bool) for part in own] for own in parts]
    current, right = [0] * len(answers), torch.ones(len(answers), dtype=torch.bool)
    num_evaluations = torch.zeros(len(answers), dtype=torch.long)
    running = list(range(len(answers)))
    while running:
        rows = [(parts[owner][current[owner]], masked[owner][current[owner]]) for owner in running]
        sizes = [int(left.sum()) for _, left in rows]
        _, top, confidence = (values.split(sizes) for values in model.predictions(rows))
        num_evaluations[running] += model.rows_per_state
        for owner, (part, left), tokens, p in zip(running, rows, top, confidence, strict=True):
            best = int(p.argmax())
            place = int(left.nonzero()[best, 0])
            right[owner] = int(tokens[best]) == part.ids[part.start + place]
            left[place] = False
            current[owner] += not left.any()
        running = [owner for owner in running if right[owner] and current[owner] < len(parts[owner])]
    return right, num_evaluations


def check_guidance_scale(guidance_scale: Any) -> None:
    """Raises a ValueError if it is no number >= 1."""
    check_number("guidance_scale", guidance_scale, 1, 1e6)


def answer_generators(generator: Generators, batch_size: int) -> list[torch.Generator]:
    """A generator on the CPU for every answer, from one or from a list of them."""
    check_generator(generator, batch_size)
    return [torch.Generator().manual_seed(seed) for seed in sample_seeds(generator, batch_size)]

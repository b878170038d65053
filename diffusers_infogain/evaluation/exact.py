"""Models with exact marginals, on which samplers can be compared without the errors of a trained network.

A set of sequences x_1 ... x_G is the data. Given a partly masked state z the model gives x_g the weight
softmax_g(sharpness · number of visible tokens of z that agree with x_g), and its prediction at a position is the mixture of
these sequences. Sampling several positions in parallel ignores their dependence, as in any masked diffusion model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..choices import PRESETS
from ..decoding import decode
from ..denoising import Denoise
from ..extras import missing
from ..progress import Progress
from ..scheduling_infogain import InfoGainScheduler
from ..search import decode_best_of
from .samplers import SamplerSpec
from .tables import markdown_table
from .text_tasks import SUDOKU_DIGITS, sudoku_grids

SUDOKU_SHARPNESS = 6.0
DIGITS_SHARPNESS = 1.5
DIGITS_LEVELS = 4
SYNONYMS = (1, 6, 6, 6)
"""The number of codes for each grey level: one for the background and six for each ink, so that entropies favour the
background."""

ExactDenoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""A `Denoise` function that returns a full tensor of logits (R, L, V)."""


def exact_denoise(sequences: torch.Tensor, num_tokens: int, sharpness: float) -> ExactDenoise:
    """A `Denoise` function that returns the exact marginals of a set of sequences (G, L), as log-probabilities (R, L, V).

    The mask id is V = `num_tokens`.
    """
    one_hot = torch.nn.functional.one_hot(sequences, num_tokens).flatten(1).float()

    def denoise(tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        visible = torch.nn.functional.one_hot(tokens, num_tokens + 1)[..., :num_tokens].flatten(1).float()
        weights = (sharpness * visible @ one_hot.T).softmax(-1)
        return (weights @ one_hot).log().unflatten(-1, (-1, num_tokens))

    return denoise


def synonymous_denoise(denoise: ExactDenoise, num_codes: Sequence[int]) -> ExactDenoise:
    """Replaces each token v of a model by `num_codes[v]` synonymous codes, which are equally likely.

    Codes are numbered token after token, and the mask id is their total number. VQ codes are partly synonymous in this way: their
    entropies exceed those of the tokens that they stand for, by log(num_codes[v]) where v is certain.
    """
    token_of = codes_to_tokens(num_codes)
    logarithms = torch.tensor(num_codes).log()[token_of]
    with_mask = torch.cat([token_of, torch.tensor([len(num_codes)])])

    def denoise_codes(codes: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return denoise(with_mask[codes], rows)[..., token_of] - logarithms

    return denoise_codes


def codes_to_tokens(num_codes: Sequence[int]) -> torch.Tensor:
    """The token of each code, (Σ num_codes,)."""
    return torch.arange(len(num_codes)).repeat_interleave(torch.tensor(num_codes))


def sudoku_tokens() -> torch.Tensor:
    """All 288 solved 4x4 Sudokus, (288, 16), as tokens 0-3 in raster order."""
    return torch.tensor([[SUDOKU_DIGITS.index(digit) for digit in grid] for grid in sudoku_grids()])


def is_valid_sudoku(tokens: torch.Tensor) -> torch.Tensor:
    """Whether grids (B, 16) are solved Sudokus: (B,) bool."""
    return nearest_distance(tokens, sudoku_tokens()) == 0


def digit_images() -> torch.Tensor:
    """scikit-learn's 1,797 handwritten digits, 8x8 in 4 grey levels: (1797, 64) long.

    Raises:
        ModuleNotFoundError: Without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise missing("The digits need", "scikit-learn", "exact", "sklearn") from error
    pixels = torch.tensor(load_digits().data)  # 0 to 16
    return (pixels * DIGITS_LEVELS / 16).long().clamp(max=DIGITS_LEVELS - 1)


def nearest_distance(tokens: torch.Tensor, sequences: torch.Tensor) -> torch.Tensor:
    """The Hamming distance of each of `tokens` (B, L) to the closest of `sequences` (G, L): (B,)."""
    return (tokens[:, None] != sequences).sum(-1).amin(1)


def energy_distance(tokens: torch.Tensor, sequences: torch.Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| in Hamming distance, X from `tokens` (B, L), Y from `sequences` (G, L).

    0 if both have the same distribution, and for samples about 0 or slightly below, since X and X' are different samples. Unlike
    the distance to the nearest sequence it also grows if samples are good but all alike.
    """

    num_tokens = 1 + int(max(tokens.max(), sequences.max()))

    def mean_distance(a: torch.Tensor, b: torch.Tensor) -> float:
        # L less the positions where a pair agrees: the number of a that have v at l times that of b, over all v and l.
        counts = (torch.nn.functional.one_hot(x, num_tokens).sum(0).double() for x in (a, b))
        return a.shape[1] - float(torch.mul(*counts).sum()) / (len(a) * len(b))

    within = mean_distance(tokens, tokens) * len(tokens) / max(1, len(tokens) - 1)
    return 2 * mean_distance(tokens, sequences) - within - mean_distance(sequences, sequences)


@dataclass(frozen=True)
class SamplerSetting:
    """A sampler in the comparison.

    Attributes:
        config: Settings of the scheduler.
        one_by_one: Whether there are as many steps as tokens, so that a step decodes one token unless a bound allows more.
        num_runs: The N of best-of-N; 1 for a single run.
    """

    name: str
    config: dict[str, Any]
    one_by_one: bool = False
    num_runs: int = 1


def _look(gain_reduction: str, certainty: str, *, bound: float = 0, n: int = 8, temperature: float = 1.0) -> dict[str, Any]:
    return {
        "sampler": "info_gain",
        "gain_reduction": gain_reduction,
        "certainty": certainty,
        "entropy_bound": bound,
        "num_candidates": n,
        "token_temperature": temperature,
        "top_p": 1.0,
        "lazy_threshold": None,
    }


def _greedy(sampler: str, *, bound: float = 0, temperature: float = 1.0) -> dict[str, Any]:
    return {"sampler": sampler, "entropy_bound": bound, "token_temperature": temperature}


COMPARED = (
    *(SamplerSetting(name, _greedy(name)) for name in ("uniform", "halton", "confidence", "maskgit")),
    *(SamplerSetting(name, _greedy(name)) for name in ("entropy", "margin", "klass", "pivot")),
    SamplerSetting("maskgit, best of 8", _greedy("maskgit"), num_runs=8),
    SamplerSetting("maskgit, one by one", _greedy("maskgit"), one_by_one=True),
    SamplerSetting("maskgit, one by one, τ 0.5", _greedy("maskgit", temperature=0.5), one_by_one=True),
    SamplerSetting("entropy_bound (bound 0.1)", _greedy("entropy_bound", bound=0.1), one_by_one=True),
    SamplerSetting("maskgit, bound 0.25", _greedy("maskgit", bound=0.25), one_by_one=True),
    SamplerSetting("maskgit, bound 0.25, τ 0.5", _greedy("maskgit", bound=0.25, temperature=0.5), one_by_one=True),
    SamplerSetting(
        "maskgit, bound 0.25, τ 0.5, best of 2", _greedy("maskgit", bound=0.25, temperature=0.5), one_by_one=True, num_runs=2
    ),
    SamplerSetting("uniform, bound 0.25", _greedy("uniform", bound=0.25), one_by_one=True),
    SamplerSetting("pivot, bound 0.25", _greedy("pivot", bound=0.25), one_by_one=True),
    SamplerSetting("lookum", {**_look("sum", "maskgit"), "sampler": "lookum"}),
    SamplerSetting("info_gain as in the paper", PRESETS["paper"]),
    SamplerSetting("info_gain mean, confidence positions", _look("mean", "confidence")),
    SamplerSetting("info_gain sum, confidence positions", _look("sum", "confidence")),
    SamplerSetting("info_gain sum, uniform positions", _look("sum", "uniform")),
    SamplerSetting("info_gain sum", _look("sum", "maskgit")),
    SamplerSetting("info_gain sum, τ 0.5", _look("sum", "maskgit", temperature=0.5)),
    SamplerSetting("info_gain sum, bound 1, N 4", _look("sum", "maskgit", bound=1, n=4), one_by_one=True),
    SamplerSetting("info_gain kl", _look("kl", "maskgit")),
    SamplerSetting("info_gain kl, τ 0.5", _look("kl", "maskgit", temperature=0.5)),
    SamplerSetting("info_gain kl, bound 1, N 4", _look("kl", "maskgit", bound=1, n=4), one_by_one=True),
    SamplerSetting("info_gain kl, bound 1, N 4, τ 0.5", _look("kl", "maskgit", bound=1, n=4, temperature=0.5), one_by_one=True),
    SamplerSetting("info_gain, default", PRESETS["default"], one_by_one=True),
)
"""The samplers of the comparison; unless their names say otherwise they follow the task's schedule, with N = 8 candidates."""


@dataclass
class ExactResult:
    """The figures of one sampler on one task.

    Attributes:
        quality: The mean of the task's own measure.
        spread: The standard error of `quality`.
        distinct: The number of distinct samples of a seed, averaged over the seeds.
        energy_distance: The energy distance of all samples to the data.
        num_evaluations: Model evaluations per sample.
        cumulative_entropy: In nats, per sample.
        samples: The number of samples over all seeds.
    """

    name: str
    quality: float
    spread: float
    distinct: float
    energy_distance: float
    num_evaluations: float
    cumulative_entropy: float
    samples: int


def run_setting(
    denoise: Denoise,
    quality: Callable[[torch.Tensor], torch.Tensor],
    sequences: torch.Tensor,
    setting: SamplerSetting,
    *,
    num_tokens: int,
    length: int,
    num_inference_steps: int,
    num_samples: int,
    seeds: Sequence[int] = (0,),
    token_of: torch.Tensor | None = None,
    grid: tuple[int, int] | None = None,
    **config: Any,
) -> ExactResult:
    """Decodes `num_samples` sequences per seed from an empty canvas and compares them with the data, `sequences`.

    Args:
        quality: The measure of each sample (B, L): (B,).
        token_of: The token of each code, if the model predicts synonymous codes.
        grid: (height, width) of the tokens.
        config: Further settings of the scheduler.
    """
    if setting.one_by_one:
        num_inference_steps = length
        config.pop("tokens_per_step", None)
    scheduler = InfoGainScheduler(mask_token_id=num_tokens, **{**config, **setting.config})
    scheduler.set_timesteps(num_inference_steps)
    canvas = torch.full((num_samples, length), num_tokens)
    tokens, distinct, evaluations, entropies = [], [], [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        if setting.num_runs > 1:
            output = decode_best_of(denoise, scheduler, canvas, num_runs=setting.num_runs, generator=generator, grid=grid)
        else:
            output = decode(denoise, scheduler, canvas, generator=generator, grid=grid)
        tokens.append(output.tokens if token_of is None else token_of[output.tokens])
        distinct.append(len(tokens[-1].unique(dim=0)))
        evaluations.append(output.trace.num_evaluations.sum(0).double())
        entropies.append(output.trace.cumulative_entropy)
    qualities = quality(torch.cat(tokens)).double()
    return ExactResult(
        name=setting.name,
        quality=qualities.mean().item(),
        spread=(qualities.std() / len(qualities) ** 0.5).item(),
        distinct=sum(distinct) / len(distinct),
        energy_distance=energy_distance(torch.cat(tokens), sequences),
        num_evaluations=torch.cat(evaluations).mean().item(),
        cumulative_entropy=torch.cat(entropies).mean().item(),
        samples=len(qualities),
    )


@dataclass(frozen=True)
class ExactTask:
    """A data set with its exact model, the settings of its decoding (arguments of `run_setting`), and its measure of quality."""

    title: str
    sequences: torch.Tensor
    denoise: Denoise
    quality: Callable[[torch.Tensor], torch.Tensor]
    options: dict[str, Any]

    def run(self, setting: SamplerSetting, num_samples: int, seeds: Sequence[int] = (0,)) -> ExactResult:
        """Decodes and measures samples with a sampler."""
        return run_setting(
            self.denoise, self.quality, self.sequences, setting, num_samples=num_samples, seeds=seeds, **self.options
        )


def sudoku_task(tokens_per_step: int = 2) -> ExactTask:
    """4x4 Sudoku; quality is the share of valid grids (higher is better)."""
    grids = sudoku_tokens()
    return ExactTask(
        sequences=grids,
        title=f"4x4 Sudoku, {tokens_per_step} tokens a step: share of valid grids (higher is better)",
        denoise=exact_denoise(grids, 4, SUDOKU_SHARPNESS),
        quality=is_valid_sudoku,
        options={
            "num_tokens": 4,
            "length": 16,
            "grid": (4, 4),
            "num_inference_steps": -(-16 // tokens_per_step),
            "tokens_per_step": tokens_per_step,
        },
    )


def digits_task(num_inference_steps: int = 8, num_codes: Sequence[int] = (1,) * DIGITS_LEVELS) -> ExactTask:
    """Handwritten digits; quality is the Hamming distance to the nearest real one (lower is better).

    Args:
        num_codes: The number of synonymous codes for each grey level.
    """
    images = digit_images()
    codes = "" if max(num_codes) == 1 else f", grey levels written by {', '.join(map(str, num_codes))} codes"
    return ExactTask(
        sequences=images,
        title=f"8x8 digits, {num_inference_steps} steps{codes}: pixels that differ from the nearest real digit (lower is better)",
        denoise=synonymous_denoise(exact_denoise(images, DIGITS_LEVELS, DIGITS_SHARPNESS), num_codes),
        quality=lambda tokens: nearest_distance(tokens, images),
        options={
            "num_tokens": sum(num_codes),
            "length": 64,
            "grid": (8, 8),
            "num_inference_steps": num_inference_steps,
            "token_of": codes_to_tokens(num_codes),
        },
    )


def format_table(title: str, results: list[ExactResult]) -> str:
    """A Markdown table of results under their title and number of samples."""
    header = ("sampler", "quality", "energy distance", "distinct samples of a seed", "NFE", "cumulative entropy (nats)")
    rows = []
    for result in results:
        costs = [f"{result.num_evaluations:.1f}", f"{result.cumulative_entropy:.1f}"]
        variety = [f"{result.energy_distance:.2f}", f"{result.distinct:.0f}"]
        rows.append([result.name, f"{result.quality:.3f} ± {result.spread:.3f}", *variety, *costs])
    return f"**{title}**, {results[0].samples} samples\n\n{markdown_table(header, rows)}"


def tasks_one_by_one() -> dict[str, ExactTask]:
    """All tasks, for settings that decode one token per step unless a bound or `tokens_per_step` has them decode more."""
    digits, synonyms = digits_task(), digits_task(num_codes=SYNONYMS)
    pixels = "pixels that differ from the nearest real digit (lower is better)"
    codes = ", ".join(map(str, SYNONYMS))
    return {
        "sudoku": replace(sudoku_task(), title="4x4 Sudoku: share of valid grids (higher is better)"),
        "digits": replace(digits, title=f"8x8 digits: {pixels}"),
        "synonyms": replace(synonyms, title=f"8x8 digits, grey levels written by {codes} codes: {pixels}"),
    }


def one_by_one(sampler: SamplerSpec) -> SamplerSetting:
    """A sampler as a setting that has as many steps as there are tokens.

    Raises:
        ValueError: For a search with beams, which is not measured here.
    """
    if "num_beams" in sampler.call:
        raise ValueError(f"`samplers` must not search with beams on exact models, got {sampler.name!r}.")
    return SamplerSetting(sampler.name, sampler.scheduler, one_by_one=True, num_runs=sampler.call.get("num_runs", 1))


def compare_samplers(samplers: Sequence[SamplerSpec], num_samples: int = 200, seeds: Sequence[int] = (0,)) -> str:
    """The comparison of some samplers on all tasks, one by one, as Markdown."""
    return _compare(list(tasks_one_by_one().values()), [one_by_one(sampler) for sampler in samplers], num_samples, seeds)


def compare_exact(num_samples: int = 200, seeds: Sequence[int] = (0,), settings: tuple[SamplerSetting, ...] = COMPARED) -> str:
    """The comparison of all samplers on both exact models, as Markdown."""
    return _compare([sudoku_task(2), sudoku_task(4), digits_task(8), digits_task(8, SYNONYMS)], settings, num_samples, seeds)


def _compare(tasks: Sequence[ExactTask], settings: Sequence[SamplerSetting], num_samples: int, seeds: Sequence[int]) -> str:
    with Progress(total=len(tasks) * len(settings), desc="exact models") as progress:
        tables = []
        for task in tasks:
            results = []
            for setting in settings:
                results.append(task.run(setting, num_samples, seeds))
                progress.update()
            tables.append(format_table(task.title, results))
    return "\n\n".join(tables)

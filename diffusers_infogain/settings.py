"""The settings of `InfoGainScheduler`, in one table.

The constructor's checks, the flags of the command line and the table in the documentation all read it. Nothing heavy is
imported, so that `--help` is quick.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .checks import LARGEST_NUMBER, check_bool, check_choice, check_integer, check_number, check_temperature, check_type


@dataclass(frozen=True)
class Setting:
    """One setting: what it may be, and one line that says what it does.

    Attributes:
        type: int, float, bool, str (a path), "name" (see `choices`) or "temperature" (a number or a pair of numbers).
        default: The constructor's default.
        help: What it does.
        lowest, highest: Bounds of a number.
        exclusive: Whether `lowest` itself is not allowed; for a pair of temperatures, whether its ends must be above 0.
        choices: Names to choose from; empty where they are the registered rules.
        optional: Whether None is allowed.
        only_for: "text" or "images" where the setting makes sense for one of them only.
    """

    type: type | str
    default: Any
    help: str
    lowest: float = 0
    highest: float = LARGEST_NUMBER
    exclusive: bool = False
    choices: tuple[str, ...] = ()
    optional: bool = False
    only_for: str | None = None

    def check(self, name: str, value: Any) -> None:
        """Raises a ValueError that names the setting if the value is not allowed."""
        if self.type is int:
            check_integer(name, value, int(self.lowest), optional=self.optional)
        elif self.type is float:
            check_number(name, value, self.lowest, self.highest, exclusive=self.exclusive, optional=self.optional)
        elif self.type is bool:
            check_bool(name, value)
        elif self.type == "temperature":
            check_temperature(name, value, positive_ends=self.exclusive)
        elif self.choices:
            check_choice(name, value, self.choices, optional=self.optional)
        elif self.type is str:
            check_type(name, value, (str, type(None)), "the path of a file, as a string, or None")

    @property
    def described(self) -> str:
        """`help`, with the names there are to choose from, and how a pair is given on a command line."""
        if self.type == "temperature":
            return f"{self.help}; one number, or two: start end"
        return f"{', '.join(self.choices)}: {self.help}" if self.choices else self.help

    @property
    def allowed(self) -> str:
        """The values that are allowed, in words."""
        if self.type is bool:
            return "true or false"
        if self.type is str:
            words = "path of a file"
        elif self.type == "name":
            words = ", ".join(f'"{name}"' for name in self.choices) or "name of a rule"
        elif self.type == "temperature":
            words = f"number >= 0, or a pair (start, end){' of numbers > 0' if self.exclusive else ''}"
        elif self.highest != LARGEST_NUMBER:
            words = f"number in {'(' if self.exclusive else '['}{self.lowest:g}, {self.highest:g}]"
        else:
            words = "integer" if self.type is int else "number"
            words += f" >= {self.lowest:g}" if self.lowest != -LARGEST_NUMBER else ""
        return words + (" or none" if self.optional else "")


MASKING_SCHEDULES = ("cosine", "linear", "arccos", "even", "dream")
CERTAINTIES_OF = ("model", "draws")
SCHEDULE_COUNTS = ("masked", "canvas")
ANNEALINGS = ("linear", "product")
GAIN_REDUCTIONS = ("mean", "sum", "kl")
RUN_SCORES = ("cumulative_entropy", "log_likelihood", "entropy_and_likelihood")
CORRECTORS = ("verify", "remdm_conf", "remdm_loop", "p2", "edit")
RETRY_LIMITS = ("retry_above_nats", "retry_below_nats", "retry_below_sigmas")
"""The settings that begin samples anew; None where they do not."""

_OF_KLASS = "of the samplers klass and klass_parallel"
_OF_REMDM = "of the corrector remdm_loop"
_OF_PC = "of the rule pc_sampler"

SETTINGS: dict[str, Setting] = {
    "masking_schedule": Setting(
        "name", "cosine", "how the number of masked tokens falls over the steps", choices=MASKING_SCHEDULES
    ),
    "schedule_counts": Setting(
        "name", "masked", "what the schedule takes a share of: what is masked, or the canvas", choices=SCHEDULE_COUNTS
    ),
    "tokens_per_step": Setting(int, None, "fixed number of tokens per step, instead of the schedule", lowest=1, optional=True),
    "sampler": Setting("name", "info_gain", "rule that picks the tokens to decode; `diffusers-infogain samplers` lists them"),
    "certainty": Setting("name", "halton", "rule that proposes positions for the lookahead samplers"),
    "certainty_of": Setting(
        "name",
        "model",
        "what confidence, margin and entropy are taken of: the model's distribution, or the one that tokens are drawn from",
        choices=CERTAINTIES_OF,
    ),
    "num_candidates": Setting(int, 4, "actions compared per step", lowest=1),
    "token_temperature": Setting("temperature", 1.0, "of the token draws; 0 takes the most probable token", exclusive=True),
    "position_temperature": Setting(
        "temperature", 0.4, "of the draws of positions in candidates after the first; 0 makes candidates differ in tokens only"
    ),
    "draw_first": Setting(bool, False, "the first candidate, or a greedy sampler's only one, draws its positions, too"),
    "choice_temperature": Setting("temperature", (2.0, 0.0), "factor on the Gumbel noise of the rule maskgit"),
    "randomize_temperature": Setting(
        "temperature", (1.0, 0.0), "of the rule titok: factor on the Gumbel noise on logits and on scores"
    ),
    "softmax_temperature": Setting(
        "temperature", 1.0, "of the rule titok: what logits are divided by before the noise", exclusive=True
    ),
    "pivot_temperature": Setting(
        "temperature", 1.0, "of the draws of pivots in candidates after the first, in nats, of the rule pivot"
    ),
    "annealing": Setting("name", "linear", "how temperatures of positions go from start to end", choices=ANNEALINGS),
    "top_k": Setting(int, None, "draw from the k most probable tokens", lowest=1, optional=True),
    "top_p": Setting(
        float,
        None,
        "draw from the smallest set of tokens with this probability; 1: off",
        highest=1,
        exclusive=True,
        optional=True,
    ),
    "confidence_threshold": Setting(
        float, None, "commit tokens above this probability without lookahead", highest=1, optional=True
    ),
    "parallel_threshold": Setting(
        float, 0.9, "probability above which confidence_parallel and klass_parallel decode a position", highest=1
    ),
    "parallel_factor": Setting(
        float, 1.0, "of the samplers factor_parallel and frechet_parallel: how much doubt the tokens of a step may add up to"
    ),
    "gain_weight": Setting(float, 1.0, "weight of the information gain against the cost"),
    "gain_reduction": Setting("name", "sum", "what the lookahead counts as gain", choices=GAIN_REDUCTIONS),
    "entropy_bound": Setting(
        float,
        None,
        "in nats; decode more tokens than the schedule asks for while they are this independent; 0: off",
        optional=True,
    ),
    "lazy_threshold": Setting(
        float,
        -5.0,
        "look at the candidates of info_gain one after the other, and take the first whose objective is at least this, in nats",
        lowest=-LARGEST_NUMBER,
        optional=True,
    ),
    "best_run_by": Setting(
        "name", "entropy_and_likelihood", "by what the best of several runs (num_runs) is chosen", choices=RUN_SCORES
    ),
    "num_tries": Setting(int, 3, "how often a sample is begun at most, where one of the limits retry_... is set", lowest=1),
    "retry_above_nats": Setting(
        float,
        None,
        "begin a sample anew once its cumulative entropy, less the log-likelihood of its tokens, rises above this",
        optional=True,
    ),
    "retry_below_nats": Setting(
        float,
        None,
        "begin a sample anew once the log-likelihood of its tokens falls below this",
        lowest=-LARGEST_NUMBER,
        optional=True,
    ),
    "retry_below_sigmas": Setting(
        float,
        None,
        "the same, in standard deviations from what the model expects of such a sample",
        lowest=-LARGEST_NUMBER,
        optional=True,
    ),
    "corrector": Setting(
        "name", None, "masks decoded tokens again, or replaces them, to mend errors", choices=CORRECTORS, optional=True
    ),
    "verify_threshold": Setting(
        float, 0.3, "of verify: a token stays if it has this share of the probability of the most probable one", highest=1
    ),
    "verify_classes": Setting(int, 4, "of verify: the classes of positions that are masked one after the other", lowest=2),
    "remdm_eta": Setting(
        float, None, "of remdm_conf (none: 1) and remdm_loop (none: 0.02): the limit of σ; 0: off", highest=1, optional=True
    ),
    "remdm_t_on": Setting(float, 0.55, f"{_OF_REMDM}: the time, from 1 down, at which it begins", highest=1),
    "remdm_t_off": Setting(float, 0.05, f"{_OF_REMDM}: the time at which it ends", highest=1),
    "remdm_alpha_on": Setting(
        float, 0.9, f"{_OF_REMDM}: the share of the tokens that is decoded meanwhile", highest=1, exclusive=True
    ),
    "p2_eta": Setting(float, 1.0, "of p2: factor on the log-probabilities of decoded tokens; 0: none is masked again"),
    "editing_threshold": Setting(
        float, 0.5, "of edit: probability above which the most probable token replaces a decoded one", highest=1
    ),
    "max_post_steps": Setting(int, 16, "of edit: steps after the one that sees the finished sample, while tokens are replaced"),
    "klass_threshold": Setting(float, 5e-4, f"{_OF_KLASS}: a position is stable if its KL is below this, in nats"),
    "klass_history": Setting(int, 2, "of the sampler klass_parallel: consecutive steps a position must be stable", lowest=1),
    "halton_randomize": Setting(
        bool, False, "of the rule halton: start each sample at a random place of the order", only_for="images"
    ),
    "pc_frequencies": Setting(
        str, None, f"{_OF_PC}: safetensors file with the frequency of every token", optional=True, only_for="text"
    ),
    "pc_decay": Setting(float, 0.25, f"{_OF_PC}: how fast it prefers earlier positions", only_for="text"),
    "pc_clip": Setting(float, 10.0, f"{_OF_PC}: upper limit of its calibrated confidence", only_for="text"),
}
"""Every setting of the scheduler but `mask_token_id`, in the constructor's order."""

DEFAULTS: dict[str, Any] = {name: setting.default for name, setting in SETTINGS.items() if name != "pc_frequencies"}
"""What a preset starts from: all settings but the two that belong to a model or a corpus."""

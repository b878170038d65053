"""What the page offers of a sampler: its name, one line about it, and those of its main settings that it reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..checks import check_choice
from ..choices import PRESET_DESCRIPTIONS, PRESETS, SAMPLER_DESCRIPTIONS
from ..printing import shown
from ..rules import RULES, SAMPLERS
from ..scheduling_infogain import InfoGainScheduler
from ..settings import SETTINGS

OWN_SETTINGS = "model"
"""The choice that stands for the settings that came with the model, where no preset has them."""
MOST_CANDIDATES = 32
"""Of a request: each is a run of the model in every step."""
_TEXT_PRESETS = ("text", "text_fast", "llada", "dream", "sdar", "trado")
_IMAGE_PRESETS = ("maskgit_halton", "showo", "titok_l32", "titok_b64", "titok_s128", "maskgen")


@dataclass(frozen=True)
class Field:
    """A setting of the scheduler as the page shows it.

    Attributes:
        label: In plain words.
        info: What it does, in one line.
        read_by: The samplers or proposing rules that read it; empty where `read_settings` decides by other facts.
    """

    label: str
    info: str
    read_by: tuple[str, ...] = ()


FIELDS: dict[str, Field] = {
    "certainty": Field("Candidates proposed by", "Which positions the candidates decode first."),
    "num_candidates": Field("Candidates", "How many continuations are compared in a step. More are slower."),
    "lazy_threshold": Field(
        "Lazy threshold (nats)", "Take the first candidate that scores at least this. Empty: always compare all of them."
    ),
    "tokens_per_step": Field("Tokens in a step", "Fewer are slower and fit together better."),
    "entropy_bound": Field(
        "Entropy bound (nats)", "Decode more tokens in a step while their uncertainty stays within this. 0: off."
    ),
    "token_temperature": Field("Token temperature", "0 takes the most probable token. Two numbers: start and end."),
    "top_p": Field("Top p", "Draw from the most probable tokens that hold this share. 1: from all."),
    "position_temperature": Field("Position temperature", "How much the positions of later candidates differ."),
    "choice_temperature": Field("Choice temperature", "Noise on the order. Two numbers: start and end."),
    "randomize_temperature": Field("Noise", "On logits and on the order. Two numbers: start and end."),
    "softmax_temperature": Field("Softmax temperature", "Divides logits before the noise. Two numbers: start and end."),
    "pivot_temperature": Field("Pivot temperature", "How much the pivots of later candidates differ."),
    "parallel_threshold": Field(
        "Probability threshold", "Every position above it is decoded at once.", ("confidence_parallel", "klass_parallel")
    ),
    "parallel_factor": Field(
        "Doubt allowed", "How much the doubts of a step may add up to.", ("factor_parallel", "frechet_parallel")
    ),
    "klass_threshold": Field(
        "Stability threshold (nats)", "A position is stable if it changed less than this.", ("klass", "klass_parallel")
    ),
    "klass_history": Field("Stable steps", "For how many steps a position must be stable.", ("klass_parallel",)),
    "halton_randomize": Field("Random start", "Begin each sample at a random place of the order.", ("halton",)),
}
"""The main settings, in the order of the page. The others stay as the preset or the model has them."""
TEMPERATURES = tuple(name for name in FIELDS if SETTINGS[name].type == "temperature")


def model_settings(scheduler: InfoGainScheduler) -> dict[str, Any]:
    """The settings of a model's scheduler, by name."""
    return {name: scheduler.config[name] for name in SETTINGS}


def sampler_choices(model: Mapping[str, Any], of_text: bool) -> list[tuple[str, str]]:
    """(label, value) of what can be chosen for a model: presets first, then the samplers.

    Args:
        model: The model's own settings.
        of_text: Whether it writes text, which has no grid.
    """
    others = _IMAGE_PRESETS if of_text else _TEXT_PRESETS
    presets = [name for name in PRESET_DESCRIPTIONS if _suits(PRESETS[name], of_text) and name not in others]
    presets.sort(key=lambda name: name not in _TEXT_PRESETS)  # stable: those for text first, if there are any
    known = any(all(model[key] == value for key, value in PRESETS[name].items()) for name in presets)
    own = [] if known else [("the model's own settings", OWN_SETTINGS)]
    samplers = [
        name
        for name in SAMPLER_DESCRIPTIONS
        if _suits({**model, "sampler": name}, of_text) and (name != "pc_sampler" or model["pc_frequencies"])
    ]
    return [*own, *((f"{name} (preset)", name) for name in presets), *((name, name) for name in samplers)]


def first_choice(model: Mapping[str, Any], of_text: bool) -> str:
    """The choice that has the settings that came with the model."""
    for _, name in sampler_choices(model, of_text):
        if name == OWN_SETTINGS or (name in PRESETS and all(model[key] == value for key, value in PRESETS[name].items())):
            return name
    raise AssertionError("one of the choices has the model's settings")


def describe(choice: str) -> str:
    """One line about a choice."""
    if choice == OWN_SETTINGS:
        return "what this model came with"
    return PRESET_DESCRIPTIONS.get(choice) or SAMPLER_DESCRIPTIONS[choice]


def _suits(settings: Mapping[str, Any], of_text: bool) -> bool:
    return not (of_text and _rule(settings).on_grid)


def _rule(settings: Mapping[str, Any]) -> Any:
    return RULES[SAMPLERS[settings["sampler"]].rule or settings["certainty"]]


def rule_choices(of_text: bool) -> list[str]:
    """The rules that can propose candidates without a file of their own."""
    return [name for name, rule in RULES.items() if rule.load is None and not (of_text and rule.on_grid)]


def base_settings(choice: str, model: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a choice: the preset's, or those of the model with another sampler. What is None gets its value in use.

    Raises:
        ValueError: For a name that is neither a preset nor a sampler.
    """
    if choice in PRESETS:
        settings = {**model, **PRESETS[choice]}
    elif choice in SAMPLERS:
        settings = {**model, "sampler": choice}
    elif choice == OWN_SETTINGS:
        settings = dict(model)
    else:
        raise ValueError(f"`sampler` must be a preset or a sampler, got {shown(choice)}.")
    scheduler = InfoGainScheduler(mask_token_id=0, **settings)
    return {**settings, "top_p": scheduler.top_p, "entropy_bound": scheduler.entropy_bound}


def read_settings(settings: Mapping[str, Any], of_text: bool) -> list[str]:
    """Those of `FIELDS` that a sampler with these settings reads."""
    sampler, rule = SAMPLERS[settings["sampler"]], _rule(settings)
    compares = sampler.looks_ahead and settings["num_candidates"] > 1
    own_noise = rule.temperature == "choice_temperature"
    reads = {
        "certainty": sampler.looks_ahead,
        "num_candidates": sampler.looks_ahead,
        "lazy_threshold": compares and sampler.weighs_cost and settings["gain_reduction"] != "kl",
        "tokens_per_step": of_text,
        "entropy_bound": True,
        "token_temperature": not rule.draws_tokens,
        "randomize_temperature": rule.draws_tokens,
        "softmax_temperature": rule.draws_tokens,
        "top_p": True,
        "position_temperature": compares and not rule.noisy,
        "choice_temperature": own_noise,
        "pivot_temperature": compares and rule.temperature == "pivot_temperature",
    }
    names = {settings["sampler"], rule.name}
    return [name for name, field in FIELDS.items() if reads.get(name, False) or names & set(field.read_by)]


def shown_value(name: str, value: Any) -> Any:
    """The value of a setting as the page shows it: a pair of temperatures as text."""
    if name in TEMPERATURES:
        return " ".join(f"{end:g}" for end in (value if isinstance(value, (list, tuple)) else (value,)))
    return 1 if name == "tokens_per_step" and value is None else value


def _entered(name: str, value: Any) -> Any:
    """The value of a setting from what stands in its field."""
    if name in TEMPERATURES and isinstance(value, str):
        try:
            ends = [float(part) for part in value.replace(",", " ").split()]
        except ValueError:
            ends = []
        if len(ends) not in (1, 2):
            raise ValueError(f"`{name}` must be one number or two (start end), got {shown(value)}.")
        return ends[0] if len(ends) == 1 else tuple(ends)
    if SETTINGS[name].type is int and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def settings_from(choice: str, entered: Mapping[str, Any], model: Mapping[str, Any], of_text: bool) -> dict[str, Any]:
    """The scheduler's settings of a request.

    Args:
        choice: A preset, a sampler, or `OWN_SETTINGS`.
        entered: What stands in the fields, by the name of the setting. Those that the sampler does not read are left out.
        model: The model's own settings.
        of_text: Whether the model writes text.

    Raises:
        ValueError: For the first value that is not allowed, naming the setting.
    """
    settings = base_settings(choice, model)
    for names in (("certainty", "num_candidates"), tuple(FIELDS)):  # the first two decide what else is read
        read = [name for name in read_settings(settings, of_text) if name in names and name in entered]
        settings |= {name: _entered(name, entered[name]) for name in read}
        for name in read:
            SETTINGS[name].check(name, settings[name])
        check_choice("certainty", settings["certainty"], [*rule_choices(of_text), base_settings(choice, model)["certainty"]])
        if settings["num_candidates"] > MOST_CANDIDATES:
            raise ValueError(
                f"`num_candidates` must be at most {MOST_CANDIDATES} on this page, got {settings['num_candidates']}."
            )
    InfoGainScheduler(mask_token_id=0, **settings)
    return settings


def labelled(message: str, labels: Mapping[str, str] | None = None) -> str:
    """A message in which settings have the labels of the page, such as “Candidates” for `num_candidates`."""
    known = {name: field.label for name, field in FIELDS.items()} | dict(labels or {})
    for name, label in known.items():
        message = message.replace(f"`{name}`", f"“{label}”")
    return message


def field_names(of_text: bool) -> Sequence[str]:
    """The settings that a page has fields for, whatever the sampler."""
    return [name for name in FIELDS if SETTINGS[name].only_for != ("images" if of_text else "text") and _applies(name, of_text)]


def _applies(name: str, of_text: bool) -> bool:
    return of_text or name != "tokens_per_step"

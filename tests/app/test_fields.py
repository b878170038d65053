"""What the page offers of a sampler is what the sampler reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffusers_infogain import PRESETS, InfoGainScheduler, decode
from diffusers_infogain.app import fields
from diffusers_infogain.choices import PRESET_DESCRIPTIONS, SAMPLER_DESCRIPTIONS
from diffusers_infogain.settings import SETTINGS

MASK, LENGTH = 8, 16
TITOK = ("titok_l32", "titok_b64", "titok_s128", "maskgen")
OTHER: dict[str, tuple[Any, ...]] = {
    "certainty": ("confidence", "margin"),
    "num_candidates": (2, 9),
    "lazy_threshold": (None, 50.0, -1.0),
    "tokens_per_step": (3, 1),
    "entropy_bound": (3.0, 1.0),
    "token_temperature": ("0.3", "3"),
    "top_p": (0.3, 0.6),
    "position_temperature": ("5", "0"),
    "choice_temperature": ("0", "9"),
    "randomize_temperature": ("9", "0"),
    "softmax_temperature": ("9", "0.1"),
    "pivot_temperature": ("5", "0"),
    "parallel_threshold": (0.1, 0.5),
    "parallel_factor": (4.0, 0.1),
    "klass_threshold": (0.2, 0.05, 50.0),
    "klass_history": (1, 5),
    "halton_randomize": (True, False),
}
"""Values that matter, for each setting."""
SHOWS: dict[str, dict[str, Any]] = {
    "position_temperature": {"lazy_threshold": 50.0},  # the first candidate is never good enough
    "parallel_threshold": {"klass_threshold": 50.0, "klass_history": 1},  # every position is stable
    "klass_threshold": {"parallel_threshold": 0.1, "klass_history": 1},
    "klass_history": {"klass_threshold": 50.0},
}
"""Other settings under which a setting can be seen to matter."""
MODEL = {name: setting.default for name, setting in SETTINGS.items()}
TEXT = {**MODEL, **PRESETS["text"]}


def tokens(settings: dict[str, Any], seed: int) -> list[list[int]]:
    """What a model of random tables decodes, whose logits depend on what is decoded."""
    generator = torch.Generator().manual_seed(seed)
    own = 3 * torch.randn(LENGTH, MASK + 1, generator=generator)
    pairs = torch.randn(LENGTH, LENGTH, MASK + 1, MASK + 1, generator=generator)

    def denoise(states: torch.Tensor, sample_index: torch.Tensor) -> torch.Tensor:
        shown = torch.nn.functional.one_hot(states, MASK + 1).float() * (states != MASK)[..., None]
        return own + 0.7 * torch.einsum("bju,ijvu->biv", shown, pairs)

    scheduler = InfoGainScheduler(mask_token_id=MASK, **settings)
    canvas = torch.full((2, LENGTH), MASK)
    output = decode(denoise, scheduler, canvas, num_inference_steps=5, generator=torch.Generator().manual_seed(seed), grid=(4, 4))
    return [*output.tokens.tolist(), *output.trace.decoded_at.tolist(), output.trace.num_states.sum(0).tolist()]


@pytest.mark.parametrize("choice", [name for _, name in fields.sampler_choices(MODEL, of_text=False)])
def test_a_sampler_reads_what_is_shown_and_nothing_else(choice):
    base = fields.base_settings(choice, MODEL)
    read = fields.read_settings(base, of_text=False)
    usual = [tokens(base, seed) for seed in range(4)]
    for name in fields.field_names(of_text=False):
        changed = [fields._entered(name, value) for value in OTHER[name]]
        before = [tokens({**base, **SHOWS[name]}, seed) for seed in range(4)] if name in SHOWS else usual
        settings = {**base, **SHOWS.get(name, {})}
        differs = any(tokens({**settings, name: value}, seed) != before[seed] for value in changed for seed in range(4))
        assert differs == (name in read), name


@pytest.mark.parametrize(("model", "of_text"), [(MODEL, False), (TEXT, True)])
def test_every_sampler_and_preset_can_be_chosen_presets_first(model, of_text):
    names = [name for _, name in fields.sampler_choices(model, of_text)]
    labels = [label for label, _ in fields.sampler_choices(model, of_text)]
    assert len(set(names)) == len(names)
    presets = [name for name in names if name in PRESETS]
    assert names[: len(presets)] == presets
    assert all(label.endswith("(preset)") for label in labels[: len(presets)])
    missing = {*SAMPLER_DESCRIPTIONS, *PRESET_DESCRIPTIONS} - set(names)
    of_images = {"halton", "default", "fast", "best", "maskgit_halton", "showo", *TITOK}
    for_text = {"text", "text_fast", "llada", "dream", "sdar", "trado"}
    assert missing == {"pc_sampler"} | (of_images if of_text else for_text)
    assert fields.first_choice(model, of_text) == ("text" if of_text else "default")
    for name in names:
        InfoGainScheduler(mask_token_id=0, **fields.base_settings(name, model))
        assert fields.describe(name)


def test_a_model_with_settings_of_its_own_begins_with_them():
    model = {**MODEL, "num_candidates": 7, "pc_frequencies": "frequencies.safetensors"}
    names = [name for _, name in fields.sampler_choices(model, of_text=False)]
    assert names[0] == fields.first_choice(model, of_text=False) == fields.OWN_SETTINGS
    assert "pc_sampler" in names
    assert fields.base_settings(fields.OWN_SETTINGS, model)["num_candidates"] == 7
    assert fields.describe(fields.OWN_SETTINGS) == "what this model came with"


def test_what_stands_in_the_fields_becomes_settings_of_those_that_are_read():
    entered = {name: fields.shown_value(name, MODEL[name]) for name in fields.FIELDS}
    entered |= {"token_temperature": "1, 0.5", "num_candidates": 3.0, "parallel_factor": 7.0, "entropy_bound": 0, "top_p": 1}
    settings = fields.settings_from("info_gain", entered, MODEL, of_text=False)
    assert (settings["token_temperature"], settings["num_candidates"], settings["top_p"]) == ((1.0, 0.5), 3, 1)
    assert settings["parallel_factor"] == MODEL["parallel_factor"]  # of another sampler
    greedy = fields.settings_from(
        "info_gain", {**entered, "num_candidates": 1, "lazy_threshold": "not read"}, MODEL, of_text=False
    )
    assert greedy["lazy_threshold"] == MODEL["lazy_threshold"]


@pytest.mark.parametrize(
    ("choice", "entered", "message"),
    [
        ("greedy", {}, "`sampler` must be a preset or a sampler, got 'greedy'."),
        ("maskgit", {"choice_temperature": "hot"}, "`choice_temperature` must be one number or two (start end), got 'hot'."),
        ("maskgit", {"choice_temperature": ""}, "`choice_temperature` must be one number or two (start end), got ''."),
        ("maskgit", {"token_temperature": "-1"}, "`token_temperature` must be a number >= 0, got -1.0."),
        ("maskgit", {"top_p": 0}, "`top_p` must be a number in (0, 1] or None, got 0."),
        ("default", {"num_candidates": 33}, "`num_candidates` must be at most 32 on this page, got 33."),
        ("default", {"num_candidates": None}, "`num_candidates` must be an integer >= 1, got None."),
        ("default", {"entropy_bound": "much"}, "`entropy_bound` must be a number >= 0 or None, got 'much'."),
        (
            "entropy_bound",
            {"entropy_bound": 0},
            "`entropy_bound` must be above 0, or None, for the sampler 'entropy_bound', got 0.",
        ),
    ],
)
def test_a_wrong_entry_is_named_in_one_sentence(choice, entered, message):
    with pytest.raises(ValueError) as error:
        fields.settings_from(choice, entered, MODEL, of_text=False)
    assert str(error.value) == message


@pytest.mark.parametrize("certainty", [None, "no_rule", 3, ["halton"]])
def test_a_rule_that_is_none_is_named(certainty):
    with pytest.raises(ValueError, match=r"^`certainty` must be one of .*halton"):
        fields.settings_from("default", {"certainty": certainty}, MODEL, of_text=False)


def test_messages_name_settings_as_the_page_does():
    message = "`num_candidates` must be at most 32, and `seed` 0, got `other`."
    assert fields.labelled(message, {"seed": "Seed"}) == "“Candidates” must be at most 32, and “Seed” 0, got `other`."

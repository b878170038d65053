"""Configuration, protocol and errors of the scheduler; the rules themselves are in test_scheduling_rules.py."""

import copy
import inspect
import json
import math
import re

import pytest
import torch
from diffusers import AmusedScheduler
from helpers.sampling import generators, make_scheduler, random_logits

from diffusers_infogain import PRESETS, InfoGainScheduler
from diffusers_infogain.masked_logits import MaskedLogits
from diffusers_infogain.rules import RULES, SAMPLERS
from diffusers_infogain.settings import SETTINGS
from diffusers_infogain.step import Memory

MASK = 9
CERTAINTIES = tuple(RULES)
PARALLEL_SAMPLERS = tuple(name for name, sampler in SAMPLERS.items() if sampler.ready is not None)
INTEGER, NUMBER = "an integer >= {}", "a number >= 0"
INVALID = [
    *(("mask_token_id", value, INTEGER.format(0)) for value in (-1, 1.5, True, None, "8")),
    ("masking_schedule", "sqrt", "cosine, linear, arccos"),
    ("sampler", "best", ", ".join(SAMPLERS)),
    *(("certainty", value, ", ".join(CERTAINTIES)) for value in ("info_gain", "entropy_bound", *PARALLEL_SAMPLERS, None)),
    *((name, value, INTEGER.format(1)) for name in ("num_candidates", "klass_history") for value in (0, 2.0, True)),
    *((name, value, INTEGER.format(1)) for name in ("tokens_per_step", "top_k") for value in (0, 1.0, "1")),
    *(
        (name, value, NUMBER)
        for name in ("token_temperature", "gain_weight", "entropy_bound", "klass_threshold", "pc_decay", "pc_clip")
        for value in (-0.5, math.nan, "1")
    ),
    *((f"{name}_temperature", value, NUMBER) for name in ("position", "choice", "pivot") for value in (-1, math.nan, None)),
    *(("position_temperature", value, "a number or a pair (start, end)") for value in ((1,), (3, 2, 1), ())),
    *(("top_p", value, "(0, 1]") for value in (0, -0.1, 1.5, math.nan, "0.9")),
    *(
        (name, value, "[0, 1]")
        for name in ("confidence_threshold", "parallel_threshold")
        for value in (-0.1, 1.5, math.nan, "0.9")
    ),
    ("gain_reduction", "median", "mean, sum, kl"),
    *(
        ("token_temperature", value, "a number or a pair (start, end) of numbers > 0")
        for value in ((1, 0), (1,), (1, -1), [1, "1"])
    ),
    *(("halton_randomize", value, "True or False") for value in (1, None)),
    *(("pc_frequencies", value, "the path of a file, as a string, or None") for value in (1, True, b"f")),
]


def state(batch: int = 2, length: int = 8, known: int = 2) -> torch.Tensor:
    tokens = torch.full((batch, length), MASK)
    tokens[:, :known] = torch.arange(known)
    return tokens


@pytest.mark.parametrize(("name", "value", "allowed"), INVALID)
def test_invalid_setting_is_named_with_its_value_and_what_is_allowed(name, value, allowed):
    with pytest.raises(ValueError) as error:
        InfoGainScheduler(**{"mask_token_id": MASK, name: value})
    message = str(error.value)
    assert f"`{name}`" in message
    assert repr(value) in message
    assert allowed in message


def test_each_end_of_a_temperature_pair_is_checked():
    with pytest.raises(ValueError, match="`position_temperature` must be a number >= 0, got -1"):
        InfoGainScheduler(MASK, position_temperature=(2, -1))


def test_unknown_setting_is_an_error():
    with pytest.raises(TypeError, match="number_of_candidates"):
        InfoGainScheduler(MASK, number_of_candidates=4)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_configuration_of_an_amused_scheduler_is_accepted(schedule, tmp_path):
    stock = AmusedScheduler(mask_token_id=25, masking_schedule=schedule)
    stock.save_pretrained(tmp_path)
    for scheduler in (
        InfoGainScheduler.from_config(stock.config, sampler="margin"),
        InfoGainScheduler.from_pretrained(tmp_path, sampler="margin"),
    ):
        assert (scheduler.config.mask_token_id, scheduler.config.masking_schedule) == (25, schedule)
        assert scheduler.config.sampler == "margin"


@pytest.mark.parametrize("temperature", [0.3, (2.0, 0.5)])
def test_saved_scheduler_is_the_same_when_loaded(temperature, tmp_path):
    settings = {"sampler": "lookum", "certainty": "klass", "num_candidates": 3, "top_p": 0.9, "gain_reduction": "mean"}
    saved = InfoGainScheduler(MASK, position_temperature=temperature, confidence_threshold=0.5, tokens_per_step=2, **settings)
    saved.save_pretrained(tmp_path)
    loaded = InfoGainScheduler.from_pretrained(tmp_path)
    for name, value in saved.config.items():
        if isinstance(value, (float, tuple)):  # a temperature's pair is a list in JSON
            assert list(torch.tensor(value).flatten()) == list(torch.tensor(loaded.config[name]).flatten())
        elif not name.startswith("_"):
            assert loaded.config[name] == value
    proposals = []
    for scheduler in (saved, loaded):
        scheduler.set_timesteps(4)
        proposals.append(scheduler.propose(random_logits(2, 8, MASK), 3, state(), generator=generators(1, 2)))
    assert all(torch.equal(proposals[0][name], proposals[1][name]) for name in ("candidates", "selected", "cost"))


def test_set_timesteps_takes_the_stock_pipelines_positional_arguments():
    scheduler = InfoGainScheduler(MASK, position_temperature=0.7)
    scheduler.set_timesteps(5, (2, 0), torch.device("cpu"))
    assert scheduler.timesteps.tolist() == [4, 3, 2, 1, 0]
    assert scheduler.timesteps.device == torch.device("cpu")
    assert scheduler.position_temperatures.tolist() == [2, 1.5, 1, 0.5, 0]


@pytest.mark.parametrize(
    ("config", "temperature", "expected"),
    [
        ({"certainty": "maskgit"}, None, [2, 1, 0]),
        ({"sampler": "maskgit"}, None, [2, 1, 0]),
        ({"certainty": "confidence"}, None, [0.4, 0.4, 0.4]),
        ({"certainty": "pivot"}, None, [1, 1, 1]),
        ({"sampler": "pivot", "pivot_temperature": 3}, None, [3, 3, 3]),
        ({"sampler": "margin", "position_temperature": 0.5}, None, [0.5, 0.5, 0.5]),
        ({"certainty": "margin", "position_temperature": (1, 0)}, None, [1, 0.5, 0]),
        ({"choice_temperature": (1, 0), "position_temperature": 7}, None, [1, 0.5, 0]),
        ({"choice_temperature": (1, 0)}, 3, [3, 3, 3]),
        ({"position_temperature": (1, 0)}, [4, 2], [4, 3, 2]),
    ],
)
def test_each_rule_has_its_temperature_which_is_annealed_and_replaced_for_a_run(config, temperature, expected):
    scheduler = make_scheduler(MASK, 3, temperature, **config)
    torch.testing.assert_close(scheduler.position_temperatures, torch.tensor(expected).float())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "`num_inference_steps` must be an integer >= 1, got 0"),
        ((2.5,), "`num_inference_steps` must be an integer >= 1, got 2.5"),
        ((4, -1), "`temperature` must be a number >= 0, got -1"),
        ((4, (1, 2, 3)), "`temperature` must be a number or a pair"),
    ],
)
def test_invalid_timesteps_are_an_error(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        InfoGainScheduler(MASK).set_timesteps(*arguments)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_propose_and_select_change_neither_the_scheduler_nor_their_arguments(sampler):
    threshold = None if sampler in PARALLEL_SAMPLERS else 0.4
    scheduler = make_scheduler(MASK, 4, sampler=sampler, certainty="klass", confidence_threshold=threshold, top_k=5)
    logits, previous, lookahead = (random_logits(*shape, MASK + 2) for shape in ((2, 9), (2, 9), (2, 8, 9)))
    tokens, allowed = state(length=9), torch.ones(2, 9).bool()
    allowed[:, -2:] = False
    arguments = {
        "logits": logits,
        "tokens": tokens,
        "memory": Memory(state={"logits": previous, "masked": tokens == MASK}),
        "initial_masks": torch.tensor([6, 7]),
    }
    arguments |= {"allowed": allowed, "timestep": scheduler.timesteps[1]}
    before, attributes = copy.deepcopy(arguments), copy.deepcopy(vars(scheduler))
    proposal = scheduler.propose(**arguments, generator=generators(1, 2), grid=(3, 3))
    proposed, looked = copy.deepcopy(proposal), lookahead.clone()
    output = scheduler.select(lookahead if proposal.needs_lookahead else None, 2, proposal)
    assert output.prev_sample is not tokens
    assert torch.equal(arguments.pop("memory").state["logits"], before.pop("memory").state["logits"])
    assert all(torch.equal(arguments[name], value) for name, value in before.items())
    tensors = {name: value for name, value in proposed.items() if name != "memory"}
    assert all(torch.equal(torch.as_tensor(proposal[name]), torch.as_tensor(value)) for name, value in tensors.items())
    assert torch.equal(lookahead, looked)
    assert vars(scheduler).keys() == attributes.keys()
    for name, value in vars(scheduler).items():
        same = torch.equal(value, attributes[name]) if isinstance(value, torch.Tensor) else value == attributes[name]
        assert same, name


def test_a_sampler_without_the_bound_it_goes_by_is_an_error():
    with pytest.raises(ValueError, match="`entropy_bound` must be above 0, or None, for the sampler 'entropy_bound', got 0"):
        InfoGainScheduler.from_config({"mask_token_id": MASK, **PRESETS["paper"]}, sampler="entropy_bound")


@pytest.mark.parametrize("sampler", [*CERTAINTIES, "entropy_bound", *PARALLEL_SAMPLERS])
def test_step_equals_propose_and_select_in_every_layout(sampler):
    scheduler = make_scheduler(MASK, 5, sampler=sampler)
    tokens, logits = state(2, 16), random_logits(2, 16, MASK)
    proposal = scheduler.propose(logits, 3, tokens, generator=generators(3, 4))
    expected = scheduler.select(None, 3, proposal)
    assert not torch.equal(expected.prev_sample, tokens)
    output = scheduler.step(logits, 3, tokens, generator=generators(3, 4))
    grid = scheduler.step(
        logits.transpose(1, 2).unflatten(2, (4, 4)), scheduler.timesteps[1], tokens.view(2, 4, 4), generator=generators(3, 4)
    )
    assert grid.prev_sample.shape == (2, 4, 4)
    for result in (output.prev_sample, grid.prev_sample.flatten(1)):
        assert torch.equal(result, expected.prev_sample)
    (sample,) = scheduler.step(logits, 3, tokens, generators(3, 4), return_dict=False)
    assert torch.equal(sample, expected.prev_sample)


def test_step_follows_the_grid_that_is_not_a_square():
    scheduler = make_scheduler(MASK, 4, sampler="halton", tokens_per_step=2)
    sample = scheduler.step(torch.zeros(1, MASK, 2, 6), 3, torch.full((1, 2, 6), MASK)).prev_sample
    proposal = scheduler.propose(torch.zeros(1, 12, MASK), 3, torch.full((1, 12), MASK), grid=(2, 6))
    assert torch.equal((sample != MASK).flatten(1), proposal.selected[:, 0])
    with pytest.raises(ValueError, match=r"`grid` must be given as \(height, width\) with 12 cells"):
        scheduler.propose(torch.zeros(1, 12, MASK), 3, torch.full((1, 12), MASK), grid=(3, 5))
    line = scheduler.propose(torch.zeros(1, 12, MASK), 3, torch.full((1, 12), MASK))  # without a grid
    assert line.selected[0, 0].sum() == 2
    assert line.selected[0, 0].nonzero().diff(dim=0).item() > 2


@pytest.mark.parametrize("sampler", ["info_gain", "lookum"])
def test_step_with_a_lookahead_sampler_is_an_error_that_says_what_to_use(sampler):
    scheduler = make_scheduler(MASK, 4, sampler=sampler, num_candidates=3)
    with pytest.raises(ValueError, match=f"`step` cannot look ahead as the sampler '{sampler}' with 3 candidates.*`propose`"):
        scheduler.step(random_logits(2, 8, MASK), 3, state())
    single = make_scheduler(MASK, 4, sampler=sampler, num_candidates=1)
    assert (single.step(random_logits(2, 8, MASK), 0, state()).prev_sample != MASK).all()


@pytest.mark.parametrize("timestep", [4, -1, torch.tensor(17)])
def test_unknown_timestep_is_an_error(timestep):
    scheduler = make_scheduler(MASK, 4, sampler="confidence")
    with pytest.raises(ValueError, match=f"`timestep` must be one of the scheduler's 4 timesteps, got {int(timestep)}"):
        scheduler.propose(random_logits(2, 8, MASK), timestep, state())


def test_propose_before_set_timesteps_is_an_error():
    with pytest.raises(ValueError, match="`timesteps` are not set: call `set_timesteps` first"):
        InfoGainScheduler(MASK).propose(random_logits(2, 8, MASK), 0, state())


def test_select_without_a_needed_lookahead_is_an_error():
    scheduler = make_scheduler(MASK, 4)
    proposal = scheduler.propose(random_logits(2, 8, MASK), 3, state(), generator=generators(1, 2))
    assert proposal.needs_lookahead
    with pytest.raises(ValueError, match="`lookahead_logits` must be given"):
        scheduler.select(None, 3, proposal)
    with pytest.raises(ValueError, match=re.escape("`lookahead_logits` must have the shape (2, 8, 8, V), got (2, 8, 7, 9)")):
        scheduler.select(random_logits(2, 8, 7, MASK), 3, proposal)
    with pytest.raises(ValueError, match=re.escape("must have the shape (2, 8, 8, V), got (2, 8, 9)")):
        scheduler.select(random_logits(2, 8, MASK), 3, proposal)


@pytest.mark.parametrize(
    ("logits", "tokens"), [((2, 7, MASK), (2, 8)), ((1, 8, MASK), (2, 8)), ((2, 8), (2, 8)), ((2, MASK, 2, 4), (2, 2, 4))]
)
def test_logits_that_do_not_fit_the_tokens_are_an_error(logits, tokens):
    scheduler = make_scheduler(MASK, 4, sampler="confidence")
    with pytest.raises(ValueError, match=f"`logits` must have the shape.*got {re.escape(str(logits))} for"):
        scheduler.propose(torch.zeros(logits), 3, torch.full(tokens, MASK))


@pytest.mark.parametrize("count", [1, 3])
def test_initial_masks_of_another_batch_are_an_error(count):
    with pytest.raises(
        ValueError, match=f"^`initial_masks` must be a tensor of 2 integers or None, got Tensor of torch.int64 .{count},"
    ):
        make_scheduler(MASK, 4).propose(random_logits(2, 8, MASK), 3, state(), initial_masks=torch.full((count,), 8))


def test_configurations_with_other_keys_or_values_are_an_error():
    with pytest.raises(ValueError, match=re.escape("`config` must have strings as its keys, got [1].")):
        InfoGainScheduler.from_config({1: 2})
    for name in ("sampler", "certainty"):
        with pytest.raises(ValueError, match=f"^`{name}` must be one of"):
            InfoGainScheduler.from_config({"mask_token_id": MASK, "position_temperature": 0.5, name: []})


def test_logits_of_no_token_are_an_error():
    scheduler = make_scheduler(MASK, 4)
    text = "must have at least one token in the codebook, got the shape"
    for logits in (torch.zeros(2, 8, 0), MaskedLogits.at(state() == MASK, torch.zeros(int((state() == MASK).sum()), 0))):
        with pytest.raises(ValueError, match=re.escape(f"`logits` {text} (2, 8, 0)")):
            scheduler.propose(logits, 3, state())
    proposal = scheduler.propose(random_logits(2, 8, MASK), 3, state(), generator=generators(1, 2))
    with pytest.raises(ValueError, match=f"`lookahead_logits` {text}"):
        scheduler.select(torch.zeros(*proposal.candidates.shape, 0), 3, proposal)


@pytest.mark.parametrize("allowed", [torch.ones(2, 7).bool(), torch.ones(8).bool(), torch.ones(2, 8), torch.ones(2, 8).long()])
def test_allowed_of_another_shape_or_type_is_an_error(allowed):
    scheduler = make_scheduler(MASK, 4, sampler="confidence")
    with pytest.raises(ValueError, match=r"`allowed` must be bool of shape \(2, 8\)"):
        scheduler.propose(random_logits(2, 8, MASK), 3, state(), allowed)


@pytest.mark.parametrize("shape", [(2, MASK, 2, 3), (1, MASK, 2, 4), (2, 8, MASK)])
def test_model_output_that_does_not_fit_the_grid_is_an_error(shape):
    scheduler = make_scheduler(MASK, 4, sampler="confidence")
    with pytest.raises(ValueError, match=r"`model_output` must have the shape.*got \(" + str(shape[0])):
        scheduler.step(torch.zeros(shape), 3, torch.full((2, 2, 4), MASK))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_logits_that_cannot_be_sampled_from_are_an_error_with_step_and_sample(value, dtype):
    scheduler = make_scheduler(MASK, 4)
    logits = random_logits(2, 8, MASK).to(dtype)
    logits[1, 5, slice(None) if value == -math.inf else 2] = value
    with pytest.raises(ValueError, match="at step 1, sample 1, position 5"):
        scheduler.propose(logits, 2, state())
    proposal = scheduler.propose(random_logits(2, 8, MASK), 2, state(), generator=generators(1, 2))
    place = proposal.distinct[1].nonzero()[-1].item()
    position = proposal.next_masked[1, place].nonzero()[0].item()
    lookahead = random_logits(2, 8, 8, MASK).to(dtype)
    lookahead[1, place, position] = value
    with pytest.raises(ValueError, match=f"at step 1, sample 1, candidate {place}, position {position}"):
        scheduler.select(lookahead, 2, proposal)


def test_tokens_ruled_out_by_minus_infinity_are_legal_and_known_positions_are_not_read():
    scheduler = make_scheduler(MASK, 1)
    logits = torch.full((2, 8, MASK), -math.inf)
    logits[..., 3], logits[..., 6] = 1.0, 0.5
    logits[:, :2] = math.nan
    proposal = scheduler.propose(logits, 0, state(), generator=generators(1, 2))
    assert set(proposal.candidates[proposal.selected].tolist()) == {3, 6}
    assert proposal.cost.isfinite().all()


def test_lookum_compares_sums_of_entropies_where_the_gain_would_be_a_divergence():
    logits, tokens = random_logits(2, 6, 4), torch.full((2, 6), 4)
    winners = []
    for reduction in ("sum", "kl"):
        scheduler = make_scheduler(4, 3, sampler="lookum", gain_reduction=reduction)
        proposal = scheduler.propose(logits, 2, tokens, generator=generators(0, 1))
        lookahead = random_logits(2, proposal.candidates.shape[1], 6, 4, seed=1)
        winners.append(scheduler.select(lookahead, 2, proposal).objective)
    torch.testing.assert_close(*winners)


def test_samplers_that_look_ahead_have_a_bound_of_their_own_and_greedy_rules_are_as_published():
    bounds = {sampler: InfoGainScheduler(mask_token_id=4, sampler=sampler).entropy_bound for sampler in SAMPLERS}
    assert {sampler: bound for sampler, bound in bounds.items() if bound} == {
        "info_gain": 0.5,
        "lookum": 0.5,
        "entropy_bound": 0.1,
    }
    assert InfoGainScheduler(mask_token_id=4, entropy_bound=0).entropy_bound == 0
    assert InfoGainScheduler(mask_token_id=4, sampler="maskgit", entropy_bound=0.25).entropy_bound == 0.25
    shares = {sampler: InfoGainScheduler(mask_token_id=4, sampler=sampler).top_p for sampler in SAMPLERS}
    assert {sampler: share for sampler, share in shares.items() if share < 1} == {"info_gain": 0.9, "lookum": 0.9}
    assert InfoGainScheduler(mask_token_id=4, top_p=1.0).top_p == 1
    assert InfoGainScheduler(mask_token_id=4, sampler="maskgit", top_p=0.5).top_p == 0.5


def test_presets_are_settings_of_the_scheduler():
    paper = InfoGainScheduler(mask_token_id=4, **PRESETS["paper"])
    assert (paper.config.num_candidates, paper.config.token_temperature, paper.config.position_temperature) == (8, 0.4, 0.4)
    assert (paper.config.gain_reduction, paper.config.gain_weight, paper.entropy_bound) == ("mean", 1.0, 0)
    # Whatever a model's own configuration says, a preset is complete.
    settings = set(inspect.signature(InfoGainScheduler.__init__).parameters) - {"self", "mask_token_id", "tokens_per_step"}
    other = settings - {"top_k", "top_p", "confidence_threshold", "klass_threshold", "halton_randomize"}
    other -= {"klass_history", "pc_frequencies", "pc_decay", "pc_clip"}
    assert other <= set(PRESETS["paper"])
    assert set(PRESETS["default"]) == set(PRESETS["paper"])
    plain, default = InfoGainScheduler(mask_token_id=4).config, InfoGainScheduler(mask_token_id=4, **PRESETS["default"]).config
    assert {name: plain[name] for name in settings} == {name: default[name] for name in settings}


def test_presets_say_every_setting():
    """Nothing of the configuration that a preset is put on shines through, and the default is the class's own."""
    parameters = inspect.signature(InfoGainScheduler.__init__).parameters
    settings = {name: one.default for name, one in parameters.items() if name not in ("self", "mask_token_id", "pc_frequencies")}
    assert PRESETS["default"] == settings
    other = {"confidence_threshold": 0.5, "top_k": 3, "tokens_per_step": 2, "num_candidates": 7, "pc_clip": 1.0, "top_p": 0.5}
    for preset in PRESETS.values():
        assert preset.keys() == settings.keys()
        changed = InfoGainScheduler.from_config(InfoGainScheduler(MASK, **other).config, **preset).config
        assert {name: changed[name] for name in settings} == preset


@pytest.mark.parametrize("name", ["mask_token_id", "num_candidates", "top_k", "tokens_per_step", "klass_history"])
def test_integers_that_no_tensor_holds_are_an_error(name):
    with pytest.raises(ValueError, match=f"`{name}` must be an integer from . to 9223372036854775807"):
        InfoGainScheduler(**{"mask_token_id": MASK, name: 2**70})


def test_numbers_that_float32_does_not_hold_are_an_error():
    for name in ("position_temperature", "token_temperature", "gain_weight", "entropy_bound", "pc_clip"):
        with pytest.raises(ValueError, match=rf"`{name}` must be a number in \[0, 1e\+09\]( or None)?, got 1e\+308"):
            InfoGainScheduler(MASK, **{name: 1e308})
    for name in ("position_temperature", "token_temperature"):
        with pytest.raises(ValueError, match=f"`{name}` must be 0 or at least 1e-06, got 1e-30"):
            InfoGainScheduler(MASK, **{name: 1e-30})
    with pytest.raises(ValueError, match="`num_inference_steps` must be an integer from 1 to 1000000, got 1000000000"):
        InfoGainScheduler(MASK).set_timesteps(10**9)


def test_a_configuration_holds_the_positional_argument_too_and_there_is_but_one():
    again = InfoGainScheduler.from_config(InfoGainScheduler(MASK, masking_schedule="linear").config, sampler="margin")
    assert (again.config.mask_token_id, again.config.masking_schedule, again.config.sampler) == (MASK, "linear", "margin")
    with pytest.raises(TypeError, match="positional"):
        InfoGainScheduler(MASK, "linear")


def test_the_table_of_settings_is_the_constructors():
    parameters = list(inspect.signature(InfoGainScheduler.__init__).parameters.values())[2:]
    assert [(one.name, one.default) for one in parameters] == [(name, one.default) for name, one in SETTINGS.items()]
    assert all(one.kind is one.KEYWORD_ONLY for one in parameters)
    for name, setting in SETTINGS.items():
        setting.check(name, setting.default)
        assert setting.help
        assert setting.allowed


@pytest.mark.parametrize("sampler", ["confidence_parallel", "klass_parallel"])
def test_a_threshold_that_the_sampler_does_not_go_by_is_an_error(sampler):
    message = f"`confidence_threshold` must be None for the sampler '{sampler}', which has its own, got 0.8"
    with pytest.raises(ValueError, match=message):
        InfoGainScheduler(MASK, sampler=sampler, confidence_threshold=0.8)


@pytest.mark.parametrize("saved", [{"gain_reduction": "kl", "top_p": None}, {"sampler": "maskgit", "top_p": 0.5}], ids=str)
def test_configurations_saved_before_lookahead_was_lazy_mean_what_they_meant(saved):
    saved = {"_class_name": "InfoGainScheduler", "mask_token_id": 9, **saved}
    loaded = InfoGainScheduler.from_config(saved)
    assert (loaded.config.certainty, loaded.config.lazy_threshold, loaded.top_p) == ("maskgit", None, saved["top_p"] or 1)
    assert loaded.config.gain_reduction == "kl"
    again = InfoGainScheduler.from_config(loaded.config)
    assert {name: again.config[name] for name in SETTINGS} == {name: loaded.config[name] for name in SETTINGS}


@pytest.mark.parametrize(
    ("saved", "expected"),
    [
        ({"sampler": "maskgit", "position_temperature": [3, 1]}, {"choice_temperature": [3, 1], "position_temperature": 0.4}),
        ({"certainty": "pivot", "position_temperature": 2}, {"pivot_temperature": 2, "position_temperature": 0.4}),
        ({"certainty": "klass", "position_temperature": 0.1}, {"position_temperature": 0.1, "choice_temperature": (2.0, 0.0)}),
        ({"position_temperature": None}, {"choice_temperature": (2.0, 0.0), "position_temperature": 0.4}),
        ({"sampler": "margin", "position_temperature": None, "confidence_threshold": 0.7}, {"confidence_threshold": 0.7}),
        (
            {"sampler": "confidence_parallel", "position_temperature": None, "confidence_threshold": 0.7},
            {"confidence_threshold": None, "parallel_threshold": 0.7},
        ),
        (
            {"sampler": "klass_parallel", "position_temperature": None, "confidence_threshold": None},
            {"confidence_threshold": None, "parallel_threshold": 0.9},
        ),
    ],
    ids=str,
)
def test_configurations_saved_before_temperatures_and_thresholds_were_split_load(saved, expected, tmp_path):
    (tmp_path / "scheduler_config.json").write_text(json.dumps({"_class_name": "InfoGainScheduler", "mask_token_id": 9, **saved}))
    for loaded in (InfoGainScheduler.from_pretrained(tmp_path), InfoGainScheduler.from_config({"mask_token_id": 9, **saved})):
        assert {name: loaded.config[name] for name in expected} == expected
    again = InfoGainScheduler.from_config(loaded.config)
    assert {name: again.config[name] for name in expected} == expected

"""Rows that run at some positions only, and calls that reuse what earlier rows have left."""

import concurrent.futures

import pytest
import torch
from helpers.dialect import PROMPT, SIDE, WITHOUT_GUIDANCE, call, make_pipe, seeded

from diffusers_infogain import InfoGainScheduler
from diffusers_infogain.cache_settings import ContextCache, MaxLogitCache, parse_cache
from diffusers_infogain.image_call import ImageCall
from diffusers_infogain.models.partial_rows import PartialRows

FAMILIES = ("amused", "mmada", "showo", "lumina")
LOOKAHEAD = {"sampler": "info_gain", "num_candidates": 3, "lazy_threshold": None, "entropy_bound": 0.0}
GREEDY = {"sampler": "maskgit", "entropy_bound": 0.0}


def deeper(family: str, **scheduler):
    """A pipeline in float64, with two layers or more, so that stale keys and values show."""
    pipe = make_pipe(family)
    if family == "amused":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = type(pipe.transformer).from_config({**pipe.transformer.config, "num_hidden_layers": 3})
        for name, parameter in made.transformer_layers.named_parameters():
            if "attn1" in name:  # rows that look at each other
                parameter.data.mul_(6)
        made.mlm_layer.conv2.weight.data.mul_(8)
        pipe.transformer = made.eval()
    pipe.transformer.to(torch.float64)
    pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, **scheduler)
    return pipe


def begun(pipe, num_images: int = 2, **arguments):
    """A call that has begun, and the conditions of its images."""
    seen = []
    decode = pipe._decode

    def spy(call: ImageCall):
        seen.append(call)
        return decode(call)

    pipe._decode = spy
    call(pipe, num_images_per_prompt=num_images, generator=seeded(*range(num_images)), num_inference_steps=1, **arguments)
    pipe._decode = decode
    return seen[0]


def states_of(pipe, number: int, share: float = 0.5, seed: int = 0) -> torch.Tensor:
    """Random states (number, SIDE²), of which a share is masked."""
    generator = torch.Generator().manual_seed(seed)
    size = (number, SIDE * SIDE)
    tokens = torch.randint(pipe.canvas().codebook_size, size, generator=generator)
    return tokens.masked_fill(torch.rand(size, generator=generator) < share, pipe.scheduler.config.mask_token_id)


def run(pipe, condition, tokens, where, run, features, keep=False, prompts=False):
    """Logits of rows with a slot each; `where` and `run` are masks of image tokens, `prompts` is whether the others run, too."""
    shaped = tokens.unflatten(1, (SIDE, SIDE))
    _, image = pipe.positions(shaped, condition)
    everywhere = run is None

    def spread(mask):
        return torch.zeros_like(image).masked_scatter(image, mask)

    slots = torch.arange(len(tokens))
    kept = (slots, slots) if keep else (slots[:0], slots[:0])
    rows = PartialRows(features, len(tokens), slots, kept, None if everywhere else spread(run) | (prompts & ~image))
    return pipe.run_rows(shaped, condition, spread(where), rows)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rows_are_those_of_the_network(family):
    pipe = deeper(family)
    running = begun(pipe)
    condition = running.condition(torch.arange(2))
    tokens, others = states_of(pipe, 2), states_of(pipe, 2, seed=1)
    masked = tokens == pipe.scheduler.config.mask_token_id
    exact = pipe.predict(tokens.unflatten(1, (SIDE, SIDE)), **condition, call=running)
    exact = exact if exact.ndim == 2 else exact[masked]
    every = torch.ones_like(masked)
    features = {}
    torch.testing.assert_close(run(pipe, condition, tokens, masked, None, features, keep=True), exact)
    # Nothing has changed, so all that is reused is right.
    torch.testing.assert_close(run(pipe, condition, tokens, masked, masked, features), exact)
    # All positions run, whatever is kept.
    run(pipe, condition, others, every, None, features, keep=True)
    torch.testing.assert_close(run(pipe, condition, tokens, masked, every, features, prompts=True), exact)
    # Known tokens are reused from another state: an approximation.
    stale = run(pipe, condition, tokens, masked, masked, features)
    assert (stale - exact).abs().max() > 1e-3
    # A row runs the same positions alone as beside rows that run more.
    alone = {name: value[:1] for name, value in condition.items()}
    own = {layer: tuple(tensor[:1] for tensor in tensors) for layer, tensors in features.items()}
    torch.testing.assert_close(run(pipe, alone, tokens[:1], masked[:1], masked[:1], own), stale[: int(masked[0].sum())])
    uneven = masked.clone()
    uneven[1] = True
    together = run(pipe, condition, tokens, masked, uneven, features)
    torch.testing.assert_close(together[: int(masked[0].sum())], stale[: int(masked[0].sum())])


@torch.no_grad()
def test_what_is_kept_is_what_the_tokens_of_other_states_see():
    # One layer: its keys and values depend on the tokens alone, so reused ones are those of the kept state's tokens.
    pipe = deeper("mmada")
    pipe.transformer.model.layers = pipe.transformer.model.layers[:1]
    condition = begun(pipe).condition(torch.arange(1))
    kept, tokens = states_of(pipe, 1), states_of(pipe, 1, seed=1)
    masked = tokens == pipe.scheduler.config.mask_token_id
    features = {}
    run(pipe, condition, kept, masked, None, features, keep=True)
    found = run(pipe, condition, tokens, masked, masked, features)
    mixed = torch.where(masked, tokens, kept)
    torch.testing.assert_close(found, run(pipe, condition, mixed, masked, None, {}))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [GREEDY, LOOKAHEAD], ids=["greedy", "lookahead"])
def test_a_sample_is_the_same_alone_in_a_batch_and_in_any_chunks(family, settings):
    pipe = deeper(family, **settings)
    guided = {"guidance_scale": 3.0, "num_inference_steps": 6}
    exact = call(pipe, **guided, num_images_per_prompt=3, generator=seeded(0, 1, 2))
    differ = 0
    for cache in ("context:0", "context:0.2", *(["ml_cache:0.5:0:3"] if settings is GREEDY else [])):
        how = {**guided, "approximate_cache": cache}
        batch = call(pipe, **how, num_images_per_prompt=3, generator=seeded(0, 1, 2))
        chunks = call(pipe, **how, num_images_per_prompt=3, generator=seeded(0, 1, 2), lookahead_batch_size=2)
        alone = call(pipe, **how, generator=seeded(1))
        assert torch.equal(batch.images, chunks.images)
        assert torch.equal(batch.images[1:2], alone.images)
        if cache == "context:0":
            assert torch.equal(batch.images, exact.images)
            assert torch.equal(batch.trace.num_evaluations, exact.trace.num_evaluations)
        differ += not torch.equal(batch.images, exact.images)
    assert differ or family == "amused"  # its random weights are too sure


def test_a_full_row_is_run_when_enough_tokens_have_changed():
    pipe = deeper("mmada", **GREEDY)
    runs = []
    original = pipe.run_rows

    def spy(tokens, condition, where, rows):
        runs.append(None if rows.run is None else int(rows.run.sum()))
        return original(tokens, condition, where, rows)

    pipe.run_rows = spy
    pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, masking_schedule="linear")
    # 2 of 16 tokens in each of 8 steps: up to 4 may change.
    call(pipe, guidance_scale=0.0, num_inference_steps=8, approximate_cache="context:0.25")
    # Masked positions and changed tokens: 14 + 2, 12 + 4, all anew, 8 + 2, ...
    assert runs == [None, 16, 16, None, 10, 10, None, 4]


def test_a_parent_gets_a_row_of_its_own_for_its_candidates():
    pipe = deeper("mmada", **LOOKAHEAD, masking_schedule="linear", token_temperature=100.0, top_p=1.0)
    how = {"guidance_scale": 0.0, "num_inference_steps": 8}
    exact, cached = call(pipe, **how), call(pipe, **how, approximate_cache="context:0.125")
    more = cached.trace.num_evaluations - cached.trace.num_states
    assert (exact.trace.num_evaluations == exact.trace.num_states).all()
    # 2 tokens a step are no more than 1/8 of 16: every second step runs its parent besides.
    assert more.flatten().tolist() == [0, 0, 1, 0, 1, 0, 1, 0]


def test_callbacks_that_change_conditions_or_tokens_are_heeded():
    pipe = deeper("amused", **GREEDY)
    how = {"num_inference_steps": 4, "approximate_cache": "context:0.5", "guidance_scale": 1.0}
    seen = ("latents", "prompt_embeds", "encoder_hidden_states")

    def unchanged(pipe, step, timestep, kwargs):
        return kwargs

    def other_prompt(pipe, step, timestep, kwargs):
        return {name: kwargs[name].flip(-1) if name != "latents" else kwargs[name] for name in kwargs} if step == 1 else kwargs

    def watch(callback):
        runs = []
        original = pipe.run_rows
        pipe.run_rows = lambda tokens, condition, where, rows: (
            runs.append(rows.run is None),
            original(tokens, condition, where, rows),
        )[1]
        call(pipe, **how, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=seen)
        pipe.run_rows = original
        return runs

    assert watch(unchanged) == [True, False, False, True]
    assert watch(other_prompt) == [True, False, True, False]


@pytest.mark.parametrize("family", ["mmada"])
def test_calls_in_threads_do_not_share_what_they_keep(family):
    pipe = deeper(family, **LOOKAHEAD)
    hows = [{"approximate_cache": cache, "generator": seeded(seed)} for cache in ("context:0.2", None) for seed in (0, 1)]

    def images(how):
        how = {**how, "generator": seeded(how["generator"][0].initial_seed())}
        return call(pipe, guidance_scale=3.0, num_inference_steps=6, **how).images

    expected = [images(how) for how in hows]
    before = dict(vars(pipe))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(images, hows))
    assert vars(pipe).keys() == before.keys()
    assert all(map(torch.equal, found, expected))


def test_the_max_logit_cache_runs_the_least_certain_positions():
    pipe = deeper("lumina", **GREEDY)
    runs = []
    original = pipe.run_rows

    def spy(tokens, condition, where, rows):
        logits = original(tokens, condition, where, rows)
        runs.append((None if rows.run is None else rows.run.clone(), where.clone(), logits))
        return logits

    pipe.run_rows = spy
    call(pipe, guidance_scale=0.0, num_inference_steps=8, approximate_cache="ml_cache:0.75:0.25:3")
    assert [run is None for run, _, _ in runs] == [True, True, True, False, False, True, False, False]
    known = torch.zeros(runs[0][1].shape[1], runs[0][2].shape[1], dtype=torch.float64)
    for run, where, logits in runs:
        if run is not None:
            largest = known.amax(-1)
            assert torch.equal(run[0], largest <= largest.quantile(0.25))
            assert 0 < int(run.sum()) <= -(-run.shape[1] // 4)
        known[where[0]] = logits


@pytest.mark.parametrize(
    ("text", "cache"),
    [
        (None, None),
        ("context", ContextCache()),
        ("context:0.5", ContextCache(0.5)),
        ("ml_cache", MaxLogitCache(0.9, 0.3, 5)),
        ("ml_cache:0.5:0:2", MaxLogitCache(0.5, 0.0, 2)),
    ],
)
def test_caches_by_name(text, cache):
    assert parse_cache(text) == cache


@pytest.mark.parametrize(
    "text", ["", "contexts", "context:", "context:1.5", "context:nan", "context:0.1:2", "ml_cache:1:1:0", 3, True]
)
def test_other_names_are_refused(text):
    with pytest.raises(ValueError, match=r"^`approximate_cache` must be None, 'context:TOLERANCE' with a share .*, got .*\.$"):
        parse_cache(text)


NONE = "`approximate_cache` must be None"
REFUSED = [
    (
        "maskgit",
        {},
        {},
        f"{NONE} for InfoGainMaskGITPipeline, which runs whole rows only, got 'context'; the pipelines of aMUSEd, MMaDA, "
        "Show-o and Lumina-DiMOO can reuse parts of rows.",
    ),
    ("meissonic", {}, {}, f"{NONE} for InfoGainMeissonicPipeline, which runs whole rows only"),
    ("amused", {}, {"num_runs": 2}, f"{NONE} with num_runs above 1, got 'context'."),
    ("amused", LOOKAHEAD, {"num_beams": 2}, f"{NONE} with num_beams above 1, got 'context'."),
    ("amused", {"retry_below_nats": -1.0}, {}, f"{NONE} with a scheduler that begins unlikely samples anew (`retry_...`), got"),
    ("amused", {"sampler": "maskgit", "corrector": "remdm_conf"}, {}, f"{NONE} with a corrector, got 'context'."),
    (
        "amused",
        LOOKAHEAD,
        {"approximate_cache": "ml_cache"},
        "`approximate_cache` must be 'context' or None with a sampler that looks ahead, got 'ml_cache' with 'info_gain'.",
    ),
    (
        "amused",
        {},
        {"cross_attention_kwargs": {"scale": 1.0}},
        "`cross_attention_kwargs` must be None with `approximate_cache`, got ",
    ),
]


@pytest.mark.parametrize(("family", "settings", "arguments", "message"), REFUSED)
def test_what_no_cache_can_follow_is_refused(family, settings, arguments, message):
    pipe = make_pipe(family)
    pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, **settings)
    with pytest.raises(ValueError) as error:
        call(pipe, **{"approximate_cache": "context", **arguments})
    assert str(error.value).startswith(message)


def test_other_attention_processors_are_refused():
    pipe = make_pipe("amused")

    class Other:
        def __call__(self, attention, hidden_states, **_):
            return hidden_states

    pipe.transformer.set_attn_processor(Other())
    with pytest.raises(ValueError, match="needs diffusers' own attention processors in `transformer`, got a Other"):
        call(pipe, approximate_cache="context")


def test_images_record_their_cache():
    pipe = make_pipe("amused")
    pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, **GREEDY)
    how = {"output_type": "pil", "guidance_scale": WITHOUT_GUIDANCE["amused"]}
    (cached,), (exact,) = (
        call(pipe, PROMPT["amused"], **how, **cache).images for cache in ({"approximate_cache": "context:0.5"}, {})
    )
    assert cached.settings["approximate_cache"] == "context:0.5"
    assert "approximate_cache" not in exact.settings

"""What a call of `InfoGainPipeline` returns, what it leaves alone and what it refuses."""

from __future__ import annotations

import copy
import io
import logging
import math
import re

import numpy as np
import pytest
import torch
from diffusers.callbacks import PipelineCallback
from helpers.amused import CODEBOOK_SIZE, GRID, make_components
from helpers.sampling import EAGER, generators

from diffusers_infogain import InfoGainPipeline, InfoGainScheduler
from diffusers_infogain.candidates import split_generator

MASK = CODEBOOK_SIZE + 1
NAMES = ("prompt_embeds", "encoder_hidden_states", "negative_prompt_embeds", "negative_encoder_hidden_states")


@pytest.fixture
def components() -> dict:
    """A model that is unsure enough for seeds, prompts and candidates to make a difference."""
    components = make_components(seed=6)
    components["transformer"].mlm_layer.conv2.weight.data.div_(4)
    return components


def tokens_of(
    pipe: InfoGainPipeline, prompt="a cat", num_inference_steps: int | None = 5, guidance_scale: float = 4.0, **kwargs
) -> torch.Tensor:
    return pipe(
        prompt, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, output_type="latent", **kwargs
    ).images


def canvas(batch: int = 1, height: int = GRID, width: int = GRID) -> torch.Tensor:
    return torch.full((batch, height, width), MASK)


def partly_masked(*num_masked: int) -> torch.Tensor:
    """One random canvas per number, with that many masks."""
    generator = torch.Generator().manual_seed(7)
    latents = torch.randint(0, CODEBOOK_SIZE, (len(num_masked), GRID * GRID), generator=generator)
    for row, count in zip(latents, num_masked, strict=True):
        row[torch.randperm(GRID * GRID, generator=generator)[:count]] = MASK
    return latents.view(-1, GRID, GRID)


def count_rows(model: torch.nn.Module) -> list[int]:
    """A list that grows by the batch size of every forward pass."""
    rows: list[int] = []
    model.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    return rows


@torch.no_grad()
def plain_logits(pipe: InfoGainPipeline, tokens: torch.Tensor, prompt: str) -> torch.Tensor:
    """Logits (1, h · w, V) of a state (1, h, w) without guidance, by one plain forward pass."""
    limit = pipe.tokenizer.model_max_length
    ids = pipe.tokenizer([prompt], padding="max_length", max_length=limit, return_tensors="pt").input_ids
    text = pipe.text_encoder(ids, output_hidden_states=True)
    height, width = (pipe.vae_scale_factor * size for size in tokens.shape[1:])
    micro_conds = torch.tensor([[width, height, 0, 0, 6]], dtype=torch.float32)
    logits = pipe.transformer(tokens, text.hidden_states[-2], text.text_embeds, micro_conds)
    return logits.flatten(2).transpose(1, 2)


class Recorder:
    """A callback that keeps what it was given, and edits the tokens of some steps."""

    def __init__(self, edits=None):
        self.edits, self.steps = edits or {}, []

    def __call__(self, pipe, index, timestep, kwargs):
        latents = kwargs["latents"].clone()
        if index in self.edits:
            latents = self.edits[index](latents)
        self.steps.append({**kwargs, "latents": latents, "pipe": pipe, "index": index, "timestep": int(timestep)})
        return {"latents": latents}

    def states(self, start: torch.Tensor) -> list[torch.Tensor]:
        """The state that each step started from."""
        return [start, *(step["latents"] for step in self.steps[:-1])]


# Batches and random numbers


def test_images_of_a_prompt_follow_each_other(exact_pipe):
    both = tokens_of(exact_pipe, ["a cat", "dogs"], num_images_per_prompt=2, generator=generators(5, 6, 5, 6))
    alone = [tokens_of(exact_pipe, prompt, generator=generators(seed)) for prompt in ("a cat", "dogs") for seed in (5, 6)]
    assert torch.equal(both, torch.cat(alone))
    assert not torch.equal(alone[0], alone[2])  # so that the order matters


def test_a_list_of_generators_gives_the_same_images_in_any_batch(exact_pipe):
    prompts = ["a cat", "dogs", "a fox"]
    together = tokens_of(exact_pipe, prompts, generator=generators(1, 2, 3))
    for i, prompt in enumerate(prompts):
        assert torch.equal(together[i : i + 1], tokens_of(exact_pipe, prompt, generator=generators(i + 1)))
    swapped = tokens_of(exact_pipe, prompts[::-1], generator=generators(3, 2, 1))
    assert torch.equal(swapped.flip(0), together)


def test_the_first_image_of_a_single_generator_does_not_depend_on_the_batch(exact_pipe):
    alone = tokens_of(exact_pipe, generator=torch.Generator().manual_seed(4))
    several = tokens_of(exact_pipe, num_images_per_prompt=3, generator=torch.Generator().manual_seed(4))
    others = tokens_of(exact_pipe, ["a cat", "dogs"], generator=torch.Generator().manual_seed(4))
    assert torch.equal(several[:1], alone)
    assert torch.equal(others[:1], alone)
    assert not torch.equal(several[0], several[1])


def test_seeds_decide_the_image(pipe):
    first, again, other = (tokens_of(pipe, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_global_seed_is_used_without_a_generator(pipe):
    images = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        images.append(tokens_of(pipe))
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


# Prompts


@pytest.mark.parametrize("negative", [None, "fog", ["fog", "mud"]])
def test_embeddings_stand_for_prompts(exact_pipe, negative):
    embeds = dict(zip(NAMES, exact_pipe.encode_prompt(["a cat", "dogs"], negative_prompt=negative), strict=True))
    assert embeds["prompt_embeds"].shape == (2, 16)
    assert embeds["encoder_hidden_states"].shape == (2, 12, 16)
    from_embeds = tokens_of(exact_pipe, None, generator=generators(1, 2), **embeds)
    assert torch.equal(
        from_embeds, tokens_of(exact_pipe, ["a cat", "dogs"], negative_prompt=negative, generator=generators(1, 2))
    )


def test_prompt_embeddings_suffice_with_guidance(exact_pipe):
    embeds = dict(zip(NAMES[:2], exact_pipe.encode_prompt("a cat")[:2], strict=True))
    assert torch.equal(
        tokens_of(exact_pipe, None, generator=generators(1), **embeds), tokens_of(exact_pipe, generator=generators(1))
    )


def test_embeddings_are_repeated_for_several_images_per_prompt(pipe):
    once, thrice = pipe.encode_prompt(["a cat", "dogs"]), pipe.encode_prompt(["a cat", "dogs"], num_images_per_prompt=3)
    for one, three in zip(once, thrice, strict=True):
        assert torch.equal(three, one[[0, 0, 0, 1, 1, 1]])
    assert pipe.encode_prompt("a cat", do_classifier_free_guidance=False)[2:] == (None, None)


def test_one_negative_prompt_serves_all_prompts(pipe):
    prompts = ["a cat", "dogs"]
    results = [
        tokens_of(pipe, prompts, negative_prompt=negative, generator=generators(1, 2))
        for negative in ("fog", ["fog"], ["fog", "fog"])
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], tokens_of(pipe, prompts, generator=generators(1, 2)))


def test_negative_prompts_belong_to_their_prompts(exact_pipe):
    both = tokens_of(exact_pipe, ["a cat", "dogs"], negative_prompt=["fog", "mud"], generator=generators(1, 2))
    assert torch.equal(both[:1], tokens_of(exact_pipe, "a cat", negative_prompt="fog", generator=generators(1)))
    assert torch.equal(both[1:], tokens_of(exact_pipe, "dogs", negative_prompt="mud", generator=generators(2)))


def test_long_prompts_are_cut_with_a_warning(pipe, monkeypatch):
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    monkeypatch.setattr(logging.getLogger("diffusers.diffusers_infogain.image_pipeline_clip"), "handlers", [handler])
    fitting = tokens_of(pipe, "a b c d e f g h i j", generator=generators(0))
    assert messages == []
    cut = tokens_of(pipe, "a b c d e f g h i j k", generator=generators(0))
    assert torch.equal(cut, fitting)
    (message,) = messages
    assert "13 tokens" in message
    assert "cut to the 12" in message
    assert "'a b c d e f g h i j k'" in message


# Guidance


RAMPS = {
    "constant": lambda share: 1.0,
    "linear": lambda share: share,
    "cosine": lambda share: 0.5 - 0.5 * math.cos(math.pi * share),
}


@pytest.mark.parametrize("width", [8, 12])
@pytest.mark.parametrize(
    ("scale", "schedule"), [(0.0, "constant"), (1.0, "linear"), (4.0, "constant"), (4.0, "linear"), (4.0, "cosine")]
)
def test_guided_logits_follow_the_formula_in_every_step(pipe, scale, schedule, width):
    recorder = Recorder()
    tokens_of(
        pipe,
        width=width,
        guidance_scale=scale,
        guidance_schedule=schedule,
        negative_prompt="fog",
        generator=generators(0),
        callback_on_step_end=recorder,
        callback_on_step_end_tensor_inputs=["latents", "logits"],
    )
    assert len(recorder.steps) == 5
    for step, state in zip(recorder.steps, recorder.states(canvas(width=width // 2)), strict=True):
        cond, uncond = plain_logits(pipe, state, "a cat"), plain_logits(pipe, state, "fog")
        g = 1 + (max(scale, 1) - 1) * RAMPS[schedule]((state != MASK).float().mean().item())
        torch.testing.assert_close(step["logits"], uncond + g * (cond - uncond), atol=1e-4, rtol=1e-4)


def test_every_sample_is_guided_by_its_own_share(pipe):
    start, recorder = partly_masked(3, 15), Recorder()
    tokens_of(
        pipe,
        latents=start,
        guidance_schedule="linear",
        num_images_per_prompt=2,
        callback_on_step_end=recorder,
        callback_on_step_end_tensor_inputs=["latents", "logits"],
    )
    for b, share in enumerate([13 / 16, 1 / 16]):
        cond, uncond = (plain_logits(pipe, start[b : b + 1], text) for text in ("a cat", ""))
        expected = uncond + (1 + 3 * share) * (cond - uncond)
        torch.testing.assert_close(recorder.steps[0]["logits"][b : b + 1], expected, atol=1e-4, rtol=1e-4)


def test_the_unconditional_half_of_a_batch_comes_first(pipe):
    seen = []
    hook = lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"])  # noqa: E731
    pipe.transformer.register_forward_pre_hook(hook, with_kwargs=True)
    tokens_of(pipe, negative_prompt="fog")
    _, cond, _, uncond = pipe.encode_prompt("a cat", negative_prompt="fog")
    assert len(seen) > 2
    for hidden in seen:
        first, second = hidden.chunk(2)
        assert torch.equal(first, uncond.expand_as(first))
        assert torch.equal(second, cond.expand_as(second))


@pytest.mark.parametrize("lookahead_batch_size", [None, 1, 3])
@pytest.mark.parametrize(("scale", "rows_per_state"), [(1.0, 1), (3.0, 2)])
def test_the_trace_counts_the_rows_that_went_through_the_model(pipe, scale, rows_per_state, lookahead_batch_size):
    pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, **EAGER)
    kwargs = {"guidance_scale": scale, "num_images_per_prompt": 2, "latents": partly_masked(5, 16)}
    expected = tokens_of(pipe, generator=generators(1, 2), **kwargs)
    rows = count_rows(pipe.transformer)
    output = pipe(
        "a cat",
        num_inference_steps=5,
        output_type="latent",
        generator=generators(1, 2),
        lookahead_batch_size=lookahead_batch_size,
        **kwargs,
    )
    assert torch.equal(output.images, expected)
    assert sum(rows) == int(output.trace.num_evaluations.sum()) == rows_per_state * int(output.trace.num_states.sum())
    assert max(rows) <= rows_per_state * (lookahead_batch_size or 2 * pipe.scheduler.config.num_candidates)
    assert int(output.trace.num_states.sum()) > 2 * 5  # it did look ahead


# Known tokens and sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_known_tokens_stay_and_the_others_are_decoded(pipe, dtype):
    latents = partly_masked(1, 9, 0, 15)
    tokens = tokens_of(pipe.to(dtype), latents=latents, num_images_per_prompt=4)
    known = latents != MASK
    assert torch.equal(tokens[known], latents[known])
    assert tokens[~known].max() < CODEBOOK_SIZE


def test_known_images_cost_nothing(pipe):
    rows, latents = count_rows(pipe.transformer), partly_masked(0, 0)
    output = pipe("a cat", latents=latents, num_images_per_prompt=2, output_type="latent")
    assert torch.equal(output.images, latents)
    assert rows == []
    assert output.trace.num_evaluations.sum() == 0


@pytest.mark.parametrize(
    ("size", "shape"),
    [({}, (4, 4)), ({"height": 4}, (2, 4)), ({"width": 12}, (4, 6)), ({"latents": canvas(1, 2, 6)}, (2, 6))],
)
def test_image_sizes(pipe, size, shape):
    height, width = 2 * shape[0], 2 * shape[1]
    output = pipe("a cat", num_inference_steps=3, **size)
    assert output.images[0].size == (width, height)
    assert output.trace.selected.shape[-1] == shape[0] * shape[1]
    assert tokens_of(pipe, **size).shape == (1, *shape)


def planned_steps(pipe, **call) -> int:
    """As the call lays them out; it ends earlier where an entropy bound lets it."""
    seen = []
    pipe("a cat", **call, callback_on_step_end=lambda pipe, *_: seen.append(pipe.num_timesteps))
    assert pipe.num_timesteps == len(seen)  # afterwards those that it took
    return seen[0]


def test_the_number_of_steps(pipe):
    assert planned_steps(pipe) == 12
    pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, tokens_per_step=3)
    assert planned_steps(pipe) == 6
    assert pipe("a cat").trace.num_decoded[:, 0].tolist() == [3, 3, 3, 3, 3, 1]
    latents = {"latents": partly_masked(7, 2), "num_images_per_prompt": 2}
    assert planned_steps(pipe, **latents) == 3
    assert pipe("a cat", **latents).trace.num_decoded.tolist() == [[3, 2], [3, 0], [1, 0]]


def test_more_steps_than_tokens_are_as_many_as_tokens(pipe):
    pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, entropy_bound=0)
    assert planned_steps(pipe, num_inference_steps=10**15) == GRID * GRID
    few, many = (tokens_of(pipe, num_inference_steps=n, generator=generators(0)) for n in (GRID * GRID, 10**15))
    assert torch.equal(few, many)


def test_output_types_show_the_same_image(pipe):
    tokens = tokens_of(pipe, ["a cat", "dogs"], generator=generators(1, 2))
    assert tokens.dtype == torch.long
    assert tokens.shape == (2, GRID, GRID)
    with torch.no_grad():
        pixels = pipe.vqvae.decode(tokens, force_not_quantize=True, shape=(2, GRID, GRID, 4)).sample
    assert pixels.min() < 0  # so that clamping and scaling differ
    expected = pixels.clamp(0, 1)
    outputs = {
        kind: pipe(
            ["a cat", "dogs"], num_inference_steps=5, guidance_scale=4, generator=generators(1, 2), output_type=kind
        ).images
        for kind in ("pt", "np", "pil")
    }
    assert torch.equal(outputs["pt"], expected)
    assert isinstance(outputs["np"], np.ndarray)
    assert np.array_equal(outputs["np"], expected.permute(0, 2, 3, 1).numpy())
    for image, array in zip(outputs["pil"], outputs["np"], strict=True):
        assert np.array_equal(np.asarray(image), (array * 255).round().astype("uint8"))


def test_a_tuple_is_returned_on_request(pipe):
    kwargs = {"num_inference_steps": 5, "output_type": "latent", "generator": generators(0)}
    images, trace = pipe("a cat", **kwargs, guidance_scale=4, return_dict=False)
    assert torch.equal(images, tokens_of(pipe, generator=generators(0)))
    assert trace.num_decoded.sum() == GRID * GRID


# Callbacks and progress


def test_the_callback_sees_every_step(pipe):
    names, recorder = ["latents", "logits", "scores"], Recorder()
    tokens = tokens_of(pipe, callback_on_step_end=recorder, callback_on_step_end_tensor_inputs=names)
    assert [step["index"] for step in recorder.steps] == [0, 1, 2, 3, 4]
    assert [step["timestep"] for step in recorder.steps] == [4, 3, 2, 1, 0]
    for step in recorder.steps:
        assert step["pipe"] is pipe
        assert step["logits"].shape == (1, GRID * GRID, CODEBOOK_SIZE)
        assert step["scores"].shape == (1, pipe.scheduler.config.num_candidates)
    masked = [int((step["latents"] == MASK).sum()) for step in recorder.steps]
    assert masked == sorted(masked, reverse=True)
    assert torch.equal(recorder.steps[-1]["latents"], tokens)


def test_the_callback_gets_what_it_asks_for_and_may_return_nothing(pipe):
    seen = []
    kwargs = {"generator": generators(0), "callback_on_step_end": lambda pipe, index, timestep, kwargs: seen.append(set(kwargs))}
    tokens = tokens_of(pipe, **kwargs)
    tokens_of(pipe, **kwargs, callback_on_step_end_tensor_inputs=["scores"])
    assert seen == [{"latents"}] * 5 + [{"scores"}] * 5
    assert torch.equal(tokens, tokens_of(pipe, generator=generators(0)))


def force_top_row(latents: torch.Tensor) -> torch.Tensor:
    latents[:, 0] = 7
    return latents


def mask_everything(latents: torch.Tensor) -> torch.Tensor:
    return torch.full_like(latents, MASK)


@pytest.mark.parametrize("edit", [force_top_row, mask_everything])
def test_edited_tokens_replace_the_state(pipe, edit):
    recorder = Recorder({1: edit})
    output = pipe(
        "a cat",
        num_inference_steps=5,
        guidance_scale=1,
        output_type="latent",
        generator=generators(0),
        callback_on_step_end=recorder,
        callback_on_step_end_tensor_inputs=["latents", "logits"],
    )
    assert (output.images < CODEBOOK_SIZE).all()
    for step, state in zip(recorder.steps, recorder.states(canvas()), strict=True):
        torch.testing.assert_close(step["logits"], plain_logits(pipe, state, "a cat"), atol=1e-4, rtol=1e-4)
    if edit is force_top_row:
        assert (output.images[:, 0] == 7).all()
        assert not output.trace.selected[2:, :, :GRID].any()
    else:
        assert output.trace.num_decoded[2:].sum() == GRID * GRID
    assert not torch.equal(output.images, tokens_of(pipe, guidance_scale=1, generator=generators(0)))


def test_tokens_edited_in_place_count_as_edited(pipe):
    def in_place(pipe, index, timestep, kwargs):
        if index == 1:
            force_top_row(kwargs["latents"])
        return kwargs

    copied = tokens_of(pipe, generator=generators(0), callback_on_step_end=Recorder({1: force_top_row}))
    assert torch.equal(tokens_of(pipe, generator=generators(0), callback_on_step_end=in_place), copied)


def test_a_pipeline_callback_object_names_its_own_inputs(pipe):
    class ForceTopRow(PipelineCallback):
        tensor_inputs = ["latents", "scores"]

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            assert set(callback_kwargs) == {"latents", "scores"}
            return {"latents": force_top_row(callback_kwargs["latents"].clone())}

    tokens = tokens_of(pipe, generator=generators(0), callback_on_step_end=ForceTopRow())
    assert (tokens[:, 0] == 7).all()


@pytest.mark.parametrize("call", [{}, {"num_runs": 2}, {"num_beams": 2}])
def test_the_progress_bar_counts_tokens_up_to_the_last(pipe, call):
    text = io.StringIO()
    pipe.set_progress_bar_config(disable=False, file=text, mininterval=0)
    tokens_of(pipe, **call)
    assert " 0/16 " in text.getvalue()
    assert " 16/16 " in text.getvalue()
    assert len(set(re.findall(r" (\d+)/16 ", text.getvalue()))) > (2 if not call else 1)


# What a call leaves alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_call_changes_nothing_that_it_was_given(components, dtype):
    given_scheduler = copy.deepcopy(vars(components["scheduler"]))
    pipe = InfoGainPipeline(**components).to(dtype)
    models = {name: components[name] for name in ("vqvae", "text_encoder", "transformer")}
    before = {name: {key: value.clone() for key, value in model.state_dict().items()} for name, model in models.items()}
    scheduler, config, latents = pipe.scheduler, dict(pipe.scheduler.config), partly_masked(6, 16)
    given = {"latents": latents, **dict(zip(NAMES, pipe.encode_prompt(["a cat", "dogs"]), strict=True))}
    copies = {name: tensor.clone() for name, tensor in given.items()}
    pipe(**given, num_inference_steps=5)

    for name, model in models.items():
        assert getattr(pipe, name) is model
        assert model.dtype == dtype
        assert not model.training
        for key, value in model.state_dict().items():
            assert value.dtype == before[name][key].dtype
            assert torch.equal(value, before[name][key])
    assert vars(components["scheduler"]) == given_scheduler
    assert pipe.scheduler is scheduler
    assert dict(scheduler.config) == config
    for name, tensor in given.items():
        assert torch.equal(tensor, copies[name])


def test_a_search_over_the_pipelines_model_is_the_decoding_functions(exact_pipe):
    exact_pipe.scheduler = InfoGainScheduler.from_config(exact_pipe.scheduler.config, **EAGER)
    call = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "latent"}
    plain = exact_pipe(["a", "b"], generator=generators(0, 1), **call)
    best = exact_pipe(["a", "b"], generator=generators(0, 1), num_runs=3, **call)
    beam = exact_pipe(["a", "b"], generator=generators(0, 1), num_beams=2, **call)
    # Run 1 of best-of-N draws from a child of the generator, so it is another sample; what is promised is rows and the minimum.
    assert (best.trace.num_evaluations.sum(0) > 2 * plain.trace.num_evaluations.sum(0)).all()
    runs = [exact_pipe(["a", "b"], generator=[g1, g2], **call) for g1, g2 in zip(*map(_children, (0, 1)), strict=True)]
    least = torch.stack([run.trace.cumulative_entropy for run in runs]).amin(0)
    torch.testing.assert_close(best.trace.cumulative_entropy, least, atol=1e-5, rtol=0)
    assert (beam.trace.num_evaluations.sum(0) > plain.trace.num_evaluations.sum(0)).all()
    assert not (beam.images == exact_pipe.scheduler.config.mask_token_id).any()


def _children(seed: int) -> list[torch.Generator]:
    return split_generator(torch.Generator().manual_seed(seed), 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 0}, "`num_beams` must be an integer >= 1, got 0."),
        ({"num_runs": True}, "`num_runs` must be an integer >= 1, got True."),
        ({"num_runs": 2, "num_beams": 2}, "`num_beams` and `num_runs` must not both be above 1, got 2 and 2."),
        (
            {"num_runs": 2, "callback_on_step_end": lambda *args: {}},
            "`callback_on_step_end` must be None with `num_beams` or `num_runs` above 1.",
        ),
    ],
)
def test_search_arguments_that_do_not_fit(pipe, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        pipe("a", num_inference_steps=2, **arguments)

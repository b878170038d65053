"""Text: layout, infilling, ends of texts, batches, streaming; every text as if it were alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict

import pytest
import torch
from diffusers.callbacks import PipelineCallback
from helpers.checkpoints import make_word_tokenizer
from helpers.sampling import EAGER, generators
from helpers.text_pipelines import BOS, EOS, MASK, PROMPTS, WORDS, make_block_pipe, make_model, make_pipe
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

from diffusers_infogain import InfoGainScheduler, decode
from diffusers_infogain.evaluation.text_tasks import sample_sudokus
from diffusers_infogain.models.llada import BidirectionalLlama
from diffusers_infogain.models.text_family import TextFamily
from diffusers_infogain.pipeline_infogain_text import InfoGainTextPipeline


@pytest.fixture
def pipe() -> InfoGainTextPipeline:
    return make_pipe()


@torch.no_grad()
def plain_text(pipe, prompt: list[int], new: int, block: int, steps: int, seed: int) -> list[int]:
    """One text alone, from whole forwards of unpadded sequences."""
    tokens = torch.tensor([[*prompt, *[MASK] * new]])
    (generator,) = generators(seed)
    for start in range(len(prompt), tokens.shape[1], block):
        end = min(start + block, tokens.shape[1])

        def denoise(states: torch.Tensor, sample_index: torch.Tensor, start: int = start, end: int = end) -> torch.Tensor:
            sequences = tokens.expand(len(states), -1).clone()
            sequences[:, start:end] = states
            return torch.cat([pipe.model(ids[None]) for ids in sequences])[:, start:end]

        scheduler = InfoGainScheduler.from_config(pipe.scheduler.config)
        scheduler.set_timesteps(steps)
        tokens[:, start:end] = decode(denoise, scheduler, tokens[:, start:end], generator=generator).tokens
    return tokens[0].tolist()


@pytest.mark.parametrize("bound", [0.0, 2.0])
@pytest.mark.parametrize("sampler", ["info_gain", "confidence", "maskgit"])
@pytest.mark.parametrize("block", [3, 8])
@pytest.mark.parametrize("chunk", [None, 2])
def test_prompts_of_different_lengths_are_decoded_as_each_alone(sampler, bound, block, chunk):
    pipe = make_pipe(sampler=sampler, token_temperature=0.8, entropy_bound=bound)
    blocks = -(-8 // block)
    output = pipe(
        PROMPTS,
        max_new_tokens=8,
        block_length=block,
        num_inference_steps=3 * blocks,
        generator=generators(0, 1, 2),
        lookahead_batch_size=chunk,
        stop_at_eos=False,
    )
    for sample, prompt in enumerate(PROMPTS):
        expected = plain_text(pipe, pipe.tokenizer(prompt).input_ids, 8, block, 3, seed=sample)
        assert output.sequences[sample][output.attention_mask[sample]].tolist() == expected


@settings(max_examples=25, deadline=None)
@given(
    new=st.integers(1, 12),
    block=st.one_of(st.none(), st.integers(1, 13)),
    steps=st.one_of(st.none(), st.integers(1, 15)),
    k=st.one_of(st.none(), st.integers(1, 4)),
    threshold=st.one_of(st.none(), st.sampled_from([0.0, 0.4])),
    num=st.integers(1, 4),
    prompts=st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=3),
    stop=st.booleans(),
)
def test_no_mask_is_left_and_prompts_are_untouched(new, block, steps, k, threshold, num, prompts, stop):
    if steps is not None:
        steps, k = max(steps, -(-new // (block or new))), None
    pipe = make_pipe(num_candidates=num, tokens_per_step=k, confidence_threshold=threshold)
    output = pipe(prompts, max_new_tokens=new, block_length=block, num_inference_steps=steps, stop_at_eos=stop)
    for sample, prompt in enumerate(prompts):
        tokens = output.sequences[sample][output.attention_mask[sample]].tolist()
        ids = pipe.tokenizer(prompt).input_ids
        assert tokens[: len(ids)] == ids
        assert len(tokens) == len(ids) + new
        assert MASK not in tokens
    assert (output.trace.num_decoded.sum(0) <= new).all()
    if not stop:
        assert (output.trace.num_decoded.sum(0) == new).all()
    assert torch.equal(output.trace.selected.sum((0, 2)), output.trace.num_decoded.sum(0))


def test_masks_within_a_text_are_filled_in_and_the_rest_stays(pipe):
    prompts = [[0, MASK, 2, MASK, MASK, 5], [MASK, 1, 2]]
    output = pipe(input_ids=prompts, max_new_tokens=0, generator=generators(0, 1))
    for sample, given_ids in enumerate(prompts):
        tokens = output.sequences[sample][output.attention_mask[sample]].tolist()
        assert MASK not in tokens
        assert all(token == known for token, known in zip(tokens, given_ids, strict=True) if known != MASK)
    assert len(output.texts[0].split()) <= 6
    tensors = [torch.tensor(ids) for ids in prompts]
    again = pipe(input_ids=tensors, max_new_tokens=0, generator=generators(0, 1))
    assert torch.equal(again.sequences, output.sequences)
    whole = pipe(input_ids=torch.tensor([prompts[0], prompts[0]]), max_new_tokens=0, generator=generators(0, 0))
    assert whole.sequences.tolist() == [output.sequences[0].tolist()] * 2
    alone = pipe(input_ids=prompts[1:], max_new_tokens=0, generator=generators(1))
    assert alone.sequences[0].tolist() == output.sequences[1][output.attention_mask[1]].tolist()


class EndingModel(BidirectionalLlama):
    """Wants the end of the text at one place, and other words elsewhere."""

    place = 4

    def forward(self, input_ids, position_ids=None, where=None, **kwargs):
        logits = torch.zeros(*input_ids.shape, WORDS)
        logits[..., 3] = 5.0
        logits[position_ids == self.place, EOS] = 9.0
        return logits[where]


def ending_pipe(place: int) -> InfoGainTextPipeline:
    pipe = make_pipe(sampler="confidence", token_temperature=0.0)
    model = EndingModel(pipe.model.config)
    model.place = place
    return InfoGainTextPipeline(model, pipe.tokenizer, pipe.scheduler)


def test_a_text_is_finished_with_the_block_in_which_it_ends():
    pipe = ending_pipe(place=4)
    pipe.set_progress_bar_config(disable=True)
    output = pipe(["a red cat", "dogs"], max_new_tokens=9, block_length=3)
    # the prompts have 3 and 1 tokens: the ends are the second and the fourth new token
    assert output.texts == ["on", "on on on"]
    assert output.sequences[0].tolist()[4:] == [EOS] * 8
    assert output.trace.num_evaluations.sum(0).tolist() == [3, 6]
    whole = pipe(["a red cat", "dogs"], max_new_tokens=9, block_length=3, stop_at_eos=False)
    assert whole.trace.num_evaluations.sum(0).tolist() == [9, 9]
    assert whole.texts == output.texts


class WritingModel(EndingModel):
    """Wants given tokens, one after the other, and the second 0 at each place."""

    wanted: list[int]

    def forward(self, input_ids, position_ids=None, where=None, **kwargs):
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        for place, token in enumerate(self.wanted):
            logits[position_ids == place, token] = 50.0
        return logits[where]


def test_streams_add_up_to_the_text_where_characters_have_several_bytes():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_special_tokens({"mask_token": "<m>", "pad_token": "<p>", "eos_token": "<e>"})
    config = LlamaConfig(**{**make_model().config.to_dict(), "vocab_size": 259, "mask_token_id": 256, "eos_token_id": 258})
    model = WritingModel(config)
    text = "é中文🦊é"
    model.wanted = tokenizer("a" + text).input_ids
    family = TextFamily("llada", 256, eos_token_ids=(258,))
    pipe = InfoGainTextPipeline(model, tokenizer, InfoGainScheduler(mask_token_id=256, sampler="confidence"), asdict(family))
    call = {"max_new_tokens": len(model.wanted) - 1, "block_length": 2, "generator": generators(0)}
    assert pipe("a", **call).texts == [text]
    parts = [block.texts[0] for block in pipe.stream("a", **call)]
    assert "".join(parts) == text
    assert "\ufffd" not in "".join(parts)


def test_answers_of_chats_are_begun_and_laid_out_by_other_templates(pipe):
    template = (
        "{% for message in messages %}{{ message.content }} {% endfor %}{% if add_generation_prompt %}on {% endif %}{{ n }}"
    )
    chat = [{"role": "user", "content": "a red cat"}, {"role": "assistant", "content": "the mat"}]
    assert pipe.encode(messages=chat, chat_template=template) == pipe.encode("a red cat the mat on")
    assert pipe.encode(messages=chat, chat_template=template, chat_template_kwargs={"n": "fog"}) == pipe.encode(
        "a red cat the mat on fog"
    )
    begun = {"messages": chat, "chat_template": template, "continue_final_message": True}
    assert pipe.encode(**begun) == pipe.encode("a red cat the mat")
    call = {"max_new_tokens": 4}
    expected = pipe("a red cat the mat", generator=generators(0), **call).texts
    assert pipe(generator=generators(0), **begun, **call).texts == expected
    for name, value in {"chat_template": template, "chat_template_kwargs": {}, "continue_final_message": True}.items():
        with pytest.raises(ValueError, match=f"`{name}` must be .* without `messages`, got"):
            pipe("a cat", **{name: value}, **call)


def test_masks_in_one_prompt_change_nothing_for_the_others():
    for pipe in (make_pipe(sampler="info_gain"), make_block_pipe(sampler="info_gain")):
        prompts = [[0, MASK, 2], [1, 2, 3, 4], [MASK, MASK]]
        together = pipe(input_ids=prompts, max_new_tokens=6, block_length=4, generator=generators(0, 1, 2))
        for sample, ids in enumerate(prompts):
            alone = pipe(input_ids=[ids], max_new_tokens=6, block_length=4, generator=generators(sample))
            assert together.texts[sample] == alone.texts[0]
            found = together.sequences[sample][together.attention_mask[sample]]
            assert torch.equal(found, alone.sequences[alone.attention_mask])


def test_an_infilled_text_stops_at_its_end_too():
    output = ending_pipe(place=5)(input_ids=[[0, MASK, 2]], max_new_tokens=12, block_length=3)
    assert output.texts == ["a on cat on on"]
    assert output.trace.num_evaluations.sum() == 4
    streamed = ending_pipe(place=5).stream(input_ids=[[0, MASK, 2]], max_new_tokens=12, block_length=3)
    assert [block.texts for block in streamed] == [output.texts]


def test_streams_add_up_to_the_texts():
    full, causal = make_pipe(sampler="confidence"), make_block_pipe(sampler="confidence")
    prompts = {"prompt": PROMPTS, "max_new_tokens": 9}
    infilled = {"input_ids": [[MASK, 1, 2, 3, 4], [1, 2, 3], [0, MASK, MASK]], "max_new_tokens": 2}
    only_masks = {"input_ids": [[MASK, 1, 2, 3, 4, 5, 6, 7, 8]], "max_new_tokens": 0}
    for pipe in (full, causal):
        for call in (prompts, infilled, only_masks):
            generator = generators(*range(len(call.get("prompt") or call["input_ids"])))
            output = pipe(**call, block_length=4, generator=generator)
            blocks = list(pipe.stream(**call, block_length=4, generator=generators(*range(len(generator)))))
            assert ["".join(parts) for parts in zip(*(block.texts for block in blocks), strict=True)] == output.texts
            assert blocks[-1].finished.all()


def test_the_trace_is_that_of_the_decoding():
    pipe = make_pipe(sampler="info_gain", gain_reduction="sum", certainty="uniform", num_candidates=5)
    prompt = pipe.tokenizer("a red cat").input_ids
    trace = pipe("a red cat", max_new_tokens=8, num_inference_steps=4, generator=generators(3), stop_at_eos=False).trace
    tokens = torch.tensor([[*prompt, *[MASK] * 8]])

    def denoise(states: torch.Tensor, sample_index: torch.Tensor) -> torch.Tensor:
        sequences = torch.cat([tokens[:, : len(prompt)].expand(len(states), -1), states], dim=1)
        with torch.no_grad():
            return torch.cat([pipe.model(ids[None]) for ids in sequences])[:, len(prompt) :]

    scheduler = InfoGainScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(4)
    (generator,) = generators(3)
    plain = decode(denoise, scheduler, tokens[:, len(prompt) :], generator=generator).trace
    assert plain.winner.any()
    for name, value in plain.tensors().items():
        found = getattr(trace, name)
        found = found[..., len(prompt) :] if name in ("selected", "entropies", "tokens") else found
        torch.testing.assert_close(found, value, atol=1e-4, rtol=1e-4, equal_nan=True)
    assert torch.equal(trace.decoded_at[:, len(prompt) :], plain.decoded_at)


def test_rows_with_other_numbers_of_masks_are_decoded_together_where_their_steps_are_equal():
    pipe = make_pipe(sampler="confidence", tokens_per_step=2)
    prompts = [[0, MASK, MASK, MASK, MASK], [0, MASK, MASK, 1, MASK], [MASK, 1, MASK, MASK, MASK], [0, 1, MASK, MASK, MASK]]
    with forwards(pipe) as ran:
        pipe(input_ids=prompts, max_new_tokens=0, generator=generators(0, 1, 2, 3))
    assert ran == [4, 4]
    for sample, ids in enumerate(prompts):
        alone = pipe(input_ids=[ids], max_new_tokens=0, generator=generators(sample))
        whole = pipe(input_ids=prompts, max_new_tokens=0, generator=generators(0, 1, 2, 3))
        assert alone.texts[0] == whole.texts[sample]


def test_a_text_is_complete_when_its_own_masks_are_gone():
    blocks = list(
        make_block_pipe(sampler="confidence").stream(["a", "a red cat on the mat"], max_new_tokens=3, stop_at_eos=False)
    )
    assert [block.finished.tolist() for block in blocks] == [[True, False], [True, False], [True, True]]


@pytest.mark.parametrize("mask_token_id", [0, 22])
@pytest.mark.parametrize("pad", [True, False])
def test_padding_is_never_decoded(mask_token_id, pad):
    pipe = make_block_pipe(sampler="confidence")
    pipe.register_to_config(family={**pipe.config.family, "mask_token_id": mask_token_id})
    pipe.scheduler = InfoGainScheduler(mask_token_id=mask_token_id, sampler="confidence", entropy_bound=0)
    pipe.tokenizer.pad_token = pipe.tokenizer.convert_ids_to_tokens(mask_token_id) if pad else None
    output = pipe(input_ids=[[1], [1, 2, 3]], max_new_tokens=4, stop_at_eos=False)
    assert output.trace.num_decoded.sum(0).tolist() == [4, 4]


def test_steps_are_shared_out_over_a_texts_own_blocks():
    prompts = ["a", "the mat on fog", "a red cat on the mat"]
    for pipe in (make_block_pipe(sampler="confidence"), make_pipe(sampler="confidence")):
        call = {"max_new_tokens": 8, "block_length": 4, "num_inference_steps": 5, "stop_at_eos": False}
        together = pipe(prompts, **call, generator=generators(0, 1, 2))
        assert (together.trace.num_decoded > 0).sum(0).tolist() == [5] * 3
        for sample, prompt in enumerate(prompts):
            alone = pipe(prompt, **call, generator=generators(sample))
            assert together.texts[sample] == alone.texts[0]
        blocks = 3 if pipe.family.block_length else 2
        with pytest.raises(ValueError, match=f"must be at least 1 for each of the {blocks} blocks, got 1"):
            pipe(prompts, **{**call, "num_inference_steps": 1})


def test_a_length_limit_counts_from_where_positions_begin():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(vocab_size=WORDS, max_position_embeddings=18, pad_token_id=1, **sizes)
    family = TextFamily("masked_lm", MASK, eos_token_ids=(EOS,))
    model = RobertaForMaskedLM(config).eval()
    tokenizer, scheduler = make_word_tokenizer(WORDS, BOS, EOS), InfoGainScheduler(MASK, **EAGER)
    pipe = InfoGainTextPipeline(model, tokenizer, scheduler, asdict(family))
    assert pipe("a cat", max_new_tokens=14).attention_mask.sum() == 16
    with pytest.raises(ValueError, match="make 17 tokens; the model takes 16"):
        pipe("a cat", max_new_tokens=15)


def test_an_end_in_the_prompt_is_not_the_texts(pipe):
    output = ending_pipe(place=60)(input_ids=[[0, EOS, 1]], max_new_tokens=3)
    assert output.texts == ["on on on"]


def test_blocks_are_streamed_as_they_are_finished():
    pipe = ending_pipe(place=4)
    blocks = list(pipe.stream(["a red cat", "dogs"], max_new_tokens=9, block_length=3))
    assert [block.texts for block in blocks] == [["on", "on on on"], ["", ""]]
    assert [block.finished.tolist() for block in blocks] == [[True, False], [True, True]]
    with pytest.raises(TypeError, match="unexpected keyword argument 'length'"):
        pipe.stream("a cat", length=3)
    with pytest.raises(ValueError, match="`block_length` must be an integer >= 1, got 0"):
        pipe.stream("a cat", block_length=0)


def test_only_decoding_draws_from_the_generator(pipe):
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    blocks = pipe.stream("a red cat", max_new_tokens=4, generator=generator)
    assert torch.equal(generator.get_state(), before)
    next(blocks)
    assert not torch.equal(generator.get_state(), before)


def test_chats_go_through_the_template(pipe):
    pipe.tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}fog"
    chat = [{"role": "user", "content": "a red cat"}]
    output = pipe(messages=chat, max_new_tokens=2)
    assert output.sequences[0, :4].tolist() == pipe.tokenizer("a red cat fog").input_ids
    assert len(pipe(messages=[chat, chat], max_new_tokens=2).texts) == 2


def test_callbacks_see_and_edit_the_block(pipe):
    pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, sampler="confidence")
    seen = []

    def callback(pipe, index, timestep, kwargs):
        seen.append((kwargs["tokens"].shape, kwargs["logits"].shape))
        tokens = kwargs["tokens"].clone()
        tokens[:, 0] = 7
        return {"tokens": tokens}

    names = ["tokens", "logits", "scores"]
    output = pipe(["a cat", "fog"], max_new_tokens=4, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    assert seen[0] == ((2, 4), (2, 4, WORDS))
    assert (output.sequences[:, 2] == 7).all()


def test_callbacks_get_the_index_of_the_texts_they_see():
    pipe, seen = make_block_pipe(sampler="confidence", token_temperature=0.0), []

    def callback(pipe, index, timestep, kwargs):
        assert len(kwargs["sample_index"]) == len(kwargs["tokens"])
        left = (kwargs["tokens"] == MASK).sum(-1).tolist()
        seen.extend(zip(kwargs["sample_index"].tolist(), left, strict=True))
        return {}

    names = ["tokens", "sample_index"]
    pipe(["a red cat", "dogs"], max_new_tokens=5, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    assert [left for sample, left in seen if sample == 0] == [0, 3, 2, 1, 0]
    assert [left for sample, left in seen if sample == 1] == [2, 1, 0, 1, 0]


def test_callback_objects_get_what_they_ask_for(pipe):
    class Watch(PipelineCallback):
        tensor_inputs = ["scores"]

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            seen.append(set(callback_kwargs))
            return callback_kwargs

    seen: list[set[str]] = []
    pipe("a cat", max_new_tokens=2, callback_on_step_end=Watch())
    assert seen == [{"scores"}] * 2
    Watch.tensor_inputs = ["latents"]
    with pytest.raises(ValueError, match=r"must be among tokens, logits, scores, sample_index, got \['latents'\]"):
        pipe("a cat", max_new_tokens=2, callback_on_step_end=Watch())


def test_image_tokens_are_never_written(pipe):
    pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, token_temperature=20.0)
    prompts = {"prompt": ["a cat"] * 8, "max_new_tokens": 16, "stop_at_eos": False}
    assert (pipe(**prompts, generator=torch.Generator().manual_seed(0)).sequences == MASK + 1).any()
    pipe.register_to_config(family={**pipe.config.family, "num_text_tokens": MASK + 1})
    written = pipe(**prompts, generator=torch.Generator().manual_seed(0)).sequences
    assert (written < MASK).all()
    with pytest.raises(ValueError, match="`num_text_tokens` must be above the mask token 22, got 22"):
        TextFamily("mmada", MASK, num_text_tokens=MASK)


@contextlib.contextmanager
def forwards(pipe) -> Iterator[list[int]]:
    """The batch size of every forward of the model."""
    batch_sizes: list[int] = []
    hook = pipe.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: batch_sizes.append(len(args[0] if args else kwargs["input_ids"])), with_kwargs=True
    )
    yield batch_sizes
    hook.remove()


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("sampler", ["info_gain", "confidence"])
def test_the_trace_counts_every_row_and_call_of_the_model(sampler, cache):
    pipe = make_pipe(sampler=sampler, tokens_per_step=2, gain_reduction="sum")
    with forwards(pipe) as batch_sizes:
        trace = pipe("a red cat", max_new_tokens=12, block_length=4, cache=cache, stop_at_eos=False).trace
    assert torch.equal(trace.num_states, trace.num_evaluations)
    assert trace.num_evaluations.sum() == sum(batch_sizes)
    assert trace.sequential_passes.tolist() == [len(batch_sizes)]


def test_finished_texts_are_no_longer_run():
    pipe = make_block_pipe(sampler="confidence")

    def end_one(pipe, index, timestep, kwargs):
        tokens = kwargs["tokens"].clone()
        tokens[tokens == EOS] = 0  # no text ends by itself
        if len(tokens) == 3 and (tokens == MASK).sum() == 0:
            tokens[1, -1] = EOS
        return {"tokens": tokens}

    prompts = ["a red cat on", "the mat on fog", "a dog on fog"]
    with forwards(pipe) as batch_sizes:
        output = pipe(prompts, max_new_tokens=12, callback_on_step_end=end_one, generator=generators(0, 1, 2))
    assert EOS in output.sequences[1].tolist()
    first = batch_sizes.index(2)
    assert set(batch_sizes[:first]) == {3}
    assert set(batch_sizes[first:]) <= {1, 2}
    alone = pipe(prompts[:1], max_new_tokens=12, callback_on_step_end=end_one, generator=generators(0))
    assert torch.equal(output.sequences[0], alone.sequences[0])


@pytest.mark.parametrize("search", [{"num_beams": 2}, {"num_runs": 3}])
def test_searches(search):
    pipe = make_pipe(sampler="info_gain", gain_reduction="sum", num_candidates=3)
    output = pipe(PROMPTS, max_new_tokens=4, generator=generators(0, 1, 2), **search)
    alone = pipe(PROMPTS[1], max_new_tokens=4, generator=generators(1), **search)
    assert output.sequences[1][output.attention_mask[1]].tolist() == alone.sequences[0].tolist()


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("sampler", ["info_gain", "confidence"])
def test_texts_share_the_evaluations_of_equal_states(sampler, cache):
    pipe = make_pipe(sampler=sampler, tokens_per_step=2, gain_reduction="sum")
    call = {"max_new_tokens": 8, "block_length": 4, "cache": cache, "stop_at_eos": False}
    prompts = ["a red cat", "a red cat", "dogs", "a red cat"]
    with forwards(pipe) as batch_sizes:
        output = pipe(prompts, generator=generators(0, 1, 2, 0), **call)
    evaluations, states = output.trace.num_evaluations, output.trace.num_states
    assert batch_sizes[0] == 2
    assert evaluations.sum() == sum(batch_sizes)
    assert evaluations[0].tolist() == [1, 0, 1, 0] if sampler == "confidence" else states[0].sum() > evaluations[0].sum()
    assert evaluations[:, 3].sum() == 0  # the first text once more, with the same random numbers
    for sample, seed in enumerate([0, 1, 2, 0]):
        alone = pipe(prompts[sample], generator=generators(seed), **call)
        assert alone.texts == [output.texts[sample]]
        assert alone.trace.num_states.sum() == states[:, sample].sum()


def test_texts_that_begin_alike_but_for_their_masks_share_nothing_else(pipe):
    red = pipe.tokenizer("red").input_ids[0]
    prompts = [[3, MASK, MASK, red, 5], [3, red, MASK, red, 5], [3, MASK, MASK, red, 5]]
    output = pipe(input_ids=prompts, max_new_tokens=0, generator=generators(0, 1, 2))
    for sample, prompt in enumerate(prompts):
        alone = pipe(input_ids=[prompt], max_new_tokens=0, generator=generators(sample))
        assert torch.equal(alone.sequences[0], output.sequences[sample])


def test_texts_of_a_prompt_follow_each_other(pipe):
    output = pipe(["a cat", "fog"], max_new_tokens=3, num_texts_per_prompt=2, generator=generators(*range(4)))
    starts = [output.sequences[sample][output.attention_mask[sample]][0].item() for sample in range(4)]
    assert starts == [0, 0, 8, 8]


def test_saving_keeps_the_facts(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = InfoGainTextPipeline.from_pretrained(tmp_path)
    assert again.family == pipe.family
    again.set_progress_bar_config(disable=True)
    call = {"max_new_tokens": 4, "generator": generators(0)}
    assert torch.equal(again("a cat", **call).sequences, pipe("a cat", max_new_tokens=4, generator=generators(0)).sequences)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"prompt": None}, "Exactly one of `prompt`, `messages` and `input_ids` must be given, got none"),
        ({"input_ids": [[1]]}, "must be given, got prompt, input_ids"),
        ({"prompt": []}, "`prompt` must be a string or a non-empty list of strings, got []"),
        *(
            (
                {"prompt": None, "input_ids": ids},
                "`input_ids` must be a list of lists of token ids or a tensor (B, L), none of them",
            )
            for ids in ([[]], [], [1, 2], torch.tensor([1, 2]), [["a"]], torch.zeros(1, 2), torch.zeros(0, 2, dtype=torch.long))
        ),
        ({"prompt": None, "input_ids": [[99]]}, "`input_ids` must be ids from 0 to 23, got ids from 99 to 99"),
        (
            {"prompt": None, "messages": []},
            "`messages` must be a chat or a non-empty list of chats, each a list of dictionaries, got []",
        ),
        ({"max_new_tokens": -1}, "`max_new_tokens` must be an integer >= 0, got -1"),
        (
            {"max_new_tokens": 0},
            "`max_new_tokens` must be >= 1 where no prompt holds a mask to fill in, which this model writes as ",
        ),
        ({"max_new_tokens": 70}, "The longest prompt and `max_new_tokens` = 70 make 72 tokens; the model takes 64"),
        ({"num_inference_steps": 0}, "`num_inference_steps` must be an integer >= 1, got 0"),
        ({"num_texts_per_prompt": 0}, "`num_texts_per_prompt` must be an integer >= 1, got 0"),
        ({"generator": generators(1, 2)}, "`generator` must have one entry for each of the 1 texts, got a list of 2"),
        ({"num_beams": 2, "num_runs": 2}, "`num_beams` and `num_runs` must not both be above 1, got 2 and 2"),
        ({"callback_on_step_end_tensor_inputs": ["x"]}, "must be among tokens, logits, scores, sample_index, got ['x']"),
    ],
)
def test_arguments_that_do_not_fit_are_named(pipe, arguments, text):
    with pytest.raises(ValueError) as error:
        pipe(**{"prompt": "a cat", "max_new_tokens": 4, **arguments})
    assert text in str(error.value)


def test_a_foreign_mask_id_is_refused(pipe):
    pipe.scheduler = InfoGainScheduler(3, **EAGER)
    with pytest.raises(ValueError, match="`mask_token_id` of the scheduler must be the model's, 22, got 3"):
        pipe("a cat", max_new_tokens=2)


def test_the_embedded_model_fills_in_a_sudoku():
    pipe = InfoGainTextPipeline.from_pretrained("demo-text")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.model.dtype == torch.float32
    problems = sample_sudokus(12, torch.Generator().manual_seed(0))
    prompts = [pipe.tokenizer(problem.letter + problem.template).input_ids for problem in problems]
    texts = pipe(input_ids=prompts, max_new_tokens=0, generator=generators(*range(12))).texts
    assert sum(problem.check(text[1:]) for problem, text in zip(problems, texts, strict=True)) >= 11

"""Where texts end: read naively, token after token, and through the pipeline."""

from __future__ import annotations

import pytest
import torch
from helpers.sampling import generators
from helpers.text_pipelines import EOS, MASK, PROMPTS, make_block_pipe, make_pipe
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_infogain import InfoGainScheduler, decode
from diffusers_infogain.text_ends import TextEnds

END, HALF, THOUGHT = 9, 8, 7
MASKED = 5


class Pieces:
    """A tokenizer of short pieces; two 8 are one character, 7 is a token added to the vocabulary."""

    pieces = ("a", "b", "ab", "ba", " ", "<t", "t>", "</think>")

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        text = "".join(self.pieces[token] if token < HALF else "\ufffd" for token in ids if token != END)
        return text.replace("\ufffd\ufffd", "é")

    def get_added_vocab(self) -> dict[str, int]:
        return {"</think>": THOUGHT, "<end>": END}


def read_naively(ids: list[int], stops: list[str], think_end: str | None) -> tuple[str, str | None, int | None]:
    """As a model that writes from left to right would be stopped; the ids are all there are."""
    tokenizer = Pieces()
    for count in range(len(ids) + 1):
        whole = ids[count : count + 1] in ([], [END])
        text = tokenizer.decode(ids[:count], skip_special_tokens=True)
        thinking = None
        if think_end is not None and think_end in text:
            thinking, _, text = text.partition(think_end)
            text = text.lstrip()
        elif think_end is not None and not whole:
            continue
        starts = [text.find(stop) for stop in stops if stop in text]
        if starts and not (think_end is not None and thinking is None):
            return text[: min(starts)], thinking, count - 1
        if whole:
            if starts:  # of a text without an end of thinking: all of it is read again
                return read_naively(ids[:count], stops, None)[0], None, read_naively(ids[:count], stops, None)[2]
            return text, thinking, count if count < len(ids) else None
    raise AssertionError


STOPS = st.lists(st.sampled_from(["ab", "ba", "aab", "bab", "a b", "bé", "<t", " "]), max_size=3)
IDS = st.lists(st.sampled_from([0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 8, 9]), max_size=12)


@settings(max_examples=150, deadline=None)
@given(ids=IDS, stops=STOPS, think_end=st.sampled_from([None, None, "<tt>", "</think>"]))
def test_ends_are_those_of_a_text_read_token_after_token(ids, stops, think_end):
    reading = TextEnds(Pieces(), (END,), stops or None, think_end).read(ids, complete=True)
    assert (reading.text, reading.thinking, reading.end) == read_naively(ids, stops, think_end)
    assert reading.stopped == (reading.end is not None and ids[reading.end] != END)


@settings(max_examples=150, deadline=None)
@given(ids=IDS, stops=STOPS, think_end=st.sampled_from([None, "<tt>", "</think>"]))
def test_what_is_certain_of_a_text_is_the_begin_of_all_of_it(ids, stops, think_end):
    """And an end that is found stays where it is, however much follows."""
    ends = TextEnds(Pieces(), (END,), stops or None, think_end)
    whole = ends.read(ids, complete=True)
    for count in range(len(ids) + 1):
        part = ends.read(ids[:count])
        assert whole.text.startswith(part.text)
        assert part.end in (None, whole.end)


def test_added_tokens_end_texts_though_they_are_not_written():
    ends = TextEnds(Pieces(), (), ["<end>"])
    assert (ends.read([0, 1, END, 0]).text, ends.read([0, 1, END, 0]).end) == ("ab", 2)
    reading = TextEnds(Pieces(), (), ["a"], "<end>").read([0, 1, END, 4, 1, 0, 1])
    assert (reading.text, reading.thinking, reading.end) == ("b", "ab", 5)


@pytest.mark.parametrize("stops", ["", [], [""], ["a", ""], 3, [b"a"]], ids=str)
def test_stop_strings_that_are_none_are_refused(stops):
    with pytest.raises(ValueError, match="`stop_strings` must be a non-empty string, a list of them, or None, got"):
        TextEnds(Pieces(), (END,), stops)
    with pytest.raises(ValueError, match="`think_end_token` must be a non-empty string or None, got ''"):
        TextEnds(Pieces(), (END,), None, "")


@pytest.mark.parametrize("make", [make_pipe, make_block_pipe])
@pytest.mark.parametrize("block", [None, 4])
def test_texts_that_are_stopped_are_the_begin_of_those_that_are_not(make, block):
    """Alone and in a batch, streamed or not; what follows is decoded no more."""
    pipe = make(sampler="confidence", token_temperature=1.5)
    call = {"max_new_tokens": 16, "block_length": block}
    on, seeds = {"stop_at_eos": False}, range(6)
    prompts = [*PROMPTS, *PROMPTS]
    whole = pipe(prompts, generator=generators(*seeds), suppress_tokens=[EOS], **call, **on)
    stop = [whole.texts[0].split()[5], whole.texts[1].split()[9]]
    call |= {"stop_strings": stop, "suppress_tokens": ["<|endoftext|>"]}
    output = pipe(prompts, generator=generators(*seeds), **call)
    stopped = 0
    for sample, (text, plain) in enumerate(zip(output.texts, whole.texts, strict=True)):
        starts = [plain.find(one) for one in stop if one in plain]
        assert text == plain[: min(starts, default=len(plain))]
        stopped += len(starts) > 0
        alone = pipe(prompts[sample], generator=generators(sample), **call)
        assert alone.texts == [text]
        own = output.sequences[sample][output.attention_mask[sample]]
        assert alone.sequences[alone.attention_mask].tolist() == own.tolist()
        assert "".join(part.texts[0] for part in pipe.stream(prompts[sample], generator=generators(sample), **call)) == text
        assert MASK not in own
    assert stopped >= 2
    if block:
        assert output.trace.num_evaluations.sum() < whole.trace.num_evaluations.sum()


def test_thinking_stands_apart():
    pipe = make_pipe(sampler="confidence", token_temperature=1.5)

    def write(**call: object):
        output = pipe("a cat", max_new_tokens=12, block_length=4, generator=generators(0), suppress_tokens=[EOS], **call)
        return output.texts[0], output.thinking

    text, thinking = write()
    assert thinking is None
    words = text.split()
    before, _, after = text.partition(f" {words[3]} ")
    assert write(think_end_token=f" {words[3]} ") == (after, [before])
    assert write(think_end_token="</think>", stop_strings=words[2]) == (text[: text.find(words[2])], [None])


def test_no_text_ends_before_its_least_length():
    pipe = make_pipe(sampler="info_gain", token_temperature=1.0)
    call = {"max_new_tokens": 12, "eos_penalty": -8.0, "generator": generators(0, 1, 2)}
    prompts = [[0, 1], [2, MASK, 3, 4], [5]]
    for least in (0, 5, 12):
        output = pipe(input_ids=prompts, min_new_tokens=least, **call)
        for ids, kept in zip(output.sequences, output.attention_mask, strict=True):
            new = ids[kept][-12:].tolist()
            assert EOS not in new[:least]
            assert least == 12 or EOS in new[least:]
        entropies = output.trace.entropies[:, :, -12:]
        assert (entropies.nan_to_num() >= 0).all()
    assert EOS not in pipe(input_ids=prompts, suppress_tokens=[EOS], **call).sequences[output.attention_mask].tolist()


@pytest.mark.parametrize("sampler", ["confidence", "maskgit", "info_gain", "confidence_parallel", "entropy_bound", "left"])
@pytest.mark.parametrize("threshold", [None, 0.2])
def test_postponed_tokens_are_decoded_behind_all_others(sampler, threshold):
    """With a model that says the same of a position in every state, each token is the most probable one."""
    wanted = torch.randint(0, 4, (8, 12), generator=torch.Generator().manual_seed(0))
    logits = torch.nn.functional.one_hot(wanted, 6).float() * torch.rand(8, 12, 1, generator=torch.Generator().manual_seed(1)) * 6
    settings = {"confidence_threshold": None if sampler == "confidence_parallel" else threshold, "entropy_bound": None}
    settings |= {"parallel_threshold": 0.5, "token_temperature": 0.0, "tokens_per_step": 2}
    scheduler = InfoGainScheduler(MASKED, sampler=sampler, **settings)
    orders = []
    for postponed in ((), (1, 3)):
        scheduler.postponed = postponed
        canvas = torch.full((8, 12), MASKED)
        output = decode(
            lambda _, sample: logits[sample], scheduler, canvas, num_inference_steps=6, generator=generators(*range(8))
        )
        assert output.tokens.equal(wanted)
        late = torch.isin(wanted, torch.tensor([1, 3]))
        at = output.trace.decoded_at
        orders.append(at.masked_fill(~late, 99).amin(-1) >= at.masked_fill(late, -1).amax(-1))
    assert orders[1].all()
    assert not orders[0].all()


def test_postponed_ends_of_texts_come_last():
    pipe = make_pipe(sampler="confidence", token_temperature=0.0)
    call = {"max_new_tokens": 12, "eos_penalty": -3.0, "stop_at_eos": False}
    outputs = [pipe(PROMPTS, postpone_eos=postpone, **call) for postpone in (False, True)]
    first = [output.trace.tokens[0, :, -12:] == EOS for output in outputs]
    assert first[0].any()
    assert not first[1].any()
    assert pipe.scheduler.postponed == ()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        ({"min_new_tokens": 5}, "`min_new_tokens` must be an integer from 0 to 4, got 5"),
        ({"eos_penalty": "x"}, "`eos_penalty` must be a number in .*, got 'x'"),
        ({"postpone_eos": 1}, "`postpone_eos` must be True or False, got 1"),
        ({"suppress_tokens": [99]}, "`suppress_tokens` must be a non-empty list of ids from 0 to 23, or of tokens .*99"),
        ({"suppress_tokens": "<|endoftext|>"}, "`suppress_tokens` must be a non-empty list"),
        ({"suppress_tokens": ["no such"]}, "`suppress_tokens` must be a non-empty list"),
    ],
)
def test_wrong_ends_are_named(call, text):
    with pytest.raises(ValueError, match=text):
        make_pipe()("a cat", max_new_tokens=4, **call)


def test_ends_that_would_do_nothing_are_refused():
    pipe = make_pipe()
    with pytest.raises(ValueError, match="`stop_strings` must be None where a prompt holds masks to fill in, got 'a'"):
        pipe(input_ids=[[0, MASK]], max_new_tokens=4, stop_strings="a")
    pipe.register_to_config(family={**pipe.config.family, "eos_token_ids": ()})
    for call in ({"min_new_tokens": 2}, {"eos_penalty": 1.0}, {"postpone_eos": True}):
        (name,) = call
        with pytest.raises(ValueError, match=f"`{name}` must be .* for a model that has no token for the end of a text, got"):
            pipe("a cat", max_new_tokens=4, **call)
    assert torch.is_tensor(pipe("a cat", max_new_tokens=4, stop_strings="cat").sequences)

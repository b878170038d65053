"""Logits processors: what they get, and that texts are what `generate` of transformers would write from left to right."""

from __future__ import annotations

import pytest
import torch
import transformers
from helpers.sampling import generators
from helpers.text_pipelines import BOS, EOS, MASK, PROMPTS, WORDS, make_block_pipe, make_pipe
from transformers import LogitsProcessorList
from transformers.generation import logits_process

from diffusers_infogain.text_processors import REFUSED, check_processors

REPEATED = transformers.RepetitionPenaltyLogitsProcessor(penalty=3.0)
NGRAMS = transformers.NoRepeatNGramLogitsProcessor(2)
BAD = transformers.NoBadWordsLogitsProcessor([[5], [3, 4]], eos_token_id=[EOS])
WARPERS = [transformers.TemperatureLogitsWarper(0.7), transformers.TopKLogitsWarper(5), transformers.TopPLogitsWarper(0.8)]


class Recorder(transformers.LogitsProcessor):
    """Keeps what it gets, and changes it in place, which must be of no consequence."""

    def __init__(self):
        self.rows = []

    def __call__(self, input_ids, scores):
        self.rows += zip(input_ids.tolist(), scores.clone(), strict=True)
        kept = scores.clone()
        input_ids.fill_(-1)
        scores.fill_(torch.nan)
        return kept


@pytest.mark.parametrize("make", [make_pipe, make_block_pipe])
@torch.no_grad()
def test_a_processor_gets_the_rest_of_the_text_that_ends_before_the_position(make):
    """Every row is one of the states that ran, with that position left out; the scores are the model's own, the mask left out."""
    pipe = make(sampler="info_gain", num_candidates=3, token_temperature=1.0)
    recorder = Recorder()
    prompts = [[0, 1, 2], [BOS, 3, 4, 5, 6]]
    call = {"max_new_tokens": 5, "stop_at_eos": False}
    output = pipe(input_ids=prompts, logits_processor=recorder, generator=generators(0, 1), **call)
    plain = pipe(input_ids=prompts, generator=generators(0, 1), **call)
    assert torch.equal(output.sequences, plain.sequences)
    length = output.sequences.shape[1]
    states = set()
    for ids, scores in recorder.rows:
        assert len(ids) == length
        seam = ids.index(WORDS + length)
        position = length - 1 - seam
        text = [*ids[seam + 1 :], MASK, *ids[:seam]]
        unknown = [place for place, token in enumerate(text) if token >= WORDS]
        assert all(text[place] == WORDS + place for place in unknown)
        sample = next(
            n for n, prompt in enumerate(prompts) if prompt == [token for token in text if token < WORDS][: len(prompt)]
        )
        real = output.attention_mask[sample]
        whole = torch.tensor([MASK if token >= WORDS else token for token in text])[real]
        assert scores[MASK] == -torch.inf
        states.add((sample, tuple(whole.tolist())))
        if make is make_pipe:
            logits = pipe.model(whole[None])[0, position - int((~real).sum())].float()
            logits[MASK] = -torch.inf
            torch.testing.assert_close(scores, logits)
    assert {len(prompt) + 5 for prompt in prompts} == {len(state) for _, state in states}
    assert len(states) > 12  # candidates, too


@torch.no_grad()
def plain_text(pipe, prompt: list[int], new: int, processors: LogitsProcessorList) -> list[int]:
    """From left to right, with what `generate` of transformers gives its processors."""
    tokens = torch.tensor([[*prompt, *[MASK] * new]])
    for place in range(len(prompt), len(prompt) + new):
        scores = pipe.model(tokens)[:, place].float()
        scores[:, MASK] = -torch.inf
        tokens[:, place] = processors(tokens[:, :place], scores).argmax(-1)
    return tokens[0].tolist()


@pytest.mark.parametrize("processors", [[REPEATED], [NGRAMS], [BAD], [*WARPERS], [REPEATED, NGRAMS, BAD]], ids=len)
def test_from_left_to_right_processors_do_what_they_do_in_generate(processors):
    pipe = make_pipe(sampler="left", token_temperature=0.0)
    call = {"max_new_tokens": 10, "stop_at_eos": False, "logits_processor": LogitsProcessorList(processors)}
    output = pipe(PROMPTS, **call)
    changed = 0
    for sample, prompt in enumerate(pipe.encode(PROMPTS)):
        found = output.sequences[sample][output.attention_mask[sample]].tolist()
        assert found == plain_text(pipe, prompt, 10, LogitsProcessorList(processors))
        changed += found != plain_text(pipe, prompt, 10, LogitsProcessorList())
    assert changed or processors == WARPERS  # which leave the most probable token


@pytest.mark.parametrize("sampler", ["info_gain", "confidence", "maskgit"])
@pytest.mark.parametrize("make", [make_pipe, make_block_pipe])
def test_processed_texts_are_the_same_alone_and_in_a_batch(sampler, make):
    pipe = make(sampler=sampler, token_temperature=0.8)
    call = {"max_new_tokens": 9, "block_length": 4, "logits_processor": LogitsProcessorList([REPEATED, NGRAMS, BAD])}
    prompts = ["a red cat", "dogs", "a red cat", "the mat on fog"]
    output = pipe(prompts, generator=generators(0, 1, 2, 3), **call)
    for sample, prompt in enumerate(prompts):
        alone = pipe(prompt, generator=generators(sample), **call)
        found = output.sequences[sample][output.attention_mask[sample]]
        assert found.tolist() == alone.sequences[alone.attention_mask].tolist()
        assert 5 not in found[-9:].tolist()


def test_repetitions_count_on_both_sides_and_each_step_sees_those_before():
    """With one token a step, so large a penalty that nothing is written twice."""

    def forbid(input_ids, scores):
        seen = torch.zeros(len(scores), WORDS + 40, dtype=torch.bool).scatter(1, input_ids, True)[:, :WORDS]
        return scores.masked_fill(seen, -torch.inf)

    pipe = make_pipe(sampler="confidence", token_temperature=1.0)
    output = pipe(PROMPTS, max_new_tokens=12, stop_at_eos=False, generator=generators(0, 1, 2), logits_processor=forbid)
    for sample, prompt in enumerate(pipe.encode(PROMPTS)):
        new = output.sequences[sample][output.attention_mask[sample]].tolist()[len(prompt) :]
        assert len({*new, *prompt}) == 12 + len(set(prompt))


@pytest.mark.parametrize("name", [name for name in REFUSED if hasattr(logits_process, name)])
def test_processors_without_a_meaning_are_refused(name):
    processor = object.__new__(getattr(logits_process, name))
    with pytest.raises(ValueError, match=f"`logits_processor` must be .*{name if 'Whisper' not in name else ''}"):
        check_processors(LogitsProcessorList([LogitsProcessorList([processor])]))


def test_all_other_processors_of_transformers_are_known():
    """A new one must be thought about: whether it means something here."""
    names = {
        name for name, value in vars(logits_process).items() if isinstance(value, type) and name.endswith(("Processor", "Warper"))
    }
    known = {
        *("LogitsProcessor", "TemperatureLogitsWarper", "RepetitionPenaltyLogitsProcessor"),
        *("EncoderRepetitionPenaltyLogitsProcessor", "TopPLogitsWarper", "TopKLogitsWarper", "TopHLogitsWarper"),
        *("MinPLogitsWarper", "TypicalLogitsWarper", "EpsilonLogitsWarper", "EtaLogitsWarper", "NoRepeatNGramLogitsProcessor"),
        *("EncoderNoRepeatNGramLogitsProcessor", "SequenceBiasLogitsProcessor", "NoBadWordsLogitsProcessor"),
        *("InfNanRemoveLogitsProcessor", "SuppressTokensLogitsProcessor"),
    }
    assert names - known <= set(REFUSED)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (5, r"`logits_processor` must be functions of \(input_ids, scores\), .*got 5"),
        ([lambda scores: scores], "`logits_processor` must be functions of"),
        (
            transformers.RepetitionPenaltyLogitsProcessor(2.0, prompt_ignore_length=1),
            "must be without `prompt_ignore_length` of RepetitionPenaltyLogitsProcessor: it counts tokens from the left",
        ),
        (lambda input_ids, scores: None, r"`logits_processor` must return scores \(\d+, 24\), got None"),
        (lambda input_ids, scores: scores[:1], r"`logits_processor` must return scores \(\d+, 24\), got Tensor"),
    ],
)
def test_processors_that_are_none_are_named(given, text):
    with pytest.raises(ValueError, match=text):
        make_pipe()("a cat", max_new_tokens=4, logits_processor=given)

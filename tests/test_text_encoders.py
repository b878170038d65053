"""Text with encoders, whose texts have an end token: new tokens stand before it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from helpers.masked_lm import VOCABULARY, tiny_model, word_tokenizer, write_masked_lm
from helpers.sampling import EAGER, generators

from diffusers_infogain import InfoGainScheduler, InfoGainTextPipeline

CLS, SEP, MASK = 2, 3, 4
NEVER = -1e4


def make_pipe(model_type: str = "bert", ends: bool = True, banned: tuple[int, ...] = (), **settings: Any) -> InfoGainTextPipeline:
    """A random model that never writes the tokens `banned`."""
    model = tiny_model(model_type)
    bias = next(value for name, value in model.named_parameters() if name.endswith("bias") and value.shape == (VOCABULARY,))
    bias.data[list(banned)] = NEVER
    scheduler = InfoGainScheduler(MASK, masking_schedule="even", **EAGER | {"entropy_bound": 0} | settings)
    pipe = InfoGainTextPipeline(model, word_tokenizer(ends), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def own(output: Any, row: int) -> list[int]:
    return output.sequences[row][output.attention_mask[row]].tolist()


@pytest.mark.parametrize("model_type", ["bert", "roberta", "esm"])
@pytest.mark.parametrize("block", [None, 3])
def test_new_tokens_stand_before_the_end_token(model_type, block):
    pipe = make_pipe(model_type, banned=(SEP,))
    seen = []
    forward = pipe.model.forward
    pipe.model.forward = lambda **inputs: (seen.append(inputs), forward(**inputs))[1]
    output = pipe(["w1 w2 w3", "w4"], max_new_tokens=7, block_length=block, generator=generators(0, 1))
    del pipe.model.forward
    for row, words in enumerate((["w1", "w2", "w3"], ["w4"])):
        tokens = own(output, row)
        prompt = pipe.tokenizer(" ".join(words), add_special_tokens=False).input_ids
        assert tokens[: len(prompt) + 1] == [CLS, *prompt]
        assert len(tokens) == len(prompt) + 9
        assert tokens[-1] == SEP
        assert not {SEP, MASK} & set(tokens[1:-1])
        assert output.texts[row] == pipe.tokenizer.decode(tokens[len(prompt) + 1 : -1], skip_special_tokens=True)
        alone = pipe(" ".join(words), max_new_tokens=7, block_length=block, generator=generators(row))
        assert own(alone, 0) == tokens
        assert alone.texts == output.texts[row : row + 1]
    assert not output.trace.selected[..., -1].any()
    # The model has seen the end token behind the masks from the first call on.
    for inputs in seen:
        ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
        assert all(row[real][-1] == SEP and MASK not in row[~real] for row, real in zip(ids, mask, strict=True))


def test_a_text_that_ends_early_keeps_its_last_end_token():
    pipe = make_pipe(sampler="confidence", token_temperature=0.0)
    pipe.model.get_output_embeddings().bias.data[SEP] = 1e4
    output = pipe(["w1 w2", "w3"], max_new_tokens=6, block_length=2, generator=generators(0, 1))
    assert output.texts == ["", ""]
    assert own(output, 0) == [CLS, 6, 7, *[SEP] * 7]
    assert output.trace.num_decoded.sum(0).tolist() == [2, 2]
    whole = pipe("w1 w2", max_new_tokens=6, stop_at_eos=False)
    assert (whole.texts, own(whole, 0)) == ([""], own(output, 0))


def test_streams_are_the_texts_of_a_call():
    pipe = make_pipe()
    call = {"prompt": ["w1 w2 w3", "w4"], "max_new_tokens": 8, "block_length": 3}
    blocks = list(pipe.stream(**call, generator=generators(0, 1)))
    output = pipe(**call, generator=generators(0, 1))
    assert ["".join(texts) for texts in zip(*(block.texts for block in blocks), strict=True)] == output.texts
    assert blocks[-1].finished.all()


def test_masks_within_a_prompt_are_filled_in_and_new_tokens_still_stand_before_the_end():
    pipe = make_pipe(banned=(SEP, CLS, 0, 1))
    output = pipe(["w1 [MASK] w2", "[MASK] w3"], max_new_tokens=0, generator=generators(0, 1))
    first = own(output, 0)
    assert (first[:2], first[3:]) == ([CLS, 6], [7, SEP])
    assert MASK not in first
    assert output.texts[0] == pipe.tokenizer.decode(first[1:4])
    output = pipe(["w1 [MASK] w2", "w3"], max_new_tokens=2, generator=generators(0, 1))
    tokens = own(output, 0)
    assert (len(tokens), tokens[3], tokens[-1]) == (7, 7, SEP)
    assert output.texts[0] == pipe.tokenizer.decode(tokens[1:-1])
    assert len(output.texts[1].split()) == 2


def test_ids_say_themselves_where_things_stand():
    pipe = make_pipe(banned=(SEP,))
    output = pipe(input_ids=[[CLS, 6, SEP]], max_new_tokens=2, generator=generators(0))
    assert own(output, 0)[:3] == [CLS, 6, SEP]
    assert SEP not in own(output, 0)[3:]
    ends = pipe(input_ids=[[CLS, 6, MASK, MASK, SEP]], max_new_tokens=0, generator=generators(0))
    assert own(ends, 0)[-1] == SEP
    bare = make_pipe(ends=False, banned=(SEP,))
    assert own(bare("w1", max_new_tokens=2, generator=generators(0)), 0)[0] == 6
    assert len(own(bare("w1", max_new_tokens=2), 0)) == 3


def test_the_length_counts_the_end_token():
    pipe = make_pipe()
    pipe("w1", max_new_tokens=61, num_inference_steps=1)
    with pytest.raises(ValueError, match="`max_new_tokens` = 62 make 65 tokens; the model takes 64"):
        pipe("w1", max_new_tokens=62)


def test_steps_that_do_not_divide_the_masks_take_the_larger_counts_first(tmp_path):
    write_masked_lm(tmp_path, "bert")
    pipe = InfoGainTextPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.scheduler.config.masking_schedule == "even"
    output = pipe("w1", max_new_tokens=12, num_inference_steps=5, stop_at_eos=False)
    assert output.trace.num_decoded[:, 0].tolist() == [3, 3, 2, 2, 2]
    output = pipe("w1", max_new_tokens=12, block_length=6, num_inference_steps=9, stop_at_eos=False)
    assert output.trace.num_decoded[:, 0].tolist() == [2, 1, 1, 1, 1, 2, 2, 1, 1]


def test_a_config_cannot_choose_how_attention_is_computed(tmp_path):
    model = write_masked_lm(tmp_path, "bert")
    file = tmp_path / "config.json"
    for name in ("attn_implementation", "_attn_implementation"):
        file.write_text(json.dumps({**json.loads(file.read_text()), name: "someone/kernel"}))
    pipe = InfoGainTextPipeline.from_pretrained(tmp_path)
    assert pipe.model.config._attn_implementation == model.config._attn_implementation
    assert torch.is_tensor(pipe("w1", max_new_tokens=1).sequences)

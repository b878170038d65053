"""Strings of texts on a canvas, and the traces of their blocks as one."""

from __future__ import annotations

import torch

from diffusers_infogain.text_canvas import TextCanvas, lay_out
from diffusers_infogain.text_ends import TextEnds
from diffusers_infogain.text_output import GroupTrace, TextWriter, join_traces
from diffusers_infogain.trace import DecodingTrace

MASK, EOS = 9, 7


class Letters:
    """A tokenizer whose tokens are letters; 6 is half of a character."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join("abcdef\ufffd"[token] for token in ids if token != EOS).replace("\ufffd\ufffd", "é")


def canvas_of(prompts: list[list[int]], new: int = 4, **arguments: int) -> TextCanvas:
    return lay_out(prompts, mask_token_id=MASK, pad_token_id=0, max_new_tokens=new, **arguments)


def test_a_text_goes_from_its_prompt_to_its_end():
    writer = TextWriter(canvas_of([[1, 2], [7]]), TextEnds(Letters(), (EOS,)))
    assert writer.text(0, [1, 2, 3, 4, EOS, EOS]) == "de"
    assert writer.text(0, [1, 2, 3, 4, EOS, EOS], before=3) == "d"
    assert writer.text(1, [0, EOS, 3, 3, 3, 3]) == "dddd"  # an end in the prompt is not the text's
    assert writer.read(0, [1, 2, 3, 4, EOS, EOS], before=6).end == 4
    assert writer.read(0, [1, 2, 3, 4, EOS, EOS], before=4).end is None


def test_an_infilled_text_has_its_prompt_and_no_padding():
    writer = TextWriter(canvas_of([[1, 2, MASK], [MASK]], new=1), TextEnds(Letters(), (EOS,)))
    assert writer.text(0, [1, 2, 3, 4]) == "bcde"
    assert writer.text(1, [0, 0, 3, 4]) == "de"


def test_halves_of_characters_wait_for_the_rest():
    writer = TextWriter(canvas_of([[1]]), TextEnds(Letters(), (EOS,)))
    assert writer.new_text(0, [1, 2, 6, MASK, MASK], 3, complete=False) == "c"
    assert writer.new_text(0, [1, 2, 6, 6, MASK], 4, complete=False) == "é"
    assert writer.new_text(0, [1, 2, 6, 6, 6], 5, complete=True) == "\ufffd"


def trace_of(samples: int, length: int, candidates: int) -> DecodingTrace:
    shape = (2, samples)
    numbers = torch.arange(1, 2 * samples + 1).view(shape)
    fields = {name: numbers for name in DecodingTrace.__dataclass_fields__ if name != "view"}
    reals = {name: numbers.float() for name in ("cost", "gain", "log_probability")}
    objective = numbers[..., None].expand(*shape, candidates).float()
    wide = {"selected": torch.ones(*shape, length, dtype=torch.bool), "entropies": torch.ones(*shape, length)}
    wide["tokens"] = 10 * numbers[..., None].expand(*shape, length).int()
    return DecodingTrace(**{**fields, **reals, **wide, "objective": objective})


def test_traces_of_groups_follow_each_other_over_the_columns_of_the_canvas():
    parts = [
        GroupTrace(torch.tensor([0, 2]), 1, 4, trace_of(2, 3, candidates=3), before=torch.full((3, 5), MASK)),
        GroupTrace(torch.tensor([1]), 2, 4, trace_of(1, 2, candidates=3), before=torch.full((3, 5), 1)),
    ]
    joined = join_traces(parts, torch.full((3, 5), EOS))
    assert joined.num_decoded.tolist() == [[1, 0, 2], [3, 0, 4], [0, 1, 0], [0, 2, 0]]
    assert joined.cost.tolist() == joined.num_decoded.tolist()
    assert joined.gain.isnan().tolist() == (joined.num_decoded == 0).tolist()
    assert joined.objective.shape == (4, 3, 3)
    assert joined.selected[0].int().tolist() == [[0, 1, 1, 1, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 0]]
    assert joined.selected[3].int().tolist() == [[0] * 5, [0, 0, 1, 1, 0], [0] * 5]
    assert joined.entropies.isnan().equal(~joined.selected)
    assert joined.tokens[0].tolist() == [[9, 10, 10, 10, 9], [9] * 5, [9, 20, 20, 20, 9]]
    assert joined.tokens[1].tolist() == [[1] * 5] * 3  # what the next part began with
    assert joined.tokens[2].tolist() == [[1] * 5, [1, 1, 10, 10, 1], [1] * 5]
    assert joined.tokens[3].tolist() == [[EOS] * 5] * 3

"""Texts in color, as HTML and in a terminal, and how outputs show in notebooks."""

from __future__ import annotations

import copy
import html.parser
import pickle
import re

import PIL.Image
import pytest
import torch
from helpers.text_pipelines import make_block_pipe, make_pipe
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from diffusers_infogain.image_output import InfoGainPipelineOutput
from diffusers_infogain.trace_text import html_fragment, html_page, ink_on, terminal_text, visible
from diffusers_infogain.trace_view import SampleTrace, Word, Words

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "&lt;",
    "'",
    "</span></div></p>",
    "\x1b[2J",
    "\u202e",
    "\x00",
]


class Page(html.parser.HTMLParser):
    """Reads a page: that its elements close in order, which there are, and the texts of the tokens."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.attributes: set[str] = set()
        self.tokens: list[str] = []
        self.titles: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.seen.add(tag)
        self.attributes |= {name for name, _ in attributes}
        if tag not in ("meta", "input", "img", "br"):
            self.open.append(tag)
        given = dict(attributes)
        if tag == "span" and "title" in given:
            self.titles.append(given["title"])
            self.tokens.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-2:] == ["p", "span"] and self.tokens:
            self.tokens[-1] += data


def words_of(texts: list[str], num_steps: int = 3) -> tuple[SampleTrace, list[Word]]:
    words = [
        Word(text, step := number % (num_steps + 1) - 1, None if step < 0 else number / 7, step < 0)
        for number, text in enumerate(texts)
    ]
    numbers = [0] * num_steps
    sample = SampleTrace(
        grid=(1, len(words)), decoded_at=[word.step for word in words], num_decoded=numbers, cost=[1.0] * num_steps,
        gain=[None] * num_steps, winner=numbers, num_compared=numbers, num_evaluations=5, num_candidates=1, lazy=False,
    )  # fmt: skip
    return sample, words


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(HOSTILE) | st.text(), min_size=1, max_size=12), st.integers(1, 5))
def test_a_page_shows_every_token_as_text_and_runs_nothing(texts, num_steps):
    sample, words = words_of(texts, num_steps)
    page = Page(html_page("<b>", [html_fragment(sample, words)]))
    assert [token.replace("↵\n", "↵") for token in page.tokens] == [visible(text) for text in texts]
    assert not page.seen & {"script", "img", "iframe", "b", "a", "link"}
    assert not {name for name in page.attributes if name.startswith("on")}
    assert page.titles == ["known" if word.step < 0 else f"step {word.step + 1}, {word.entropy:.3g} nats" for word in words]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(HOSTILE) | st.text(), min_size=1, max_size=12), st.sampled_from(["step", "entropy"]))
def test_no_text_acts_on_a_terminal(texts, by):
    sample, words = words_of(texts)
    expected = "".join(map(visible, texts)).replace("↵", "↵\n")
    colored, plain = terminal_text(sample, words, by, True), terminal_text(sample, words, by, False)
    assert re.sub(r"\x1b\[(0|48;5;\d+(;38;5;(16|231))?)m", "", colored).split("\n", 2)[2] == expected
    assert plain.startswith(f"{sample.took}\n{expected}")
    assert all(c == "\n" or c.isprintable() or c in " \u200c\u200d" or ord(c) > 127 for c in plain)
    assert "\x1b" not in plain
    assert not set(plain) & {"\x00", "\x9b", "\u202e", "\x07"}


def test_steps_of_a_text_can_be_read_without_colors():
    sample, words = words_of(["a", "b", " c", "d", "e", "f"])
    assert terminal_text(sample, words, "step", False).split("\n")[1:] == [
        "ab cdef",
        "step 1: 'b' at 1, 'f' at 5",
        "step 2: ' c' at 2",
        "step 3: 'd' at 3",
    ]


def test_ink_has_the_contrast_that_the_accessibility_guidelines_ask_for():
    def luminance(color):
        return sum(s * (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4) for s, v in zip((0.2126, 0.7152, 0.0722), color))  # noqa: B905, E501 # fmt: skip

    for red in range(0, 256, 15):
        for green in range(0, 256, 15):
            for blue in range(0, 256, 15):
                color = (red / 255, green / 255, blue / 255)
                pair = sorted([luminance(color), 1.0 if ink_on(color) == "#ffffff" else 0.0])
                assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5


@pytest.mark.parametrize("make", [make_pipe, make_block_pipe])
def test_words_are_those_of_the_text(make):
    pipe = make(sampler="confidence", tokens_per_step=2)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    prompts = ["a red cat", "two"]
    output = pipe(prompts, max_new_tokens=8, block_length=4, generator=generators)
    mask = output.attention_mask.cpu()
    assert torch.equal(output.trace.tokens[-1].long(), output.sequences.cpu())
    for sample in range(2):
        words = output.trace.written(sample)
        assert "".join(word.text for word in words if word.in_prompt) == f" {prompts[sample]}"
        text = "".join(word.text for word in words if not word.in_prompt and word.text != " <|endoftext|>")
        assert text.strip() == output.texts[sample].strip()
        assert all((word.step >= 0) or word.in_prompt for word in words[:-1])
        own = output.sequences[sample][mask[sample]].tolist()
        assert len(words) <= len(own)
        alone = pipe(prompts[sample], max_new_tokens=8, block_length=4, generator=torch.Generator().manual_seed(sample))
        assert alone.trace.written(0) == words
        assert alone.trace.html(0) == output.trace.html(sample)
        Page(output.trace.html(sample))
    for other in (copy.deepcopy(output), pickle.loads(pickle.dumps(output)), output):
        assert other.trace.html(1) == output.trace.html(1)
        assert other.trace.take(torch.tensor([1])).html(0) == output.trace.html(1)
        assert repr(other) == repr(output)
        Page(other._repr_html_())
        assert other.trace._repr_png_() is None
        Page(other.trace._repr_html_())
    figure = output.trace.plot(1)
    drawn = [text.get_text() for text in figure.axes[0].texts]
    assert drawn == [visible(word.text) for word in output.trace.written(1)]


def test_images_have_no_words_and_are_shown_enlarged(demo_pipe):
    prompts = ["a red circle above a blue square"] * 2
    for output_type in ("pil", "np", "pt"):
        output = demo_pipe(prompts, generator=torch.Generator().manual_seed(0), output_type=output_type)
        page = output._repr_html_()
        Page(page)
        assert page.count('src="data:image/png;base64,') == 2
        assert f'alt="image 2 with seed {output.seeds[1]}"' in page
        assert re.search(
            r"<p>\d+( to \d+)? steps, [\d.]+ rows of the network \(NFE\) and [\d.]+ nats of cumulative entropy", page
        )
    assert output.trace._repr_png_().startswith(b"\x89PNG")
    assert output.trace._repr_html_() is None
    latent = demo_pipe(prompts, output_type="latent")
    assert latent._repr_html_() is None
    for method in ("html", "ansi", "written"):
        with pytest.raises(ValueError, match=r"^Only texts of a pipeline have words; `plot` shows any trace\.$"):
            getattr(output.trace, method)()


def test_a_notebook_shows_at_most_sixteen_images_none_of_them_huge(demo_pipe):
    output = demo_pipe("a red circle", output_type="pil")
    many = InfoGainPipelineOutput([PIL.Image.new("RGB", (1024, 768))] * 20, output.trace, list(range(20)))
    page = many._repr_html_()
    assert page.count("<img ") == 16
    assert page.endswith("<p>… and 4 more.</p>")
    assert len(page) < 200_000


def test_terminals_are_asked_for_by_name():
    pipe = make_pipe(sampler="confidence")
    trace = pipe("a", max_new_tokens=4, generator=torch.Generator().manual_seed(0)).trace
    with pytest.raises(ValueError, match=r"^`by` must be one of step, entropy, got 'time'\.$"):
        trace.ansi(by="time")
    with pytest.raises(ValueError, match=r"^`color` must be "):
        trace.ansi(color="no")
    with pytest.raises(ValueError, match=r"^Only images of a pipeline have frames"):
        trace.film("film.gif")
    assert trace.ansi() != trace.ansi(by="entropy") != trace.ansi(color=False)


@pytest.mark.parametrize(("tokens", "pieces"), [(["▁The", "re", "▁", "▁cat"], " There  cat"), (["a", "##b", "."], " ab.")])
def test_pieces_have_the_spaces_of_any_tokenizer(tokens, pieces):
    if "##b" in tokens:
        built = Tokenizer(models.WordPiece({token: number for number, token in enumerate([*tokens, "[UNK]"])}))
        built.decoder = decoders.WordPiece()
    else:
        built = Tokenizer(models.Unigram([(token, -1.0) for token in [*tokens, "<unk>"]], len(tokens)))
        built.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=built)
    words = Words(tokenizer, torch.arange(len(tokens)), [list(range(len(tokens)))], [0])
    assert "".join(words.pieces[number] for number in range(len(tokens))) == pieces

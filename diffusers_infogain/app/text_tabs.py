"""The tabs for text models: write, and compare two samplers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from ..trace_text import html_fragment
from . import fields
from .controls import LABELS, RunButtons, SamplerControls, SeedControls, Site
from .fragments import STOPPED, figures_line, figures_table, headings, note, plot
from .work import Job, Request, Result, fills_in, whole


class TextTabs:
    """The tabs of the page of a text model."""

    def __init__(self, site: Site, examples: Sequence[str], new_tokens: int):
        self.site, self.examples, self.new_tokens = site, list(examples), new_tokens
        self.choices = {value: label for label, value in fields.sampler_choices(site.settings, of_text=True)}
        self.chats = bool(getattr(site.pipe.tokenizer, "chat_template", None))
        with gr.Tabs():
            with gr.Tab("Write"):
                self._write_tab()
            with gr.Tab("Compare"):
                self._compare_tab()

    def _asked(self) -> dict[str, Any]:
        """Prompt, chat and length."""
        prompt = gr.Textbox(self.examples[0], label=LABELS["prompt"], lines=2, max_lines=12, placeholder="What to write on")
        gr.Examples([[text] for text in self.examples], [prompt], label="Examples", api_visibility="private")
        chat = gr.Checkbox(self.chats, label="Ask as in a chat", visible=self.chats)
        most, info = self.site.limits.new_tokens, "Not used where the prompt has masks to fill in."
        length = gr.Slider(1, most, min(self.new_tokens, most), step=1, label=LABELS["max_new_tokens"], info=info)
        return {"prompt": prompt, "chat": chat, "new_tokens": length}

    def _request(self, entered: Mapping[str, Any], side: str = "") -> Request:
        prompt, chat = entered["prompt"], entered["chat"]
        only_fills_in = not chat and bool(prompt) and fills_in(self.site.pipe, prompt)
        new_tokens = 0 if only_fills_in else whole("max_new_tokens", entered["new_tokens"])
        return self.site.request(entered, side, as_chat=chat, max_new_tokens=new_tokens)

    def _write_tab(self) -> None:
        site = self.site
        with gr.Row(elem_classes="ig-main"):
            with gr.Column(min_width=320):
                asked = self._asked()
                buttons = RunButtons.make("Write")
            with gr.Column(min_width=320, elem_classes="ig-results"):
                text = gr.Textbox(label="Text", lines=4, max_lines=24, buttons=["copy"], interactive=False)
                line = gr.HTML()
                coloured = gr.HTML(_NOTHING_YET)
                traced = gr.HTML()
            with gr.Column(min_width=320):
                sampler = SamplerControls(site, fields.first_choice(site.settings, True))
                samples = gr.Slider(1, site.limits.samples, value=1, step=1, label="Texts")
                seed = SeedControls()
        result = gr.State(time_to_live=1800)
        inputs = {**asked, **seed.inputs, "samples": samples, **sampler.inputs()}
        outputs = [text, line, coloured, result]
        described, draw = "Writes texts, or fills in masks.", (_plot, [result], [traced])
        buttons.connect(site, "write", self._write, inputs, outputs, description=described, afterwards=draw)

    def _write(self, entered: Mapping[str, Any], job: Job, progress: gr.Progress) -> Sequence[Any]:
        result = self.site.run(self._request(entered), job, progress)
        figures = figures_line(result.figures, len(result.output.seeds), "text")
        line = note(f"{STOPPED + ' ' if result.stopped else ''}{figures}")
        return _texts(result), line, _coloured(result), result

    def _compare_tab(self) -> None:
        site, choices = self.site, list(self.choices)
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                asked = self._asked()
            with gr.Column(scale=6, min_width=320):
                seed = SeedControls()
                samples = gr.Slider(1, min(4, site.limits.samples), value=1, step=1, label="Texts of each")
        samplers = {}
        with gr.Row():
            for side, choice in (("First", choices[0]), ("Second", "confidence")):
                with gr.Column(min_width=320):
                    samplers[side] = SamplerControls(site, choice, f"{side} sampler")
        buttons = RunButtons.make("Compare")
        table = gr.HTML()
        inputs = {**asked, **seed.inputs, "samples": samples}
        outputs: list[gr.components.Component] = [table]
        with gr.Row():
            for side, sampler in samplers.items():
                with gr.Column(min_width=320):
                    text = gr.Textbox(label=f"{side} sampler", lines=4, max_lines=24, buttons=["copy"], interactive=False)
                    outputs += [text, gr.HTML(_NOTHING_YET)]
                inputs |= sampler.inputs(f"{side.lower()}_")
        buttons.connect(
            site, "compare", self._compare, inputs, outputs, description="The same prompt and seed with two samplers."
        )

    def _compare(self, entered: Mapping[str, Any], job: Job, progress: gr.Progress) -> Sequence[Any]:
        sides = ("first_", "second_")
        asked = [self._request(entered, side) for side in sides]
        names = headings([self.choices[entered[f"{side}sampler"]] for side in sides])
        results = [self.site.run(one, job, progress, name) for one, name in zip(asked, names, strict=True)]
        table = figures_table({name: result.figures for name, result in zip(names, results, strict=True)})
        table += note(STOPPED if any(result.stopped for result in results) else "")
        return [table, *(part for result in results for part in (_texts(result), _coloured(result)))]


_NOTHING_YET = note("Each token appears here in the colour of the step that decoded it.")


def _texts(result: Result) -> str:
    return "\n\n".join(result.output.texts)


def _coloured(result: Result) -> str:
    words = html_fragment(result.trace.of_sample(0), result.trace.written(0))
    return f'<div class="ig-words">{words}</div>'


def _plot(result: Result | None) -> str:
    return "" if result is None else plot(result.trace.plot(sample=0))

"""The tabs for image models: generate, compare two samplers, edit a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from . import fields
from .controls import LABELS, QUIET, RunButtons, SamplerControls, SeedControls, Site
from .fragments import STOPPED, figures_line, figures_table, film, headings, note, plot
from .painting import canvas_image, own_size, painted
from .work import Job, Request, Result, prompt_argument, takes

WHAT_I_PAINT, WHOLE_PICTURE = "Only what I paint", "The whole picture"
_FRAME_SIDE = 256
_NOTHING_YET = note("Each step of the decoding appears here.")


class ImageTabs:
    """The tabs of the page of an image model."""

    def __init__(self, site: Site, examples: Sequence[str]):
        self.site, self.examples = site, list(examples)
        self.choices = {value: label for label, value in fields.sampler_choices(site.settings, of_text=False)}
        self.side = int(site.pipe.canvas().side * site.pipe.vae_scale_factor)
        self.crisp = ["ig-crisp"] if self.side < 256 else []
        with gr.Tabs() as tabs:
            with gr.Tab("Generate", id="generate"):
                result, shown, edit_this = self._generate_tab()
            with gr.Tab("Compare", id="compare"):
                self._compare_tab()
            if takes(site.pipe, "mask_image"):
                with gr.Tab("Edit", id="edit"):
                    editor = self._edit_tab()
                edit_this.click(self._to_editor, [result, shown], [editor, tabs], **QUIET)

    # Parts that tabs share

    def _prompt(self) -> dict[str, Any]:
        label = LABELS[prompt_argument(self.site.pipe)]
        prompt = gr.Textbox(self.examples[0], label=label, lines=1, max_lines=4, placeholder="What to draw")
        gr.Examples([[text] for text in self.examples], [prompt], label="Examples", api_visibility="private")
        return {"prompt": prompt}

    def _sampler(self, choice: str, label: str = "Sampler") -> SamplerControls:
        return SamplerControls(self.site, choice, label, steps=self.site.pipe.default_num_inference_steps)

    def _more(self) -> dict[str, Any]:
        """Guidance and negative prompt, folded away."""
        pipe = self.site.pipe
        usual = pipe.default_guidance_scale
        with gr.Accordion("Guidance", open=False):
            scale = gr.Slider(
                0,
                max(10.0, 2 * usual),
                usual,
                step=0.1,
                label=LABELS["guidance_scale"],
                info="How closely pictures follow the prompt.",
            )
            negative = gr.Textbox("", label=LABELS["negative_prompt"], max_lines=2, visible=takes(pipe, "negative_prompt"))
        return {"guidance_scale": scale, "negative_prompt": negative}

    def _samples(self, label: str, most: int) -> dict[str, Any]:
        return {"samples": gr.Slider(1, most, value=1, step=1, label=label)}

    def _gallery(self, label: str) -> Any:
        return gr.Gallery(
            label=label,
            format="png",
            height="auto",
            object_fit="contain",
            elem_classes=["ig-gallery", *self.crisp],
            buttons=["download", "fullscreen"],
            interactive=False,
        )

    def _request(self, entered: Mapping[str, Any], side: str = "", **call: Any) -> Request:
        given = {"guidance_scale": entered["guidance_scale"], "negative_prompt": entered["negative_prompt"] or None}
        return self.site.request(entered, side, **given, **call)

    # The trace does not keep the pipeline of a request in memory; the one that was loaded decodes the same pixels.

    def _film(self, result: Result, index: int, moving: bool = True) -> str:
        frames = result.trace.frames(sample=index, size=_FRAME_SIDE, pipe=self.site.pipe)
        return film(frames, result.trace.of_sample(index).num_decoded, moving)

    def _plot(self, result: Result | None, index: int) -> str:
        return "" if result is None else plot(result.trace.plot(sample=index, pipe=self.site.pipe))

    # Generate

    def _generate_tab(self) -> tuple[Any, Any, Any]:
        site = self.site
        with gr.Row(elem_classes="ig-main"):
            with gr.Column(min_width=320):
                prompt = self._prompt()
                buttons = RunButtons.make("Generate")
            with gr.Column(min_width=320, elem_classes="ig-results"):
                gallery = self._gallery("Pictures")
                line = gr.HTML()
                edit_this = gr.Button("Edit this picture", size="sm", visible=False)
                strip = gr.HTML(_NOTHING_YET)
            with gr.Column(min_width=320):
                sampler = self._sampler(fields.first_choice(site.settings, False))
                samples = self._samples("Pictures", site.limits.samples)
                seed = SeedControls()
                more = self._more()
        traced = gr.HTML()
        result, shown = gr.State(time_to_live=1800), gr.State(0)
        buttons.connect(
            site,
            "generate",
            self._generate,
            {**prompt, **seed.inputs, **samples, **more, **sampler.inputs()},
            [gallery, line, strip, edit_this, result, shown],
            submit=[prompt["prompt"]],
            description="Draws pictures, and shows how they were decoded.",
            afterwards=(self._plot, [result, shown], [traced]),
        )
        gallery.select(self._select, [result], [strip, traced, shown], **QUIET)
        return result, shown, edit_this

    def _generate(self, entered: Mapping[str, Any], job: Job, progress: gr.Progress) -> Sequence[Any]:
        result = self.site.run(self._request(entered), job, progress)
        edit_this = gr.update(visible=takes(self.site.pipe, "mask_image"))
        return _pictures(result), _line(result), self._film(result, 0), edit_this, result, 0

    def _select(self, result: Result | None, event: gr.SelectData) -> tuple[Any, ...]:
        if result is None:  # kept for half an hour
            return gr.skip(), gr.skip(), 0
        return self._film(result, event.index), self._plot(result, event.index), event.index

    def _to_editor(self, result: Result | None, index: int) -> tuple[Any, Any]:
        with self.site.messages():
            if result is None:
                raise ValueError("The picture is no longer there: generate it again first.")
            return canvas_image(result.output.images[index]), gr.Tabs(selected="edit")

    # Compare

    def _compare_tab(self) -> None:
        site, choices = self.site, list(self.choices)
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                prompt = self._prompt()
            with gr.Column(scale=6, min_width=320):
                seed = SeedControls()
                samples = self._samples("Pictures of each", min(4, site.limits.samples))
                more = self._more()
        samplers = {}
        with gr.Row():
            for side, choice in (("First", choices[0]), ("Second", _other(choices))):
                with gr.Column(min_width=320):
                    samplers[side] = self._sampler(choice, f"{side} sampler")
        buttons = RunButtons.make("Compare")
        table = gr.HTML()
        inputs, outputs = {**prompt, **seed.inputs, **samples, **more}, [table]
        with gr.Row():
            for side, sampler in samplers.items():
                with gr.Column(min_width=320):
                    outputs += [self._gallery(f"{side} sampler"), gr.HTML()]
                inputs |= sampler.inputs(f"{side.lower()}_")
        buttons.connect(
            site, "compare", self._compare, inputs, outputs, [prompt["prompt"]], "The same prompt and seed with two samplers."
        )

    def _compare(self, entered: Mapping[str, Any], job: Job, progress: gr.Progress) -> Sequence[Any]:
        sides = ("first_", "second_")
        asked = [self._request(entered, side) for side in sides]  # both are checked before one runs
        names = headings([self.choices[entered[f"{side}sampler"]] for side in sides])
        results = [self.site.run(one, job, progress, name) for one, name in zip(asked, names, strict=True)]
        table = figures_table({name: result.figures for name, result in zip(names, results, strict=True)})
        table += note(STOPPED if any(result.stopped for result in results) else "")
        return [table, *(part for result in results for part in (_pictures(result), self._film(result, 0, moving=False)))]

    # Edit

    def _edit_tab(self) -> Any:
        site = self.site
        with gr.Row(elem_classes="ig-main"):
            with gr.Column(min_width=320):
                editor = gr.ImageEditor(
                    label="Choose a picture, then paint over what is to change",
                    type="pil",
                    format="png",
                    sources=["upload", "clipboard"],
                    transforms=(),
                    layers=False,
                    brush=gr.Brush(default_size=48, colors=["#e11d48"], color_mode="fixed"),
                    canvas_size=(512, 512),
                    height=600,
                    elem_classes=self.crisp,
                )
            with gr.Column(min_width=320, elem_classes="ig-results"):
                gallery = self._gallery("Edited")
                line, strip = gr.HTML(), gr.HTML()
            with gr.Column(min_width=320):
                prompt = self._prompt()
                what = gr.Radio([WHAT_I_PAINT, WHOLE_PICTURE], value=WHAT_I_PAINT, label="What changes")
                info = "The share of the picture that is drawn anew."
                strength = gr.Slider(0.05, 1, value=0.5, step=0.05, label=LABELS["strength"], info=info, visible=False)
                buttons = RunButtons.make("Edit")
                sampler = self._sampler(fields.first_choice(site.settings, False))
                samples = self._samples("Pictures", site.limits.samples)
                seed = SeedControls()
                more = self._more()
        what.change(lambda chosen: gr.update(visible=chosen == WHOLE_PICTURE), [what], [strength], **QUIET)
        inputs = {"picture": editor, **prompt, "what": what, "strength": strength, **seed.inputs, **samples, **more}
        buttons.connect(
            site,
            "edit",
            self._edit,
            {**inputs, **sampler.inputs()},
            [gallery, line, strip],
            submit=[prompt["prompt"]],
            description="Draws a part of a picture, or all of it, anew.",
        )
        return editor

    def _edit(self, entered: Mapping[str, Any], job: Job, progress: gr.Progress) -> Sequence[Any]:
        image, mask = own_size(*painted(entered["picture"]), self.side)
        change: dict[str, Any] = {"strength": entered["strength"]}
        if entered["what"] == WHAT_I_PAINT:
            if mask is None:
                raise ValueError(f"Nothing is painted: paint over what is to change, or choose “{WHOLE_PICTURE}”.")
            change = {"mask_image": mask}
        asked = self._request(entered, image=image, **change)
        result = self.site.run(asked, job, progress)
        return _pictures(result), _line(result), self._film(result, 0)


def _other(choices: Sequence[str]) -> str:
    """What to compare the first choice with: the rule that most pipelines come with."""
    return "maskgit" if "maskgit" in choices else choices[-1]


def _pictures(result: Result) -> list[tuple[Any, str]]:
    return [(image, f"seed {seed}") for image, seed in zip(result.output.images, result.output.seeds, strict=True)]


def _line(result: Result) -> str:
    return note(f"{STOPPED + ' ' if result.stopped else ''}{figures_line(result.figures, len(result.output.seeds), 'picture')}")

"""The parts that all tabs of the page are put together from."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from typing import Any

import gradio as gr
from diffusers import DiffusionPipeline

from ..settings import SETTINGS
from . import fields
from .work import Job, Jobs, Limits, Request, Result, StoppedError, random_seed, run, whole

LABELS = {
    "prompt": "Prompt",
    "class_labels": "ImageNet class",
    "seed": "Seed",
    "samples": "How many",
    "num_inference_steps": "Steps",
    "guidance_scale": "Guidance",
    "negative_prompt": "Negative prompt",
    "max_new_tokens": "New tokens",
    "sampler": "Sampler",
    "strength": "How much changes",
    "image": "Picture",
    "mask_image": "Painted part",
}
"""What the page calls the arguments that messages may name."""

QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "queue": False}
"""How the small events of the page are answered: at once, without a sign of it, and not for programs."""
_MODEL = "the model"
"""All work on the model has this concurrency id: one request runs at a time."""


@dataclass
class Site:
    """What every tab needs to know.

    Attributes:
        pipe: The model, loaded.
        of_text: Whether it writes text.
        limits: The largest request.
        explain: The sentence for an exception.
        jobs: The requests that wait or run.
    """

    pipe: DiffusionPipeline
    of_text: bool
    limits: Limits
    explain: Callable[[Exception], str]
    jobs: Jobs = field(default_factory=Jobs)

    def __post_init__(self) -> None:
        self.settings = fields.model_settings(self.pipe.scheduler)

    @contextmanager
    def messages(self) -> Iterator[None]:
        """Turns errors within the block into messages on the page."""
        try:
            yield
        except StoppedError:
            raise gr.Error("It was stopped before there was anything to show.", print_exception=False) from None
        except gr.Error:
            raise
        except Exception as error:
            text = escape(fields.labelled(self.explain(error), LABELS), quote=False)
            raise gr.Error(text, duration=20, print_exception=False) from None

    def request(self, entered: Mapping[str, Any], side: str = "", *, as_chat: bool = False, **call: Any) -> Request:
        """A request from what stands in the fields of a tab, by name.

        Args:
            entered: With "prompt", "seed", "samples" and the names of `SamplerControls.inputs`.
            side: What the names of the sampler's fields begin with.
            as_chat: Whether the prompt is a turn in a chat.
            call: Arguments of the pipeline's call; None for those that are not given.

        Raises:
            ValueError: For the first entry that is not allowed.
        """
        settings = {name: entered[side + name] for name in fields.field_names(self.of_text)}
        return Request(
            prompt=entered["prompt"],
            seed=whole("seed", entered["seed"]),
            samples=whole("samples", entered["samples"]),
            settings=fields.settings_from(entered[f"{side}sampler"], settings, self.settings, self.of_text),
            steps=None if self.of_text else whole("num_inference_steps", entered[f"{side}steps"]),
            as_chat=as_chat,
            call={name: value for name, value in call.items() if value is not None},
        )

    def run(self, request: Request, job: Job, progress: gr.Progress, what: str = "") -> Result:
        """Runs a request, and shows on the page how far it is."""
        return run(self.pipe, request, self.limits, job, lambda share, text: progress(share, desc=text or "decoding"), what)


class SamplerControls:
    """The choice of a sampler, a line about it, and the settings that it reads."""

    def __init__(self, site: Site, choice: str, label: str = "Sampler", steps: int = 12):
        self.site, of_text = site, site.of_text
        self.choice = gr.Dropdown(fields.sampler_choices(site.settings, of_text), value=choice, label=label, info=_about(choice))
        base = fields.base_settings(choice, site.settings)
        read = fields.read_settings(base, of_text)
        with gr.Accordion(f"Settings of this {label.lower()}", open=False):
            most = site.limits.steps
            self.steps = gr.Slider(
                1, most, value=min(steps, most), step=1, label=LABELS["num_inference_steps"], info=_STEPS, visible=not of_text
            )
            self.fields = {name: _component(name, base[name], name in read, of_text) for name in fields.field_names(of_text)}
        self.choice.change(self._chosen, [self.choice], [self.choice, *self.fields.values()], **QUIET)
        deciding = [self.fields["certainty"], self.fields["num_candidates"]]
        for component in deciding:
            component.change(self._reads, [self.choice, *deciding], list(self.fields.values()), **QUIET)

    def inputs(self, side: str = "") -> dict[str, Any]:
        """The components whose values `Site.request` takes, by name."""
        steps = {} if self.site.of_text else {"steps": self.steps}
        named = {"sampler": self.choice, **steps, **self.fields}
        return {side + name: component for name, component in named.items()}

    def _chosen(self, choice: str) -> list[Any]:
        base = fields.base_settings(choice, self.site.settings)
        read = fields.read_settings(base, self.site.of_text)
        updates = [gr.update(value=fields.shown_value(name, base[name]), visible=name in read) for name in self.fields]
        return [gr.update(info=_about(choice)), *updates]

    def _reads(self, choice: str, certainty: str, num_candidates: Any) -> list[Any]:
        settings = {**fields.base_settings(choice, self.site.settings), "certainty": certainty}
        settings["num_candidates"] = num_candidates or 1
        read = fields.read_settings(settings, self.site.of_text)
        return [gr.update(visible=name in read) for name in self.fields]


_STEPS = "At most this many; an entropy bound ends earlier."


def _about(choice: str) -> str:
    return fields.describe(choice)


def _component(name: str, value: Any, visible: bool, of_text: bool) -> Any:
    """The field for a setting."""
    about, setting = fields.FIELDS[name], SETTINGS[name]
    common = {"label": about.label, "info": about.info, "value": fields.shown_value(name, value), "visible": visible}
    if name == "certainty":
        return gr.Dropdown(fields.rule_choices(of_text), **common)
    if setting.type is bool:
        return gr.Checkbox(**common)
    if name == "num_candidates":
        return gr.Slider(1, fields.MOST_CANDIDATES, step=1, **common)
    if name == "tokens_per_step":
        return gr.Slider(1, 32, step=1, **common)
    if name in ("top_p", "parallel_threshold"):
        return gr.Slider(0, 1, step=0.01, **common)
    if name in fields.TEMPERATURES:
        return gr.Textbox(max_lines=1, **common)
    return gr.Number(**common)


class SeedControls:
    """The seed, with a button that draws one."""

    def __init__(self) -> None:
        with gr.Row(equal_height=True, elem_classes="ig-seed"):
            self.seed = gr.Number(0, label="Seed", precision=0, scale=3, min_width=120)
            button = gr.Button("Random", scale=1, min_width=110, elem_classes="ig-dice")
        button.click(random_seed, None, self.seed, **QUIET)

    @property
    def inputs(self) -> dict[str, Any]:
        """The field by its name in a request."""
        return {"seed": self.seed}


@dataclass
class RunButtons:
    """The button that begins a request, and the one that stops it."""

    start: Any
    stop: Any

    @classmethod
    def make(cls, text: str) -> RunButtons:
        """Adds both to the page."""
        with gr.Row():
            start = gr.Button(text, variant="primary", scale=3, min_width=160)
            stop = gr.Button("Stop", variant="stop", scale=1, min_width=90, interactive=False)
        return cls(start, stop)

    def connect(
        self,
        site: Site,
        name: str,
        function: Callable[[Mapping[str, Any], Job, gr.Progress], Sequence[Any]],
        inputs: Mapping[str, Any],
        outputs: Sequence[Any],
        submit: Sequence[Any] = (),
        description: str = "",
        afterwards: tuple[Callable[..., Any], Sequence[Any], Sequence[Any]] | None = None,
    ) -> None:
        """Makes the buttons, and Enter in the fields `submit`, run `function` under the rules of the page.

        Args:
            site: The page.
            name: Of the function in the page's interface for programs.
            function: Gets the values of `inputs` by name, the job and what shows the progress; returns those of `outputs`.
            inputs: Components by the name that programs know.
            outputs: Components.
            submit: Text fields.
            description: One line for programs.
            afterwards: (function, inputs, outputs) of what is shown a little later than `outputs`.
        """

        def begin(request: gr.Request) -> tuple[Any, Any]:
            site.jobs.begin(_visitor(request))
            return gr.update(interactive=False), gr.update(interactive=True)

        def end(request: gr.Request) -> tuple[Any, Any]:
            site.jobs.end(_visitor(request))
            return gr.update(interactive=True), gr.update(interactive=False)

        def stop(request: gr.Request) -> None:
            site.jobs.stop(_visitor(request))

        def answer(*values: Any) -> tuple[Any, ...]:
            *entered, request, progress = values
            with site.messages():
                job = site.jobs.of(_visitor(request))
                return tuple(function(dict(zip(inputs, entered, strict=True)), job, progress))

        _sign(answer, list(inputs))
        buttons = [self.start, self.stop]
        for trigger, visibility in ((self.start.click, "public"), *((component.submit, "private") for component in submit)):
            answered = trigger(begin, None, buttons, **QUIET).then(
                answer,
                list(inputs.values()),
                list(outputs),
                api_name=name,
                api_description=description,
                api_visibility=visibility,
                concurrency_id=_MODEL,
                concurrency_limit=1,
                show_progress_on=list(outputs)[:1],
            )
            answered.success(end, None, buttons, **QUIET)
            if afterwards is not None:
                answered.success(*afterwards, **QUIET)
            answered.failure(end, None, buttons, **QUIET)
        self.stop.click(stop, None, None, **QUIET)


def _sign(function: Callable[..., Any], names: Sequence[str]) -> None:
    """Gives a function of any arguments the signature that gradio reads: named values, then the request and the progress."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in (*names, "request")]
    parameters.append(inspect.Parameter("progress", kind, default=gr.Progress()))
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {"request": gr.Request}


def _visitor(request: gr.Request) -> str:
    return str(getattr(request, "session_hash", None) or "")

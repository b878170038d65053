"""The page as a whole: what it looks like, and which tabs a model gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from diffusers import DiffusionPipeline

from ..pipeline_infogain_text import InfoGainTextPipeline
from .controls import Site
from .image_tabs import ImageTabs
from .text_tabs import TextTabs
from .work import Limits, prompt_argument

STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
"""The page's own style sheet."""


@dataclass(frozen=True)
class Introduction:
    """What a visitor reads first.

    Attributes:
        text: What the model makes, in a sentence or two.
        examples: Prompts to click; the first one stands in the field at the beginning.
        new_tokens: Length of a text.
    """

    text: str
    examples: tuple[str, ...]
    new_tokens: int = 128


INTRODUCTIONS = {
    "demo": Introduction(
        "The demo model draws one to four coloured shapes, 64 pixels wide.",
        (
            "a cyan square above a purple circle",
            "a red circle and a blue diamond",
            "three blue squares",
            "a green triangle left of a yellow diamond",
        ),
    ),
    "demo-text": Introduction(
        "The demo model knows 4×4 Sudoku grids (S and the digits row by row, _ for a gap) and products in binary (M07*12=). "
        "It knows no language.",
        ("S12__3___________", "S1____2____3____4", "M07*12=", "M__*__=0001010100"),
        new_tokens=10,
    ),
    "class_labels": Introduction("The model draws the classes of ImageNet.", ("golden retriever", "hot air balloon", "volcano")),
    "images": Introduction(
        "The model draws what the prompt says.",
        ("a red bicycle against a brick wall", "a lighthouse at dusk, oil painting", "a bowl of lemons on a blue table"),
    ),
    "text": Introduction(
        "The model writes text.", ("Write a haiku about masks.", "What is 17 times 23?", "Explain entropy to a child.")
    ),
}


def introduction(pipe: DiffusionPipeline, model: str) -> Introduction:
    """The introduction of a model."""
    if model in INTRODUCTIONS:
        return INTRODUCTIONS[model]
    if isinstance(pipe, InfoGainTextPipeline):
        return INTRODUCTIONS["text"]
    return INTRODUCTIONS["class_labels" if prompt_argument(pipe) == "class_labels" else "images"]


def build_page(
    pipe: DiffusionPipeline, model: str, limits: Limits, explain: Callable[[Exception], str]
) -> tuple[gr.Blocks, Site]:
    """The page of a model, and what runs behind it.

    Args:
        pipe: The model, loaded.
        model: Its name, as given to `load`.
        limits: The largest request.
        explain: The sentence for an exception.
    """
    of_text = isinstance(pipe, InfoGainTextPipeline)
    site, about = Site(pipe, of_text, limits, explain), introduction(pipe, model)
    with gr.Blocks(title="Info-gain sampling", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.HTML(_heading(pipe, model, about), elem_classes="ig-heading", padding=False)
        if of_text:
            TextTabs(site, about.examples, about.new_tokens)
        else:
            ImageTabs(site, about.examples)
    page.queue(max_size=limits.waiting, default_concurrency_limit=4)
    return page, site


def _heading(pipe: Any, model: str, about: Introduction) -> str:
    kind = f"{type(pipe).families[0]} model" if model not in ("demo", "demo-text") else "demo model"
    name = Path(model).name if Path(model).exists() else model  # of a folder only its name
    return (
        "<h1>Info-gain sampling</h1>"
        f"<p>Masked diffusion, seen at work: which tokens are decoded when, and what that costs. {escape(about.text)}</p>"
        f'<p class="ig-model">Model <b>{escape(name)}</b> ({escape(kind)}) on {escape(pipe.device.type)}</p>'
    )


def theme() -> Any:
    """gradio's theme in the fonts of the visitor's system, so that nothing is loaded from other servers."""
    return gr.themes.Default(
        primary_hue="indigo",
        secondary_hue="indigo",
        neutral_hue="slate",
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "Consolas", "monospace"],
    )

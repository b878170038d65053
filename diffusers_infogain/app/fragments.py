"""Pieces of HTML that the page shows: figures side by side, the film of a decoding, notes. Their pictures are in them."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import PIL.Image

MOST_FRAMES = 17
"""Frames of a film that stand side by side; of longer films some are left out."""
STOPPED = "Stopped: what is grey or a mask was not decoded yet."
_MILLISECONDS, _LAST = 350, 1800
"""How long an animation shows each frame, and the last one."""


def data_url(image: PIL.Image.Image) -> str:
    """The image as a lossless data URL."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def animation_url(frames: Sequence[PIL.Image.Image]) -> str:
    """The frames as an animated, lossless WebP that repeats, as a data URL."""
    buffer = io.BytesIO()
    first, *others = [frame.convert("RGB") for frame in frames]
    durations = [_MILLISECONDS] * len(others) + [_LAST]
    first.save(buffer, "WEBP", save_all=True, append_images=others, duration=durations, loop=0, lossless=True)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def chosen_frames(count: int, most: int = MOST_FRAMES) -> list[int]:
    """Which of the frames stand side by side: all, or first, last and evenly spread ones between."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def film(frames: Sequence[PIL.Image.Image], num_decoded: Sequence[int], moving: bool = True) -> str:
    """The film of a decoding: animated, and as a strip with what each step decoded.

    Args:
        frames: Before the first step, and after each.
        num_decoded: Tokens that each step decoded.
        moving: Whether it is animated, too.
    """
    if not frames:
        return ""
    cells = []
    for index in chosen_frames(len(frames)):
        count = "" if index == 0 else num_decoded[index - 1]
        text = "start" if index == 0 else f"step {index}"
        note = "nothing yet" if index == 0 else f"{count} token{'' if count == 1 else 's'}"
        url = data_url(frames[index])
        cells.append(f'<figure><img src="{url}" alt="{text}: {note}"><figcaption><b>{text}</b><br>{note}</figcaption></figure>')
    animated = ""
    if moving:
        url = animation_url(frames)
        animated = f'<img class="ig-moving" src="{url}" alt="The picture as it fills in, step by step">'
    return f'<div class="ig-film">{animated}<div class="ig-strip" tabindex="0">{"".join(cells)}</div></div>'


def plot(figure: Any) -> str:
    """A matplotlib figure as a picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    alt = "Plots of the decoding: the order of the tokens, their entropies, and cost and gain along the steps"
    return f'<div class="ig-scroll" tabindex="0"><img class="ig-plot" src="{url}" alt="{alt}"></div>'


def figures_table(columns: Mapping[str, Mapping[str, float]]) -> str:
    """What requests took, a column each, with the smallest value of a row in bold where they differ.

    Args:
        columns: By heading, the figures by name.
    """
    names = list(next(iter(columns.values())))
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in columns)
    rows = []
    for name in names:
        values = [figures[name] for figures in columns.values()]
        texts = [_number(name, value) for value in values]
        best = [value == min(values) and len(set(texts)) > 1 and name != "Steps" for value in values]
        cells = "".join(f"<td>{f'<b>{text}</b>' if bold else text}</td>" for text, bold in zip(texts, best, strict=True))
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    return (
        f'<div class="ig-scroll" tabindex="0"><table class="ig-figures"><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _number(name: str, value: float) -> str:
    digits = 2 if name == "Seconds" else 1
    text = f"{value:.{digits}f}"
    return text if "nats" in name else text.removesuffix(".0")


def note(text: str) -> str:
    """A line that screen readers announce when it changes."""
    return f'<p class="ig-note" role="status">{escape(text)}</p>' if text else ""


def figures_line(figures: Mapping[str, float], samples: int, what: str) -> str:
    """The figures of one request in a sentence."""
    each = f" per {what}" if samples > 1 else ""
    total = f" for all {samples}" if samples > 1 else ""
    steps, rows, passes = (
        _counted(figures[name], unit)
        for name, unit in (("Steps", "step"), ("Model rows (NFE)", "model row"), ("Passes one after the other", "pass"))
    )
    return f"{steps}, {rows} (NFE) in {passes}{each}; {figures['Seconds']:.2f} s{total}."


def _counted(value: float, unit: str) -> str:
    return f"{_number('', value)} {unit}{'' if value == 1 else 'es' if unit.endswith('s') else 's'}"


def headings(names: Sequence[str]) -> list[str]:
    """Names of two columns, told apart if they are the same."""
    if len(set(names)) == len(names):
        return list(names)
    return [f"{name}, {which}" for name, which in zip(names, ("first", "second"), strict=True)]

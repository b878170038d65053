"""A text as it was decoded: its tokens in color, as HTML and in a terminal."""

from __future__ import annotations

import hashlib
import html
import unicodedata
from collections.abc import Sequence

from .trace_view import SampleTrace, Word

NEWLINE = "↵"
"""What a line break is shown as."""
_SIGNS = {"\n": NEWLINE, "\t": "→", "\r": "␍", "\u200c": "\u200c", "\u200d": "\u200d"}
"""How characters are shown that print nothing. The last two join and part letters, and stay."""
_VIRIDIS = ("440154", "482475", "414487", "355f8d", "2a788e", "21918c", "22a884", "44bf70", "7ad151", "bddf26", "fde725")
_MAGMA = ("000004", "140e36", "3b0f70", "641a80", "8c2981", "b73779", "de4968", "f7705c", "fe9f6d", "fecf92", "fcfdbf")
_LEVELS = (0, 95, 135, 175, 215, 255)
"""Of red, green and blue in the cube of colors that terminals with 256 have."""
_KNOWN = (0.831, 0.831, 0.847)

Color = tuple[float, float, float]
"""Red, green and blue in [0, 1]."""


def visible(text: str) -> str:
    """A token with signs for line breaks, tabs and whatever else prints nothing, so that no text can act on a terminal."""
    hidden = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return "".join(_SIGNS.get(c, "�" if unicodedata.category(c) in hidden else c) for c in text)


def ink_on(color: Sequence[float]) -> str:
    """Black or white, whichever is read better on a color (red, green, blue) in [0, 1], by the contrast of WCAG 2."""
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in color]
    luminance = sum(share * value for share, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return "#000000" if luminance > 0.179 else "#ffffff"


def _between(ramp: Sequence[str], share: float) -> Color:
    """The color of a ramp at a share in [0, 1] of its length."""
    place = share * (len(ramp) - 1)
    low = min(int(place), len(ramp) - 2)
    first, second = ([int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)] for code in ramp[low : low + 2])
    red, green, blue = (a + (place - low) * (b - a) for a, b in zip(first, second, strict=True))
    return red, green, blue


def _step_color(word: Word, num_steps: int) -> Color:
    return _KNOWN if word.step < 0 else _between(_VIRIDIS, word.step / (num_steps - 1) if num_steps > 1 else 0.5)


def _entropy_color(word: Word, top: float) -> Color:
    return _KNOWN if word.entropy is None else _between(_MAGMA, word.entropy / top)


def _top(words: Sequence[Word]) -> float:
    """The largest entropy, in nats; a little if there is none."""
    return max(1e-3, *(word.entropy or 0 for word in words), 0)


def _hex(color: Color) -> str:
    return "#" + "".join(f"{round(255 * value):02x}" for value in color)


def _about(word: Word) -> str:
    if word.step < 0:
        return "known"
    return f"step {word.step + 1}, {word.entropy:.3g} nats"


# HTML

_STYLE = """
.ID{font:14px/1.5 system-ui,sans-serif;color:#222226;background:#fff;padding:.5em .75em;max-width:60em}
.ID p{margin:.4em 0}
.ID .ig-text{font:15px/1.9 ui-monospace,"DejaVu Sans Mono",monospace;white-space:pre-wrap;overflow-wrap:anywhere}
.ID .ig-text span{background:var(--s);color:var(--i);border-radius:3px;padding:.15em .05em;margin:0 .5px}
.ID .ig-bar{display:inline-block;width:12em;height:.8em;vertical-align:middle;margin:0 .4em;border-radius:3px}
.ID .ig-of-entropy{display:none}
.ID:has(.ig-entropy:checked) .ig-text span{background:var(--e);color:var(--j)}
.ID:has(.ig-entropy:checked) .ig-of-entropy{display:inline}
.ID:has(.ig-entropy:checked) .ig-of-step{display:none}
.ID table{border-collapse:collapse;margin:.4em 0}
.ID th,.ID td{text-align:left;padding:.1em .8em .1em 0;border-bottom:1px solid #e6e6ea;white-space:pre}
"""


def html_fragment(sample: SampleTrace, words: Sequence[Word]) -> str:
    """Tokens in the color of their step, or by a switch of their entropy, and a table of them; without scripts."""
    top = _top(words)
    body = "".join(_span(word, sample.num_steps, top) for word in words)
    rows = "".join(
        f"<tr><td>{word.step + 1}</td><td>{html.escape(visible(word.text))}</td><td>{word.entropy:.3g}</td></tr>"
        for word in sorted((word for word in words if word.step >= 0), key=lambda word: word.step)
    )
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("step", "token", "nats"))
    known = "(known tokens in grey)" if any(word.step < 0 for word in words) else ""
    name = "ig-" + hashlib.sha256(f"{body}{rows}".encode()).hexdigest()[:10]
    return f"""<div class="{name}"><style>{_STYLE.replace("ID", name)}</style>
<p>{html.escape(sample.took)}</p>
<p>Color by
<label><input type="radio" name="{name}" class="ig-step" checked> step</label>
<label><input type="radio" name="{name}" class="ig-entropy"> entropy before it</label>
<span class="ig-of-step">{_bar("1", _VIRIDIS, str(sample.num_steps))}</span>
<span class="ig-of-entropy">{_bar("0", _MAGMA, f"{top:.2g} nats")}</span> {known}</p>
<p class="ig-text">{body}</p>
<details><summary>The tokens in the order in which they were decoded</summary>
<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>
</details></div>
"""


def _span(word: Word, num_steps: int, top: float) -> str:
    step, entropy = _step_color(word, num_steps), _entropy_color(word, top)
    style = f"--s:{_hex(step)};--i:{ink_on(step)};--e:{_hex(entropy)};--j:{ink_on(entropy)}"
    text = html.escape(visible(word.text)).replace(NEWLINE, f"{NEWLINE}\n")
    return f'<span style="{style}" title="{_about(word)}">{text}</span>'


def _bar(first: str, ramp: Sequence[str], last: str) -> str:
    colors = ",".join(f"#{code}" for code in ramp)
    return f'{first}<span class="ig-bar" style="background:linear-gradient(90deg,{colors})"></span>{last}'


def html_outputs(fragments: Sequence[str], more: int) -> str:
    """Parts one below the other, of which `more` are left out."""
    return "".join([*fragments, f"<p>… and {more} more.</p>" if more else ""])


def html_page(title: str, fragments: Sequence[str]) -> str:
    """A page of its own with these parts."""
    heading = html.escape(title)
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{heading}</title></head>
<body><main><h1 style="font:600 18px/1.4 system-ui,sans-serif;margin:.6em .7em">{heading}</h1>
{"".join(fragments)}</main></body>
</html>
"""


# Terminals


def terminal_text(sample: SampleTrace, words: Sequence[Word], by: str, color: bool) -> str:
    """Tokens in one of 256 colors on a terminal, or without colors the text and a line for every step."""
    if not color:
        text = "".join(visible(word.text) for word in words).replace(NEWLINE, f"{NEWLINE}\n")
        lines = [f"step {step + 1}: {tokens}" for step in range(sample.num_steps) if (tokens := _decoded_in(step, words))]
        return "\n".join([sample.took, text, *lines])
    ramp, first, last = (_VIRIDIS, "1", str(sample.num_steps)) if by == "step" else (_MAGMA, "0", f"{_top(words):.2g} nats")
    bar = "".join(f"\x1b[48;5;{_of_256(_between(ramp, number / 19))}m \x1b[0m" for number in range(20))
    text = "".join(_painted(word, sample.num_steps, _top(words), by) for word in words)
    return f"{sample.took}\n{by} {first} {bar} {last}\n{text}"


def _decoded_in(step: int, words: Sequence[Word]) -> str:
    """The tokens of a step, with their numbers in the text."""
    return ", ".join(f"{visible(word.text)!r} at {number}" for number, word in enumerate(words) if word.step == step)


def _painted(word: Word, num_steps: int, top: float, by: str) -> str:
    number = _of_256(_step_color(word, num_steps) if by == "step" else _entropy_color(word, top))
    red, green, blue = (_LEVELS[(number - 16) // place % 6] / 255 for place in (36, 6, 1))
    begin = f"\x1b[48;5;{number};38;5;{16 if ink_on((red, green, blue)) == '#000000' else 231}m"
    lines = visible(word.text).replace(NEWLINE, f"{NEWLINE}\n").split("\n")
    return "\n".join(f"{begin}{line}\x1b[0m" if line else "" for line in lines)


def _of_256(color: Color) -> int:
    """The nearest color of the cube that terminals with 256 colors have."""
    red, green, blue = (min(range(6), key=lambda level: abs(_LEVELS[level] - 255 * value)) for value in color)
    return 16 + 36 * red + 6 * green + blue

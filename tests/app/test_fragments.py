"""The pieces of HTML hold their pictures, and no text of a visitor becomes markup."""

from __future__ import annotations

import base64
import io
import re

import PIL.Image

from diffusers_infogain.app import fragments

FIGURES = {
    "Steps": 3.0,
    "Model rows (NFE)": 6.0,
    "Passes one after the other": 3.0,
    "Cumulative entropy (nats)": 3.84,
    "Seconds": 0.217,
}


def images_in(html: str) -> list[PIL.Image.Image]:
    return [
        PIL.Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r'src="data:image/\w+;base64,([^"]+)"', html)
    ]


def frames(count: int) -> list[PIL.Image.Image]:
    return [PIL.Image.new("RGB", (8, 8), (20 * i, 0, 0)) for i in range(count)]


def test_a_film_moves_and_stands_side_by_side():
    html = fragments.film(frames(4), [1, 5, 58])
    animation, *still = images_in(html)
    assert (animation.format, animation.n_frames) == ("WEBP", 4)
    assert len(still) == 4
    assert [image.getpixel((0, 0)) for image in still] == [(0, 0, 0), (20, 0, 0), (40, 0, 0), (60, 0, 0)]
    assert html.count("alt=") == 5
    assert [text in html for text in ("step 1", "1 token<", "5 tokens", "58 tokens")] == [True] * 4
    assert len(images_in(fragments.film(frames(4), [1, 5, 58], moving=False))) == 4
    assert fragments.film([], []) == ""


def test_long_films_keep_their_ends():
    chosen = fragments.chosen_frames(101)
    assert len(chosen) == fragments.MOST_FRAMES
    assert (chosen[0], chosen[-1]) == (0, 100)
    assert chosen == sorted(set(chosen))
    assert fragments.chosen_frames(5) == [0, 1, 2, 3, 4]
    html = fragments.film(frames(13) + frames(13), list(range(100, 125)))
    assert "step 25" in html
    assert "124 tokens" in html


def test_the_table_marks_the_smallest_of_each_row():
    html = fragments.figures_table({"a <b>": FIGURES, "c": {**FIGURES, "Seconds": 0.1, "Steps": 9.0}})
    assert "a &lt;b&gt;" in html
    assert "<td>0.22</td><td><b>0.10</b></td>" in html
    assert "<td>6</td><td>6</td>" in html  # equal
    assert "<td>3</td><td>9</td>" in html  # fewer steps are no merit by themselves
    assert html.count('scope="row"') == len(FIGURES)


def test_figures_in_a_sentence():
    one = "3 steps, 6 model rows (NFE) in 3 passes; 0.22 s."
    assert fragments.figures_line(FIGURES, 1, "picture") == one
    assert (
        fragments.figures_line(FIGURES, 4, "picture") == "3 steps, 6 model rows (NFE) in 3 passes per picture; 0.22 s for all 4."
    )


def test_notes_are_announced_and_escaped():
    assert fragments.note("<script>") == '<p class="ig-note" role="status">&lt;script&gt;</p>'
    assert fragments.note("") == ""


def test_equal_headings_are_told_apart():
    assert fragments.headings(["a", "b"]) == ["a", "b"]
    assert fragments.headings(["a", "a"]) == ["a, first", "a, second"]

"""Values in messages: one line, whatever they hold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import PIL.Image
import pytest
import torch

from diffusers_infogain.printing import shown, summary


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a\nb", r"'a\nb'"),
        ([1, 2], "[1, 2]"),
        (list(range(8)), "[0, 1, 2, 3, 4, 5, 6, 7]"),
        (list(range(9)), "list of 9, 0, 1, ..."),
        ([[0] * 9] * 9, "list of 9, list of 9, 0, 0, ..., list of 9, 0, 0, ..., ..."),
        ("a" * 300, "'" + 199 * "a" + "..."),
        (torch.zeros(2, 3), "Tensor of torch.float32 (2, 3)"),
        (np.zeros(3), "ndarray of float64 (3,)"),
        pytest.param(10**9999, "an int with too many digits to show", id="digits"),
    ],
)
def test_a_value_is_one_short_line(value, text):
    assert shown(value) == text


def test_an_output_is_shown_by_its_fields():
    @dataclass
    class Output:
        images: list
        tokens: torch.Tensor

    images = [PIL.Image.new("RGB", (8, 4)), PIL.Image.new("RGB", (2, 4))]
    assert summary(Output(images, torch.zeros(2))) == (
        "Output:\n  images: 2 PIL images of 2x4 and 8x4\n  tokens: Tensor of torch.float32 (2,)"
    )

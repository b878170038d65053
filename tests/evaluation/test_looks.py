"""Samplers can be told apart in pictures, also by the color-blind and in gray."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from diffusers_infogain.choices import PRESETS
from diffusers_infogain.evaluation import looks
from diffusers_infogain.rules import SAMPLERS

# Machado, Oliveira and Fernandes, "A physiologically-based model for simulation of color vision deficiency", IEEE TVCG 15(6),
# 2009: severity 1, on linear RGB.
VISION = {
    "usual": np.eye(3),
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
# sRGB to XYZ by D65 (IEC 61966-2-1), each row divided by that of white.
TO_XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]])


def lab(color, vision="usual"):
    """CIELAB of a color as it is seen."""
    srgb = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = (np.array(VISION[vision]) @ linear).clip(0, 1)
    ratios = (TO_XYZ @ seen) / TO_XYZ.sum(1)
    f = np.where(ratios > 216 / 24389, np.cbrt(ratios), (24389 / 27 * ratios + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_cielab_is_that_of_known_colors():
    assert lab("#FFFFFF") == pytest.approx([100, 0, 0], abs=0.01)
    assert lab("#FF0000") == pytest.approx([53.24, 80.09, 67.20], abs=0.05)
    assert (
        np.linalg.norm(lab("#D62728", "deuteranopia") - lab("#2CA02C", "deuteranopia"))
        < 40
        < np.linalg.norm(lab("#D62728") - lab("#2CA02C"))
    )


@pytest.mark.parametrize("vision", VISION)
def test_colors_can_be_told_apart(vision):
    colors = sorted({color for color, _ in looks.LOOKS.values()})
    assert len(colors) == 8
    for first, second in itertools.combinations(colors, 2):
        assert np.linalg.norm(lab(first, vision) - lab(second, vision)) > 15, (first, second)
    for color in colors:
        assert np.linalg.norm(lab(color, vision) - lab("#FFFFFF", vision)) > 25


def test_samplers_of_one_color_or_one_gray_have_different_markers():
    pairs = 0
    for (color, marker), (other_color, other_marker) in itertools.combinations(looks.LOOKS.values(), 2):
        if abs(lab(color)[0] - lab(other_color)[0]) < 9:
            pairs += 1
            assert marker != other_marker, (color, other_color)
    assert pairs > 50


def test_every_sampler_and_preset_has_a_look():
    assert {*SAMPLERS, *PRESETS} == set(looks.LOOKS)
    assert looks.look_of("maskgit:entropy_bound=0.25") == looks.look_of("maskgit") == looks.LOOKS["maskgit"]


def test_settings_change_the_fill_but_neither_color_nor_marker():
    drawn = looks.styles(["fast:top_p=1", "fast", "maskgit", "fast:top_p=0.5"])
    assert [style["fillstyle"] for style in drawn] == ["none", "full", "full", "left"]
    assert {(style["color"], style["marker"]) for style in drawn if style["marker"] == "^"} == {looks.LOOKS["fast"]}


def test_names_can_be_read_on_white():
    def luminance(rgb):
        linear = np.where(np.array(rgb) <= 0.04045, np.array(rgb) / 12.92, ((np.array(rgb) + 0.055) / 1.055) ** 2.4)
        return linear @ TO_XYZ[1]

    for color, _ in looks.LOOKS.values():
        assert 1.05 / (luminance(looks.ink(color)) + 0.05) > 4.5  # the contrast that WCAG 2 asks for

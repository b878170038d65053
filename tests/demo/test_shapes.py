from __future__ import annotations

import pytest
import torch

from diffusers_infogain.choices import SPLITS
from diffusers_infogain.demo import shapes
from diffusers_infogain.demo.shapes import Caption, ObjectSpec


def test_every_caption_is_parsed_back_from_its_text():
    for caption in shapes.all_captions():
        assert shapes.parse_caption(caption.text) == caption


def test_captions_are_distinct_and_cover_the_categories():
    captions = shapes.all_captions()
    assert len({caption.text for caption in captions}) == len(captions)
    assert {caption.category for caption in captions} == set(shapes.CATEGORIES)


@pytest.mark.parametrize(
    ("text", "category"),
    [
        ("a circle", "single object"),
        ("a square and a circle", "two objects"),
        ("three blue squares", "counting"),
        ("a red circle", "colors"),
        ("a green triangle left of a yellow diamond", "position"),
        ("a red circle and a blue square", "attribute binding"),
    ],
)
def test_category_is_what_the_caption_tests(text, category):
    assert shapes.parse_caption(text).category == category


@pytest.mark.parametrize(
    "text", ["", "a fox", "red circle", "two circle", "five circles", "a red blue circle", "two circles and a square"]
)
def test_texts_outside_the_world_are_refused_with_examples(text):
    with pytest.raises(ValueError, match=r"not a caption of the demo world.*a red circle"):
        shapes.parse_caption(text)


def test_held_out_combinations_leave_every_part_in_training():
    captions = shapes.all_captions()
    held_out = [caption for caption in captions if caption.held_out]
    assert {caption.category for caption in held_out} == {"counting", "position", "attribute binding"}
    assert 0.1 < len(held_out) / len(captions) < 0.4
    trained = [caption for caption in captions if not caption.held_out]

    def parts(chosen: list[Caption]) -> set:
        return {(c.category, c.relation, s.count, s.color) for c in chosen for s in c.objects} | {
            (c.category, c.relation, s.count, s.shape) for c in chosen for s in c.objects
        }

    assert parts(held_out) <= parts(trained)


def test_sampled_captions_keep_to_the_split_and_balance_categories():
    generator = torch.Generator().manual_seed(0)
    trained = shapes.sample_captions(600, generator)
    assert not any(caption.held_out for caption in trained)
    assert {category: sum(c.category == category for c in trained) for category in shapes.CATEGORIES} == dict.fromkeys(
        shapes.CATEGORIES, 100
    )
    assert all(caption.held_out for caption in shapes.sample_captions(50, generator, held_out=True))
    with pytest.raises(ValueError, match="single object"):
        shapes.sample_captions(5, generator, held_out=True, categories=("single object",))


def test_the_splits_are_equal_thirds_of_what_was_not_trained_on_and_share_no_caption():
    held_out = [caption for caption in shapes.all_captions() if caption.held_out]
    parts = {split: {caption.text for caption in held_out if caption.split == split} for split in SPLITS}
    assert set.union(*parts.values()) == {caption.text for caption in held_out}
    assert sum(map(len, parts.values())) == len(held_out) == 702
    for category, size in (("counting", 6), ("attribute binding", 44), ("position", 184)):
        counts = [sum(caption.category == category for caption in held_out if caption.split == split) for split in SPLITS]
        assert counts == [size] * 3
    assert all(caption.split is None for caption in shapes.all_captions() if not caption.held_out)


def test_captions_of_a_split_are_drawn_from_it_only_and_never_change():
    drawn = {}
    for split in SPLITS:
        sampled = shapes.sample_captions(300, torch.Generator().manual_seed(1234), held_out=True, split=split)
        assert all(caption.held_out and caption.split == split for caption in sampled)
        assert [sum(caption.category == name for caption in sampled) for name in ("counting", "position")] == [100, 100]
        drawn[split] = [caption.text for caption in sampled]
    # What was chosen on one split must never be reported on the same captions: these stay as they are.
    assert {split: texts[:2] for split, texts in drawn.items()} == {
        "choose": ["two red triangles", "a blue triangle above a green square"],
        "report": ["two blue circles", "a blue square above a yellow circle"],
        "final": ["two green squares", "a blue circle right of a yellow triangle"],
    }
    with pytest.raises(ValueError, match="`split` must be one of choose, report, final, got 'test'"):
        shapes.sample_captions(1, torch.Generator(), held_out=True, split="test")
    with pytest.raises(ValueError, match="`held_out` must be True for the split 'report' of the held-out captions, got False"):
        shapes.sample_captions(1, torch.Generator(), split="report")


def test_scenes_show_the_caption_and_objects_never_touch():
    captions = shapes.sample_captions(300, torch.Generator().manual_seed(1))
    scenes = shapes.sample_scenes(captions, torch.Generator().manual_seed(2))
    assert {"left of", "below"} <= {caption.relation for caption in captions}
    for i, caption in enumerate(captions):
        present = scenes.shape[i] >= 0
        assert int(present.sum()) == sum(spec.count for spec in caption.objects)
        x, y = scenes.x[i][present], scenes.y[i][present]
        distance = torch.maximum((x[:, None] - x).abs(), (y[:, None] - y).abs()) + 100 * torch.eye(len(x))
        assert distance.min() >= 20
        if caption.relation == "left of":
            assert x[0] < 32 < x[1]
            assert x[1] - x[0] >= 2 * (y[1] - y[0]).abs()
        if caption.relation == "below":
            assert y[1] < 32 < y[0]
            assert y[0] - y[1] >= 2 * (x[1] - x[0]).abs()
        names = [shapes.SHAPES[index] for index in scenes.shape[i][present].tolist()]
        assert names == [spec.shape for spec in caption.objects for _ in range(spec.count)]


def test_rendering_is_seeded_and_in_range():
    captions = [Caption((ObjectSpec("circle", "red"),))] * 4
    first, second = (shapes.render(shapes.sample_scenes(captions, torch.Generator().manual_seed(3))) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (4, 3, 64, 64)
    assert 0 <= first.min() <= first.max() <= 1
    red = torch.tensor(shapes.COLORS["red"]) / 255
    # A circle of radius 8 has an area of about 201 pixels; anti-aliased edges count by their coverage.
    background = torch.tensor(shapes.BACKGROUND) / 255
    coverage = ((first - background.view(1, 3, 1, 1)) / (red - background).view(1, 3, 1, 1)).mean(1).sum((1, 2))
    assert torch.allclose(coverage, torch.tensor(torch.pi * 64.0), rtol=0.01)

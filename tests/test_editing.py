"""Which tokens of an image are decoded anew, and which pixels stay: the functions, without a model."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_infogain.editing import (
    EditArguments,
    begin_edit,
    draw_share,
    fit_image,
    fit_mask,
    read_images,
    read_masks,
    seam,
    token_mask,
)

MASK = 99


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def edit_arguments(**given) -> EditArguments:
    nothing = {"image": None, "mask_image": None, "strength": None, "outpaint": None, "mask_coverage": 0.0, "mask_blur": 0.0}
    return EditArguments(**{**nothing, **given})


def begin(size, pixels_per_token=2, prompts=(0,), seeds=None, **given):
    """An edit whose "tokens" are the rounded means of the pixels, so that they tell where they come from."""

    def encode(pixels):
        cells = pixels.mean(1).unflatten(-1, (-1, pixels_per_token)).unflatten(-3, (-1, pixels_per_token))
        return (cells.mean((-3, -1)) * 90).round().long()

    generators = [torch.Generator().manual_seed(seed) for seed in seeds or range(len(prompts))]
    edit = begin_edit(edit_arguments(**given), encode, size, pixels_per_token, MASK, torch.tensor(prompts), generators)
    return edit, encode


def test_every_kind_of_image_is_read_as_the_same():
    pixels = (noise(3, 5, 7) * 255).round().byte()
    array = pixels.movedim(0, -1).numpy()
    kinds = [
        PIL.Image.fromarray(array),
        PIL.Image.fromarray(array).convert("RGBA"),
        array,
        array.astype(np.float64) / 255,
        pixels,
        pixels.float() / 255,
        array[None],
        pixels[None],
        [pixels],
        (pixels.float() / 255).requires_grad_(),
    ]
    for kind in kinds:
        (image,) = read_images("image", kind)
        assert image.dtype == torch.float32
        assert torch.equal((image * 255).round().byte(), pixels), type(kind)
    two = read_images("image", [kinds[0], array])
    assert len(two) == 2
    assert torch.equal(*two)
    assert len(read_images("image", torch.stack([pixels] * 3))) == 3


def test_grey_images_get_three_equal_channels():
    grey = (noise(4, 6) * 255).round().byte()
    for kind in (PIL.Image.fromarray(grey.numpy()), grey[None], grey[..., None].numpy()):
        (image,) = read_images("image", kind)
        assert torch.equal((image * 255).round().byte(), grey.expand(3, 4, 6))


def test_every_kind_of_mask_is_read_as_the_same():
    mask = noise(5, 7) > 0.5
    grey = mask.byte() * 255
    kinds = [
        PIL.Image.fromarray(grey.numpy()),
        PIL.Image.fromarray(grey.numpy()).convert("RGB"),
        PIL.Image.fromarray(mask.numpy()),
        mask,
        mask.numpy(),
        mask.float() * 0.5,
        grey,
        mask[None],
        mask[None, None],
        mask[..., None].numpy(),
        mask[None, ..., None].numpy(),
        [mask],
    ]
    for kind in kinds:
        (read,) = read_masks("mask_image", kind)
        assert torch.equal(read, mask)
    assert len(read_masks("mask_image", mask.expand(3, 5, 7))) == 3
    assert len(read_masks("mask_image", [grey, mask])) == 2


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, r"`image` must be a PIL image, an array .*, got None\."),
        ([], r"`image` must be .* or a list of them, got \[\]\."),
        ("photo.png", r"`image` must be .*, got 'photo.png'\."),
        (torch.zeros(5, 5), r"got Tensor of torch.float32 \(5, 5\)\."),
        (torch.zeros(4, 5, 5), r"got Tensor of torch.float32 \(4, 5, 5\)\."),
        (torch.zeros(3, 0, 5), r"got Tensor of torch.float32 \(3, 0, 5\)\."),
        (np.zeros((5, 5, 2)), r"got ndarray of float64 \(5, 5, 2\)\."),
        (torch.full((3, 2, 2), 1.5), r"must be floating point in \[0, 1\], got values from 1.5 to 1.5\."),
        (torch.full((3, 2, 2), -0.5), r"got values from -0.5 to -0.5\."),
        (torch.full((3, 2, 2), torch.nan), r"got values from nan to nan\."),
        (torch.zeros(3, 2, 2, dtype=torch.long), r"must be uint8, or floating point in \[0, 1\], got Tensor of torch.int64"),
        (PIL.Image.new("I;16", (4, 4)), r"must have 8 bits per channel, got a PIL image of mode 'I;16'\."),
    ],
)
def test_what_is_no_image_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        read_images("image", value)


@pytest.mark.parametrize("value", [torch.zeros(2, 3, 4, 4), torch.zeros(4), np.zeros((2, 2, 2, 2)), "mask.png", {}])
def test_what_is_no_mask_is_refused(value):
    with pytest.raises(ValueError, match=r"`mask_image` must be a PIL image, an array \(H, W\)"):
        read_masks("mask_image", value)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 12), (20, 7), (3, 3)])
def test_images_and_masks_are_fitted_alike(height, width):
    """An image whose white part is the mask stays one."""
    mask = torch.zeros(12, 16, dtype=torch.bool)
    mask[3:9, 4:12] = True
    image = fit_image(mask.float().expand(3, -1, -1), height, width)
    fitted = fit_mask(mask, height, width)
    assert image.shape == (3, height, width)
    assert fitted.shape == (height, width)
    assert fitted[image[0] > 0.6].all()
    assert not fitted[image[0] == 0].any() or (image[0] == 0)[fitted].float().mean() < 0.2


def test_images_of_the_right_size_are_not_touched():
    image, mask = noise(3, 6, 8), noise(6, 8) > 0.5
    assert fit_image(image, 6, 8) is image
    assert fit_mask(mask, 6, 8) is mask


def test_a_masked_pixel_survives_any_reduction():
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[37, 11] = True
    for size in (32, 16, 8):
        fitted = fit_mask(mask, size, size)
        assert fitted[37 * size // 64, 11 * size // 64]
        assert fitted.sum() <= 4


@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    pixels=st.integers(1, 5),
    coverage=st.sampled_from([0.0, 0.25, 0.5, 0.9]),
    seed=st.integers(0, 100),
)
@settings(max_examples=60, deadline=None)
def test_a_token_is_masked_by_the_share_of_its_pixels(rows, columns, pixels, coverage, seed):
    mask = noise(2, rows * pixels, columns * pixels, seed=seed) > 0.7
    cells = token_mask(mask, pixels, coverage)
    for sample in range(2):
        for row in range(rows):
            for column in range(columns):
                part = mask[sample, row * pixels : (row + 1) * pixels, column * pixels : (column + 1) * pixels]
                assert cells[sample, row, column] == (part.sum().item() > coverage * pixels**2)


@given(share=st.floats(0.01, 1), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_a_share_of_the_cells_is_drawn_for_every_sample_on_its_own(share, seed):
    cells = noise(3, 4, 5, seed=seed) > 0.4
    cells[:, 0, 0] = True
    generators = [torch.Generator().manual_seed(seed + i) for i in range(3)]
    drawn = draw_share(cells, share, generators)
    assert not (drawn & ~cells).any()
    counts = cells.flatten(1).sum(1)
    assert drawn.flatten(1).sum(1).tolist() == [max(1, round(share * count)) for count in counts.tolist()]
    alone = draw_share(cells[1:2], share, [torch.Generator().manual_seed(seed + 1)])
    assert torch.equal(alone[0], drawn[1])
    assert [source.get_state().tolist() for source in generators] == [
        torch.Generator().manual_seed(seed + i).get_state().tolist() for i in range(3)
    ]


def test_each_cell_is_drawn_equally_often():
    cells = torch.ones(4000, 2, 3, dtype=torch.bool)
    drawn = draw_share(cells, 0.5, [torch.Generator().manual_seed(seed) for seed in range(4000)])
    assert (drawn.double().mean(0) - 0.5).abs().max() < 5 * 0.5 / 4000**0.5


def test_which_tokens_stay_is_drawn_apart_from_what_is_decoded():
    """The numbers that decoding would draw first from the same generator decide nothing."""
    cells = torch.ones(400, 4, 4, dtype=torch.bool)
    generators = [torch.Generator().manual_seed(seed) for seed in range(400)]
    drawn = draw_share(cells, 0.5, generators).flatten(1).double()
    first = torch.stack([torch.rand(16, generator=source) for source in generators]).double()
    correlation = torch.corrcoef(torch.stack([drawn.flatten(), first.flatten()]))[0, 1]
    assert abs(correlation) < 5 / drawn.numel() ** 0.5


def test_a_seam_falls_outside_the_mask_only():
    mask = torch.zeros(1, 40, 40, dtype=torch.bool)
    mask[:, :, :20] = True
    assert torch.equal(seam(mask, 0)[:, 0], mask.float())
    soft = seam(mask, 3)[0, 0, 20]
    assert (soft[:20] == 1).all()
    assert soft[20] > 0.7
    assert (soft[20:].diff() <= 0).all()
    assert 0.05 < soft[23] < 0.6
    assert (soft[33:] == 0).all()


@given(
    sides=st.fixed_dictionaries({}, optional={side: st.integers(0, 3) for side in ("left", "top", "right", "bottom")}),
    masked=st.booleans(),
    seed=st.integers(0, 50),
)
@settings(max_examples=60, deadline=None)
def test_known_tokens_and_pixels_are_those_of_the_image(sides, masked, seed):
    outpaint = {side: 2 * count for side, count in sides.items()}
    outpaint = outpaint if any(outpaint.values()) else None
    image, mask = noise(3, 6, 8, seed=seed), noise(6, 8, seed=seed + 1) > 0.8
    mask[0, 0], mask[-2:, -2:] = True, False
    left, top, right, bottom = ((outpaint or {}).get(side, 0) for side in ("left", "top", "right", "bottom"))
    size = (6 + top + bottom, 8 + left + right)
    edit, encode = begin(size, image=image, mask_image=mask if masked or not outpaint else None, outpaint=outpaint)
    covered = torch.ones(size, dtype=torch.bool)
    covered[top : top + 6, left : left + 8] = mask if masked or not outpaint else False
    cells = token_mask(covered[None], 2)
    assert torch.equal(edit.tokens == MASK, cells)
    whole = torch.nn.functional.pad(image, (left, right, top, bottom))[None]
    assert torch.equal(edit.tokens[~cells], encode(whole)[~cells])
    decoded = noise(1, 3, *size, seed=seed + 2)
    pasted = edit.paste(decoded)
    assert torch.equal(pasted[..., covered], decoded[..., covered])
    assert torch.equal(pasted[..., ~covered], whole[..., ~covered])


def test_image_to_image_masks_half_and_shows_what_was_decoded():
    edit, _ = begin((6, 8), image=noise(3, 6, 8))
    assert (edit.tokens == MASK).sum() == 6
    decoded = noise(1, 3, 6, 8, seed=5)
    assert edit.paste(decoded) is decoded
    tokens = begin((6, 8), image=noise(3, 6, 8), strength=0.25)[0].tokens
    assert (tokens == MASK).sum() == 3


def test_strength_is_a_share_of_the_masked_tokens():
    mask = torch.zeros(6, 8)
    mask[:4] = 1
    edit, _ = begin((6, 8), image=noise(3, 6, 8), mask_image=mask, strength=0.5, prompts=(0, 0))
    masks = edit.tokens == MASK
    assert masks.flatten(1).sum(1).tolist() == [4, 4]
    assert not masks[:, 2].any()
    assert not torch.equal(masks[0], masks[1]), "each image draws its own"


def test_prompts_share_an_image_or_have_their_own():
    images, masks = noise(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.bool)
    masks[0, 0, 0] = masks[1, 2, :] = True
    both, _ = begin((4, 4), prompts=(0, 0, 1, 1), image=images, mask_image=masks)
    for index, prompt in enumerate((0, 0, 1, 1)):
        alone, _ = begin((4, 4), image=images[prompt], mask_image=masks[prompt])
        assert torch.equal(both.tokens[index], alone.tokens[0])
        assert torch.equal(both.pixels[index], alone.pixels[0])
    shared, _ = begin((4, 4), prompts=(0, 1), image=images[0], mask_image=masks)
    assert torch.equal(shared.pixels[0], shared.pixels[1])
    assert torch.equal(shared.tokens[1] == MASK, token_mask(masks[1:], 2)[0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"mask_image": PIL.Image.new("L", (4, 6))},
            r"`mask_image` must be None without `image`, got a PIL image of mode 'L' and 4 x 6 pixels\.",
        ),
        ({"strength": 0.5}, r"`strength` must be None without `image`, got 0\.5\."),
        ({"outpaint": {"left": 2}}, r"`outpaint` must be None without `image`, got \{'left': 2\}\."),
        ({"image": 1, "strength": 0}, r"`strength` must be above 0: at 0 nothing is decoded anew\."),
        (
            {"image": 1, "strength": 1},
            r"`strength` must be below 1 without `mask_image`: at 1 nothing of `image` would be kept\.",
        ),
        ({"image": 1, "strength": 1.5}, r"`strength` must be a number in \[0, 1\] or None, got 1\.5\."),
        ({"image": 1, "strength": "all"}, r"`strength` must be a number in \[0, 1\] or None, got 'all'\."),
        ({"image": 1, "outpaint": {"left": 2}, "strength": 0.5}, r"`strength` must be None with `outpaint` and no `mask_image`"),
        ({"image": 1, "mask_coverage": 0.5}, r"`mask_coverage` must be 0 without `mask_image`, got 0\.5\."),
        ({"image": 1, "mask_image": 1, "mask_coverage": 1}, r"`mask_coverage` must be below 1"),
        ({"image": 1, "mask_blur": 2}, r"`mask_blur` must be 0 without `mask_image` or `outpaint`, got 2\."),
        ({"image": 1, "mask_blur": -1}, r"`mask_blur` must be a number in \[0, 1024\], got -1\."),
    ],
)
def test_arguments_that_do_not_fit_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        edit_arguments(**given)


@pytest.mark.parametrize(
    ("outpaint", "message"),
    [
        ({"left": 3}, r"`outpaint\['left'\]` must be a multiple of 2, the pixels of a token, got 3\."),
        ({"left": -2}, r"`outpaint\['left'\]` must be an integer >= 0, got -2\."),
        ({"middle": 2}, r"`outpaint` must have the sides left, top, right, bottom only, got 'middle'\."),
        ({"top": 0}, r"`outpaint` must add pixels on some side, got \{'top': 0\}\."),
        ({}, r"`outpaint` must add pixels on some side, got \{\}\."),
        (64, r"`outpaint` must be pixels by side, such as \{\"left\": 64\}, or None, got 64\."),
        ({"left": 4, "right": 4}, r"`outpaint` must leave room for the image in 8 x 6 pixels, got \{'left': 4, 'right': 4\}\."),
    ],
)
def test_padding_that_does_not_fit_is_refused(outpaint, message):
    with pytest.raises(ValueError, match=message):
        begin((6, 8), image=noise(3, 6, 8), outpaint=outpaint)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mask_image": torch.zeros(6, 8)}, r"`mask_image` must mask something, but covers no token of image 0\."),
        (
            {"mask_image": torch.ones(6, 8)},
            r"`mask_image` must leave something of `image`, but covers all tokens of image 0",
        ),
        ({"mask_image": torch.ones(4, 8)}, r"`mask_image` must have the size of `image`, 8 x 6 pixels, got 8 x 4\."),
        ({"image": noise(3, 3, 6, 8)}, r"`image` must be one, or one for each of the 2 prompts, got 3\."),
        ({"mask_image": torch.ones(3, 6, 8)}, r"`mask_image` must be one, or one for each of the 2 prompts, got 3\."),
    ],
)
def test_images_and_masks_that_do_not_fit_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        begin((6, 8), prompts=(0, 1), **{"image": noise(3, 6, 8), **given})

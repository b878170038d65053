"""The MAGVIT-v2 tokenizer: against stored figures of the public implementation (see golden/README.md), and what it promises."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from diffusers_infogain.models.magvit_v2 import BinaryCodes, MagvitV2Model

FILE = Path(__file__).parents[1] / "golden" / "magvit_v2_tiny.safetensors"
# Two float32 implementations of the same function; each is within 1e-5 of float64 here, with pixels up to 8.
PIXELS = {"atol": 5e-5, "rtol": 0}


@pytest.fixture(scope="module")
def stored() -> dict[str, torch.Tensor]:
    return load_file(FILE)


@pytest.fixture(scope="module")
def public(stored) -> dict[str, torch.Tensor]:
    """State dict in the public format."""
    weights = {key.removeprefix("model."): value for key, value in stored.items() if key.startswith("model.")}
    return {key: value.float() if value.is_floating_point() else value for key, value in weights.items()}


@pytest.fixture(scope="module")
def images(stored) -> torch.Tensor:
    return stored["images"] / 127.5 - 1


@pytest.fixture(scope="module")
def model(public) -> MagvitV2Model:
    model = MagvitV2Model(channels=4, bits=6, norm_groups=2).eval().requires_grad_(False)
    model.load_state_dict(public, strict=True)
    return model


def test_codes_are_those_of_the_public_implementation(model, stored, images):
    codes = model.encode(images)
    assert codes.dtype == torch.int64
    assert torch.equal(codes, stored["codes"])


@pytest.mark.parametrize("grid", ["wide", "square"])
def test_pixels_are_those_of_the_public_implementation(model, stored, grid):
    torch.testing.assert_close(model.decode(stored[grid]), stored[f"{grid}_pixels"], **PIXELS)
    torch.testing.assert_close(model.decode(stored[grid].int()), stored[f"{grid}_pixels"], **PIXELS)


def test_the_defaults_have_the_size_of_the_published_model(public):
    with torch.device("meta"):
        model = MagvitV2Model()
    state = model.state_dict()
    assert state.keys() == public.keys()
    assert len(state) == 382
    assert sum(parameter.numel() for parameter in model.parameters()) == 95_387_004
    assert round(sum(tensor.numel() * tensor.element_size() for tensor in state.values()) / 1e6) == 382
    assert state["quantize.embedding"].shape == (8192, 13)
    assert state["quantize.power_vals"].shape == (13,)
    assert (model.codebook_size, model.scale_factor) == (8192, 16)


def test_the_code_table_is_that_of_the_public_implementation(public):
    table = BinaryCodes(6)
    assert torch.equal(table.embedding, public["quantize.embedding"])
    assert torch.equal(table.power_vals, public["quantize.power_vals"])


def test_public_keys_are_the_models_own_and_unknown_ones_are_named_by_a_strict_load(model, public):
    assert public.keys() == model.state_dict().keys()
    with pytest.raises(RuntimeError, match=r"decoder\.surprise"):
        model.load_state_dict({**public, "decoder.surprise": torch.zeros(1)}, strict=True)


@pytest.mark.parametrize("bits", [1, 2, 6, 13])
def test_codes_are_binary_numbers_of_signs_with_the_highest_bit_first(bits):
    table, codes = BinaryCodes(bits), torch.arange(2**bits).reshape(1, 2, -1)
    vectors = table.vectors(codes)
    assert vectors.shape == (1, bits, *codes.shape[1:])
    digits = [[1.0 if digit == "1" else -1.0 for digit in f"{code:0{bits}b}"] for code in range(2**bits)]
    assert vectors.flatten(2)[0].T.tolist() == digits
    assert torch.equal(table.codes(vectors), codes)
    assert torch.equal(table.codes(vectors * torch.rand_like(vectors).clamp_min(0.01)), codes)


def test_zero_is_the_bit_0():
    assert BinaryCodes(3).codes(torch.tensor([0.0, 1e-30, -0.0])[None, :, None, None]).item() == 0b010


@pytest.mark.parametrize(("height", "width"), [(16, 16), (32, 80), (48, 16)])
def test_shapes_of_a_round_trip(model, height, width):
    images = torch.rand(2, 3, height, width) * 2 - 1
    tokens = model.encode(images)
    assert tokens.shape == (2, height // 16, width // 16)
    decoded = model.decode(tokens)
    assert decoded.shape == images.shape
    assert torch.equal(model(images), decoded)


def test_fewer_levels_make_larger_grids():
    sizes = {"encoder_multipliers": [1, 2, 2], "encoder_blocks": [1, 2, 1]}
    model = MagvitV2Model(channels=8, decoder_multipliers=[1, 1, 3], decoder_blocks=[2, 1, 1], bits=4, norm_groups=4, **sizes)
    assert (model.scale_factor, model.codebook_size) == (4, 16)
    tokens = model.encode(torch.zeros(1, 3, 8, 12))
    assert tokens.shape == (1, 2, 3)
    assert model.decode(tokens).shape == (1, 3, 8, 12)


def test_images_of_a_batch_do_not_meet(model, stored, images):
    assert torch.equal(torch.cat([model.encode(image[None]) for image in images]), stored["codes"])
    alone = torch.cat([model.decode(grid[None]) for grid in stored["square"]])
    torch.testing.assert_close(model.decode(stored["square"]), alone, **PIXELS)


def test_saved_and_loaded_models_are_equal(model, stored, images, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = MagvitV2Model.from_pretrained(tmp_path)
    assert dict(loaded.config).items() >= {"channels": 4, "bits": 6, "norm_groups": 2, "decoder_blocks": [4, 4, 3, 4, 3]}.items()
    assert torch.equal(loaded.encode(images), stored["codes"])
    assert torch.equal(loaded.decode(stored["wide"]), model.decode(stored["wide"]))


class Pipeline(DiffusionPipeline):
    def __init__(self, vqvae: MagvitV2Model):
        super().__init__()
        self.register_modules(vqvae=vqvae)


def test_a_pipeline_in_bfloat16_keeps_its_tokenizer_in_float32(model, stored, tmp_path):
    Pipeline(model).save_pretrained(tmp_path)
    loaded = Pipeline.from_pretrained(tmp_path, dtype=torch.bfloat16).vqvae
    assert type(loaded) is MagvitV2Model
    assert loaded.dtype == torch.float32
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.decode(stored["wide"]), model.decode(stored["wide"]))


def test_bfloat16_on_request(public, stored, images):
    model = MagvitV2Model(channels=4, bits=6, norm_groups=2).to(torch.bfloat16)
    model.load_state_dict(public, strict=True)
    assert model.dtype == torch.bfloat16
    codes, pixels = model.encode(images), model.decode(stored["wide"])
    assert codes.dtype == torch.int64
    assert (codes == stored["codes"]).float().mean() > 0.8
    assert pixels.dtype == torch.bfloat16
    torch.testing.assert_close(pixels.float(), stored["wide_pixels"], atol=0.5, rtol=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"channels": 0}, r"`channels` must be a positive integer, got 0"),
        ({"bits": 6.5}, r"`bits` must be a positive integer, got 6\.5"),
        ({"norm_groups": True}, r"`norm_groups` must be a positive integer, got True"),
        ({"channels": 8, "norm_groups": 3}, r"`norm_groups` must divide `channels` = 8, got 3"),
        ({"encoder_multipliers": []}, r"`encoder_multipliers` must be a non-empty list of positive integers, got \[\]"),
        ({"decoder_multipliers": [1, 1, 2, 2, 0]}, r"`decoder_multipliers` must be a non-empty list of positive integers"),
        ({"encoder_blocks": [4, 3]}, r"`encoder_blocks` must have as many entries as `encoder_multipliers`, 5, got \[4, 3\]"),
        ({"decoder_blocks": [1] * 6}, r"`decoder_blocks` must have as many entries as `encoder_multipliers`, 5, got"),
    ],
)
def test_refused_configurations(config, message):
    with pytest.raises(ValueError, match=message):
        MagvitV2Model(**config)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 3, 16, 16), torch.uint8, r"`images` must be floating point in \[-1, 1\], got torch\.uint8"),
        ((1, 3, 16, 20), torch.float32, r"H and W positive multiples of 16, got \(1, 3, 16, 20\)"),
        ((1, 3, 0, 16), torch.float32, r"H and W positive multiples of 16, got \(1, 3, 0, 16\)"),
        ((1, 1, 16, 16), torch.float32, r"`images` must be of shape \(B, 3, H, W\)"),
        ((3, 16, 16), torch.float32, r"`images` must be of shape \(B, 3, H, W\)"),
    ],
)
def test_refused_images(model, shape, dtype, message):
    with pytest.raises(ValueError, match=message):
        model.encode(torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(1, 2, 2), r"`tokens` must be int32 or int64, got torch\.float32"),
        (torch.zeros(1, 4, dtype=torch.int64), r"`tokens` must be of shape \(B, h, w\) and not empty, got \(1, 4\)"),
        (torch.zeros(1, 0, 2, dtype=torch.int64), r"`tokens` must be of shape \(B, h, w\) and not empty, got \(1, 0, 2\)"),
        (torch.tensor([[[0, 64]]]), r"`tokens` must be codes from 0 to 63, got codes from 0 to 64"),
        (torch.tensor([[[-1, 5]]]), r"`tokens` must be codes from 0 to 63, got codes from -1 to 5"),
    ],
)
def test_refused_tokens(model, tokens, message):
    with pytest.raises(ValueError, match=message):
        model.decode(tokens)


def test_the_decoder_has_gradients():
    model = MagvitV2Model(channels=4, bits=6, norm_groups=2)
    model.decode(torch.zeros(1, 1, 1, dtype=torch.int64)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.decoder.parameters())

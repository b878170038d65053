"""The transformer of Meissonic against the stored logits of the public code (golden/README.md), and its file format."""

import copy
import json
import logging
import math
import re
from pathlib import Path

import pytest
import torch
from diffusers import VQModel
from diffusers.models.embeddings import get_timestep_embedding
from helpers.amused import CODEBOOK_SIZE, GRID, make_components
from helpers.checkpoints_meissonic import VOCAB_SIZE, write_meissonic_repository
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from diffusers_infogain.models.meissonic_transformer import MeissonicTransformer2DModel, Sinusoids

GOLDEN = Path(__file__).parents[1] / "golden"
INPUTS = ("tokens", "encoder_hidden_states", "pooled_text_emb", "micro_conds", "timestep")
PUBLIC = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 14,
    "num_single_layers": 28,
    "attention_head_dim": 128,
    "num_attention_heads": 8,
    "joint_attention_dim": 1024,
    "pooled_projection_dim": 1024,
    "guidance_embeds": False,
    "axes_dims_rope": (16, 56, 56),
    "vocab_size": 8256,
    "codebook_size": 8192,
}
KINDS = {"down": True, "plain": False}
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "meissonic_tiny.safetensors")


def public_weights(golden: dict, kind: str) -> dict[str, torch.Tensor]:
    weights = {key.removeprefix("weights."): value for key, value in golden.items() if key.startswith("weights.")}
    return {key: value for key, value in weights.items() if KINDS[kind] or not key.startswith(("down_block", "up_block"))}


def write_checkpoint(folder: Path, golden: dict, kind: str, **settings) -> Path:
    config = json.loads((GOLDEN / "meissonic_tiny.json").read_text())["config"]
    (folder / "transformer").mkdir(exist_ok=True)
    config |= {"downsample": KINDS[kind], "upsample": KINDS[kind], **settings}
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    save_file(public_weights(golden, kind), folder / "transformer" / "diffusion_pytorch_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def models(golden, tmp_path_factory) -> dict[str, MeissonicTransformer2DModel]:
    def load(kind: str) -> MeissonicTransformer2DModel:
        folder = write_checkpoint(tmp_path_factory.mktemp(kind), golden, kind)
        return MeissonicTransformer2DModel.from_pretrained(folder, subfolder="transformer").eval()

    return {kind: load(kind) for kind in KINDS}


def arguments(golden: dict) -> dict[str, torch.Tensor]:
    return {name: golden[f"input.{name}"] for name in INPUTS}


def rows_of(logits: torch.Tensor) -> torch.Tensor:
    return logits.flatten(2).transpose(1, 2)


# Parity


@kinds
@pytest.mark.parametrize("name", ["", "_per_row"])
@torch.no_grad()
def test_logits_of_the_public_code(models, golden, kind, name):
    inputs = arguments(golden) | {"timestep": golden[f"input.timestep{name}"]}
    expected = rows_of(golden[f"{kind}.logits{name}"])
    torch.testing.assert_close(models[kind](**inputs).double(), expected, atol=1e-4, rtol=0)
    # In float64 only the rotary embeddings round: diffusers, as the public code, applies them in float32.
    exact = copy.deepcopy(models[kind]).double()
    torch.testing.assert_close(exact(**{key: wide(value) for key, value in inputs.items()}), expected, atol=5e-6, rtol=0)


def wide(value: torch.Tensor) -> torch.Tensor:
    return value.double() if value.is_floating_point() else value


# Every counter of up to 64 steps, as it enters, and the sizes in pixels.
VALUES = [1000 * counter for counter in range(64)] + [0, 6, 4.5, 256, 512, 1024]


def test_sinusoids_are_exact():
    computed = Sinusoids(8)(torch.tensor(VALUES, dtype=torch.float64))
    phases = [[value * 10000 ** (-i / 4) for i in range(4)] for value in VALUES]
    exact = [[*map(math.cos, row), *map(math.sin, row)] for row in phases]
    torch.testing.assert_close(computed, torch.tensor(exact, dtype=torch.float64), atol=1e-10, rtol=0)


def test_sinusoids_are_those_of_the_public_code_up_to_its_rounding():
    values = torch.tensor(VALUES, dtype=torch.float64)
    public = get_timestep_embedding(values, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    frequencies = 10000 ** (-torch.arange(128) / 128).double()
    # In float32 a frequency and its product with the value are each off by at most a few units in the last place.
    bound = 4 * 2**-23 * values[:, None] * frequencies * (1 + math.log(10000)) + 1e-6
    assert ((Sinusoids(256)(values) - public).abs() <= bound.repeat(1, 2)).all()


@torch.no_grad()
def test_counters_are_exact_in_half_precision(models, golden):
    # 63 000 has no bfloat16; what enters the first layer may only be rounded once, behind the sinusoids.
    seen = []
    model = copy.deepcopy(models["plain"]).to(torch.bfloat16)
    model.time_text_embed.timestep_embedder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(**arguments(golden) | {"timestep": 63})
    assert torch.equal(seen[0], Sinusoids(256)(torch.tensor([63000.0])).bfloat16())


@kinds
@torch.no_grad()
def test_every_parameter_matters(models, golden, kind):
    logits, generator = models[kind](**arguments(golden)), torch.Generator().manual_seed(0)
    for name, parameter in models[kind].named_parameters():
        value = parameter.data
        parameter.data = value + 0.1 * torch.randn(value.shape, generator=generator)
        changed = models[kind](**arguments(golden))
        parameter.data = value
        assert (changed - logits).abs().max() > 1e-4, name


@kinds
@torch.no_grad()
def test_every_input_matters(models, golden, kind):
    logits = models[kind](**arguments(golden))
    for name in ("encoder_hidden_states", "pooled_text_emb", "micro_conds", "timestep"):
        changed = models[kind](**arguments(golden) | {name: golden[f"input.{name}"] + 1})
        assert (changed - logits).abs().amax((1, 2)).min() > 1e-3, name


# Names and sizes


@pytest.mark.parametrize(("kind", "parameters", "tensors"), [("down", 1_006_946_304, 867), ("plain", 998_555_648, 863)])
def test_public_size_and_names(golden, kind, parameters, tensors):
    with torch.device("meta"):
        model = MeissonicTransformer2DModel(**PUBLIC, downsample=KINDS[kind], upsample=KINDS[kind])
    state = model.state_dict()
    assert len(state) == tensors
    assert sum(value.numel() for value in state.values()) == parameters

    def layers(keys):
        return {re.sub(r"blocks\.\d+\.", "blocks.*.", key) for key in keys}

    assert layers(state) == layers(public_weights(golden, kind))
    shapes = {
        "embed.embeddings.weight": (8256, 1024),
        "cond_embed.linear_1.weight": (1024, 2304),
        "time_text_embed.timestep_embedder.linear_1.weight": (1024, 256),
        "transformer_blocks.13.ff_context.net.0.proj.weight": (4096, 1024),
        "single_transformer_blocks.27.proj_out.weight": (1024, 5120),
        "mlm_layer.conv2.weight": (8192, 1024, 1, 1),
    }
    if KINDS[kind]:
        shapes |= {f"{side}sample.conv.weight": (1024, 1024, 2, 2) for side in ("down_block.down", "up_block.up")}
    assert {key: tuple(state[key].shape) for key in shapes} == shapes


@kinds
@torch.no_grad()
def test_save_and_load(models, golden, kind, tmp_path):
    models[kind].save_pretrained(tmp_path)
    loaded, info = MeissonicTransformer2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert {**loaded.config, "_name_or_path": None} == {**models[kind].config, "_name_or_path": None}
    for key, value in models[kind].state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    torch.testing.assert_close(loaded.eval()(**arguments(golden)), models[kind](**arguments(golden)), atol=1e-5, rtol=0)


def test_files_with_other_tensors_are_refused(golden, tmp_path):
    # A model without resampling has no place for these layers, and one with more blocks needs more.
    write_checkpoint(tmp_path, golden, "down", downsample=False, upsample=False)
    with pytest.raises(ValueError, match=r"4 unexpected tensors for this config: \['down_block.downsample.conv.weight'"):
        MeissonicTransformer2DModel.from_pretrained(tmp_path, subfolder="transformer")
    write_checkpoint(tmp_path, golden, "plain", num_single_layers=3)
    with pytest.raises(ValueError, match=r"14 missing tensors for this config: \['single_transformer_blocks.2.attn"):
        MeissonicTransformer2DModel.from_pretrained(tmp_path, subfolder="transformer")


def test_unknown_settings_are_reported(golden, tmp_path, caplog, monkeypatch):
    # Whether diffusers' messages reach the root logger depends on its version.
    monkeypatch.setattr(logging.getLogger("diffusers"), "handlers", [caplog.handler])
    write_checkpoint(tmp_path, golden, "plain", later_setting=1)
    MeissonicTransformer2DModel.from_pretrained(tmp_path, subfolder="transformer")
    assert "{'later_setting': 1} were passed" in caplog.text


# Rows


@kinds
@torch.no_grad()
def test_where_gives_rows_of_all_logits(models, golden, kind):
    dense = models[kind](**arguments(golden))
    where = torch.rand(dense.shape[:2], generator=torch.Generator().manual_seed(0)) < 0.4
    for chosen in (where, torch.ones_like(where), torch.zeros_like(where)):
        rows = models[kind](**arguments(golden), where=chosen)
        torch.testing.assert_close(rows, dense[chosen], atol=1e-5, rtol=0)
    assert dense.shape == (2, 24, 20)


@kinds
@torch.no_grad()
def test_rows_of_a_batch_are_independent(models, golden, kind):
    inputs = arguments(golden) | {"timestep": golden["input.timestep_per_row"]}
    together = models[kind](**inputs)
    for row in range(2):
        alone = models[kind](**{name: value[row : row + 1] for name, value in inputs.items()})
        torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=0)


@torch.no_grad()
def test_one_timestep_stands_for_all_rows(models, golden):
    expected = models["plain"](**arguments(golden))
    for timestep in (7, 7.0, torch.tensor(7), torch.tensor([7, 7])):
        logits = models["plain"](**arguments(golden) | {"timestep": timestep})
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@kinds
@pytest.mark.parametrize("size", [(2, 2), (8, 6), (6, 16)])
@torch.no_grad()
def test_any_even_grid(models, golden, kind, size):
    logits = models[kind](**arguments(golden) | {"tokens": torch.randint(0, 24, (2, *size))})
    assert logits.shape == (2, size[0] * size[1], 20)


@torch.no_grad()
def test_odd_grid_without_downsampling(models, golden):
    assert models["plain"](**arguments(golden) | {"tokens": torch.zeros(2, 3, 5, dtype=torch.long)}).shape == (2, 15, 20)


# Precision


@kinds
@torch.no_grad()
def test_half_precision_stays_close(models, golden, kind, tmp_path):
    models[kind].save_pretrained(tmp_path)
    # A counter of 99 is 99000 inside, more than float16 holds.
    inputs = arguments(golden) | {"timestep": torch.tensor(99)}
    exact = models[kind](**inputs)
    for dtype, error in ((torch.bfloat16, 0.05), (torch.float16, 0.01)):
        model = MeissonicTransformer2DModel.from_pretrained(tmp_path, torch_dtype=dtype).eval()
        inputs |= {name: inputs[name].to(dtype) for name in ("encoder_hidden_states", "pooled_text_emb", "micro_conds")}
        logits = model(**inputs)
        assert logits.dtype == dtype
        assert (logits.float() - exact).abs().mean() < error


# Errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pooled_projection_dim": 768}, r"`pooled_projection_dim` must be .* = 8 x 128 = 1024, got 768\."),
        ({"axes_dims_rope": (16, 56)}, r"`axes_dims_rope` must sum up to `attention_head_dim` = 128, got \(16, 56\)\."),
        ({"guidance_embeds": True}, r"`guidance_embeds` must be False, got True\."),
        ({"downsample": True}, r"`upsample` must equal `downsample` = True, got False\."),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        MeissonicTransformer2DModel(**PUBLIC | settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": torch.zeros(2, 24)}, r"`tokens` must have the shape \(batch, height, width\), got \(2, 24\)\."),
        ({"tokens": torch.zeros(2, 4, 5)}, r"`tokens` must have an even height and width, .* got 4 x 5\."),
        ({"tokens": torch.zeros(3, 4, 6)}, r"`encoder_hidden_states` must have the shape \(3, 5, 12\), got \(2, 5, 12\)\."),
        ({"encoder_hidden_states": torch.zeros(2, 12)}, r"`encoder_hidden_states` must have 3 axes, got the shape \(2, 12\)\."),
        ({"pooled_text_emb": torch.zeros(2, 12)}, r"`pooled_text_emb` must have the shape \(2, 16\), got \(2, 12\)\."),
        ({"micro_conds": torch.zeros(2, 6)}, r"`micro_conds` must have the shape \(2, 5\), got \(2, 6\)\."),
        ({"timestep": torch.zeros(3)}, r"`timestep` must be one number or one per sample \(2\), got the shape \(3,\)\."),
        ({"where": torch.ones(2, 23, dtype=torch.bool)}, r"`where` must have the shape \(2, 24\), got \(2, 23\)\."),
        ({"where": torch.ones(2, 24)}, r"`where` must be of dtype torch.bool, got torch.float32\."),
    ],
)
def test_inputs_that_do_not_fit(models, golden, changes, message):
    with pytest.raises(ValueError, match=message):
        models["down"](**arguments(golden) | changes)


# The small repository for other tests


@kinds
@torch.no_grad()
def test_repository_of_the_public_layout(kind, tmp_path):
    folder = write_meissonic_repository(tmp_path / "repository", KINDS[kind])
    model = MeissonicTransformer2DModel.from_pretrained(folder, subfolder="transformer").eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    text_encoder = CLIPTextModelWithProjection.from_pretrained(folder, subfolder="text_encoder")
    VQModel.from_pretrained(folder, subfolder="vqvae")
    ids = tokenizer("two dogs", padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(ids, make_components()["tokenizer"]("two dogs", padding="max_length", return_tensors="pt").input_ids)
    text = text_encoder(ids, output_hidden_states=True)
    tokens = torch.full((1, GRID, GRID), VOCAB_SIZE - 1)
    logits = model(tokens, text.hidden_states[-2], text.text_embeds, torch.tensor([[8.0, 8, 0, 0, 6]]), 3)
    assert logits.shape == (1, GRID**2, CODEBOOK_SIZE)
    assert logits.std() > 0.1

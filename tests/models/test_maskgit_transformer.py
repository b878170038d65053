from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, init_empty_weights
from helpers.checkpoints_maskgit import maskgit_shapes, write_maskgit_checkpoint
from safetensors.torch import load_file

from diffusers_infogain.checkpoints.source import renamed
from diffusers_infogain.models.maskgit_transformer import (
    KEY_MAPPING,
    UNUSED_KEYS,
    MaskGITTransformer2DModel,
    check_tied_head,
    config_from_state_dict,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "maskgit_tiny.safetensors"
# hidden size, layers, heads, width of the feed-forward layers, tokens per side, millions of parameters
PUBLISHED = {
    "256_tiny": (384, 6, 6, 1024, 16, 23.0),
    "256_small": (512, 12, 6, 1536, 16, 69.3),
    "256_base": (768, 12, 12, 2048, 16, 142.2),
    "384_small": (512, 12, 6, 1536, 24, 69.5),
    "384_base": (768, 12, 12, 2048, 24, 142.5),
    "384_large": (1024, 24, 16, 2816, 24, 480.0),
}
TINY = {
    "sample_size": 3,
    "hidden_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 12,
    "codebook_size": 14,
    "vocab_size": 15,
    "num_classes": 7,
}


def shapes_of(state_dict: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in state_dict.items()}


def converted(state_dict: dict) -> dict:
    names = {key: renamed(key, KEY_MAPPING) for key in state_dict}
    return {names[key]: value for key, value in state_dict.items() if not re.match(UNUSED_KEYS, names[key])}


def load(state_dict: dict[str, torch.Tensor], num_attention_heads: int | None = None) -> MaskGITTransformer2DModel:
    model = MaskGITTransformer2DModel(**config_from_state_dict(shapes_of(state_dict), num_attention_heads)).eval()
    model.load_state_dict(converted(state_dict))
    return model


@pytest.fixture
def model() -> MaskGITTransformer2DModel:
    torch.manual_seed(0)
    model = MaskGITTransformer2DModel(**TINY).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn(parameter.shape))
    return model


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(15, (4, 9), generator=generator), torch.tensor([0, 3, 6, 7])


def test_logits_are_those_of_the_public_implementation():
    data = load_file(GOLDEN)
    state_dict = {key.removeprefix("model."): tensor for key, tensor in data.items() if key.startswith("model.")}
    model = load(state_dict, num_attention_heads=6)
    assert state_dict["transformer.layers.0.attn.wq.weight"].shape == (30, 32)  # heads of 5
    with torch.no_grad():
        logits = model(data["tokens"].flatten(1), data["class_labels"])
    # The public logits have a column for the mask.
    assert data["logits"].shape[-1] == logits.shape[-1] + 1 == model.config.vocab_size
    torch.testing.assert_close(logits, data["logits"][..., :-1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    hidden_size, layers, heads, intermediate_size, sample_size, millions = PUBLISHED[name]
    shapes = maskgit_shapes(hidden_size, layers, heads, intermediate_size, sample_size)
    config = config_from_state_dict({f"module._orig_mod.{key}": shape for key, shape in shapes.items()})
    assert config == {
        "sample_size": sample_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": intermediate_size,
        "codebook_size": 16384,
        "vocab_size": 16385,
        "num_classes": 1000,
        "num_registers": 1,
    }
    with init_empty_weights():
        model = MaskGITTransformer2DModel(**config)
    assert shapes_of(model.state_dict()) == converted(shapes)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == millions


def test_heads_of_small_are_85_wide():
    shapes = maskgit_shapes(512, 12, 6, 1536, 16)
    assert shapes["transformer.layers.0.attn.wq.weight"] == (510, 512)
    assert config_from_state_dict(shapes)["num_attention_heads"] == 6


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_published_files_load_safely(tmp_path, prefix):
    path = write_maskgit_checkpoint(tmp_path / "checkpoint", prefix=prefix)
    checkpoint = torch.load(path, weights_only=True)
    assert set(checkpoint) == {"iter", "global_epoch", "model_state_dict", "optimizer_state_dict"}
    check_tied_head(checkpoint["model_state_dict"])
    model = load(checkpoint["model_state_dict"])
    assert model.config.num_attention_heads == 6
    logits = model(torch.full((1, 16), 64), torch.tensor([1000]))
    assert logits.shape == (1, 16, 64)


def test_a_head_of_its_own_is_refused():
    state_dict = {"module.tok_emb.weight": torch.zeros(3, 2), "module.head.weight": torch.ones(3, 2)}
    with pytest.raises(ValueError, match=r"`head\.weight` must equal `tok_emb\.weight`"):
        check_tied_head(state_dict)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_models_come_back(model, inputs, tmp_path, dtype):
    model.to(dtype).save_pretrained(tmp_path)
    again = MaskGITTransformer2DModel.from_pretrained(tmp_path, torch_dtype=dtype)
    assert {key: value for key, value in again.config.items() if key[0] != "_"} == {**TINY, "num_registers": 1}
    assert again.dtype == dtype
    assert torch.equal(again(*inputs), model(*inputs))


def test_one_table_serves_both_ends(model, inputs, tmp_path):
    model.save_pretrained(tmp_path)
    again = MaskGITTransformer2DModel.from_pretrained(tmp_path)
    again.tok_emb.weight.data[2] += 1
    tokens = torch.full_like(inputs[0], 4)  # so that the change comes in by the way out alone
    changed = (again(tokens, inputs[1]) != model(tokens, inputs[1])).flatten(0, 1).any(0)
    assert changed.nonzero().flatten().tolist() == [2]


def test_where_gives_the_dense_rows(model, inputs):
    dense = model(*inputs)
    where = torch.rand(dense.shape[:2], generator=torch.Generator().manual_seed(3)) < 0.4
    assert where.any(1).all()
    torch.testing.assert_close(model(*inputs, where=where), dense[where], atol=1e-4, rtol=0)
    assert model(*inputs, where=torch.zeros_like(where)).shape == (0, 14)


def test_samples_do_not_depend_on_their_batch(model, inputs):
    tokens, labels = inputs
    alone = torch.cat([model(tokens[b : b + 1], labels[b : b + 1]) for b in range(len(tokens))])
    torch.testing.assert_close(model(tokens, labels), alone, atol=1e-4, rtol=0)


def test_every_token_and_the_class_matter_everywhere(model, inputs):
    tokens, labels = inputs
    logits = model(tokens, labels)
    other = tokens.clone()
    other[:, 4] = (other[:, 4] + 1) % 15
    assert (model(other, labels) - logits).abs().amax(-1).min() > 1e-4
    assert (model(tokens, labels.roll(1)) - logits).abs().amax(-1).min() > 1e-4


def test_runs_in_bfloat16(model, inputs):
    expected = model(*inputs)
    logits = model.to(torch.bfloat16)(*inputs)
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).abs().mean() < 0.05 * expected.std()


def test_compiles_in_one_graph(model, inputs):
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), model(*inputs), atol=1e-4, rtol=0)


def test_weights_may_stay_elsewhere_until_a_module_runs(model, inputs):
    expected = model(*inputs)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.tok_emb.weight.is_meta
    assert torch.equal(model(*inputs), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(2, 16, dtype=torch.long)}, r"`tokens` must have the shape \(batch, 9\), got \(2, 16\)"),
        ({"tokens": torch.zeros(2, 3, 3, dtype=torch.long)}, r"`tokens` must have the shape \(batch, 9\), got \(2, 3, 3\)"),
        ({"tokens": torch.full((2, 9), 15)}, r"`tokens` must be in \[0, 14\], got 15"),
        ({"tokens": torch.full((2, 9), -1)}, r"`tokens` must be in \[0, 14\], got -1"),
        ({"class_labels": torch.tensor([1])}, r"`class_labels` must have the shape \(2,\), got \(1,\)"),
        ({"class_labels": torch.tensor([1, 8])}, r"`class_labels` must be in \[0, 7\] \(7 for no class\), got 8"),
        ({"class_labels": torch.tensor([-1, 0])}, r"`class_labels` must be in \[0, 7\] \(7 for no class\), got -1"),
        ({"where": torch.ones(2, 9)}, r"`where` must be bool of shape \(2, 9\), got torch.float32 \(2, 9\)"),
        ({"where": torch.ones(9, dtype=torch.bool)}, r"`where` must be bool of shape \(2, 9\), got torch.bool \(9,\)"),
    ],
)
def test_unfit_inputs_are_named(model, change, message):
    fit = {"tokens": torch.zeros(2, 9, dtype=torch.long), "class_labels": torch.tensor([0, 7])}
    with pytest.raises(ValueError, match=message):
        model(**{**fit, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 21}, r"`num_attention_heads` must be in \[1, `hidden_size` = 20\], got 21"),
        ({"num_attention_heads": 0}, r"`num_attention_heads` must be in \[1, `hidden_size` = 20\], got 0"),
        ({"vocab_size": 14}, r"`vocab_size` must be above `codebook_size` = 14, got 14"),
    ],
)
def test_unfit_sizes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        MaskGITTransformer2DModel(**{**TINY, **change})


def test_unknown_checkpoints_are_refused():
    shapes = maskgit_shapes(32, 2, 6, 64, 4, 40, 10)
    with pytest.raises(ValueError, match=r"`num_attention_heads` must be given for the hidden size 32: .* 384, 512, 768"):
        config_from_state_dict(shapes)
    with pytest.raises(ValueError, match=r"`num_attention_heads` = 4 makes heads of 8, but `attn\.wq\.weight` has 30 rows"):
        config_from_state_dict(shapes, num_attention_heads=4)
    with pytest.raises(ValueError, match=r"`pos_emb\.weight` must have a square number of rows, got 15"):
        config_from_state_dict({**shapes, "pos_emb.weight": (15, 32)}, num_attention_heads=6)
    with pytest.raises(ValueError, match=r"there is no cls_emb\.weight, reg_tokens\.weight"):
        config_from_state_dict({key: shape for key, shape in shapes.items() if key[:3] not in ("cls", "reg")})

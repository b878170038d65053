"""What diffusers' users expect of any model class, of each of our own: formats, precisions, compiling, offloading, training."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator

import pytest
import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import compute_module_sizes

from diffusers_infogain.models.llada import BidirectionalLlama, llama_config
from diffusers_infogain.models.magvit_v2 import MagvitV2Model
from diffusers_infogain.models.maskgit_transformer import MaskGITTransformer2DModel
from diffusers_infogain.models.meissonic_transformer import MeissonicTransformer2DModel

LLADA = {
    "model_type": "llada",
    **{"block_type": "llama", "activation_type": "silu", "layer_norm_type": "rms", "rope": True, "alibi": False},
    **{"attention_layer_norm": False, "input_emb_norm": False, "include_bias": False, "include_qkv_bias": False},
    **{"bias_for_layer_norm": False, "scale_logits": False, "weight_tying": False, "vocab_size": 30, "mask_token_id": 29},
    **{"d_model": 16, "n_heads": 2, "n_layers": 2, "mlp_hidden_size": 24},
}


def maskgit() -> MaskGITTransformer2DModel:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return MaskGITTransformer2DModel(sample_size=4, **sizes, codebook_size=20, vocab_size=21, num_classes=5)


def meissonic(resampled: bool) -> MeissonicTransformer2DModel:
    heads = {"attention_head_dim": 8, "num_attention_heads": 2, "axes_dims_rope": (2, 2, 4)}
    sizes = {"num_layers": 1, "num_single_layers": 2, "joint_attention_dim": 12, "pooled_projection_dim": 16}
    return MeissonicTransformer2DModel(
        **heads, **sizes, vocab_size=24, codebook_size=20, downsample=resampled, upsample=resampled
    )


def magvit() -> MagvitV2Model:
    levels = {
        f"{part}_{what}": value
        for part in ("encoder", "decoder")
        for what, value in (("multipliers", (1, 2)), ("blocks", (1, 1)))
    }
    return MagvitV2Model(channels=4, **levels, bits=6, norm_groups=2)


MODELS = {
    "maskgit": maskgit,
    "meissonic": lambda: meissonic(True),
    "monetico": lambda: meissonic(False),
    "magvit": magvit,
    "llada": lambda: BidirectionalLlama(llama_config(LLADA)),
}
OURS = [name for name in MODELS if name != "llada"]  # the others' base class is transformers'
every = pytest.mark.parametrize("name", MODELS)
ours = pytest.mark.parametrize("name", OURS)


def make(name: str, seed: int = 0) -> torch.nn.Module:
    """A model in which no parameter is what it is initialised to, so that all of them matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODELS[name]().eval()
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def inputs(name: str, dtype: torch.dtype = torch.float32) -> dict:
    generator = torch.Generator().manual_seed(1)

    def number(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)

    if name == "maskgit":
        return {"tokens": torch.randint(21, (2, 16), generator=generator), "class_labels": torch.tensor([1, 5])}
    if name == "magvit":
        return {"images": number(2, 3, 6, 8).clamp(-1, 1)}
    if name == "llada":
        return {"input_ids": torch.randint(30, (2, 7), generator=generator)}
    return {
        "tokens": torch.randint(24, (2, 4, 6), generator=generator),
        "encoder_hidden_states": number(2, 5, 12),
        "pooled_text_emb": number(2, 16),
        "micro_conds": torch.tensor([[512, 512, 0, 0, 6]] * 2, dtype=dtype),
        "timestep": torch.tensor([7, 63]),
    }


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def parameter_dtypes(model: torch.nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters()}


# Formats


@every
@torch.no_grad()
def test_saved_and_loaded_again(name, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())
    torch.testing.assert_close(loaded(**inputs(name)), model(**inputs(name)), atol=1e-5, rtol=1e-5)


@ours
def test_the_configuration_makes_the_same_model(name, tmp_path):
    model = make(name)
    model.save_config(tmp_path)
    for again in (type(model).from_config(model.config), type(model).from_config(type(model).load_config(tmp_path))):
        assert {key: value.shape for key, value in again.state_dict().items()} == {
            key: value.shape for key, value in model.state_dict().items()
        }
        assert settings(again) == settings(model)


def settings(model: torch.nn.Module) -> dict:
    return {key: value for key, value in json.loads(model.to_json_string()).items() if not key.startswith("_")}


@every
@torch.no_grad()
def test_a_half_precision_variant(name, tmp_path):
    model = make(name).to(torch.float16)
    model.save_pretrained(tmp_path, variant="fp16")
    assert all(".fp16." in path.name for path in tmp_path.glob("*.safetensors"))
    loaded = type(model).from_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
    # MAGVIT-v2 is taken in float32, whatever is asked for.
    assert parameter_dtypes(loaded) == {torch.float32 if name == "magvit" else torch.float16}
    assert all(torch.equal(loaded.state_dict()[key].to(value), value) for key, value in model.state_dict().items())


# Precision


@every
@torch.no_grad()
def test_in_double_precision_the_figures_are_those_of_single_precision(name):
    model, wide = make(name), make(name).to(torch.float64)
    output = wide(**inputs(name, torch.float64))
    assert output.dtype == torch.float64
    torch.testing.assert_close(output.float(), model(**inputs(name)), atol=1e-4, rtol=1e-4)


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_another_default_dtype_changes_no_figure(name, dtype, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path)
    expected = model(**inputs(name))
    with default_dtype(dtype):
        found = model(**inputs(name))
        loaded = type(model).from_pretrained(tmp_path, dtype=torch.float32).eval()
        assert parameter_dtypes(loaded) == {torch.float32}
        after_loading = loaded(**inputs(name))
        assert parameter_dtypes(MODELS[name]()) == {dtype}
        made = MODELS[name]()(**inputs(name, dtype))
    assert found.dtype == after_loading.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after_loading, expected, atol=1e-5, rtol=1e-5)
    assert made.dtype == dtype


@ours
@torch.no_grad()
def test_layerwise_casting_stores_weights_in_few_bits(name):
    model = make(name)
    expected = model(**inputs(name))
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    # All of MAGVIT-v2 is among the layers that keep their precision.
    assert (torch.float8_e4m3fn in parameter_dtypes(model)) == (name != "magvit")
    output = model(**inputs(name))
    assert output.dtype == torch.float32
    assert output.isfinite().all()
    assert (output - expected).abs().mean() < 0.5 * expected.std()


# Compiling


@every
@torch.no_grad()
def test_compiles_as_one_graph(name):
    model = make(name)
    expected = model(**inputs(name))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs(name)), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_encoding_and_decoding_compile_as_one_graph():
    model = make("magvit")
    images = inputs("magvit")["images"]
    torch._dynamo.reset()
    codes = torch.compile(model.encode, backend="eager", fullgraph=True)(images)
    assert torch.equal(codes, model.encode(images))
    pixels = torch.compile(model.decode, backend="eager", fullgraph=True)(codes)
    torch.testing.assert_close(pixels, model.decode(codes), atol=1e-5, rtol=1e-5)


# Devices


@every
@torch.no_grad()
def test_parts_may_lie_on_disk(name, tmp_path):
    model = make(name)
    expected = model(**inputs(name))
    size = compute_module_sizes(model)[""]
    parts = infer_auto_device_map(model, {"cpu": int(0.6 * size)}, no_split_module_classes=list(model._no_split_modules))
    assert {"cpu", "disk"} <= set(parts.values())
    model = dispatch_model(copy.deepcopy(model), parts, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    torch.testing.assert_close(model(**inputs(name)), expected, atol=1e-5, rtol=1e-5)


@ours
@torch.no_grad()
def test_loaded_in_pieces_onto_a_device(name, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = type(model).from_pretrained(tmp_path, device_map={"": "cpu"}).eval()
    torch.testing.assert_close(loaded(**inputs(name)), model(**inputs(name)), atol=1e-5, rtol=1e-5)


# Training


def gradients(model: torch.nn.Module, name: str) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    output = model(**inputs(name))
    (output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum().backward()
    return {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}


@every
def test_every_parameter_is_trained(name):
    model = make(name)
    found = gradients(model, name)
    # The signs of MAGVIT-v2's encoder have no gradient.
    expected = {key for key, _ in model.named_parameters() if not (name == "magvit" and key.startswith("encoder."))}
    assert found.keys() == expected


@pytest.mark.parametrize("name", ["maskgit", "meissonic", "monetico"])
def test_gradient_checkpointing_changes_no_gradient(name):
    model = make(name)
    expected = gradients(model, name)
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    blocks = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    calls = []
    for block in blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    found = gradients(model, name)
    assert len(calls) == 2 * len(blocks)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-4, rtol=1e-4)

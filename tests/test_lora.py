"""LoRA layers of every family: loaded, weighted, fused, unloaded, saved; in peft's format, with published and with own names."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.families import TEXT, WRITERS, decode, first_logits, load_family, network, write_published
from transformers import PreTrainedModel

peft = pytest.importorskip("peft")
FAST = ("meissonic", "llada")
every = pytest.mark.parametrize(
    "family",
    [
        name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
        for name in WRITERS
        if name not in ("maskgit", "titok", "maskgen", "bert")
    ],
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, written = tmp_path_factory.mktemp("published"), {}

    def folder(family):
        if family not in written:
            written[family] = write_published(root, family)
        return written[family]

    return folder


def trained(model: torch.nn.Module, seed: int = 0, **settings) -> tuple[dict[str, torch.Tensor], peft.LoraConfig]:
    """LoRA layers as a training leaves them, and their configuration; the model stays as it was."""
    experts = any(name.endswith("experts") for name, _ in model.named_modules())  # which are no layers of their own
    names = ["q_proj", "o_proj" if experts else "down_proj"] if isinstance(model, PreTrainedModel) else ["to_q", "to_out.0"]
    names += ["dense"] if any("dense" in name for name, _ in model.named_modules()) else []
    own = copy.deepcopy(model)
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=names, init_lora_weights=False, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, own, adapter_name="default")
    return {key: value.clone() for key, value in peft.get_peft_model_state_dict(own, adapter_name="default").items()}, config


def save(pipe, folder, layers, config):
    if isinstance(network(pipe), PreTrainedModel):
        type(pipe).save_lora_weights(folder, layers, config)
    else:
        type(pipe).save_lora_weights(folder, transformer_lora_layers=layers, transformer_lora_adapter_metadata=config.to_dict())


def merged(pipe, *trained_layers) -> torch.Tensor:
    """The first logits with weights plus alpha / r · B A, by hand."""
    own = copy.deepcopy(network(pipe))
    for layers, factor in trained_layers:
        for key in layers:
            if ".lora_A." in key:
                name = key.partition(".lora_A.")[0]
                change = layers[key.replace("lora_A", "lora_B")] @ layers[key]
                own.get_submodule(name).weight.data += factor * change
    plain = network(pipe)
    setattr(pipe, pipe.compiled_component, own)
    try:
        return first_logits(pipe)
    finally:
        setattr(pipe, pipe.compiled_component, plain)


@every
def test_layers_are_loaded_weighted_fused_and_unloaded(family, folders, tmp_path):
    pipe = load_family(family, folders(family))
    plain = first_logits(pipe)
    (first, config), (second, _) = trained(network(pipe), 0), trained(network(pipe), 1)
    expected = {
        "first": merged(pipe, (first, 3.0)),
        "both": merged(pipe, (first, 1.5), (second, 0.75)),
        "second": merged(pipe, (second, 3.0)),
    }
    save(pipe, tmp_path / "first", first, config)
    save(pipe, tmp_path / "second", second, config)
    close = {"atol": 2e-3, "rtol": 1e-3}
    pipe.load_lora_weights(tmp_path / "first", adapter_name="first")
    torch.testing.assert_close(first_logits(pipe), expected["first"], **close)
    assert not torch.allclose(expected["first"], plain, atol=0.05)
    pipe.load_lora_weights(tmp_path / "second", adapter_name="second")
    pipe.set_adapters(["first", "second"], [0.5, 0.25])
    torch.testing.assert_close(first_logits(pipe), expected["both"], **close)
    assert pipe.get_list_adapters() == {pipe.compiled_component: ["first", "second"]}
    pipe.fuse_lora()
    torch.testing.assert_close(first_logits(pipe), expected["both"], **close)
    pipe.unfuse_lora()
    pipe.set_adapters("second")
    torch.testing.assert_close(first_logits(pipe), expected["second"], **close)
    decode(pipe)
    pipe.disable_lora()
    torch.testing.assert_close(first_logits(pipe), plain, **close)
    pipe.enable_lora()
    pipe.delete_adapters("first")
    pipe.unload_lora_weights()
    torch.testing.assert_close(first_logits(pipe), plain, **close)
    assert not any("lora" in name for name, _ in network(pipe).named_parameters())


@pytest.mark.parametrize("family", ["llada", pytest.param("mmada", marks=pytest.mark.slow)])
def test_layers_with_the_names_of_the_published_code(family, folders):
    pipe = load_family(family, folders(family))
    layers, _ = trained(network(pipe))
    names = {"self_attn.q_proj": "q_proj", "mlp.down_proj": "ff_out"}
    published = {}
    for key, value in layers.items():
        for own, other in names.items():
            key = key.replace(own, other)
        published["base_model.model." + key.replace("model.layers.", "model.transformer.blocks.")] = value
    pipe.load_lora_weights(published, lora_alpha=6)
    found = first_logits(pipe)
    pipe.unload_lora_weights()
    torch.testing.assert_close(found, merged(pipe, (layers, 3.0)), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("family", ["llada", *(pytest.param(name, marks=pytest.mark.slow) for name in TEXT[1:3])])
def test_peft_reads_what_is_saved_and_the_other_way_round(family, folders, tmp_path):
    pipe = load_family(family, folders(family))
    layers, config = trained(network(pipe), use_rslora=True)
    save(pipe, tmp_path / "ours", layers, config)
    pipe.load_lora_weights(tmp_path / "ours", adapter_name="ours")
    expected = first_logits(pipe)
    pipe.unload_lora_weights()
    wrapped = peft.PeftModel.from_pretrained(load_family(family, folders(family)).model, tmp_path / "ours")
    wrapped.save_pretrained(tmp_path / "theirs")
    pipe.load_lora_weights(tmp_path / "theirs")
    torch.testing.assert_close(first_logits(pipe), expected, atol=1e-4, rtol=1e-4)


def test_layers_of_other_models_are_refused(folders, tmp_path):
    pipe = load_family("llada", folders("llada"))
    layers, _ = trained(pipe.model)
    key = next(iter(layers))
    for given, text in (
        ({}, r"must hold LoRA layers, got no tensor"),
        (
            {"unet.down.lora_A.weight": torch.zeros(2, 4)},
            r"`model` has no layer 'unet.down': these LoRA layers belong to another",
        ),
        (
            {key: torch.zeros(2, 3)},
            rf"The LoRA layer '{key}' must have the size 16 along dimension 1 .*, got a shape of \(2, 3\)",
        ),
        ({"model.norm.bias": torch.zeros(2)}, r"must hold LoRA layers \(lora_A, lora_B\) only, got 'model.norm.bias'"),
    ):
        with pytest.raises(ValueError, match=text):
            pipe.load_lora_weights(given)
    with pytest.raises(TypeError, match="unexpected keyword argument 'scale'"):
        pipe.load_lora_weights(layers, scale=1)
    with pytest.raises(ValueError, match=r"must hold LoRA layers in adapter_model.safetensors or pytorch_lora"):
        pipe.load_lora_weights(tmp_path)
    pipe.load_lora_weights(layers, adapter_name="style")
    with pytest.raises(ValueError, match="`adapter_name` must be a new name, got 'style'"):
        pipe.load_lora_weights(layers, adapter_name="style")
    save(pipe, tmp_path / "dora", layers, peft.LoraConfig(use_dora=True))
    with pytest.raises(ValueError, match=r"adapter_config.json must be that of plain LoRA layers, got `use_dora`"):
        pipe.load_lora_weights(tmp_path / "dora")

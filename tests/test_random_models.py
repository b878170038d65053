"""Pipelines with random weights in the shapes of published models."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from diffusers_infogain import random_models
from diffusers_infogain.model_sizes import MODEL_SIZES
from diffusers_infogain.random_models import random_inputs, random_pipeline

NANO = [name for name in MODEL_SIZES if name.endswith("nano")]
MILLIONS = {
    "amused-256": 603.5,
    "amused-512": 608.3,
    "meissonic": 1006.9,
    "maskgit-256-tiny": 23.0,
    "maskgit-256-small": 69.3,
    "maskgit-256-base": 142.2,
    "maskgit-384-large": 480.0,
    "titok-l32": 177.2,
    "maskgen-l": 604.3,
    "maskgen-xl": 1176.6,
    "titok-s128": 295.0,
    "llada-8b": 8015.6,
    "dream-7b": 7615.6,
    "sdar-8b": 8190.7,
    "bert-base": 109.5,
}
"""Parameters of the published models, in millions, as their public code makes them."""


def generate(name: str, **options: object):
    pipe = random_pipeline(name, **options)
    call = {"max_new_tokens": 6} if MODEL_SIZES[name].of_text else {"output_type": "latent", "num_inference_steps": 2}
    if name == "meissonic-nano":
        call |= {"height": 128, "width": 128}
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    return pipe, pipe(**random_inputs(pipe, 2, prompt_length=3), generator=generators, **call)


@pytest.mark.parametrize("name", NANO)
def test_every_family_generates(name):
    before = torch.get_rng_state()
    pipe, output = generate(name, dtype=torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_default_dtype() == torch.float32
    network = pipe.model if MODEL_SIZES[name].of_text else pipe.transformer
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
    mask = pipe.scheduler.config.mask_token_id
    tokens = output.sequences[:, -6:] if MODEL_SIZES[name].of_text else output.images
    assert len(tokens) == 2
    assert (tokens != mask).all()
    again = generate(name, dtype=torch.bfloat16)[1]
    assert torch.equal(
        again.sequences if MODEL_SIZES[name].of_text else again.images, output[1] if MODEL_SIZES[name].of_text else output.images
    )


@pytest.mark.parametrize("name", MILLIONS)
def test_shapes_are_those_of_the_published_models(name):
    with torch.device("meta"):
        network = random_models.build_network(MODEL_SIZES[name])
    count = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert count == pytest.approx(MILLIONS[name], abs=0.06)


@pytest.mark.parametrize("name", [*NANO, "modernbert-base"])
def test_sharpness_is_a_factor_on_the_logits(name):
    recorded = []
    for sharpness in (1.0, 3.0):
        size = MODEL_SIZES[name]
        if name not in NANO:
            size = replace(size, config={**size.config, **MODEL_SIZES["bert-nano"].config})
        with random_models._random_weights(torch.device("cpu"), torch.float32, 0):
            network = random_models.build_network(size).eval()
        for parameter in network.parameters():  # none of them 0, so that each counts
            parameter.data += 0.01
        random_models._sharpen(network, size.family, sharpness)
        recorded.append(logits(network, size.family))
    torch.testing.assert_close(recorded[1], 3 * recorded[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def logits(network, family: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(20, (1, 16), generator=generator)
    embeddings = {
        "encoder_hidden_states": torch.randn(1, 5, 16, generator=generator),
        "pooled_text_emb": torch.randn(1, 16, generator=generator),
        "micro_conds": torch.ones(1, 5),
    }
    if family == "amused":
        return network(tokens.view(1, 4, 4), **embeddings)
    if family == "meissonic":
        return network(tokens.view(1, 4, 4), timestep=torch.zeros(1), **embeddings)
    if family in ("maskgit", "titok_bert", "titok_uvit"):
        return network(tokens, torch.tensor([3]))
    if family == "maskgen":
        return network(tokens, embeddings["encoder_hidden_states"], embeddings["pooled_text_emb"], torch.ones(1))
    output = network(tokens)
    return output if isinstance(output, torch.Tensor) else output.logits


def test_configurations_can_be_changed():
    pipe = random_pipeline(
        "bert-base", changes={"num_hidden_layers": 1, "hidden_size": 24, "vocab_size": 50, "intermediate_size": 8}
    )
    assert pipe.model.config.num_hidden_layers == 1
    assert pipe.model.get_input_embeddings().weight.shape == (50, 24)
    assert pipe.family.mask_token_id == 49


def refused(message: str):
    return pytest.raises(ValueError, match=f"^{re.escape(message)}")


def test_errors_are_a_sentence():
    with refused("The random model must be one of amused-256, amused-512"):
        random_pipeline("amused")
    with refused("A field of the configuration of amused-nano must be one of hidden_size, use_bias,"):
        random_pipeline("amused-nano", changes={"layers": 3})
    with refused("`hidden_size` of sdar-nano must be of the type int, got 'wide'."):
        random_pipeline("sdar-nano", changes={"hidden_size": "wide"})
    with refused("The configuration of meissonic-nano: `axes_dims_rope` must sum up to `attention_head_dim` = 9"):
        random_pipeline("meissonic-nano", changes={"attention_head_dim": 9, "pooled_projection_dim": 18})
    with refused("`sharpness` must be"):
        random_pipeline("amused-nano", sharpness=-1)


def test_a_model_that_does_not_fit_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr(random_models, "_free_memory", lambda device: 10**9)
    with refused("llada-8b takes 16.0 GB of memory in bfloat16, but the device cpu has 1.0 GB free"):
        random_pipeline("llada-8b", dtype=torch.bfloat16)

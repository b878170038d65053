"""MMaDA: its logits, its layout, its guidance, and the memory that decoding takes."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from helpers.checkpoints import MMADA_CONFIG, MMADA_TINY, make_magvit, make_mmada_pipeline, make_word_tokenizer
from helpers.memory import LargestTensors
from helpers.sampling import generators, make_scheduler
from safetensors.torch import load_file
from transformers import LlamaConfig

from diffusers_infogain import InfoGainMMaDAPipeline, InfoGainScheduler
from diffusers_infogain.checkpoints.source import renamed
from diffusers_infogain.models.llada import KEY_MAPPING, BidirectionalLlama, llama_config

GOLDEN = Path(__file__).parent / "golden"
CODES, MASK, OFFSET = 32, 32, 50
PROMPTS = ["a red cat on the mat", "two dogs", "fog"]


@pytest.fixture
def pipe() -> InfoGainMMaDAPipeline:
    return make_mmada_pipeline()


def golden_model() -> BidirectionalLlama:
    tensors = load_file(GOLDEN / "mmada_tiny.safetensors")
    model = BidirectionalLlama(llama_config(json.loads((GOLDEN / "mmada_tiny.json").read_text()))).eval()
    weights = {renamed(key, KEY_MAPPING): value for key, value in tensors.items() if key.startswith("model.")}
    model.load_state_dict(weights, strict=True)
    return model


def golden_pipe() -> InfoGainMMaDAPipeline:
    tiny = make_mmada_pipeline()
    scheduler = InfoGainScheduler(mask_token_id=CODES)
    return InfoGainMMaDAPipeline(
        tiny.vqvae, make_word_tokenizer(50, 41, 42), golden_model(), scheduler, **MMADA_TINY, sample_size=4
    )


# Against the figures of MMaDA's own implementation


@torch.no_grad()
def test_logits_are_those_of_the_public_implementation():
    model, stored = golden_model(), load_file(GOLDEN / "mmada_tiny.safetensors")
    ids, mask = stored["plain.input_ids"], stored["plain.attention_mask"].bool()
    torch.testing.assert_close(model(ids, mask)[mask], stored["plain.logits_key_mask"][mask], atol=1e-4, rtol=0)
    torch.testing.assert_close(model(ids), stored["plain.logits_no_mask"], atol=1e-4, rtol=0)
    where = mask & (ids % 2 == 0)
    torch.testing.assert_close(
        model(ids, mask, where=where, token_range=(50, 82)), stored["plain.logits_key_mask"][where][:, 50:82], atol=1e-4, rtol=0
    )


@torch.no_grad()
@pytest.mark.parametrize("name", ["image_ig_p2_s4_b1_g0", "image_ig_p2_s4_b2_g3.5"])
def test_guided_decisions_are_those_of_the_public_implementation(name):
    pipe = golden_pipe()
    stored, info = load_file(GOLDEN / f"{name}.safetensors"), json.loads((GOLDEN / f"{name}.json").read_text())
    steps, batch, g = (info["settings"][key] for key in ("timesteps", "batch", "guidance_scale"))
    scheduler = make_scheduler(MASK, steps, gain_reduction="mean")
    nothing = torch.tensor([[43, 41, 42]])

    def guided(rows: torch.Tensor) -> torch.Tensor:
        """(R, 16, 32) at masked positions, 0 elsewhere."""
        ids = rows[:, 10:26]
        tokens = torch.where(ids == 47, MASK, ids - OFFSET)
        masked = tokens == MASK
        kept = rows[:, :9] != 40
        logits = pipe.predict(tokens, rows[:, :9], kept)
        if g > 0:
            uncond = pipe.predict(tokens, nothing.expand(len(rows), -1), torch.ones(len(rows), 3, dtype=torch.bool))
            logits = (1 + g) * logits - g * uncond
        full = torch.zeros(*tokens.shape, CODES)
        full[masked] = logits
        return full

    decisions = 0
    for b in range(batch):
        for index in range(steps):
            prefix = f"step{index:02}.b{b}."
            best = info["best"][index * batch + b]
            if best is None:
                continue
            x, candidates = stored[prefix + "x"], stored[prefix + "x_batch"]
            codes = torch.where(x[:, 10:26] == 47, MASK, x[:, 10:26] - OFFSET)
            logits, masked = guided(x), codes == MASK
            torch.testing.assert_close(
                logits[masked], stored[prefix + "logits_image"].view(1, 16, -1)[masked], atol=1e-4, rtol=1e-4
            )
            after = torch.where(candidates[:, 10:26] == 47, MASK, candidates[:, 10:26] - OFFSET)
            proposal = scheduler.propose(logits, steps - 1 - index, codes, generator=generators(0))
            proposal.candidates, proposal.selected = after[None], (after != codes)[None]
            proposal.cost = torch.where(proposal.selected, proposal.entropies[:, None], 0.0).sum(-1)
            proposal.duplicate_of, proposal.needs_lookahead = torch.arange(len(after))[None], True
            output = scheduler.select(guided(candidates)[None], steps - 1 - index, proposal)
            uncertainty = proposal.entropies.sum(-1, keepdim=True) / masked.sum()
            torch.testing.assert_close(output.cost[0], stored[prefix + "C"], atol=1e-4, rtol=0)
            torch.testing.assert_close((uncertainty - output.gain)[0], stored[prefix + "H_next"], atol=1e-4, rtol=0)
            torch.testing.assert_close((output.objective - uncertainty)[0], stored[prefix + "J"], atol=1e-4, rtol=0)
            assert output.winner.item() == best
            decisions += 1
    assert decisions == (steps - 1) * batch


# The network and the layout


def test_the_published_size_has_the_published_tensors():
    names = {"d_model": 4096, "n_heads": 32, "n_kv_heads": 32, "n_layers": 32, "mlp_hidden_size": 12288}
    with torch.device("meta"):
        model = BidirectionalLlama(llama_config({**MMADA_CONFIG, **names}))
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert len(shapes) == 2 + 32 * 9 + 1
    assert shapes["lm_head.weight"] == shapes["model.embed_tokens.weight"] == (134656, 4096)
    assert shapes["model.layers.31.mlp.gate_proj.weight"] == (12288, 4096)
    layer = 4 * 4096**2 + 3 * 4096 * 12288 + 2 * 4096
    assert sum(value.numel() for value in model.parameters()) == 2 * 134656 * 4096 + 32 * layer + 4096


def test_attention_is_bidirectional_in_every_attention_implementation(pipe):
    tokens = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
    later = tokens.clone()
    later[:, -1] = (later[:, -1] + 1) % 50
    expected = pipe.transformer(tokens)
    assert not torch.allclose(expected[:, 0], pipe.transformer(later)[:, 0])
    pipe.transformer.set_attn_implementation("eager")
    torch.testing.assert_close(pipe.transformer(tokens), expected, atol=1e-4, rtol=1e-4)


def test_a_prompt_is_laid_out_as_published(pipe):
    ids, mask = pipe.encode_prompt(["two dogs", "a red cat", ""])
    assert ids.tolist() == [[40, 43, 41, 6, 7, 42], [43, 41, 0, 1, 2, 42], [40, 40, 40, 43, 41, 42]]
    assert mask.tolist() == [[id != 40 for id in row] for row in ids.tolist()]


def test_a_long_prompt_is_cut_with_its_end_kept_and_a_warning(pipe, caplog):
    logging.getLogger("diffusers").propagate = True
    ids, _ = pipe.encode_prompt(["cat " * 20])
    assert ids.tolist() == [[43, 41, *[2] * 9, 42]]
    assert "A prompt of 23 tokens was cut to the 12 that MMaDA takes" in caplog.text


def test_the_prompts_padding_is_dropped_where_no_row_needs_more(pipe):
    lengths = []
    pipe.transformer.model.register_forward_pre_hook(lambda m, a, k: lengths.append(k["input_ids"].shape[1]), with_kwargs=True)
    pipe(PROMPTS[1:], generator=generators(0, 1), num_inference_steps=1, output_type="latent")
    assert lengths == [5 + 18, 3 + 18]


# Decoding


def test_pixels_are_those_of_the_image_tokenizer(pipe):
    call = {"num_inference_steps": 2, "height": 8, "width": 12}
    images = pipe("fog", output_type="pt", generator=generators(0), **call).images
    tokens = pipe("fog", output_type="latent", generator=generators(0), **call).images
    pixels = (pipe.vqvae.decode(tokens) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(images, pixels.detach())


@pytest.mark.slow
def test_memory_of_a_decision_at_the_width_of_8b():
    """One layer as wide as MMaDA-8B's, 1024 image tokens, 8 candidates, guidance: a few minutes and 12 GB."""
    tiny, size = make_mmada_pipeline(), {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32}
    config = LlamaConfig(
        vocab_size=134656,
        num_hidden_layers=1,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        mask_token_id=126336,
        **size,
    )
    with init_empty_weights(include_buffers=False):
        transformer = BidirectionalLlama(config)
    for name, parameter in list(transformer.named_parameters()):
        value = torch.ones if parameter.ndim == 1 else (lambda *shape, **kind: torch.empty(*shape, **kind).uniform_(-0.02, 0.02))
        transformer.load_state_dict({name: value(*parameter.shape, dtype=torch.bfloat16)}, strict=False, assign=True)
    pipe = InfoGainMMaDAPipeline(
        make_magvit(),
        tiny.tokenizer,
        transformer.eval(),
        InfoGainScheduler(mask_token_id=8192, num_candidates=8, entropy_bound=0),
        image_token_offset=126349,
        **MMADA_TINY,
    )
    latents = torch.full((1, 32, 32), 8192)
    latents[0, 4:] = 5  # 128 masks left: a decision in the middle of an image
    with LargestTensors(pipe.transformer) as largest:
        pipe("a cat", latents=latents, num_inference_steps=2, guidance_scale=3.5, output_type="latent")
    candidates, masks, sequence = 8, 128, 5 + 1024 + 2
    print(f"{4 * largest.elements[8192]} bytes; over the full vocabulary: {4 * 2 * candidates * sequence * 134656} bytes")
    assert largest.elements[8192] <= 2 * candidates * masks * 8192
    assert 134656 not in largest.elements


# Errors


def test_a_sequence_that_is_too_long_is_refused(pipe):
    with pytest.raises(
        ValueError, match="need 128 image tokens, which make a sequence of 135 with the prompt; the model takes 100"
    ):
        pipe("a cat", height=32, width=16)


def test_parts_of_different_models_are_refused(pipe):
    with pytest.raises(
        ValueError, match="`image_token_offset` 60 and the 32 codes of `vqvae` do not fit into the vocabulary of 84"
    ):
        InfoGainMMaDAPipeline(pipe.vqvae, pipe.tokenizer, pipe.transformer, pipe.scheduler, image_token_offset=60)

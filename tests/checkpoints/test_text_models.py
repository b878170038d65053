"""Opening masked language models as they were published: names, facts, tokenizers, errors; no code of theirs runs."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import write_mmada_repository
from helpers.checkpoints_text import (
    DREAM_CONFIG,
    SDAR_CONFIG,
    random_weights,
    write_bert,
    write_dream,
    write_llada,
    write_llada2,
    write_mdlm_qwen3,
    write_sdar,
)
from helpers.text import load_text_model, masked_lm_logits
from safetensors.torch import load_file, save_file
from transformers import (
    BertForMaskedLM,
    FNetConfig,
    Glm4MoeForCausalLM,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from diffusers_infogain.checkpoints.text import open_text_model, open_tokenizer
from diffusers_infogain.models.llada import BidirectionalLlama, llama_config
from diffusers_infogain.models.text_family import TextFamily, text_family

GOLDEN = Path(__file__).parent.parent / "golden"
Writer = Callable[..., Path]
FAMILIES: dict[Writer, tuple[type, TextFamily]] = {
    write_llada: (BidirectionalLlama, TextFamily("llada", 60, eos_token_ids=(61,))),
    write_dream: (Qwen2ForCausalLM, TextFamily("dream", 259, shifted=True, eos_token_ids=(256, 258))),
    write_sdar: (Qwen3ForCausalLM, TextFamily("sdar", 259, False, "block_causal", 4, (256, 258))),
    write_llada2: (Glm4MoeForCausalLM, TextFamily("llada2", 259, False, "block_causal", 32, (256,))),
    write_mdlm_qwen3: (Qwen3ForCausalLM, TextFamily("a2d", 259, eos_token_ids=(256, 258))),
    write_bert: (BertForMaskedLM, TextFamily("masked_lm", 4, eos_token_ids=(3,))),
}


def some_ids(model: Any, rows: int = 2, length: int = 10, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def everywhere(model: Any, family: TextFamily, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """(R, L, V)."""
    where = torch.ones_like(ids, dtype=torch.bool)
    return masked_lm_logits(model, family, ids, mask, where).view(*ids.shape, -1)


@pytest.mark.parametrize("write", FAMILIES)
def test_families_are_recognised_and_loaded_without_running_their_code(write, tmp_path):
    kind, expected = FAMILIES[write]
    model, tokenizer, family = load_text_model(write(tmp_path / "model"))
    assert family == expected
    assert type(model) is kind
    assert not model.training
    assert tokenizer.mask_token_id == expected.mask_token_id
    assert tokenizer.decode(tokenizer("a red cat", add_special_tokens=False).input_ids) == "a red cat"


@pytest.mark.parametrize("write", FAMILIES)
def test_facts_go_through_json_and_saved_folders(write, tmp_path):
    model, tokenizer, family = load_text_model(write(tmp_path / "model"))
    assert TextFamily(**json.loads(json.dumps(asdict(family)))) == family
    assert text_family(model.config, tokenizer) == family
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again, same_tokenizer, same = load_text_model(tmp_path / "saved")
    assert same == family
    assert type(again) is type(model)
    assert same_tokenizer("a red cat").input_ids == tokenizer("a red cat").input_ids
    assert "auto_map" not in (tmp_path / "saved" / "tokenizer_config.json").read_text()
    ids = some_ids(model)
    torch.testing.assert_close(everywhere(again, family, ids), everywhere(model, family, ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("write", FAMILIES)
def test_a_source_is_written_as_transformers_reads_it(write, tmp_path):
    opened = open_text_model(write(tmp_path / "model"))
    (tmp_path / "written").mkdir()
    opened.source.write(tmp_path / "written", shard_size=2000)
    model, kind = opened.source.load(torch.bfloat16), FAMILIES[write][0]
    assert model.dtype == torch.bfloat16
    written = kind.from_pretrained(tmp_path / "written").eval()
    assert opened.source.probe(written).shape == opened.source.probe(opened.source.load()).shape
    torch.testing.assert_close(opened.source.probe(written), opened.source.probe(opened.source.load()), atol=1e-5, rtol=0)


@pytest.mark.parametrize("write", [write_llada, write_dream, write_sdar, write_llada2, write_mdlm_qwen3, write_bert])
def test_nothing_is_said_that_would_frighten_users(write, tmp_path, caplog):
    folder = write(tmp_path / "model")
    loggers = [logging.getLogger(name) for name in ("transformers", "diffusers")]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    load_text_model(folder)
    for logger in loggers:
        logger.removeHandler(caplog.handler)
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# What the networks compute


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_llada_2_computes_what_the_public_implementation_does(dtype, tmp_path):
    """Also where the bias makes all scores of a group negative: experts of other groups are never chosen."""
    stored = load_file(GOLDEN / "llada2_tiny.safetensors")
    model, _, family = load_text_model(write_llada2(tmp_path / "model", dtype), dtype=dtype, block_length=4)
    found = everywhere(model, family, stored["ids"]).float()
    error = (found - stored["block_causal_logits"]).abs()
    # In bfloat16 an expert may be another one: most of the logits are near.
    assert error.max() < 1e-4 if dtype == torch.float32 else error.median() < 0.2
    full = everywhere(model, TextFamily("llada2", family.mask_token_id, eos_token_ids=(256,)), stored["ids"]).float()
    error = (full - stored["full_logits"]).abs()
    assert error.max() < 1e-4 if dtype == torch.float32 else error.median() < 0.2
    assert (stored["full_logits"] - stored["block_causal_logits"]).abs().max() > 1
    router = model.model.layers[1].mlp.gate
    assert router.e_score_correction_bias.dtype == torch.float32
    assert (router.e_score_correction_bias < -0.5).any()


def test_experts_of_llada_2_are_read_one_layer_at_a_time_and_written_as_transformers_reads_them(tmp_path):
    opened = open_text_model(write_llada2(tmp_path / "model", torch.bfloat16))
    model = opened.source.load()
    stored = load_file(GOLDEN / "llada2_tiny.safetensors")
    layer = "model.layers.2."
    query, key, value = stored[f"{layer}attention.query_key_value.weight"].bfloat16().split([32, 16, 16])
    attention, experts = model.model.layers[2].self_attn, model.model.layers[2].mlp.experts
    for found, expected in ((attention.q_proj, query), (attention.k_proj, key), (attention.v_proj, value)):
        assert torch.equal(found.weight, expected)
    for expert in range(8):
        gate, up, down = (stored[f"{layer}mlp.experts.{expert}.{part}_proj.weight"].bfloat16() for part in ("gate", "up", "down"))
        assert torch.equal(experts.gate_up_proj[expert], torch.cat([gate, up]))
        assert torch.equal(experts.down_proj[expert], down)
    (tmp_path / "written").mkdir()
    opened.source.write(tmp_path / "written")
    model.save_pretrained(tmp_path / "saved")
    for folder in ("written", "saved"):  # of stacked experts, and of single ones
        again = Glm4MoeForCausalLM.from_pretrained(tmp_path / folder).state_dict()
        assert again.keys() == model.state_dict().keys()
        assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"use_bias": True}, "config.json: `use_bias` must be False, got True."),
        ({"score_function": "softmax"}, "config.json: `score_function` must be 'sigmoid', got 'softmax'."),
        ({"num_experts": None}, "config.json: `num_experts` must be an integer above 0, got None."),
        ({"num_experts": 9}, "6 tensors of the Glm4MoeForCausalLM are missing: model.layers.1.mlp.experts.8.gate_proj.weight"),
        ({"moe_intermediate_size": 9}, "must have the shape (8, 18, 16) for this Glm4MoeForCausalLM, got (8, 16, 16)."),
        (
            {"num_key_value_heads": 1},
            "model.layers.0.attention.query_key_value.weight do not make up model.layers.0.self_attn.q_proj",
        ),
    ],
)
def test_other_networks_of_the_name_are_refused(changes, text, tmp_path):
    with pytest.raises(ValueError) as error:
        load_text_model(write_llada2(tmp_path / "model", **changes))
    assert text in str(error.value)


def test_llada_computes_what_the_public_implementation_does(tmp_path):
    tensors = load_file(GOLDEN / "mmada_tiny.safetensors")
    save_file({key: value for key, value in tensors.items() if key.startswith("model.")}, tmp_path / "model.safetensors")
    config = json.loads((GOLDEN / "mmada_tiny.json").read_text())
    write_llada(tmp_path / "tokenizer")
    for file in (tmp_path / "tokenizer").glob("tokenizer*"):
        file.rename(tmp_path / file.name)
    for model_type in ("llada", "mmada"):
        (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
        model, _, family = load_text_model(tmp_path)
        assert (family.name, family.mask_token_id) == (model_type, 47)
        ids, mask = tensors["plain.input_ids"], tensors["plain.attention_mask"].bool()
        assert not mask.all()
        rows = masked_lm_logits(model, family, ids, mask, mask)
        torch.testing.assert_close(rows, tensors["plain.logits_key_mask"][mask][:, :50], atol=1e-4, rtol=0)
        whole = everywhere(model, family, ids)
        torch.testing.assert_close(whole, tensors["plain.logits_no_mask"][..., :50], atol=1e-4, rtol=0)


def test_dream_is_qwen2_seeing_both_sides_and_one_position_late(tmp_path):
    model, _, family = load_text_model(write_dream(tmp_path / "model"))
    ids = some_ids(model)
    no_mask = torch.zeros(2, 1, 10, 10)
    direct = model(ids, attention_mask=no_mask).logits
    expected = torch.cat([direct[:, :1], direct[:, :-1]], dim=1)
    torch.testing.assert_close(everywhere(model, family, ids), expected, atol=1e-5, rtol=0)


def test_sdar_is_qwen3_with_a_mask_by_blocks(tmp_path):
    model, _, family = load_text_model(write_sdar(tmp_path / "model"))
    ids = some_ids(model)
    block = torch.arange(10) // 4
    mask = torch.where(block[None, :] <= block[:, None], 0.0, torch.finfo(torch.float32).min).expand(2, 1, 10, 10)
    torch.testing.assert_close(everywhere(model, family, ids), model(ids, attention_mask=mask).logits, atol=1e-5, rtol=0)


def test_a2d_is_qwen3_seeing_both_sides_with_tied_embeddings(tmp_path):
    model, _, family = load_text_model(write_mdlm_qwen3(tmp_path / "model"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = some_ids(model)
    direct = model(ids, attention_mask=torch.zeros(2, 1, 10, 10)).logits
    torch.testing.assert_close(everywhere(model, family, ids), direct, atol=1e-5, rtol=0)


@pytest.mark.parametrize("pickled", [False, True])
def test_bert_is_what_transformers_loads(pickled, tmp_path):
    folder = write_bert(tmp_path / "model", pickled=pickled)
    model, _, family = load_text_model(folder)
    ids = some_ids(model)
    direct = BertForMaskedLM.from_pretrained(folder).eval()(ids).logits
    torch.testing.assert_close(everywhere(model, family, ids), direct, atol=1e-5, rtol=0)


def test_modernbert_is_what_transformers_loads(tmp_path):
    config = ModernBertConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        local_attention=8,
        **{f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")},
    )
    reference = random_weights(ModernBertForMaskedLM(config), seed=5)
    reference.save_pretrained(tmp_path / "model")
    open_tokenizer(write_bert(tmp_path / "bert")).save_pretrained(tmp_path / "model")
    model, _, family = load_text_model(tmp_path / "model")
    assert type(model) is ModernBertForMaskedLM
    ids = some_ids(model, length=20)
    torch.testing.assert_close(everywhere(model, family, ids), reference(ids).logits, atol=1e-5, rtol=0)


# Facts


def test_mmada_is_a_language_model_too(tmp_path):
    opened = open_text_model(write_mmada_repository(tmp_path / "model"))
    assert opened.family == TextFamily("mmada", 126336, eos_token_ids=(126081,), num_text_tokens=126464)


def test_our_own_llama_is_known_by_its_mask_token_and_attention():
    config = llama_config({**json.loads((GOLDEN / "mmada_tiny.json").read_text())})
    assert text_family(config) == TextFamily("llada", 47, eos_token_ids=(42,), num_text_tokens=50)


def test_blocks_can_be_given_or_are_told_by_name(tmp_path, caplog):
    assert open_text_model(write_sdar(tmp_path / "b32", block_size=32)).family.block_length == 32
    folder = write_sdar(tmp_path / "none", block_size=None)
    assert open_text_model(folder, block_length=16).family.block_length == 16
    logging.getLogger("diffusers").propagate = True
    try:
        with caplog.at_level(logging.WARNING):
            assert open_text_model(folder).family.block_length == 4
            assert "config.json has no `block_size`: blocks of 4 tokens are taken" in caplog.text
            bd3lm = write_mdlm_qwen3(tmp_path / "Qwen3-0.6B-diffusion-bd3lm-v0.1")
            assert open_text_model(bd3lm).family == TextFamily("a2d", 259, False, "block_causal", 32, (256, 258))
            assert "by its name it is block-causal; blocks of 32 tokens are taken" in caplog.text
    finally:
        logging.getLogger("diffusers").propagate = False
    assert open_text_model(bd3lm, block_length=8).family.block_length == 8
    with pytest.raises(ValueError, match=r"`block_length` must be None for dream, whose attention is full, got 8"):
        open_text_model(write_dream(tmp_path / "dream"), block_length=8)


def test_the_mask_token_is_the_configurations_before_the_tokenizers():
    assert text_family({**DREAM_CONFIG, "mask_token_id": 5}).mask_token_id == 5
    with pytest.raises(ValueError, match=r"No mask token: neither `mask_token_id` in config.json"):
        text_family(SDAR_CONFIG)
    with pytest.raises(ValueError, match=r"The mask token 264 must be below the `vocab_size` 264"):
        text_family({**DREAM_CONFIG, "mask_token_id": 264})


# Errors


@pytest.mark.parametrize(
    ("model_type", "text"),
    [
        ("llada2_moe_veomni", r"'llada2_moe_veomni' is LLaDA 2 in another form than its authors publish for use"),
        ("qwen3", r"'qwen3' is an ordinary causal language model"),
        ("gpt9", r"'gpt9' is not known here. Known are llada, mmada, Dream, sdar, llada2_moe, a2d-llama"),
        (None, r"the model type None is not known here"),
    ],
)
def test_other_models_are_refused_by_name(model_type, text, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ValueError, match=text):
        open_text_model(tmp_path)


@pytest.mark.parametrize(
    ("write", "changes", "text"),
    [
        (write_dream, {"use_mrope": True}, "`use_mrope` must be False, got True"),
        (write_sdar, {"use_sliding_window": True}, "`use_sliding_window` must be False, got True"),
        (write_llada, {"block_type": "sequential"}, "`block_type` must be 'llama', got 'sequential'"),
        (write_bert, {"is_decoder": True}, "`is_decoder` must be False, got True"),
    ],
)
def test_networks_that_are_not_what_they_are_called_are_refused(write, changes, text, tmp_path):
    folder = write(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=text):
        load_text_model(folder)


def test_a_model_without_an_attention_mask_is_refused(tmp_path):
    config = FNetConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, mask_token_id=4)
    config.save_pretrained(tmp_path)
    open_tokenizer(write_bert(tmp_path / "bert")).save_pretrained(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="the model type 'fnet' takes no attention mask: texts could not be padded"):
        open_text_model(tmp_path)


def test_missing_tensors_are_named(tmp_path):
    folder = write_sdar(tmp_path / "model")
    for file in folder.glob("model*.safetensors"):
        save_file({key: value for key, value in load_file(file).items() if "q_norm" not in key}, file)
    with pytest.raises(
        ValueError, match=r"2 tensors of the Qwen3ForCausalLM are missing: model.layers.0.self_attn.q_norm.weight"
    ):
        load_text_model(folder)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"attention": "causal"}, r"`attention` must be one of full, block_causal, got 'causal'"),
        ({"attention": "block_causal"}, r"`block_length` must be at least 1 for block-causal .* got None for 'block_causal'"),
        ({"block_length": 4}, r"None for full attention, got 4 for 'full'"),
        ({"attention": "block_causal", "block_length": 0}, r"must be at least 1 for block-causal .* got 0"),
    ],
)
def test_families_that_contradict_themselves(changes, text):
    with pytest.raises(ValueError, match=text):
        TextFamily("sdar", 5, **changes)


def test_a_stock_llama_reads_what_llada_was_saved_as(tmp_path):
    model, _, family = load_text_model(write_llada(tmp_path / "model"))
    model.save_pretrained(tmp_path / "saved")
    stock = LlamaForCausalLM.from_pretrained(tmp_path / "saved").eval()
    ids = some_ids(model)
    torch.testing.assert_close(everywhere(stock, family, ids), everywhere(model, family, ids), atol=1e-5, rtol=0)

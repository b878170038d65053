"""Every class of `AutoModelForMaskedLM`: read from a saved folder, and the same alone and in a batch."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import torch
from helpers.masked_lm import CLASSES, VOCABULARY, write_masked_lm
from helpers.text import load_text_model, masked_lm_logits
from safetensors.torch import load_file, save_file

from diffusers_infogain import InfoGainTextPipeline
from diffusers_infogain.checkpoints.convert import write_pipeline
from diffusers_infogain.checkpoints.text import open_text_model
from diffusers_infogain.models.text_family import TextFamily

REFUSED = {
    "bart": r"`is_encoder_decoder` must be False, got True",
    "fnet": r"the model type 'fnet' takes no attention mask",
    "mbart": r"`is_encoder_decoder` must be False, got True",
    "mra": r"the model type 'mra' leaves its attention out where a kernel of its own is not compiled",
    "mvp": r"`is_encoder_decoder` must be False, got True",
}
FAST = ("albert", "bert", "camembert", "convbert", "deberta-v2", "distilbert", "electra", "esm", "modernbert", "roberta")
FAST += ("xlm-roberta", "bart", "mra")
LENGTHS = (5, 13, 9)


def draw() -> torch.Tensor:
    """Three rows of text, of which the last tokens are left out by `LENGTHS`; some are masks."""
    ids = torch.randint(5, VOCABULARY, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(1))
    ids[:, 0], ids[:, 2:4] = 2, 4
    return ids


def largest_difference(model: Any, family: TextFamily, reference: Any) -> float:
    """How far a text in a batch, padded on either side, and alone is from what the model computes of it alone, in logits."""
    rows = [row[:length] for row, length in zip(draw(), LENGTHS, strict=True)]
    expected = [reference(input_ids=row[None], attention_mask=torch.ones_like(row)[None]).logits[0, : len(row)] for row in rows]
    alone = [masked_lm_logits(model, family, row[None], None, torch.ones_like(row, dtype=torch.bool)[None]) for row in rows]
    longest, differences = max(LENGTHS), [(one - other).abs().max() for one, other in zip(alone, expected, strict=True)]
    for left in (False, True):
        ids, real = torch.zeros(3, longest, dtype=torch.long), torch.zeros(3, longest, dtype=torch.bool)
        for number, row in enumerate(rows):
            place = slice(longest - len(row), longest) if left else slice(len(row))
            ids[number, place], real[number, place] = row, True
        where = real & (ids == 4)
        found = masked_lm_logits(model, family, ids, real, where)
        wanted = torch.cat([one[row == 4] for one, row in zip(expected, rows, strict=True)])
        differences.append((found - wanted).abs().max())
    return max(differences).item() / max(one.std().item() for one in expected)


@pytest.mark.parametrize("model_type", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CLASSES])
@torch.no_grad()
def test_a_class_is_read_and_the_same_alone_and_in_a_batch(model_type, tmp_path, record_property, capsys):
    reference = write_masked_lm(tmp_path, model_type)
    if model_type in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[model_type]) as refusal:
            load_text_model(tmp_path)
        result = f"refused: {refusal.value}"
    else:
        model, _, family = load_text_model(tmp_path)
        assert type(model) is CLASSES[model_type][1]
        assert family == TextFamily("masked_lm", 4, eos_token_ids=(3,))
        difference = largest_difference(model, family, reference)
        assert difference < 1e-4
        result = f"alone and in a batch within {difference:.1e} standard deviations of the logits"
    record_property(model_type, result)
    with capsys.disabled():
        print(f"{model_type}: {result}")


@pytest.mark.parametrize(
    ("model_type", "changes", "text"),
    [
        ("reformer", {"attn_layers": ["local", "lsh"]}, "the model type 'reformer' draws the random numbers that its attention"),
        ("yoso", {"use_expectation": False}, "the model type 'yoso' draws the random numbers that its attention"),
        ("xmod", {"default_language": None}, "`default_language` must be one of en_XX, de_DE, got None"),
        ("bert", {"is_decoder": True}, "`is_decoder` must be False, got True"),
    ],
)
def test_settings_of_a_class_that_cannot_work_are_refused(model_type, changes, text, tmp_path):
    write_masked_lm(tmp_path, model_type)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(ValueError, match=text):
        open_text_model(tmp_path)


def test_what_a_config_does_not_say_is_what_its_class_takes_it_for(tmp_path):
    write_masked_lm(tmp_path, "bart")
    file = tmp_path / "config.json"
    file.write_text(json.dumps({name: value for name, value in json.loads(file.read_text()).items() if "is_" not in name}))
    with pytest.raises(ValueError, match="`is_encoder_decoder` must be False, got True"):
        open_text_model(tmp_path)


@torch.no_grad()
def test_sparse_attention_does_not_depend_on_earlier_texts(tmp_path, caplog):
    reference = write_masked_lm(tmp_path, "big_bird", max_position_embeddings=128, attention_type="original_full")
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "attention_type": "block_sparse"}))
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    model, _, family = load_text_model(tmp_path)
    logger.removeHandler(caplog.handler)
    assert "attention of the type 'block_sparse', which depends on" in caplog.text
    ids = torch.randint(5, VOCABULARY, (1, 100), generator=torch.Generator().manual_seed(0))
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    first = masked_lm_logits(model, family, ids, None, everywhere)
    masked_lm_logits(model, family, ids[:, :9], None, everywhere[:, :9])
    assert torch.equal(masked_lm_logits(model, family, ids, None, everywhere), first)
    torch.testing.assert_close(first, reference(ids).logits[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("model_type", ["nomic_bert", "xlm-roberta"])
@torch.no_grad()
def test_a_model_whose_tensors_have_other_names_in_files_is_converted(model_type, tmp_path):
    write_masked_lm(tmp_path / "model", model_type)
    write_pipeline(InfoGainTextPipeline.open_published(tmp_path / "model"), tmp_path / "converted")
    ids = draw()
    where = torch.ones_like(ids, dtype=torch.bool)
    pipes = [InfoGainTextPipeline.from_pretrained(tmp_path / name) for name in ("model", "converted")]
    logits = [masked_lm_logits(pipe.model, pipe.family, ids, None, where) for pipe in pipes]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("model_type", "name"), [("nomic_bert", "norm1.weight"), ("roberta", "lm_head.dense.bias")])
def test_a_tensor_that_is_missing_is_named(model_type, name, tmp_path):
    write_masked_lm(tmp_path, model_type)
    tensors = load_file(tmp_path / "model.safetensors")
    dropped = next(key for key in tensors if name in key)
    save_file({key: value for key, value in tensors.items() if key != dropped}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model.safetensors: \d+ tensors of the \w+ are missing: "):
        load_text_model(tmp_path)


@pytest.mark.parametrize("name", ["lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight"])
@torch.no_grad()
def test_of_tied_names_any_one_in_the_file_is_enough(name, tmp_path):
    reference = write_masked_lm(tmp_path, "roberta")
    tensors = load_file(tmp_path / "model.safetensors")
    shared = reference.roberta.embeddings.word_embeddings.weight.data
    others = ("lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight")
    kept = {key: value for key, value in tensors.items() if key not in others}
    save_file({**kept, name: shared.clone()}, tmp_path / "model.safetensors", {"format": "pt"})
    model, _, family = load_text_model(tmp_path)
    assert largest_difference(model, family, reference) < 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 10**9},
        {"vocab_size": -1},
        {"vocab_size": "many"},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 2.5},
        {"num_labels": 10**9},
        {"id2label": 5},
        {"hidden_size": 10**9},
        {"hidden_size": [16]},
        {"hidden_size": 17},
        {"num_attention_heads": 0},
        {"max_position_embeddings": 10**9},
        {"type_vocab_size": None},
        {"hidden_act": "explode"},
        {"layer_norm_eps": "x"},
        {"pad_token_id": 10**9},
        {"mask_token_id": "x"},
        {"eos_token_id": {"a": 1}},
        {"model_type": ["bert"]},
        {"model_type": "albert"},
        {"text_family": 5},
        {"text_family": {"name": "masked_lm", "mask_token_id": 10**9}},
        {"text_family": {"name": "nobody", "mask_token_id": 4}},
        {"text_family": {"name": "sdar", "mask_token_id": 4}},
        {"text_family": {"nom": "masked_lm", "mask_token_id": 4}},
    ],
    ids=str,
)
def test_hostile_configurations_are_one_sentence(changes, tmp_path):
    write_masked_lm(tmp_path, "bert")
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(ValueError) as error:
        InfoGainTextPipeline.from_pretrained(tmp_path)
    assert len(str(error.value).splitlines()) == 1
    assert "config.json" in str(error.value) or "model.safetensors" in str(error.value)

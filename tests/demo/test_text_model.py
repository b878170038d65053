"""The embedded text model loads, is small, and solves the tasks that it was trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import diffusers_infogain
from diffusers_infogain.evaluation import text_tasks
from diffusers_infogain.models.llada import BidirectionalLlama

FOLDER = Path(diffusers_infogain.__file__).parent / "demo" / "text_model"


@pytest.fixture(scope="module")
def model() -> BidirectionalLlama:
    return BidirectionalLlama.from_pretrained(FOLDER).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(FOLDER)


@torch.no_grad()
def fill(model, tokenizer, problems: list) -> list[bool]:
    """Which problems are right when the surest token is decoded first, one per step."""
    rows = [problem.letter + problem.template for problem in problems]
    tokens, mask = tokenizer(rows, return_tensors="pt").input_ids, tokenizer.mask_token_id
    while (open_ := tokens == mask).any():
        confidence, value = model(tokens).softmax(-1).max(-1)
        place = confidence.masked_fill(~open_, -1.0).argmax(1, keepdim=True)
        tokens = torch.where(open_ & (torch.arange(tokens.shape[1]) == place), value, tokens)
    filled = tokenizer.batch_decode(tokens)
    return [row[0] == problem.letter and problem.check(row[1:]) for problem, row in zip(problems, filled, strict=True)]


def test_is_small_and_holds_weights_tokenizer_figures_and_a_card():
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert sum(files.values()) < 4e6
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training.json", "README.md"} <= set(
        files
    )
    training = json.loads((FOLDER / "training.json").read_text(encoding="utf-8"))
    assert training["right"]["product given factors, surest first"] >= 0.99


def test_is_loaded_in_single_precision_and_knows_its_mask(model, tokenizer):
    assert model.dtype == torch.float32
    assert tokenizer.mask_token == text_tasks.MASK
    assert tokenizer.mask_token_id == model.config.mask_token_id
    assert model.config.is_causal is False
    # transformers 4 reads the one, transformers 5 the other.
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]


def test_every_character_of_the_tasks_is_a_token_of_its_own(tokenizer):
    rows = ["M07*12=0001010100", "S1234341221434321", "M89*56=__________"]
    for row, ids in zip(rows, tokenizer(rows).input_ids, strict=True):
        assert len(ids) == 17
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == row


def test_products_given_factors(model, tokenizer):
    right = fill(model, tokenizer, text_tasks.sample_multiplications(200, torch.Generator().manual_seed(11)))
    assert sum(right) >= 198


def test_sudokus(model, tokenizer):
    right = fill(model, tokenizer, text_tasks.sample_sudokus(200, torch.Generator().manual_seed(12)))
    assert sum(right) >= 196

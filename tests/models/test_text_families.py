"""Text model families: read from their published formats, the same logits in every layout, with and without caches."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import llada_tensors, make_word_tokenizer, write_shards
from helpers.text import load_text_model, masked_lm_logits
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM, BertTokenizer, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from diffusers_infogain.checkpoints.source import renamed
from diffusers_infogain.checkpoints.text import open_text_model
from diffusers_infogain.models.llada import KEY_MAPPING, BidirectionalLlama, llama_config, pad_prompts
from diffusers_infogain.models.text_family import TextFamily, family_name, text_family
from diffusers_infogain.models.text_logits import TextCache

GOLDEN = Path(__file__).parents[1] / "golden"
WORDS, BOS, EOS, MASK = 24, 20, 21, 22
SIZES = {"vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
CLASSES = {
    "Dream": (Qwen2ForCausalLM, Qwen2Config),
    "sdar": (Qwen3ForCausalLM, Qwen3Config),
    "a2d-qwen3": (Qwen3ForCausalLM, Qwen3Config),
}


def make_native(model_type: str) -> torch.nn.Module:
    kind, config_class = CLASSES[model_type]
    head = {"head_dim": 8} if config_class is Qwen3Config else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = kind(
            config_class(num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=False, **SIZES, **head)
        ).eval()
        for parameter in model.parameters():
            parameter.data += 0.4 * torch.randn_like(parameter) * (parameter.ndim == 2)
    return model


def write_native(folder: Path, model_type: str, **config: object) -> torch.nn.Module:
    """As Dream, SDAR and A2D are published: stock names of tensors, a model type and code of their own."""
    folder.mkdir(parents=True)
    model = make_native(model_type)
    settings = json.loads(model.config.to_json_string(use_diff=False)) | {
        "model_type": model_type,
        "architectures": ["DreamModel"],
        "auto_map": {"AutoModel": "modeling_own.Own"},
        "mask_token_id": MASK,
        "eos_token_id": EOS,
        **config,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "modeling_own.py").write_text("raise RuntimeError('code of the checkpoint was run')\n")
    write_shards(folder, model.state_dict(), count=2)
    make_word_tokenizer(WORDS, BOS, EOS).save_pretrained(folder)
    return model


def family_of(model_type: str) -> TextFamily:
    return {
        "Dream": TextFamily("dream", MASK, shifted=True, eos_token_ids=(EOS,)),
        "sdar": TextFamily("sdar", MASK, attention="block_causal", block_length=4, eos_token_ids=(EOS,)),
        "a2d-qwen3": TextFamily("a2d", MASK, eos_token_ids=(EOS,)),
    }[model_type]


@torch.no_grad()
def plain_logits(model: torch.nn.Module, family: TextFamily, row: list[int]) -> torch.Tensor:
    """(L, V) of one unpadded row, under a mask written out: row i predicts token i."""
    length = len(row)
    block = torch.arange(length) // (family.block_length or length)
    hidden = block[:, None] < block
    mask = torch.zeros(1, 1, length, length).masked_fill(hidden, torch.finfo(torch.float32).min)
    logits = model(torch.tensor([row]), attention_mask=mask, position_ids=torch.arange(length)[None]).logits[0]
    return torch.cat([logits[:1], logits[:-1]]) if family.shifted else logits


def rows_of(lengths=(12, 7, 9), seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, 20, (length,), generator=generator).tolist() for length in lengths]
    for row in rows:
        row[2::3] = [MASK] * len(row[2::3])
    return rows


def padded(rows: list[list[int]], left: bool, width: int = 12, pad: int = EOS) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = [[pad] * (width - len(row)) + row if left else row + [pad] * (width - len(row)) for row in rows]
    kept = [
        [False] * (width - len(row)) + [True] * len(row) if left else [True] * len(row) + [False] * (width - len(row))
        for row in rows
    ]
    return torch.tensor(tokens), torch.tensor(kept)


# Loading


@pytest.mark.parametrize("model_type", CLASSES)
def test_published_models_on_stock_classes(model_type, tmp_path):
    model = write_native(tmp_path / "published", model_type, **({"block_size": 4} if model_type == "sdar" else {}))
    loaded, tokenizer, family = load_text_model(tmp_path / "published")
    assert type(loaded) is type(model)
    assert family == family_of(model_type)
    assert tokenizer.mask_token_id == MASK
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    loaded.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert load_text_model(tmp_path / "saved")[2] == family


def test_llada_is_the_public_implementation(tmp_path):
    stored = load_file(GOLDEN / "mmada_tiny.safetensors")
    config = json.loads((GOLDEN / "mmada_tiny.json").read_text())
    model = BidirectionalLlama(llama_config(config)).eval()
    model.load_state_dict({renamed(key, KEY_MAPPING): value for key, value in stored.items() if key.startswith("model.")})
    family = text_family(model.config)
    assert (family.mask_token_id, family.shifted, family.attention) == (47, False, "full")
    ids, mask = stored["plain.input_ids"], stored["plain.attention_mask"].bool()
    where = mask & (ids % 2 == 1)
    with torch.no_grad():
        logits = masked_lm_logits(model, family, ids, mask, where)
    assert family.num_text_tokens == 50  # the other 32 are image tokens
    torch.testing.assert_close(logits, stored["plain.logits_key_mask"][where][:, :50], atol=1e-4, rtol=0)


def test_llada_from_its_published_format(tmp_path):
    names = {"vocab_size": WORDS, "embedding_size": WORDS, "mask_token_id": MASK, "eos_token_id": EOS, "pad_token_id": EOS}
    sizes = {"d_model": 16, "n_heads": 2, "n_layers": 2, "mlp_hidden_size": 24, "max_sequence_length": 64, "rope": True}
    config = {"model_type": "llada", "auto_map": {"AutoModel": "modeling_llada.LLaDAModelLM"}, **names, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "modeling_llada.py").write_text("raise RuntimeError('code of the checkpoint was run')\n")
    write_shards(tmp_path, llada_tensors(config), count=2)
    make_word_tokenizer(WORDS, BOS, EOS).save_pretrained(tmp_path)
    model, _, family = load_text_model(tmp_path, torch.bfloat16)
    assert type(model) is BidirectionalLlama
    assert model.dtype == torch.bfloat16
    assert family == TextFamily("llada", MASK, eos_token_ids=(EOS,))


def write_bert(folder: Path) -> BertForMaskedLM:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnop"]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = BertForMaskedLM(BertConfig(**{**SIZES, "vocab_size": len(words)}, max_position_embeddings=32)).eval()
        for parameter in model.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    return model


@torch.no_grad()
def test_any_masked_lm_of_transformers(tmp_path):
    model = write_bert(tmp_path / "bert")
    loaded, tokenizer, family = load_text_model(tmp_path / "bert")
    assert family.name == "masked_lm"
    assert family.mask_token_id == tokenizer.mask_token_id == 4
    rows = [[2, 5, 4, 7, 4, 3], [2, 4, 6, 3]]
    tokens, kept = padded(rows, left=False, width=6, pad=0)
    where = tokens == 4
    got = masked_lm_logits(loaded, family, tokens, kept, where).split(where.sum(1).tolist())
    for row, logits in zip(rows, got, strict=True):
        expected = model(torch.tensor([row])).logits[0][torch.tensor(row) == 4]
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


# Logits


@torch.no_grad()
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("model_type", CLASSES)
def test_padded_rows_are_what_each_is_alone(model_type, left):
    model, family, rows = make_native(model_type), family_of(model_type), rows_of()
    tokens, kept = padded(rows, left)
    where = (tokens == MASK) & kept
    got = masked_lm_logits(model, family, tokens, kept, where).split(where.sum(1).tolist())
    for row, logits in zip(rows, got, strict=True):
        expected = plain_logits(model, family, row)[torch.tensor(row) == MASK]
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
        alone = torch.tensor([row])
        torch.testing.assert_close(masked_lm_logits(model, family, alone, None, alone == MASK), expected, atol=1e-5, rtol=1e-5)


def test_only_the_wanted_positions_go_through_the_head():
    model, seen = make_native("sdar"), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.numel() // WORDS))
    tokens, kept = padded(rows_of(), left=True)
    where = (tokens == MASK) & kept
    masked_lm_logits(model, family_of("sdar"), tokens, kept, where)
    assert seen == [int(where.sum())]


def test_prompts_are_padded_on_the_left():
    ids, mask = pad_prompts([[1, 2, 3], [4], []], 9, torch.device("cpu"))
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4], [9, 9, 9]]
    assert mask.tolist() == [[True] * 3, [False, False, True], [False] * 3]
    assert (ids.dtype, mask.dtype) == (torch.long, torch.bool)


# Caches


@torch.no_grad()
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize(
    ("model_type", "mode", "packed"),
    [("sdar", "exact", False), ("sdar", "exact", True), ("Dream", "none", False), ("a2d-qwen3", "none", False)],
)
def test_block_after_block_every_state_has_the_logits_of_a_whole_forward(model_type, mode, packed, left):
    model, family = make_native(model_type), family_of(model_type)
    rows = rows_of((12, 8, 8)) if left else rows_of()
    tokens, kept = padded(rows, left)
    cache = TextCache(model, family, mode, packed)
    generator = torch.Generator().manual_seed(3)
    for start, end in ((0, 4), (4, 8), (8, 12)):
        cache.begin_block(tokens, kept, start, end)
        length = cache.length
        owners = torch.tensor([2, 0, 0, 1, 0])
        states = tokens[owners, start:end].clone()
        states[1, 1], states[4, 3] = 5, 6
        where = kept[owners, start:end]
        for _ in range(2):  # asking changes nothing
            got = cache.logits(states, owners, where).split(where.sum(1).tolist())
            for state, owner, logits in zip(states, owners.tolist(), got, strict=True):
                whole = tokens[owner].clone()
                whole[start:end] = state
                real = kept[owner].nonzero()[:, 0]
                expected = plain_logits(model, family, whole[real].tolist())
                wanted = (real >= start) & (real < end)
                torch.testing.assert_close(logits, expected[wanted], atol=1e-4, rtol=1e-4)
        assert cache.length == length
        assert mode == "none" or length == start
        tokens[:, start:end] = torch.where(
            kept[:, start:end], torch.randint(0, 20, (3, 4), generator=generator), tokens[:, start:end]
        )


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["Dream", "a2d-qwen3"])
def test_a_prefix_cache_is_exact_when_a_block_begins_and_near_after(model_type):
    model, family = make_native(model_type), family_of(model_type)
    tokens, kept = padded(rows_of(), left=True)
    cache, owners = TextCache(model, family, "prefix"), torch.arange(3)
    cache.begin_block(tokens, kept, 8, 12)
    states, where = tokens[:, 8:12], kept[:, 8:12]

    def whole(states: torch.Tensor) -> torch.Tensor:
        every = tokens.clone()
        every[:, 8:12] = states
        return masked_lm_logits(model, family, every, kept, torch.nn.functional.pad(where, (8, 0)))

    torch.testing.assert_close(cache.logits(states, owners, where), whole(states), atol=1e-4, rtol=1e-4)
    decoded = states.masked_fill(states == MASK, 3)
    error = (cache.logits(decoded, owners, where) - whole(decoded)).abs().max()
    changed = (whole(decoded) - whole(states)).abs().max()
    assert 1e-4 < error < changed


# Errors


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"model_type": "gpt2"}, "the model type 'gpt2' is not known here"),
        ({"model_type": "llama"}, "'llama' is an ordinary causal language model"),
        ({"model_type": "llada2_moe_veomni"}, "LLaDA 2 in another form than its authors publish for use"),
        ({}, "the model type None is not known here"),
    ],
)
def test_models_of_other_kinds_are_refused(config, text, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as error:
        open_text_model(tmp_path)
    assert text in str(error.value)


def test_a_configuration_says_whether_it_is_of_a_text_model():
    saved = asdict(family_of("sdar"))
    configs = [
        ({"model_type": "mmada"}, "mmada"),
        ({"model_type": "a2d-qwen2"}, "a2d"),
        ({"model_type": "modernbert"}, "masked_lm"),
        ({"model_type": "llama"}, None),
        ({"model_type": "llama", "is_causal": False}, "llada"),
        ({"model_type": "qwen3", "text_family": saved}, "sdar"),
        ({"model_type": ["bert"]}, None),
        ({}, None),
    ]
    assert [family_name(config) for config, _ in configs] == [name for _, name in configs]
    with pytest.raises(ValueError, match=r"config\.json: `text_family`"):
        family_name({"model_type": "qwen3", "text_family": {**saved, "attention": "causal"}})


def test_a_family_must_make_sense():
    with pytest.raises(ValueError, match="`attention` must be one of full, block_causal, got 'causal'"):
        TextFamily("dream", MASK, attention="causal")
    with pytest.raises(ValueError, match="`block_length` must be at least 1 for block-causal and None for full attention"):
        TextFamily("sdar", MASK, attention="block_causal")
    with pytest.raises(ValueError, match="`block_length` must be None for dream, whose attention is full, got 4"):
        text_family({"model_type": "Dream", "mask_token_id": MASK}, block_length=4)
    with pytest.raises(ValueError, match="No mask token"):
        text_family({"model_type": "Dream"})
    with pytest.raises(ValueError, match="must be below the `vocab_size` 20"):
        text_family({"model_type": "Dream", "mask_token_id": MASK, "vocab_size": 20})
    family = family_of("sdar")
    assert TextFamily(**json.loads(json.dumps(asdict(family)))) == family


def test_caches_that_do_not_fit_are_refused():
    model = make_native("sdar")
    with pytest.raises(ValueError, match="dual"):
        TextCache(model, family_of("sdar"), "dual")
    with pytest.raises(ValueError, match="prefix"):
        TextCache(model, family_of("sdar"), "prefix")
    with pytest.raises(ValueError, match="exact"):
        TextCache(make_native("Dream"), family_of("Dream"), "exact")
    with pytest.raises(ValueError, match="begin_block"):
        TextCache(model, family_of("sdar")).logits(torch.zeros(1, 4).long(), torch.tensor([0]), torch.ones(1, 4).bool())

"""Every class of `AutoModelForMaskedLM`: read from a saved folder, and the same alone and in a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from masked_lm_helpers import CLASSES, VOCABULARY, write_masked_lm

from diffusers_infogain.models.text import TextFamily, load_text_model
from diffusers_infogain.models.text_logits import masked_lm_logits

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

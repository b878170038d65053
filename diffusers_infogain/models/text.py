"""stub"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TextFamily:
    name: str
    mask_token_id: int
    shifted: bool = False
    attention: str = "full"
    block_length: int | None = None
    eos_token_ids: tuple[int, ...] = ()


def text_family(config, tokenizer=None):
    return TextFamily(
        "llada", config.mask_token_id, eos_token_ids=(config.eos_token_id,) if config.eos_token_id is not None else ()
    )


def masked_lm_logits(model, family, input_ids, attention_mask, where):
    if family.attention == "full":
        return model(input_ids, attention_mask, where=where)
    raise NotImplementedError


def open_text_model(repository, **hub):
    raise NotImplementedError

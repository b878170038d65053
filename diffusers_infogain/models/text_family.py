"""Families of masked language models: what decoding has to know about a model, and how a configuration tells it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from diffusers.utils import logging
from transformers import PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from ..checkpoints.configs import check_fields, require_fields
from ..checkpoints.errors import one_sentence
from ..checks import check_choice, shown
from .llada import MODEL_TYPES

logger = logging.get_logger("diffusers." + __name__)

ATTENTIONS = ("full", "block_causal")
FAMILIES = ("llada", "mmada", "dream", "sdar", "llada2", "a2d", "masked_lm")

_FAMILY_OF = {
    **{model_type: model_type for model_type in MODEL_TYPES},
    "Dream": "dream",
    "sdar": "sdar",
    "llada2_moe": "llada2",
    "a2d-llama": "a2d",
    "a2d-qwen2": "a2d",
    "a2d-qwen3": "a2d",
}
"""Family by published model type. All model types of `AutoModelForMaskedLM` are of the family "masked_lm"."""
_CAUSAL = ("llama", "qwen2", "qwen3", "glm4_moe")
"""Model types that a saved model shares with causal language models; its configuration has a `text_family`."""
_QWEN: dict[str, Any] = {"hidden_act": "silu", "use_mrope": False, "use_sliding_window": False}
SUPPORTED: dict[str, dict[str, Any]] = {
    "dream": _QWEN,
    "sdar": _QWEN,
    "a2d": _QWEN,
    "masked_lm": {"is_encoder_decoder": False, "is_decoder": False},
}
"""By family, values that fields of a configuration must have, if they are there; with others it is another network."""
_MASK_TOKENS = ("<|mdm_mask|>", "<|MASK|>", "<|mask|>", "<MASK>", "[MASK]", "<mask>")
_END_TOKENS = ("<|eot_id|>", "<|im_end|>")
_SDAR_BLOCK_LENGTH = 4
_BD3LM_BLOCK_LENGTH = 32
_LLADA2_BLOCK_LENGTH = 32


@dataclass(frozen=True)
class TextFamily:
    """Facts about a masked language model that its weights do not tell; `asdict` and `TextFamily(**...)` go through JSON.

    Attributes:
        name: "llada", "mmada", "dream", "sdar", "llada2", "a2d" or "masked_lm".
        mask_token_id: The token that stands for "not decoded yet".
        shifted: Whether the network's output at position i - 1 predicts token i, as Dream's does.
        attention: "full", or "block_causal": a token sees its own block and those before it.
        block_length: Of a block-causal model: position p lies in block p // block_length, counted from the first real token.
        eos_token_ids: Tokens that end a text.
        num_text_tokens: Ids from here on, such as MMaDA's image tokens, are not text and are never predicted. None: all are text.

    Raises:
        ValueError: For an unknown name or attention, a `block_length` that does not fit the attention, or a mask token that is
            not text.
    """

    name: str
    mask_token_id: int
    shifted: bool = False
    attention: str = "full"
    block_length: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    num_text_tokens: int | None = None

    def __post_init__(self) -> None:
        check_fields(TextFamily, vars(self), "text_family")
        object.__setattr__(self, "eos_token_ids", tuple(self.eos_token_ids))
        check_choice("name", self.name, FAMILIES)
        check_choice("attention", self.attention, ATTENTIONS)
        if (self.attention == "block_causal") != (self.block_length is not None) or (
            self.block_length is not None and self.block_length < 1
        ):
            raise ValueError(
                f"`block_length` must be at least 1 for block-causal and None for full attention, got {self.block_length!r} "
                f"for {self.attention!r}."
            )
        if self.num_text_tokens is not None and self.num_text_tokens <= self.mask_token_id:
            raise ValueError(
                f"`num_text_tokens` must be above the mask token {self.mask_token_id}, got {self.num_text_tokens!r}."
            )


def text_family(
    config: Any, tokenizer: PreTrainedTokenizerBase | None = None, block_length: int | None = None, repository_name: str = ""
) -> TextFamily:
    """The family of a model, from its published config.json (a mapping) or from the configuration of a loaded model.

    Some facts are in no published configuration: only Dream's logits are shifted; A2D models whose name has "bd3lm" in it have
    blocks of 32; an SDAR without `block_size` has blocks of 4. A warning is logged in the last two cases. LLaDA 2 has blocks of
    32, as its authors decode it.

    Args:
        config: A mapping, or a transformers configuration.
        tokenizer: Tells the mask token if the configuration does not, and ends of text.
        block_length: Of a block-causal model, instead of the configuration's. Makes an A2D model block-causal.
        repository_name: Tells A2D models that were trained on blocks from the others.

    Raises:
        ValueError: If the family is not known, or has no mask token.
    """
    settings: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
    if settings.get("text_family"):
        family = _saved_family(settings)
        return family if block_length is None else _with_blocks(family, block_length)
    name = check_family(settings)
    require_fields(settings, SUPPORTED.get(name, {}), "config.json")
    family = TextFamily(
        name,
        _mask_token(settings, tokenizer),
        shifted=name == "dream",
        eos_token_ids=_end_tokens(settings, tokenizer),
        num_text_tokens=settings.get("llm_vocab_size"),
    )
    if name == "sdar":
        length = block_length or settings.get("block_size")
        if length is None:
            logger.warning(f"config.json has no `block_size`: blocks of {_SDAR_BLOCK_LENGTH} tokens are taken, as SDAR's.")
        return _with_blocks(family, length or _SDAR_BLOCK_LENGTH)
    if name == "llada2":
        return _with_blocks(family, block_length or settings.get("block_size") or _LLADA2_BLOCK_LENGTH)
    if name == "a2d" and block_length is None and "bd3lm" in repository_name.lower():
        logger.warning(f"{repository_name}: by its name it is block-causal; blocks of {_BD3LM_BLOCK_LENGTH} tokens are taken.")
        block_length = _BD3LM_BLOCK_LENGTH
    return family if block_length is None else _with_blocks(family, block_length)


def family_name(settings: Mapping[str, Any]) -> str | None:
    """The name of the family that a config.json belongs to, or None if it is not of a known text model.

    Raises:
        ValueError: If it has a `text_family` that is malformed.
    """
    if settings.get("text_family"):
        return _saved_family(settings).name
    model_type = settings.get("model_type")
    if not isinstance(model_type, str):
        return None
    if model_type == "llama" and not settings.get("is_causal", True):
        return "llada"
    return _FAMILY_OF.get(model_type, "masked_lm" if model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES else None)


def check_family(settings: Mapping[str, Any]) -> str:
    """The name of the family of a config.json.

    Raises:
        ValueError: If it is not of a known text model, saying what it is.
    """
    name = family_name(settings)
    if name is not None:
        return name
    model_type = settings.get("model_type")
    if str(model_type).startswith("llada2"):
        why = "LLaDA 2 in another form than its authors publish for use"
    elif model_type in _CAUSAL:
        why = "an ordinary causal language model, unless a `text_family` in its config.json says otherwise"
    else:
        why = "not known here"
    known = ", ".join([*_FAMILY_OF, "those of AutoModelForMaskedLM (bert, modernbert, ...)"])
    raise ValueError(
        f"config.json: the model type {shown(model_type)} is {why}. Known are {known}, and what was saved from them."
    )


def eos_token_ids(settings: Mapping[str, Any]) -> list[int]:
    """The `eos_token_id` of a configuration, which may be one id, several or none, as a list."""
    ids = settings.get("eos_token_id")
    return [token for token in (ids if isinstance(ids, (list, tuple)) else [ids]) if token is not None]


def _saved_family(settings: Mapping[str, Any]) -> TextFamily:
    with one_sentence("config.json: `text_family`"):
        return TextFamily(**settings["text_family"])


def _with_blocks(family: TextFamily, block_length: int) -> TextFamily:
    if family.name not in ("sdar", "llada2", "a2d"):
        raise ValueError(f"`block_length` must be None for {family.name}, whose attention is full, got {block_length!r}.")
    return replace(family, attention="block_causal", block_length=block_length)


def _mask_token(settings: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> int:
    """The mask token of the configuration, else of the tokenizer, else the first of `_MASK_TOKENS` in its vocabulary."""
    vocabulary = _vocabulary(tokenizer)
    found = [settings.get("mask_token_id"), getattr(tokenizer, "mask_token_id", None), *map(vocabulary.get, _MASK_TOKENS)]
    token = next((token for token in found if token is not None), None)
    if token is None:
        raise ValueError(
            f"No mask token: neither `mask_token_id` in config.json, nor a mask token of the tokenizer, nor one of "
            f"{', '.join(_MASK_TOKENS)} in its vocabulary."
        )
    if token >= settings.get("vocab_size", token + 1):
        raise ValueError(f"The mask token {token} must be below the `vocab_size` {settings['vocab_size']} of config.json.")
    return int(token)


def _end_tokens(settings: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    """Tokens that end a text or a turn, of config.json and of the tokenizer; without any, [SEP]."""
    vocabulary = _vocabulary(tokenizer)
    found = [*eos_token_ids(settings), getattr(tokenizer, "eos_token_id", None), *map(vocabulary.get, _END_TOKENS)]
    if all(token is None for token in found):
        found = [getattr(tokenizer, "sep_token_id", None)]
    return tuple(dict.fromkeys(int(token) for token in found if token is not None))


def _vocabulary(tokenizer: PreTrainedTokenizerBase | None) -> dict[str, int]:
    return {} if tokenizer is None else tokenizer.get_vocab()

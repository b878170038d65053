"""Masked language models as they were published, on transformers' own classes: LLaDA, Dream, SDAR, BERT and others."""

from __future__ import annotations

import copy
import functools
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from ..checkpoints.configs import check_fields, check_sizes, require_fields, stock_config, stock_settings
from ..checkpoints.errors import one_sentence, writing_natively
from ..checkpoints.repository import HubArguments, local_folder
from ..checkpoints.saved import load_component, load_tokenizer
from ..checkpoints.source import SHARD_SIZE, ModelSource, build_skeleton, missing_tensors, renamed
from ..checkpoints.weights import Checkpoint, find_weights
from ..checks import is_integer, shown
from ..files import read_json
from .llada import MODEL_TYPES, WEIGHT_NAMES, BidirectionalLlama, open_llada

logger = logging.get_logger("diffusers." + __name__)

ATTENTIONS = ("full", "block_causal")
FAMILIES = ("llada", "mmada", "dream", "sdar", "a2d", "masked_lm")


@dataclass(frozen=True)
class TextFamily:
    """Facts on a masked language model that its weights do not tell; `asdict` and `TextFamily(**...)` go through JSON.

    Attributes:
        name: "llada", "mmada", "dream", "sdar", "a2d" or "masked_lm".
        mask_token_id: The token that stands for "not decoded yet".
        shifted: Whether the network's output at position i - 1 predicts token i, as Dream's does.
        attention: "full", or "block_causal": a token sees its own block and those before it.
        block_length: Of a block-causal model: position p lies in block p // block_length, counted from the first real token.
        eos_token_ids: Tokens that end a text.
        num_text_tokens: Ids from here on, such as MMaDA's image tokens, are no text and are never predicted; None: all are text.

    Raises:
        ValueError: If the attention is another one, `block_length` does not go with it, or the mask token is no text.
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
        if self.name not in FAMILIES:
            raise ValueError(f"`name` must be one of {', '.join(FAMILIES)}, got {shown(self.name)}.")
        if self.attention not in ATTENTIONS:
            raise ValueError(f"`attention` must be one of {', '.join(ATTENTIONS)}, got {self.attention!r}.")
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


@dataclass
class OpenedTextModel:
    """A masked language model whose weights were not read yet."""

    family: TextFamily
    source: ModelSource
    tokenizer: PreTrainedTokenizerBase


# Published under model types of their own, with code that is not run; the tensors have the names of these classes.
_NATIVE: dict[str, tuple[str, type[PreTrainedModel], type]] = {
    "Dream": ("dream", Qwen2ForCausalLM, Qwen2Config),
    "sdar": ("sdar", Qwen3ForCausalLM, Qwen3Config),
    "a2d-llama": ("a2d", LlamaForCausalLM, LlamaConfig),
    "a2d-qwen2": ("a2d", Qwen2ForCausalLM, Qwen2Config),
    "a2d-qwen3": ("a2d", Qwen3ForCausalLM, Qwen3Config),
}
_SAVED: dict[str, tuple[type[PreTrainedModel], type]] = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config),
}
# Where any of these says something else, it is another network.
_QWEN: dict[str, Any] = {"hidden_act": "silu", "use_mrope": False, "use_sliding_window": False}
_SUPPORTED: dict[str, dict[str, Any]] = {
    "dream": _QWEN,
    "sdar": _QWEN,
    "a2d": _QWEN,
    "masked_lm": {"is_encoder_decoder": False, "is_decoder": False},
}
_CONFIG_FILES = ("config.json", "generation_config.json")
_TOKENIZER_FILES = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "tokenizer.model",
    "chat_template.*",
)
_MASK_TOKENS = ("<|mdm_mask|>", "<|MASK|>", "<|mask|>", "<MASK>", "[MASK]", "<mask>")
_END_TOKENS = ("<|eot_id|>", "<|im_end|>")
_SDAR_BLOCK_LENGTH = 4
_BD3LM_BLOCK_LENGTH = 32


def text_family(
    config: Any, tokenizer: PreTrainedTokenizerBase | None = None, block_length: int | None = None, name: str = ""
) -> TextFamily:
    """The family of a model, from its public config.json (a mapping) or from the configuration of a loaded model.

    Inferred, since no public configuration says it: logits of all but Dream are not shifted; the A2D models named "bd3lm" have
    blocks of 32; an SDAR without `block_size` has blocks of 4. The latter two are said in a warning.

    Args:
        config: A mapping, or a transformers configuration.
        tokenizer: Tells the mask token, where the configuration does not, and ends of text.
        block_length: Of a block-causal model, in place of the configuration's. Makes an A2D model block-causal.
        name: Of the repository; tells A2D models that were trained on blocks from the others.

    Raises:
        ValueError: If the family is not known here, or has no mask token.
    """
    settings: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
    kind = _kind(settings)
    if settings.get("text_family"):
        try:
            family = TextFamily(**settings["text_family"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"config.json: `text_family`: {error}") from None
        return family if block_length is None else _with_blocks(family, block_length)
    require_fields(settings, _SUPPORTED.get(kind, {}), "config.json")
    family = TextFamily(
        kind,
        _mask_token(settings, tokenizer),
        shifted=kind == "dream",
        eos_token_ids=_end_tokens(settings, tokenizer),
        num_text_tokens=settings.get("llm_vocab_size"),
    )
    if kind == "sdar":
        length = block_length or settings.get("block_size")
        if length is None:
            logger.warning(f"config.json has no `block_size`: blocks of {_SDAR_BLOCK_LENGTH} tokens are taken, as SDAR's.")
        return _with_blocks(family, length or _SDAR_BLOCK_LENGTH)
    if kind == "a2d" and block_length is None and "bd3lm" in name.lower():
        logger.warning(f"{name}: by its name it is block-causal; blocks of {_BD3LM_BLOCK_LENGTH} tokens are taken.")
        block_length = _BD3LM_BLOCK_LENGTH
    return family if block_length is None else _with_blocks(family, block_length)


def _with_blocks(family: TextFamily, block_length: int) -> TextFamily:
    if family.name not in ("sdar", "a2d"):
        raise ValueError(f"`block_length` must be None for {family.name}, whose attention is full, got {block_length!r}.")
    return replace(family, attention="block_causal", block_length=block_length)


def _kind(settings: Mapping[str, Any]) -> str:
    """The name of the family."""
    told = settings.get("model_type")
    model_type = told if isinstance(told, str) else None
    if settings.get("text_family"):
        with one_sentence("config.json: `text_family`"):
            return TextFamily(**settings["text_family"]).name
    if model_type in MODEL_TYPES:
        return str(model_type)
    if model_type == "llama" and not settings.get("is_causal", True):
        return "llada"
    if model_type in _NATIVE:
        return _NATIVE[model_type][0]
    if model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "masked_lm"
    if str(model_type).startswith("llada2"):
        why = "a mixture of experts for which transformers has no class of its own, and code of a repository is never run"
    elif model_type in _SAVED:
        why = "an ordinary causal language model, unless a `text_family` in its config.json says otherwise"
    else:
        why = "not known here"
    known = ", ".join([*MODEL_TYPES, *_NATIVE, "those of AutoModelForMaskedLM (bert, modernbert, ...)"])
    raise ValueError(f"config.json: the model type {shown(told)} is {why}. Known are {known}, and what was saved from them.")


def is_text_model(settings: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a family known here."""
    try:
        return bool(_kind(settings))
    except ValueError:
        return False


def _vocabulary(tokenizer: PreTrainedTokenizerBase | None) -> dict[str, int]:
    return {} if tokenizer is None else tokenizer.get_vocab()


def _mask_token(settings: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> int:
    vocabulary = _vocabulary(tokenizer)
    found = [settings.get("mask_token_id"), getattr(tokenizer, "mask_token_id", None), *map(vocabulary.get, _MASK_TOKENS)]
    for token in found:
        if token is not None:
            if token >= settings.get("vocab_size", token + 1):
                raise ValueError(
                    f"The mask token {token} must be below the `vocab_size` {settings['vocab_size']} of config.json."
                )
            return int(token)
    raise ValueError(
        f"No mask token: neither `mask_token_id` in config.json, nor a mask token of the tokenizer, nor one of "
        f"{', '.join(_MASK_TOKENS)} in its vocabulary."
    )


def _end_tokens(settings: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    """The ids of config.json and the tokenizer, and ends of a turn; [SEP] where there is none."""
    told = settings.get("eos_token_id")
    vocabulary = _vocabulary(tokenizer)
    found = [*(told if isinstance(told, (list, tuple)) else [told]), getattr(tokenizer, "eos_token_id", None)]
    found += [vocabulary.get(name) for name in _END_TOKENS]
    if all(token is None for token in found):
        found = [getattr(tokenizer, "sep_token_id", None)]
    return tuple(dict.fromkeys(int(token) for token in found if token is not None))


def open_text_model(repository: str | os.PathLike[str], *, block_length: int | None = None, **hub: Any) -> OpenedTextModel:
    """Opens a published repository, or a folder that `save_pretrained` wrote; no code of it runs.

    Args:
        repository: Folder or Hub id.
        block_length: Of a block-causal model, in place of what the repository says.
        hub: `revision`, `cache_dir`, `token` and `local_files_only`, as in `huggingface_hub.snapshot_download`.

    Raises:
        ValueError: If the model is of no family that is known here, saying what it is.
        OSError: If there is no such repository.
    """
    where = HubArguments(**hub)
    folder = local_folder(repository, [*_CONFIG_FILES, *_TOKENIZER_FILES], where)
    file = folder / "config.json"
    settings = read_json(file)
    check_settings(settings, file)
    _kind(settings)
    if (folder / "generation_config.json").exists():
        generation = read_json(folder / "generation_config.json")
        check_settings(generation, folder / "generation_config.json")
        settings["eos_token_id"] = _all_ends(settings, generation)
    tokenizer = open_tokenizer(folder)
    family = text_family(settings, tokenizer, block_length, Path(repository).name)
    if tokenizer.mask_token_id is None and isinstance(name := tokenizer.convert_ids_to_tokens(family.mask_token_id), str):
        tokenizer.mask_token = name
    folder = local_folder(repository, [*_CONFIG_FILES, "model*.safetensors*"], where)
    if not list(folder.glob("model*.safetensors*")):
        folder = local_folder(repository, [*_CONFIG_FILES, "pytorch_model*.bin*"], where)
    source = _open_model(folder, settings, family)
    build = source.build

    def build_with_family() -> PreTrainedModel:
        model = build()
        model.config.text_family = asdict(family)
        return model

    return OpenedTextModel(family, replace(source, build=build_with_family), tokenizer)


def check_settings(settings: Mapping[str, Any], file: Path) -> None:
    """Makes sure that the fields of a configuration that are read here are what they should be.

    Raises:
        ValueError: If one is of another type, naming it and the file.
    """

    def integers(value: Any) -> bool:
        return is_integer(value) or (isinstance(value, list) and all(map(is_integer, value)))

    for name, fits, wanted in (
        ("model_type", lambda value: isinstance(value, str), "a string"),
        ("text_family", lambda value: isinstance(value, dict), "an object"),
        ("eos_token_id", integers, "an integer or a list of integers"),
        *((name, is_integer, "an integer") for name in ("mask_token_id", "vocab_size", "llm_vocab_size", "block_size")),
    ):
        value = settings.get(name)
        if value is not None and not fits(value):
            raise ValueError(f"{file}: `{name}` must be {wanted}, got {shown(value)}.")


def _all_ends(*settings: Mapping[str, Any]) -> list[int] | None:
    """The `eos_token_id` of several configurations, each of them one id, several or none."""
    told = [one.get("eos_token_id") for one in settings]
    ids = [token for one in told for token in (one if isinstance(one, list) else [one]) if token is not None]
    return list(dict.fromkeys(ids)) or None


def open_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, without the code that comes with it."""
    file = folder / "tokenizer_config.json"
    settings = read_json(file) if file.is_file() else {}
    kind: Any = AutoTokenizer
    if "auto_map" in settings or not settings.get("tokenizer_class"):
        # What repositories bring code for are copies of Qwen2's tokenizer.
        if (folder / "tokenizer.json").is_file():
            kind = PreTrainedTokenizerFast
        elif (folder / "merges.txt").is_file():
            kind = Qwen2Tokenizer
    options: dict[str, Any] = {}
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if kind is AutoTokenizer and config:
        # It would read this file for the model's type alone, whatever else it says, and warn of types that it does not know.
        model_type, name = config.get("model_type"), config.get("tokenizer_class")
        known = isinstance(model_type, str) and model_type in CONFIG_MAPPING_NAMES
        own = CONFIG_MAPPING[model_type]() if known else PreTrainedConfig()
        own.tokenizer_class = name if isinstance(name, str) else None
        options = {"config": own}
    tokenizer = load_tokenizer(kind, folder, **options)
    tokenizer.init_kwargs.pop("auto_map", None)
    return tokenizer


def _open_model(folder: Path, settings: Mapping[str, Any], family: TextFamily) -> ModelSource:
    model_type = settings["model_type"]
    if model_type in MODEL_TYPES:
        return open_llada(folder)
    masked = model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if masked != (family.name == "masked_lm") or not (masked or model_type in (*_NATIVE, *_SAVED)):
        raise ValueError(
            f"{folder / 'config.json'}: the `text_family` {family.name!r} does not go with the model type {shown(model_type)}."
        )
    weights = find_weights(folder, WEIGHT_NAMES)
    check_sizes(settings, weights, folder / "config.json")
    if masked:
        return _open_masked_lm(folder, settings, weights)
    if model_type in _NATIVE:
        _, kind, config_class = _NATIVE[model_type]
    else:
        kind, config_class = _SAVED[model_type]
        kind = BidirectionalLlama if family.name in MODEL_TYPES else kind
    own = ("model_type", "architectures", "transformers_version", "torch_dtype", "dtype", "quantization_config")
    fields = {name: value for name, value in settings.items() if name not in own and (name, value) != ("rope_scaling", None)}
    config = stock_config(config_class, stock_settings(fields), folder / "config.json")
    return ModelSource(weights, lambda: kind(copy.deepcopy(config)), _probe(kind is BidirectionalLlama))


def _open_masked_lm(folder: Path, settings: Mapping[str, Any], weights: Checkpoint) -> ModelSource:
    file = folder / "config.json"
    config_class = CONFIG_MAPPING[settings["model_type"]]
    config, kind = stock_config(config_class, stock_settings(settings), file), MODEL_FOR_MASKED_LM_MAPPING[config_class]
    _check_masked_lm(config, kind, file)

    def build() -> PreTrainedModel:
        return kind(copy.deepcopy(config))

    key_mapping = {r"LayerNorm\.gamma": "LayerNorm.weight", r"LayerNorm\.beta": "LayerNorm.bias"}
    other_names = missing_tensors(build_skeleton(build, weights), {renamed(key, key_mapping) for key in weights.shapes})
    # Heads of other tasks may be left over.
    return (_RenamedSource if other_names else ModelSource)(weights, build, _probe(False), key_mapping, unused_keys="")


class _RenamedSource(ModelSource):
    """A model whose tensors have other names or shapes in files than in memory, as transformers alone knows."""

    @functools.cached_property
    def keys(self) -> dict[str, str]:
        """Every tensor of the model, by the name that it has there; `load` checks that they are all in the files."""
        return {name: name for name in self.skeleton.state_dict()}

    def load(self, dtype: torch.dtype | None = None) -> Any:
        """The model with its weights, in evaluation mode."""
        folder = self.checkpoint.files[0].parent
        model = load_component(type(self.skeleton), folder, dtype=self.checkpoint.computing_dtype(dtype))
        model.config.text_family = self.skeleton.config.text_family
        return model.eval().requires_grad_(False)

    def tensors(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and value of every tensor of the model."""
        yield from self.load(dtype).state_dict().items()

    def write(self, folder: Path, dtype: torch.dtype | None = None, shard_size: int = SHARD_SIZE) -> int:
        """Writes the model by its own `save_pretrained`, and returns the bytes of its weights."""
        model = self.load(dtype)
        with writing_natively(folder):
            model.save_pretrained(folder, max_shard_size=shard_size)
        return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _check_masked_lm(config: Any, kind: type[PreTrainedModel], file: Path) -> None:
    """Refuses networks that cannot predict the same alone and in a batch, or not here.

    Raises:
        ValueError: Saying why.
    """
    require_fields(config.to_dict(), _SUPPORTED["masked_lm"], file)
    why = None
    if "attention_mask" not in inspect.signature(kind.forward).parameters:
        why = "takes no attention mask: texts could not be padded"
    elif config.model_type == "mra":
        why = "leaves its attention out where a kernel of its own is not compiled"
    elif (config.model_type == "reformer" and "lsh" in config.attn_layers) or not getattr(config, "use_expectation", True):
        why = "draws the random numbers that its attention hashes tokens by anew in every call"
    if why is not None:
        raise ValueError(f"{file}: the model type {config.model_type!r} {why}.")
    if config.model_type == "xmod" and config.default_language not in config.languages:
        languages = ", ".join(map(str, config.languages))
        raise ValueError(f"{file}: `default_language` must be one of {languages}, got {config.default_language!r}.")
    if getattr(config, "attention_type", None) == "block_sparse":
        logger.warning(
            f"{file}: attention of the type 'block_sparse', which depends on the lengths of all texts so far, is replaced by "
            "'original_full', as the model does for short texts."
        )
        config.attention_type = "original_full"


def _probe(bare: bool) -> Callable[[Any], torch.Tensor]:
    @torch.no_grad()
    def probe(model: Any) -> torch.Tensor:
        output = model(torch.arange(8)[None] * 11 % model.config.vocab_size)
        return output if bare else output.logits

    return probe

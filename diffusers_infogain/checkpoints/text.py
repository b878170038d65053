"""Masked language models as they were published, opened on the classes of transformers."""

from __future__ import annotations

import copy
import functools
import inspect
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from transformers import (
    AutoTokenizer,
    Glm4MoeForCausalLM,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    Qwen3ForCausalLM,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from ..checks import LARGEST_INTEGER, is_integer, shown
from ..files import read_json
from ..models.llada import MODEL_TYPES, WEIGHT_NAMES, BidirectionalLlama, open_llada
from ..models.llada2 import KEY_MAPPING as LLADA2_KEYS
from ..models.llada2 import combined_tensors, glm4_moe_config
from ..models.text_family import SUPPORTED, TextFamily, check_family, eos_token_ids, text_family
from .configs import check_sizes, require_fields, stock_config, stock_settings
from .errors import writing_natively
from .repository import HubArguments, local_folder
from .saved import load_component, load_tokenizer
from .source import SHARD_SIZE, ModelSource, build_skeleton, missing_tensors, renamed
from .weights import Checkpoint, find_weights

logger = logging.get_logger("diffusers." + __name__)

_CLASSES: dict[str, type[PreTrainedModel]] = {
    # Published under model types of their own, with code that is not run; their tensors have the names of these classes.
    "Dream": Qwen2ForCausalLM,
    "sdar": Qwen3ForCausalLM,
    "a2d-llama": LlamaForCausalLM,
    "a2d-qwen2": Qwen2ForCausalLM,
    "a2d-qwen3": Qwen3ForCausalLM,
    # What `save_pretrained` writes.
    "llama": LlamaForCausalLM,
    "qwen2": Qwen2ForCausalLM,
    "qwen3": Qwen3ForCausalLM,
    "glm4_moe": Glm4MoeForCausalLM,
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


@dataclass
class OpenedTextModel:
    """A masked language model whose weights have not been read yet."""

    family: TextFamily
    source: ModelSource
    tokenizer: PreTrainedTokenizerBase


def open_text_model(repository: str | os.PathLike[str], *, block_length: int | None = None, **hub: Any) -> OpenedTextModel:
    """Opens a published repository, or a folder that `save_pretrained` wrote; no code of it runs.

    Args:
        repository: Folder or Hub id.
        block_length: As in `text_family`.
        hub: `revision`, `cache_dir`, `token` and `local_files_only`, as in `huggingface_hub.snapshot_download`.

    Raises:
        ValueError: If the model is not of a known family, saying what it is.
        OSError: If there is no such repository.
    """
    where = HubArguments(**hub)
    folder = local_folder(repository, [*_CONFIG_FILES, *_TOKENIZER_FILES], where)
    settings = _read_settings(folder)
    tokenizer = open_tokenizer(folder)
    family = text_family(settings, tokenizer, block_length, Path(repository).name)
    if tokenizer.mask_token_id is None and isinstance(name := tokenizer.convert_ids_to_tokens(family.mask_token_id), str):
        tokenizer.mask_token = name
    folder = local_folder(repository, [*_CONFIG_FILES, "model*.safetensors*"], where)
    if not list(folder.glob("model*.safetensors*")):
        folder = local_folder(repository, [*_CONFIG_FILES, "pytorch_model*.bin*"], where)
    source = _open_model(folder, settings, family)

    def build_with_family() -> PreTrainedModel:
        model = source.build()
        model.config.text_family = asdict(family)
        return model

    return OpenedTextModel(family, replace(source, build=build_with_family), tokenizer)


def _read_settings(folder: Path) -> dict[str, Any]:
    """The config.json of a known text model, with the end tokens of generation_config.json added to its own.

    Raises:
        ValueError: If the family is not known, or a field that is read here is of another type.
    """
    settings = read_json(folder / "config.json")
    _check_settings(settings, folder / "config.json")
    check_family(settings)
    file = folder / "generation_config.json"
    if file.exists():
        generation = read_json(file)
        _check_settings(generation, file)
        settings["eos_token_id"] = list(dict.fromkeys([*eos_token_ids(settings), *eos_token_ids(generation)])) or None
    return settings


def _check_settings(settings: Mapping[str, Any], file: Path) -> None:
    """Checks the types of the fields of a configuration that are read here.

    Raises:
        ValueError: For the first field of another type, naming the file.
    """

    def integer(value: Any) -> bool:
        return is_integer(value) and abs(value) <= LARGEST_INTEGER

    def integers(value: Any) -> bool:
        return integer(value) or (isinstance(value, list) and all(map(integer, value)))

    for name, fits, wanted in (
        ("model_type", lambda value: isinstance(value, str), "a string"),
        ("text_family", lambda value: isinstance(value, dict), "an object"),
        ("eos_token_id", integers, "an integer or a list of integers"),
        *((name, integer, "an integer") for name in ("mask_token_id", "vocab_size", "llm_vocab_size", "block_size")),
    ):
        value = settings.get(name)
        if value is not None and not fits(value):
            raise ValueError(f"{file}: `{name}` must be {wanted}, got {shown(value)}.")


def open_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, without the code that comes with it."""
    file = folder / "tokenizer_config.json"
    settings = read_json(file) if file.is_file() else {}
    cls: Any = AutoTokenizer
    if "auto_map" in settings or not settings.get("tokenizer_class"):
        # Tokenizers that come with code are copies of Qwen2's.
        if (folder / "tokenizer.json").is_file():
            cls = PreTrainedTokenizerFast
        elif (folder / "merges.txt").is_file():
            cls = Qwen2Tokenizer
    options: dict[str, Any] = {}
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if cls is AutoTokenizer and config:
        # AutoTokenizer would read config.json for the model type, and warn of types that it does not know.
        model_type, name = config.get("model_type"), config.get("tokenizer_class")
        known = isinstance(model_type, str) and model_type in CONFIG_MAPPING_NAMES
        own = CONFIG_MAPPING[model_type]() if known else PreTrainedConfig()
        own.tokenizer_class = name if isinstance(name, str) else None
        options = {"config": own}
    tokenizer = load_tokenizer(cls, folder, **options)
    tokenizer.init_kwargs.pop("auto_map", None)
    return tokenizer


def _open_model(folder: Path, settings: Mapping[str, Any], family: TextFamily) -> ModelSource:
    """The model of a folder, on the class of its model type.

    Raises:
        ValueError: If the family in its config.json does not go with the model type.
    """
    file = folder / "config.json"
    model_type = settings["model_type"]
    if model_type in MODEL_TYPES:
        return open_llada(folder)
    is_encoder = model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if is_encoder != (family.name == "masked_lm") or not (is_encoder or model_type in _CLASSES or model_type == "llada2_moe"):
        raise ValueError(f"{file}: the `text_family` {family.name!r} does not go with the model type {shown(model_type)}.")
    weights = find_weights(folder, WEIGHT_NAMES)
    check_sizes(settings, weights, file)
    if is_encoder:
        return _open_masked_lm(file, settings, weights)
    if model_type == "llada2_moe":
        own = glm4_moe_config(settings, file)
        parts = combined_tensors(own, weights)
        return ModelSource(parts, lambda: Glm4MoeForCausalLM(copy.deepcopy(own)), _probe, LLADA2_KEYS)
    cls = BidirectionalLlama if family.name in MODEL_TYPES else _CLASSES[model_type]
    not_the_networks = ("model_type", "architectures", "transformers_version", "torch_dtype", "dtype", "quantization_config")
    fields = {
        name: value
        for name, value in settings.items()
        if name not in not_the_networks and (name, value) != ("rope_scaling", None)
    }
    config = stock_config(cls.config_class, stock_settings(fields), file)
    if cls is Glm4MoeForCausalLM:
        weights = combined_tensors(config, weights)
    return ModelSource(weights, lambda: cls(copy.deepcopy(config)), _probe)


def _open_masked_lm(file: Path, settings: Mapping[str, Any], weights: Checkpoint) -> ModelSource:
    config_class = CONFIG_MAPPING[settings["model_type"]]
    cls = MODEL_FOR_MASKED_LM_MAPPING[config_class]
    config = stock_config(config_class, stock_settings(settings), file)
    _check_masked_lm(config, cls, file)

    def build() -> PreTrainedModel:
        return cls(copy.deepcopy(config))

    key_mapping = {r"LayerNorm\.gamma": "LayerNorm.weight", r"LayerNorm\.beta": "LayerNorm.bias"}
    other_names = missing_tensors(build_skeleton(build, weights), {renamed(key, key_mapping) for key in weights.shapes})
    # Heads of other tasks may be left over.
    return (_RenamedSource if other_names else ModelSource)(weights, build, _probe, key_mapping, unused_keys="")


class _RenamedSource(ModelSource):
    """A model whose tensors have other names or shapes in files than in memory, which only transformers can map."""

    takes_options = True

    @functools.cached_property
    def keys(self) -> dict[str, str]:
        """Every tensor of the model, by its own name; `load` checks that the files have them all."""
        return {name: name for name in self.skeleton.state_dict()}

    def load(self, dtype: torch.dtype | None = None, **options: Any) -> Any:
        """The model with its weights, in evaluation mode; `options` are those of its `from_pretrained`."""
        folder = self.checkpoint.files[0].parent
        model = load_component(type(self.skeleton), folder, dtype=self.checkpoint.computing_dtype(dtype), **options)
        model.config.text_family = self.skeleton.config.text_family
        return model.eval().requires_grad_(False)

    def tensors(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and value of every tensor of the model."""
        yield from self.load(dtype).state_dict().items()

    def write(self, folder: Path, dtype: torch.dtype | None = None, shard_size: int = SHARD_SIZE) -> int:
        """Writes the model with its own `save_pretrained`, and returns the size of its weights in bytes."""
        model = self.load(dtype)
        with writing_natively(folder):
            model.save_pretrained(folder, max_shard_size=shard_size)
        return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _check_masked_lm(config: Any, cls: type[PreTrainedModel], file: Path) -> None:
    """Checks that a network predicts the same for a text alone and in a batch, and anywhere.

    Raises:
        ValueError: Saying why.
    """
    require_fields(config.to_dict(), SUPPORTED["masked_lm"], file)
    why = None
    if "attention_mask" not in inspect.signature(cls.forward).parameters:
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


@torch.no_grad()
def _probe(model: Any) -> torch.Tensor:
    output = model(torch.arange(8)[None] * 11 % model.config.vocab_size)
    return output if isinstance(model, BidirectionalLlama) else output.logits

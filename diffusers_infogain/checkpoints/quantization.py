"""Quantisers of diffusers and transformers, for the models of a pipeline: by name, or by the configurations of either library."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ModelMixin, PipelineQuantizationConfig
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as DIFFUSERS_CONFIGS
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as TRANSFORMERS_CONFIGS

from ..checks import shown
from ..choices import QUANTIZATIONS
from ..extras import missing
from .errors import one_sentence

_BACKENDS = {"int8": "torchao", "fp8": "torchao", "int4": "torchao", "nf4": "bitsandbytes"}
_CONFIG_TYPES = (*set(DIFFUSERS_CONFIGS.values()), *set(TRANSFORMERS_CONFIGS.values()))


def named_quantization(name: str, of_diffusers: bool, dtype: torch.dtype | None = torch.bfloat16) -> Any:
    """The configuration that a name stands for, of diffusers or of transformers.

    Args:
        name: One of `QUANTIZATIONS`.
        of_diffusers: Whether it is for a model of diffusers.
        dtype: In which the model computes, if that is known; "int4" has kernels for bfloat16 only.

    Raises:
        ValueError: For an unknown name, or one that needs a GPU where there is none.
        ModuleNotFoundError: If the package is not installed that quantises.
    """
    if name not in QUANTIZATIONS:
        raise ValueError(
            f"`quantization_config` must be one of {', '.join(QUANTIZATIONS)}, or a configuration, got {shown(name)}."
        )
    backend = _BACKENDS[name]
    if importlib.util.find_spec(backend) is None:
        raise missing(f"The quantization {name} needs", backend, "quantization", backend)
    configs: Mapping[str, Any] = DIFFUSERS_CONFIGS if of_diffusers else TRANSFORMERS_CONFIGS
    if backend == "bitsandbytes":
        if of_diffusers and not torch.accelerator.is_available():
            raise ValueError(f"The quantization {name} needs a GPU for models of diffusers, got none: int8 and fp8 need none.")
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype or torch.bfloat16}
        return configs["bitsandbytes_4bit"](**options)
    if name == "int4" and not torch.cuda.is_available():
        raise ValueError("The quantization int4 needs a CUDA GPU, got none: int8 and fp8 need none.")
    if name == "int4" and dtype not in (torch.bfloat16, None):
        raise ValueError(f"`dtype` must be torch.bfloat16 for the quantization int4, got {dtype}.")
    from torchao.quantization import Float8WeightOnlyConfig, Int4WeightOnlyConfig, Int8WeightOnlyConfig

    kinds: dict[str, Any] = {
        "int8": lambda: Int8WeightOnlyConfig(version=2),
        "fp8": Float8WeightOnlyConfig,
        "int4": lambda: Int4WeightOnlyConfig(int4_packing_format="tile_packed_to_4d"),
    }
    return configs["torchao"](kinds[name]())


def check_quantization(value: Any, models: Mapping[str, type], network: str) -> None:
    """Checks a `quantization_config` before anything is loaded.

    Args:
        value: A name, a configuration, a dictionary of such by model, or a `PipelineQuantizationConfig`.
        models: The classes of the pipeline's models that are to be loaded, by name.
        network: The name of the model that predicts tokens, which a single name or configuration is for.

    Raises:
        ValueError: For anything else, or a model that is not to be loaded.
        ModuleNotFoundError: If the package is not installed that quantises.
    """
    if value is None:
        return
    if isinstance(value, PipelineQuantizationConfig):
        named = [*(value.quant_mapping or {}), *(value.components_to_quantize or [])]
    else:
        named = list(value) if isinstance(value, Mapping) else [network]
    for name in named:
        if name not in models:
            raise ValueError(f"`quantization_config` must be for models that are loaded, {', '.join(models)}, got {shown(name)}.")
    if isinstance(value, PipelineQuantizationConfig):
        return
    for name, config in (value if isinstance(value, Mapping) else {network: value}).items():
        if isinstance(config, str):
            named_quantization(config, issubclass(models[name], ModelMixin))
        elif not isinstance(config, _CONFIG_TYPES):
            raise ValueError(
                f"`quantization_config` must be one of {', '.join(QUANTIZATIONS)}, a configuration of diffusers or transformers, "
                f"a dictionary of such by model, or a PipelineQuantizationConfig, got {shown(config)}."
            )


def quantization_of(value: Any, name: str, of_diffusers: bool, is_network: bool, dtype: torch.dtype | None) -> Any:
    """The configuration for one model of a pipeline, or None if it is not to be quantised.

    Args:
        value: The pipeline's `quantization_config`.
        name: The model's name in the pipeline.
        of_diffusers: Whether the model is one of diffusers, not of transformers.
        is_network: Whether it is the model that predicts tokens, which a single name or configuration is for.
        dtype: In which the model computes.

    Raises:
        ValueError: For a configuration that has no counterpart in the model's library.
    """
    if isinstance(value, PipelineQuantizationConfig):
        value = value._resolve_quant_config(is_diffusers=of_diffusers, module_name=name)
    elif isinstance(value, Mapping):
        value = value.get(name)
    elif not is_network:
        value = None
    if isinstance(value, str):
        return named_quantization(value, of_diffusers, dtype)
    return None if value is None else _of_library(value, name, of_diffusers)


def _of_library(config: Any, name: str, of_diffusers: bool) -> Any:
    """A configuration as the library of a model has it."""
    own: Mapping[str, Any] = DIFFUSERS_CONFIGS if of_diffusers else TRANSFORMERS_CONFIGS
    if isinstance(config, tuple(set(own.values()))):
        return config
    values = config.to_dict()
    method = values.pop("quant_method")
    method = {"bitsandbytes": "bitsandbytes_8bit"}.get(
        str(getattr(method, "value", method)), str(getattr(method, "value", method))
    )
    library = "diffusers" if of_diffusers else "transformers"
    if method not in own:
        raise ValueError(f"`quantization_config` for `{name}` must be of a kind that {library} has, got {type(config).__name__}.")
    with one_sentence(f"`quantization_config` for `{name}` makes no configuration of {library}"):
        return own[method].from_dict({key: entry for key, entry in values.items() if not key.startswith("_")})

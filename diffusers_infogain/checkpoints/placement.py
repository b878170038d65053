"""How the models of a pipeline are loaded: quantised, on which devices, with which attention.

These arguments of `from_pretrained` mean the same for published repositories and for folders in diffusers' format. They are
carried out by the loaders of diffusers and transformers.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map, init_empty_weights
from accelerate.utils import get_balanced_memory, get_max_memory, set_module_tensor_to_device
from diffusers import ModelMixin
from diffusers.quantizers import DiffusersAutoQuantizer
from diffusers.utils import logging
from transformers import GenerationMixin, PreTrainedModel

from ..checks import check_type, shown
from ..devices import device_of
from .errors import one_sentence
from .quantization import check_quantization, quantization_of
from .saved import check_report, quietly
from .source import ModelSource

logger = logging.get_logger("diffusers." + __name__)

BY_LAYER = ("auto", "balanced_low_0", "sequential")
"""Device maps that spread the layers of each model, as in transformers; "balanced" spreads whole models, as in diffusers."""
ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")
_OF_ANY_MASK = ("eager", "sdpa", "flex_attention")


@dataclass(frozen=True)
class Placement:
    """Arguments of `from_pretrained`; the defaults load every model on the CPU as it is stored.

    Attributes:
        quantization_config: One of `choices.QUANTIZATIONS` or a configuration of diffusers or transformers, for the model that
            predicts tokens; a dictionary of such by model; or diffusers' `PipelineQuantizationConfig`.
        device_map: A device for all models; "balanced" to spread whole models over the accelerators; "auto", "balanced_low_0" or
            "sequential" to spread the layers of each; or a dictionary with one of these, or a device map of its layers, for each
            model.
        max_memory: By device, how much of its memory to use, as in accelerate.
        offload_folder: For layers that a device map puts on the disk.
        attn_implementation: How models of transformers compute attention.
    """

    quantization_config: Any = None
    device_map: Any = None
    max_memory: Mapping[int | str, int | str] | None = None
    offload_folder: Any = None
    attn_implementation: str | None = None

    @classmethod
    def take(cls, arguments: dict[str, Any]) -> Placement:
        """Removes these arguments from those of a call."""
        return cls(**{field.name: arguments.pop(field.name) for field in fields(cls) if field.name in arguments})

    def check(self, pipeline: Any, models: Mapping[str, type]) -> None:
        """Checks all arguments before anything is loaded.

        Args:
            pipeline: The pipeline's class.
            models: The classes of the models to load, by name.

        Raises:
            ValueError: For the first that does not fit.
        """
        check_quantization(self.quantization_config, models, pipeline.compiled_component)
        check_type("max_memory", self.max_memory, (Mapping, type(None)), "a dictionary by device or None")
        devices = self.device_map.values() if isinstance(self.device_map, Mapping) else [self.device_map]
        for name in self.device_map if isinstance(self.device_map, Mapping) else ():
            if name not in models:
                raise ValueError(f"`device_map` must be for the models {', '.join(models)}, got {shown(name)}.")
        for device in devices:
            if not (device is None or isinstance(device, Mapping) or device in (*BY_LAYER, "balanced")):
                check_device(device)
        if self.attn_implementation is not None:
            self._check_attention(pipeline, models)

    def _check_attention(self, pipeline: Any, models: Mapping[str, type]) -> None:
        given = self.attn_implementation
        if given not in ATTENTION:
            raise ValueError(f"`attn_implementation` must be one of {', '.join(ATTENTION)}, got {shown(given)}.")
        stock = {name: cls for name, cls in models.items() if issubclass(cls, PreTrainedModel)}
        if not stock:
            raise ValueError(
                f"`attn_implementation` is for models of transformers, of which {pipeline.__name__} has none: "
                "`pipe.transformer.set_attention_backend` is for those of diffusers."
            )
        if given not in _OF_ANY_MASK and any(issubclass(cls, GenerationMixin) for cls in stock.values()):
            raise ValueError(
                f"`attn_implementation` must be one of {', '.join(_OF_ANY_MASK)} for {pipeline.__name__}, whose masks say what "
                f"each token sees, got {given!r}."
            )

    def places(self, sizes: Mapping[str, int]) -> dict[str, Any]:
        """The device map of each model; `sizes` are the bytes of the models by name, which "balanced" reads."""
        if self.device_map is None:
            return {}
        if isinstance(self.device_map, Mapping):
            return dict(self.device_map)
        if self.device_map == "balanced" and len(sizes) > 1:
            memory = get_max_memory(None if self.max_memory is None else dict(self.max_memory))
            return balanced(sizes, {device: size for device, size in memory.items() if device not in ("cpu", "disk")})
        return dict.fromkeys(sizes, self.device_map)

    def options(
        self,
        pipeline: Any,
        models: Mapping[str, type],
        places: Mapping[str, Any],
        dtype_of: Callable[[str], torch.dtype | None],
    ) -> dict[str, dict[str, Any]]:
        """What the `from_pretrained` of each model's class gets.

        Args:
            pipeline: The pipeline's class.
            models: The classes of the models to load, by name.
            places: From `places`.
            dtype_of: From a model's name to the dtype that it is loaded in, or None.
        """
        found: dict[str, dict[str, Any]] = {}
        for name, cls in models.items():
            own = issubclass(cls, ModelMixin)
            network = name == pipeline.compiled_component
            options = {
                "quantization_config": quantization_of(self.quantization_config, name, own, network, dtype_of(name)),
                "device_map": self._of_diffusers(cls, places.get(name)) if own else places.get(name),
                "max_memory": None if self.max_memory is None else dict(self.max_memory),
                "offload_folder": self.offload_folder,
                "attn_implementation": None if own else self.attn_implementation,
            }
            found[name] = {key: value for key, value in options.items() if value is not None}
        return found

    def _of_diffusers(self, cls: type, place: Any) -> Any:
        """The device map of a model of diffusers; those whose layers cannot be separated lie on one device.

        None stands for the CPU: with a device map, diffusers takes models there for offloaded ones, and does not quantise them.
        """
        if isinstance(place, Mapping) or place is None:
            return place
        accelerator = torch.accelerator.current_accelerator()
        if place in (*BY_LAYER, "balanced"):
            together = not getattr(cls, "_no_split_modules", None)
            if together or (accelerator is None and self.max_memory is None):
                place = accelerator
        return None if str(place) in ("cpu", "None") else place

    def finish(self, pipe: Any, places: Mapping[str, Any]) -> Any:
        """Makes models on several devices take inputs from any, and records the device map as diffusers does.

        Warns of experts that were not quantised.
        """
        for name, model in pipe.components.items():
            if self.quantization_config is not None and getattr(model, "hf_quantizer", None) is not None:
                _warn_of_experts(name, model)
        if self.device_map is None:
            return pipe
        if not isinstance(self.device_map, Mapping) and self.device_map not in (*BY_LAYER, "balanced"):
            pipe.hf_device_map = str(torch.device(self.device_map))
            return pipe
        models = {name: getattr(pipe, name) for name in places if getattr(pipe, name, None) is not None}
        if len({str(device_of(model)) for model in models.values()}) > 1:
            for model in models.values():
                if not hasattr(model, "_hf_hook"):
                    dispatch_model(model, device_map={"": device_of(model)}, force_hooks=True)
        pipe.hf_device_map = {name: getattr(model, "hf_device_map", device_of(model)) for name, model in models.items()}
        return pipe


def _warn_of_experts(name: str, model: torch.nn.Module) -> None:
    """Warns if experts, which are stacked tensors and no layers, stay as they are in a model that was quantised."""
    weights = list(model.named_parameters())
    whole = [tensor for key, tensor in weights if "experts" in key and tensor.ndim == 3 and type(tensor) is torch.nn.Parameter]
    if whole:
        share = sum(map(torch.numel, whole)) / sum(tensor.numel() for _, tensor in weights)
        logger.warning(
            f"`quantization_config` leaves the experts of `{name}` as they are, {share:.0%} of its weights, since they are no "
            "linear layers: docs/memory.md says how to quantise them."
        )


def check_device(device: Any) -> None:
    """Raises a ValueError if something is no device of this machine."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"`device_map` must be a device that this machine has, balanced, {', '.join(BY_LAYER)} or a dictionary by model, got "
            f"{shown(device)}: {reason}."
        ) from None


def balanced(sizes: Mapping[str, int], memory: Mapping[Any, int]) -> dict[str, Any]:
    """A device for each model: the largest first, each where most memory is left, or on the CPU if it does not fit.

    Args:
        sizes: Bytes of the models.
        memory: Bytes of the accelerators.
    """
    left = dict(memory)
    places: dict[str, Any] = {}
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        device = max(left, key=left.__getitem__, default=None)
        if device is None or left[device] < size:
            places[name] = "cpu"
        else:
            places[name] = device
            left[device] -= size
    return places


@dataclass(frozen=True)
class _Deferred:
    """A tensor that is read once transformers indexes it, as it does with the slices of a safetensors file."""

    read: Callable[[], torch.Tensor]

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.read()[index]


def load_source(source: ModelSource, dtype: torch.dtype | None, options: Mapping[str, Any]) -> Any:
    """A model with its weights, in evaluation mode, read tensor by tensor.

    Args:
        source: The model in a published checkpoint.
        dtype: As in `ModelSource.load`.
        options: From `Placement.options`.

    Raises:
        ValueError: If it cannot be loaded so.
    """
    _ = source.keys  # checks them before anything is read
    name = type(source.skeleton).__name__
    with one_sentence(f"{source.checkpoint.described} cannot be loaded as {name}"):
        if source.takes_options or not options:
            model = source.load(dtype, **options)
        elif isinstance(source.skeleton, PreTrainedModel):
            model = _load_stock(source, source.checkpoint.computing_dtype(dtype), options)
        else:
            model = _load_own(source, source.checkpoint.computing_dtype(dtype), **options)
    return model.eval().requires_grad_(False)


def _load_stock(source: ModelSource, dtype: torch.dtype, options: Mapping[str, Any]) -> Any:
    """A model of transformers, which quantises and places tensors as they are read."""
    tensors = {name: _Deferred(functools.partial(source.tensor, name, dtype)) for name in source.keys}
    with quietly():
        model, info = type(source.skeleton).from_pretrained(
            None,
            config=copy.deepcopy(source.skeleton.config),
            state_dict=tensors,
            dtype=dtype,
            output_loading_info=True,
            **options,
        )
    check_report(model, source.checkpoint, info)
    return model


def _load_own(
    source: ModelSource,
    dtype: torch.dtype,
    quantization_config: Any = None,
    device_map: Any = None,
    max_memory: dict[Any, Any] | None = None,
    offload_folder: Any = None,
) -> Any:
    """A model of diffusers, whose `from_pretrained` reads files with the model's own names only."""
    by_layer = isinstance(device_map, Mapping) or device_map in (*BY_LAYER, "balanced")
    device = torch.device("cpu" if by_layer or device_map is None else device_map)
    with init_empty_weights(include_buffers=False):
        model = source.build()
    quantizer = None
    if quantization_config is not None:
        quantizer = DiffusersAutoQuantizer.from_config(copy.deepcopy(quantization_config), pre_quantized=False)
        place = None if device.type == "cpu" else {"": device}
        quantizer.validate_environment(torch_dtype=dtype, device_map=place)
        dtype = quantizer.update_torch_dtype(dtype)
        place = quantizer.update_device_map(place)
        device = torch.device(place[""] if place else "cpu")
        kept = list(getattr(model, "_keep_in_fp32_modules", None) or [])
        quantizer.preprocess_model(model=model, device_map=place, keep_in_fp32_modules=kept)
    for name, tensor in source.tensors(dtype):
        own = {name: tensor}
        if quantizer is not None and quantizer.check_if_quantized_param(model, tensor, name, own, param_device=device):
            quantizer.create_quantized_param(model, tensor, name, device, own, [], dtype=dtype)
        else:
            set_module_tensor_to_device(model, name, device, value=tensor, dtype=tensor.dtype)
    for buffer_name, buffer in list(model.named_buffers()):
        set_module_tensor_to_device(model, buffer_name, device, value=buffer)
    source.tie(model)
    if quantizer is not None:
        quantizer.postprocess_model(model)
        model.hf_quantizer = quantizer
        model.register_to_config(quantization_config=quantizer.quantization_config, _pre_quantization_dtype=dtype)
    if by_layer:
        whole = list(getattr(model, "_no_split_modules", None) or [])
        if not isinstance(device_map, Mapping):
            if device_map != "sequential":
                low = device_map == "balanced_low_0"
                max_memory = get_balanced_memory(model, max_memory, no_split_module_classes=whole, low_zero=low)
            device_map = infer_auto_device_map(model, max_memory, no_split_module_classes=whole)
        model = dispatch_model(model, dict(device_map), offload_dir=offload_folder)
    return model

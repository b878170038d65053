"""LoRA: layers of the transformer and the text encoder of aMUSEd and Meissonic, and of language models."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.utils import USE_PEFT_BACKEND
from safetensors.torch import save_file

from .checkpoints.repository import HubArguments, local_folder
from .checkpoints.source import renamed
from .checkpoints.weights import Checkpoint
from .components import check_components, unwrapped
from .files import local_path, read_json
from .models.llada import KEY_MAPPING

_PEFT_PREFIX = "base_model.model."
COMPONENTS = ("transformer", "text_encoder")


class AmusedLoraMixin(StableDiffusionLoraLoaderMixin):
    """Loads and saves LoRA files of aMUSEd and Meissonic as the aMUSEd mixin of diffusers does, which is deprecated there."""

    _lora_loadable_modules = list(COMPONENTS)
    transformer: Any
    text_encoder: Any

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """Loads LoRA layers of the transformer and of the text encoder (needs peft: the extra "lora").

        Args:
            pretrained_model_name_or_path_or_dict: Hub id, folder, file or state dict. Files must be safetensors, unless
                `use_safetensors=False` is given.
            adapter_name: Name of the adapter.
            hotswap: Whether to replace the layers of the adapter of that name.
            kwargs: As in `diffusers.loaders.StableDiffusionLoraLoaderMixin.lora_state_dict`, and `low_cpu_mem_usage`.

        Raises:
            ImportError: If peft is missing, or too old for diffusers.
            ValueError: For layers that neither component has, or that have another shape there.
        """
        if not USE_PEFT_BACKEND:
            raise ImportError("`load_lora_weights` needs peft in a version that diffusers supports: install the extra 'lora'.")
        options = {"adapter_name": adapter_name, "hotswap": hotswap, "_pipeline": self}
        if "low_cpu_mem_usage" in kwargs:
            options["low_cpu_mem_usage"] = kwargs.pop("low_cpu_mem_usage")
        source = pretrained_model_name_or_path_or_dict
        state_dict, alphas, metadata = self.lora_state_dict(
            dict(source) if isinstance(source, dict) else source,
            **{"use_safetensors": True, **kwargs, "return_lora_metadata": True},
        )
        self._check_layers(state_dict)
        options |= {"network_alphas": alphas, "metadata": metadata}
        if any(key.startswith("transformer.") for key in state_dict):
            self.transformer.load_lora_adapter(state_dict, prefix="transformer", **options)
        if any(key.startswith("text_encoder.") for key in state_dict):
            self.load_lora_into_text_encoder(
                state_dict, text_encoder=self.text_encoder, prefix="text_encoder", lora_scale=self.lora_scale, **options
            )

    def _check_layers(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Raises a ValueError that names the first layer that does not fit this pipeline."""
        if not state_dict:
            raise ValueError("`pretrained_model_name_or_path_or_dict` must hold LoRA layers, got no tensor.")
        modules: dict[str, dict[str, torch.nn.Module]] = {}
        for key, tensor in state_dict.items():
            component, _, rest = key.partition(".")
            if component not in COMPONENTS or "lora" not in rest:
                raise ValueError(
                    "`pretrained_model_name_or_path_or_dict` must hold LoRA layers of `transformer` and `text_encoder` only, "
                    f"whose names start with one of these words and contain 'lora', got {key!r}."
                )
            check_components(self, component)
            if component not in modules:
                modules[component] = dict(unwrapped(getattr(self, component)).named_modules())
            layer, found, part = rest.partition(".lora_")
            if not found or part not in ("A.weight", "B.weight"):  # an older format, which diffusers converts
                continue
            module = modules[component].get(layer) or modules[component].get(layer.removeprefix("text_model."))
            if module is None:
                raise ValueError(f"`{component}` has no layer {layer!r}: these LoRA layers belong to another model.")
            axis, weight = (1 if part == "A.weight" else 0), module.get_parameter("weight")
            if weight.shape[axis] != tensor.shape[axis]:
                raise ValueError(
                    f"The LoRA layer {key!r} must have the size {weight.shape[axis]} along dimension {axis} for this pipeline, "
                    f"got a shape of {tuple(tensor.shape)}."
                )

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike[str],
        text_encoder_lora_layers: torch.nn.Module | dict[str, torch.Tensor] | None = None,
        transformer_lora_layers: torch.nn.Module | dict[str, torch.Tensor] | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Callable[..., None] | None = None,
        safe_serialization: bool = True,
        transformer_lora_adapter_metadata: dict[str, Any] | None = None,
        text_encoder_lora_adapter_metadata: dict[str, Any] | None = None,
    ) -> None:
        """Writes LoRA layers, such as `peft.get_peft_model_state_dict(pipe.transformer)`, for `load_lora_weights`.

        Args:
            save_directory: Folder; it is created if necessary.
            text_encoder_lora_layers, transformer_lora_layers: Modules or state dicts; at least one of the two.
            transformer_lora_adapter_metadata, text_encoder_lora_adapter_metadata: Their peft configuration, such as
                `pipe.transformer.peft_config["default"].to_dict()`; without it the scale α / r is assumed to be 1.
            is_main_process, weight_name, save_function, safe_serialization: As in diffusers.

        Raises:
            ValueError: If no layers are given.
        """
        layers = {"transformer": transformer_lora_layers, "text_encoder": text_encoder_lora_layers}
        settings = {"transformer": transformer_lora_adapter_metadata, "text_encoder": text_encoder_lora_adapter_metadata}
        if not any(layers.values()):
            raise ValueError("`transformer_lora_layers` or `text_encoder_lora_layers` must be given.")
        cls.write_lora_layers(
            {key: tensor for name, value in layers.items() if value for key, tensor in cls.pack_weights(value, name).items()},
            str(save_directory),
            is_main_process,
            weight_name,
            save_function,
            safe_serialization,
            {f"{name}.{key}": entry for name, value in settings.items() for key, entry in (value or {}).items()} or None,
        )

    def fuse_lora(
        self,
        components: Sequence[str] = COMPONENTS,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """As diffusers' `fuse_lora`, for all components that may have LoRA layers by default."""
        super().fuse_lora(list(components), lora_scale, safe_fusing, adapter_names, **kwargs)

    def unfuse_lora(self, components: Sequence[str] = COMPONENTS, **kwargs: Any) -> None:
        """As diffusers' `unfuse_lora`, for all components that may have LoRA layers by default."""
        super().unfuse_lora(list(components), **kwargs)


class LanguageModelLoraMixin(LoraBaseMixin):
    """LoRA for pipelines whose tokens are predicted by a language model of transformers, in peft's own file format.

    Layers may have the names of the published LLaDA code, or those of transformers.
    """

    compiled_component: ClassVar[str]

    @property
    def _lora_loadable_modules(self) -> list[str]:
        return [self.compiled_component]

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        lora_alpha: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Loads LoRA layers of the language model (needs peft: the extra "lora").

        Args:
            pretrained_model_name_or_path_or_dict: Hub id, folder, file or state dict, such as peft writes them.
            adapter_name: Name of the adapter; by default a new one.
            lora_alpha: α of layers whose scale is α / r; by default that of adapter_config.json, or without that file r.
            kwargs: `weight_name`, `subfolder`, and the Hub's `revision`, `cache_dir`, `token` and `local_files_only`.

        Raises:
            ImportError: If peft is missing, or too old for diffusers.
            ValueError: For a name that is taken, or layers that the model does not have, or of another kind or shape.
        """
        if not USE_PEFT_BACKEND:
            raise ImportError("`load_lora_weights` needs peft in a version that diffusers supports: install the extra 'lora'.")
        import peft

        component = self.compiled_component
        check_components(self, component)
        model = unwrapped(getattr(self, component))
        used = getattr(model, "peft_config", {})
        name = f"default_{len(used)}" if adapter_name is None else adapter_name
        if name in used:
            raise ValueError(f"`adapter_name` must be a new name, got {name!r}, which is one of {', '.join(used)}.")
        known = ("weight_name", "subfolder", *HubArguments.names())
        for argument in kwargs:
            if argument not in known:
                raise TypeError(f"load_lora_weights() got an unexpected keyword argument {argument!r}")
        tensors, settings = _read_adapter(pretrained_model_name_or_path_or_dict, kwargs)
        layers = _language_model_layers(tensors, model, component)
        ranks = {layer: tensor.shape[0] for layer, part, tensor in layers if part == "A"}
        rank = max(set(ranks.values()), key=list(ranks.values()).count)
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=lora_alpha or settings.get("lora_alpha") or rank,
            use_rslora=bool(settings.get("use_rslora")),
            target_modules=list(ranks),
            rank_pattern={f"^{re.escape(layer)}$": value for layer, value in ranks.items() if value != rank},
        )
        offloaded, by_layer, *_ = self._optionally_disable_offloading(self)
        peft.inject_adapter_in_model(config, model, adapter_name=name)
        state = {f"{layer}.lora_{part}.weight": tensor for layer, part, tensor in layers}
        peft.set_peft_model_state_dict(model, state, adapter_name=name)
        model._hf_peft_config_loaded = True
        model.requires_grad_(False)
        if offloaded:
            self.enable_model_cpu_offload()
        elif by_layer:
            self.enable_sequential_cpu_offload()

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike[str],
        lora_layers: dict[str, torch.Tensor],
        adapter_config: Any = None,
    ) -> None:
        """Writes LoRA layers as peft does, for `load_lora_weights` and for `peft.PeftModel.from_pretrained`.

        Args:
            save_directory: Folder; it is created if necessary.
            lora_layers: Such as `peft.get_peft_model_state_dict(pipe.model, adapter_name="style")`.
            adapter_config: Their configuration, such as `pipe.model.peft_config["style"]`; without it the scale α / r is taken
                to be 1.

        Raises:
            ValueError: If no layers are given.
        """
        if not lora_layers:
            raise ValueError("`lora_layers` must hold LoRA layers, got none.")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{_PEFT_PREFIX}{key.removeprefix(_PEFT_PREFIX)}": value.contiguous() for key, value in lora_layers.items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        if adapter_config is not None:
            adapter_config.save_pretrained(folder)

    def fuse_lora(
        self,
        components: Sequence[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """As diffusers' `fuse_lora`; the only component that may have LoRA layers is the default."""
        super().fuse_lora(list(components or [self.compiled_component]), lora_scale, safe_fusing, adapter_names, **kwargs)

    def unfuse_lora(self, components: Sequence[str] | None = None, **kwargs: Any) -> None:
        """As diffusers' `unfuse_lora`; the only component that may have LoRA layers is the default."""
        super().unfuse_lora(list(components or [self.compiled_component]), **kwargs)


def _read_adapter(source: Any, options: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of LoRA layers, and the settings of adapter_config.json beside them."""
    if isinstance(source, dict):
        return source, {}
    path = local_path(source)
    hub = HubArguments(**HubArguments.given(options))
    patterns = ["*adapter_config.json", "*adapter_model.safetensors", "*pytorch_lora_weights.safetensors"]
    patterns += [options["weight_name"]] if options.get("weight_name") else []
    folder = path.parent if path.is_file() else local_folder(source, patterns, hub) / (options.get("subfolder") or "")
    names = ["adapter_model.safetensors", "pytorch_lora_weights.safetensors"]
    names = [options["weight_name"]] if options.get("weight_name") else names
    files = [path] if path.is_file() else [folder / name for name in names if (folder / name).is_file()]
    if not files:
        raise ValueError(f"{folder} must hold LoRA layers in {' or '.join(names)}, but has no such file.")
    checkpoint = Checkpoint(files[:1])
    settings = read_json(folder / "adapter_config.json") if (folder / "adapter_config.json").is_file() else {}
    unsupported = [name for name in ("alpha_pattern", "use_dora", "modules_to_save") if settings.get(name)]
    if settings.get("peft_type", "LORA") != "LORA" or unsupported:
        found = f"`{unsupported[0]}`" if unsupported else repr(settings["peft_type"])
        raise ValueError(f"{folder / 'adapter_config.json'} must be that of plain LoRA layers, got {found}.")
    return {key: checkpoint.tensor(key) for key in checkpoint.shapes}, settings


def _language_model_layers(
    tensors: dict[str, torch.Tensor], model: torch.nn.Module, component: str
) -> list[tuple[str, str, torch.Tensor]]:
    """The layer in a model, the part "A" or "B", and the value of each tensor.

    Raises:
        ValueError: For the first tensor that does not fit the model.
    """
    modules = dict(model.named_modules())
    found = []
    for key, tensor in tensors.items():
        match = re.fullmatch(rf"(?:{re.escape(_PEFT_PREFIX)})?(.+)\.lora_([AB])(?:\.\w+)?\.weight", key)
        if match is None:
            raise ValueError(f"`pretrained_model_name_or_path_or_dict` must hold LoRA layers (lora_A, lora_B) only, got {key!r}.")
        names = [renamed(f"{name}.weight", KEY_MAPPING) for name in (match[1], match[1].removeprefix(f"{component}."))]
        layer = next((name for name in (name.removesuffix(".weight") for name in names) if name in modules), None)
        if layer is None:
            raise ValueError(f"`{component}` has no layer {match[1]!r}: these LoRA layers belong to another model.")
        module = modules[layer]
        sizes = {"A": getattr(module, "in_features", None), "B": getattr(module, "out_features", None)}
        if tensor.shape[1 if match[2] == "A" else 0] != sizes[match[2]]:
            axis = 1 if match[2] == "A" else 0
            raise ValueError(
                f"The LoRA layer {key!r} must have the size {sizes[match[2]]} along dimension {axis} for this pipeline, got a "
                f"shape of {tuple(tensor.shape)}."
            )
        found.append((layer, match[2], tensor))
    if not found:
        raise ValueError("`pretrained_model_name_or_path_or_dict` must hold LoRA layers, got no tensor.")
    return found

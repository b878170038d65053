"""LoRA for models in aMUSEd's format: layers of the transformer and of the text encoder."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import USE_PEFT_BACKEND

from .components import check_components, unwrapped

COMPONENTS = ("transformer", "text_encoder")


class AmusedLoraMixin(StableDiffusionLoraLoaderMixin):
    """Loads and saves LoRA files as the aMUSEd mixin of diffusers does, which is deprecated there."""

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

"""Where the models of a pipeline run: models on several devices, and groups of layers that wait elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from .components import unwrapped


def device_of(model: Any) -> torch.device:
    """The device that a model computes on, which may not be where its weights wait."""
    device = getattr(getattr(unwrapped(model), "_hf_hook", None), "execution_device", None)
    if device is not None:
        return torch.device(device)
    devices = (parameter.device for parameter in model.parameters())
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))


class DevicesMixin:
    """What image and text pipelines know of the devices of their models."""

    compiled_component: ClassVar[str]
    hf_device_map: Any
    components: dict[str, Any]

    @property
    def _execution_device(self) -> torch.device:
        """Where samples are decoded: with a device map of several models, the device of the one that predicts tokens."""
        network = getattr(self, self.compiled_component)
        if isinstance(self.hf_device_map, dict) and network is not None:
            return device_of(network)
        return super()._execution_device  # type: ignore[misc]

    def device_of(self, component: str) -> torch.device:
        """The device that a component's inputs belong to."""
        model = getattr(self, component)
        return device_of(model) if isinstance(self.hf_device_map, dict) and model is not None else self._execution_device

    def enable_group_offload(
        self, onload_device: torch.device, *options: Any, exclude_modules: str | Sequence[str] | None = None, **more: Any
    ) -> None:
        """As in diffusers, for all models that support it; image tokenizers, which do not, are put on `onload_device`.

        Args:
            onload_device: Where layers run.
            exclude_modules: Further components that are put there as a whole.
            options, more: As in `DiffusionPipeline.enable_group_offload`.
        """
        excluded = [exclude_modules] if isinstance(exclude_modules, str) else list(exclude_modules or ())
        for name, model in self.components.items():
            if not getattr(model, "_supports_group_offloading", True):
                excluded.append(name)
        super().enable_group_offload(onload_device, *options, exclude_modules=excluded, **more)  # type: ignore[misc]

"""Images that record how they were generated, and keep the record in PNG files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import PIL.Image

from .image_files import METADATA_KEY, png_information


class Picture(PIL.Image.Image):
    """A PIL image with its settings as JSON in `info["infogain"]`, which PNG files keep.

    Pillow's operations (resizing, cropping, converting) return plain images, because the settings no longer reproduce them.
    """

    @classmethod
    def of(cls, image: PIL.Image.Image, settings: Mapping[str, Any]) -> Picture:
        """A copy of the image that records these settings."""
        picture = cls()
        vars(picture).update(vars(image))
        picture.info = {**image.info, METADATA_KEY: json.dumps(settings, allow_nan=False)}
        return picture

    @property
    def settings(self) -> dict[str, Any]:
        """What the image records: its settings, and in "trace" how it was decoded."""
        return json.loads(self.info[METADATA_KEY])

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:
        """As in Pillow; if `pnginfo` is given, the settings are not saved."""
        params.setdefault("pnginfo", png_information(self.info[METADATA_KEY]) if METADATA_KEY in self.info else None)
        super().save(fp, format, **params)

    def copy(self) -> Picture:
        """A copy that keeps the settings."""
        picture = type(self)()
        vars(picture).update(vars(super().copy()))
        return picture

    __copy__ = copy

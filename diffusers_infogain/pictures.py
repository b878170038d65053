"""Images that carry how they were made, also into the files that users save them as."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import PIL.Image

from .image_files import METADATA_KEY, png_information


class Picture(PIL.Image.Image):
    """A PIL image with its settings as JSON in `info["infogain"]`; a PNG file that it is saved as holds them too.

    What Pillow makes of it (resized, cut, converted) is a plain image, since those are no longer the settings' pixels.
    """

    @classmethod
    def of(cls, image: PIL.Image.Image, settings: Mapping[str, Any]) -> Picture:
        """The image with settings."""
        picture = cls()
        vars(picture).update(vars(image))
        picture.info = {**image.info, METADATA_KEY: json.dumps(settings, allow_nan=False)}
        return picture

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:
        """As Pillow's; the settings are left out where `pnginfo` is given."""
        params.setdefault("pnginfo", png_information(self.info[METADATA_KEY]) if METADATA_KEY in self.info else None)
        super().save(fp, format, **params)

    def copy(self) -> Picture:
        """The same image, with its settings."""
        picture = type(self)()
        vars(picture).update(vars(super().copy()))
        return picture

    __copy__ = copy

from __future__ import annotations

import json
import math
import stat

import pytest
from PIL import Image

from diffusers_infogain.files import save_json, save_png, save_text


def test_a_failed_write_leaves_the_old_file_and_no_part(tmp_path):
    class Broken(Image.Image):
        def save(self, file, *args, **kwargs):
            file.write(b"half a picture")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_png(Broken(), tmp_path / "image.png", {})
    assert list(tmp_path.iterdir()) == []
    save_text("whole", tmp_path / "a.json")
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_json({"x": math.nan}, tmp_path / "a.json")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["whole"]


def test_files_can_be_read_by_others_and_carry_their_metadata(tmp_path):
    save_png(Image.new("RGB", (2, 2)), tmp_path / "image.png", {"seed": 3})
    assert stat.S_IMODE((tmp_path / "image.png").stat().st_mode) == 0o644
    assert json.loads(Image.open(tmp_path / "image.png").text["infogain"]) == {"seed": 3}

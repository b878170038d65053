"""Text and JSON files: atomic writes, bounded and careful reads."""

from __future__ import annotations

import errno
import math
import os
import pickle
import stat
from pathlib import Path

import PIL.Image
import PIL.PngImagePlugin
import pytest

from diffusers_infogain import files, image_files


class Broken(PIL.Image.Image):
    def save(self, file, *args, **kwargs):
        file.write(b"half a picture")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_failed_write_names_the_file_and_leaves_the_old_one_and_no_part(tmp_path):
    with pytest.raises(OSError, match=r"^Cannot write '.*image.png': No space left on device\.$"):
        image_files.save_png(Broken(), tmp_path / "image.png", {})
    assert list(tmp_path.iterdir()) == []
    files.save_text("whole", tmp_path / "a.json")
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.save_json({"x": math.nan}, tmp_path / "a.json")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["whole"]


@pytest.mark.parametrize(("umask", "rights"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_new_files_have_the_rights_of_the_umask_and_old_ones_keep_theirs(umask, rights, tmp_path):
    before = os.umask(umask)
    try:
        files.save_text("new", tmp_path / "new")
        (tmp_path / "old").write_text("old")
        (tmp_path / "old").chmod(0o640)
        files.save_text("newer", tmp_path / "old")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == rights
    assert stat.S_IMODE((tmp_path / "old").stat().st_mode) == 0o640


@pytest.mark.parametrize("write", [files.save_text, lambda text, path: files.append_json_lines([{"text": text}], path)])
def test_errors_of_the_disk_name_the_file(write, tmp_path):
    for path, reason in [
        (tmp_path / ("n" * 300), "File name too long"),
        (tmp_path / "no folder" / "a", "No such file or directory"),
        (Path("/proc/self/none"), r"No such file or directory|Operation not permitted|Permission denied"),
    ]:
        with pytest.raises(OSError, match=rf"^Cannot write '{str(path)[:200]}.*: ({reason})\.$"):
            write("text", path)


def test_a_file_name_may_be_as_long_as_the_file_system_allows(tmp_path):
    files.save_text("text", tmp_path / ("n" * 255))
    assert (tmp_path / ("n" * 255)).read_text() == "text"


def test_only_regular_files_are_read_and_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("/dev/zero")
    for name, found in [("pipe", "a pipe"), ("folder", "a folder"), ("link", "a pipe, socket or device")]:
        with pytest.raises(ValueError, match=rf"{name} must be a file, got {found}"):
            files.read_text(tmp_path / name)
        with pytest.raises(ValueError, match=rf"{name} must be a file, got {found}"):
            files.save_text("text", tmp_path / name)
    with pytest.raises(ValueError, match=r"none is missing\.$"):
        files.read_text(tmp_path / "none")
    with pytest.raises(ValueError, match=r"'a\\x00b' is not a valid file name"):
        files.read_text("a\0b")


def test_text_is_utf_8_within_a_bound(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree")
    assert files.read_text(path) == "one\ntwo\nthree"
    for content in ("größe".encode("latin-1"), "text".encode("utf-16"), pickle.dumps([1])):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"text is not UTF-8 text: byte \d+ is invalid"):
            files.read_text(path)
    path.write_bytes(b"a\0b")
    with pytest.raises(ValueError, match="text is not text: it contains a NUL byte"):
        files.read_text(path)
    path.write_text("12345")
    with pytest.raises(ValueError, match="text must have at most 4 bytes, got more"):
        files.read_text(path, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000 + "]" * 100_000, "must be nested at most 64 levels deep"),
        ("[" * 100_000, "must be nested at most 64 levels deep"),
        ('{"a": ' * 65 + "1" + "}" * 65, "must be nested at most 64 levels deep"),
        ("[]", "must hold a JSON object, got list"),
        ("5", "must hold a JSON object, got int"),
        ("null", "must hold a JSON object, got null"),
        ('{"a": NaN}', "is not JSON: NaN is not a JSON number"),
        ('{"a": ' + "1" * 1_000_000 + "}", "is not JSON: Exceeds the limit"),
        ('{"a": ', "is not JSON: Expecting value"),
        ("", "is not JSON"),
        (r'{"a": "\ud800"}', "is not text: it contains an unpaired surrogate"),
    ],
)
def test_json_of_any_other_kind_is_one_sentence(text, message, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"^{path} {message}") as caught:
        files.read_json(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    if text:
        (tmp_path / "a.jsonl").write_text(f"{{}}\n\n{text}\n")
        with pytest.raises(ValueError, match=rf"^Line 3 of {path}l {message}"):
            files.read_json_lines(tmp_path / "a.jsonl")


def test_json_is_read_as_it_was_written(tmp_path):
    value = {"a": [1, 2.5, None, True], "ü": "\U0001f600"}
    files.save_json(value, tmp_path / "a.json")
    assert files.read_json(tmp_path / "a.json") == value
    (tmp_path / "deep.json").write_text('{"a": ' * 64 + "1" + "}" * 64)
    assert isinstance(files.read_json(tmp_path / "deep.json"), dict)
    files.append_json_lines([value, {"a": 1}], tmp_path / "a.jsonl")
    files.append_json_lines([{"a": 2}], tmp_path / "a.jsonl")
    assert files.read_json_lines(tmp_path / "a.jsonl") == [value, {"a": 1}, {"a": 2}]


def test_an_unfinished_line_is_cut_off_and_nothing_else(tmp_path):
    path = tmp_path / "a.jsonl"
    files.cut_unfinished(path, '{"a": ')
    assert not path.exists()
    whole = '{"a": "ü"}\r\n{"a": 2}\n'
    for rest in ("", "{", '{"a": ', '{"a": 3'):
        path.write_bytes((whole + rest).encode())
        assert files.read_json_lines(path, begin='{"a": ') == [{"a": "ü"}, {"a": 2}]
        files.cut_unfinished(path, '{"a": ')
        assert path.read_bytes() == whole.encode()
    path.write_text(whole + "mine")
    with pytest.raises(ValueError, match=r"Line 3 of .*a\.jsonl was not written by this command\."):
        files.cut_unfinished(path, '{"a": ')
    assert path.read_text() == whole.replace("\r", "") + "mine"

from __future__ import annotations

import errno
import io
import math
import os
import pickle
import signal
import stat
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.PngImagePlugin
import pytest

from diffusers_infogain import files

METADATA = {"prompt": "a red circle", "seed": 3, "cost": [0.5]}


@pytest.fixture
def png(tmp_path):
    path = tmp_path / "image.png"
    files.save_png(PIL.Image.effect_noise((24, 24), 50).convert("RGB"), path, METADATA)
    return path


class Broken(PIL.Image.Image):
    def save(self, file, *args, **kwargs):
        file.write(b"half a picture")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_failed_write_names_the_file_and_leaves_the_old_one_and_no_part(tmp_path):
    with pytest.raises(OSError, match=r"^Cannot write '.*image.png': No space left on device\.$"):
        files.save_png(Broken(), tmp_path / "image.png", {})
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
    with pytest.raises(ValueError, match=r"'a\\x00b' is not the name of a file"):
        files.read_text("a\0b")


def test_text_is_utf_8_within_a_bound(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree")
    assert files.read_text(path) == "one\ntwo\nthree"
    for content in ("größe".encode("latin-1"), "text".encode("utf-16"), pickle.dumps([1])):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"text is not text in UTF-8: its byte \d+"):
            files.read_text(path)
    path.write_bytes(b"a\0b")
    with pytest.raises(ValueError, match="text is not text: it has a NUL byte"):
        files.read_text(path)
    path.write_text("12345")
    with pytest.raises(ValueError, match="text must have at most 4 bytes, got more"):
        files.read_text(path, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000 + "]" * 100_000, "must have at most 64 brackets inside each other"),
        ("[" * 100_000, "must have at most 64 brackets inside each other"),
        ('{"a": ' * 65 + "1" + "}" * 65, "must have at most 64 brackets inside each other"),
        ("[]", "must hold a JSON object, got list"),
        ("5", "must hold a JSON object, got int"),
        ("null", "must hold a JSON object, got null"),
        ('{"a": NaN}', "is not JSON: NaN is not a number of JSON"),
        ('{"a": ' + "1" * 1_000_000 + "}", "is not JSON: Exceeds the limit"),
        ('{"a": ', "is not JSON: Expecting value"),
        ("", "is not JSON"),
        (r'{"a": "\ud800"}', "is not text: it has half of a surrogate pair"),
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


def test_a_png_says_how_it_was_made_only_if_it_is_whole(png, tmp_path):
    assert files.read_png_metadata(png) == METADATA
    content = png.read_bytes()
    cut = tmp_path / "cut.png"
    for size in (0, 1, 8, 20, 100, len(content) // 2, len(content) - 13, len(content) - 12, len(content) - 1):
        cut.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"cut\.png is (damaged|not a PNG image)"):
            files.read_png_metadata(cut)
    cut.write_bytes(content[: len(content) // 2] + content[-12:])
    with pytest.raises(ValueError, match=r"cut\.png is damaged"):
        files.read_png_metadata(cut)


def png_saying(path, text):
    information = PIL.PngImagePlugin.PngInfo()
    information.add_text("infogain", text)
    PIL.Image.new("RGB", (2, 2)).save(path, "PNG", pnginfo=information)
    return path


@pytest.mark.parametrize("text", ["5", "[]", "null", "x", "[" * 100_000])
def test_other_settings_of_a_png_are_one_sentence(text, tmp_path):
    with pytest.raises(ValueError, match=r"^The text chunk 'infogain' of .*a\.png (is not JSON|must h)"):
        files.read_png_metadata(png_saying(tmp_path / "a.png", text))


def test_images_that_would_fill_the_memory_are_refused(tmp_path):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    def bomb(width, height, *chunks):
        head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
        path = tmp_path / "bomb.png"
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IEND", b""))
        return path

    for size in ((60_000, 60_000), (2**31 - 1, 2**31 - 1), (13_000, 13_000)):
        with pytest.raises(ValueError, match=r"bomb\.png must have at most \d+ pixels"):
            files.open_image(bomb(*size))
    text = chunk(b"zTXt", b"infogain\0\0" + zlib.compress(b" " * 10**8))
    with pytest.raises(ValueError, match=r"bomb\.png is "):
        files.read_png_metadata(bomb(8, 8, text))


def test_arrays_are_read_by_name(tmp_path):
    path = tmp_path / "a.npz"
    arrays = {"mu": np.arange(3.0), "sigma": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "n": np.array(7)}
    for save in (np.savez, np.savez_compressed):
        save(path, **arrays, other=np.array([{}], dtype=object))
        found = files.read_npz(path, ["mu", "sigma"], ["n", "absent"])
        assert found.keys() == arrays.keys()
        for name, value in arrays.items():
            np.testing.assert_array_equal(found[name], value, strict=True)
    with pytest.raises(ValueError, match=r"a\.npz must hold `mu` and `absent`, got mu, sigma, n, other"):
        files.read_npz(path, ["mu", "absent"])
    with pytest.raises(ValueError, match=r"`other` of .*a\.npz must hold numbers, got the type object; pickled objects"):
        files.read_npz(path, ["other"])
    whole = path.read_bytes()
    for size in (0, 1, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"a\.npz is not an \.npz file, or is damaged"):
            files.read_npz(path, ["mu"])
    path.write_bytes(pickle.dumps(arrays))
    with pytest.raises(ValueError, match=r"a\.npz is not an \.npz file, or is damaged"):
        files.read_npz(path, ["mu"])


def array_file(shape, content=b""):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return file.getvalue() + content


def test_arrays_that_would_fill_the_memory_are_refused(tmp_path):
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("claims.npy", array_file((10**15,), bytes(16)))
        with archive.open("packed.npy", "w", force_zip64=True) as file:
            for _ in range(5):
                file.write(bytes(2**26))
    with pytest.raises(ValueError, match=r"`claims` of .*bomb\.npz is damaged: its size does not fit its shape"):
        files.read_npz(path, ["claims"])
    with pytest.raises(ValueError, match=r"`packed` of .*bomb\.npz must have at most \d+ bytes, got 335544320"):
        files.read_npz(path, ["packed"])


OWNER = """
import sys, time
from pathlib import Path
from diffusers_infogain import files
with files.owned(Path(sys.argv[1]), folder=sys.argv[2] == "folder"):
    print("owned", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(("kind", "signal_sent"), [("folder", signal.SIGKILL), ("file", signal.SIGTERM)])
def test_an_output_has_one_owner_until_its_process_ends(kind, signal_sent, tmp_path):
    output, folder = tmp_path / "output", kind == "folder"
    process = subprocess.Popen([sys.executable, "-c", OWNER, str(output), kind], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "owned\n"
        with (
            pytest.raises(ValueError, match=r"^Another command is writing to .*output: wait until it has ended"),
            files.owned(output, folder=folder),
        ):
            pass
        with files.owned(output, folder=folder, main=False):
            pass
    finally:
        process.send_signal(signal_sent)
        process.wait()
    for _ in range(2):
        with files.owned(output, folder=folder):
            pass
    assert not list(tmp_path.rglob("*.lock"))


def test_an_owner_removes_what_killed_commands_left(tmp_path):
    for name in (".0123456789abcdef.part", "images/.0123456789abcdef.part", "mine.part", "other/.0123456789abcdef.part"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("half")
    (tmp_path / "other" / ".lock").write_text("")  # another command may be writing there
    with files.owned(tmp_path):
        left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.part"))
    assert left == ["mine.part", "other/.0123456789abcdef.part"]


def test_nothing_in_the_package_unpickles():
    """Pickles run code: only torch's reader of tensors (`weights_only=True`) may touch one, in one place."""
    forbidden = (
        "pickle.load",
        "torch.load(",
        "np.load(",
        "numpy.load(",
        "joblib",
        "sqlitedict",
        "SqliteDict",
        "shelve",
        "marshal",
    )
    root = Path(files.__file__).parent
    sources = {path.relative_to(root): path.read_text(encoding="utf-8") for path in root.rglob("*.py")}
    found = [(str(path), word) for path, source in sources.items() for word in forbidden if word in source]
    assert found == [("files.py", "torch.load(")]
    assert sources[Path("files.py")].count("weights_only") >= sources[Path("files.py")].count("torch.load(")
    assert "allow_pickle=True" not in "".join(sources.values())
    examples = root.parent / "examples"
    lines = [line for path in examples.rglob("*.py") for line in path.read_text(encoding="utf-8").splitlines()]
    assert all("weights_only=True" in line for line in lines if "torch.load(" in line)
    assert not any(word in line for line in lines for word in forbidden if word != "torch.load(")

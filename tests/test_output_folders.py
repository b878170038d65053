"""One owner for every output."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from diffusers_infogain import output_folders

OWNER = """
import sys, time
from pathlib import Path
from diffusers_infogain import output_folders
with output_folders.owned(Path(sys.argv[1]), folder=sys.argv[2] == "folder"):
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
            pytest.raises(ValueError, match=r"^Another command is writing to .*output: wait for it to end"),
            output_folders.owned(output, folder=folder),
        ):
            pass
        with output_folders.owned(output, folder=folder, main=False):
            pass
    finally:
        process.send_signal(signal_sent)
        process.wait()
    for _ in range(2):
        with output_folders.owned(output, folder=folder):
            pass
    assert not list(tmp_path.rglob("*.lock"))


def test_an_owner_removes_what_killed_commands_left(tmp_path):
    for name in (".0123456789abcdef.part", "images/.0123456789abcdef.part", "mine.part", "other/.0123456789abcdef.part"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("half")
    (tmp_path / "other" / ".lock").write_text("")  # another command may be writing there
    with output_folders.owned(tmp_path):
        left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.part"))
    assert left == ["mine.part", "other/.0123456789abcdef.part"]

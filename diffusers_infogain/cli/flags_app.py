"""The flags of `app`."""

from __future__ import annotations

from .flags import MOST, Parser, _add, _add_device_flags, _add_loading_flags, integer, nonempty


def add_app(command: Parser) -> None:
    """Adds the flags of `app`."""
    _add(command, "--model", nonempty, "'demo', 'demo-text', a folder or a Hub id of any family that `load` knows", "demo")
    _add_loading_flags(command)
    text = "address to listen on; 0.0.0.0 lets everybody in who can reach this machine"
    _add(command, "--host", nonempty, text, "127.0.0.1")
    _add(command, "--port", integer(0, 65535), "0 for any free one", 7860)
    text = "also make a public address, through gradio's servers (default: no)"
    command.add_argument("--share", choices=("no", "yes"), default="no", help=text)
    _add(command, "--max-steps", integer(1, MOST), "the most decoding steps of a request", 100)
    _add(command, "--max-samples", integer(1, 1000), "the most images or texts of a request", 8)
    _add(command, "--max-new-tokens", integer(1, MOST), "the longest text", 256)
    _add(
        command,
        "--max-waiting",
        integer(1, 10_000),
        "requests that may wait; one runs at a time, further ones are turned away",
        16,
    )
    _add_device_flags(command, batch_size=None)

"""Serves the page of a model until it is interrupted."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import DiffusionPipeline

from ..extras import missing
from .work import Limits, warm_up

LARGEST_UPLOAD = "20mb"


def load_gradio() -> Any:
    """gradio, told to measure nothing and to ask no server for anything.

    Raises:
        ModuleNotFoundError: Without gradio.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    try:
        import gradio
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise missing("The page needs", "gradio", "app", "gradio") from error
    return gradio


def free_port(host: str, port: int) -> int:
    """The port, or any free one for 0.

    Raises:
        ValueError: If nothing can listen there, naming the flag.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except socket.gaierror:
        raise ValueError(f"--host must be an address or a name of this machine, got {host!r}.") from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ValueError(
            f"--host {host} and --port {port} cannot be used ({reason}): choose another port, or 0 for a free one."
        ) from None


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def serving(
    pipe: DiffusionPipeline,
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    share: bool = False,
    limits: Limits | None = None,
    explain: Callable[[Exception], str] = str,
) -> Iterator[str]:
    """Serves the page within the block, and yields its address. No file is left behind.

    Args:
        pipe: The model, loaded.
        model: Its name.
        host: Who can reach the page: only this machine by default; "0.0.0.0" for everybody who can reach the machine.
        port: 0 for any free one.
        share: Whether gradio also makes a public address on its servers.
        limits: The largest request.
        explain: The sentence for an exception.

    Raises:
        ModuleNotFoundError: Without gradio.
        ValueError: If nothing can listen there.
    """
    load_gradio()
    from .page import STYLE, build_page, theme

    limits = limits or Limits()
    port = free_port(host, port)
    with tempfile.TemporaryDirectory(prefix="diffusers-infogain-app-") as folder, _environment(GRADIO_TEMP_DIR=folder):
        page, site = build_page(pipe, model, limits, explain)
        warm_up(pipe)
        try:
            _, local, public = page.launch(
                server_name=host,
                server_port=port,
                share=share,
                quiet=True,
                inbrowser=False,
                prevent_thread_lock=True,
                show_error=True,
                ssr_mode=False,
                max_file_size=LARGEST_UPLOAD,
                state_session_capacity=64,
                enable_monitoring=False,
                footer_links=["api", "settings"],
                theme=theme(),
                css=STYLE,
            )
            yield public or local
        finally:
            site.jobs.stop_all()
            page.close(verbose=False)


def wait() -> None:
    """Waits until the process is interrupted."""
    while True:
        time.sleep(3600)

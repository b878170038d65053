"""A server that answers like the Hub: folders are repositories, to be read only."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = 40 * "a"


@contextmanager
def local_hub(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Serves `root/owner/name` as the repositories "owner/name"; gives the address, for `HF_ENDPOINT`, and the requests."""
    requests: list[str] = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = [unquote(part) for part in self.path.partition("?")[0].strip("/").split("/")]
            if parts[:2] == ["api", "models"] and parts[4:5] == ["tree"]:
                self.send_tree("/".join(parts[2:4]))
            elif parts[:2] == ["api", "models"]:
                self.send_information("/".join(parts[2:4]))
            elif parts[2:3] == ["resolve"]:
                self.send_file(root.joinpath(*parts[:2], *parts[4:]))
            else:
                self.send_nothing()

        do_HEAD = do_GET  # noqa: N815

        def send_tree(self, name: str) -> None:
            files = sorted(path for path in (root / name).rglob("*") if path.is_file())
            described = [
                {"type": "file", "path": path.relative_to(root / name).as_posix(), "size": path.stat().st_size, "oid": 40 * "b"}
                for path in files
            ]
            self.send_body(json.dumps(described).encode())

        def send_information(self, name: str) -> None:
            files = sorted(path for path in (root / name).rglob("*") if path.is_file())
            siblings = [{"rfilename": path.relative_to(root / name).as_posix()} for path in files]
            self.send_body(json.dumps({"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "tags": []}).encode())

        def send_file(self, path: Path) -> None:
            if path.is_file():
                self.send_body(path.read_bytes())
            else:
                self.send_nothing()

        def send_body(self, body: bytes) -> None:
            self.send_response(200)
            headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT, "Content-Length": len(body)}
            for name, value in headers.items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def send_nothing(self) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            requests.append(str(arguments[1]))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        thread.join()

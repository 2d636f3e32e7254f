"""As much of a Hugging Face hub as its own clients need to fetch models and data sets from folders."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves `folder`/OWNER/NAME as repositories; `asked` lists the requests for contents."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.folder, self.asked = folder, []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = urlsplit(self.path).path.strip("/").split("/")
        if parts[0] == "api":
            self._answer_about("/".join(parts[2:4]), is_tree=parts[4:5] == ["tree"])
            return
        owner, name, _, _, *inside = [part for part in parts if part != "datasets"] + [""] * 4
        file = self.server.folder.joinpath(owner, name, *filter(None, inside))
        if not file.is_file():
            self._send(b"", 404, **{"X-Error-Code": "EntryNotFound"})
            return
        if self.command == "GET":
            self.server.asked.append(self.path)
        content = file.read_bytes()
        self._send(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"')

    def _answer_about(self, repo: str, is_tree: bool) -> None:
        folder = self.server.folder / repo
        if not folder.is_dir():
            self._send(b"{}", 404, **{"X-Error-Code": "RepoNotFound"})
            return
        files = [
            {"type": "file", "path": str(path.relative_to(folder)), "size": path.stat().st_size, "oid": COMMIT}
            for path in sorted(folder.rglob("*"))
        ]
        siblings = [{"rfilename": file["path"]} for file in files]
        about = files if is_tree else {"id": repo, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
        self._send(json.dumps(about).encode())

    def _send(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def served(folder: Path) -> Iterator[Hub]:
    """The hub, from here to the end of the block."""
    hub = Hub(folder)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join(10)

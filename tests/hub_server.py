"""A local server that speaks the part of the Hub's file API that downloads use."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


@dataclass
class Hub:
    """What the server serves and what it saw."""

    repositories: dict[str, Path]
    token: str | None = None
    revisions: tuple[str, ...] = ("main", "v2", COMMIT)
    url: str = ""
    downloaded: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
            hub.tokens.add(token)
            api = path.startswith("api/models/")
            path = path.removeprefix("api/models/")
            name = next((n for n in hub.repositories if path == n or path.startswith(n + "/")), None)
            if name is None:
                return self.fail(401 if token is None else 404, "RepoNotFound")
            if hub.token is not None and token != hub.token:
                return self.fail(403, "GatedRepo")
            root, parts = hub.repositories[name], path.removeprefix(name).strip("/").split("/")
            if len(parts) > 1 and parts[1] not in hub.revisions:
                return self.fail(404, "RevisionNotFound")
            files = sorted(f.relative_to(root).as_posix() for f in root.rglob("*") if f.is_file())
            if api and parts[0] in ("", "revision"):
                return self.answer({"id": name, "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]})
            if api and parts[0] == "tree":
                return self.answer([self.described(root, f) for f in files])
            file = root / "/".join(parts[2:])
            if parts[0] != "resolve" or not file.is_file():
                return self.fail(404, "EntryNotFound")
            content = file.read_bytes()
            if self.command == "GET":
                hub.downloaded.append("/".join(parts[2:]))
            self.send(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT})

        def described(self, root: Path, name: str) -> dict[str, object]:
            content = (root / name).read_bytes()
            return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

        def answer(self, content: object) -> None:
            self.send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

        def fail(self, status: int, code: str) -> None:
            self.send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

        def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

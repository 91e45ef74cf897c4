"""A stand-in for the Hub on this machine: repositories in memory, all files sent inside of commits."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

__all__ = ["FakeHub", "fake_hub"]


@contextmanager
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A stand-in that the client of the Hub talks to, with a token that it takes."""
    from huggingface_hub import constants

    fake = FakeHub()
    monkeypatch.setattr(constants, "ENDPOINT", fake.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "no-token")
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


class FakeHub:
    """Answers what the client of the Hub asks for when it makes a repository and fills it.

    Attributes:
        repositories: by name, the files of each; ``private`` the names of those that were made so.
        breaks: commits are refused.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.breaks = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                self.reply(*hub.get(self.path, self.headers.get("Authorization")))

            def do_POST(self) -> None:
                if self.headers.get("Transfer-Encoding") == "chunked":
                    body = b""
                    while size := int(self.rfile.readline(), 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                else:
                    body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.reply(*hub.post(self.path, body))

            def reply(self, status: int, answer: Any) -> None:
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                for name in ("X-Error-Code", "X-Error-Message"):
                    if name in answer:
                        self.send_header(name, answer[name])
                self.end_headers()
                self.wfile.write(content)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, daemon=True).start()

    def get(self, path: str, token: str | None) -> tuple[int, Any]:
        if path.startswith("/api/whoami"):
            if token != "Bearer hf_good":
                return 401, {"error": "Invalid token", "X-Error-Message": "Invalid token"}
            return 200, {"name": "org", "type": "user", "auth": {}}
        name = "/".join(path.split("?")[0].split("/")[3:5])
        if name not in self.repositories:
            return 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
        files = self.repositories[name]
        if "/tree/" in path:
            entries = [{"type": "file", "path": file, "size": len(files[file]), "oid": "0"} for file in files]
            return 200, entries
        return 200, {"id": name, "sha": "0" * 40, "siblings": [{"rfilename": file} for file in files]}

    def post(self, path: str, body: bytes) -> tuple[int, Any]:
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if name in self.repositories:
                return 409, {"X-Error-Message": "You already created this model repo"}
            if asked.get("private") or asked.get("visibility") == "private":
                self.private.add(name)
            self.repositories[name] = {".gitattributes": b""}
            return 200, {"url": f"{self.address}/{name}", "name": name, "id": name}
        if path.startswith("/api/validate-yaml"):
            return 200, {"errors": [], "warnings": []}
        name = "/".join(path.split("/")[3:5])
        if "/preupload/" in path:
            files = [file["path"] for file in json.loads(body)["files"]]
            return 200, {
                "files": [{"path": file, "uploadMode": "regular", "shouldIgnore": False} for file in files]
            }
        if "/commit/" not in path or self.breaks:
            return 403, {"X-Error-Message": "Storage quota exceeded"}
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.repositories[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del self.repositories[name][line["value"]["path"]]
        return 200, {
            "commitUrl": f"{self.address}/{name}/commit/{'1' * 40}",
            "commitOid": "1" * 40,
            "success": True,
        }

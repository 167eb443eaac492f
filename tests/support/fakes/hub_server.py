"""The calls of the Hugging Face hub that an upload makes, answered on this machine."""

import json
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


class FakeHub(ThreadingHTTPServer):
    """Repositories that were made, and the commits to them: message and files by repository.

    It takes all files in the commit itself, as the hub does with small ones: what it does with large ones (LFS, Xet)
    isn't played.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.made: list[dict[str, Any]] = []
        self.commits: list[tuple[str, str, dict[str, bytes]]] = []
        self.cards: list[str] = []

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        match path.strip("/").split("/"):
            case ["api", "repos", "create"]:
                self.made.append(json.loads(body))
                return {"url": f"{self.url}/{self.made[-1]['organization']}/{self.made[-1]['name']}"}
            case ["api", "validate-yaml"]:
                self.cards.append(json.loads(body)["content"])
                return {}
            case ["api", "models", _, _, "preupload", "main"]:
                plain = {"uploadMode": "regular", "shouldIgnore": False}
                return {"files": [{"path": file["path"], **plain} for file in json.loads(body)["files"]]}
            case ["api", "models", owner, name, "commit", "main"]:
                rows = [json.loads(line) for line in body.splitlines()]
                (summary,) = (row["value"]["summary"] for row in rows if row["key"] == "header")
                files = {r["value"]["path"]: b64decode(r["value"]["content"]) for r in rows if r["key"] == "file"}
                assert len(rows) == 1 + len(files)
                self.commits.append((f"{owner}/{name}", summary, files))
                number = f"{len(self.commits):040x}"
                return {"commitUrl": f"{self.url}/{owner}/{name}/commit/{number}", "commitOid": number}
        raise ValueError(path)


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def do_POST(self) -> None:
        answer = json.dumps(
            self.server.answer(self.path, self.rfile.read(int(self.headers["Content-Length"])))
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        thread = Thread(target=hub.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()

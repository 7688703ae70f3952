"""A stand-in for the hub on loopback, with one repository, for tests/test_hub.py."""

import hashlib
import http.server
import json
import re
from pathlib import Path
from urllib.parse import unquote

NAME = "someone/tiny-m3"


class Hub(http.server.ThreadingHTTPServer):
    """What the hub's three addresses answer: a repository's files, a file's headers, a file."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.revisions: dict[str, Path] = {}  # of the one repository
        self.asked: list[tuple[str, str]] = []  # method and file
        self.cut: dict[str, int] = {}  # file → how many answers more end in its middle
        self.listed: dict[str, int] = {}  # file → a size that the list of files gives, and is wrong
        self.status: int | None = None  # of every answer, an error's
        self.gated = False

    @property
    def files(self):
        """The files whose content was asked for, in order."""
        return [file for method, file in self.asked if method == "GET" and not file.startswith("/")]

    def find(self, revision):
        """Commit and folder of a revision or commit."""
        commits = {name: hashlib.sha1(str(folder).encode()).hexdigest() for name, folder in self.revisions.items()}
        folders = {commits[name]: folder for name, folder in self.revisions.items()}
        commit = commits.get(revision, revision)
        return commit, folders.get(commit)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self._file(body=False)

    def do_GET(self):
        if not self.path.startswith("/api/"):
            return self._file(body=True)
        path = self.path.split("?")[0]
        self.server.asked.append(("GET", path))
        if self.server.status:
            return self._answer(self.server.status, {})
        if self._moved():
            return None
        found = re.fullmatch(rf"/api/models/{NAME}(?:/revision/(.+))?", unquote(path))
        if not found:
            return self._answer(404, {"X-Error-Code": "RepoNotFound"})
        commit, folder = self.server.find(found[1] or "main")
        if folder is None:
            return self._answer(404, {"X-Error-Code": "RevisionNotFound"})
        sizes = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
        siblings = [{"rfilename": file, "size": size} for file, size in (sizes | self.server.listed).items()]
        self._answer(200, {}, json.dumps({"id": NAME, "sha": commit, "siblings": siblings}).encode())

    def _moved(self):
        """The hub sends who asks for the name without an owner to the one that has it."""
        if moved := "/xlm-roberta-base" in self.path:
            self._answer(307, {"Location": self.path.replace("/xlm-roberta-base", f"/{NAME}")})
        return moved

    def _file(self, body):
        if self._moved():
            return None
        found = re.fullmatch(rf"/{NAME}/resolve/([^/]+)/(.+)", self.path)
        assert found, self.path
        commit, folder = self.server.find(unquote(found[1]))
        file = found[2]
        self.server.asked.append((self.command, file))
        if self.server.gated:
            return self._answer(401, {"X-Error-Code": "GatedRepo"})
        if not (folder and (folder / file).is_file()):
            return self._answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content = (folder / file).read_bytes()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self._answer(206 if start else 200, headers, content[start:], cut=body and self.server.cut.get(file, 0) > 0)
        if body and self.server.cut.get(file):
            self.server.cut[file] -= 1

    def _answer(self, status, headers, content=b"", cut=False):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = cut

    def log_message(self, format, *args):
        pass

"""A stand-in for Google's object store: one dict of objects behind what Orbax uses of it, fsspec's gcsfs and the JSON API.

It has what tensorstore asks for: reads of ranges, conditional writes, deletes, lists; no accounts and no buckets.
"""

import contextlib
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType, SimpleNamespace
from typing import ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class Files(MemoryFileSystem):
    """In place of gcsfs."""

    protocol = ("gcs", "gs")
    store: ClassVar = {}
    pseudo_dirs: ClassVar = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("gs://").removeprefix("gcs://"))


class _Api(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    generations: ClassVar = {}
    lock = threading.Lock()

    def log_message(self, *_):
        pass

    def _answer(self, status, content=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _asked(self):
        """The path of the object in the store ("" where none is named), and the query's values."""
        url = urlsplit(self.path)
        bucket, _, name = url.path.partition("/b/")[2].partition("/o")
        asked = {key: values[0] for key, values in parse_qs(url.query).items()}
        name = unquote(name.removeprefix("/")) or asked.get("name", "")
        return bucket, f"/{bucket}/{name}" if name else "", asked

    def do_GET(self):
        bucket, path, asked = self._asked()
        if not path:
            prefix = f"/{bucket}/"
            names = sorted(name.removeprefix(prefix) for name in Files.store if name.startswith(prefix))
            names = [name for name in names if name.startswith(asked.get("prefix", ""))]
            items = [{"name": name, "size": str(Files.store[prefix + name].size)} for name in names]
            return self._answer(200, json.dumps({"items": items}).encode(), Content_Type="application/json")
        if path not in Files.store:
            return self._answer(404)
        content, first, last = Files.store[path].getvalue(), 0, None
        generation = self.generations.get(path, 1)
        if (wanted := self.headers.get("Range", "").removeprefix("bytes=")) and not wanted.startswith("-"):
            first, last = (int(x) if x else None for x in wanted.split("-"))
        elif wanted:
            first = max(0, len(content) + int(wanted))
        part = content[first : None if last is None else last + 1]
        place = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
        ranged = {"Content_Range": place} if wanted else {}
        return self._answer(206 if wanted else 200, part, x_goog_generation=generation, **ranged)

    def do_POST(self):
        _, path, asked = self._asked()
        content = self.rfile.read(int(self.headers["Content-Length"]))
        with self.lock:
            there = self.generations.get(path, 1) if path in Files.store else 0
            if "ifGenerationMatch" in asked and int(asked["ifGenerationMatch"]) != there:
                return self._answer(412)
            fsspec.filesystem("gcs").pipe_file(path, content)
            self.generations[path] = there + 1
        told = {"name": path, "generation": str(there + 1), "size": str(len(content))}
        return self._answer(200, json.dumps(told).encode(), Content_Type="application/json")

    def do_DELETE(self):
        _, path, _ = self._asked()
        there = Files.store.pop(path, None)
        return self._answer(204 if there else 404)


@contextlib.contextmanager
def bucket(monkeypatch):
    """gs:// URLs lead into this process's memory while it lasts; gives the dict of its files by "/bucket/name"."""
    server = ThreadingHTTPServer(("localhost", 0), _Api)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    fsspec.register_implementation("gcs", Files, clobber=True)
    fsspec.register_implementation("gs", Files, clobber=True)
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://localhost:{server.server_port}")
    # Orbax asks it, as it deletes, whether the bucket has folders.
    storage = ModuleType("google.cloud.storage")
    storage.Client = lambda: SimpleNamespace(get_bucket=lambda name: SimpleNamespace())
    monkeypatch.setitem(sys.modules, "google.cloud.storage", storage)
    yield Files.store
    server.shutdown()

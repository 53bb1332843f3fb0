"""A server that takes what ``wandb sync`` sends: the few GraphQL calls, file streams and uploads of an offline run."""

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY = {"id": "e", "name": "someone"}
NAME = re.compile(r"(?:query|mutation)\s+(\w+)")


class Server(ThreadingHTTPServer):
    """What has arrived so far."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.runs: list[dict[str, Any]] = []  # the variables of every call that made or changed a run
        self.artifacts: dict[str, dict[str, Any]] = {}  # by id
        self.committed: list[str] = []  # ids
        self.used: list[str] = []  # ids that a run took as an input
        self.streams: dict[str, list[dict[str, Any]]] = {}  # file of a run -> its lines
        self.files: dict[str, bytes] = {}  # path of an upload -> content

    def answer(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        """The data of a GraphQL call."""
        asked = given.get("input", given)
        if name == "RunResumeStatus":
            return {"model": {"id": "p", "name": given["project"], "entity": ENTITY, "bucket": None}}
        if name == "UpsertBucket":
            self.runs.append(given)
            project = {"id": "p", "name": given["project"], "entity": ENTITY}
            run = {"id": "r", "name": given["name"], "displayName": given["displayName"], "config": given["config"]}
            rest = {"description": None, "sweepName": None, "historyLineCount": 0, "project": project}
            return {"upsertBucket": {"bucket": run | rest, "inserted": True}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": self._upload("run", file)} for file in given["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        if name == "CreateArtifact":
            identifier = f"{asked['artifactCollectionName']}:{asked['digest']}"
            self.artifacts[identifier] = asked
            made = {"id": identifier, "state": "PENDING", "artifactSequence": {"id": "s", "latestArtifact": None}}
            return {"createArtifact": {"artifact": made}}
        if name == "CreateArtifactManifest":
            file = self._file("f", given["name"], self._upload("manifest", given["artifactID"]))
            return {"createArtifactManifest": {"artifactManifest": {"id": "m", "file": file}}}
        if name == "CreateArtifactFiles":
            edges = [{"node": self._artifact_file(f["artifactID"], f["name"])} for f in asked["artifactFiles"]]
            return {"createArtifactFiles": {"files": {"edges": edges}}}
        if name in ("CommitArtifact", "UseArtifact"):
            (self.committed if name == "CommitArtifact" else self.used).append(asked["artifactID"])
            done = {"id": asked["artifactID"], "digest": "", "description": None, "state": "COMMITTED"}
            return {name[0].lower() + name[1:]: {"artifact": done}}
        raise KeyError(name)

    def _upload(self, kind: str, name: str) -> str:
        return f"{self.url}/upload/{kind}/{name}"

    def _file(self, identifier: str, name: str, url: str) -> dict[str, Any]:
        return {"id": identifier, "name": name, "displayName": name, "uploadUrl": url, "uploadHeaders": []}

    def _artifact_file(self, artifact: str, name: str) -> dict[str, Any]:
        where = {"artifact": {"id": artifact}, "storagePath": None, "uploadMultipartUrls": None}
        return self._file(name, name, self._upload("artifact", f"{artifact}/{name}")) | where


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the test asks the server."""

    def do_POST(self) -> None:
        body, found = self._body(), {}
        if self.path == "/graphql":
            call = json.loads(body)
            named = NAME.search(call["query"])
            try:
                found = {"data": self.server.answer(named[1] if named else "", call.get("variables") or {})}
            except KeyError as error:
                found = {"errors": [{"message": f"unknown call {error}"}]}  # wandb goes on without optional ones
        elif self.path.endswith("/file_stream"):
            for name, piece in (json.loads(body).get("files") or {}).items():
                self.server.streams.setdefault(name, []).extend(map(json.loads, piece["content"]))
        self._say(found)

    def do_PUT(self) -> None:
        self.server.files[self.path.removeprefix("/upload/")] = self._body()
        self._say({})

    def _body(self) -> bytes:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return gzip.decompress(content) if self.headers.get("Content-Encoding") == "gzip" else content

    def _say(self, answer: dict[str, Any]) -> None:
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def wandb_server() -> Iterator[Server]:
    """A server on a free port of loopback."""
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()

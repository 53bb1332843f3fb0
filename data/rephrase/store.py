"""Answers to requests, by request id: written once each as they come, and never asked for again.

SHARDS SQLite files share the ids by their first hexadecimal digit, so that several processes may work at once, each on
shards of its own. An answer is committed before it counts: a killed process loses what was in flight and no more.
"""

import json
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from conf.errors import DataError, ResourceError
from data.files import make_folder

SHARDS = 16
Answer = dict[str, Any]  # text, finish and what it took (SPENT); or error: the request was refused for good
LOCK_SEC = 10.0
ASKED = 500  # ids of one look-up


def shard_of(request: str) -> int:
    """The shard of a request id (hexadecimal)."""
    return int(request[0], 16)


def _by_shard(requests: Iterable[str]) -> Iterable[list[str]]:
    found: dict[int, list[str]] = {}
    for request in requests:
        found.setdefault(shard_of(request), []).append(request)
    return found.values()


class Store:
    """A folder of answers, of which this process writes ``shards``; reading needs none. Use as a context.

    Several threads may use it.
    """

    def __init__(self, folder: str | Path, shards: Iterable[int] = ()) -> None:
        self.folder, self.shards = Path(folder), set(shards)
        self._open: dict[int, sqlite3.Connection] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> "Store":
        make_folder(self.folder)
        try:
            for shard in self.shards:
                self._connect(shard).execute("BEGIN IMMEDIATE").connection.commit()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes all files; written ones need no other file beside them from then on."""
        while self._open:
            shard, file = self._open.popitem()
            if shard in self.shards:
                with suppress(sqlite3.Error):
                    file.execute("PRAGMA journal_mode=DELETE")
            file.close()

    def put(self, answers: dict[str, Answer]) -> None:
        """Commits answers by request, once a shard; a second one to the same request changes nothing."""
        for names in _by_shard(answers):
            rows = [(name, json.dumps(answers[name])) for name in names]
            with self._says(names[0]) as file, file:
                file.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?)", rows)

    def get(self, requests: Iterable[str]) -> dict[str, Answer]:
        """The answers that are there, by request."""
        found: dict[str, Answer] = {}
        for names in _by_shard(requests):
            with self._says(names[0]) as file:
                for first in range(0, len(names), ASKED):
                    part = names[first : first + ASKED]
                    marks = ",".join("?" * len(part))
                    rows = file.execute(f"SELECT request, answer FROM answers WHERE request IN ({marks})", part)
                    found |= {request: json.loads(answer) for request, answer in rows}
        return found

    @contextmanager
    def _says(self, request: str) -> Iterator[sqlite3.Connection]:
        shard = shard_of(request)
        try:
            with self._lock:
                yield self._open[shard] if shard in self._open else self._connect(shard)
        except sqlite3.Error as error:
            rule, fix = "the cache of answers can be read and written", "free some space, or remove the file"
            raise DataError(str(self._path(shard)), str(error), rule, fix) from error

    def _path(self, shard: int) -> Path:
        return self.folder / f"answers-{shard:02d}.sqlite"

    def _connect(self, shard: int) -> sqlite3.Connection:
        file = sqlite3.connect(self._path(shard), timeout=LOCK_SEC, check_same_thread=False)
        self._open[shard] = file
        try:
            if shard in self.shards:
                file.execute("PRAGMA locking_mode=EXCLUSIVE")
                file.execute("PRAGMA journal_mode=WAL")  # in this mode, kept in memory: no file is mapped or shared
                file.execute("PRAGMA synchronous=NORMAL")
            file.execute("CREATE TABLE IF NOT EXISTS answers (request TEXT PRIMARY KEY, answer TEXT) WITHOUT ROWID")
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                rule = "one process at a time writes a shard of answers"
                raise ResourceError(str(self._path(shard)), "in use", rule, "wait for the other run") from error
            raise
        return file

"""Web archives to packed tokens: time, and the most memory that a worker ever held.

    python -m benchmarks.archive [--megabytes 1000] [--workers 1]

Writes WARC files of pages made from the Python documentation (paragraphs between menus, every page with a number of its
own), then runs ``sundog prepare`` with near duplicates on a local Ray with data in files alone. Printed are the bytes
of HTML, and for each stage the seconds until it was done and the greatest resident memory of a worker and of the driver
meanwhile; of a worker also without mapped files, which the system takes back when it needs them. Two sizes tell whether
memory grows with the corpus.
"""

import argparse
import html
import io
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
from fastwarc.warc import WarcRecord, WarcRecordType

from benchmarks.curate import corpus as texts_of

FILE_BYTES = 50 * 2**20  # of HTML in one archive
POLL_SEC = 0.2
NOTHING = {"worker": 0, "worker's own": 0, "driver": 0}
MENU = "".join(f'<li><a href="/{n}">Section {n}</a></li>' for n in range(40))
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n"


def page(text: str, number: int) -> bytes:
    """An HTML page as crawls have them: a menu, paragraphs, a footer."""
    body = "".join(f"<p>{html.escape(part)}</p>" for part in text.split("\n\n"))
    title = f"Page {number}"
    main = f"<nav><ul>{MENU}</ul></nav><main><h1>{title}</h1>{body}</main><footer>Imprint</footer>"
    return f"<html><head><title>{title}</title></head><body>{main}</body></html>".encode()


def record(content: bytes, number: int) -> bytes:
    """A response of the server as a WARC record."""
    made, out = WarcRecord(), io.BytesIO()
    made.init_headers(
        record_type=WarcRecordType.response, record_urn=f"uuid:00000000-0000-0000-0000-{number:012d}".encode()
    )
    made.headers["WARC-Target-URI"] = f"https://example.org/{number}"
    made.headers["Content-Type"] = "application/http; msgtype=response"
    made.set_bytes_content(HEAD + content)
    made.write(out)
    return out.getvalue()


def write_archives(folder: Path, size: int) -> tuple[int, int]:
    """Archives with ``size`` bytes of HTML; returns pages and bytes.

    Each page is a draw of paragraphs of the documentation, so that few are near duplicates.
    """
    folder.mkdir(parents=True)
    paragraphs = [p for row in texts_of(1500) for p in row["text"].split("\n\n") if len(p) > 100]
    chance, pages, written = random.Random(0), 0, 0
    while written < size:
        with (folder / f"{written // FILE_BYTES:05d}-{pages}.warc").open("wb") as file:
            end = min(size, written + FILE_BYTES)
            while written < end:
                text = "\n\n".join(chance.choices(paragraphs, k=chance.randint(3, 20)))
                content = page(text, pages)
                file.write(record(content, pages))
                pages, written = pages + 1, written + len(content)
    return pages, written


class Memory:
    """The greatest resident memory seen of processes below a command, by whether they are Ray's workers."""

    def __init__(self, pid: int) -> None:
        self.root, self.peaks, self._over = psutil.Process(pid), dict(NOTHING), threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()

    def _poll(self) -> None:
        while not self._over.wait(POLL_SEC):
            for process in psutil.process_iter(["cmdline", "memory_info"]):
                words, memory = process.info["cmdline"] or [], process.info["memory_info"]
                if memory is None:
                    continue
                if process.pid == self.root.pid:
                    self.peaks["driver"] = max(self.peaks["driver"], memory.rss)
                elif words and words[0].startswith("ray::") and self.root.pid in _parents(process):
                    self.peaks["worker"] = max(self.peaks["worker"], memory.rss)
                    self.peaks["worker's own"] = max(self.peaks["worker's own"], memory.rss - memory.shared)

    def taken(self) -> dict[str, int]:
        """The peaks since the last call."""
        peaks, self.peaks = self.peaks, dict(NOTHING)
        return peaks

    def stop(self) -> None:
        self._over.set()
        self._thread.join()


def _parents(process: psutil.Process) -> list[int]:
    try:
        return [parent.pid for parent in process.parents()]
    except psutil.NoSuchProcess:
        return []


def main() -> None:
    """Writes the archives, runs the stages, prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        pages, size = write_archives(folder / "crawl", arguments.megabytes * 10**6)
        print(f"{pages:,} pages, {size / 1e6:,.0f} MB of HTML", flush=True)
        options = ["data=path", f"data.path={folder / 'crawl' / '*.warc'}", f"data.dir={folder / 'data'}"]
        options += ["curation=near", f"cluster.workers={arguments.workers}"]
        start = time.monotonic()
        command = [sys.executable, "-m", "launch", "prepare", *options]
        done = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        memory = Memory(done.pid)
        assert done.stdout is not None
        for line in done.stdout:
            if line.endswith("]\n"):  # a stage is done
                peaks = ", ".join(f"{who} {peak / 1e6:,.0f} MB" for who, peak in memory.taken().items())
                print(f"{time.monotonic() - start:6.0f} s, at most {peaks}; {line}", end="", flush=True)
        memory.stop()
        assert done.wait() == 0, f"sundog prepare ended with {done.returncode}"


if __name__ == "__main__":
    main()

"""A job's log as it grows, and the exit code that its command ended with."""

import asyncio
import logging
import os
import queue
import threading
import time
from collections.abc import Callable

import aiohttp
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from cluster.verdict import CODE_LINE, LOST, SHELL, verdict
from conf.errors import EXIT_BUG, EXIT_TERMINATED, ResourceError

STATUS_POLL_SEC = 0.5
SILENCE_SEC = 90.0  # of the server, until the following ends; the job goes on meanwhile


class Follow:
    """A submitted job, followed to its end."""

    def __init__(
        self, client: JobSubmissionClient, job: str, on_line: Callable[[str], None], stop: Callable[[], int]
    ) -> None:
        self.lost = False  # whether the job ended without its command's exit code: Ray lost it
        self._client, self._job, self._on_line, self._stop = client, job, on_line, stop
        self._chunks: queue.Queue[str | None] = queue.Queue()
        self._partial, self._received = "", 0
        self._code: int | None = None
        self._broken = False
        self._answered = time.monotonic()  # when the server last did
        self._listen()

    def _listen(self) -> None:
        threading.Thread(target=lambda: asyncio.run(self._tail(self._received)), daemon=True, name="job-log").start()

    async def _tail(self, known: int) -> None:
        """Take the log from its first character on that is not ``known``; a stream begins at the log's beginning."""
        try:
            async for chunk in self._client.tail_job_logs(self._job):
                known, new = max(known - len(chunk), 0), chunk[known:]
                if new:
                    self._chunks.put(new)
        except (RuntimeError, OSError, aiohttp.ClientError) as error:
            logging.getLogger(__name__).debug("the log stream ended early: %s", error)
        finally:
            self._chunks.put(None)

    def exit_code(self) -> int:
        """Follow the job to its end.

        Raises:
            ResourceError: the server does not answer for ``SILENCE_SEC``.
        """
        asked = False
        while True:
            try:
                if self._stop() and not asked:
                    asked = self._ask_to_stop()
                if self._pass_on(STATUS_POLL_SEC):
                    continue
                if (details := self._ended()) is not None:
                    return self._code_of(details)
                if self._broken:
                    self._broken = False
                    self._listen()
            except KeyboardInterrupt:
                if asked:
                    raise
                asked = self._ask_to_stop()

    def _ask_to_stop(self) -> bool:
        self._on_line("stopping the job; it may finish its step and write a checkpoint")
        self._client.stop_job(self._job)
        return True

    def _pass_on(self, wait_sec: float) -> bool:
        """Hand over the log that has arrived; return whether more may come now."""
        try:
            chunk = self._chunks.get(timeout=wait_sec)
        except queue.Empty:
            return False
        if chunk is None:  # the stream ended, with the job's log or before
            self._broken = True
            time.sleep(wait_sec)
            return False
        self._received += len(chunk)
        self._show(chunk)
        return True

    def _show(self, text: str) -> None:
        *lines, self._partial = (self._partial + text).split("\n")
        for line in lines:
            if found := CODE_LINE.match(line):
                self._code = int(found[1])
            elif not SHELL.match(line):
                self._on_line(line)

    def _ended(self) -> JobDetails | None:
        try:
            details = self._client.get_job_info(self._job)
        except (ResourceError, RuntimeError) as error:
            if time.monotonic() - self._answered > SILENCE_SEC:
                raise self._gone(error) from error
            return None
        self._answered = time.monotonic()
        return details if details.status.is_terminal() else None

    def _gone(self, error: Exception) -> ResourceError:
        reason = error.rule if isinstance(error, ResourceError) else str(error).splitlines()[0]
        return ResourceError(
            "cluster.address",
            self._client.get_address(),
            f"the job server has not answered for {SILENCE_SEC:g} s ({reason})",
            f"the job goes on if its cluster lives: `sundog logs -f {self._job}`; if not, the same command goes on "
            "from its newest checkpoint",
        )

    def _code_of(self, details: JobDetails) -> int:
        """Return the exit code, from Ray's record or from the log's last line."""
        while self._pass_on(0.0):
            pass
        # The stream may end, or lag, before the log's end; the whole log has the rest.
        try:
            self._show(self._client.get_job_logs(self._job)[self._received :])
        except (ResourceError, RuntimeError) as error:
            logging.getLogger(__name__).debug("the rest of the log is gone: %s", error)
        if self._partial:
            self._show("\n")
        if details.driver_exit_code is not None:
            return details.driver_exit_code
        if self._code is not None:
            return self._code
        if details.status == JobStatus.STOPPED:
            return EXIT_TERMINATED
        self.lost = details.error_type == LOST
        self._on_line(f"the job: {verdict(details).told}")
        return os.EX_OK if details.status == JobStatus.SUCCEEDED else EXIT_BUG

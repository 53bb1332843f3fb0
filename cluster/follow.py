"""A job's log as it grows, and the exit code that its command ended with."""

import asyncio
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable

from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from conf.errors import EXIT_BUG, EXIT_TERMINATED

STATUS_POLL_SEC = 0.5
LOST = "JOB_SUPERVISOR_ACTOR_DIED"  # Ray's word for a job whose own process, or machine, is gone
CODE_LINE = re.compile(r"^\[sundog exit code (\d+)\]$", re.MULTILINE)


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
        threading.Thread(target=lambda: asyncio.run(self._tail()), daemon=True, name="job-log").start()

    async def _tail(self) -> None:
        try:
            async for chunk in self._client.tail_job_logs(self._job):
                self._chunks.put(chunk)
        except (RuntimeError, OSError) as error:
            logging.getLogger(__name__).debug("the log stream ended early: %s", error)
        finally:
            self._chunks.put(None)

    def exit_code(self) -> int:
        asked = False
        while True:
            try:
                if self._stop() and not asked:
                    asked = self._ask_to_stop()
                if not self._pass_on(STATUS_POLL_SEC) and (details := self._ended()) is not None:
                    return self._code_of(details)
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
        if chunk is None:
            self._chunks.put(None)  # the end stays the end
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
            else:
                self._on_line(line)

    def _ended(self) -> JobDetails | None:
        details = self._client.get_job_info(self._job)
        return details if details.status.is_terminal() else None

    def _code_of(self, details: JobDetails) -> int:
        """Return the exit code, from Ray's record or from the log's last line."""
        while self._pass_on(0.0):
            pass
        # The stream may end, or lag, before the log's end; the whole log has the rest.
        self._show(self._client.get_job_logs(self._job)[self._received :])
        if self._partial:
            self._show("\n")
        if details.driver_exit_code is not None:
            return details.driver_exit_code
        if self._code is not None:
            return self._code
        if details.status == JobStatus.STOPPED:
            return EXIT_TERMINATED
        self.lost = details.error_type == LOST
        self._on_line(f"the job {details.status.value.lower()}: {details.message}")
        return os.EX_OK if details.status == JobStatus.SUCCEEDED else EXIT_BUG

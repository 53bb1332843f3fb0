"""One writer a folder: a lock that the kernel drops when its holder dies."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conf.errors import DataError, ResourceError


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process, making it if need be.

    Raises:
        ResourceError: another live process holds it.
        DataError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / ".lock").open("w")
    except OSError as error:
        raise DataError(
            str(folder), "", f"the run folder must be writable: {error.strerror}", "another run_dir"
        ) from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResourceError(
                "run_dir",
                folder,
                "one command at a time may write a run folder",
                "wait for it, or choose another name=",
            ) from None
        yield

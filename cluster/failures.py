"""What can go wrong in other processes, as errors with a place and a log; all survive pickling."""

from pathlib import Path

from conf.errors import EXIT_TERMINATED, SundogError


class RankFailed(SundogError):
    """A rank raised something that is no user error, or its process died. The whole gang is gone by then.

    ``died`` tells a dead process from an exception; ``tail`` is the end of the rank's log.
    """

    def __init__(self, rank: int, node: str, message: str, log_path: str, tail: str, died: bool) -> None:
        super().__init__(f"rank {rank} on {node} failed first: {message}")
        self.rank, self.node, self.message, self.log_path, self.tail, self.died = (
            rank,
            node,
            message,
            log_path,
            tail,
            died,
        )

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.rank, self.node, self.message, self.log_path, self.tail, self.died)

    def __str__(self) -> str:
        last = "".join(f"\n  | {line}" for line in self.tail.splitlines())
        return super().__str__() + last + (f"\n  log:  {self.log_path}" if self.log_path else "")


class UnitFailed(SundogError):
    """A unit of a data stage raised something that is no user error, or killed its process again and again."""

    def __init__(self, label: str, unit: str, message: str, tail: str, log_path: str = "") -> None:
        super().__init__(f"{label}, unit {unit}: {message}")
        self.unit_label, self.unit, self.message, self.tail, self.log_path = label, unit, message, tail, log_path

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.unit_label, self.unit, self.message, self.tail, self.log_path)

    def __str__(self) -> str:
        last = "".join(f"\n  | {line}" for line in self.tail.splitlines())
        return super().__str__() + last + (f"\n  log:  {Path(self.log_path)}" if self.log_path else "")


class StopForced(SundogError):
    """A stop ended in killing the ranks: they did not answer in time, or the user asked twice."""

    exit_code = EXIT_TERMINATED
    label = "stopped"


class GangStopped(Exception):
    """A stop was requested before the ranks had begun, so there is no result. Never leaves this package."""

"""The errors that a user can cause or meet, and the exit code that each ends with.

Every one of them carries the field, the value, the rule and the fix, survives pickling (ranks raise them in other
processes), and prints as a few lines without a traceback. Anything else that escapes is a bug and exits with 1.
"""

EXIT_DONE = 0
EXIT_BUG = 1
EXIT_CONFIG = 2
EXIT_RESOURCES = 3
EXIT_STOPPED = 75
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class SundogError(Exception):
    """What went wrong, in which field, and what to do about it.

    ``field`` is the config key or the file that is at fault, ``value`` what it held, ``rule`` the sentence that it
    breaks and ``fix`` what the user can do. Empty parts are not printed.
    """

    exit_code = EXIT_BUG
    label = "error"

    def __init__(self, field: str, value: object = "", rule: str = "", fix: str = "") -> None:
        super().__init__(field, str(value), rule, fix)
        self.field, self.value, self.rule, self.fix = field, str(value), rule, fix

    def __str__(self) -> str:
        head = f"{self.label}: {self.field}" + (f" = {self.value}" if self.value else "")
        rule = f"\n  rule: {self.rule}" if self.rule else ""
        fix = f"\n  fix:  {self.fix}" if self.fix else ""
        return head + rule + fix


class ConfigError(SundogError):
    """A config value, an override or the command line is wrong."""

    exit_code = EXIT_CONFIG
    label = "config error"


class DataError(SundogError):
    """An input or a file of the run (corpus, shard, checkpoint, tokenizer, model folder) cannot be used."""

    exit_code = EXIT_CONFIG
    label = "data error"


class ResourceError(SundogError):
    """The machine or the cluster lacks what the run asks for: CPUs, GPUs, disk, a port, an address."""

    exit_code = EXIT_RESOURCES
    label = "resource error"


class RankLost(ResourceError):
    """Another rank of a gang does not answer. No fault of what the user gave: a new gang may do better."""

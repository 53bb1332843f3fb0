"""Hydra's multirun for ``sundog sweep``: overrides checked as those of one run, then handed to Hydra's sweeper."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from conf.errors import ConfigError
from conf.schema import RunConfig
from launch.preflight import CONF_DIR, check_override, load_config, parse_override

MAX_CHECKED = 10_000  # values of one key
OPTUNA = "hydra/sweeper=optuna"


class JobFailed(Exception):
    """What Hydra's sweeper is told of a job without a result; it is no result of the search."""


def load_sweep(arguments: Sequence[str]) -> tuple[RunConfig, list[str]]:
    """Check a sweep's overrides; return the config of its first job and the keys that do not vary.

    ``hydra.*`` and ``hydra/*`` pass through to Hydra.

    Raises:
        ConfigError: as ``load_config`` does, for every value of every choice and every variant; nothing varies.
    """
    first, fixed = [], []
    for override in (parse_override(a) for a in arguments if not a.startswith(("hydra.", "hydra/", "+hydra."))):
        if not override.is_sweep_override():
            first.append(override.input_line or "")
            fixed.append(override.key_or_group)
            continue
        values = list(_values(override))
        for value in values:
            check_override(parse_override(value))
        first.append(values[0])
    config = load_config(first)
    for variant in config.sweep.variants:
        load_config([*first, *variant.split()])
    if len(first) == len(fixed) and not config.sweep.variants:
        rule = "at least one key has several values"
        raise ConfigError("sweep", " ".join(arguments), rule, "sundog sweep trainer.lr=1e-3,3e-3, or sundog train")
    return config, fixed


def _values(override: Override) -> Iterator[str]:
    """KEY=VALUE for the values of a choice or range, or for the ends of an interval."""
    key, sweep = override.get_key_element(), override.value()
    if isinstance(sweep, IntervalSweep):
        yield from (f"{key}={end}" for end in (sweep.start, sweep.end))
        return
    for number, value in enumerate(override.sweep_string_iterator()):
        if number == MAX_CHECKED:
            raise ConfigError(key, override.input_line, f"at most {MAX_CHECKED} values", "a wider step, or interval()")
        yield f"{key}={value}"


def multirun(arguments: Sequence[str], task: Any, folder: Path, goal: str) -> None:
    """Let Hydra's sweeper propose jobs to ``task.batch`` until it has enough.

    A failed job ends the proposing, after its batch; ``task`` knows which failed.

    Raises:
        ConfigError: Hydra refuses the sweep's own settings (hydra.*).
    """
    ConfigStore.instance().store(name="schema", node=RunConfig)
    GlobalHydra.instance().clear()
    own = ["hydra/launcher=sundog", f"hydra.sweep.dir='{folder}'", "hydra.job.chdir=false"]
    if OPTUNA in arguments:
        own.append(f"hydra.sweeper.direction={goal}")
    try:
        hydra = Hydra.create_main_hydra2("sundog", create_config_search_path(str(CONF_DIR)))
        hydra.multirun("config", task, [*own, *arguments], with_log_configuration=False)
    except (HydraException, OmegaConfBaseException) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError("sweep", " ".join(arguments), reason, "`pip install 'sundog[sweep]'` for Optuna") from None
    except JobFailed:
        pass
    finally:
        GlobalHydra.instance().clear()

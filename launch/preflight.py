"""Overrides to a checked ``RunConfig``. Hydra composes; this module answers mistakes before Hydra sees them.

Hydra's own advice for a misspelt key is to prefix it with ``+``, which then drops the value silently under a typed
schema. Here the schema is closed: an unknown key is an error in every form, with the nearest real key.
"""

import re
from functools import cache
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import conf
from conf.describe import Key, keys
from conf.errors import ConfigError
from conf.rules import check, nearest
from conf.schema import GROUPS, OVERLAYS, RunConfig

CONF_DIR = Path(conf.__file__).resolve().parent
TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list"}


@cache
def options(group: str) -> tuple[str, ...]:
    """Return the names of a group's options: its YAML files."""
    return tuple(sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml")))


def parse_override(argument: str) -> Override:
    """Parse one override. Raises ConfigError when it is none."""
    if "=" not in argument and not argument.startswith("~"):
        raise ConfigError(
            "argument", argument, "a command takes KEY=VALUE overrides", f"{argument}=VALUE, or see `sundog --help`"
        )
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException as error:
        key, _, value = argument.partition("=")
        reason = str(error).splitlines()[0]
        raise ConfigError(
            key, value, f"not in Hydra's override grammar: {reason}", f"quote it: '{key}=\"{value}\"'"
        ) from None


def check_override(override: Override) -> None:
    """Raise ConfigError unless the override sets one key, or picks one option of a group, to a value that fits."""
    _check_form(override)
    _check_key(override)


def _check_form(override: Override) -> None:
    """Refuse ``+key``, ``~key`` and sweeps: the schema is closed and a command is one run."""
    line, key = override.input_line or "", override.key_or_group
    if override.is_delete():
        raise ConfigError(key, line, "a key of the schema cannot be removed", f"{key}=VALUE")
    if override.is_add() and (key in keys() or key in GROUPS + OVERLAYS):
        raise ConfigError(key, line, "'+' adds new keys, and the schema has all of them", line.lstrip("+"))
    if override.is_sweep_override():
        raise ConfigError(key, line, "one command is one run", "`sundog sweep` for all of them, or one value")


def _check_key(override: Override) -> None:
    key, text = override.key_or_group, (override.input_line or "").partition("=")[2]
    if key in GROUPS + OVERLAYS:
        option = str(override.value())
        if option not in options(key) and not (key in OVERLAYS and override.value() is None):
            hint = nearest(option, options(key))
            raise ConfigError(key, option, f"one of {', '.join(options(key))}", hint or f"{key}={options(key)[0]}")
        return
    known = keys()
    if key not in known:
        sections = {name.rpartition(".")[0] for name in known} - {""}
        if key in sections:
            inside = ", ".join(name for name in known if name.startswith(key + "."))
            raise ConfigError(key, text, "it is a section, not a value", f"set one of {inside}")
        leaf = key.rpartition(".")[2]
        same_leaf = [name for name in known if name.rpartition(".")[2] == leaf]
        hint = f"did you mean {' or '.join(same_leaf)}?" if same_leaf else nearest(key, [*known, *GROUPS, *OVERLAYS])
        raise ConfigError(key, text, "unknown key", hint or "`sundog train --help` lists all keys")
    _check_type(known[key], override)


def _check_type(key: Key, override: Override) -> None:
    value = override.value()
    text = str(override.input_line or "").partition("=")[2]
    if isinstance(value, str) and "${" in value:
        return
    if key.kind is str:
        fits = not isinstance(value, (dict, list))
    elif key.kind is float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    elif key.kind is int:
        fits = isinstance(value, int) and not isinstance(value, bool)
    else:
        fits = isinstance(value, key.kind)
    if not fits:
        raise ConfigError(
            key.name, text, f"it must be {TYPE_NAMES[key.kind]}", f"{key.name}={key.default} is the default"
        )


def _compose(overrides: list[str]) -> RunConfig:
    ConfigStore.instance().store(name="schema", node=RunConfig)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF_DIR)):
            config = OmegaConf.to_object(compose("config", overrides=overrides))
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ or error
        reason = re.sub(r"\s+", " ", str(cause)).strip()
        raise ConfigError(
            "overrides", " ".join(overrides), reason, "`sundog train --help` lists keys and types"
        ) from None
    assert isinstance(config, RunConfig), f"the root config composed to {type(config).__name__}"
    return config


def load_config(arguments: list[str], experiment: str = "") -> RunConfig:
    """Compose and check the config that ``arguments`` (Hydra overrides) describe, on top of an experiment overlay.

    Raises:
        ConfigError: naming the field, the value, the rule, the fix and, for a misspelt name, the nearest real one.
    """
    overrides = [parse_override(argument) for argument in arguments]
    for override in overrides:
        check_override(override)
    chosen = {override.key_or_group for override in overrides}
    if experiment and "experiment" not in chosen:
        arguments = [f"experiment={experiment}", *arguments]
    # Hydra takes no null for a group that is null already.
    return check(_compose([a for a in arguments if a not in [f"{overlay}=null" for overlay in OVERLAYS]]))


def dump(config: RunConfig) -> str:
    """Return ``config`` as YAML with every value resolved."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))

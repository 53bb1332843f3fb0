"""Ray's environment variables, settled before Ray is imported.

Ray reads most of them once, when its native library loads, and starts its daemons with what it finds then; a value
that is set later reaches some parts of Ray and not others. ``cluster/__init__.py`` therefore calls ``prepare`` before
any module of this package can import Ray.
"""

import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CODE_ROOT = Path(__file__).resolve().parent.parent

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # `uv run` would otherwise make every worker resolve the project's environment again.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    # Silences a warning on every start of a worker without GPUs.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

_invented: dict[str, str] = {}


def prepare() -> None:
    """Settle usage statistics, the uv hook and authentication, unless the user or the Ray job has already."""
    if "ray" in sys.modules:
        return
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if not os.environ.get("RAY_AUTH_MODE"):
        # A job has the environment of its cluster: where that says nothing, the cluster asks for no token.
        os.environ["RAY_AUTH_MODE"] = "disabled" if inside_job() else "token"
    _choose_token()


def _choose_token() -> None:
    """Authenticate with the user's token, or else with one that lives as long as this process.

    Ray's servers listen on all interfaces also when the cluster is local, so a cluster without authentication lets
    anyone who reaches the machine run code. Such a cluster lets a client in that sends a token, and starts none of its
    actors: ``token_is_invented`` lets the connection tell.
    """
    if os.environ["RAY_AUTH_MODE"] != "token":
        return
    stored = Path.home() / ".ray" / "auth_token"
    if not (os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH") or stored.is_file()):
        os.environ["RAY_AUTH_TOKEN"] = _invented.setdefault("token", secrets.token_hex(32))


def token_is_invented() -> bool:
    """Return whether this process authenticates with a token that nobody gave it."""
    return bool(_invented) and os.environ.get("RAY_AUTH_TOKEN") == _invented["token"]


def is_checkout() -> bool:
    """Return whether this code runs from a checkout, which other machines do not have, not from an installation."""
    return (CODE_ROOT / "pyproject.toml").is_file()


def inside_job() -> bool:
    """Return whether this process is the entrypoint of a Ray job, so that Ray has given it cluster and code."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


@contextmanager
def code_on_path() -> Iterator[None]:
    """Let processes that are started inside the block import this checkout from any working folder."""
    before = os.environ.get("PYTHONPATH")
    parts = [str(CODE_ROOT), *(before.split(os.pathsep) if before else [])]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(parts))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before

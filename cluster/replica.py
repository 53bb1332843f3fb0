"""The Ray Serve deployment around an ASGI application that is named, not imported."""

import os
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from ray import serve
from ray.serve import Application

from cluster.names import resolve
from conf.errors import SundogError

SHUTDOWN_SEC = 5.0  # for the application's own end, after its requests
SLACK_REQUESTS = 1024  # beyond what the application admits, so that it is the one to answer 429


class Endpoint:
    """What a replica says of itself: whether its application could be built, and if not, why."""

    failure: SundogError | None = None
    trace: str = ""

    def startup(self) -> tuple[SundogError | None, str]:
        """Return the user error or the traceback with which building the application ended; (None, "") if it works."""
        return Endpoint.failure, Endpoint.trace


def deployment(
    factory: str,
    model: str,
    settings: dict[str, Any],
    environment: Mapping[str, str],
    *,
    replicas: int,
    admitted: int,
    drain_sec: float,
    cpus: float,
    gpus: float,
) -> Application:
    """Return ``factory(model, settings)`` as a Serve application of ``replicas`` replicas.

    ``admitted`` is how many requests the application itself takes on before it refuses; Serve admits more, so that its
    own queue is never the limit. Requests that run have ``drain_sec`` to finish when it is removed. ``environment`` is
    set in the replica before the factory is imported. A factory that raises makes a replica that answers 503 and tells
    why to ``startup``; Serve would start it again and again.
    """
    ingress: Callable[..., Any] = serve.ingress(_builder(factory, model, settings, dict(environment)))
    wrapped: Any = serve.deployment(
        ingress(Endpoint),
        name="app",
        num_replicas=replicas,
        max_ongoing_requests=admitted + SLACK_REQUESTS,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        graceful_shutdown_timeout_s=drain_sec + SHUTDOWN_SEC,
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    return wrapped.bind()


def _builder(factory: str, model: str, settings: dict[str, Any], environment: dict[str, str]) -> Callable[[], Any]:
    def build() -> Any:
        os.environ.update(environment)
        try:
            return resolve(factory)(model, settings)
        except SundogError as error:
            Endpoint.failure = error
        except Exception:
            Endpoint.trace = traceback.format_exc()
        return _unavailable

    return build


async def _unavailable(scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]) -> None:
    """An ASGI application that answers 503 to everything."""
    if scope["type"] == "lifespan":
        for reply in ("lifespan.startup.complete", "lifespan.shutdown.complete"):
            await receive()
            await send({"type": reply})
    elif scope["type"] == "http":
        await send({"type": "http.response.start", "status": 503, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"the application could not be built"})

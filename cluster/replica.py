"""The Ray Serve deployment around an ASGI application that is named, not imported."""

import os
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.serve import Application

from cluster.crew import Crew
from cluster.names import resolve
from conf.errors import SundogError

SHUTDOWN_SEC = 5.0  # for the application's own end, after its requests
HEALTH_SEC = 5.0  # between two looks; the third bad one ends a replica
SLACK_REQUESTS = 1024  # beyond what the application admits, so that it is the one to answer 429


class Endpoint:
    """What a replica says of itself: whether its application could be built, if not why, and whether it still works."""

    failure: SundogError | None = None
    trace: str = ""
    application: Any = None
    crew: Crew | None = None

    def startup(self) -> tuple[SundogError | None, str]:
        """Return the user error or the traceback with which building the application ended; (None, "") if it works."""
        return Endpoint.failure, Endpoint.trace

    def check_health(self) -> None:
        """Raise when the application says that it cannot go on (``app.state.healthy()``) or a rank has ended.

        Serve then starts another replica.
        """
        healthy = getattr(getattr(Endpoint.application, "state", None), "healthy", None)
        if healthy is not None and not healthy():
            raise RuntimeError("the application cannot go on")
        if Endpoint.crew is not None and not Endpoint.crew.complete:
            raise RuntimeError("a rank of the model has ended")


@dataclass(frozen=True)
class Size:
    """What one replica is given: ``ranks`` processes of ``cpus`` and ``gpus`` each."""

    ranks: int
    cpus: float
    gpus: float
    follower: str  # dotted name of what ranks other than 0 run


def deployment(
    factory: str,
    model: str,
    settings: dict[str, Any],
    environment: Mapping[str, str],
    *,
    replicas: dict[str, Any],
    admitted: int,
    drain_sec: float,
    size: Size,
) -> Application:
    """Return ``factory(model, settings)`` as a Serve application; ``replicas`` are Serve's own settings of how many.

    A replica of several ranks is rank 0 of them and speaks HTTP; the others run ``size.follower(settings)``.
    ``admitted`` is how many requests the application itself takes on before it refuses; Serve admits more, so that its
    own queue is never the limit. Requests that run have ``drain_sec`` to finish when it is removed. ``environment`` is
    set in the replica before the factory is imported. A factory that raises makes a replica that answers 503 and tells
    why to ``startup``; Serve would start it again and again.
    """
    ingress: Callable[..., Any] = serve.ingress(_builder(factory, model, settings, dict(environment), size))
    gang: dict[str, Any] = {}
    if size.ranks > 1:
        bundle = {kind: amount for kind, amount in (("CPU", size.cpus), ("GPU", size.gpus)) if amount}
        gang = {"placement_group_bundles": [bundle] * size.ranks, "placement_group_strategy": "PACK"}
    wrapped: Any = serve.deployment(
        ingress(Endpoint),
        name="app",
        **replicas,
        **gang,
        max_ongoing_requests=admitted + SLACK_REQUESTS,
        ray_actor_options={"num_cpus": size.cpus, "num_gpus": size.gpus},
        health_check_period_s=HEALTH_SEC,
        graceful_shutdown_timeout_s=drain_sec + SHUTDOWN_SEC,
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    return wrapped.bind()


def _builder(
    factory: str, model: str, settings: dict[str, Any], environment: dict[str, str], size: Size
) -> Callable[[], Any]:
    def build() -> Any:
        os.environ.update(environment)
        try:
            if size.ranks > 1:
                Endpoint.crew = Crew(size.ranks, size.cpus, size.gpus, environment)
                Endpoint.crew.run(size.follower, settings)
            Endpoint.application = resolve(factory)(model, settings)
            return Endpoint.application
        except SundogError as error:
            Endpoint.failure = error
        except Exception:
            Endpoint.trace = traceback.format_exc()
        if Endpoint.crew is not None:  # the replica stays to tell why; its ranks have nothing to do
            Endpoint.crew.close()
            Endpoint.crew = None
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

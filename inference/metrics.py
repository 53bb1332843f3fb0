"""What ``/metrics`` shows, in Prometheus' text format."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from inference.runner import Runner

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """Counters and histograms of one application, in a registry of its own."""

    def __init__(self, runner: Runner) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # memory, CPU time and open files
        self.answers = Counter(
            "sundog_requests", "Requests by endpoint and status.", ["endpoint", "status"], registry=registry
        )
        self.prompt_tokens = Counter("sundog_prompt_tokens", "Tokens of accepted prompts.", registry=registry)
        self.generation_tokens = Counter("sundog_generation_tokens", "Tokens generated.", registry=registry)
        self.cancelled = Counter("sundog_requests_cancelled", "Requests whose client left.", registry=registry)
        self.first_token = Histogram(
            "sundog_time_to_first_token_seconds",
            "From acceptance to the first token.",
            buckets=SECONDS,
            registry=registry,
        )
        self.between_tokens = Histogram(
            "sundog_inter_token_seconds", "Between tokens of one request.", buckets=SECONDS, registry=registry
        )
        self.whole_request = Histogram(
            "sundog_request_seconds", "From acceptance to the last token.", buckets=SECONDS, registry=registry
        )
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "sundog_requests_running": ("Texts that the engine works on.", lambda: runner.running),
            "sundog_requests_waiting": ("Texts in the queue.", lambda: runner.waiting),
            "sundog_tokens_per_second": ("Tokens computed, over the last seconds.", lambda: runner.tokens_per_sec),
            "sundog_kv_pages": ("Pages of the key-value cache.", lambda: runner.engine.pool.pages),
            "sundog_kv_pages_used": ("Pages that texts hold.", lambda: runner.engine.pool.used),
            "sundog_kv_pages_remembered": (
                "Unused pages kept for texts that begin alike.",
                lambda: runner.engine.pool.remembered,
            ),
        }
        for name, (meaning, read) in gauges.items():
            Gauge(name, meaning, registry=registry).set_function(read)
        registry.register(_EngineCounters(runner))

    def text(self) -> bytes:
        """The whole page."""
        return generate_latest(self.registry)


class _EngineCounters(Collector):
    """What the engine counts itself."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def collect(self) -> Iterator[CounterMetricFamily]:
        stats = self._runner.engine.stats
        yield CounterMetricFamily("sundog_steps", "Forward passes.", stats.steps)
        yield CounterMetricFamily("sundog_prompt_tokens_computed", "Prompt tokens computed.", stats.prompt_tokens)
        yield CounterMetricFamily(
            "sundog_prefix_hit_tokens", "Prompt tokens found in the cache.", stats.prefix_hit_tokens
        )
        yield CounterMetricFamily("sundog_preemptions", "Texts that gave their pages back.", stats.preemptions)

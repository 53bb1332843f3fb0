"""What ``/metrics`` shows, in Prometheus' text format."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from inference.runner import Runner

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """Counters and histograms of one application, in a registry of its own."""

    def __init__(self, runner: Runner) -> None:
        self.registry = registry = CollectorRegistry()
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
        running = Gauge("sundog_requests_running", "Generations that take turns.", registry=registry)
        running.set_function(lambda: runner.running)
        waiting = Gauge("sundog_requests_waiting", "Generations in the queue.", registry=registry)
        waiting.set_function(lambda: runner.waiting)

    def text(self) -> bytes:
        """The whole page."""
        return generate_latest(self.registry)

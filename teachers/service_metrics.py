"""What a service counts, as Prometheus reads it at /metrics. Labels are few and fixed: no client can add one."""

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
ROUTES = ("/v1/completions", "/v1/chat/completions", "/v1/score", "/v1/models", "/health", "/metrics")
COUNTS = {  # of the engine, where it counts them
    "shared_tokens": "Prompt tokens of sequences to score that were computed for another sequence.",
    "preempted": "Rows that gave their pages back and were computed again.",
    "guesses": "Tokens guessed by the multi-token prediction module.",
    "guesses_right": "Guesses that were what the model drew.",
}
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)


disable_created_metrics()


class Metrics:
    """The counters of one service; each service has its own registry."""

    def __init__(self):
        self.registry = CollectorRegistry()
        own = {"registry": self.registry, "namespace": "distill"}
        self.requests = Counter("requests", "Requests answered.", ["route", "status"], **own)
        self.request_s = Histogram("request_seconds", "From head to last byte.", ["route"], buckets=SECONDS, **own)
        self.first_token_s = Histogram(
            "first_token_seconds", "From request to the first token of a stream.", buckets=SECONDS, **own
        )
        self.prompt_tokens = Counter("prompt_tokens", "Prompt tokens of accepted requests.", **own)
        self.completion_tokens = Counter("completion_tokens", "Tokens drawn and told.", **own)
        self.scored_tokens = Counter("scored_tokens", "Completion tokens scored.", **own)
        self.disconnects = Counter("disconnects", "Clients that left before their answer.", **own)

    def watch(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A gauge whose value is read when it is asked for."""
        Gauge(name, text, namespace="distill", registry=self.registry).set_function(read)

    def text(self) -> bytes:
        return generate_latest(self.registry)


def route_of(path: str) -> str:
    """The path as a label."""
    return path if path in ROUTES else "/v1/models" if path.startswith("/v1/models/") else "other"

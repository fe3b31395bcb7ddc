"""Prometheus metrics of an HTTP process, and of the engine as it was last heard of.

Names and meanings are those of vLLM (`vllm:...`) where Kvik measures the same thing, so that its dashboards work; what
is Kvik's own begins with `kvik:`. With several HTTP processes prometheus_client adds them up through files in
PROMETHEUS_MULTIPROC_DIR.
"""

from __future__ import annotations

import os
from typing import Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    multiprocess,
)

from kvik.server.messages import Status
from kvik.text.output_processor import OpenRequest

__all__ = ["CONTENT_TYPE", "MULTIPROCESS_VARIABLE", "Metrics"]

CONTENT_TYPE = CONTENT_TYPE_LATEST
MULTIPROCESS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000)


class Metrics:
    """Owns its registry, so that several servers in one process (tests) do not share numbers."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model
        self._make_gauges()
        self._make_counters()
        self._make_histograms()

    def _make_gauges(self) -> None:
        self._running = self._gauge("vllm:num_requests_running", "Sequences that run")
        self._waiting = self._gauge("vllm:num_requests_waiting", "Sequences that wait")
        self._kv_usage = self._gauge("vllm:kv_cache_usage_perc", "Share of the KV blocks in use, 0 to 1")
        self._steps = self._gauge("kvik:engine_steps", "Steps since start")
        self._step_time = self._gauge("kvik:engine_step_seconds", "Time in steps since start", "kind")

    def _make_counters(self) -> None:
        self._success = self._counter("vllm:request_success", "Finished requests", "finished_reason")
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens of finished requests")
        self._output_tokens = self._counter("vllm:generation_tokens", "Generated tokens of finished requests")
        self._queries = self._counter("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache")
        self._hits = self._counter("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache")
        self._preemptions = self._counter("vllm:num_preemptions", "Preemptions of finished requests")
        self._http = self._counter("kvik:http_requests", "HTTP responses", "method", "route", "status")

    def _make_histograms(self) -> None:
        self._ttft = self._histogram("vllm:time_to_first_token_seconds", "Arrival to first token", _SECONDS)
        self._tpot = self._histogram("vllm:time_per_output_token_seconds", "Per later token", _PER_TOKEN)
        self._e2e = self._histogram("vllm:e2e_request_latency_seconds", "Arrival to end", _SECONDS)
        self._queue = self._histogram("vllm:request_queue_time_seconds", "Waiting for the first step", _SECONDS)
        self._prompt_size = self._histogram("vllm:request_prompt_tokens", "Prompt tokens of a request", _TOKENS)
        self._output_size = self._histogram("vllm:request_generation_tokens", "Generated tokens of one", _TOKENS)

    def finished(self, request: OpenRequest) -> None:
        """Count a finished request."""
        usage, metrics = request.usage, request.metrics
        self._success.labels(self._model, str(request.finish_reason)).inc()
        self._prompt_tokens.labels(self._model).inc(usage.prompt_tokens)
        self._queries.labels(self._model).inc(usage.prompt_tokens)
        self._hits.labels(self._model).inc(usage.cached_tokens)
        self._preemptions.labels(self._model).inc(metrics.num_preemptions)
        self._prompt_size.labels(self._model).observe(usage.prompt_tokens)
        if not request.embedding:  # its one token was sampled for nobody
            self._output_tokens.labels(self._model).inc(usage.completion_tokens)
            self._output_size.labels(self._model).observe(usage.completion_tokens)
        self._e2e.labels(self._model).observe(metrics.total_time)
        for histogram, seconds in (
            (self._ttft, metrics.time_to_first_token),
            (self._tpot, metrics.time_per_output_token),
            (self._queue, metrics.queue_time),
        ):
            if seconds is not None:
                histogram.labels(self._model).observe(seconds)

    def responded(self, method: str, route: str, status: int) -> None:
        """Count an HTTP response; status 499 is a client that left before one."""
        self._http.labels(self._model, method, route, str(status)).inc()

    def render(self, status: Status | None) -> bytes:
        """The text that Prometheus reads."""
        if status is not None:
            self._running.labels(self._model).set(status.num_running)
            self._waiting.labels(self._model).set(status.num_waiting)
            self._kv_usage.labels(self._model).set(status.num_blocks_used / max(1, status.num_blocks))
            self._steps.labels(self._model).set(status.num_steps)
            for kind, seconds in (("prefill", status.prefill_time), ("decode", status.decode_time)):
                self._step_time.labels(self._model, kind).set(seconds)
        if MULTIPROCESS_VARIABLE not in os.environ:
            return generate_latest(self.registry)
        together = CollectorRegistry()
        multiprocess.MultiProcessCollector(together)  # type: ignore[no-untyped-call]
        return generate_latest(together)

    def _gauge(self, name: str, help: str, *labels: str) -> Gauge:
        return Gauge(name, help, ("model_name", *labels), registry=self.registry, multiprocess_mode="livemostrecent")

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(name, help, ("model_name", *labels), registry=self.registry)

    def _histogram(self, name: str, help: str, buckets: Any) -> Histogram:
        return Histogram(name, help, ("model_name",), registry=self.registry, buckets=buckets)

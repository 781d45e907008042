"""Counts, gauges and times for Prometheus: vLLM's names after `miss:`, and a few of ours.

Knows numbers and fixed words; does not know requests' contents.

The law, at any moment: requests_received_total = the sum of requests_ended_total over outcomes (answered, rejected,
failed, cancelled) + requests_in_flight. A request here is one of the POST routes, which all take an image.
"""

import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from miss.engine.serving.problems import ANSWERED, CANCELLED, FAILED, REJECTED

__all__ = ["CONTENT_TYPE_LATEST", "Metrics"]
SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKENS = (1, 2, 4, 8, 16, 24, 32, 40)
STAGES = ("body", "admission", "image", "engine", "response")


class Metrics:
    """One registry a server, so that several may live in a process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.model_name = ""
        self.received = self._counter("requests_received", "Requests with an image, whatever came of them")
        self.ended = self._counter("requests_ended", "Requests that ended", "outcome")
        self.in_flight = self._gauge("requests_in_flight", "Requests received and not ended")
        self.success = self._counter("request_success", "Answers by how they ended", "model_name", "finished_reason")
        self.rejected = self._counter("requests_rejected", "Refused requests", "reason")
        self.failed = self._counter("requests_failed", "Requests without an answer, by fault or time", "reason")
        self.cancelled = self._counter("requests_cancelled", "Clients that went away, by where", "stage")
        self.http = self._counter("http_requests", "All requests", "handler", "method", "status")
        self.restarts = self._counter("engine_restarts", "Engines that ended and were started anew")
        self.decoders = self._counter("image_workers_ended", "Decoding processes that were replaced", "reason")
        self.images = self._counter("image_rejected", "Images that were refused", "reason")
        self.prompt = self._counter("prompt_tokens", "Tokens of questions", "model_name")
        self.generated = self._counter("generation_tokens", "Tokens of answers", "model_name")
        self.running = self._gauge("num_requests_running", "Questions that the engine works on", "model_name")
        self.waiting = self._gauge("num_requests_waiting", "Questions that wait", "model_name")
        self.slots = self._gauge("answer_slots_used", "Answer slots that are taken", "model_name")
        self.queries = self._gauge("mm_cache_queries_total", "Images looked for in the engine's cache", "model_name")
        self.hits = self._gauge("mm_cache_hits_total", "Images found in the engine's cache", "model_name")
        self.audit_failures = self._gauge("audit_failures_total", "Times that the audit log could not be written")
        names = {
            "e2e_request_latency_seconds": "From a request's first byte to its answer",
            "request_queue_time_seconds": "In the engine's queue",
            "request_prefill_time_seconds": "Image and question encoding",
            "request_decode_time_seconds": "Answer tokens",
            "time_to_first_token_seconds": "To the first part of a streamed answer",
            "image_decode_seconds": "From bytes to pixels",
        }
        self._times = {name: self._histogram(name, text, SHORT) for name, text in names.items()}
        self.prompt_sizes = self._histogram("request_prompt_tokens", "Tokens of a question", TOKENS)
        self.answer_sizes = self._histogram("request_generation_tokens", "Tokens of an answer", TOKENS)
        for outcome in (ANSWERED, REJECTED, FAILED, CANCELLED):
            self.ended.labels(outcome)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"miss:{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"miss:{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"miss:{name}", text, ["model_name"], registry=self.registry, buckets=buckets)

    def named(self, name: str, version: str, precision: str) -> None:
        """The model, once it is known; its gauges stand at 0 from then on."""
        self.model_name = name
        info = Gauge("miss:build_info", "What runs", ["version", "model_name", "precision"], registry=self.registry)
        info.labels(version, name, precision).set(1)
        for gauge in (self.running, self.waiting, self.slots, self.queries, self.hits):
            gauge.labels(name).set(0)

    def took(self, name: str, seconds: float) -> None:
        self._times[name].labels(self.model_name).observe(seconds)

    def begin(self) -> None:
        self.received.inc()
        self.in_flight.inc()

    def end(self, outcome: str, code: str, stage: str, arrived: float) -> None:
        """code: the word of the problem, where there was one."""
        self.in_flight.dec()
        self.ended.labels(outcome).inc()
        if outcome == ANSWERED and stage == "response":  # else an image was only looked at
            self.took("e2e_request_latency_seconds", time.monotonic() - arrived)
        elif outcome == CANCELLED:
            self.cancelled.labels(stage).inc()
        else:
            (self.failed if outcome == FAILED else self.rejected).labels(code).inc()
            if code.startswith("image_"):
                self.images.labels(code).inc()

    def answered(self, answer: dict[str, Any]) -> None:
        """One question's answer, with the engine's own times."""
        name, seconds = self.model_name, answer["seconds"]
        self.success.labels(name, "stop" if answer["finished"] else "length").inc()
        self.prompt.labels(name).inc(answer["prompt_tokens"])
        self.generated.labels(name).inc(len(answer["token_ids"]))
        self.prompt_sizes.labels(name).observe(answer["prompt_tokens"])
        self.answer_sizes.labels(name).observe(len(answer["token_ids"]))
        self.took("request_queue_time_seconds", max(0.0, seconds["queue"]))
        self.took("request_prefill_time_seconds", max(0.0, seconds["image"] + seconds["question"]))
        self.took("request_decode_time_seconds", max(0.0, seconds["decode"]))

    def looked(self, stats: dict[str, Any] | None, audit_failures: int) -> None:
        """The engine's own gauges; of an engine that is not there, nothing runs and nothing waits."""
        name = self.model_name
        self.running.labels(name).set(stats["running"] if stats else 0)
        self.waiting.labels(name).set(stats["waiting"] if stats else 0)
        self.slots.labels(name).set(stats["answer_slots"] if stats else 0)
        if stats:
            tier = stats["image_tokens"]
            self.hits.labels(name).set(tier["hits"])
            self.queries.labels(name).set(tier["hits"] + tier["misses"])
        self.audit_failures.set(audit_failures)

    def text(self) -> bytes:
        return generate_latest(self.registry)

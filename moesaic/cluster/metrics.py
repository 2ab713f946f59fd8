"""Prometheus metrics of a gateway: its workers, its queues, and expired leases.

This module does not depend on HTTP.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from moesaic.cluster.gateway import Gateway

WAIT_BUCKETS = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0),
    *(10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0),
)
"""Upper bounds of the histogram buckets of the queueing time, in seconds."""


class ClusterCollector:
    """Collector of a gateway's metrics. ``serve.metrics.Metrics`` calls it for each scrape."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._waits = Histogram(
            "moesaic_gateway_queue_seconds",
            "Time from a request's submission to this gateway to its first lease.",
            ("model_name",),
            buckets=WAIT_BUCKETS,
            registry=None,
        )
        gateway.leases.add_wait_observer(self._observe_wait)

    def _observe_wait(self, model: str, seconds: float) -> None:
        self._waits.labels(model).observe(seconds)

    def __call__(self) -> Iterable[Metric]:
        yield from self._worker_metrics()
        yield from self._job_metrics()
        leases = self._gateway.leases
        for name, description, count in (
            ("leases_lost", "Leases that expired.", leases.expired),
            ("fenced", "Results and event batches refused because their lease was not valid.", leases.fenced),
            ("dead", "Jobs that crashed too often and became dead letters.", leases.dead),
        ):
            yield CounterMetricFamily(f"moesaic_gateway_{name}", description, value=count)
        seconds = leases.mean_job_seconds
        yield GaugeMetricFamily("moesaic_gateway_job_seconds", "Running mean of a job's duration.", seconds)
        yield from self._waits.collect()

    def _worker_metrics(self) -> Iterable[Metric]:
        workers = GaugeMetricFamily("moesaic_gateway_workers", "Connected workers.", labels=("state",))
        slots = GaugeMetricFamily("moesaic_gateway_slots", "Slots of connected workers.", labels=("state",))
        sessions = self._gateway.workers.sessions.values()
        drained = sum(session.drained for session in sessions)
        busy = sum(len(session.leases) for session in sessions)
        free = sum(max(0, session.free_slots) for session in sessions if not session.drained)
        for family, counts in (
            (workers, {"working": len(sessions) - drained, "drained": drained}),
            (slots, {"busy": busy, "free": free}),
        ):
            for state, count in counts.items():
                family.add_metric((state,), count)
        return workers, slots

    def _job_metrics(self) -> Iterable[Metric]:
        labels = ("state", "model_name")
        jobs = GaugeMetricFamily("moesaic_gateway_jobs", "Jobs that have not ended.", labels=labels)
        cost = GaugeMetricFamily(
            "moesaic_gateway_queued_tokens", "Estimated tokens of queued jobs.", labels=("model_name",)
        )
        for model in sorted({*self._gateway.workers.models, *self._gateway.depths}):
            depth = self._gateway.depths.get(model)
            for state in ("queued", "leased", "suspects"):
                jobs.add_metric((state, model), getattr(depth, state, 0))
            cost.add_metric((model,), depth.cost if depth else 0)
        return jobs, cost

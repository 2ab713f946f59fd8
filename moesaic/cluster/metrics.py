"""A gateway's figures, as Prometheus reads them: its workers, its queues, and what was lost or came too late.

Knows a gateway and Prometheus' types. Does not know HTTP.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from moesaic.cluster.gateway import Gateway

WAIT_BUCKETS = (
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    120.0,
    300.0,
    600.0,
    1800.0,
    3600.0,
)


class ClusterCollector:
    """What ``serve.watch.Metrics`` shows besides its own: called whenever somebody looks."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        about = "From a request's acceptance here to its first lease."
        self._waits = Histogram(
            "moesaic_gateway_queue_seconds", about, ("model_name",), buckets=WAIT_BUCKETS, registry=None
        )
        gateway.waited = lambda model, seconds: self._waits.labels(model).observe(seconds)

    def __call__(self) -> Iterable[Metric]:
        yield from self._crew()
        yield from self._jobs()
        gateway = self._gateway
        for name, about, count in (
            ("leases_lost", "Leases that were lost with their workers.", gateway.lost),
            ("fenced", "Results and tokens that came too late, and did not count.", gateway.fenced),
            ("dead", "Jobs set aside because every worker that had them died.", gateway.dead),
        ):
            yield CounterMetricFamily(f"moesaic_gateway_{name}", about, value=count)
        yield GaugeMetricFamily("moesaic_gateway_job_seconds", "What a job takes, a running mean.", gateway.seconds)
        yield from self._waits.collect()

    def _crew(self) -> Iterable[Metric]:
        workers = GaugeMetricFamily("moesaic_gateway_workers", "Workers that are here.", labels=("state",))
        slots = GaugeMetricFamily("moesaic_gateway_slots", "Jobs that they can run at once.", labels=("state",))
        crew = self._gateway.crew.values()
        drained = sum(each.drained for each in crew)
        busy = sum(len(each.leases) for each in crew)
        free = sum(max(0, each.info.slots - len(each.leases)) for each in crew if not each.drained)
        for family, counts in (
            (workers, {"working": len(crew) - drained, "drained": drained}),
            (slots, {"busy": busy, "free": free}),
        ):
            for state, count in counts.items():
                family.add_metric((state,), count)
        return workers, slots

    def _jobs(self) -> Iterable[Metric]:
        labels = ("state", "model_name")
        jobs = GaugeMetricFamily("moesaic_gateway_jobs", "Jobs in the store that have not ended.", labels=labels)
        cost = GaugeMetricFamily("moesaic_gateway_queued_tokens", "What is queued, about.", labels=("model_name",))
        for model in sorted({*self._gateway.known, *self._gateway.depths}):
            depth = self._gateway.depths.get(model)
            for state in ("queued", "leased", "suspects"):
                jobs.add_metric((state, model), getattr(depth, state, 0))
            cost.add_metric((model,), depth.cost if depth else 0)
        return jobs, cost

"""Prometheus metrics of the models of a ``ModelManager``: their states, and how often they were loaded and unloaded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import get_args

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.utils import floatToGoString

from moesaic.serve.model_entry import LOAD_SECONDS_BUCKETS, ModelEntry, State, UnloadReason

LABELS = ("model_name",)


class ModelCollector:
    """Returns the current metrics of all entries each time that it is called."""

    def __init__(self, entries: Sequence[ModelEntry]) -> None:
        self._entries = entries

    def __call__(self) -> Iterable[Metric]:
        state = GaugeMetricFamily("moesaic_model_state", "1 for the current state.", labels=(*LABELS, "state"))
        loads = HistogramMetricFamily("moesaic_model_load_seconds", "Seconds of a load.", labels=LABELS)
        failures = CounterMetricFamily("moesaic_model_load_failures", "Loads that failed.", labels=LABELS)
        unloads = CounterMetricFamily("moesaic_model_unloads", "Unloads, by reason.", labels=(*LABELS, "reason"))
        for entry in self._entries:
            name = entry.info.name
            for each in get_args(State):
                state.add_metric((name, each), float(entry.state == each))
            bounds = map(floatToGoString, (*LOAD_SECONDS_BUCKETS, math.inf))
            loads.add_metric((name,), list(zip(bounds, accumulate(entry.buckets), strict=True)), entry.load_seconds)
            failures.add_metric((name,), entry.failures)
            for reason in get_args(UnloadReason):
                unloads.add_metric((name, reason), entry.unloads[reason])
        return state, loads, failures, unloads

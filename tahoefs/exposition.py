"""Statistics for others to read: as JSON, and as the text Prometheus scrapes. The only importer of prometheus_client.

Every metric is `tahoefs_` and its name, counters with `_total` behind it; each has its help line.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, Literal

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from grid.stats import SECONDS, Histogram, Reading, Registry
from tahoefs.control import Command, Progress

PREFIX: Final = "tahoefs_"
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily


def prometheus_text(registry: Registry) -> str:
    """The exposition format, version 0.0.4."""
    scrape = CollectorRegistry(auto_describe=False)
    scrape.register(_Collector(registry))
    return generate_latest(scrape).decode("utf-8")


class _Collector(Collector):
    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def describe(self) -> list[Family]:
        return []  # asking for names is not worth a whole collection

    def collect(self) -> Iterator[Family]:
        for reading in self._registry.collect():
            yield _family(reading)


def _family(reading: Reading) -> Family:
    metric = reading.metric
    name, labels = PREFIX + metric.name, [metric.label] if metric.label else []
    if metric.kind == "histogram":
        histogram = HistogramMetricFamily(name, metric.help, labels=labels)
        for label, value in reading.values.items():
            assert isinstance(value, Histogram)
            histogram.add_metric([label] if labels else [], _buckets(value), value.sum)
        return histogram
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family: CounterMetricFamily | GaugeMetricFamily = kind(name, metric.help, labels=labels)
    for label, value in reading.values.items():
        assert not isinstance(value, Histogram)
        family.add_metric([label] if labels else [], value)
    return family


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Cumulative, as Prometheus has them."""
    bounds, passed, found = [*map(str, SECONDS), "+Inf"], 0, list[tuple[str, float]]()
    for bound, count in zip(bounds, histogram.counts, strict=True):
        passed += count
        found.append((bound, passed))
    return found


def as_json(registry: Registry) -> dict[str, Any]:
    """{name: {kind, help, label, values: {label or "": number or {count, sum, p50, p95}}}}; seconds and bytes."""
    return {
        reading.metric.name: {
            "kind": reading.metric.kind,
            "help": reading.metric.help,
            "label": reading.metric.label,
            "values": {label: _plain(value) for label, value in reading.values.items()},
        }
        for reading in registry.collect()
    }


def _plain(value: float | Histogram) -> Any:
    if not isinstance(value, Histogram):
        return value
    return {"count": value.count, "sum": value.sum, "p50": value.quantile(0.5), "p95": value.quantile(0.95)}


def stats_command(registry: Registry, source: str) -> Command:
    """What answers `{"command": "stats", "format": "json" | "prometheus"}` on a control socket."""

    async def answer(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
        form: Literal["json", "prometheus"] = request.get("format", "json")
        if form == "prometheus":
            return {"source": source, "text": prometheus_text(registry)}
        return {"source": source, "metrics": as_json(registry)}

    return answer

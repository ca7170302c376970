"""Statistics: what the parts of a process count, and the registry that tells it. Does no I/O, reads no clock.

    WRITTEN = counter("upload_bytes", "Plaintext of files stored.")        where it is counted, once, at import
    WRITTEN.add(size)                                                      an addition; nothing waits, nothing is locked

    registry = Registry()                                                  one for each mount, or node that serves
    registry.register(part, METRICS)                                       an IStatsProducer with its metrics
    registry.collect()                                                     now

Counters and histograms belong to the process, gauges to whoever is asked for them. Everything is counted on the event
loop, or in one worker thread at a time; a lost addition would do no harm.
A key is a metric's name, or name and label with a dot between, as `fuse_seconds.read`. A label is a method, an errno
or a server's short name: never a cap, a path or the name of a file. Names carry their unit; whoever shows a counter to
Prometheus adds `_total`.
"""

from __future__ import annotations

import logging
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal

from attrs import define, field, frozen

from grid.interfaces import IStatsProducer

log = logging.getLogger(__name__)

LABELS_MAX: Final = 512  # of one metric; what comes after these counts as "other"
LABEL: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
NAME: Final = re.compile(r"[a-z][a-z0-9_]{2,62}[a-z0-9]")
SECONDS: Final = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)

Kind = Literal["counter", "gauge", "histogram"]


@frozen
class Metric:
    """What is counted. `label` says what the part behind the dot of a key is; empty when there is none."""

    name: str
    kind: Kind
    help: str
    label: str = ""

    def __attrs_post_init__(self) -> None:
        if not NAME.fullmatch(self.name) or not self.help.endswith("."):
            raise ValueError(f"metric {self.name!r} needs a proper name and a help line")


@define(eq=False)
class Counter:
    """Grows."""

    value: float = 0

    def add(self, count: float = 1) -> None:
        self.value += count


@define(eq=False)
class Histogram:
    """How many values were up to each of SECONDS; the last count is of those above."""

    counts: list[int] = field(factory=lambda: [0] * (len(SECONDS) + 1))
    sum: float = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(SECONDS, seconds)] += 1
        self.sum += seconds

    @property
    def count(self) -> int:
        return sum(self.counts)

    def quantile(self, part: float) -> float:
        """The bound below which at least `part` of all values were; seconds."""
        wanted, passed = part * self.count, 0
        for bound, count in zip(SECONDS, self.counts, strict=False):
            passed += count
            if passed >= wanted:
                return bound
        return SECONDS[-1]


@define(eq=False)
class Family:
    """One metric of the process with its values by label; without a label there is one, under ""."""

    metric: Metric
    values: dict[str, Counter | Histogram] = field(factory=dict)

    def _of(self, label: str) -> Any:
        value = self.values.get(label)
        if value is None:
            label = "other" if len(self.values) >= LABELS_MAX else _plain(label)
            made = Counter() if self.metric.kind == "counter" else Histogram()
            value = self.values.setdefault(label, made)
        return value


def _plain(label: str) -> str:
    """It, unless it might hold something that is nobody's business: a static server's id is free text."""
    return label if LABEL.fullmatch(label) or label == "" else "other"


class Counters(Family):
    def of(self, label: str) -> Counter:
        value: Counter = self._of(label)
        return value


class Histograms(Family):
    def of(self, label: str) -> Histogram:
        value: Histogram = self._of(label)
        return value


_FAMILIES: Final[dict[str, Family]] = {}  # by name; of this process, made when its modules are imported


def _declare(family: Family) -> None:
    if _FAMILIES.setdefault(family.metric.name, family) is not family:
        raise ValueError(f"metric {family.metric.name!r} is declared twice")


def counters(name: str, help: str, *, label: str) -> Counters:
    family = Counters(Metric(name, "counter", help, label))
    _declare(family)
    return family


def counter(name: str, help: str) -> Counter:
    family = Counters(Metric(name, "counter", help))
    _declare(family)
    return family.of("")


def histograms(name: str, help: str, *, label: str) -> Histograms:
    family = Histograms(Metric(name, "histogram", help, label))
    _declare(family)
    return family


def histogram(name: str, help: str) -> Histogram:
    family = Histograms(Metric(name, "histogram", help))
    _declare(family)
    return family.of("")


@frozen
class Reading:
    """One metric, now. `values`: {label, or "": number or Histogram}."""

    metric: Metric
    values: Mapping[str, float | Histogram]


class Registry:
    """Everything a mount or a node counts: what the process does, and what its parts tell. An IStatsProducer too."""

    def __init__(self) -> None:
        self._producers: list[tuple[IStatsProducer, dict[str, Metric]]] = []

    def register(self, producer: IStatsProducer, metrics: Sequence[Metric]) -> None:
        """For good. Every key of its get_stats() must be of one of `metrics`."""
        self._producers.append((producer, {metric.name: metric for metric in metrics}))

    def collect(self) -> list[Reading]:
        """By name. A part that fails is left out, and logged."""
        found: dict[str, tuple[Metric, dict[str, float | Histogram]]] = {}
        for family in _FAMILIES.values():
            values = {k: v if isinstance(v, Histogram) else v.value for k, v in family.values.items()}
            found[family.metric.name] = family.metric, values
        for producer, metrics in self._producers:
            try:
                told = dict(producer.get_stats())
            except OSError as error:
                log.warning("%s cannot tell its statistics: %s", type(producer).__name__, error.strerror)
                continue
            for key, value in told.items():
                name, _, label = key.partition(".")
                found.setdefault(name, (metrics[name], {}))[1][_plain(label)] = value
        return [Reading(*found[name]) for name in sorted(found)]

    def get_stats(self) -> dict[str, float]:
        """All of it as numbers; of a histogram `_count`, `_sum` and two quantiles."""
        return {key: value for reading in self.collect() for key, value in flat(reading)}


def flat(reading: Reading) -> Iterable[tuple[str, float]]:
    """(key, number) of one metric."""
    for label, value in reading.values.items():
        behind = f".{label}" if label else ""
        name = reading.metric.name
        if not isinstance(value, Histogram):
            yield f"{name}{behind}", value
        elif value.count:
            yield f"{name}_count{behind}", value.count
            yield f"{name}_sum{behind}", value.sum
            yield f"{name}_p50{behind}", value.quantile(0.5)
            yield f"{name}_p95{behind}", value.quantile(0.95)


def counters_and_gauges(readings: Iterable[Reading]) -> tuple[dict[str, float], dict[str, float]]:
    """({what only grows}, {what is so now}), as a stats provider tells it."""
    growing: dict[str, float] = {}
    current: dict[str, float] = {}
    for reading in readings:
        for key, value in flat(reading):
            name = key.partition(".")[0]
            grows = reading.metric.kind == "counter" or name.endswith(("_count", "_sum"))
            (growing if grows else current)[key] = value
    return growing, current

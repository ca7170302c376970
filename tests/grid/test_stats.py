"""Statistics: counting, the registry, what is told to others; and that every metric of ours is fit to be shown."""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import grid
import tahoefs
from grid import stats
from grid.stats import (
    LABEL,
    LABELS_MAX,
    SECONDS,
    Counters,
    Family,
    Histogram,
    Histograms,
    Metric,
    Registry,
    counters_and_gauges,
    flat,
)


def all_metrics() -> list[Metric]:
    """Of every module there is: what it counts, and what its parts tell."""
    found = {}
    for package in (grid, tahoefs):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            module = importlib.import_module(info.name)
            for metric in getattr(module, "METRICS", ()):
                found[id(metric)] = metric
    return [*(family.metric for family in stats._FAMILIES.values()), *found.values()]


def test_every_metric_is_fit_to_be_shown() -> None:
    metrics = all_metrics()
    assert len(metrics) > 50
    names = [metric.name for metric in metrics]
    assert len(names) == len(set(names))
    for metric in metrics:
        assert len(metric.help.split()) >= 3 and metric.help[0].isupper()
        assert not metric.name.endswith(("_total", "_count", "_sum"))
        assert metric.kind != "histogram" or metric.name.endswith("_seconds")
        assert ("second" in metric.help.lower() or "time" in metric.help) or not metric.name.endswith("_seconds")


@pytest.mark.parametrize("name, help", [("X", "Is this a name."), ("x_", "No."), ("bytes_read", "no full stop")])
def test_what_is_no_metric(name: str, help: str) -> None:
    with pytest.raises(ValueError, match="proper"):
        Metric(name, "gauge", help)


def test_a_metric_is_declared_once() -> None:
    with pytest.raises(ValueError, match="twice"):
        stats.counter("server_calls", "Another one of that name.")


@given(st.lists(st.floats(0, 1000), max_size=50))
def test_a_histogram_counts(values: list[float]) -> None:
    histogram = Histogram()
    for value in values:
        histogram.observe(value)
    assert histogram.count == len(values)
    assert math.isclose(histogram.sum, sum(values), abs_tol=1e-6)
    for place, bound in enumerate(SECONDS):
        assert sum(histogram.counts[: place + 1]) == sum(value <= bound for value in values)
    if values:
        assert sorted(values)[(len(values) - 1) // 2] <= histogram.quantile(0.5) or max(values) > SECONDS[-1]


def test_labels_are_bounded_and_plain() -> None:
    family = Counters(Metric("test_things", "counter", "Things of a test.", "thing"))
    for number in range(LABELS_MAX + 50):
        family.of(f"n{number}").add()
    family.of("URI:CHK:secret").add()
    family.of("/home/me/file").add()
    assert len(family.values) <= LABELS_MAX + 1
    assert all(LABEL.fullmatch(label) for label in family.values)
    assert sum(value.value for value in family.values.values() if isinstance(value, stats.Counter)) == LABELS_MAX + 52


class Part:
    """A producer."""

    def __init__(self, told: Mapping[str, float] | Exception) -> None:
        self.told = told

    def get_stats(self) -> Mapping[str, float]:
        if isinstance(self.told, Exception):
            raise self.told
        return self.told


METRICS = (
    Metric("part_things", "gauge", "Things of a part.", "kind"),
    Metric("part_bytes", "counter", "Bytes of a part."),
)


def test_a_registry_tells_what_its_parts_tell() -> None:
    registry = Registry()
    registry.register(Part({"part_things.red": 2, "part_things.blue": 3, "part_bytes": 10}), METRICS)
    told = registry.get_stats()
    assert (told["part_things.red"], told["part_things.blue"], told["part_bytes"]) == (2, 3, 10)
    growing, current = counters_and_gauges(registry.collect())
    assert growing["part_bytes"] == 10 and "part_bytes" not in current
    assert current["part_things.red"] == 2
    names = [reading.metric.name for reading in registry.collect()]
    assert names == sorted(names) and "server_calls" in names


def test_what_is_no_label_is_not_shown() -> None:
    registry = Registry()
    registry.register(Part({"part_things.my secret": 1, "part_things./a/path": 2, "part_things.fine-1": 3}), METRICS)
    told = {key for key in registry.get_stats() if key.startswith("part_things")}
    assert told == {"part_things.other", "part_things.fine-1"}


def test_a_part_that_fails_is_left_out_and_one_that_lies_is_a_bug() -> None:
    registry = Registry()
    registry.register(Part(OSError(5, "gone")), METRICS)
    assert "part_bytes" not in registry.get_stats()
    registry.register(Part({"undeclared": 1}), METRICS)
    with pytest.raises(KeyError):
        registry.collect()


def test_a_histogram_as_numbers() -> None:
    family: Family = Histograms(Metric("test_seconds", "histogram", "Seconds of a test.", "what"))
    assert isinstance(family, Histograms)
    for seconds in (0.002, 0.02, 0.2):
        family.of("it").observe(seconds)
    values: dict[str, Any] = dict(flat(stats.Reading(family.metric, {"it": family.of("it"), "not": Histogram()})))
    assert values == {
        "test_seconds_count.it": 3,
        "test_seconds_sum.it": pytest.approx(0.222),
        "test_seconds_p50.it": 0.03,
        "test_seconds_p95.it": 0.3,
    }

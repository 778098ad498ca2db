"""Medians and pair-by-pair ratios of the kept runs. Pure: lists in, values out."""

import statistics
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    least: float
    median: float
    most: float
    count: int


def spread(values):
    """Least, median and most; None when nothing was kept."""
    values = list(values)
    if not values:
        return None
    return Spread(min(values), statistics.median(values), max(values), len(values))


def kept(runs, relay):
    return [run for run in runs if run.relay == relay and run.thrown_out is None]


def ratios(runs, ours, theirs, value):
    """`value` of ours over theirs, for each round in which both were kept."""
    mine = {run.round: value(run) for run in kept(runs, ours)}
    others = {run.round: value(run) for run in kept(runs, theirs)}
    return spread(
        mine[number] / others[number]
        for number in sorted(mine.keys() & others.keys())
        if mine[number] is not None and others[number]
    )


def cost(run):
    return run.cost_ns


def rate(run):
    return run.units / run.report["seconds"]


def latency(name):
    return lambda run: (run.report.get("latency_us") or {}).get(name)


def calm_p99(run):
    return run.calm_p99


def over_calm(run):
    """How many times the p99 of the same schedule alone."""
    return latency("p99")(run) / run.calm_p99 if run.calm_p99 else None


def of(runs, relay, value):
    return spread(found for run in kept(runs, relay) if (found := value(run)) is not None)

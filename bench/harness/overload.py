"""What handshakes cost those who are served already: users of standing connections at half the rate that
they have alone, beside twice the handshakes that the relay's core could make if it did nothing else. They
and the backends go before those who make the handshakes, on their core: what is late must be the relay."""

import copy
import statistics

from . import peers, rounds, workloads
from .processes import Trouble

CONNECTIONS = 64
# How many may wait for their handshakes, and how long.
NEWCOMERS, PATIENCE_S = 2048, 5
STANDING = workloads.Workload(
    "standing", "small GET", "api", (*workloads.SECURED, "--connections", CONNECTIONS, "--path", "/bytes/64"))
# The newcomers come before the measured window, and still come after it.
BEFORE_S, AFTER_S = 1, 0.5


def measure(names, found, settings):
    """The lines of the page, for both kinds of keys."""
    lines = [
        "Offered is what the newcomers could make of twice what a core can do. Kept is the share of half their",
        "own rate that standing users had.",
        "",
        "| key | relay | handshakes/s a core can make | offered/s | made/s | standing alone/s | kept | p99 ms | p99 without newcomers ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, title in (("rsa", "RSA-2048"), ("ec", "P-256")):
        backends = peers.start_backends(found["generator"], "api", settings.directory, realtime=rounds.BEFORE_OTHERS)
        try:
            for place, name in enumerate(name for name in names if name != "direct"):
                relay = peers.Relay(peers.Variant(name, name), "api", place, found, settings.directory, kind)
                try:
                    cells = [_round(relay, settings) for _ in range(settings.rounds)]
                finally:
                    relay.stop()
                lines.append(_row(title, name, cells))
        finally:
            backends.stop()
    return lines


def _row(title, name, cells):
    most, offered, made, alone, kept, p99, calm_p99 = (statistics.median(column) for column in zip(*cells))
    return (f"| {title} | {name} | {most:.0f} | {offered:.0f} | {made:.0f} | {alone:.0f} | {kept:.0%} | "
            f"{p99 / 1e3:.1f} | {calm_p99 / 1e3:.1f} |")


def _round(relay, settings):
    """Handshakes a core can make, those offered and made, the rate of standing users alone, the share of half
    of it that they keep, and their p99 in microseconds, beside newcomers and without."""
    newcomers = workloads.Workload("newcomers", "", "api", (
        *workloads.SECURED, "--churn", "--path", "/bytes/64", "--timeout", f"{PATIENCE_S}s"))
    alone = _finished(_started(newcomers, relay, settings, ("--connections", 32)), relay)
    most = 1e9 * alone["requests"] / alone["balancer_cpu_ns"]
    rate = _finished(_started(STANDING, relay, settings), relay)["requests_per_second"]
    calm = _finished(_started(STANDING, relay, settings, (), rate / 2, rounds.BEFORE_ALL), relay)
    around = _with(settings, BEFORE_S, settings.warmup + settings.duration + AFTER_S)
    crowd = _started(newcomers, relay, around, ("--connections", NEWCOMERS), 2 * most)
    within = _with(settings, BEFORE_S + settings.warmup, settings.duration)
    standing = _started(STANDING, relay, within, (), rate / 2, rounds.BEFORE_ALL)
    kept, crowd = _finished(standing, relay), _finished(crowd, relay)
    if kept["errors_total"]:
        raise Trouble(f"standing users of {relay.name} met errors: {kept['errors']}")
    offered = crowd["rate_planned"] - crowd["unsent"] / (around.warmup + around.duration)
    made = crowd["tls"]["handshakes_per_second"]
    share = kept["requests_per_second"] / (rate / 2)
    return most, offered, made, rate, share, kept["latency_us"]["p99"], calm["latency_us"]["p99"]


def _with(settings, warmup, duration):
    changed = copy.copy(settings)
    changed.warmup, changed.duration = warmup, duration
    return changed


def _started(workload, relay, settings, flags=(), rate=None, realtime=0):
    return rounds.start_generator(workload, relay, settings, (*workload.flags, *flags), rate, realtime)


def _finished(process, relay):
    return rounds.finish_generator(process, relay)[1]

"""What the load generator itself costs: a request beside wrk's, and a request beside the relay's. A
generator that costs more than what it measures would measure itself."""

import copy
import os
import re
import shutil
import subprocess

from . import pages, peers, rounds, summary
from .processes import Process, Trouble
from .workloads import Workload

CONNECTIONS = 64
BESIDE_WRK = Workload("wrk", "small GET", "api", ("--connections", CONNECTIONS, "--path", "/bytes/64"))
BESIDE_RELAY = [
    Workload(protocol, f"{protocol.upper()} 64 B", protocol, ("--connections", CONNECTIONS, "--size", 64))
    for protocol in ("tcp", "udp")
]


def measure(names, found, settings):
    """The lines of the page: CPU per request of `lb bench`, of wrk and of the relay, and the ratios of
    the runs that followed each other."""
    # A process's CPU counts its warm-up too, in which no request is counted.
    settings = copy.copy(settings)
    settings.warmup = 0
    rows = [_beside_wrk(found, settings)]
    if "lb" in names:
        rows += [_beside_relay(workload, found, settings) for workload in BESIDE_RELAY]
    return [
        f"| {CONNECTIONS} connections | lb bench us/req | beside | us/req | ratio |",
        "|---|---|---|---|---|",
        *(
            f"| {title} | {_cell(ours)} | {other} | {_cell(theirs)} "
            f"| {_cell([mine / their for mine, their in zip(ours, theirs)])} |"
            for title, ours, other, theirs in rows
        ),
    ]


def _cell(values):
    return pages.cell(summary.spread(values), "{:.2f}")


def _beside_wrk(found, settings):
    """Both on their core in turn, the same server on the other."""
    wrk = shutil.which("wrk")
    if not wrk:
        subprocess.run(["apt-get", "install", "-y", "--no-install-recommends", "wrk"], check=True)
        wrk = shutil.which("wrk")
    command = [found["generator"], "bench", "serve", "--protocol", "api", "--listen",
               f"127.0.0.1:{peers.BACKENDS['api'][0]}"]
    log = open(os.path.join(settings.directory, "served"), "w+")
    server = Process(command, peers.RELAY_CORE, log)
    ours, theirs = [], []
    try:
        direct = peers.Relay(peers.DIRECT, "api", 0, found, settings.directory)
        peers.wait_for_port(direct.port, server)
        for _ in range(settings.rounds):
            ours.append(_generator_cost(BESIDE_WRK, direct, settings)[0])
            theirs.append(_wrk_cost(wrk, direct.port, settings))
    finally:
        server.stop()
    return BESIDE_WRK.title, ours, "wrk", theirs


def _beside_relay(workload, found, settings):
    """One run gives both: the relay's CPU is in the report."""
    backends = peers.start_backends(found["generator"], workload.protocol, settings.directory)
    relay = None
    try:
        relay = peers.Relay(peers.Variant("lb", "lb"), workload.protocol, 0, found, settings.directory)
        pairs = [_generator_cost(workload, relay, settings) for _ in range(settings.rounds)]
    finally:
        if relay:
            relay.stop()
        backends.stop()
    return workload.title, [own for own, _ in pairs], "the relay", [relays for _, relays in pairs]


def _generator_cost(workload, relay, settings):
    """Microseconds of CPU per request: of the generator, start and end included, and of the relay."""
    process = rounds.start_generator(workload, relay, settings, workload.flags, None)
    cpu_ns, report = rounds.finish_generator(process, relay)
    if report["errors_total"]:
        raise Trouble(f"the load on {relay.name} met errors: {report['errors']}")
    requests = report["requests"]
    relays = report["balancer_cpu_ns"]
    return cpu_ns / requests / 1e3, relays / requests / 1e3 if relays is not None else None


def _wrk_cost(wrk, port, settings):
    """The same of wrk, which has one thread too. It counts whole seconds."""
    log = open(os.path.join(settings.directory, "wrk"), "w+")
    process = Process(
        [wrk, "-t1", f"-c{CONNECTIONS}", f"-d{max(1, round(settings.duration))}s", f"http://127.0.0.1:{port}/bytes/64"],
        peers.OTHER_CORE, log,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.child.returncode = os.waitstatus_to_exitcode(status)
    log.seek(0)
    said = log.read()
    requests = re.search(r"(\d+) requests in", said)
    if not requests or "Non-2xx" in said:
        raise Trouble(f"wrk said:\n{said}")
    return (usage.ru_utime + usage.ru_stime) * 1e6 / int(requests.group(1))

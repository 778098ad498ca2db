"""Alternating rounds: every relay once, in turn, as often as asked, each run with its CPU and with
what disturbed it. Decides what is thrown out; forms no averages."""

import json
import os
import tempfile
from dataclasses import dataclass, field

from .peers import OTHER_CORE, RELAY_CORE
from .processes import Cores, Process, Trouble

# Of a generator that shares its core with one that would take all of it, and of their backends: what
# is late must be the relay.
BEFORE_ALL, BEFORE_OTHERS = 2, 1


@dataclass
class Run:
    """One relay under one workload, once."""

    relay: str
    round: int
    report: dict
    # CPU of the relay per unit in nanoseconds; None on the direct path.
    cost_ns: float | None
    units: float
    thrown_out: str | None = None
    beside: dict = field(default_factory=dict)
    # p99 in microseconds on the same schedule just before, with nothing beside it.
    calm_p99: float | None = None


class Settings:
    def __init__(self, generator, rounds, duration, warmup, others_max, steal_max, retries, directory):
        self.generator = generator
        self.rounds = rounds
        self.duration = duration
        self.warmup = warmup
        self.others_max = others_max
        self.steal_max = steal_max
        self.retries = retries
        self.directory = directory


def measure(workload, relays, backends, settings, tell):
    """All rounds of a workload. A disturbed run is repeated at once, at most `retries` times; what
    was disturbed to the end stays in the list, marked, and counts for nothing."""
    rate = _planned_rate(workload, relays, backends, settings)
    if rate:
        tell(f"  schedule: {rate:.0f} requests/s for everyone")
    runs = []
    for number in range(1, settings.rounds + 1):
        for relay in relays:
            for _ in range(settings.retries + 1):
                run = _both(workload, relay, backends, settings, number, rate)
                runs.append(run)
                tell(f"  round {number} {relay.name:18} {describe(run, workload)}")
                if run.thrown_out is None:
                    break
    return runs


def describe(run, workload):
    unit, divisor = cost_unit(workload)
    cost = "      -" if run.cost_ns is None else f"{run.cost_ns / divisor:7.2f} {unit}"
    latency = run.report.get("latency_us") or {}
    tail = f" p50 {latency['p50']:.0f} p99 {latency['p99']:.0f} us" if latency else ""
    if run.calm_p99:
        tail += f" (p99 alone {run.calm_p99:.0f} us)"
    fate = f"  THROWN OUT: {run.thrown_out}" if run.thrown_out else ""
    return f"{cost} {throughput(run, workload)}{tail}{fate}"


def cost_unit(workload):
    """The unit that CPU is printed in, and how many nanoseconds it has."""
    return ("ms/GB", 1e6) if workload.unit == "GB" else ("us/req", 1e3)


def throughput(run, workload):
    if workload.unit == "GB":
        return f"{run.units / run.report['seconds']:.2f} GB/s"
    return f"{run.units / run.report['seconds']:.0f} req/s"


def _planned_rate(workload, relays, backends, settings):
    """For a workload on a schedule: the named share of what the slowest relay can do."""
    if workload.load is None:
        return None
    slowest = None
    for relay in relays:
        run = _once(workload, relay, backends, settings, 0, None, alone=True)
        rate = run.units / run.report["seconds"]
        slowest = rate if slowest is None else min(slowest, rate)
    return slowest * workload.load


def _both(workload, relay, backends, settings, number, rate):
    """A run; of a workload with something beside it, after one without that."""
    if not workload.beside:
        return _once(workload, relay, backends, settings, number, rate)
    calm = _once(workload, relay, backends, settings, number, rate, alone=True)
    run = _once(workload, relay, backends, settings, number, rate)
    run.calm_p99 = (calm.report.get("latency_us") or {}).get("p99")
    if calm.thrown_out:
        run.thrown_out = f"alone: {calm.thrown_out}"
    return run


def _once(workload, relay, backends, settings, number, rate, alone=False):
    processes = [process for process in (relay.process, backends) if process]
    cores = Cores((RELAY_CORE, OTHER_CORE), processes)
    beside = None
    if workload.beside and not alone:
        beside = start_generator(workload, relay, settings, workload.beside, None)
    realtime = BEFORE_ALL if workload.beside else 0
    main = start_generator(workload, relay, settings, workload.flags, rate, realtime)
    finished = [finish_generator(main, relay)]
    if beside:
        finished.append(finish_generator(beside, relay))
    others, stolen = cores.others([(OTHER_CORE, cpu) for cpu, _ in finished])
    relay.check_cores()
    report = finished[0][1]
    units = report["requests"]
    if workload.unit == "GB":
        units = (report["bytes_sent"] + report["bytes_received"]) / 1e9
    cpu = report["balancer_cpu_ns"]
    run = Run(
        relay=relay.name,
        round=number,
        report=report,
        cost_ns=cpu / units if relay.process and units and cpu is not None else None,
        units=units,
        beside=finished[1][1] if beside else {},
    )
    watched = (RELAY_CORE, OTHER_CORE) if relay.process else (OTHER_CORE,)
    run.thrown_out = _fault(run, relay.variant, others, stolen, watched, settings)
    return run


def _fault(run, variant, others, stolen, cores, settings):
    """Why a run does not count, in words, or None."""
    report = run.report
    if report["errors_total"] and not (variant.cuts_off and set(report["errors"]) == {"closed"}):
        return f"{report['errors_total']} errors: {report['errors']}"
    if not report["valid"]:
        return f"invalid: {report['invalid_reason']}"
    for core in cores:
        if others[core] > settings.others_max:
            return f"others took {others[core]:.0%} of core {core}"
        if stolen[core] > settings.steal_max:
            return f"the host took {stolen[core]:.0%} of core {core}"
    return None


def start_generator(workload, relay, settings, flags, rate, realtime=0):
    """Starts the load generator on its core."""
    handle, path = tempfile.mkstemp(suffix=".json", dir=settings.directory)
    os.close(handle)
    command = [settings.generator, "bench", "--quiet", "--protocol", workload.protocol,
               "--to", f"127.0.0.1:{relay.port}", "--duration", f"{settings.duration}s",
               "--warmup", f"{settings.warmup}s", "--threads", 1, "--json", path, *flags]
    if relay.process:
        command += ["--watch", relay.process.pid]
    if rate:
        command += ["--rate", f"{rate:.0f}"]
    log = tempfile.TemporaryFile("w+", dir=settings.directory)
    process = Process(command, OTHER_CORE, log, realtime=realtime)
    process.report = path
    return process


def finish_generator(process, relay):
    """Waits for a generator: its CPU time in nanoseconds and its report."""
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except KeyboardInterrupt:
        process.stop()
        raise
    process.child.returncode = os.waitstatus_to_exitcode(status)
    with open(process.report) as file:
        text = file.read()
    if not text:
        process.log.seek(0)
        raise Trouble(f"the load on {relay.name} gave no report:\n{process.log.read()[-2000:]}")
    return int((usage.ru_utime + usage.ru_stime) * 1e9), json.loads(text)

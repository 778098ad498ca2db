"""Short slices of one load on TCP users, alternately with and without something beside them. Owns where
each process runs, when a slice counts, and what a set of them says; knows nothing of what is beside.

Everything that a user's byte passes (the load generator, the balancer's one worker, the backend) runs on
the worker's core, with priority over everything else there. What is beside is kept off that core. So the
generator never waits for it, as it would if they shared a core, and what is measured is the cost that the
balancer itself passes on. A loop of the lowest priority keeps every core awake, because the time that a
core takes to wake, and the share that its neighbour leaves it, depend on what other cores do.

A slice in which the generator was late says more about the host than about the balancer, and is thrown
out."""

import json
import os
import random
import statistics
import subprocess
import sys
import time

from .processes import Trouble

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# Slices of each kind, below which nothing is said.
SLICES_MIN = 8


def add_arguments(parser, rounds):
    parser.add_argument("--rounds", type=int, default=rounds, help=f"of two slices each (default {rounds})")
    parser.add_argument("--seconds", type=float, default=1, help="how long a slice is (default 1)")
    parser.add_argument("--rate", type=int, default=1000, help="requests a second (default 1000)")
    parser.add_argument("--late", type=float, default=150, help="us that the generator may be late at p99 (default 150)")
    parser.add_argument("--connections", type=int, default=32, help="TCP users (default 32)")


def enter_namespace(script, inside, arguments):
    """Starts the script again in a network namespace of its own, with the binary in LB; returns there."""
    if not inside:
        if os.geteuid() != 0:
            raise Trouble("a network namespace needs root; run it with sudo")
        os.environ["LB"] = os.environ.get("LB") or built()
        os.execvp("unshare", ["unshare", "--net", sys.executable, os.path.abspath(script), "--inside", *arguments])
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


def built():
    subprocess.run(["cargo", "build", "--profile", "dist", "--quiet"], cwd=ROOT, check=True)
    return os.path.join(os.environ.get("CARGO_TARGET_DIR") or os.path.join(ROOT, "target"), "dist", "lb")


def cores(pid):
    """(the core of the balancer's one worker, the other cores); gives the worker priority on its core."""
    folder = f"/proc/{pid}/task"
    until = time.monotonic() + 10
    while time.monotonic() < until:
        for thread in os.listdir(folder):
            with open(f"{folder}/{thread}/comm") as file:
                name = file.read()
            own = os.sched_getaffinity(int(thread))
            elsewhere = os.sched_getaffinity(0) - own
            if name.startswith("lb-worker") and len(own) == 1 and elsewhere:
                subprocess.run(["chrt", "--fifo", "--pid", "10", thread], check=True)
                return own, elsewhere
        time.sleep(0.02)
    raise Trouble("the worker has no core of its own: this takes two cores")


def on(where, command):
    return ["taskset", "--cpu-list", ",".join(map(str, sorted(where))), *map(str, command)]


def at_once(command):
    """With priority over everything else on this host."""
    return ["chrt", "--fifo", "10", *command]


def awake():
    """A loop of the lowest priority on every core, so that none falls asleep: how long a core, or a
    hypervisor, takes to wake depends on what the others do."""
    return [subprocess.Popen(["chrt", "--idle", "0", *on({core}, ["sh", "-c", "while :; do :; done"])])
            for core in os.sched_getaffinity(0)]


def slice_of(lb, port, settings, where, directory):
    """What the load generator reports of one slice of load on this port."""
    path = os.path.join(directory, "run.json")
    command = at_once(on(where, [lb, "bench", "--to", f"127.0.0.1:{port}", "--connections", settings.connections,
                         "--rate", settings.rate, "--duration", f"{settings.seconds}s", "--warmup", "300ms",
                         "--json", path, "--expect", "errors=0", "-q"]))
    # A generator that was late itself says so and exits with a failure; that is shown below.
    subprocess.run(command, stderr=subprocess.DEVNULL)
    with open(path) as file:
        run = json.load(file)
    if run["errors_total"]:
        raise Trouble(f"{run['errors_total']} errors: {run['errors']}")
    return run


def shown(run):
    latency, lag = run["latency_us"], run["lag_us"]
    return (f"p50 {latency['p50']:8.1f} us  p99 {latency['p99']:8.1f} us  p99.9 {latency['p99_9']:8.1f} us  "
            f"generator late by {lag['p99']:.1f} us (p99)")


def counts(run, late):
    """Whether the generator kept its schedule."""
    return run["lag_us"]["p99"] <= late


def conclude(runs, late):
    """Prints what two kinds of slices, by name, say of each other: the ratio of their medians, with the
    range that holds 90 % of such ratios when the kept slices are resampled."""
    kept = {which: [run for run in runs[which] if counts(run, late)] for which in runs}
    told = ", ".join(f"{len(kept[which])} of {len(runs[which])} {which}" for which in runs)
    print(f"\nslices in which the generator was late by at most {late:.0f} us (p99): {told}")
    if min(len(slices) for slices in kept.values()) < SLICES_MIN:
        raise Trouble("too few to say anything: others are busy on this host, or it takes the cores away")
    first, second = runs
    for of, quantile in (("latency_us", "p50"), ("latency_us", "p90"), ("latency_us", "p99"), ("lag_us", "p99")):
        before, after = ([run[of][quantile] for run in kept[which]] for which in (first, second))
        name = quantile if of == "latency_us" else f"late {quantile}"
        print(f"{name:8}  {statistics.median(before):7.1f} us {first}  {statistics.median(after):7.1f} us {second}  "
              f"{told_of(ratio(before, after))}")


def ratio(before, after):
    """(of the medians, the range of nine in ten when drawn again)."""
    found = lambda some: statistics.median(some(after)) / statistics.median(some(before))
    return resampled(found)


def median_ratio(pairs):
    """The same for the median of the ratios of pairs (before, after)."""
    ratios = [after / before for before, after in pairs]
    return resampled(lambda some: statistics.median(some(ratios)))


def resampled(found):
    """(what is found in all, the range of nine in ten findings in as many that are drawn again)."""
    dice = random.Random(1)
    again = lambda values: dice.choices(values, k=len(values))
    drawn = statistics.quantiles([found(again) for _ in range(2000)], n=20)
    return found(lambda values: values), drawn[0], drawn[-1]


def told_of(ratios):
    whole, low, high = (f"{(part - 1) * 100:+.1f} %" for part in ratios)
    return f"{whole} (from {low} to {high})"

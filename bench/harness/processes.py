"""A process pinned to one core, and what can be read of it from outside: CPU time, memory.
Owns the starting and ending of processes; knows no peer and no workload."""

import os
import resource
import signal
import socket
import subprocess
import time

# Enough for 10,000 sessions with two connections each.
DESCRIPTORS_WANTED = 24_000
TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")


def descriptors():
    """What every process gets: as many as wanted, or as many as this host allows."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard == resource.RLIM_INFINITY or hard >= DESCRIPTORS_WANTED:
        return DESCRIPTORS_WANTED
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, DESCRIPTORS_WANTED))
        return DESCRIPTORS_WANTED
    except (OSError, ValueError):
        return hard


def sessions():
    """Sessions of two connections that fit into them, with some left for everything else."""
    return (descriptors() - 1400) // 2


class Trouble(Exception):
    """One sentence for the person at the terminal, with the cure."""


class Process:
    """A child on one core. Ended by the one that started it, never by its name."""

    def __init__(self, command, core, log, priority=-20, realtime=0):
        self.command = [str(part) for part in command]
        self.core = core
        self.log = log
        self.child = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=lambda: _settle(core, priority, realtime),
        )

    @property
    def pid(self):
        return self.child.pid

    def running(self):
        return self.child.poll() is None

    def cpu_ns(self):
        """CPU time of every thread that lives, in nanoseconds. The scheduler's own count: it
        includes the softirq work that loopback runs inside a send."""
        total = 0
        for task in _tasks(self.pid):
            total += int(_read(f"/proc/{self.pid}/task/{task}/schedstat", "0").split()[0])
        return total

    def memory_kib(self):
        """Resident memory in KiB: (all, anonymous)."""
        fields = dict(
            line.split(":", 1) for line in _read(f"/proc/{self.pid}/status", "").splitlines() if ":" in line
        )
        pages = lambda name: int(fields.get(name, "0 kB").split()[0])
        return pages("VmRSS"), pages("RssAnon")

    def strays(self):
        """Threads that may run on another core than the one given: the figures would lie."""
        found = []
        for task in _tasks(self.pid):
            for line in _read(f"/proc/{self.pid}/task/{task}/status", "").splitlines():
                if line.startswith("Cpus_allowed_list:") and line.split()[1] != str(self.core):
                    found.append(task)
        return found

    def stop(self, patience=3.0):
        if self.running():
            self.child.send_signal(signal.SIGTERM)
            try:
                self.child.wait(patience)
            except subprocess.TimeoutExpired:
                self.child.kill()
        self.child.wait()


def _settle(core, priority, realtime):
    """Runs in the child: its core, descriptors, and a weight that keeps others' work out of the way.
    `realtime`, unless 0, puts it before every process that has less (SCHED_FIFO)."""
    os.sched_setaffinity(0, {core})
    try:
        limit = descriptors()
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        os.setpriority(os.PRIO_PROCESS, 0, priority)
        # Where the scheduler groups by session, a nice value counts inside the group only.
        with open("/proc/self/autogroup", "w") as group:
            group.write(str(priority))
        if realtime:
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(realtime))
    except (OSError, ValueError):
        pass


def _read(path, otherwise):
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return otherwise


def _tasks(pid):
    try:
        return os.listdir(f"/proc/{pid}/task")
    except OSError:
        return []


class Cores:
    """How busy cores were between two looks, and with whose work."""

    def __init__(self, cores, processes):
        self.cores = cores
        self.processes = processes
        self.began = time.monotonic_ns()
        self.idle, self.steal = _idle_and_steal(cores)
        self.own = {process: process.cpu_ns() for process in processes}

    def others(self, finished):
        """Share of each core's time that somebody else took: ({core: share}, {core: stolen}).
        `finished` gives (core, nanoseconds) of children that ended meanwhile."""
        wall = time.monotonic_ns() - self.began
        idle, steal = _idle_and_steal(self.cores)
        others, stolen = {}, {}
        for core in self.cores:
            own = sum(p.cpu_ns() - before for p, before in self.own.items() if p.core == core)
            own += sum(nanos for at, nanos in finished if at == core)
            busy = wall - (idle[core] - self.idle[core])
            others[core] = max(0.0, (busy - own) / wall)
            stolen[core] = (steal[core] - self.steal[core]) / wall
        return others, stolen


def _idle_and_steal(cores):
    idle, steal = {}, {}
    for line in _read("/proc/stat", "").splitlines():
        name, *ticks = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in cores:
            ticks = [int(tick) for tick in ticks]
            idle[int(name[3:])] = (ticks[3] + ticks[4]) * TICK_NS
            steal[int(name[3:])] = ticks[7] * TICK_NS
    return idle, steal


def wait_for_port(port, process, patience=10.0):
    """Returns once something accepts on the port; raises with the process's own words if not."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        if not process.running():
            break
        try:
            socket.create_connection(("127.0.0.1", port), 0.5).close()
            return
        except OSError:
            time.sleep(0.02)
    process.log.flush()
    process.log.seek(0)
    said = process.log.read()[-2000:]
    raise Trouble(f"`{' '.join(process.command)}` does not accept on port {port}; it said:\n{said}")

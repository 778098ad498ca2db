"""What is not a comparison of relays at a rate: memory of idle sessions, how soon a change of membership
reaches users, and (in generator.py) what the load generator costs."""

import os
import socket
import statistics
import threading
import time

from . import generator, overload, peers, registration, workloads
from .processes import Process, Trouble, sessions

IDLE_SESSIONS = min(10_000, sessions())
REACTION_TIMES = 9


def measure(name, names, found, settings):
    """The lines of one special workload for the page."""
    print(f"\n{name}", flush=True)
    measures = {
        "idle": idle, "react": react, "generator": generator.measure,
        "tlsidle": idle_secured, "tlsoverload": overload.measure,
    }
    lines = measures[name](names, found, settings)
    print("\n".join(lines), flush=True)
    return lines


def idle(names, found, settings):
    """Resident memory before and with thousands of sessions that say nothing after their first request."""
    lines = [f"| relay | before MiB | with {IDLE_SESSIONS} sessions MiB | each KiB |", "|---|---|---|---|"]
    for name, before, during in _idle("tcp", names, found, settings):
        each = (during - before) / IDLE_SESSIONS
        lines.append(f"| {name} | {before / 1024:.1f} | {during / 1024:.1f} | {each:.2f} |")
    return lines


def idle_secured(names, found, settings):
    """The same under TLS, at a door of streams and at one of HTTPS, whose users hold no connection to a
    backend."""
    lines = [f"| door | relay | before MiB | with {IDLE_SESSIONS} connections MiB | each KiB | ours / this |",
             "|---|---|---|---|---|---|"]
    for door, protocol in (("TCP", "tcp"), ("HTTPS", "api")):
        ours = None
        for name, before, during in _idle(protocol, names, found, settings, key="ec"):
            each = (during - before) / IDLE_SESSIONS
            ours = ours or each
            ratio = "-" if each == ours else f"{ours / each:.2f}"
            lines.append(f"| {door} | {name} | {before / 1024:.1f} | {during / 1024:.1f} | {each:.2f} | {ratio} |")
    return lines


def _idle(protocol, names, found, settings, key=None):
    """Of each relay: its name, KiB before and KiB with idle sessions."""
    backends = peers.start_backends(found["generator"], protocol, settings.directory)
    try:
        for place, name in enumerate(name for name in names if name != "direct"):
            relay = peers.Relay(peers.Variant(name, name), protocol, place, found, settings.directory, key)
            try:
                yield name, *_memory(relay, protocol, found["generator"], workloads.SECURED if key else ())
            finally:
                relay.stop()
    finally:
        backends.stop()


def _memory(relay, protocol, generator, flags):
    before, _ = relay.process.memory_kib()
    log = open(os.path.join(relay.directory, "load"), "w+")
    load = Process(
        [generator, "bench", "--quiet", "--protocol", protocol, "--to", f"127.0.0.1:{relay.port}", *flags,
         "--connections", IDLE_SESSIONS, "--rate", "200", "--warmup", "2s", "--duration", "4s", "--timeout", "20s"],
        peers.OTHER_CORE, log,
    )
    most = before
    try:
        while load.running():
            most = max(most, relay.process.memory_kib()[0])
            time.sleep(0.1)
    finally:
        load.stop()
    return before, most


def react(names, found, settings):
    """From `register` sent to the first user answered by that backend, and from a backend's death to
    the moment from which no new user is sent to it."""
    if "lb" not in names:
        return ["Only this balancer has a control port; it was left out."]
    joined, left = [], []
    # Those that the relay starts with; they leave before anything is measured.
    first = peers.start_backends(found["generator"], "tcp", settings.directory)
    relay = None
    try:
        relay = peers.Relay(peers.Variant("lb", "lb"), "tcp", 0, found, settings.directory)
        relay.registration.close()
        _until(lambda: _ask(relay.port) is None)
        for _ in range(REACTION_TIMES):
            came, gone = _join_and_leave(relay.port)
            joined.append(came)
            left.append(gone)
    finally:
        if relay:
            relay.stop()
        first.stop()
    row = lambda what, seconds: (
        f"| {what} | {min(seconds) * 1e3:.2f} | {statistics.median(seconds) * 1e3:.2f} | {max(seconds) * 1e3:.2f} |"
    )
    return [
        "| reaction | least ms | median ms | most ms |",
        "|---|---|---|---|",
        row("registered to first user served", joined),
        row("control connection lost to out of the rotation", left),
    ]


def _join_and_leave(port):
    listener = socket.create_server(("127.0.0.1", 0))
    served = threading.Thread(target=_greet, args=(listener,), daemon=True)
    served.start()
    control = registration.Registration(port + 1)
    began = time.monotonic()
    asked = threading.Thread(
        target=control.register, args=("tcp", listener.getsockname()[1]), daemon=True
    )
    asked.start()
    came = _until(lambda: _ask(port) is not None) - began
    asked.join()
    began = time.monotonic()
    control.close()
    gone = _until(lambda: _ask(port) is None) - began
    listener.close()
    return came, gone


def _greet(listener):
    """A backend that says one byte to whoever comes."""
    try:
        while True:
            user, _ = listener.accept()
            with user:
                user.sendall(b"!")
    except OSError:
        pass


def _ask(port):
    """What a user hears: a byte, or None when turned away."""
    try:
        with socket.create_connection(("127.0.0.1", port), 1) as user:
            user.settimeout(1)
            return user.recv(1) or None
    except OSError:
        return None


def _until(holds, patience=10.0):
    """The moment at which something holds."""
    limit = time.monotonic() + patience
    while time.monotonic() < limit:
        if holds():
            return time.monotonic()
    raise Trouble("the balancer did not react within 10 s")

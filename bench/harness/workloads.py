"""The workloads, as a table: what the load generator is asked to do and what one unit of work is.
Starts nothing."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Workload:
    name: str
    title: str
    # tcp, udp or api: which door, which backend.
    protocol: str
    # The load generator's flags beyond address, duration and output.
    flags: tuple
    # What CPU is counted by: "request" (microseconds each) or "GB" (milliseconds each).
    unit: str = "request"
    # A relay measured here that is not the peer as it stands for other workloads.
    bulk: bool = False
    # Planned rate as a share of what the slowest relay can do; None is the closed loop.
    load: float | None = None
    # The flags of a second generator that runs beside it.
    beside: tuple = ()
    # The backends' flags.
    backends: tuple = ()
    # The key of the relay's certificate where users speak TLS: "ec" (P-256) or "rsa" (2,048 bits).
    key: str | None = None
    # Whether users speak HTTP/2.
    http2: bool = False


def _tcp(connections):
    return Workload(
        f"tcp{connections}",
        f"TCP ping-pong 64 B, {connections} connection{'s' if connections > 1 else ''}",
        "tcp",
        ("--connections", connections, "--size", 64),
    )


def _bulk(streams, direction):
    says = {"down": "to the user", "up": "to the backend", "both": "both ways"}[direction]
    return Workload(
        f"bulk{streams}{direction}",
        f"TCP bulk {says}, {streams} stream{'s' if streams > 1 else ''}",
        "tcp",
        ("--bulk", direction, "--connections", streams),
        unit="GB",
        bulk=True,
    )


def _udp(flows, size=64):
    name = f"udp{flows}" if size == 64 else f"udp{flows}x{size}"
    return Workload(
        name,
        f"UDP round trips {size} B, {flows} flow{'s' if flows > 1 else ''}",
        "udp",
        ("--connections", flows, "--size", size),
    )


def _http(name, title, connections, *flags):
    return Workload(
        f"{name}{connections}", f"HTTP {title}, {connections} connections", "api",
        ("--connections", connections, *flags),
    )


# What every relay under TLS can do alike; who it is makes no difference to it.
SECURED = ("--tls", "--insecure", "--tls-group", "X25519")


def _tls(name, title, protocol, *flags, key="ec", **more):
    return Workload(f"tls{name}", f"TLS: {title}", protocol, (*SECURED, *flags), key=key, **more)


def _handshakes(name, title, *flags, key="ec"):
    return _tls(name, f"{title} and one GET, 32 at once", "api",
                "--churn", "--connections", 32, "--path", "/bytes/64", *flags, key=key)


def _https(name, title, connections, *flags):
    return _tls(f"{name}{connections}", f"{title}, {connections} connections", "api",
                "--connections", connections, *flags)


def _http2(name, title, connections, streams, *flags, key=None):
    """Users speak HTTP/2, backends HTTP/1.1."""
    flags = ("--http2", "--streams", streams, "--connections", connections, *flags)
    secured = (*SECURED, *flags) if key else flags
    return Workload(
        f"{'tls' if key else ''}h2{name}{streams}",
        f"{'TLS: ' if key else ''}HTTP/2 {title}, {connections} connections, {streams} stream{'s' if streams > 1 else ''}",
        "api", secured, key=key, http2=True,
    )


def _tls_bulk(streams, direction):
    says = {"down": "to the user", "up": "to the backend"}[direction]
    return _tls(f"bulk{streams}{direction}", f"TCP bulk {says}, {streams} stream{'s' if streams > 1 else ''}",
                "tcp", "--bulk", direction, "--connections", streams, unit="GB")


ALL = [
    _tcp(1),
    _tcp(64),
    _tcp(512),
    Workload("churn", "TCP connection churn, 32 at once", "tcp",
             ("--churn", "--connections", 32, "--size", 64)),
    *(_bulk(streams, direction) for direction in ("down", "up", "both") for streams in (1, 4)),
    _udp(1),
    _udp(64),
    _udp(512),
    _udp(64, 1200),
    Workload("udpburst", "UDP bursts of 32 x 1200 B, 16 flows", "udp",
             ("--connections", 16, "--size", 1200, "--window", 32)),
    Workload("udpgso", "UDP bursts of 32 x 1200 B sent as one (GSO), 16 flows", "udp",
             ("--connections", 16, "--size", 1200, "--window", 32, "--gso"), backends=("--gso",)),
    *(_http("get", "small GET", connections, "--path", "/bytes/64") for connections in (64, 512)),
    *(_http("get64k-", "64 KiB GET", connections, "--path", "/bytes/65536") for connections in (64, 512)),
    *(_http("post", "POST of 64 KiB", connections, "--method", "POST", "--path", "/count",
            "--body-bytes", 65536) for connections in (64, 512)),
    Workload("half64", "TCP requests 64 B on a schedule at half load, 64 connections", "tcp",
             ("--connections", 64, "--size", 64), load=0.5),
    Workload("halfget64", "HTTP small GET on a schedule at half load, 64 connections", "api",
             ("--connections", 64, "--path", "/bytes/64"), load=0.5),
    Workload("mixed", "TCP requests on a schedule beside four bulk streams", "tcp",
             ("--connections", 16, "--size", 64), load=0.1,
             beside=("--bulk", "down", "--connections", 4)),
    _handshakes("full", "a full handshake"),
    _handshakes("rsa", "a full handshake with RSA-2048", key="rsa"),
    _handshakes("resumed", "a resumed handshake", "--tls-resume"),
    *(_https("get", "small GET", connections, "--path", "/bytes/64") for connections in (64, 512)),
    *(_https("get64k-", "64 KiB GET", connections, "--path", "/bytes/65536") for connections in (64, 512)),
    *(_https("post", "POST of 64 KiB", connections, "--method", "POST", "--path", "/count",
             "--body-bytes", 65536) for connections in (64, 512)),
    *(_http2("get", "small GET", 64, streams, "--path", "/bytes/64", key=key)
      for key in (None, "ec") for streams in (1, 32)),
    *(_http2("get64k-", "64 KiB GET", 64, 8, "--path", "/bytes/65536", key=key) for key in (None, "ec")),
    _http2("post", "POST of 64 KiB", 64, 8, "--method", "POST", "--path", "/count", "--body-bytes", 65536, key="ec"),
    *(_tls_bulk(streams, direction) for direction in ("down", "up") for streams in (1, 4)),
]

BY_NAME = {workload.name: workload for workload in ALL}
# Measured in ways of their own.
SPECIAL = {
    "idle": "memory of 10,000 idle TCP sessions",
    "react": "registered to first user, killed to out of the rotation",
    "generator": "what the load generator itself costs",
    "tlsidle": "TLS: memory of 10,000 idle connections",
    "tlsoverload": "TLS: standing users beside twice the handshakes that a core can make",
}

# Names that stand for several.
GROUPS = {
    "tls": [name for name in (*BY_NAME, *SPECIAL) if name.startswith("tls")],
    "h2": [workload.name for workload in ALL if workload.http2],
}


def named(names):
    """The workloads that a list names, groups written out."""
    return [one for name in names for one in GROUPS.get(name, [name])]

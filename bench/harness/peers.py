"""The relays under test and the backends behind them: which binary, which configuration out of
bench/peers/, which port. Measures nothing."""

import os
import string
import subprocess
import time
from dataclasses import dataclass

from . import certificates, registration
from .processes import Process, Trouble, sessions, wait_for_port

RELAY_CORE = 0
OTHER_CORE = 1
BACKENDS = {"tcp": (19101, 19102), "udp": (19201, 19202), "api": (19301, 19302)}
CONFIGURATIONS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "peers")


@dataclass(frozen=True)
class Variant:
    """A relay in one configuration."""

    name: str
    relay: str
    tuning: str = ""
    options: str = ""
    # Sessions that it must be able to hold; None is all that the host's descriptors allow. HAProxy
    # counts splice's pipes against them.
    sessions: int | None = None
    # Ends a stream both ways when its user ends one under TLS. That is after the measured window, but the
    # word of how much has arrived is lost.
    cuts_off: bool = False


DIRECT = Variant("direct", "direct")
NGINX_BULK = "proxy_buffer_size 64k;"
SPLICE = "option splice-auto"
HAPROXY_PIPES = "tune.pipesize 1048576"
# Everyone speaks TLS 1.3 with AES-128-GCM.
HAPROXY_TLS = """ssl-default-bind-options ssl-min-ver TLSv1.3
    ssl-default-bind-ciphersuites TLS_AES_128_GCM_SHA256
    ssl-default-bind-curves X25519"""
NGINX_TLS = """ssl_certificate {chain};
        ssl_certificate_key {key};
        ssl_protocols TLSv1.3;
        ssl_ecdh_curve X25519;
        ssl_conf_command Ciphersuites TLS_AES_128_GCM_SHA256;"""
LB_TLS = """[[tls.certificate]]
certificate = "{chain}"
key = "{key}"
"""
# A TCP service under TLS has a door of its own.
LB_SECURED = """[service.secured]
protocol = "tcp"
listen = "127.0.0.1:{port}"
tls = true
"""


def variants(names, workload):
    """The relays to measure for a workload, in their order. Bulk gets each peer's own means."""
    chosen = []
    for name in names:
        if name == "haproxy" and workload.protocol == "udp":
            continue
        # Backends speak neither TLS nor HTTP/2.
        if name == "direct" and (workload.key or workload.http2):
            continue
        if name == "nginx" and workload.key and workload.unit == "GB":
            chosen.append(Variant("nginx 64k", "nginx", options=NGINX_BULK, cuts_off=True))
            continue
        if name == "haproxy" and workload.bulk:
            chosen.append(Variant("haproxy splice", "haproxy", options=SPLICE, sessions=1000))
            chosen.append(Variant("haproxy splice 1M", "haproxy", HAPROXY_PIPES, SPLICE, sessions=1000))
        elif name == "nginx" and workload.bulk:
            chosen.append(Variant("nginx 64k", "nginx", options=NGINX_BULK))
        else:
            chosen.append(Variant(name, name))
    return chosen


class Relay:
    """A running relay of one variant, or the direct path when there is no process."""

    def __init__(self, variant, protocol, place, binaries, directory, key=None, http2=False):
        """`key`: that of its certificate, where its users speak TLS. `http2`: its users speak that."""
        self.variant = variant
        self.key = key
        self.http2 = http2
        self.certificate = certificates.files(directory, key) if key else ()
        self.name = variant.name
        self.stream = protocol == "tcp"
        self.process = None
        self.registration = None
        self.port = 19000 + 10 * place
        self.directory = os.path.join(directory, variant.name.replace(" ", "-"))
        os.makedirs(self.directory, exist_ok=True)
        first, second = BACKENDS[protocol]
        if variant.relay == "direct":
            self.port = first
            return
        self.log = open(os.path.join(self.directory, "output"), "w+")
        start = {"haproxy": self._haproxy, "nginx": self._nginx}.get(variant.relay, self._lb)
        try:
            start(binaries[variant.relay], protocol, first, second)
        except BaseException:
            self.stop()
            raise

    def _launch(self, command):
        self.process = Process(command, RELAY_CORE, self.log)

    def _haproxy(self, binary, protocol, first, second):
        template = "haproxy-http.cfg" if protocol == "api" else "haproxy-tcp.cfg"
        self._launch([binary, "-db", "-f", self._configuration(template, first, second)])
        wait_for_port(self.port, self.process)

    def _nginx(self, binary, protocol, first, second):
        template = {"tcp": "nginx-stream.conf", "udp": "nginx-stream-udp.conf", "api": "nginx-http.conf"}[protocol]
        self._launch([binary, "-p", "/usr/share/nginx", "-c", self._configuration(template, first, second)])
        if protocol == "udp":
            wait_for_datagram_port(self.port, self.process)
        else:
            wait_for_port(self.port, self.process)

    def _lb(self, binary, protocol, first, second):
        doors = {"tcp": "off", "udp": "off", "api": "off"}
        service = "secured" if self.key and protocol == "tcp" else None
        if not service:
            doors["api-tls" if self.key else protocol] = f"127.0.0.1:{self.port}"
        command = [binary, "serve", "--config", self._configuration("lb.toml", first, second)]
        for door, address in doors.items():
            command += [f"--{door}", address]
        command += ["--control", f"127.0.0.1:{self.port + 1}", "--admin", f"127.0.0.1:{self.port + 2}"]
        self._launch(command)
        wait_for_port(self.port + 1, self.process)
        self.registration = registration.connected(self.port + 1)
        for port in (first, second):
            self.registration.register(protocol, port, service)
        self.registration.keep()

    def _configuration(self, template, first, second):
        with open(os.path.join(CONFIGURATIONS, template)) as file:
            text = string.Template(file.read()).substitute(
                port=self.port, first=first, second=second, directory=self.directory,
                options=self.variant.options, **self._secured(template),
                sessions=self.variant.sessions or sessions(), connections=2 * sessions() + 100,
            )
        path = os.path.join(self.directory, template)
        with open(path, "w") as file:
            file.write(text)
        return path

    def _secured(self, template):
        """What the configuration says of TLS, and the tuning, which HAProxy has it among."""
        tuning = self.variant.tuning
        if not self.key:
            spoken = {"haproxy-http.cfg": "proto h2", "nginx-http.conf": "http2"} if self.http2 else {}
            return {"tuning": tuning, "tls": "", "bind": spoken.get(template, "")}
        chain, key, both = self.certificate
        if template.startswith("haproxy"):
            alpn = f" alpn {'h2' if self.http2 else 'http/1.1'}" if "http" in template else ""
            return {"tuning": f"{tuning}\n    {HAPROXY_TLS}", "tls": "", "bind": f"ssl crt {both}{alpn}"}
        if template.startswith("nginx"):
            return {"tuning": tuning, "tls": NGINX_TLS.format(chain=chain, key=key), "bind": "ssl http2" if self.http2 else "ssl"}
        stream = LB_SECURED.format(port=self.port) if self.stream else ""
        return {"tuning": tuning, "tls": LB_TLS.format(chain=chain, key=key) + stream, "bind": ""}

    def check_cores(self):
        if self.process and self.process.strays():
            raise Trouble(
                f"{self.name}: threads {self.process.strays()} left core {RELAY_CORE}; "
                "a relay must stay within the cores that it was given"
            )

    def stop(self):
        if self.registration:
            self.registration.close()
        if self.process:
            self.process.stop()


def start_backends(generator, protocol, directory, flags=(), realtime=0):
    """One process that serves both backend ports of a protocol, on the core of the load."""
    log = open(os.path.join(directory, f"backends-{protocol}"), "w+")
    command = [generator, "bench", "serve", "--protocol", protocol, *flags]
    for port in BACKENDS[protocol]:
        command += ["--listen", f"127.0.0.1:{port}"]
    process = Process(command, OTHER_CORE, log, realtime=realtime)
    for port in BACKENDS[protocol]:
        if protocol == "udp":
            wait_for_datagram_port(port, process)
        else:
            wait_for_port(port, process)
    return process


def wait_for_datagram_port(port, process, patience=10.0):
    """Returns once a UDP socket is bound to the port in this network namespace."""
    until = time.monotonic() + patience
    while time.monotonic() < until and process.running():
        for table in ("/proc/net/udp", "/proc/net/udp6"):
            with open(table) as file:
                if any(f":{port:04X} " in line.split("00000000:0000")[0] for line in file.readlines()[1:]):
                    return
        time.sleep(0.02)
    raise Trouble(f"`{' '.join(process.command)}` did not bind UDP port {port}")


def versions(binaries, names):
    """What each relay calls itself."""
    said = {}
    for name in names:
        if name == "direct":
            continue
        flag = "-v" if name in ("haproxy", "nginx") else "--version"
        done = subprocess.run([binaries[name], flag], capture_output=True, text=True)
        lines = (done.stdout or done.stderr).strip().splitlines()
        said[name] = lines[0] if lines else "?"
    return said

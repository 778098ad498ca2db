"""A backend's side of the control port, as small as it gets: registers ports and answers hello, so
that the measured balancer is joined the way that a backend would join it."""

import json
import socket
import threading
import time

from .processes import Trouble


class Registration:
    """One control connection that keeps its ports registered until it is closed."""

    def __init__(self, control_port):
        self.socket = socket.create_connection(("127.0.0.1", control_port), 5)
        self.lines = self.socket.makefile("r")
        self.keeper = None

    def register(self, protocol, port, service=None):
        named = {"service": service} if service else {}
        self._say({"cmd": "register", "protocol": protocol, "port": port, **named})
        while True:
            line = self.lines.readline()
            if not line:
                raise Trouble(f"the balancer closed the control connection on register {protocol} {port}")
            answer = json.loads(line)
            if answer.get("cmd") == "hello":
                self._say({"ack": "hello"})
            elif answer.get("ack") == "successful":
                return
            else:
                raise Trouble(f"the balancer refused {protocol} {port}: {line.strip()}")

    def keep(self):
        """Answers hello from now on."""
        self.socket.settimeout(None)
        self.keeper = threading.Thread(target=self._answer, daemon=True)
        self.keeper.start()

    def close(self):
        try:
            self.socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self.socket.close()

    def _answer(self):
        try:
            for line in self.lines:
                if json.loads(line).get("cmd") == "hello":
                    self._say({"ack": "hello"})
        except (OSError, ValueError):
            pass

    def _say(self, message):
        self.socket.sendall(json.dumps(message).encode() + b"\n")


def connected(control_port, patience=10.0):
    """A registration once the control port accepts."""
    until = time.monotonic() + patience
    while True:
        try:
            return Registration(control_port)
        except OSError as error:
            if time.monotonic() > until:
                raise Trouble(f"nobody accepts on the control port {control_port}: {error}") from error
            time.sleep(0.02)

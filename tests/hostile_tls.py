"""Users who bend TLS, on tlslite-ng, which lets them: padding, empty records, a ClientHello split at every byte,
floods of key updates and of warnings, renegotiation, early data, ends without a close_notify.

    python3 tests/hostile_tls.py PORT [CASE...]

The balancer at that port of this host serves HTTPS for a.example. Prints a line for each case: its name, and `ok`
or what is wrong. Each case says in its first line what must hold.
"""

import os
import random
import socket
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "target", "python"))

from tlslite.api import HandshakeSettings, TLSConnection
from tlslite.constants import AlertDescription, AlertLevel, KeyUpdateMessageType
from tlslite.errors import TLSAbruptCloseError, TLSRemoteAlert
from tlslite.extensions import TLSExtension
from tlslite.messages import Alert, ApplicationData, ClientHello

HOST = "a.example"
GET = b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n"
PORT = int(sys.argv[1])
GONE = (TLSRemoteAlert, TLSAbruptCloseError, ConnectionError, BrokenPipeError)


class Wire:
    """A socket that keeps what is sent first, the ClientHello, and may send something behind it."""

    def __init__(self, sock, behind):
        self.sock, self.behind, self.first = sock, behind, None

    def __getattr__(self, name):
        return getattr(self.sock, name)

    def send(self, data):
        self.sendall(data)
        return len(data)

    def sendall(self, data):
        self.sock.sendall(data)
        if self.first is None:
            self.first = bytes(data)
            self.sock.sendall(self.behind)


def connect():
    sock = socket.create_connection(("127.0.0.1", PORT))
    sock.settimeout(10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def connection(behind=b""):
    wire = Wire(connect(), behind)
    it = TLSConnection(wire)
    it.wire = wire
    return it


def settings(version):
    made = HandshakeSettings()
    made.minVersion = made.maxVersion = version
    return made


def user(version=(3, 4), made=None, behind=b""):
    it = connection(behind)
    it.handshakeClientCert(settings=made or settings(version), serverName=HOST)
    return it


def answer(it):
    """One answer, whole."""
    said = bytearray()
    while b"\r\n\r\n" not in said:
        said += it.read(max=65536, min=1)
    head, body = bytes(said).split(b"\r\n\r\n", 1)
    length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
    while len(body) < length:
        body += it.read(max=65536, min=1)
    assert head.startswith(b"HTTP/1.1 200 OK"), head
    return body


def ask(it):
    it.write(GET)
    return answer(it)


def send(it, message):
    for _ in it._sendMsg(message, randomizeFirstBlock=False, update_hashes=False):
        pass


def is_ended(it, act, most):
    """Does something over and over until the connection ends; how often it could."""
    for number in range(most):
        try:
            act()
        except GONE:
            return number
    it.sock.settimeout(3)
    try:
        it.read(max=1, min=1)
    except GONE:
        return most
    except (socket.timeout, TimeoutError):
        return None
    return most if it.closed else None


def padding():
    """Padded records are read like others (RFC 8446 section 5.4)."""
    made = settings((3, 4))
    made.padding_cb = lambda length, kind, most: bytearray(min(most, random.choice([0, 1, 255, 5000, 16000])))
    it = user(made=made)
    for _ in range(20):
        ask(it)


def empty_records():
    """Empty records between others are read over; without anything between them they end the connection."""
    for version in [(3, 3), (3, 4)]:
        it = user(version)
        for _ in range(3):
            for _ in range(20):
                send(it, ApplicationData().create(bytearray()))
            ask(it)
        taken = is_ended(it, lambda: send(it, ApplicationData().create(bytearray())), 200)
        assert taken is not None, "a flood of empty records was taken"


def split_hello():
    """A ClientHello is read wherever TCP has cut it, and when it comes byte by byte."""
    hello = user().wire.first
    for cuts in [[cut] for cut in range(1, len(hello))] + [range(1, len(hello))]:
        sock = connect()
        for start, end in zip([0, *cuts], [*cuts, len(hello)]):
            sock.sendall(hello[start:end])
            # Otherwise the kernel joins them again.
            time.sleep(0.0005)
        assert sock.recv(5)[:1] == b"\x16", f"no answer to a hello cut at {cuts}"
        sock.close()


def key_updates():
    """Keys may be changed now and then; 32 times without data, or ever so often a second, end the connection."""
    def update(it):
        for _ in it.send_keyupdate_request(KeyUpdateMessageType.update_requested):
            pass

    it = user()
    for _ in range(5):
        update(it)
        ask(it)
    taken = is_ended(it, lambda: update(it), 500)
    assert taken is not None, "a flood of key updates was taken"
    it = user()
    it.write(GET.replace(b"GET", b"POST")[:-2] + b"Content-Length: 100000\r\n\r\n")
    taken = is_ended(it, lambda: (update(it), it.write(b"x")), 1000)
    assert taken is not None, "a flood of key updates with data between was taken"


def warnings():
    """A few warnings are read over in TLS 1.2, and many end the connection."""
    it = user((3, 3))
    warning = lambda: send(it, Alert().create(AlertDescription.no_certificate, AlertLevel.warning))
    warning()
    ask(it)
    assert is_ended(it, warning, 200) is not None, "a flood of warnings was taken"


def renegotiation():
    """A second ClientHello in TLS 1.2 is refused, and costs no second handshake."""
    it = user((3, 3))
    ask(it)
    hello = ClientHello().create((3, 3), bytearray(os.urandom(32)), bytearray(), [0xC02B, 0xC02F])
    try:
        send(it, hello)
        it.sock.settimeout(3)
        said = it.read(max=1, min=1)
        assert not said, f"it was answered: {said}"
    except GONE as gone:
        alert = getattr(gone, "description", None)
        assert alert in (None, AlertDescription.no_renegotiation, AlertDescription.unexpected_message), gone
    except (socket.timeout, TimeoutError):
        raise AssertionError("it is still waited for")
    # Only what was asked before has been answered, and others are served as before.
    ask(user((3, 3)))


def early_data():
    """Early data is never taken: whoever sends some is refused, or answered as if it had not."""
    junk = bytes([23, 3, 3, 0, 100]) + os.urandom(100)
    offer = TLSExtension(extType=42).create(42, bytearray())
    original = ClientHello.write

    def offering(hello):
        if not any(one.extType == 42 for one in hello.extensions):
            # A pre_shared_key must be the last.
            hello.extensions.insert(0, offer)
        return original(hello)

    for behind in [b"", junk]:
        ClientHello.write = offering
        try:
            ask(user(behind=behind))
        except GONE:
            pass
        finally:
            ClientHello.write = original
    ask(user())


def no_close_notify():
    """An HTTP user may just go: its request has said its length."""
    for version in [(3, 3), (3, 4)]:
        it = user(version)
        ask(it)
        it.write(GET)
        it.wire.sock.shutdown(socket.SHUT_WR)
        answer(it)


CASES = [padding, empty_records, split_hello, key_updates, warnings, renegotiation, early_data, no_close_notify]

for case in CASES:
    if sys.argv[2:] and case.__name__ not in sys.argv[2:]:
        continue
    try:
        case()
        print(case.__name__, "ok", flush=True)
    except Exception as error:  # noqa: BLE001, one case does not keep the others from their turn
        print(case.__name__, type(error).__name__, error, flush=True)
        if os.environ.get("TRACE"):
            raise

"""Python's h2 as a user: `client.py PORT`."""

import hashlib
import socket
import sys

import h2.config
import h2.connection
import h2.events

BODY = b"a body that is sent " * 150_000
SUM = hashlib.sha256(BODY).hexdigest()


class User:
    def __init__(self, port):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self.connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self.connection.initiate_connection()
        self.happened = []
        self.flush()

    def flush(self):
        self.socket.sendall(self.connection.data_to_send())

    def read(self):
        data = self.socket.recv(65536)
        assert data, "the connection is over"
        for event in self.connection.receive_data(data):
            assert not isinstance(event, h2.events.ConnectionTerminated), event
            if isinstance(event, h2.events.DataReceived):
                self.connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            self.happened.append(event)
        self.flush()

    def send(self, stream, body):
        """Returns whether all of it was taken before the stream was ended."""
        while body:
            room = min(self.connection.local_flow_control_window(stream), self.connection.max_outbound_frame_size)
            if room == 0:
                self.read()
                if any(isinstance(event, (h2.events.StreamReset, h2.events.StreamEnded)) for event in self.happened):
                    return False
                continue
            self.connection.send_data(stream, body[:room])
            self.flush()
            body = body[room:]
        return True

    def ask(self, method, path, body=None, length=False, trailers=None, fields=()):
        stream = self.connection.get_next_available_stream_id()
        head = [(":method", method), (":scheme", "http"), (":authority", "x.example"), (":path", path), *fields]
        if length:
            head.append(("content-length", str(len(body))))
        self.happened = []
        self.connection.send_headers(stream, head, end_stream=body is None)
        self.flush()
        if body is not None and self.send(stream, body):
            if trailers:
                self.connection.send_headers(stream, trailers, end_stream=True)
            else:
                self.connection.end_stream(stream)
            self.flush()
        ends = (h2.events.StreamEnded, h2.events.StreamReset)
        while not any(isinstance(event, ends) for event in self.happened):
            self.read()
        return Answer(self.happened)


class Answer:
    def __init__(self, events):
        def of(kind):
            return [event for event in events if isinstance(event, kind)]

        self.interim = [dict(event.headers)[":status"] for event in of(h2.events.InformationalResponseReceived)]
        self.head = dict(of(h2.events.ResponseReceived)[0].headers)
        self.body = b"".join(event.data for event in of(h2.events.DataReceived))
        self.trailers = dict(pair for event in of(h2.events.TrailersReceived) for pair in event.headers)
        self.status = self.head[":status"]


def main():
    user = User(int(sys.argv[1]))
    none = hashlib.sha256().hexdigest()
    assert user.ask("GET", "/a").head["x-report"] == f"GET /a 0 {none} -"
    head = user.ask("HEAD", "/")
    assert (head.status, head.body) == ("200", b"")
    for length in (False, True):
        answer = user.ask("POST", "/", BODY, length)
        assert answer.head["x-report"] == f"POST / {len(BODY)} {SUM} -", answer.head
        assert answer.head["x-length"] == (str(len(BODY)) if length else "-")
    answer = user.ask("POST", "/", BODY, trailers=[("x-sum", "up")])
    assert answer.head["x-report"] == f"POST / {len(BODY)} {SUM} up", answer.head
    answer = user.ask("GET", "/trailers")
    assert (answer.body, answer.trailers["x-sum"]) == (b"with trailers", "abc")
    answer = user.ask("GET", "/hints")
    assert (answer.interim, answer.status) == (["103"], "200")
    answer = user.ask("POST", "/", b"abc", True, fields=[("expect", "100-continue")])
    assert (answer.interim, answer.status) == (["100"], "200")
    answer = user.ask("POST", "/early", bytes(50_000_000))
    assert (answer.status, answer.body) == ("413", b"too large")
    assert user.ask("GET", "/after").status == "200"


main()

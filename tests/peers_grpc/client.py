"""gRPC's interoperability cases, without messages: `client.py ADDRESS [CERTIFICATE]`. Ends with 1 at the first that
fails, and says which."""

import collections
import queue
import sys
import time

import grpc

address, certificate = sys.argv[1], sys.argv[2:]
if certificate:
    with open(certificate[0], "rb") as file:
        credentials = grpc.ssl_channel_credentials(file.read())
    options = [("grpc.ssl_target_name_override", "a.example")]
    channel = grpc.secure_channel(address, credentials, options)
else:
    channel = grpc.insecure_channel(address)


def check(name, is_so, *more):
    print("ok" if is_so else "FAILED", name, *more, flush=True)
    if not is_so:
        sys.exit(1)


def unary(method, request=b"", timeout=20):
    return channel.unary_unary(f"/test/{method}")(request, timeout=timeout)


def failure(method, request=b"", timeout=20):
    try:
        unary(method, request, timeout)
    except grpc.RpcError as error:
        return error
    check(f"{method} fails", False)


metadata = (("ask-bin", b"\x00\x01\xff"),)
reply, call = channel.unary_unary("/test/unary").with_call(b"hello", metadata=metadata, timeout=20)
began, ended = dict(call.initial_metadata()), dict(call.trailing_metadata())
check("metadata", (reply, began.get("began"), ended.get("ended"), ended.get("echo-bin")) == (b"hello", "yes", "yes", b"\x00\x01\xff"))
check("empty unary", unary("unary") == b"")
check("large unary", len(unary("large", b"x" * 271828)) == 314159)
for code in (2, 13, 16):
    error = failure("status", str(code).encode())
    check(f"status {code}", error.code().value[0] == code and "☺ and non-BMP 😈" in error.details())
check("unimplemented", failure("nothing").code() == grpc.StatusCode.UNIMPLEMENTED)
sizes = [len(one) for one in channel.unary_stream("/test/several")(b"10000 600", timeout=60)]
check("10,000 messages of 600 B", sizes == [600] * 10000)
sent = iter([b"a" * 27182, b"b" * 8, b"c" * 1828, b"d" * 45904])
check("client streaming", channel.stream_unary("/test/sum")(sent, timeout=20) == b"74922")
asked = queue.Queue()
replies = channel.stream_stream("/test/echo")(iter(asked.get, None), timeout=20)
for size in (31415, 9, 2653, 58979):
    asked.put(b"p" * size)
    check(f"ping-pong {size}", len(next(replies)) == size)
asked.put(None)
check("ping-pong ends", list(replies) == [])
check("empty stream", list(channel.stream_stream("/test/echo")(iter([]), timeout=20)) == [])
call = channel.stream_unary("/test/sum").future(iter(queue.Queue().get, None), timeout=20)
call.cancel()
check("cancel after begin", call.cancelled())
replies = channel.unary_stream("/test/endless")(b"", timeout=60)
check("first response", next(replies) == b"first")
replies.cancel()
until = time.monotonic() + 20
while all(unary("cancelled") == b"0" for _ in range(8)) and time.monotonic() < until:
    time.sleep(0.05)
check("cancel after first response reaches the backend", time.monotonic() < until)
check("timeout", failure("slow", b"2", timeout=0.3).code() == grpc.StatusCode.DEADLINE_EXCEEDED)
calls = [channel.unary_unary("/test/name").future(b"", timeout=60) for _ in range(1000)]
counts = collections.Counter(call.result() for call in calls)
check("1,000 calls are dealt out", sorted(counts.values()) == [250] * 4, dict(counts))

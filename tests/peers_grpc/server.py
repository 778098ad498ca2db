"""A gRPC server without messages: bytes come and go as they are. One for each port named."""

import sys
import time
from concurrent import futures

import grpc

cancelled = 0


def unary(request, context):
    context.send_initial_metadata((("began", "yes"),))
    said = dict(context.invocation_metadata())
    context.set_trailing_metadata((("ended", "yes"), ("echo-bin", said.get("ask-bin", b""))))
    return request


def status(request, context):
    code = next(code for code in grpc.StatusCode if code.value[0] == int(request))
    context.abort(code, "\t\ntest with whitespace\r\nand Unicode BMP ☺ and non-BMP 😈\t\n")


def several(request, _):
    count, size = (int(word) for word in request.split())
    for _ in range(count):
        yield b"m" * size


def endless(_, context):
    def over():
        global cancelled
        cancelled += 1

    context.add_callback(over)
    yield b"first"
    while context.is_active():
        time.sleep(0.02)


def slow(request, _):
    time.sleep(float(request))
    return b""


class Methods(grpc.GenericRpcHandler):
    def __init__(self, name):
        self.known = {
            "unary": grpc.unary_unary_rpc_method_handler(unary),
            "name": grpc.unary_unary_rpc_method_handler(lambda request, _: name),
            "large": grpc.unary_unary_rpc_method_handler(lambda request, _: b"z" * 314159 if len(request) == 271828 else b""),
            "status": grpc.unary_unary_rpc_method_handler(status),
            "cancelled": grpc.unary_unary_rpc_method_handler(lambda *_: str(cancelled).encode()),
            "slow": grpc.unary_unary_rpc_method_handler(slow),
            "several": grpc.unary_stream_rpc_method_handler(several),
            "endless": grpc.unary_stream_rpc_method_handler(endless),
            "sum": grpc.stream_unary_rpc_method_handler(lambda all, _: str(sum(map(len, all))).encode()),
            "echo": grpc.stream_stream_rpc_method_handler(lambda all, _: (one for one in all)),
        }

    def service(self, details):
        return self.known.get(details.method.removeprefix("/test/"))


servers = []
for port in sys.argv[1:]:
    server = grpc.server(futures.ThreadPoolExecutor(40))
    server.add_generic_rpc_handlers((Methods(port.encode()),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    servers.append(server)
time.sleep(3600)

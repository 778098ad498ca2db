// A gRPC server from Node without messages, as server.py; one port.
const grpc = require('@grpc/grpc-js');

const same = (bytes) => bytes;
const server = new grpc.Server();
const method = (path, requestStream, responseStream) => ({
  path: `/test/${path}`, requestStream, responseStream,
  requestSerialize: same, requestDeserialize: same, responseSerialize: same, responseDeserialize: same,
});
server.addService({
  unary: method('unary', false, false),
  large: method('large', false, false),
  status: method('status', false, false),
  slow: method('slow', false, false),
  several: method('several', false, true),
  endless: method('endless', false, true),
  echo: method('echo', true, true),
}, {
  unary: (call, reply) => reply(null, call.request),
  large: (call, reply) => reply(null, Buffer.alloc(call.request.length === 271828 ? 314159 : 0)),
  status: (call, reply) => reply({ code: Number(call.request.toString()), details: 'Unicode BMP ☺ and non-BMP 😈' }),
  slow: (call, reply) => setTimeout(() => reply(null, Buffer.alloc(0)), 1000 * Number(call.request.toString())),
  several: (call) => {
    const [count, size] = call.request.toString().split(' ').map(Number);
    for (let number = 0; number < count; number += 1) call.write(Buffer.alloc(size));
    call.end();
  },
  endless: (call) => call.write(Buffer.from('first')),
  echo: (call) => {
    call.on('data', (one) => call.write(one));
    call.on('end', () => call.end());
  },
});
server.bindAsync(`127.0.0.1:${process.argv[2]}`, grpc.ServerCredentials.createInsecure(), (error) => {
  if (error) throw error;
});

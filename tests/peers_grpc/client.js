// Some of gRPC's interoperability cases from Node: `client.js ADDRESS`. Ends with 1 at the first that fails.
const grpc = require('@grpc/grpc-js');

const same = (bytes) => bytes;
const client = new grpc.Client(process.argv[2], grpc.credentials.createInsecure());
const check = (name, isSo) => {
  console.log(isSo ? 'ok' : 'FAILED', name);
  if (!isSo) process.exit(1);
};
const unary = (method, request = Buffer.alloc(0), options = {}) => new Promise((told) => {
  client.makeUnaryRequest(`/test/${method}`, same, same, request, options, (error, reply) => told({ error, reply }));
});
const received = (stream) => new Promise((told) => {
  const all = [];
  stream.on('data', (one) => all.push(one.length));
  stream.on('error', (error) => told({ error, all }));
  stream.on('end', () => told({ all }));
});

(async () => {
  check('unary', (await unary('unary', Buffer.from('hello'))).reply.toString() === 'hello');
  check('large unary', (await unary('large', Buffer.alloc(271828))).reply.length === 314159);
  const failed = (await unary('status', Buffer.from('16'))).error;
  check('status', failed.code === 16 && failed.details.includes('☺'));
  check('unimplemented', (await unary('nothing')).error.code === grpc.status.UNIMPLEMENTED);
  const several = client.makeServerStreamRequest('/test/several', same, same, Buffer.from('10000 600'));
  const { all } = await received(several);
  check('10,000 messages of 600 B', all.length === 10000 && all.every((size) => size === 600));
  const echo = client.makeBidiStreamRequest('/test/echo', same, same);
  const echoed = received(echo);
  [31415, 9, 2653, 58979].forEach((size) => echo.write(Buffer.alloc(size)));
  echo.end();
  check('echo', (await echoed).all.join() === '31415,9,2653,58979');
  const endless = client.makeServerStreamRequest('/test/endless', same, same, Buffer.alloc(0));
  endless.once('data', () => endless.cancel());
  check('cancel', (await received(endless)).error.code === grpc.status.CANCELLED);
  const late = await unary('slow', Buffer.from('2'), { deadline: Date.now() + 300 });
  check('timeout', late.error.code === grpc.status.DEADLINE_EXCEEDED);
  client.close();
})();

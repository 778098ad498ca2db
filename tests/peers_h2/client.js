// Node's http2 as a user: `node client.js PORT CASE`.
const assert = require('assert');
const crypto = require('crypto');
const http2 = require('http2');
const { Readable } = require('stream');

const session = http2.connect(`http://127.0.0.1:${process.argv[2]}`);
const body = Buffer.alloc(3000000, 'a body that is sent ');
const sum = crypto.createHash('sha256').update(body).digest('hex');
const none = crypto.createHash('sha256').digest('hex');

// More than a session of Node's would hold at once.
function* large() {
  for (let left = 5000; left > 0; left -= 1) yield Buffer.alloc(10000);
}

// What comes for a request: heads, body, trailers, and the code of its reset.
function ask(fields, { content, trailers, started } = {}) {
  const stream = session.request(fields, { endStream: content === undefined, waitForTrailers: !!trailers });
  const come = { interim: [], text: '', code: 0 };
  return new Promise((resolve) => {
    stream.on('headers', (head) => come.interim.push(head[':status']));
    stream.on('response', (head) => { come.head = head; });
    stream.on('data', (part) => { come.text += part; });
    stream.on('trailers', (fields) => { come.trailers = fields; });
    stream.on('wantTrailers', () => stream.sendTrailers(trailers));
    stream.on('error', () => {});
    stream.on('close', () => { come.code = stream.rstCode; resolve(come); });
    if (content instanceof Readable) content.pipe(stream);
    else if (content !== undefined) stream.end(content);
    if (started) started(stream);
  });
}

const get = (path) => ask({ ':path': path });
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

async function until(what, holds) {
  for (let left = 600; left > 0; left -= 1) {
    if (await holds()) return;
    await pause(50);
  }
  assert.fail(`waited in vain for ${what}`);
}

const count = async () => JSON.parse((await get('/count')).text);

const cases = {
  async bodies() {
    const small = await get('/a?b');
    assert.equal(small.head[':status'], 200);
    assert.equal(small.head['x-report'], `GET /a?b 0 ${none} -`);
    const head = await ask({ ':path': '/', ':method': 'HEAD' });
    assert.deepEqual([head.head[':status'], head.text], [200, '']);
    for (const length of [undefined, body.length]) {
      const fields = { ':path': '/', ':method': 'POST' };
      if (length) fields['content-length'] = length;
      const sent = await ask(fields, { content: body });
      assert.equal(sent.head['x-report'], `POST / ${body.length} ${sum} -`);
      assert.equal(sent.head['x-length'], length ? String(length) : '-');
    }
  },

  async trailers() {
    const up = await ask({ ':path': '/', ':method': 'POST' }, { content: body, trailers: { 'x-sum': 'up' } });
    assert.equal(up.head['x-report'], `POST / ${body.length} ${sum} up`);
    const down = await get('/trailers');
    assert.deepEqual([down.text, down.trailers['x-sum']], ['with trailers', 'abc']);
  },

  async interim() {
    const hints = await get('/hints');
    assert.deepEqual([hints.interim, hints.head[':status']], [[103], 200]);
    const fields = { ':path': '/', ':method': 'POST', expect: '100-continue', 'content-length': 3 };
    const expecting = await ask(fields, { content: 'abc' });
    assert.deepEqual([expecting.interim, expecting.head[':status']], [[100], 200]);
  },

  async early() {
    const early = await ask({ ':path': '/early', ':method': 'POST' }, { content: Readable.from(large()) });
    assert.deepEqual([early.head[':status'], early.text], [413, 'too large']);
    assert.equal((await get('/after')).head[':status'], 200);
  },

  async reset() {
    for (const fields of [{ ':path': '/hang' }, { ':path': '/hang', ':method': 'POST' }]) {
      const before = await count();
      let user;
      const content = fields[':method'] ? 'abc' : undefined;
      const hanging = ask(fields, { content, started: (stream) => { user = stream; } });
      await until('the request to arrive', async () => (await count()).waiting === 1);
      user.close(http2.constants.NGHTTP2_CANCEL);
      await hanging;
      await until('the backend to be told', async () => (await count()).cut === before.cut + 1);
    }
  },

  async death() {
    const slow = get('/slow');
    for (const path of ['/die', '/die-in-chunks']) {
      const dying = await get(path);
      assert.equal(dying.head[':status'], 200);
      assert.equal(dying.text.length, 1000);
      assert.notEqual(dying.code, http2.constants.NGHTTP2_NO_ERROR, path);
    }
    assert.equal((await slow).text, 'slow but whole');
    assert.equal((await get('/after')).head[':status'], 200);
  },

  // By turns, each stream by itself.
  async shares() {
    const shares = {};
    for (let round = 0; round < 20; round += 1) {
      const answers = await Promise.all(Array.from({ length: 50 }, () => get('/share')));
      for (const { text } of answers) shares[text] = (shares[text] || 0) + 1;
    }
    assert.deepEqual(Object.values(shares), [250, 250, 250, 250]);
  },
};

const limit = setTimeout(() => assert.fail('it takes too long'), 60000);
session.on('error', (error) => { throw error; });
session.on('goaway', (code) => assert.fail(`the connection ended: ${code}`));
cases[process.argv[3]]().then(() => { clearTimeout(limit); session.close(); });

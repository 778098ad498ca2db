// A backend of HTTP/1.1 that reports what it was asked: method, target, length and SHA-256 of the body, trailers.
const http = require('http');
const crypto = require('crypto');

let cut = 0;
let waiting = 0;

const special = {
  // Answered before the body has come.
  '/early': (request, response) => {
    response.writeHead(413, { 'Content-Length': 9, Connection: 'close' });
    response.end('too large');
  },
  // Never answered.
  '/hang': (request) => {
    waiting += 1;
    request.socket.once('close', () => { waiting -= 1; cut += 1; });
    request.resume();
  },
  '/count': (request, response) => response.end(JSON.stringify({ cut, waiting })),
  // A server that dies in the middle of its answer.
  '/die': (request, response) => {
    response.writeHead(200, { 'Content-Length': 1000000 });
    response.write('x'.repeat(1000));
    setTimeout(() => request.socket.destroy(), 200);
  },
  '/die-in-chunks': (request, response) => {
    response.write('x'.repeat(1000));
    setTimeout(() => request.socket.destroy(), 200);
  },
  '/slow': (request, response) => {
    response.write('slow ');
    setTimeout(() => response.end('but whole'), 2000);
  },
};

http.createServer((request, response) => {
  if (special[request.url]) return special[request.url](request, response);
  const hash = crypto.createHash('sha256');
  let bytes = 0;
  request.on('data', (part) => { bytes += part.length; hash.update(part); });
  request.on('end', () => {
    const said = [request.method, request.url, bytes, hash.digest('hex')];
    response.setHeader('X-Report', said.concat(request.trailers['x-sum'] || '-').join(' '));
    response.setHeader('X-Length', request.headers['content-length'] || '-');
    if (request.url === '/hints') response.writeEarlyHints({ link: '</a.css>; rel=preload' });
    if (request.url !== '/trailers') return response.end(process.argv[2]);
    response.setHeader('Trailer', 'X-Sum');
    response.write('with ');
    response.addTrailers({ 'X-Sum': 'abc' });
    response.end('trailers');
  });
}).listen(Number(process.argv[2]), '127.0.0.1');

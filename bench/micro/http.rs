//! Heads as browsers and backends send them.

use divan::Bencher;
use lb::http::Limits;
use lb::http::head::{self, Space};

const SMALL: &[u8] = b"GET /item/42?full=yes HTTP/1.1\r\nhost: example\r\nuser-agent: curl/8\r\n\
accept: */*\r\n\r\n";

const BROWSER: &[u8] = b"GET /news/today?page=3 HTTP/1.1\r\n\
Host: www.example.org\r\n\
User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0\r\n\
Accept: text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8\r\n\
Accept-Language: en-GB,en;q=0.7,de;q=0.3\r\n\
Accept-Encoding: gzip, deflate, br, zstd\r\n\
Referer: https://www.example.org/news\r\n\
Connection: keep-alive\r\n\
Cookie: session=0123456789abcdef0123456789abcdef; theme=dark; seen=1,2,3,4,5,6\r\n\
Upgrade-Insecure-Requests: 1\r\n\
Sec-Fetch-Dest: document\r\nSec-Fetch-Mode: navigate\r\nSec-Fetch-Site: same-origin\r\n\r\n";

const RESPONSE: &[u8] = b"HTTP/1.1 200 OK\r\nServer: service/1\r\n\
Date: Sun, 06 Nov 1994 08:49:37 GMT\r\nContent-Type: application/json\r\nContent-Length: 64\r\n\r\n";

fn request(bencher: Bencher, bytes: &'static [u8]) {
    let limits = Limits::default();
    bencher.bench_local(|| {
        let mut space = Space::new();
        let head = head::request(divan::black_box(bytes), 0, &limits, &mut space);
        head.expect("a valid head").expect("a whole head").length
    });
}

/// Budget: 200 ns.
#[divan::bench]
fn small_request(bencher: Bencher) {
    request(bencher, SMALL);
}

/// Budget: 620 ns.
#[divan::bench]
fn browser_request(bencher: Bencher) {
    request(bencher, BROWSER);
}

/// Budget: 165 ns.
#[divan::bench]
fn small_response(bencher: Bencher) {
    let limits = Limits::default();
    bencher.bench_local(|| {
        let mut space = Space::new();
        let head = head::response(divan::black_box(RESPONSE), 0, &limits, &mut space);
        head.expect("a valid head").expect("a whole head").length
    });
}

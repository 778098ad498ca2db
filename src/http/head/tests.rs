//! How heads are read and which are refused, as a table of behaviour.

use super::*;

/// Reads a request and returns its essentials, or the status of its refusal.
fn read(text: &[u8]) -> Result<Option<(String, usize, usize)>, u16> {
    let mut space = Space::new();
    match request(text, 0, &Limits::default(), &mut space) {
        Ok(None) => Ok(None),
        Ok(Some(head)) => Ok(Some((
            format!("{} {:?}", head.method, head.target),
            head.fields.iter().count(),
            head.length,
        ))),
        Err(fault) => Err(fault.status),
    }
}

fn status(text: &[u8]) -> u16 {
    match read(text) {
        Ok(Some(_)) => 200,
        Ok(None) => 0,
        Err(status) => status,
    }
}

#[test]
fn a_plain_request_is_read_up_to_its_body() {
    let text = b"GET /a?b=c HTTP/1.1\r\nHost: x\r\nAccept: */*  \r\n\r\nrest";
    let mut space = Space::new();
    let head = request(text, 0, &Limits::default(), &mut space).unwrap().unwrap();
    assert_eq!((head.method, head.target), ("GET", Target::Origin("/a?b=c")));
    assert_eq!((head.version, head.host), (Version::Http11, Some("x")));
    assert_eq!(&text[head.length..], b"rest");
    assert_eq!(head.fields.values(Name::Accept).collect::<Vec<_>>(), [b"*/*"]);
}

#[test]
fn every_prefix_of_a_good_head_asks_for_more() {
    let text = b"\r\nPOST /x HTTP/1.1\r\nHost: a.example:80\r\nContent-Length: 3\r\nX:\r\n\r\n";
    for end in 0..text.len() {
        assert_eq!(read(&text[..end]), Ok(None), "{end}");
    }
    assert_eq!(status(text), 200);
}

#[test]
fn the_start_line_has_one_shape() {
    for (line, wanted) in [
        ("GET / HTTP/1.1", 200),
        ("get / HTTP/1.1", 200),
        ("PROPFIND / HTTP/1.1", 200),
        ("GET  / HTTP/1.1", 400),
        ("GET /  HTTP/1.1", 400),
        ("GET / HTTP/1.1 ", 400),
        (" GET / HTTP/1.1", 400),
        ("GET\t/ HTTP/1.1", 400),
        ("GET /a b HTTP/1.1", 400),
        ("GET /", 400),
        ("GET / http/1.1", 400),
        ("GET / HTTP/1.10", 400),
        ("GET / HTTP/01.1", 400),
        ("GET / HTTP/2.0", 505),
        ("GET / HTTP/1.2", 505),
        ("GET / HTTP/0.9", 505),
        ("GET / HTTP/2.0 ", 400),
        ("GET / XTTP/1.1", 400),
        ("G{T / HTTP/1.1", 400),
        ("CONNECT a:1 HTTP/1.1", 501),
        ("TRACE / HTTP/1.1", 501),
        ("ABCDEFGHIJKLMNOPQRSTUVWXYZABCDEFG / HTTP/1.1", 501),
    ] {
        let text = format!("{line}\r\nHost: x\r\n\r\n");
        assert_eq!(status(text.as_bytes()), wanted, "{line}");
    }
}

#[test]
fn the_target_has_four_forms_and_no_others() {
    for (line, wanted) in [
        ("OPTIONS *", Ok("OPTIONS Asterisk")),
        ("GET *", Err(400)),
        ("GET http://h", Ok("GET Absolute { authority: \"h\", path: \"\" }")),
        ("GET HTTP://h:81/p?q", Ok("GET Absolute { authority: \"h:81\", path: \"/p?q\" }")),
        ("GET http://h?q", Ok("GET Absolute { authority: \"h\", path: \"?q\" }")),
        ("GET http:///p", Err(400)),
        ("GET http://u@h/", Err(400)),
        ("GET https://h/", Ok("GET Absolute { authority: \"h\", path: \"/\" }")),
        ("GET HttpS://h:443?q", Ok("GET Absolute { authority: \"h:443\", path: \"?q\" }")),
        (
            "GET https://[::1]:8/p://q",
            Ok("GET Absolute { authority: \"[::1]:8\", path: \"/p://q\" }"),
        ),
        ("GET https://", Err(400)),
        ("GET https:///p", Err(400)),
        ("GET https://u@h/", Err(400)),
        ("GET https:/h/", Err(400)),
        ("GET https:h", Err(400)),
        ("GET httpss://h/", Err(400)),
        ("GET ftp://h/", Err(400)),
        ("GET ws://h/", Err(400)),
        ("GET ://h/", Err(400)),
        ("GET h:80", Err(400)),
        ("GET p", Err(400)),
        ("GET /a#b", Err(400)),
        ("GET /\u{e4}", Err(400)),
        ("GET /a%00b", Ok("GET Origin(\"/a%00b\")")),
    ] {
        let text = format!("{line} HTTP/1.1\r\nHost: x\r\n\r\n");
        let got = read(text.as_bytes()).map(|head| head.unwrap().0);
        assert_eq!(got.as_deref().map_err(|status| *status), wanted, "{line}");
    }
}

#[test]
fn a_field_line_has_one_shape() {
    for (lines, wanted) in [
        ("A: b\r\n", 200),
        ("A:b\r\n", 200),
        ("A:\r\n", 200),
        ("A: \t b \t \r\n", 200),
        ("A: \u{e4}\r\n", 200),
        ("A : b\r\n", 400),
        ("A\t: b\r\n", 400),
        (" A: b\r\n", 400),
        ("A: b\r\n c\r\n", 400),
        ("A: b\r\n\tc\r\n", 400),
        ("A: b\n", 400),
        ("A: b\r\r\n", 400),
        ("A: b\rC: d\r\n", 400),
        ("A: b\0\r\n", 400),
        ("A: b\x7f\r\n", 400),
        ("A: b\x0b\r\n", 400),
        ("A\r\n", 400),
        (": b\r\n", 400),
        ("A(: b\r\n", 400),
        ("\u{e4}: b\r\n", 400),
    ] {
        for (before, after) in [("", "Host: x\r\n"), ("Host: x\r\n", "")] {
            let text = format!("GET / HTTP/1.1\r\n{before}{lines}{after}\r\n");
            assert_eq!(status(text.as_bytes()), wanted, "{text:?}");
        }
    }
}

#[test]
fn every_line_ends_with_both_characters() {
    let good = "GET / HTTP/1.1\r\nHost: x\r\nA: b\r\n\r\n";
    for (place, _) in good.match_indices('\r') {
        let mut bare = good.to_string();
        bare.remove(place);
        assert_eq!(status(bare.as_bytes()), 400, "{bare:?}");
    }
    assert_eq!(status(b"GET / HTTP/1.0\n\n"), 400);
    assert_eq!(status(b"GET / HTTP/1.0\r\n\n"), 400);
    assert_eq!(status(b"GET / HTTP/1.0\r\n\r\n"), 200);
}

#[test]
fn one_empty_line_before_a_request_is_ignored() {
    let good = "GET / HTTP/1.1\r\nHost: x\r\n\r\n";
    for (before, wanted) in
        [("\r\n", 200), ("\r\n\r\n", 400), ("\n", 400), ("\r", 400), ("\r\n\n", 400)]
    {
        assert_eq!(status(format!("{before}{good}").as_bytes()), wanted, "{before:?}");
    }
}

#[test]
fn there_is_one_valid_host() {
    for (version, lines, wanted) in [
        ("1.1", "", 400),
        ("1.0", "", 200),
        ("1.1", "Host: a\r\nHost: a\r\n", 400),
        ("1.0", "Host: a\r\nhost: b\r\n", 400),
        ("1.1", "Host:\r\n", 400),
        ("1.1", "Host: a.b-c_d:8083\r\n", 200),
        ("1.1", "Host: [::1]:80\r\n", 200),
        ("1.1", "Host: [::1]\r\n", 200),
        ("1.1", "Host: [::1\r\n", 400),
        ("1.1", "Host: ::1\r\n", 400),
        ("1.1", "Host: a, b\r\n", 400),
        ("1.1", "Host: a b\r\n", 400),
        ("1.1", "Host: a/b\r\n", 400),
        ("1.1", "Host: u@a\r\n", 400),
        ("1.1", "Host: a:b\r\n", 400),
        ("1.1", "Host: a:123456\r\n", 400),
        ("1.1", "Host: \u{e4}\r\n", 400),
    ] {
        let text = format!("GET / HTTP/{version}\r\n{lines}\r\n");
        assert_eq!(status(text.as_bytes()), wanted, "{text:?}");
    }
}

#[test]
fn the_target_decides_the_host_when_it_names_one() {
    let text = b"GET http://right/ HTTP/1.1\r\nHost: wrong\r\n\r\n";
    let mut space = Space::new();
    let head = request(text, 0, &Limits::default(), &mut space).unwrap().unwrap();
    assert_eq!(head.host, Some("right"));
}

#[test]
fn the_connection_field_names_no_more_fields_than_are_worth_looking_for() {
    let of = |names: usize| {
        let names = "a, ".repeat(names / 2) + "close" + &", b".repeat(names - names / 2);
        format!("HTTP/1.1\r\nHost: x\r\nConnection: {names}\r\n\r\n")
    };
    let request_of = |names| status(format!("GET / {}", of(names)).as_bytes());
    assert_eq!((request_of(NAMED_MAX), request_of(NAMED_MAX + 1)), (200, 400));
    let response_of = |names| {
        let text = of(names).replacen("\r\n", " 200 OK\r\n", 1);
        let mut space = Space::new();
        let read = response(text.as_bytes(), 0, &Limits::default(), &mut space);
        read.map_or_else(|fault| fault.status, |head| head.unwrap().status)
    };
    assert_eq!((response_of(NAMED_MAX), response_of(NAMED_MAX + 1)), (200, 502));
}

#[test]
fn the_connection_field_is_a_list_in_any_case() {
    let text =
        b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Close, X-A\r\nConnection: upgrade\r\n\r\n";
    let mut space = Space::new();
    let head = request(text, 0, &Limits::default(), &mut space).unwrap().unwrap();
    let wanted = Connection { close: true, keep_alive: false, upgrade: true, names_fields: true };
    assert_eq!(head.connection, wanted);
}

#[test]
fn only_one_expectation_is_known() {
    for (version, value, wanted) in [
        ("1.1", "100-continue", Ok(true)),
        ("1.1", "100-Continue", Ok(true)),
        ("1.0", "100-continue", Ok(false)),
        ("1.0", "else", Ok(false)),
        ("1.1", "100-continue, else", Err(417)),
        ("1.1", "100-continue\r\nExpect: else", Err(417)),
        ("1.1", "", Err(417)),
    ] {
        let text = format!("GET / HTTP/{version}\r\nHost: x\r\nExpect: {value}\r\n\r\n");
        let mut space = Space::new();
        let got = request(text.as_bytes(), 0, &Limits::default(), &mut space)
            .map(|head| head.unwrap().expects_continue)
            .map_err(|fault| fault.status);
        assert_eq!(got, wanted, "{version} {value}");
    }
}

/// A head whose only adjustable parts are its lengths.
fn sized(target: usize, field: usize, fields: usize) -> Vec<u8> {
    let target = "t".repeat(target - "GET / HTTP/1.1".len());
    let mut text = format!("GET /{target} HTTP/1.1\r\nHost: x\r\n");
    for _ in 1..fields {
        text += &format!("A:{}\r\n", "v".repeat(field - 2));
    }
    (text + "\r\n").into_bytes()
}

#[test]
fn each_limit_holds_exactly_where_it_is_set() {
    let limits = Limits { line_bytes: 64, field_bytes: 32, head_bytes: 200, fields: 5 };
    let whole = |text: &[u8]| {
        let mut space = Space::new();
        request(text, 0, &limits, &mut space).map(|_| 200).unwrap_or_else(|fault| fault.status)
    };
    for (text, wanted) in [
        (sized(64, 10, 2), 200),
        (sized(65, 10, 2), 414),
        (sized(20, 32, 2), 200),
        (sized(20, 33, 2), 431),
        (sized(20, 20, 5), 200),
        (sized(20, 10, 6), 431),
        (sized(62, 30, 5), 431),
    ] {
        assert_eq!(whole(&text), wanted, "{} bytes", text.len());
        // A prefix is refused only for the limit that the whole head exceeds.
        let early = (0..text.len()).find(|end| whole(&text[..*end]) != 200);
        if wanted == 200 {
            assert_eq!(early, None);
        } else if let Some(end) = early {
            assert_eq!(whole(&text[..end]), wanted);
        }
    }
    let first_field =
        |bytes: usize| format!("GET / HTTP/1.1\r\nA:{}\r\nHost: x\r\n\r\n", "v".repeat(bytes - 2));
    assert_eq!(whole(first_field(32).as_bytes()), 200);
    assert_eq!(whole(first_field(33).as_bytes()), 431);
    assert_eq!(whole(&[b'A'; 66]), 501);
    assert_eq!(whole(&[b"GET /".as_slice(), &[b'a'; 61]].concat()), 414);
    let endless = [b"GET / HTTP/1.1\r\nHost: x\r\nA:".as_slice(), &[b'v'; 40]].concat();
    let longest = endless.len() - 40 + 30;
    assert_eq!(whole(&[&endless[..longest], b"\r"].concat()), 200);
    assert_eq!(whole(&endless[..longest + 2]), 431);
}

#[test]
fn more_fields_than_there_is_room_for_are_refused() {
    assert_eq!(status(&sized(20, 10, FIELDS_MAX)), 200);
    assert_eq!(status(&sized(20, 10, FIELDS_MAX + 1)), 431);
}

#[test]
fn another_protocol_is_told_apart_by_its_first_bytes() {
    assert_eq!(status(b"\x16\x03\x01\x02\x00\x01"), 400);
    assert_eq!(status(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), 505);
    assert_eq!(status(b"{\"cmd\": \"hello\"}"), 400);
}

#[test]
fn a_head_read_in_pieces_is_the_same_head() {
    let text = b"GET /a HTTP/1.1\r\nHost: x\r\nCookie: a=b\r\n\r\n";
    let whole = read(text);
    for step in 1..text.len() {
        let mut seen = 0;
        let last = (0..=text.len()).step_by(step).chain([text.len()]).find_map(|end| {
            let mut space = Space::new();
            let got = request(&text[..end], seen, &Limits::default(), &mut space).unwrap();
            seen = end;
            got.map(|head| (format!("{} {:?}", head.method, head.target), 2, head.length))
        });
        assert_eq!(Ok(last), whole, "{step}");
    }
}

fn read_response(text: &[u8]) -> Result<Option<(u16, String, usize)>, u16> {
    let mut space = Space::new();
    match response(text, 0, &Limits::default(), &mut space) {
        Ok(None) => Ok(None),
        Ok(Some(head)) => Ok(Some((head.status, head.reason.into(), head.length))),
        Err(fault) => Err(fault.status),
    }
}

#[test]
fn a_status_line_has_one_shape() {
    for (line, wanted) in [
        ("HTTP/1.1 200 OK", Ok((200, "OK"))),
        ("HTTP/1.0 404 Not Found", Ok((404, "Not Found"))),
        ("HTTP/1.1 200 ", Ok((200, ""))),
        ("HTTP/1.1 200", Ok((200, ""))),
        ("HTTP/1.1 999 x", Ok((999, "x"))),
        ("HTTP/1.1 099 x", Err(502)),
        ("HTTP/1.1 20 x", Err(502)),
        ("HTTP/1.1 2000 x", Err(502)),
        ("HTTP/1.1  200 OK", Err(502)),
        ("HTTP/2.0 200 OK", Err(502)),
        ("ICY 200 OK", Err(502)),
        ("\r\nHTTP/1.1 200 OK", Err(502)),
        ("HTTP/1.1 200 O\0K", Err(502)),
        ("HTTP/1.1 200 O\rK", Err(502)),
    ] {
        let text = format!("{line}\r\nA: b\r\n\r\n");
        let got = read_response(text.as_bytes()).map(|head| head.unwrap());
        let got = got.as_ref().map(|head| (head.0, head.1.as_str())).map_err(|status| *status);
        assert_eq!(got, wanted, "{line}");
    }
}

#[test]
fn a_backend_may_leave_space_before_a_colon_but_not_fold_a_line() {
    let mut space = Space::new();
    let text = b"HTTP/1.1 200 OK\r\nDate : now\r\n\r\n";
    let head = response(text, 0, &Limits::default(), &mut space).unwrap().unwrap();
    assert_eq!(head.fields.values(Name::Date).collect::<Vec<_>>(), [b"now"]);
    assert_eq!(read_response(b"HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\r\n"), Err(502));
    assert_eq!(read_response(b"HTTP/1.1 200 OK\nA: b\r\n\r\n"), Err(502));
    assert_eq!(read_response(b"HTTP/1.1 200 OK\r\nA: b\n\r\n"), Err(502));
}

#[test]
fn a_response_head_that_never_ends_is_refused() {
    let mut text = b"HTTP/1.1 200 OK\r\n".to_vec();
    while text.len() < 40_000 {
        text.extend_from_slice(format!("A: {}\r\n", "v".repeat(500)).as_bytes());
    }
    assert_eq!(read_response(&text[..20_000]), Ok(None));
    assert_eq!(read_response(&text), Err(502));
    assert_eq!(read_response(&[b'H'; 10_000]), Err(502));
}

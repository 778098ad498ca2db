//! A backend that hangs behind its registration: accepts connections, answers hellos, and leaves the requests of
//! its users unanswered.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::harness::{Balancer, asked};
use crate::wait::wait_for;

/// An HTTP server that answers nothing, whoever asks, until it is told to.
struct Hanging {
    port: u16,
    answers: Arc<AtomicBool>,
}

impl Hanging {
    fn start() -> Hanging {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let answers = Arc::new(AtomicBool::new(false));
        let shown = Arc::clone(&answers);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let answers = Arc::clone(&shown);
                std::thread::spawn(move || serve(stream, &answers));
            }
        });
        Hanging { port, answers }
    }
}

fn serve(mut stream: TcpStream, answers: &AtomicBool) {
    let mut bytes = [0; 4096];
    while stream.read(&mut bytes).is_ok_and(|count| count > 0) {
        let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nalive";
        if answers.load(Ordering::Relaxed) && stream.write_all(answer).is_err() {
            return;
        }
    }
}

/// What the status says of the backend at this port.
fn shown(balancer: &Balancer, port: u16) -> serde_json::Value {
    let address = SocketAddr::from(([127, 0, 0, 1], port)).to_string();
    let status = balancer.status();
    let all = status["backends"].as_array().unwrap();
    all.iter().find(|it| it["address"] == *address).expect("it is registered").clone()
}

#[test]
fn a_backend_that_hangs_loses_its_users_to_the_others_until_it_answers_again() {
    let balancer = Balancer::start_on_loopback("api = { answer_ms = 200 }\n", |_| {});
    let door = balancer.door("api");
    let hanging = Hanging::start();
    let mut control = TcpStream::connect(balancer.door("control")).unwrap();
    let join = format!("{{\"cmd\":\"register\",\"protocol\":\"api\",\"port\":{}}}\n", hanging.port);
    control.write_all(join.as_bytes()).unwrap();
    assert!(control.read(&mut [0; 1024]).unwrap() > 0);
    let ask = || asked(door, b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    let late = "HTTP/1.1 504";
    let mut waited = 0;
    wait_for("the hanging backend to be set aside", || {
        waited += usize::from(ask().starts_with(late));
        (shown(&balancer, hanging.port)["state"] == "aside").then_some(())
    });
    assert_eq!(waited, 3, "as many as `fall` says");
    let then = shown(&balancer, hanging.port);
    assert_eq!((&then["unanswered"], &then["unanswered_in_row"]), (&3.into(), &3.into()));
    assert_eq!(then["aside_because"], "3 requests in a row were not answered in time");
    assert_eq!(then["connects_failed"], 0);
    balancer.wait_for_log("backend set aside: it does not answer requests");
    // However often it is tried, accepting a connection does not bring it back.
    for _ in 0..20 {
        assert!(ask().starts_with("HTTP/1.1 200"));
    }
    assert_eq!(shown(&balancer, hanging.port)["state"], "aside");
    hanging.answers.store(true, Ordering::Relaxed);
    wait_for("it to be back", || {
        (shown(&balancer, hanging.port)["state"] == "serving").then_some(())
    });
    balancer.wait_for_log("backend is back: it answers");
    wait_for("its answer to a user", || ask().ends_with("alive").then_some(()));
    assert_eq!(shown(&balancer, hanging.port)["unanswered_in_row"], 0);
}

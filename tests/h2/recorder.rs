//! A backend that reads strictly what the balancer sends it, keeps it, and answers `ok`, or a megabyte where `/big` is
//! asked for.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use crate::reading::{Said, request, stray_field};

pub const BIG: usize = 1 << 20;

/// What has come.
#[derive(Default)]
struct Heard {
    /// Whole requests, each with its bytes.
    served: Vec<(Said, Vec<u8>)>,
    faults: Vec<String>,
}

#[derive(Clone)]
pub struct Recorder {
    pub port: u16,
    heard: Arc<Mutex<Heard>>,
    /// Requests so far, and those that are being answered.
    count: Arc<AtomicUsize>,
}

impl Recorder {
    pub fn start() -> Recorder {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let recorder = Recorder { port, heard: Arc::default(), count: Arc::default() };
        let own = recorder.clone();
        thread::spawn(move || {
            for connection in listener.incoming() {
                let (own, connection) = (own.clone(), connection.unwrap());
                thread::spawn(move || own.serve(connection));
            }
        });
        recorder
    }

    /// Requests that have come so far.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::SeqCst)
    }

    /// What has come since the last look, and what was wrong with it.
    pub fn take(&self) -> (Vec<(Said, Vec<u8>)>, Vec<String>) {
        let heard = std::mem::take(&mut *self.heard.lock().unwrap());
        (heard.served, heard.faults)
    }

    fn serve(&self, mut connection: TcpStream) {
        let (mut ahead, mut block) = (Vec::new(), [0; 16 * 1024]);
        while let Ok(count @ 1..) = connection.read(&mut block) {
            ahead.extend_from_slice(&block[..count]);
            loop {
                match request(&ahead) {
                    Ok(None) => break,
                    Ok(Some((said, length, _))) => {
                        let bytes: Vec<u8> = ahead.drain(..length).collect();
                        if !self.answer(said, bytes, &mut connection) {
                            return;
                        }
                    }
                    Err(why) => {
                        let fault = format!("{why}: {}", ahead.escape_ascii());
                        return self.heard.lock().unwrap().faults.push(fault);
                    }
                }
            }
        }
    }

    /// Whether more may come.
    fn answer(&self, said: Said, bytes: Vec<u8>, connection: &mut TcpStream) -> bool {
        self.count.fetch_add(1, Ordering::SeqCst);
        let body = match said.target.as_str() {
            "/big" => vec![b'x'; BIG],
            _ => b"ok".to_vec(),
        };
        {
            let mut heard = self.heard.lock().unwrap();
            heard.faults.extend(stray_field(&bytes));
            heard.served.push((said, bytes));
        }
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
        connection.write_all(&[head.as_bytes(), &body].concat()).is_ok()
    }
}

//! Users of an echo over TCP who check every byte.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::random::{Random, pattern};

/// Reads a stream to its end; each byte must be the one that was sent. Returns how many there were.
pub fn check(mut from: TcpStream, text: &[u8], moved: &AtomicU64) -> u64 {
    let (mut bytes, mut place) = (vec![0; 64 * 1024], 0);
    loop {
        let count = from.read(&mut bytes).expect("nobody is reset");
        if count == 0 {
            return place as u64;
        }
        let at = place % text.len();
        let fits = count.min(text.len() - at);
        assert!(bytes[..fits] == text[at..at + fits], "a wrong byte after {place}");
        assert!(bytes[fits..count] == text[..count - fits], "a wrong byte after {place}");
        place += count;
        moved.fetch_add(count as u64, Ordering::Relaxed);
    }
}

/// Says something until it is told to stop, and checks what comes back.
pub fn busy(
    user: TcpStream,
    number: usize,
    stop: &Arc<AtomicBool>,
    moved: &Arc<AtomicU64>,
) -> JoinHandle<()> {
    let text = Arc::new(pattern(number as u64, 256 * 1024));
    let reader = {
        let (from, text, moved) = (user.try_clone().unwrap(), Arc::clone(&text), Arc::clone(moved));
        thread::spawn(move || check(from, &text, &moved))
    };
    let stop = Arc::clone(stop);
    thread::spawn(move || {
        let (mut to, mut place, mut random) = (user, 0, Random::new(number as u64));
        while !stop.load(Ordering::Relaxed) {
            let most = if number.is_multiple_of(3) { 128 * 1024 } else { 3000 };
            let len = random.any_size(most) as usize;
            let at = place % text.len();
            let piece = &text[at..text.len().min(at + len)];
            to.write_all(piece).expect("nobody is reset");
            place += piece.len();
            if !number.is_multiple_of(3) {
                thread::sleep(Duration::from_micros(random.below(2000)));
            }
        }
        to.shutdown(Shutdown::Write).unwrap();
        assert_eq!(reader.join().unwrap(), place as u64);
    })
}

/// Says something, and hears it again.
pub fn ask(user: &mut TcpStream) {
    user.write_all(b"?").unwrap();
    let mut answer = [0];
    user.read_exact(&mut answer).unwrap();
    assert_eq!(answer, *b"?");
}

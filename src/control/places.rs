//! The places at the admin door: who holds a connection, and which connection makes room for the next.
//! Owns the bounds, in total and per source, and the measure of disuse. Every newcomer is let in, and the
//! connection on which nothing has moved for longest is closed, so silent strangers keep nobody out.

use std::cell::Cell;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::base::quota::network;
use crate::base::time::Now;

/// Most connections at once.
pub const PLACES_MAX: usize = 64;
/// Most of them from one source: an IPv4 address, an IPv6 /64, or a user of the unix socket.
pub const SOURCE_MAX: usize = 32;

/// A place, and what ends the connection that holds it.
struct Held<T> {
    id: u64,
    source: u64,
    moved: Rc<Cell<Now>>,
    end: T,
}

/// The places taken.
pub struct Places<T> {
    taken: Vec<Held<T>>,
    next: u64,
}

impl<T> Default for Places<T> {
    fn default() -> Places<T> {
        Places { taken: Vec::with_capacity(PLACES_MAX), next: 0 }
    }
}

impl<T> Places<T> {
    /// An ID for the next place.
    pub fn name(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Makes room for another connection from `source`, if there is none, and returns the connection that
    /// has to go: one of the source's own if it holds as many as it may, otherwise one of the source that
    /// holds the most.
    pub fn make_room(&mut self, source: IpAddr) -> Option<T> {
        let source = network(source);
        let of = |source: u64| self.taken.iter().filter(|it| it.source == source).count();
        let crowded = of(source) >= SOURCE_MAX;
        if !crowded && self.taken.len() < PLACES_MAX {
            return None;
        }
        let rank = |place: &Held<T>| {
            let holds =
                if crowded { usize::from(place.source == source) } else { of(place.source) };
            (std::cmp::Reverse(holds), place.moved.get())
        };
        let (gone, _) = self.taken.iter().enumerate().min_by_key(|(_, place)| rank(place))?;
        Some(self.taken.swap_remove(gone).end)
    }

    /// A connection from `source` takes a place; [`Places::make_room`] has seen to it that there is one.
    pub fn enter(&mut self, id: u64, source: IpAddr, moved: Rc<Cell<Now>>, end: T) {
        debug_assert!(self.taken.len() < PLACES_MAX, "room was made");
        self.taken.push(Held { id, source: network(source), moved, end });
    }

    /// A connection has ended.
    pub fn leave(&mut self, id: u64) {
        self.taken.retain(|place| place.id != id);
    }
}

/// A connection that notes when bytes last moved.
pub struct Watched<S> {
    pub stream: S,
    pub moved: Rc<Cell<Now>>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let outcome = ready!(Pin::new(&mut self.stream).poll_read(cx, into));
        self.moved.set(Now::read());
        Poll::Ready(outcome)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let outcome = ready!(Pin::new(&mut self.stream).poll_write(cx, bytes));
        self.moved.set(Now::read());
        Poll::Ready(outcome)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Scene {
        places: Places<usize>,
        moved: Vec<Rc<Cell<Now>>>,
    }

    impl Scene {
        fn new() -> Scene {
            Scene { places: Places::default(), moved: Vec::new() }
        }

        /// A connection arrives, numbered in order of arrival; returns the one that has to go.
        fn comes(&mut self, source: &str, at: u64) -> Option<usize> {
            let source = source.parse().unwrap();
            let gone = self.places.make_room(source);
            let moved = Rc::new(Cell::new(Now::from_nanos(at)));
            self.moved.push(Rc::clone(&moved));
            let id = self.places.name();
            self.places.enter(id, source, moved, self.moved.len() - 1);
            gone
        }

        fn moves(&self, number: usize, at: u64) {
            self.moved[number].set(Now::from_nanos(at));
        }
    }

    #[test]
    fn a_source_at_its_limit_loses_the_connection_silent_for_longest() {
        let mut scene = Scene::new();
        for at in 0..SOURCE_MAX as u64 {
            assert_eq!(scene.comes("192.0.2.1", at), None);
        }
        assert_eq!(scene.comes("192.0.2.2", 90), None, "another source has room");
        scene.moves(0, 100);
        assert_eq!(scene.comes("192.0.2.1", 101), Some(1), "the first is in use");
        assert_eq!(scene.comes("192.0.2.1", 102), Some(2));
        assert_eq!(scene.places.taken.len(), SOURCE_MAX + 1);
    }

    #[test]
    fn when_full_the_source_with_the_most_makes_room() {
        let mut scene = Scene::new();
        assert_eq!(scene.comes("192.0.2.9", 0), None, "an operator, silent since the beginning");
        for number in 0..SOURCE_MAX as u64 {
            assert_eq!(scene.comes("192.0.2.1", 100 + number), None);
        }
        for number in 1..SOURCE_MAX as u64 {
            assert_eq!(scene.comes("192.0.2.2", 10 + number), None);
        }
        assert_eq!(
            scene.comes("192.0.2.3", 200),
            Some(1),
            "the oldest of the source with the most"
        );
        let gone = scene.comes("192.0.2.4", 201);
        assert_eq!(gone, Some(SOURCE_MAX + 1), "now both have as many: the most silent one");
        assert_eq!(scene.places.taken.len(), PLACES_MAX);
    }

    #[test]
    fn strangers_with_many_addresses_keep_nobody_out() {
        let mut scene = Scene::new();
        for number in 0..1000u64 {
            let gone = scene.comes(&format!("10.0.{}.{}", number / 250, number % 250), number);
            let expected = (number as usize).checked_sub(PLACES_MAX);
            assert_eq!(gone, expected, "in the order in which they came");
        }
    }

    #[test]
    fn a_connection_that_has_ended_leaves_room() {
        let mut scene = Scene::new();
        for at in 0..PLACES_MAX as u64 {
            scene.comes(&format!("10.0.0.{at}"), at);
        }
        scene.places.leave(7);
        assert_eq!(scene.comes("10.0.1.1", 200), None);
        assert_eq!(scene.comes("10.0.1.2", 201), Some(0));
    }
}

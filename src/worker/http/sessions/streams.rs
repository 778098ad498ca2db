//! Users who speak HTTP/2: each of their streams is a user of its own, with a gateway, a backend and deadlines, but
//! without a socket. Owns what passes between the gateway of a connection and those of its streams, and in which order:
//! a gateway is never called while another one is.

use super::{Cx, Sessions, User};
use crate::proxy::http2::{Excess, News};
use crate::proxy::{Event, Received, StreamCmd};
use crate::session::EndReason;
use crate::worker::slots::Key;

/// Something on its way from one gateway to another.
pub(super) enum Crossing {
    /// From the connection of a user to one of its streams.
    Up {
        of: Key,
        number: u32,
        news: News,
    },
    /// From one of its streams.
    Down {
        of: Key,
        number: u32,
        what: StreamCmd,
    },
    /// The gateway of a stream has let go of it, after all that it said.
    Left {
        of: Key,
        number: u32,
        is_reset: bool,
        up: u64,
    },
    /// From a gateway to the shared connection over which its request goes, and back.
    ToTrunk {
        of: Key,
        number: u32,
        what: StreamCmd,
    },
    LeftTrunk {
        of: Key,
        number: u32,
    },
    FromTrunk {
        of: Key,
        number: u32,
        news: News,
    },
}

/// What is on its way, and who has to be called when it has arrived.
#[derive(Default)]
pub(super) struct Crossings {
    waiting: std::collections::VecDeque<Crossing>,
    /// Connections that have taken commands of their streams.
    called: Vec<Key>,
    /// The same of shared connections to backends.
    trunks: Vec<Key>,
    is_under_way: bool,
}

impl Crossings {
    pub fn pass_to_trunk(&mut self, of: Key, number: u32, what: StreamCmd) {
        self.waiting.push_back(Crossing::ToTrunk { of, number, what });
    }

    pub fn leave_trunk(&mut self, of: Key, number: u32) {
        self.waiting.push_back(Crossing::LeftTrunk { of, number });
    }

    pub fn pass_from_trunk(&mut self, of: Key, number: u32, news: News) {
        self.waiting.push_back(Crossing::FromTrunk { of, number, news });
    }

    /// A shared connection is to be called.
    pub fn call_trunk(&mut self, of: Key) {
        if !self.trunks.contains(&of) {
            self.trunks.push(of);
        }
    }
}

/// The stream of a connection that a user is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct StreamOf {
    pub connection: Key,
    pub number: u32,
}

impl Sessions {
    /// A user has agreed with us on HTTP/2 when it set up TLS.
    pub fn speak_http2(&mut self, key: Key, cx: &mut Cx<'_>) {
        self.act(key, cx, |gateway, context| {
            gateway.speak_http2(context);
            gateway.thaw(context);
        });
    }

    /// The gateway of a connection has news of its streams.
    pub(super) fn hear(&mut self, of: Key) {
        let Some(user) = self.users.get(of) else { return };
        while let Some((number, news)) = user.gateway.next_news() {
            self.crossings.waiting.push_back(Crossing::Up { of, number, news });
        }
    }

    /// The gateway of a stream wants something done on its user's line.
    pub(super) fn pass_down(&mut self, stream: StreamOf, what: StreamCmd) {
        let StreamOf { connection: of, number } = stream;
        self.crossings.waiting.push_back(Crossing::Down { of, number, what });
    }

    /// Counts what a user has done too much of.
    pub(super) fn calmed(excess: Excess, cx: &Cx<'_>) {
        let counters = &cx.books.metrics().counters;
        match excess {
            Excess::IdleFrames => counters.api_h2_calmed_frames.one(),
            Excess::Resets => counters.api_h2_calmed_resets.one(),
        }
    }

    /// Has everything arrive that is on its way, and what follows from that.
    pub(super) fn cross(&mut self, cx: &mut Cx<'_>) {
        if self.crossings.is_under_way {
            return;
        }
        self.crossings.is_under_way = true;
        loop {
            while let Some(crossing) = self.crossings.waiting.pop_front() {
                match crossing {
                    Crossing::Up { of, number, news } => self.tell_stream(of, number, news, cx),
                    Crossing::Down { of, number, what } => {
                        self.tell_connection(of, number, what, cx);
                    }
                    Crossing::Left { of, number, is_reset, up } => {
                        let Some(user) = self.users.get(of) else { continue };
                        user.gateway.forget_stream(number, is_reset, up, cx.now);
                        if user.gateway.has_stream_work() || user.gateway.moved() != user.moved {
                            self.call_later(of);
                        }
                        self.schedule(of);
                    }
                    Crossing::ToTrunk { of, number, what } => self.tell_trunk(of, number, what, cx),
                    Crossing::LeftTrunk { of, number } => self.let_go_of_trunk(of, number, cx),
                    Crossing::FromTrunk { of, number, news } => {
                        self.tell_link(of, number, news, cx)
                    }
                }
            }
            // Several commands, one call.
            if let Some(of) = self.crossings.trunks.pop() {
                self.call_trunk(of, cx);
            } else if let Some(of) = self.crossings.called.pop() {
                if self.users.has(of) {
                    self.act(of, cx, |gateway, context| gateway.thaw(context));
                }
            } else {
                break;
            }
        }
        self.crossings.is_under_way = false;
    }

    fn tell_connection(&mut self, of: Key, number: u32, what: StreamCmd, cx: &mut Cx<'_>) {
        let Some(user) = self.users.get(of) else { return };
        user.gateway.command_stream(number, what, cx.pool);
        let has_work = user.gateway.has_stream_work();
        self.hear(of);
        if has_work {
            self.call_later(of);
        }
    }

    fn call_later(&mut self, of: Key) {
        if !self.crossings.called.contains(&of) {
            self.crossings.called.push(of);
        }
    }

    fn tell_stream(&mut self, of: Key, number: u32, news: News, cx: &mut Cx<'_>) {
        let streams = self.users.get(of).map(|user| &user.streams);
        let known = streams.and_then(|streams| *streams.get(number as usize)?);
        match (news, known) {
            (News::Opened(count), _) => self.open_stream(of, number, count, cx),
            (News::Happened(event), Some(key)) => {
                let starved = matches!(event, Event::Received { what: Received::NoBuffers, .. });
                self.act(key, cx, |gateway, context| gateway.handle(event, context));
                if starved {
                    cx.books.metrics().counters.buffers_exhausted.one();
                    self.starve(cx.now, super::Conn::User(key));
                }
            }
            (News::Happened(Event::Received { what: Received::Data(buf), .. }), None) => {
                debug_assert!(false, "a stream is forgotten when nothing is under way");
                cx.pool.give_back(buf);
            }
            (News::Gone, Some(key)) => self.act(key, cx, |gateway, context| {
                gateway.end(EndReason::ClientReset, true, context)
            }),
            (News::Happened(_) | News::Gone, None) => {}
        }
    }

    fn open_stream(&mut self, of: Key, number: u32, count: u32, cx: &mut Cx<'_>) {
        let Some(connection) = self.users.get(of) else { return };
        cx.books.metrics().counters.api_h2_streams.one();
        let gateway = connection.gateway.of_stream(count, cx.now);
        let entry = connection.entry.as_ref().map(|entry| cx.books.lend(entry));
        // The first to be served begins the session.
        let started = std::mem::replace(&mut connection.started, true);
        let destination = connection.destination;
        let service = gateway.door.service;
        let stream_of = Some(StreamOf { connection: of, number });
        let user = User { destination, started, stream_of, ..User::new(gateway, service, entry) };
        let key = self.users.put(user);
        self.make_room();
        if let Some(connection) = self.users.get(of) {
            let places = connection.streams.len().max(number as usize + 1);
            connection.streams.resize(places, None);
            connection.streams[number as usize] = Some(key);
        }
        self.act(key, cx, |gateway, context| gateway.start(context));
    }

    /// The gateway of a stream is over, and nothing is under way.
    pub(super) fn close_stream(&mut self, key: Key, is_reset: bool, cx: &mut Cx<'_>) {
        let Some(user) = self.users.remove(key) else { return };
        self.deadlines.cancel(key.place);
        self.held -= user.held;
        user.entry.into_iter().for_each(|entry| cx.books.take_back(entry));
        let Some(StreamOf { connection: of, number }) = user.stream_of else { return };
        if let Some(connection) = self.users.get(of) {
            connection.streams[number as usize] = None;
            let [up, _] = user.moved;
            self.crossings.waiting.push_back(Crossing::Left { of, number, is_reset, up });
        }
    }

    /// Whether something is on its way.
    pub(super) fn has_crossings(&self) -> bool {
        let Crossings { waiting, called, trunks, .. } = &self.crossings;
        !(waiting.is_empty() && called.is_empty() && trunks.is_empty())
    }
}

//! The streams of one connection, whichever end of it we are at. Owns their numbers, what has happened to them, and the
//! order in which they and the connection under them are called.

use std::collections::VecDeque;
use std::sync::Arc;

use super::OWED_MAX;
use super::pipe::Mouth;
use super::stream::Stream;
use crate::base::bells::{Bell, Flag, Rung};
use crate::proxy::{Event, StreamCmd};
use crate::ring::pool::Pool;

/// How often the connection and its streams are called in turn; each round moves something.
const ROUNDS_MAX: usize = 1000;

/// What has happened to a stream.
#[derive(Debug)]
pub enum News {
    /// There is a new one, which came as the so manieth.
    Opened(u32),
    Happened(Event),
    /// The peer has ended it, or the connection has.
    Gone,
}

/// A place of a stream, and by what the streams that come to be there are woken.
struct Place {
    bell: Arc<Bell>,
    stream: Option<Stream>,
}

#[derive(Default)]
pub struct Streams {
    places: Vec<Place>,
    free: Vec<u32>,
    rung: Arc<Rung>,
    /// Those that are being called; kept for its memory.
    called: Vec<u32>,
    /// Those that wait until `h2` has got rid of what it holds.
    held_back: Vec<u32>,
    /// Content in the hands of `h2`.
    owed: usize,
    /// Content given to it since it was last asked.
    given: usize,
    news: VecDeque<(u32, News)>,
}

impl Streams {
    /// Streams that have a gateway.
    pub fn live(&self) -> usize {
        self.places.len() - self.free.len()
    }

    /// Takes in a stream; its number, until it is forgotten.
    pub fn add(&mut self, stream: impl FnOnce(Arc<Bell>) -> Stream) -> u32 {
        let number = self.free.pop().unwrap_or_else(|| {
            let number = self.places.len() as u32;
            self.places.push(Place { bell: Bell::new(number, &self.rung), stream: None });
            number
        });
        let place = &mut self.places[number as usize];
        // It is called once in any case, and from then on is told what becomes of it.
        place.bell.stay_woken();
        place.bell.ring();
        place.stream = Some(stream(Arc::clone(&place.bell)));
        number
    }

    pub fn tell(&mut self, number: u32, news: News) {
        self.news.push_back((number, news));
    }

    /// The next thing that has happened to a stream.
    pub fn next_news(&mut self) -> Option<(u32, News)> {
        self.news.pop_front()
    }

    pub fn has_news(&self) -> bool {
        !self.news.is_empty()
    }

    /// Content given to `h2` since the last call.
    pub fn take_given(&mut self) -> usize {
        std::mem::take(&mut self.given)
    }

    /// Takes a command of a stream's gateway; what follows from it comes at once, or with the next [`turn`].
    pub fn command(&mut self, number: u32, what: StreamCmd, pool: &mut Pool) {
        let Streams { places, news, .. } = self;
        let Some(stream) = stream_at(places, number) else {
            return debug_assert!(false, "a stream without a gateway takes no commands");
        };
        stream.command(what, pool);
        news.extend(stream.happened.drain(..).map(|event| (number, News::Happened(event))));
    }

    /// Whether a stream is to be called.
    pub fn is_waiting(&self) -> bool {
        !self.rung.is_empty()
    }

    /// The gateway of a stream has let go of it, with nothing under way. Whether it had sent all that it was to send.
    pub fn forget(&mut self, number: u32, is_reset: bool) -> bool {
        let place = self.places.get_mut(number as usize);
        let Some(mut stream) = place.and_then(|place| place.stream.take()) else { return false };
        let is_whole = stream.is_whole();
        stream.close(is_reset);
        self.free.push(number);
        is_whole
    }

    /// Has each be called.
    pub fn ring_all(&self) {
        self.places.iter().filter(|it| it.stream.is_some()).for_each(|it| it.bell.ring());
    }

    fn advance(&mut self, number: u32, is_over: bool, pool: &mut Pool) {
        let Streams { places, news, owed, .. } = self;
        let Some(stream) = stream_at(places, number) else {
            // What its predecessor was woken for.
            return places[number as usize].bell.answer();
        };
        let given = stream.advance(*owed, is_over, pool);
        news.extend(stream.happened.drain(..).map(|event| (number, News::Happened(event))));
        let (waits, is_gone) = (stream.waits_for_us(*owed + given), stream.has_just_gone());
        if is_gone {
            self.news.push_back((number, News::Gone));
        }
        if waits {
            self.held_back.push(number);
        }
        self.owed += given;
        self.given += given;
    }
}

fn stream_at(places: &mut [Place], number: u32) -> Option<&mut Stream> {
    places.get_mut(number as usize)?.stream.as_mut()
}

/// Where the bytes of a connection are written, and how many.
pub struct Outlet {
    pub memory: Vec<u8>,
    pub most: usize,
}

/// Calls a connection, by `poll`, and its streams until neither has anything left to do without waiting; returns what
/// is to be sent. `poll` says whether the connection is over.
pub fn turn(
    streams: &mut Streams,
    (mouth, flag): (&Mouth, &Flag),
    outlet: Outlet,
    pool: &mut Pool,
    mut poll: impl FnMut(&mut Streams) -> bool,
) -> Vec<u8> {
    mouth.lend(outlet.memory, outlet.most);
    let mut called = std::mem::take(&mut streams.called);
    called.append(&mut streams.held_back);
    let mut is_over = poll(streams);
    for _ in 0..ROUNDS_MAX {
        let is_woken = flag.take();
        if is_woken {
            is_over = poll(streams);
        }
        streams.rung.take(&mut called);
        if called.is_empty() && !is_woken {
            break;
        }
        for number in called.drain(..) {
            streams.advance(number, is_over, pool);
        }
    }
    streams.called = called;
    let written = mouth.take();
    // Frames have heads, so this is soon too little and never too much for long.
    streams.owed = streams.owed.saturating_sub(written.len()).min(OWED_MAX * streams.live());
    written
}

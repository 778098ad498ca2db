//! What the workers have in common: the hour, the weather, and whose turn it is. Owns the interleaving: a
//! worker may turn between any two lines that the control core logs, as it may beside a thread.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::rc::Rc;

use lb::base::time::Now;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

use crate::random::Random;
use crate::worker::{Pick, Played, Weather};

pub struct Sky {
    pub now: Cell<Now>,
    pub workers: RefCell<Vec<Played>>,
    random: RefCell<Random>,
    /// Backends whose data port refuses.
    pub refusing: RefCell<BTreeSet<SocketAddr>>,
    /// In the order in which they were made.
    pub picks: RefCell<Vec<Pick>>,
}

thread_local! {
    static SKY: RefCell<Option<Rc<Sky>>> = const { RefCell::new(None) };
}

impl Sky {
    pub fn new(workers: Vec<Played>, now: Now, seed: u64) -> Rc<Sky> {
        let sky = Rc::new(Sky {
            now: Cell::new(now),
            workers: RefCell::new(workers),
            random: RefCell::new(Random::new(seed ^ 0x5ca1_ab1e)),
            refusing: RefCell::default(),
            picks: RefCell::default(),
        });
        SKY.set(Some(Rc::clone(&sky)));
        sky
    }

    /// Plays half a turn of a worker, unless it is stalled or turns already.
    pub fn turn(&self, number: usize) {
        let Ok(mut workers) = self.workers.try_borrow_mut() else { return };
        let now = self.now.get();
        let worker = &mut workers[number];
        if now < worker.stalled_until {
            return;
        }
        let refusing = |address| self.refusing.borrow().contains(&address);
        let random = &mut self.random.borrow_mut();
        worker.turn(&mut Weather { now, random, refusing: &refusing });
        self.picks.borrow_mut().append(&mut worker.picks);
    }

    fn turn_any(&self) {
        let Ok(mut random) = self.random.try_borrow_mut() else { return };
        let Ok(workers) = self.workers.try_borrow() else { return };
        let number = random.half().then(|| random.place(workers.len()));
        drop((random, workers));
        number.inspect(|number| self.turn(*number));
    }
}

/// Hears every line of the log, and lets a worker turn.
pub struct Lines;

impl Subscriber for Lines {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, _: &Event<'_>) {
        let sky = SKY.with_borrow(Option::clone);
        sky.inspect(|sky| sky.turn_any());
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

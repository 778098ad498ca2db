//! What users, backends, routers and strangers send, and what the workers do with it.

use std::cmp::Reverse;
use std::net::SocketAddr;
use std::time::Duration;

use lb::base::time::Now;
use lb::cluster::{BackendId, Protocol, ServiceId};
use lb::proxy::udp::SocketId;
use lb::session::EndReason;
use lb::worker::books::Books;
use lb::worker::link::Order;
use lb::worker::udp::sessions::{DoorRef, Down, Origin, Segments, Sessions, Up};
use nix::errno::Errno;

use crate::model::{Descriptor, Flow, Held};
use crate::plan::{AVOIDED, COPIES, FLOOD, Fault, ICMP_LATE, Pressure, SOCKETS, USERS, WORKERS};
use crate::world::{Arrival, Outcome, Worker, World, host, local, user, violated};

impl World {
    /// A flood of users never seen before, from many sources or from one.
    pub fn flood(&mut self) -> Outcome {
        let one_source = self.pressure != Pressure::None && self.random.one_in(2);
        for _ in 0..20 + self.random.below(100) {
            let [a, b] = [self.random.below(250) as u8, self.random.below(250) as u8];
            let [a, b] = if one_source { [1, 1] } else { [a, b] };
            let from = SocketAddr::from(([FLOOD, a, b, 1], 1 + self.random.below(60_000) as u16));
            self.up((from, local(0)), Segments::one(10))?;
        }
        Ok(())
    }

    pub fn end_something(&mut self) {
        let which = self.random.below(WORKERS as u64) as usize;
        let reason = EndReason::Operator;
        let order = if self.random.one_in(3) {
            let Some(id) = self.any_backend() else { return };
            self.doubt(which, |_, held| held.backend == id);
            Order::EndBackend { backend: BackendId(id), reason }
        } else {
            let sessions: Vec<_> = self.workers[which].shard.iter().collect();
            let chosen = self.random.below(sessions.len().max(1) as u64) as usize;
            let Some(view) = sessions.get(chosen) else { return };
            self.doubt(which, |flow, _| flow.0 == view.client);
            Order::EndSession { id: view.id, reason }
        };
        self.model.noted.retain(|_, (worker, _)| *worker != which);
        let Worker { core, books, .. } = &mut self.workers[which];
        core.order(self.now, order, books);
    }

    /// Marks sessions that an order may have ended.
    fn doubt(&mut self, which: usize, meant: impl Fn(&Flow, &Held) -> bool) {
        for ((worker, flow), held) in &mut self.model.held {
            held.doubtful |= *worker == which && meant(flow, held);
        }
    }

    pub fn talk(&mut self) -> Outcome {
        let users = if self.pressure == Pressure::None { USERS } else { 4 * USERS };
        let flow = (user(self.random.below(users)), local(self.random.below(2)));
        let segments = match self.random.below(20) {
            0 => Segments::one(0),
            1 => Segments::one(65_507),
            2 => Segments { bytes: 5_000, segment_size: 1_200 },
            _ => Segments::one(1 + self.random.below(1_400) as usize),
        };
        self.up(flow, segments)
    }

    /// A stranger forges a reply or an ICMP error.
    pub fn spoof(&mut self) -> Outcome {
        let which = self.random.below(WORKERS as u64) as usize;
        let nth = self.random.below(SOCKETS as u64) as usize;
        let Some((socket, opening)) = self.workers[which]
            .open
            .iter()
            .min_by_key(|(socket, _)| usize::from(socket.number).abs_diff(nth))
        else {
            return Ok(());
        };
        let (socket, descriptor) = (*socket, (which, *opening));
        let mut from = host(1 + self.random.below(8));
        if self.random.one_in(2) {
            self.icmp(descriptor, socket, from);
            return Ok(());
        }
        if self.random.one_in(2) {
            from.set_port(54 + self.random.below(3) as u16);
        }
        self.down(descriptor, socket, from)
    }

    fn up(&mut self, flow: Flow, segments: Segments) -> Outcome {
        let mut which = self.worker_of(flow);
        let told = match self.fault {
            Fault::ForgetsTheLocalAddress => local(0),
            _ => flow.1,
        };
        let door = DoorRef { place: 0, service: ServiceId::built_in(Protocol::Udp) };
        let origin = Origin { client: flow.0, local: told, door };
        let mut ask: fn(&mut Sessions, Now, Origin, Segments, &mut Books) -> Up = Sessions::up;
        loop {
            let Worker { core, books, open, offered, .. } = &mut self.workers[which];
            match ask(core, self.now, origin, segments, books) {
                Up::Open(socket) => {
                    let opens = self.now >= self.sockets_fail_until;
                    core.opened(self.now, socket, opens);
                    if opens && open.insert(socket, self.next_descriptor).is_some() {
                        return violated(format!("{socket:?} was opened twice"));
                    }
                    self.next_descriptor += 1;
                }
                Up::HandOff(worker) => {
                    if usize::from(worker) == which {
                        return violated(format!("{flow:?} was handed off in a circle"));
                    }
                    which = usize::from(worker);
                    if self.running(which, flow).is_some() {
                        self.model.found += 1;
                    }
                    ask = Sessions::handed_off;
                }
                Up::Send { from, to } => {
                    *offered += segments.datagrams();
                    let Some(opening) = open.get(&from).copied() else {
                        return violated(format!("{from:?} is not open"));
                    };
                    return self.sent(which, flow, (which, opening), to, segments.datagrams());
                }
                Up::Drop(why) => {
                    *offered += segments.datagrams();
                    return self.shed(which, flow, why);
                }
            }
        }
    }

    pub fn answer(&mut self, flow: Flow, by: Descriptor, to: SocketAddr, alive: bool) {
        if self.random.one_in(10) {
            return;
        }
        // Mostly at once, sometimes as late as an answer is still expected.
        let late = if self.random.one_in(10) { 4_999 } else { 30 };
        let first = self.random.below(late);
        let arrival = match alive {
            true => Arrival::Reply { descriptor: by, from: to, flow },
            false => Arrival::Icmp { descriptor: by, to },
        };
        for copy in 0..1 + u64::from(self.random.one_in(20)) {
            let ms = first + copy * self.random.below(COPIES);
            let at = self.now.plus(Duration::from_millis(ms));
            self.arrivals += 1;
            let arrival = match &arrival {
                Arrival::Reply { descriptor, from, flow } => {
                    Arrival::Reply { descriptor: *descriptor, from: *from, flow: *flow }
                }
                Arrival::Icmp { descriptor, to } => {
                    Arrival::Icmp { descriptor: *descriptor, to: *to }
                }
            };
            self.network.push(Reverse((at, self.arrivals, arrival)));
        }
    }

    pub fn arrive(&mut self, arrival: Arrival) -> Outcome {
        let (Arrival::Reply { descriptor, .. } | Arrival::Icmp { descriptor, .. }) = arrival;
        let worker = &mut self.workers[descriptor.0];
        let found = worker.open.iter().find(|(_, opening)| **opening == descriptor.1);
        // A socket that has been closed meanwhile receives nothing.
        let Some((socket, _)) = found else { return Ok(()) };
        let socket = *socket;
        match arrival {
            // A reply for a flow that no longer has the pair is dropped here; whether the pair was
            // given away too early is checked when it is taken.
            Arrival::Reply { from, flow, .. } => match self.model.pairs.get(&(descriptor, from)) {
                Some((holder, _)) if *holder != flow => Ok(()),
                _ => self.down(descriptor, socket, from),
            },
            Arrival::Icmp { to, .. } => {
                self.icmp(descriptor, socket, to);
                Ok(())
            }
        }
    }

    /// ICMP reports `to` unreachable, truly or not.
    fn icmp(&mut self, descriptor: Descriptor, socket: SocketId, to: SocketAddr) {
        let worker = &mut self.workers[descriptor.0];
        let sockets = [socket].into_iter();
        worker.core.unreachable(self.now, sockets, to, Errno::ECONNREFUSED, &mut worker.books);
        let holder = self.model.pairs.get(&(descriptor, to)).map(|(flow, _)| *flow);
        let held = holder.and_then(|flow| self.model.held.get_mut(&(descriptor.0, flow)));
        let Some(held) = held else { return };
        let asked = held.asked.filter(|asked| self.now <= asked.plus(ICMP_LATE));
        if asked.is_none() || (held.descriptor, held.address) != (descriptor, to) {
            return;
        }
        (held.asked, held.refused) = (None, true);
        if !worker.suspected.insert(to) {
            let until = worker.avoided_until.entry(to).or_default();
            *until = (*until).max(self.now.plus(AVOIDED));
        }
    }

    fn down(&mut self, descriptor: Descriptor, socket: SocketId, from: SocketAddr) -> Outcome {
        let holder = self.model.pairs.get(&(descriptor, from)).copied();
        let (told_socket, told_from) = match self.fault {
            Fault::TrustsAnySender => {
                let of_pair = self.model.pairs.keys().find(|(by, _)| *by == descriptor);
                (socket, of_pair.map_or(from, |(_, address)| *address))
            }
            Fault::MixesUpSockets if self.random.one_in(20) => {
                (SocketId { number: socket.number ^ 1, ..socket }, from)
            }
            _ => (socket, from),
        };
        let Worker { core, books, .. } = &mut self.workers[descriptor.0];
        match core.down(self.now, told_socket, told_from, Segments::one(100), books) {
            Down::Send { from: local, to, .. } => {
                let Some((flow, _)) = holder else {
                    return violated(format!("{from} answered {to} without being asked"));
                };
                if flow != (to, local) {
                    return violated(format!("a reply to {flow:?} went to {:?}", (to, local)));
                }
                self.model.delivered += 1;
                self.hear(descriptor, from, flow);
                self.workers[descriptor.0].suspected.remove(&from);
                Ok(())
            }
            Down::Drop(why) => {
                let due = holder.and_then(|(flow, _)| self.running(descriptor.0, flow));
                let due = due.filter(|held| (held.descriptor, held.address) == (descriptor, from));
                match due {
                    Some(_) => violated(format!("a reply from {from} was dropped: {why:?}")),
                    None => Ok(()),
                }
            }
        }
    }
}

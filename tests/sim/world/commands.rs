//! Carries out what the core asks for: operations for the kernel, steps for the pipes, sockets
//! opened and closed.

use std::net::SocketAddr;
use std::time::Duration;

use lb::proxy::outlook::Outlook;
use lb::proxy::{self, Event, Intake, Side, Spliced, When};
use lb::worker::slots::Key;
use lb::worker::tcp::sessions::Cmd;
use nix::errno::Errno;

use super::World;
use crate::sim::kernel::{Kind, Op, Tag, Until, Work};
use crate::sim::pipes::Step;

impl World {
    pub(super) fn execute(&mut self) {
        let mut next = 0;
        while let Some(command) = self.commands.get(next).copied() {
            next += 1;
            self.trace(|_| format!("  {command:?}"));
            match command {
                Cmd::Relay { key, what } => self.relay(key, what),
                Cmd::Connect { key, to } => self.connect(key, to),
                Cmd::Look { key } => self.look(key),
                Cmd::CancelConnect { key } => {
                    self.laws.cancels_connect(key);
                    self.cancel(Tag { kind: Kind::Connect, key });
                }
                Cmd::Close { key, reset } => {
                    let busy = self.kernel.works_for(key) || self.pipes.works_for(key);
                    self.laws.closed(self.now, key, reset, &self.conns, busy);
                    for side in Side::BOTH {
                        self.pipes.end((key, side));
                    }
                    for conn in self.sockets[key.place as usize].iter_mut().filter_map(Option::take)
                    {
                        self.conns[conn].close(reset);
                    }
                }
            }
        }
        self.commands.clear();
    }

    fn look(&mut self, key: Key) {
        let sockets = &self.sockets[key.place as usize];
        let outlooks = [0, 1].map(|side: usize| {
            sockets[side].map_or_else(Outlook::default, |conn| self.conns[conn].outlook(self.now))
        });
        self.laws.looks(self.now, key, &outlooks);
        self.act(|core, cx| core.told(key, outlooks, cx));
        self.take_reports();
    }

    fn relay(&mut self, key: Key, what: proxy::StreamCmd) {
        self.laws.asks(self.now, key, &what, &self.pool, &self.conns);
        let socket = |side: Side| {
            self.sockets[key.place as usize][side as usize].expect("a relay has two sockets")
        };
        let receive = |side| Tag { kind: Kind::Receive(side), key };
        let send = |side| Tag { kind: Kind::Send(side), key };
        match what {
            proxy::StreamCmd::Receive { side, how } => {
                let left = match how {
                    Intake::Many { bytes_max } => bytes_max,
                    Intake::Once { .. } | Intake::Last { .. } => u32::MAX,
                };
                self.kernel.submit(Op::new(
                    receive(side),
                    socket(side),
                    Work::Receive { how, left },
                ));
            }
            proxy::StreamCmd::Send { side, what } => {
                let bytes = self.pool.pieces(what).map(|piece| piece.len() as u64).sum();
                let work = Work::Send { what, bytes, taken: 0 };
                self.kernel.submit(Op::new(send(side), socket(side), work));
            }
            proxy::StreamCmd::AwaitRoom { side, .. } => {
                let work = Work::Wait { until: Until::Roomy };
                let tag = Tag { kind: Kind::Room(side), key };
                self.kernel.submit(Op::new(tag, socket(side), work));
            }
            proxy::StreamCmd::CancelRoom { side } => {
                self.kernel.cancel(Tag { kind: Kind::Room(side), key });
            }
            proxy::StreamCmd::FinishWriting { side } => self.conns[socket(side)].finish_writing(),
            proxy::StreamCmd::CancelReceive { side } => self.kernel.cancel(receive(side)),
            proxy::StreamCmd::CancelSend { side } => self.cancel(send(side)),
            proxy::StreamCmd::Splice { side, when } => self.plan_splice((key, side), when),
            proxy::StreamCmd::CancelSplice { side } => match self.pipes.forget((key, side)) {
                true => self.spliced((key, side), (0, 0, Spliced::Stopped)),
                false => self.kernel.cancel(Tag { kind: Kind::Splice(side), key }),
            },
            proxy::StreamCmd::EndSplice { side } => drop(self.pipes.end((key, side))),
        }
    }

    /// In a freeze it may find nothing: the kernel was just about to go on with the operation.
    fn cancel(&mut self, tag: Tag) {
        let is_missed = self.laws.hurries && self.random.in_thousand(self.plan.temper.late_cancels);
        if !is_missed {
            self.kernel.cancel(tag);
        }
    }

    fn plan_splice(&mut self, step: Step, when: When) {
        let (key, side) = step;
        if !self.pipes.lend(step) {
            return self.spliced(step, (0, 0, Spliced::Unavailable));
        }
        let (until, on) = match when {
            When::NextTurn => return self.pipes.in_next_turn(step, self.now),
            When::Soon => return self.pipes.soon(step, self.now),
            When::Later => return self.pipes.later(step, self.now),
            When::Readable => (Until::Readable, side),
            When::Writable => (Until::Writable, side.other()),
        };
        let conn = self.sockets[key.place as usize][on as usize];
        let conn = conn.expect("a relay has two sockets");
        let tag = Tag { kind: Kind::Splice(side), key };
        self.kernel.submit(Op::new(tag, conn, Work::Wait { until }));
    }

    pub(super) fn splice(&mut self, step: Step) {
        let (key, side) = step;
        let [source, sink] = [side, side.other()].map(|side| {
            let conn = self.sockets[key.place as usize][side as usize];
            conn.expect("a step is taken between two sockets")
        });
        let outcome = self.pipes.step(step, source, sink, &mut self.conns, &mut self.random);
        self.laws.drawn(key, side, outcome.taken);
        self.spliced += outcome.moved;
        let how = Spliced::Step(outcome.how);
        self.spliced(step, (outcome.moved, outcome.held as usize, how));
    }

    pub(super) fn spliced(&mut self, (key, side): Step, (moved, held, how): (u64, usize, Spliced)) {
        self.trace(|_| format!("spliced {key:?} {side:?} {moved} moved, {held} held, {how:?}"));
        self.laws.spliced(self.now, key, side, moved, how);
        self.happened(key, Event::Spliced { side, moved, held, how });
        self.take_reports();
    }

    fn connect(&mut self, key: Key, to: SocketAddr) {
        let user = self.laws.sessions[&key.place].user;
        let conn = self.connection(user, Side::Backend);
        let known = self.laws.adopted.backends().find(|backend| backend.address == to);
        let backend = known.map(|backend| backend.id);
        self.laws.connects(self.now, key, backend, conn);
        if self.random.in_thousand(self.plan.no_descriptor) {
            let errno = Errno::EMFILE;
            self.laws.connected(self.now, key, Err(errno), true);
            self.act(|core, cx| core.connected(key, Err(errno), cx));
            return self.take_reports();
        }
        self.sockets[key.place as usize][Side::Backend as usize] = Some(conn);
        let soon = self.now.plus(self.random.any_time(Duration::from_millis(50)));
        let (answer, at) = if self.random.in_thousand(self.plan.hanging) {
            // Established only after its cancel was requested, or never.
            let time = self.plan.timeouts.connect * 2;
            let answer = if self.random.half() { Ok(()) } else { Err(Errno::ETIMEDOUT) };
            (answer, self.now.plus(self.random.any_time(time)))
        } else if self.random.in_thousand(self.plan.no_port) {
            (Err(Errno::EADDRNOTAVAIL), soon)
        } else if self.random.in_thousand(self.plan.refused) {
            (Err(self.random.pick(&[Errno::ECONNREFUSED, Errno::EHOSTUNREACH])), soon)
        } else {
            (Ok(()), soon)
        };
        let tag = Tag { kind: Kind::Connect, key };
        self.kernel.submit(Op::new(tag, conn, Work::Connect { answer, at }));
    }
}

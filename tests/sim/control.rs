//! The control core's part in a run: backends that register, leave and are set aside, and orders at
//! any time, some of which come too late.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddr};

use lb::base::publish::Publisher;
use lb::base::time::Now;
use lb::cluster::{Backend, BackendId, Protocol, ServiceId, Snapshot, Standing};
use lb::session::{EndReason, SessionId};
use lb::worker::link::{ControlEnd, Order};

use super::plan::Plan;
use super::random::Random;

#[derive(Clone, Copy, Debug)]
enum Act {
    Change,
    Order,
    Stop,
}

pub struct Control {
    pub end: ControlEnd,
    publisher: Publisher<Snapshot>,
    backends: Vec<Backend>,
    registered: u32,
    acts: VecDeque<(Now, Act)>,
    pub stopping: bool,
}

impl Control {
    pub fn new(
        plan: &Plan,
        end: ControlEnd,
        publisher: Publisher<Snapshot>,
        now: Now,
        random: &mut Random,
    ) -> Control {
        let within = plan.arrive_within * 2;
        let mut acts = Vec::new();
        for (act, count) in [
            (Act::Change, plan.changes),
            (Act::Order, plan.orders),
            (Act::Stop, u64::from(plan.stops)),
        ] {
            acts.extend((0..count).map(|_| (now.plus(random.any_time(within)), act)));
        }
        acts.sort_by_key(|(at, _)| *at);
        let mut control = Control {
            end,
            publisher,
            backends: Vec::new(),
            registered: 0,
            acts: acts.into(),
            stopping: false,
        };
        (0..plan.backends).for_each(|_| control.register(random));
        control.publish();
        control
    }

    pub fn next_at(&self) -> Option<Now> {
        self.acts.front().map(|(at, _)| *at)
    }

    /// Does what is due; false if nothing is.
    pub fn act(&mut self, now: Now, random: &mut Random) -> bool {
        if self.next_at().is_none_or(|at| now < at) {
            return false;
        }
        let Some((_, act)) = self.acts.pop_front() else { return false };
        match act {
            Act::Change => self.change(random),
            Act::Order => self.give_order(random),
            Act::Stop => {
                self.stopping = true;
                self.order(Order::Drain);
                self.order(Order::Stop);
            }
        }
        true
    }

    fn order(&mut self, order: Order) {
        self.end.orders.push(order).expect("orders are taken every turn");
    }

    fn give_order(&mut self, random: &mut Random) {
        let views: Vec<_> = self.end.shard.iter().collect();
        if views.is_empty() || random.half() {
            let backend = BackendId(random.below(u64::from(self.registered) + 2) as u32);
            return self.order(Order::EndBackend { backend, reason: EndReason::BackendLeft });
        }
        let id = random.pick(&views).id;
        // Now and then the session has just ended, and someone else has its place.
        let generation = id.generation.wrapping_sub(u32::from(random.in_thousand(200)));
        let reason = EndReason::Operator;
        self.order(Order::EndSession { id: SessionId { generation, ..id }, reason });
    }

    fn change(&mut self, random: &mut Random) {
        let count = self.backends.len() as u64;
        let place = if count > 0 { random.below(count) as usize } else { 0 };
        match random.below(4) {
            1 if count > 0 => {
                let backend = self.backends.remove(place);
                if random.half() {
                    let reason = EndReason::BackendLeft;
                    self.order(Order::EndBackend { backend: backend.id, reason });
                }
            }
            2 if count > 0 => {
                // The same backend registers again: a new id for the old address.
                let before = self.backends.remove(place);
                self.register(random);
                self.backends.last_mut().expect("one has just come").address = before.address;
            }
            3 if count > 0 => {
                let backend = &mut self.backends[place];
                backend.standing = match backend.standing {
                    Standing::Serving => Standing::Aside,
                    _ => Standing::Serving,
                };
            }
            _ => self.register(random),
        }
        self.publish();
    }

    fn register(&mut self, random: &mut Random) {
        let number = self.registered;
        self.registered += 1;
        self.backends.push(Backend {
            proxy: false,
            http2: false,
            tls: None,
            id: BackendId(number),
            slot: number as u16,
            service: ServiceId::built_in(Protocol::Tcp),
            address: SocketAddr::new(Ipv4Addr::new(10, 1, 0, 1).into(), 1000 + number as u16),
            weight: random.between(1, 3) as u16,
            name: None,
            group: None,
            standing: Standing::Serving,
        });
    }

    fn publish(&mut self) {
        self.publisher.publish(self.publisher.current().with(&self.backends));
    }
}

//! Queues of places: first in, first out, and any place may leave from the middle. Owns the links,
//! which are kept apart from the queued entries, so that a table can keep its entries in several
//! orders at once, with one of these for each. Everything is O(1); memory is one link for every place
//! ever queued.

const NONE: u32 = u32::MAX;

/// A place and its neighbours.
#[derive(Clone, Copy)]
struct Link {
    /// `NONE`: this place is in no queue.
    queue: u32,
    before: u32,
    next: u32,
}

const UNLINKED: Link = Link { queue: NONE, before: NONE, next: NONE };

#[derive(Clone, Copy)]
struct Ends {
    first: u32,
    last: u32,
    len: u32,
}

const EMPTY: Ends = Ends { first: NONE, last: NONE, len: 0 };

/// Any number of queues, by number, over one set of places; a place is in at most one of them.
#[derive(Default)]
pub struct Queues {
    ends: Vec<Ends>,
    links: Vec<Link>,
}

impl Queues {
    /// Appends a place that is in no queue to one.
    pub fn push(&mut self, queue: usize, place: u32) {
        if self.ends.len() <= queue {
            self.ends.resize(queue + 1, EMPTY);
        }
        if self.links.len() <= place as usize {
            self.links.resize(place as usize + 1, UNLINKED);
        }
        debug_assert_eq!(self.links[place as usize].queue, NONE, "a place stands in one queue");
        let ends = &mut self.ends[queue];
        let before = std::mem::replace(&mut ends.last, place);
        ends.len += 1;
        match self.links.get_mut(before as usize) {
            Some(link) => link.next = place,
            None => ends.first = place,
        }
        self.links[place as usize] = Link { queue: queue as u32, before, next: NONE };
    }

    /// Removes a place from its queue, if it is in one.
    pub fn remove(&mut self, place: u32) {
        let Some(link) = self.links.get_mut(place as usize) else { return };
        let Link { queue, before, next } = std::mem::replace(link, UNLINKED);
        let Some(ends) = self.ends.get_mut(queue as usize) else { return };
        ends.len -= 1;
        match self.links.get_mut(before as usize) {
            Some(link) => link.next = next,
            None => ends.first = next,
        }
        match self.links.get_mut(next as usize) {
            Some(link) => link.before = before,
            None => ends.last = before,
        }
    }

    pub fn first(&self, queue: usize) -> Option<u32> {
        self.ends.get(queue).map(|ends| ends.first).filter(|place| *place != NONE)
    }

    /// From first to last.
    pub fn iter(&self, queue: usize) -> impl Iterator<Item = u32> {
        std::iter::successors(self.first(queue), |place| {
            Some(self.links[*place as usize].next).filter(|next| *next != NONE)
        })
    }

    pub fn len(&self, queue: usize) -> usize {
        self.ends.get(queue).map_or(0, |ends| ends.len as usize)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;
    use crate::base::random::xorshift;

    #[test]
    fn places_come_out_as_they_went_in_and_leave_from_anywhere() {
        let mut queues = Queues::default();
        assert_eq!((queues.first(3), queues.len(3)), (None, 0));
        queues.remove(7);
        for place in [5, 0, 9, 2] {
            queues.push(3, place);
        }
        queues.push(0, 7);
        queues.remove(9);
        queues.remove(9);
        assert_eq!(queues.iter(3).collect::<Vec<_>>(), [5, 0, 2]);
        queues.remove(5);
        queues.remove(2);
        queues.push(3, 5);
        assert_eq!(queues.iter(3).collect::<Vec<_>>(), [0, 5]);
        assert_eq!((queues.first(0), queues.len(3)), (Some(7), 2));
    }

    #[test]
    fn queues_agree_with_a_plain_model_over_many_random_steps() {
        let mut chance = xorshift(0x2545_f491_4f6c_dd1d);
        let mut random = |below: usize| chance(below as u64) as usize;
        let mut queues = Queues::default();
        let mut model: [VecDeque<u32>; 3] = Default::default();
        for _ in 0..20_000 {
            let (queue, place) = (random(3), random(40) as u32);
            match model.iter_mut().find(|model| model.contains(&place)) {
                Some(model) => {
                    model.retain(|other| *other != place);
                    queues.remove(place);
                }
                None => {
                    model[queue].push_back(place);
                    queues.push(queue, place);
                }
            }
            for (queue, model) in model.iter().enumerate() {
                assert!(queues.iter(queue).eq(model.iter().copied()));
                assert_eq!(queues.len(queue), model.len());
            }
        }
    }
}

//! Numbered places for sessions and connections. Owns the numbers and how often each place was used;
//! knows nothing about the contents.

/// A place in one particular use.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Key {
    pub place: u32,
    pub generation: u32,
}

/// The bits of a generation that a completion carries back.
pub const GENERATION_MASK: u32 = 0x7f_ffff;

/// Places whose contents stay where they are until removed.
pub struct Slots<T> {
    slots: Vec<(u32, Option<T>)>,
    free: Vec<u32>,
}

impl<T> Default for Slots<T> {
    fn default() -> Slots<T> {
        Slots { slots: Vec::new(), free: Vec::new() }
    }
}

impl<T> Slots<T> {
    /// Places in use.
    pub fn live(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Places that were ever used.
    pub fn places(&self) -> usize {
        self.slots.len()
    }

    pub fn put(&mut self, value: T) -> Key {
        let key = self.reserve();
        self.fill(key, value);
        key
    }

    /// A place that is in use from now on, and has nothing in it until it is [filled](Slots::fill).
    pub fn reserve(&mut self) -> Key {
        let place = self.free.pop().unwrap_or_else(|| {
            self.slots.push((0, None));
            (self.slots.len() - 1) as u32
        });
        Key { place, generation: self.slots[place as usize].0 }
    }

    /// Fills a place that was reserved.
    pub fn fill(&mut self, key: Key, value: T) {
        let (generation, slot) = &mut self.slots[key.place as usize];
        debug_assert!(*generation == key.generation && slot.is_none(), "it was reserved");
        *slot = Some(value);
    }

    /// Frees a place that was reserved and not filled.
    pub fn release(&mut self, key: Key) {
        let (generation, slot) = &mut self.slots[key.place as usize];
        debug_assert!(*generation == key.generation && slot.is_none(), "it was reserved");
        *generation = (*generation + 1) & GENERATION_MASK;
        self.free.push(key.place);
    }

    pub fn get(&mut self, key: Key) -> Option<&mut T> {
        let (generation, slot) = self.slots.get_mut(key.place as usize)?;
        if *generation == key.generation { slot.as_mut() } else { None }
    }

    /// Whether this one is still there.
    pub fn has(&self, key: Key) -> bool {
        self.at(key.place) == Some(key)
    }

    /// Everything in use.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.slots.iter_mut().filter_map(|(_, value)| value.as_mut())
    }

    pub fn remove(&mut self, key: Key) -> Option<T> {
        let (generation, slot) = self.slots.get_mut(key.place as usize)?;
        if *generation != key.generation {
            return None;
        }
        let value = slot.take()?;
        self.release(key);
        Some(value)
    }

    pub fn at(&self, place: u32) -> Option<Key> {
        let (generation, slot) = self.slots.get(place as usize)?;
        slot.as_ref().map(|_| Key { place, generation: *generation })
    }

    /// The first place whose value satisfies the predicate.
    pub fn find(&self, is_it: impl Fn(&T) -> bool) -> Option<Key> {
        self.iter().find(|(_, value)| is_it(value)).map(|(key, _)| key)
    }

    pub fn keys(&self, which: impl Fn(&T) -> bool) -> Vec<Key> {
        self.iter().filter(|(_, value)| which(value)).map(|(key, _)| key).collect()
    }

    /// Everything in use, with its place.
    pub fn iter(&self) -> impl Iterator<Item = (Key, &T)> {
        self.iter_from(0)
    }

    /// The same, from this place on.
    pub fn iter_from(&self, place: u32) -> impl Iterator<Item = (Key, &T)> {
        self.slots.iter().enumerate().skip(place as usize).filter_map(
            |(place, (generation, slot))| {
                let key = Key { place: place as u32, generation: *generation };
                slot.as_ref().map(|value| (key, value))
            },
        )
    }
}

//! Counters by their names, as they are handed to another process: a release that knows other rows reads those
//! that it knows. Gauges are left out, since whoever comes next sees for itself. Owns that form; pure.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde::ser::{SerializeMap, Serializer};
use serde::{Deserialize, Serialize};

use super::{Kind, Table};

/// More than anything here ever counts: sums of such numbers still fit.
pub const COUNT_MAX: u64 = 1 << 60;

/// The counters of one table.
pub struct Named<T> {
    /// In the order of its rows. Gauges are zero.
    values: Box<[u64]>,
    table: PhantomData<fn() -> T>,
}

impl<T: Table> Named<T> {
    /// The values of a table, in the order of its rows.
    pub fn of(values: &[u64]) -> Named<T> {
        let rows = T::rows().iter().zip(values);
        let own = |(row, value): (&super::Row, &u64)| match row.kind {
            Kind::Counter => *value,
            Kind::Gauge => 0,
        };
        Named { values: rows.map(own).collect(), table: PhantomData }
    }

    /// What has been added to `before`.
    pub fn since(&self, before: &Named<T>) -> Named<T> {
        let values = self.values.iter().zip(&before.values);
        let values = values.map(|(now, before)| now.saturating_sub(*before)).collect();
        Named { values, table: PhantomData }
    }

    /// Adds these.
    pub fn add(&mut self, more: &Named<T>) {
        let both = self.values.iter_mut().zip(&more.values);
        both.for_each(|(value, more)| *value = value.saturating_add(*more).min(COUNT_MAX));
    }

    /// Adds these to a table, whose one writer the caller is.
    pub fn add_to(&self, table: &T) {
        for (row, value) in self.values.iter().enumerate() {
            table.add(row, *value);
        }
    }

    /// In the order of the rows.
    pub fn values(&self) -> &[u64] {
        &self.values
    }

    pub fn is_zero(&self) -> bool {
        self.values.iter().all(|value| *value == 0)
    }

    /// Whether no number is out of all reason.
    pub fn is_sane(&self) -> bool {
        self.values.iter().all(|value| *value <= COUNT_MAX)
    }
}

impl<T: Table> Default for Named<T> {
    fn default() -> Named<T> {
        Named { values: vec![0; T::rows().len()].into(), table: PhantomData }
    }
}

impl<T> Clone for Named<T> {
    fn clone(&self) -> Named<T> {
        Named { values: self.values.clone(), table: PhantomData }
    }
}

impl<T> PartialEq for Named<T> {
    fn eq(&self, other: &Named<T>) -> bool {
        self.values == other.values
    }
}

impl<T: Table> fmt::Debug for Named<T> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows = T::rows().iter().zip(&self.values).filter(|(_, value)| **value > 0);
        out.debug_map().entries(rows.map(|(row, value)| (row.name, value))).finish()
    }
}

impl<T: Table> Serialize for Named<T> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let mut map = to.serialize_map(None)?;
        for (row, value) in T::rows().iter().zip(&self.values).filter(|(_, value)| **value > 0) {
            map.serialize_entry(row.name, value)?;
        }
        map.end()
    }
}

impl<'de, T: Table> Deserialize<'de> for Named<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Named<T>, D::Error> {
        from.deserialize_map(Rows(PhantomData))
    }
}

/// Reads the rows that the table has.
struct Rows<T>(PhantomData<fn() -> T>);

impl<'de, T: Table> Visitor<'de> for Rows<T> {
    type Value = Named<T>;

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("counters by name")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Named<T>, A::Error> {
        let mut named = Named::default();
        while let Some(row) = map.next_key_seed(RowNamed::<T>(PhantomData))? {
            match row {
                Some(row) => named.values[row] = map.next_value()?,
                None => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(named)
    }
}

/// The place of a counter in its table; `None`: there is none of this name.
struct RowNamed<T>(PhantomData<fn() -> T>);

impl<'de, T: Table> DeserializeSeed<'de> for RowNamed<T> {
    type Value = Option<usize>;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Option<usize>, D::Error> {
        from.deserialize_str(self)
    }
}

impl<T: Table> Visitor<'_> for RowNamed<T> {
    type Value = Option<usize>;

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("the name of a counter")
    }

    fn visit_str<E>(self, name: &str) -> Result<Option<usize>, E> {
        let is_it = |row: &super::Row| row.kind == Kind::Counter && row.name == name;
        Ok(T::rows().iter().position(is_it))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::WorkerCounters;

    #[test]
    fn counters_travel_by_name_and_gauges_do_not() {
        let counters = WorkerCounters::default();
        counters.sessions_started.add(7);
        counters.sessions_active.set(3);
        let named = Named::<WorkerCounters>::of(&counters.values());
        let json = serde_json::to_string(&named).unwrap();
        assert_eq!(json, r#"{"sessions_started":7}"#);
        assert_eq!(serde_json::from_str::<Named<WorkerCounters>>(&json).unwrap(), named);
        let other = r#"{"of_tomorrow":[1,{"a":2}],"sessions_active":9,"sessions_started":7}"#;
        assert_eq!(serde_json::from_str::<Named<WorkerCounters>>(other).unwrap(), named);
        let heir = WorkerCounters::default();
        heir.sessions_started.add(2);
        named.add_to(&heir);
        assert_eq!((heir.sessions_started.get(), heir.sessions_active.get()), (9, 0));
        for wrong in [r#"{"turns":-1}"#, r#"{"turns":"x"}"#, "[]", r#"{"turns":1e99}"#] {
            assert!(serde_json::from_str::<Named<WorkerCounters>>(wrong).is_err(), "{wrong}");
        }
    }
}

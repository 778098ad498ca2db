//! Which known name somebody may have meant who wrote another. Owns how alike two names must be for one to be
//! proposed.

/// A name that is less like the one that was written is not proposed: half of the letters may differ.
const MIN: f64 = 0.5;

/// The known name that is most like `name`, if any is; of several, the first.
pub fn nearest<T: AsRef<str>>(name: &str, known: impl IntoIterator<Item = T>) -> Option<T> {
    let mut nearest: Option<(f64, T)> = None;
    for other in known {
        let likeness = strsim::normalized_damerau_levenshtein(other.as_ref(), name);
        let is_nearer = nearest.as_ref().is_none_or(|(best, _)| likeness > *best);
        if likeness >= MIN && is_nearer {
            nearest = Some((likeness, other));
        }
    }
    nearest.map(|(_, other)| other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_those_most_alike_is_proposed_and_none_that_is_like_nothing() {
        let known = ["weight", "name", "group", "game"];
        for (name, near) in [
            ("wieght", Some("weight")),
            ("nam", Some("name")),
            ("fame", Some("name")),
            ("secret", None),
            ("", None),
        ] {
            assert_eq!(nearest(name, known), near, "{name}");
        }
        assert_eq!(nearest("ab", ["xb"]), Some("xb"), "half is enough");
        assert_eq!(nearest("name", std::iter::empty::<&str>()), None);
    }
}

//! Text on a terminal: how many columns it takes, what is shown of a name from the network, and what is left of
//! one that is too long. Goes by the characters that a person sees, some of which take two columns.

use unicode_segmentation::UnicodeSegmentation;
use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

/// The columns that a text takes.
pub fn width(text: &str) -> usize {
    // Most names are, and a list may be long.
    if text.is_ascii() { text.len() } else { text.width() }
}

/// Text from the network may hold anything, including what a terminal would obey, what turns the direction of a
/// line, and characters so joined that terminals disagree on their width. What is left takes as many columns as
/// [`width`] says.
pub fn shown(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.graphemes(true) {
        let first = character.chars().next().unwrap_or_default();
        let apart: usize = character.chars().map(|c| c.width().unwrap_or(0)).sum();
        match character.width() {
            _ if character.chars().any(char::is_control) => out.push('?'),
            0 => {}
            together if together == apart && !character.contains(JOINER) => out.push_str(character),
            _ => out.push(first),
        }
    }
    out
}

/// Zero-width joiner, which makes one picture of several where the font has it.
const JOINER: char = '\u{200d}';

/// The text in at most `most` columns. Long names differ at their ends as often as at their beginnings, so what
/// is left out is the middle.
pub fn middled(text: &str, most: usize) -> String {
    if width(text) <= most {
        return text.to_owned();
    }
    let kept = most.saturating_sub(1);
    let mark = if most == 0 { "" } else { "…" };
    let start = beginning(text.graphemes(true), kept.div_ceil(2));
    let mut end = beginning(text.graphemes(true).rev(), kept / 2);
    end.reverse();
    format!("{}{mark}{}", start.concat(), end.concat())
}

/// The text in at most `most` columns, without its end if need be.
pub fn headed(text: &str, most: usize) -> String {
    if width(text) <= most {
        return text.to_owned();
    }
    let mark = if most == 0 { "" } else { "…" };
    beginning(text.graphemes(true), most.saturating_sub(1)).concat() + mark
}

/// As many characters as fit into `most` columns.
fn beginning<'t>(characters: impl Iterator<Item = &'t str>, most: usize) -> Vec<&'t str> {
    let mut taken = 0;
    let fits = |character: &&str| {
        taken += character.width();
        taken <= most
    };
    characters.take_while(fits).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_keeps_to_its_columns_and_splits_no_character() {
        for (text, most, cut) in [
            ("shop-frontend-042", 17, "shop-frontend-042"),
            ("shop-frontend-042", 9, "shop…-042"),
            ("shop-frontend-042", 1, "…"),
            ("shop-frontend-042", 0, ""),
            ("数据库服务器甲", 14, "数据库服务器甲"),
            ("数据库服务器甲", 9, "数据…器甲"),
            ("数据库服务器甲", 8, "数据…甲"),
            ("e\u{301}e\u{301}e\u{301}e\u{301}", 3, "e\u{301}…e\u{301}"),
        ] {
            assert_eq!(middled(text, most), cut, "{text} {most}");
            assert!(width(&middled(text, most)) <= most);
        }
        assert_eq!(headed("数据库", 4), "数…");
        assert_eq!(headed("data", 4), "data");
    }

    #[test]
    fn what_is_shown_of_a_name_obeys_nothing_and_has_the_width_that_terminals_give_it() {
        for (name, shows, columns) in [
            ("web-1", "web-1", 5),
            ("数据库", "数据库", 6),
            ("cafe\u{301}", "cafe\u{301}", 4),
            ("a\u{1b}[2J\r\nb", "a?[2J?b", 7),
            ("a\u{202e}b\u{200b}\u{feff}c", "abc", 3),
            ("\u{301}a", "a", 1),
            ("👨\u{200d}👩\u{200d}👧x", "👨x", 3),
            ("❤\u{fe0f}x", "❤x", 2),
            ("👍🏽x", "👍x", 3),
        ] {
            assert_eq!((shown(name).as_str(), width(&shown(name))), (shows, columns), "{name:?}");
        }
    }
}

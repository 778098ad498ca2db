//! `/`: the page for people. Owns one self-contained file that fetches only `/status`, `/sessions` and `/history`,
//! from the door that served it, and the policy by which browsers enforce this. It inserts everything it
//! shows as text nodes, so a backend's name can never become markup.

use std::sync::LazyLock;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest, Sha256};

/// The page as sent.
pub const HTML: &str = include_str!("page.html");

/// The page's Content-Security-Policy (W3C, level 3): its own script and style by their hashes, answers
/// from its own door, and nothing else. No other page may put it into a frame.
pub static POLICY: LazyLock<String> = LazyLock::new(|| {
    let hash = |tag: &str| {
        let content = between(HTML, &format!("<{tag}>"), &format!("</{tag}>"));
        format!("'sha256-{}'", STANDARD.encode(Sha256::digest(content)))
    };
    format!(
        "default-src 'none'; script-src {}; style-src {}; connect-src 'self'; img-src data:; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        hash("script"),
        hash("style")
    )
});

fn between<'a>(text: &'a str, open: &str, close: &str) -> &'a str {
    let rest = text.split_once(open).map_or("", |(_, rest)| rest);
    rest.split_once(close).map_or("", |(content, _)| content)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_policy_lets_this_script_and_this_style_run_and_nothing_else() {
        let policy = POLICY.as_str();
        assert!(policy.starts_with("default-src 'none'; script-src 'sha256-"));
        assert!(!policy.contains("unsafe") && !policy.contains("http"));
        for tag in ["<script>", "<style>"] {
            assert_eq!(HTML.matches(tag).count(), 1, "{tag}");
        }
        // This is the hash of the empty string: a tag was not found.
        assert!(!policy.contains("47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU="));
    }

    #[test]
    fn the_page_fetches_nothing_from_elsewhere_and_makes_no_markup_of_text() {
        for foreign in ["http://", "https://", "//cdn", "@import", "src=", "url("] {
            assert!(!HTML.contains(foreign), "{foreign}");
        }
        for unsafe_way in
            ["innerHTML", "outerHTML", "insertAdjacentHTML", "eval(", " style=", "onclick="]
        {
            assert!(!HTML.contains(unsafe_way), "{unsafe_way}");
        }
    }
}

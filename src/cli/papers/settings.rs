//! The manual page lb.toml(5), from the tables of settings. Owns its order and its markup.

use clap_mangen::roff::{Inline, Roff, bold, roman};

use crate::cluster::Protocol;
use crate::config::Config;
use crate::config::keys::{Effect, KEYS, Key};
use crate::config::services::{SERVICE_KEYS, ServiceConfig};

/// The page.
pub fn page() -> String {
    let version = concat!("lb ", env!("CARGO_PKG_VERSION"));
    let mut roff = Roff::default();
    roff.control("TH", ["lb.toml", "5", "", version, "File Formats"]);
    roff.control("SH", ["NAME"]).text([roman("lb.toml - settings of the load balancer lb")]);
    roff.control("SH", ["SYNOPSIS"]).text([bold("/etc/lb/lb.toml")]);
    roff.control("SH", ["DESCRIPTION"]);
    for paragraph in [
        "`lb serve --config FILE` reads its settings from a file in TOML. Every key has a default, and \
         flags override the file. An unknown key is refused, and the error names the closest known one.",
        "`lb check --config FILE` reports whether a file is right and what this host lacks for it. \
         `lb reload`, or SIGHUP, applies a changed file without touching running sessions, except for \
         the keys marked \"after a restart\"; a file with an error changes nothing.",
    ] {
        roff.text(marked(paragraph)).control("PP", []);
    }
    roff.control("SH", ["SETTINGS"]);
    let mut section = "";
    for key in KEYS {
        if key.section != section {
            section = key.section;
            roff.control("SS", [format!("[{section}]").as_str()]);
        }
        entry(&mut roff, key, &Config::default());
    }
    roff.control("SH", ["SERVICES"]);
    roff.text(marked(
        "Each table `[service.NAME]` is one more service beside the built-in ones, `tcp`, `udp` and `api`. \
         Where a key says `\"global\"`, the key of the same name above applies.",
    ));
    let service = ServiceConfig::new("example", Protocol::Tcp);
    for key in SERVICE_KEYS {
        entry(&mut roff, key, &service);
    }
    roff.control("SH", ["FILES"]);
    for (file, what) in [
        ("/etc/lb/lb.toml", "The settings of lb.service."),
        ("/etc/lb/NAME.toml", "Those of lb@NAME.service."),
        ("/usr/share/doc/lb/settings.md", "The same keys as a table, with examples."),
    ] {
        roff.control("TP", []).text([bold(file)]).text([roman(what)]);
    }
    roff.control("SH", ["SEE ALSO"]);
    roff.text([
        bold("lb"),
        roman("(1), "),
        bold("lb-serve"),
        roman("(1), "),
        bold("lb-check"),
        roman("(1)"),
    ]);
    roff.to_roff()
}

/// One key: its name, what it does, what it takes, its default, and when a change counts.
fn entry<T>(roff: &mut Roff, key: &Key<T>, defaults: &T) {
    let name = match key.section {
        // The tables within a service's have no heading of their own.
        "" | "check" => key.path(),
        _ => key.name.to_owned(),
    };
    let effect = match key.effect {
        Effect::Now => "a reload",
        Effect::Restart => "a restart",
    };
    roff.control("TP", []).text([bold(name)]).text(marked(key.help));
    roff.control("br", []);
    let takes =
        format!("Takes {}. Default: `{}`; after {effect}.", key.takes(), key.show(defaults));
    roff.text(marked(&takes));
}

/// A text whose code, between backticks, is bold.
fn marked(text: &str) -> Vec<Inline> {
    let part = |(place, part): (usize, &str)| if place % 2 == 1 { bold(part) } else { roman(part) };
    text.split('`').enumerate().map(part).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_is_there_with_its_default_and_what_it_takes() {
        let page = page().replace("\\-", "-");
        let plain = page.replace("\\fB", "").replace("\\fR", "");
        for key in KEYS {
            assert!(page.contains(&format!("\\fB{}\\fR", key.name)), "{}", key.path());
            let takes = key.takes().replace('`', "");
            assert!(plain.contains(&takes), "{} takes {takes}", key.path());
        }
        for key in SERVICE_KEYS {
            assert!(page.contains(&format!("{}\\fR", key.name)), "{}", key.path());
        }
        assert_eq!(page.matches("\n.TP").count(), KEYS.len() + SERVICE_KEYS.len() + 3);
        assert_eq!(page.matches("Default: ").count(), KEYS.len() + SERVICE_KEYS.len());
        for section in ["[listen]", "[limits]", "[log]"] {
            assert!(page.contains(&format!(".SS {section}")), "{section}");
        }
    }
}

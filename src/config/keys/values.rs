//! How a single value is read and shown: what it may be and the half sentence that says so. Knows no
//! setting.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::num::NonZeroU32;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;

use super::{ADDRESSES_MAX, DAY_MS, SESSIONS_MAX, VIA_BYTES_MAX, WORKERS_MAX};

/// A value as the operator gave it, before it is known what it is for.
#[derive(Clone, PartialEq, Debug)]
pub enum Given {
    Text(String),
    Number(i64),
    List(Vec<String>),
    Switch(bool),
    /// Anything that no setting takes, by the name of its type.
    Other(&'static str),
}

impl Given {
    pub(super) fn described(&self) -> String {
        match self {
            Given::Text(text) => format!("\"{}\"", text.escape_debug()),
            Given::Number(number) => number.to_string(),
            Given::List(_) => "a list".to_owned(),
            Given::Switch(on) => on.to_string(),
            Given::Other(kind) => format!("a value of the type {kind}"),
        }
    }
}

/// Reads where a door stands: an address with its port, a bare port (`8081` or `:8081`) for every
/// address of both families, or `off`. Port 0 lets the kernel choose.
///
/// # Errors
/// Half a sentence that says what it takes.
pub fn door(given: &Given) -> Result<Option<SocketAddr>, String> {
    let text = match given {
        Given::Text(text) => text.clone(),
        Given::Number(number) => number.to_string(),
        _ => String::new(),
    };
    if text == "off" {
        return Ok(None);
    }
    let port = text.strip_prefix(':').unwrap_or(&text);
    if let Ok(port) = port.parse::<u16>() {
        return Ok(Some(SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port)));
    }
    text.parse().map(Some).map_err(|_| {
        format!(
            "takes an address with its port such as \"127.0.0.1:8081\" or \"[::1]:8081\", a port \
             from 0 to 65535 for all addresses, or \"off\", not {}",
            given.described()
        )
    })
}

pub(super) fn workers(given: &Given) -> Result<Option<usize>, String> {
    match given {
        Given::Text(text) if text == "auto" => Ok(None),
        Given::Number(count @ 1..) if *count <= WORKERS_MAX as i64 => Ok(Some(*count as usize)),
        _ => Err(format!(
            "takes a number from 1 to {WORKERS_MAX} or \"auto\", not {}",
            given.described()
        )),
    }
}

/// Zero stands for what the host can hold.
pub(super) fn sessions(given: &Given) -> Result<usize, String> {
    match given {
        Given::Text(text) if text == "auto" => Ok(0),
        Given::Number(count @ 1..) if *count <= SESSIONS_MAX as i64 => Ok(*count as usize),
        _ => Err(format!(
            "takes a number from 1 to {SESSIONS_MAX} or \"auto\", not {}",
            given.described()
        )),
    }
}

pub(super) fn number(given: &Given, range: RangeInclusive<u64>, unit: &str) -> Result<u64, String> {
    let found = match given {
        Given::Number(number) => u64::try_from(*number).ok(),
        _ => None,
    };
    found.filter(|number| range.contains(number)).ok_or_else(|| {
        let (least, most) = (range.start(), range.end());
        format!("takes a whole number{unit} from {least} to {most}, not {}", given.described())
    })
}

pub(super) fn millis(given: &Given, range: RangeInclusive<u64>) -> Result<Duration, String> {
    number(given, range, " of milliseconds").map(Duration::from_millis)
}

/// A number of which zero stands for none.
pub(super) fn count(given: &Given) -> Result<Option<NonZeroU32>, String> {
    number(given, 0..=u64::from(u32::MAX), "").map(|count| NonZeroU32::new(count as u32))
}

pub(super) fn quarantine(given: &Given) -> Result<Option<Duration>, String> {
    match given {
        Given::Text(text) if text == "auto" => Ok(None),
        Given::Number(_) => millis(given, 0..=DAY_MS).map(Some),
        _ => Err(format!(
            "takes a whole number of milliseconds or \"auto\", not {}",
            given.described()
        )),
    }
}

pub(super) fn switch(given: &Given) -> Result<bool, String> {
    match given {
        Given::Switch(on) => Ok(*on),
        _ => Err(format!("takes true or false, not {}", given.described())),
    }
}

pub(super) fn one_of<T: Copy>(given: &Given, words: &[(&str, T)]) -> Result<T, String> {
    let found = match given {
        Given::Text(text) => words.iter().find(|(word, _)| word == text),
        _ => None,
    };
    found.map(|(_, value)| *value).ok_or_else(|| {
        let known: Vec<String> = words.iter().map(|(word, _)| format!("\"{word}\"")).collect();
        format!("takes one of {}, not {}", known.join(", "), given.described())
    })
}

pub(super) fn networks(given: &Given) -> Result<Vec<IpNet>, String> {
    let wrong = |what: String| {
        format!("takes a list of networks such as [\"10.0.0.0/8\", \"192.0.2.7\"], not {what}")
    };
    let Given::List(items) = given else { return Err(wrong(given.described())) };
    items
        .iter()
        .map(|item| network(item).ok_or_else(|| wrong(format!("\"{}\"", item.escape_debug()))))
        .collect()
}

/// A network in CIDR notation, or one address. Bits beyond the prefix are cleared.
pub(super) fn network(text: &str) -> Option<IpNet> {
    let network = text.parse::<IpNet>().map(|network| network.trunc());
    network.or_else(|_| text.parse::<IpAddr>().map(IpNet::from)).ok()
}

pub(super) fn show_networks(networks: &[IpNet]) -> String {
    let quoted: Vec<String> = networks.iter().map(|network| format!("\"{network}\"")).collect();
    format!("[{}]", quoted.join(", "))
}

/// Addresses of this host; each once.
pub(super) fn addresses(given: &Given) -> Result<Vec<IpAddr>, String> {
    let wrong = |what: String| {
        format!(
            "takes a list of up to {ADDRESSES_MAX} addresses such as [\"10.0.0.5\"], not {what}"
        )
    };
    let Given::List(items) = given else { return Err(wrong(given.described())) };
    let mut addresses = Vec::new();
    for item in items {
        let address = item.parse::<IpAddr>().ok().map(|address| address.to_canonical());
        let fits = |address: &IpAddr| {
            !address.is_unspecified() && !address.is_multicast() && !addresses.contains(address)
        };
        let address = address.filter(fits);
        addresses.push(address.ok_or_else(|| wrong(format!("\"{}\"", item.escape_debug())))?);
    }
    if addresses.len() > ADDRESSES_MAX {
        return Err(wrong(format!("{}", addresses.len())));
    }
    Ok(addresses)
}

pub(super) fn show_addresses(addresses: &[IpAddr]) -> String {
    let quoted: Vec<String> = addresses.iter().map(|address| format!("\"{address}\"")).collect();
    format!("[{}]", quoted.join(", "))
}

/// A name in `Via` is a token (RFC 9110 7.6.3), here without the rarer characters.
pub(super) fn via(given: &Given) -> Result<Option<String>, String> {
    let fits = |text: &str| {
        (1..=VIA_BYTES_MAX).contains(&text.len())
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte))
    };
    match given {
        Given::Text(text) if text == "auto" => Ok(None),
        Given::Text(text) if fits(text) => Ok(Some(text.clone())),
        _ => Err(format!(
            "takes \"auto\" or up to {VIA_BYTES_MAX} letters, digits, `-`, `.` and `_`, not {}",
            given.described()
        )),
    }
}

pub(super) fn path(given: &Given) -> Result<Option<PathBuf>, String> {
    match given {
        Given::Text(text) => Ok((!text.is_empty()).then(|| PathBuf::from(text))),
        _ => Err(format!("takes the path of a file in quotes, not {}", given.described())),
    }
}

pub(super) fn show_path(path: Option<&Path>) -> String {
    format!("\"{}\"", path.map_or("".into(), |path| path.to_string_lossy()))
}

pub(super) fn show_door(door: Option<SocketAddr>) -> String {
    match door {
        None => "\"off\"".to_owned(),
        Some(address) if address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED) => {
            format!("\":{}\"", address.port())
        }
        Some(address) => format!("\"{address}\""),
    }
}

pub(super) fn show_one<T: Copy + PartialEq>(words: &[(&str, T)], value: T) -> String {
    let word = words.iter().find(|(_, known)| *known == value);
    format!("\"{}\"", word.expect("the table holds every value of its type").0)
}

pub(super) fn show_count(count: Option<NonZeroU32>) -> String {
    count.map_or(0, NonZeroU32::get).to_string()
}

pub(super) fn show_millis(time: Duration) -> String {
    time.as_millis().to_string()
}

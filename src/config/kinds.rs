//! Kinds of values: what a setting of each kind takes, how it is parsed and how it is shown. A kind
//! serves many settings and knows none of them.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::num::{NonZeroU32, NonZeroU64};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;

use crate::tls::keys;

use super::units::{SIZES, TIMES, Units};

/// How a setting that is left to the balancer is shown.
pub const AUTO: &str = "\"auto\"";
/// Longest name in `Via`, in bytes.
const VIA_BYTES_MAX: usize = 64;
/// Most addresses to send datagrams from.
const ADDRESSES_MAX: usize = 16;

/// A value as the operator wrote it, before its setting is known.
#[derive(Clone, PartialEq, Debug)]
pub enum Given {
    Text(String),
    Number(i64),
    List(Vec<Given>),
    /// Keys and values in braces.
    Table(Vec<(String, Given)>),
    Switch(bool),
    /// Something no setting takes, described for an error.
    Other(&'static str),
}

impl Given {
    /// The text, if it is one.
    pub fn text(&self) -> Option<&str> {
        match self {
            Given::Text(text) => Some(text),
            _ => None,
        }
    }

    /// The value as an error quotes it.
    pub fn described(&self) -> String {
        match self {
            Given::Text(text) => quoted(text),
            Given::Number(number) => number.to_string(),
            Given::List(_) => "a list".to_owned(),
            Given::Table(_) => "a table".to_owned(),
            Given::Switch(on) => on.to_string(),
            Given::Other(what) => (*what).to_owned(),
        }
    }
}

/// How values of type `V` are written in the file.
pub trait Kind<V> {
    /// What a setting of this kind takes, phrased to follow "takes".
    fn takes(&self) -> String;

    /// # Errors
    /// What was given instead, as it continues "takes ..., not ...".
    fn read(&self, given: &Given) -> Result<V, String>;

    /// The value as written in the file.
    fn show(&self, value: &V) -> String;
}

/// The address of a door: an address with its port, a bare port (`8081` or `:8081`) for all addresses
/// of both families, or `off`. Port 0 lets the kernel choose.
pub struct DoorAddress;

impl Kind<Option<SocketAddr>> for DoorAddress {
    fn takes(&self) -> String {
        "an address with its port such as \"127.0.0.1:8081\" or \"[::1]:8081\", a port from 0 to 65535 \
         for all addresses, or \"off\""
            .to_owned()
    }

    fn read(&self, given: &Given) -> Result<Option<SocketAddr>, String> {
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
        text.parse().map(Some).map_err(|_| given.described())
    }

    fn show(&self, door: &Option<SocketAddr>) -> String {
        match door {
            None => "\"off\"".to_owned(),
            Some(address) if address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED) => {
                format!("\":{}\"", address.port())
            }
            Some(address) => format!("\"{address}\""),
        }
    }
}

/// Most certificates.
const CERTIFICATES_MAX: usize = 1024;

/// Certificates with their keys: tables of paths.
pub struct Certificates;

impl Kind<Vec<keys::Files>> for Certificates {
    fn takes(&self) -> String {
        format!(
            "up to {CERTIFICATES_MAX} tables with the paths `certificate` and `key`, and perhaps `ocsp`, \
             each under [[tls.certificate]]"
        )
    }

    fn read(&self, given: &Given) -> Result<Vec<keys::Files>, String> {
        let Given::List(all) = given else { return Err(given.described()) };
        if all.len() > CERTIFICATES_MAX {
            return Err(format!("{} of them", all.len()));
        }
        all.iter().map(files).collect()
    }

    fn show(&self, value: &Vec<keys::Files>) -> String {
        let path = |path: &Path| quoted(&path.display().to_string());
        let one = |files: &keys::Files| {
            let ocsp = files.ocsp.iter().map(|ocsp| format!(", ocsp = {}", path(ocsp)));
            let (certificate, key) = (path(&files.certificate), path(&files.key));
            let ocsp: String = ocsp.collect();
            format!("{{ certificate = {certificate}, key = {key}{ocsp} }}")
        };
        format!("[{}]", value.iter().map(one).collect::<Vec<_>>().join(", "))
    }
}

fn files(given: &Given) -> Result<keys::Files, String> {
    let Given::Table(rows) = given else { return Err(given.described()) };
    let known = ["certificate", "key", "ocsp"];
    if let Some((name, _)) = rows.iter().find(|(name, _)| !known.contains(&name.as_str())) {
        return Err(format!("one with `{}`", name.escape_debug()));
    }
    let path = |name: &str| -> Result<Option<PathBuf>, String> {
        let Some((_, given)) = rows.iter().find(|(known, _)| known == name) else {
            return Ok(None);
        };
        let path = given.text().filter(|path| !path.is_empty());
        path.map(|path| Some(path.into()))
            .ok_or_else(|| format!("one whose `{name}` is {}", given.described()))
    };
    let needed = |name: &str| path(name)?.ok_or_else(|| format!("one without `{name}`"));
    Ok(keys::Files {
        certificate: needed("certificate")?,
        key: needed("key")?,
        ocsp: path("ocsp")?,
    })
}

/// Types a whole number can become. Where zero means "none", the type is an `Option`.
pub trait Whole: Sized {
    fn from_whole(number: u64) -> Option<Self>;
    fn to_whole(&self) -> u64;
}

macro_rules! whole {
    ($($type:ty),+) => {
        $(impl Whole for $type {
            fn from_whole(number: u64) -> Option<$type> {
                <$type>::try_from(number).ok()
            }

            fn to_whole(&self) -> u64 {
                *self as u64
            }
        })+
    };
}

whole!(u8, u16, u32, usize);

impl Whole for Option<NonZeroU32> {
    fn from_whole(number: u64) -> Option<Option<NonZeroU32>> {
        u32::try_from(number).ok().map(NonZeroU32::new)
    }

    fn to_whole(&self) -> u64 {
        self.map_or(0, |number| u64::from(number.get()))
    }
}

impl Whole for Option<NonZeroU64> {
    fn from_whole(number: u64) -> Option<Option<NonZeroU64>> {
        Some(NonZeroU64::new(number))
    }

    fn to_whole(&self) -> u64 {
        self.map_or(0, NonZeroU64::get)
    }
}

/// A whole number in a range.
pub struct Number(pub RangeInclusive<u64>);

impl<V: Whole> Kind<V> for Number {
    fn takes(&self) -> String {
        range_of(&self.0)
    }

    fn read(&self, given: &Given) -> Result<V, String> {
        within(given, &self.0).and_then(V::from_whole).ok_or_else(|| given.described())
    }

    fn show(&self, value: &V) -> String {
        value.to_whole().to_string()
    }
}

/// A size in a range: with its unit, or a whole number of bytes.
pub struct Bytes(pub RangeInclusive<u64>);

impl<V: Whole> Kind<V> for Bytes {
    fn takes(&self) -> String {
        const EXAMPLES: [(u64, &str); 2] = [
            (48 << 20, "\"48MiB\", \"48M\" or 50331648"),
            (16 << 10, "\"16KiB\", \"16K\" or 16384"),
        ];
        let fits = |it: &&(u64, &str)| self.0.contains(&it.0);
        let example = EXAMPLES.iter().find(fits).unwrap_or(&EXAMPLES[1]).1;
        format!("a size{}, such as {example} (bytes)", amounts(&SIZES, &self.0))
    }

    fn read(&self, given: &Given) -> Result<V, String> {
        amount(given, &self.0, &SIZES)
            .and_then(|bytes| V::from_whole(bytes).ok_or_else(|| given.described()))
    }

    fn show(&self, value: &V) -> String {
        SIZES.show(value.to_whole())
    }
}

/// A number of things, or `auto` to have it worked out.
pub struct NumberOrAuto(pub RangeInclusive<u64>);

impl<V: Whole> Kind<Option<V>> for NumberOrAuto {
    fn takes(&self) -> String {
        format!("a number from {} to {} or \"auto\"", self.0.start(), self.0.end())
    }

    fn read(&self, given: &Given) -> Result<Option<V>, String> {
        match given {
            Given::Text(text) if text == "auto" => Ok(None),
            _ => Number(self.0.clone()).read(given).map(Some),
        }
    }

    fn show(&self, value: &Option<V>) -> String {
        value.as_ref().map_or(AUTO.to_owned(), |value| value.to_whole().to_string())
    }
}

/// The same, with zero standing for `auto`.
impl Kind<usize> for NumberOrAuto {
    fn takes(&self) -> String {
        Kind::<Option<usize>>::takes(self)
    }

    fn read(&self, given: &Given) -> Result<usize, String> {
        Kind::<Option<usize>>::read(self, given).map(Option::unwrap_or_default)
    }

    fn show(&self, value: &usize) -> String {
        self.show(&(*value != 0).then_some(*value))
    }
}

/// A time in a range: with its unit, or a whole number of milliseconds.
pub struct Millis(pub RangeInclusive<u64>);

impl Kind<Duration> for Millis {
    fn takes(&self) -> String {
        let range = amounts(&TIMES, &self.0);
        format!("a time{range}, such as \"3s\", \"250ms\" or 3000 (milliseconds)")
    }

    fn read(&self, given: &Given) -> Result<Duration, String> {
        amount(given, &self.0, &TIMES).map(Duration::from_millis)
    }

    fn show(&self, time: &Duration) -> String {
        TIMES.show(time.as_millis() as u64)
    }
}

/// The same, or `auto` to derive it from other settings.
pub struct MillisOrAuto(pub RangeInclusive<u64>);

impl Kind<Option<Duration>> for MillisOrAuto {
    fn takes(&self) -> String {
        format!("{} or \"auto\"", Millis(self.0.clone()).takes())
    }

    fn read(&self, given: &Given) -> Result<Option<Duration>, String> {
        match given {
            Given::Text(text) if text == "auto" => Ok(None),
            _ => Millis(self.0.clone()).read(given).map(Some),
        }
    }

    fn show(&self, time: &Option<Duration>) -> String {
        time.map_or(AUTO.to_owned(), |time| Millis(self.0.clone()).show(&time))
    }
}

pub struct Switch;

impl Kind<bool> for Switch {
    fn takes(&self) -> String {
        "true or false".to_owned()
    }

    fn read(&self, given: &Given) -> Result<bool, String> {
        match given {
            Given::Switch(on) => Ok(*on),
            _ => Err(given.described()),
        }
    }

    fn show(&self, on: &bool) -> String {
        on.to_string()
    }
}

/// One of a few words. The table holds every value of the type.
pub struct Word<T: 'static>(pub &'static [(&'static str, T)]);

impl<T: Copy + PartialEq> Kind<T> for Word<T> {
    fn takes(&self) -> String {
        let known: Vec<String> = self.0.iter().map(|(word, _)| format!("\"{word}\"")).collect();
        format!("one of {}", known.join(", "))
    }

    fn read(&self, given: &Given) -> Result<T, String> {
        let found = match given {
            Given::Text(text) => self.0.iter().find(|(word, _)| word == text),
            _ => None,
        };
        found.map(|(_, value)| *value).ok_or_else(|| given.described())
    }

    fn show(&self, value: &T) -> String {
        let word = self.0.iter().find(|(_, known)| known == value);
        format!("\"{}\"", word.expect("the table holds every value of its type").0)
    }
}

/// Networks in CIDR notation, or single addresses. Bits beyond the prefix are cleared.
pub struct Networks;

impl Kind<Vec<IpNet>> for Networks {
    fn takes(&self) -> String {
        "a list of networks such as [\"10.0.0.0/8\", \"192.0.2.7\"]".to_owned()
    }

    fn read(&self, given: &Given) -> Result<Vec<IpNet>, String> {
        texts(given)?.into_iter().map(|item| network(item).ok_or_else(|| quoted(item))).collect()
    }

    fn show(&self, networks: &Vec<IpNet>) -> String {
        list(networks.iter())
    }
}

fn network(text: &str) -> Option<IpNet> {
    let network = text.parse::<IpNet>().map(|network| network.trunc());
    network.or_else(|_| text.parse::<IpAddr>().map(IpNet::from)).ok()
}

/// Addresses of this host, each once.
pub struct Addresses;

impl Kind<Vec<IpAddr>> for Addresses {
    fn takes(&self) -> String {
        format!("a list of up to {ADDRESSES_MAX} addresses such as [\"10.0.0.5\"]")
    }

    fn read(&self, given: &Given) -> Result<Vec<IpAddr>, String> {
        let mut addresses = Vec::new();
        for item in texts(given)? {
            let address = item.parse::<IpAddr>().ok().map(|address| address.to_canonical());
            let fits = |address: &IpAddr| {
                !address.is_unspecified() && !address.is_multicast() && !addresses.contains(address)
            };
            addresses.push(address.filter(fits).ok_or_else(|| quoted(item))?);
        }
        if addresses.len() > ADDRESSES_MAX {
            return Err(addresses.len().to_string());
        }
        Ok(addresses)
    }

    fn show(&self, addresses: &Vec<IpAddr>) -> String {
        list(addresses.iter())
    }
}

/// A name in `Via`, which is a token (RFC 9110 7.6.3), here without the rarer characters.
pub struct Via;

impl Kind<Option<String>> for Via {
    fn takes(&self) -> String {
        format!("\"auto\" or up to {VIA_BYTES_MAX} letters, digits, `-`, `.` and `_`")
    }

    fn read(&self, given: &Given) -> Result<Option<String>, String> {
        let fits = |text: &str| {
            (1..=VIA_BYTES_MAX).contains(&text.len())
                && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte))
        };
        match given {
            Given::Text(text) if text == "auto" => Ok(None),
            Given::Text(text) if fits(text) => Ok(Some(text.clone())),
            _ => Err(given.described()),
        }
    }

    fn show(&self, name: &Option<String>) -> String {
        format!("\"{}\"", name.as_deref().unwrap_or("auto"))
    }
}

/// The path of a file, or nothing.
pub struct File;

impl Kind<Option<PathBuf>> for File {
    fn takes(&self) -> String {
        "the path of a file in quotes".to_owned()
    }

    fn read(&self, given: &Given) -> Result<Option<PathBuf>, String> {
        match given {
            Given::Text(text) => Ok((!text.is_empty()).then(|| PathBuf::from(text))),
            _ => Err(given.described()),
        }
    }

    fn show(&self, path: &Option<PathBuf>) -> String {
        format!("\"{}\"", path.as_deref().map_or("".into(), |path| path.to_string_lossy()))
    }
}

/// Most paths in a list.
const FILES_MAX: usize = 16;

/// The paths of files.
pub struct Files;

impl Kind<Vec<PathBuf>> for Files {
    fn takes(&self) -> String {
        format!("a list of up to {FILES_MAX} paths in quotes")
    }

    fn read(&self, given: &Given) -> Result<Vec<PathBuf>, String> {
        let paths = texts(given)?;
        if paths.len() > FILES_MAX {
            return Err(paths.len().to_string());
        }
        let path = |path: &str| (!path.is_empty()).then(|| path.into());
        paths.into_iter().map(|text| path(text).ok_or_else(|| quoted(text))).collect()
    }

    fn show(&self, paths: &Vec<PathBuf>) -> String {
        let paths: Vec<String> =
            paths.iter().map(|path| quoted(&path.display().to_string())).collect();
        format!("[{}]", paths.join(", "))
    }
}

/// The items of a list of text.
///
/// # Errors
/// What was given instead.
pub(super) fn texts(given: &Given) -> Result<Vec<&str>, String> {
    let Given::List(items) = given else { return Err(given.described()) };
    let text = |item: &'_ Given| match item {
        Given::Text(_) => Ok(()),
        _ => Err("a list of anything but text".to_owned()),
    };
    items.iter().try_for_each(text)?;
    Ok(items.iter().filter_map(Given::text).collect())
}

fn within(given: &Given, range: &RangeInclusive<u64>) -> Option<u64> {
    match given {
        Given::Number(number) => u64::try_from(*number).ok().filter(|it| range.contains(it)),
        _ => None,
    }
}

/// An amount that a range holds: with its unit, or a number of the smallest one.
fn amount(given: &Given, range: &RangeInclusive<u64>, units: &Units) -> Result<u64, String> {
    let read = match given {
        Given::Text(text) => units.read(text).map_err(|fault| given.described() + &fault)?,
        _ => within(given, range).ok_or_else(|| given.described())?,
    };
    if range.contains(&read) { Ok(read) } else { Err(given.described()) }
}

/// The range as it follows "a time" or "a size"; nothing where it has no end worth telling.
fn amounts(units: &Units, range: &RangeInclusive<u64>) -> String {
    if *range.end() == i64::MAX as u64 {
        return String::new();
    }
    format!(" from {} to {}", units.bare(*range.start()), units.bare(*range.end()))
}

fn range_of(range: &RangeInclusive<u64>) -> String {
    format!("a whole number from {} to {}", range.start(), range.end())
}

pub(super) fn quoted(text: &str) -> String {
    format!("\"{}\"", text.escape_debug())
}

pub(super) fn list(items: impl Iterator<Item = impl std::fmt::Display>) -> String {
    let items: Vec<String> = items.map(|item| format!("\"{item}\"")).collect();
    format!("[{}]", items.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Given {
        Given::Text(text.to_owned())
    }

    #[test]
    fn a_door_is_an_address_a_port_or_off() {
        let all = |port| Some(SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port));
        for (given, expected) in [
            (text("8081"), all(8081)),
            (text(":8081"), all(8081)),
            (Given::Number(8081), all(8081)),
            (text(":0"), all(0)),
            (text("[::]:8081"), all(8081)),
            (text("127.0.0.1:8081"), Some("127.0.0.1:8081".parse().unwrap())),
            (text("[::1]:8081"), Some("[::1]:8081".parse().unwrap())),
            (text("off"), None),
        ] {
            assert_eq!(DoorAddress.read(&given), Ok(expected), "{given:?}");
        }
        for given in [
            text("65536"),
            Given::Number(-1),
            text(""),
            text("localhost:80"),
            text("10.0.0.1"),
            Given::Other("a table"),
        ] {
            assert_eq!(DoorAddress.read(&given), Err(given.described()));
        }
    }

    #[test]
    fn a_number_or_auto_is_accepted_where_auto_may_stand() {
        let workers = NumberOrAuto(1..=128);
        let read = |given: &Given| -> Result<Option<usize>, String> { workers.read(given) };
        assert_eq!(read(&text("auto")), Ok(None));
        assert_eq!(read(&Given::Number(128)), Ok(Some(128)));
        for wrong in [Given::Number(0), Given::Number(129), Given::Number(-1), text("3")] {
            assert_eq!(read(&wrong), Err(wrong.described()));
        }
    }

    #[test]
    fn a_number_that_does_not_fit_its_type_is_refused() {
        let small = Number(0..=10_000);
        assert_eq!(small.read(&Given::Number(255)), Ok(255_u8));
        assert_eq!(Kind::<u8>::read(&small, &Given::Number(256)), Err("256".to_owned()));
        assert_eq!(small.read(&Given::Number(0)), Ok(None::<NonZeroU32>));
    }

    #[test]
    fn a_lone_address_is_a_network_of_one() {
        let given = Given::List(["10.1.2.3/8", "192.0.2.7", "::1"].map(text).to_vec());
        let networks = Networks.read(&given).unwrap();
        assert_eq!(Networks.show(&networks), "[\"10.0.0.0/8\", \"192.0.2.7/32\", \"::1/128\"]");
    }
}

//! The members of one message of the control protocol: what each may be, and which of them mean nothing. Owns
//! the sentences about both.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::de::{Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::{BadMessage, DRAIN_MS_MAX, Joining, NAME_BYTES_MAX, QUOTED_CHARS_MAX, Request, Target};
use crate::base::likeness;
use crate::cluster::backend::is_name;
use crate::cluster::registry::Lasts;
use crate::cluster::{AskedCheck, Protocol, WEIGHT_MAX};
use crate::tls::backends;

/// Unknown members that are named in an answer, at most.
const NAMED_MAX: usize = 3;
/// What a message about a backend may say; what one command needs is no fault in another.
const OF_BACKENDS: [&str; 13] = [
    "cmd", "protocol", "service", "port", "weight", "name", "group", "proxy", "http", "tls",
    "tls_name", "probe", "check",
];
const OF_PROOFS: [&str; 5] = ["cmd", "id", "mac", "nonce", "v"];
const OF_DRAINS: &str = "deadline_ms";

/// The members of a message that mean nothing there, each with the known one that it may have been meant for.
pub fn unknown(cmd: Option<&str>, fields: &Fields) -> Option<String> {
    let known: Vec<&str> = match cmd {
        Some("hello") => return None,
        Some("auth") => OF_PROOFS.to_vec(),
        Some("drain") => OF_BACKENDS.into_iter().chain([OF_DRAINS]).collect(),
        Some(_) => OF_BACKENDS.to_vec(),
        None if fields.get("ack").is_some() => return None,
        None => OF_BACKENDS.into_iter().chain(OF_PROOFS).chain([OF_DRAINS]).collect(),
    };
    let strange = fields.0.iter().map(|(name, _)| name).filter(|name| !known.contains(&&***name));
    let strange: Vec<&String> = strange.collect();
    let mut told: Vec<String> = (strange.iter().take(NAMED_MAX))
        .map(|name| match (nearest(name, &known), cmd) {
            (_, Some(cmd)) if **name == OF_DRAINS => format!("{name} means nothing in {cmd}"),
            (Some(near), _) => format!("unknown member {}: perhaps {near}", quoted(name)),
            (None, _) => format!("unknown member {}", quoted(name)),
        })
        .collect();
    if strange.len() > NAMED_MAX {
        told.push(format!("and {} more", strange.len() - NAMED_MAX));
    }
    (!told.is_empty()).then(|| told.join("; "))
}

/// The known name that is most like this one, if any is.
pub fn nearest<'k>(name: &str, known: &[&'k str]) -> Option<&'k str> {
    // Very long names are like none, and comparing them takes a while.
    let name = Some(name).filter(|name| name.len() <= QUOTED_CHARS_MAX)?.to_lowercase();
    likeness::nearest(&name, known.iter().copied())
}

/// What a message without a command is.
pub fn acknowledgement(fields: &Fields) -> Result<Option<Request>, BadMessage> {
    match fields.get("ack") {
        Some(Value::String(ack)) if ack == "hello" => Ok(Some(Request::Hello)),
        Some(_) => Ok(None),
        None => Err(super::bad(None, "cmd is missing")),
    }
}

/// What a message of this command asks for.
pub fn request(cmd: &'static str, fields: &Fields) -> Result<Request, String> {
    Ok(match cmd {
        "hello" => Request::Hello,
        "auth" => Request::Auth {
            id: fields.name("id")?.ok_or("id is missing")?,
            mac: fields.text("mac")?.ok_or("mac is missing")?.to_owned(),
        },
        "register" => Request::Register(Joining {
            target: fields.target()?,
            port: fields.port()?,
            weight: fields.number("weight", 1, WEIGHT_MAX.into())?.map(|it| it as u16),
            name: fields.name("name")?,
            group: fields.name("group")?,
            proxy: fields.proxy()?,
            http2: fields.http2()?,
            tls: fields.switch("tls")?,
            tls_name: fields.tls_name()?,
            probe: fields.switch("probe")?,
            check: fields.check()?,
        }),
        "unregister" => Request::Unregister { target: fields.target()?, port: fields.port()? },
        "drain" => Request::Drain {
            target: fields.target()?,
            port: fields.port()?,
            lasts: fields.lasts()?,
        },
        "undrain" => Request::Undrain { target: fields.target()?, port: fields.port()? },
        "services" => Request::Services,
        // A protocol alone has never narrowed the list.
        _ => {
            Request::List { target: fields.name("service")?.map(|_| fields.target()).transpose()? }
        }
    })
}

/// The members of an object; no two may share a name.
pub struct Fields(Vec<(String, Value)>);

impl Fields {
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.0.iter().find(|field| field.0 == name).map(|field| &field.1)
    }

    pub fn text(&self, name: &str) -> Result<Option<&str>, String> {
        match self.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(format!("{name} must be a string")),
        }
    }

    pub fn name(&self, field: &str) -> Result<Option<Arc<str>>, String> {
        let Some(text) = self.text(field)? else { return Ok(None) };
        if !is_name(text) {
            return Err(format!(
                "{field} must be 1 to {NAME_BYTES_MAX} letters, digits or any of . _ : -"
            ));
        }
        Ok(Some(text.into()))
    }

    pub fn number(&self, name: &str, least: u64, most: u64) -> Result<Option<u64>, String> {
        let value = match self.get(name) {
            None | Some(Value::Null) => return Ok(None),
            Some(value) => value,
        };
        match value.as_u64().or_else(|| value.as_f64().and_then(whole)) {
            Some(number) if (least..=most).contains(&number) => Ok(Some(number)),
            _ => Err(format!(
                "{name} must be a whole number from {least} to {most}, not {}",
                quoted(&value.to_string())
            )),
        }
    }

    pub fn proxy(&self) -> Result<Option<bool>, String> {
        if self.get("proxy") == Some(&Value::Bool(false)) {
            return Ok(Some(false));
        }
        match self.number("proxy", 2, 2) {
            Ok(version) => Ok(version.map(|_| true)),
            Err(_) => {
                Err("proxy must be 2, the version of the PROXY header, or false, or left out"
                    .to_owned())
            }
        }
    }

    pub fn http2(&self) -> Result<Option<bool>, String> {
        match self.number("http", 1, 2) {
            Ok(version) => Ok(version.map(|version| version == 2)),
            Err(_) => {
                Err("http must be 1 or 2, the version of HTTP that the backend speaks, or left out"
                    .to_owned())
            }
        }
    }

    pub fn switch(&self, name: &str) -> Result<Option<bool>, String> {
        match self.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Bool(on)) => Ok(Some(*on)),
            Some(_) => Err(format!("{name} must be true or false")),
        }
    }

    pub fn tls_name(&self) -> Result<Option<Arc<str>>, String> {
        match self.text("tls_name")? {
            None => Ok(None),
            Some(name) if backends::is_name(name) => Ok(Some(name.into())),
            Some(name) => {
                Err(format!("tls_name must be a host or an address, not {}", quoted(name)))
            }
        }
    }

    pub fn check(&self) -> Result<Option<Option<AskedCheck>>, String> {
        match self.text("check")? {
            None => Ok(None),
            Some("off") => Ok(Some(None)),
            Some(text) => match text.parse() {
                Ok(check) => Ok(Some(Some(check))),
                Err(why) => Err(format!("check {}: {why}", quoted(text))),
            },
        }
    }

    pub fn lasts(&self) -> Result<Lasts, String> {
        if let Some(Value::String(never)) = self.get("deadline_ms")
            && never == "never"
        {
            return Ok(Lasts::Never);
        }
        let ms =
            self.number("deadline_ms", 0, DRAIN_MS_MAX).map_err(|said| said + ", or \"never\"")?;
        Ok(ms.map_or(Lasts::AsSet, |ms| Lasts::For(Duration::from_millis(ms))))
    }

    pub fn port(&self) -> Result<u16, String> {
        let port = self.number("port", 1, u16::MAX.into())?.ok_or("port is missing")?;
        Ok(u16::try_from(port).expect("the range was checked"))
    }

    pub fn target(&self) -> Result<Target, String> {
        let protocol = self.protocol()?;
        match self.name("service")? {
            Some(service) => Ok(Target::Named { service, protocol }),
            None => protocol.map(Target::BuiltIn).ok_or("protocol is missing".to_owned()),
        }
    }

    pub fn protocol(&self) -> Result<Option<Protocol>, String> {
        let Some(name) = self.text("protocol")? else { return Ok(None) };
        let known = Protocol::ALL.into_iter().find(|known| known.name() == name);
        let unknown = || format!("unknown protocol {}: it is tcp, udp or api", quoted(name));
        known.map(Some).ok_or_else(unknown)
    }
}

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Fields, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = Fields;

            fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                out.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
                let mut fields = Fields(Vec::new());
                while let Some((name, value)) = map.next_entry::<String, Value>()? {
                    if fields.get(&name).is_some() {
                        return Err(A::Error::custom(format!("{} twice", quoted(&name))));
                    }
                    fields.0.push((name, value));
                }
                Ok(fields)
            }
        }
        from.deserialize_map(Members)
    }
}

/// A whole number written with a point or an exponent, which makes no difference in JSON.
fn whole(number: f64) -> Option<u64> {
    // A float holds every whole number up to 2^53 exactly, and anything larger is out of every range.
    let exact = number.fract() == 0.0 && (0.0..9_007_199_254_740_992.0).contains(&number);
    exact.then_some(number as u64)
}

/// A peer's own text, quoted back to it: shortened, and without the control characters a terminal obeys.
pub fn quoted(words: &str) -> String {
    let mut shown: String = words
        .chars()
        .take(QUOTED_CHARS_MAX)
        .map(|it| if it.is_control() { '?' } else { it })
        .collect();
    if words.chars().nth(QUOTED_CHARS_MAX).is_some() {
        shown.push_str("...");
    }
    shown
}

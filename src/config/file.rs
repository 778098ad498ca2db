//! TOML to [`Config`]. Owns the file's syntax and the errors about a faulty line; which keys there
//! are and what each takes is up to `keys`. Reads text it is given; opening the file is up to the
//! caller.

use std::borrow::Cow;
use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::Config;
use super::keys::{KEYS, Key, find};
use super::kinds::Given;
use super::services::{NAME_BYTES_MAX, SERVICE_KEYS, SERVICES_MAX, ServiceConfig};
use crate::base::likeness;
use crate::cluster::Protocol;

/// Reads a whole file on top of the defaults. `name` is what error messages call the file.
///
/// # Errors
/// One sentence that names the file, the line and the fix.
pub fn read(name: &str, text: &str) -> Result<Config, String> {
    let at = |span: Range<usize>| format!("{name} line {}", line(text, span.start));
    let table = DeTable::parse(text).map_err(|error| {
        let place = error.span().map_or(name.to_owned(), at);
        format!("{place}: {}", error.message().lines().collect::<Vec<_>>().join(", "))
    })?;
    let mut config = Config::default();
    for (key, value) in table.get_ref() {
        let read = match value.get_ref() {
            DeValue::Table(services) if key.get_ref() == SERVICES => {
                read_services(&mut config, services)
            }
            _ if key.get_ref() == SERVICES => Err((
                key.span(),
                format!(
                    "`{SERVICES}` is a table of tables: write [{SERVICES}.NAME] and its keys below it"
                ),
            )),
            _ => GLOBAL.set(&mut config, key, value),
        };
        read.map_err(|(span, said)| format!("{}: {said}", at(span)))?;
    }
    Ok(config)
}

type Wrong = (Range<usize>, String);
type Name<'a> = Spanned<Cow<'a, str>>;

/// The table of the named services.
const SERVICES: &str = "service";

/// Keys that may stand together: those of the whole file, or of one table that can be repeated.
struct Table<T: 'static> {
    keys: &'static [Key<T>],
    /// What its sections are called in errors: `prefix.section`; empty for the whole file.
    prefix: String,
}

const GLOBAL: Table<Config> = Table { keys: KEYS, prefix: String::new() };

/// Reads `[service.NAME]` tables.
fn read_services(config: &mut Config, services: &DeTable) -> Result<(), Wrong> {
    // The parser sorts its tables; services count in the order of the file.
    let mut tables: Vec<(&Name, &Spanned<DeValue>)> = services.iter().collect();
    tables.sort_by_key(|(name, _)| name.span().start);
    if tables.len() > SERVICES_MAX {
        let said = format!("{} services; at most {SERVICES_MAX} may be named", tables.len());
        return Err((tables[SERVICES_MAX].0.span(), said));
    }
    for (name, value) in tables {
        config.add_service(read_service(name, value)?);
    }
    Ok(())
}

fn read_service(name: &Name, value: &Spanned<DeValue>) -> Result<ServiceConfig, Wrong> {
    let wrong = |said: String| Err((name.span(), said));
    let shown = name.get_ref().escape_debug();
    let DeValue::Table(rows) = value.get_ref() else {
        return wrong(format!(
            "`service.{shown}` is a table: write [service.{shown}] and its keys below it"
        ));
    };
    if !ServiceConfig::is_name(name.get_ref()) {
        return wrong(format!(
            "a service cannot be called `{shown}`: take up to {NAME_BYTES_MAX} letters, digits, `-` and \
             `_`, but none of tcp, udp and api, which are built in"
        ));
    }
    if !rows.contains_key("protocol") {
        return wrong(format!(
            "[service.{shown}] lacks its protocol: add `protocol = \"tcp\"`, \"udp\" or \"api\""
        ));
    }
    let table = Table { keys: SERVICE_KEYS, prefix: format!("{SERVICES}.{}", name.get_ref()) };
    let mut service = ServiceConfig::new(name.get_ref(), Protocol::Tcp);
    rows.iter().try_for_each(|(key, value)| table.set(&mut service, key, value))?;
    Ok(service)
}

impl<T> Table<T> {
    /// Sets a key of the table, or those of one of its sections.
    fn set(&self, target: &mut T, key: &Name, value: &Spanned<DeValue>) -> Result<(), Wrong> {
        let section = key.get_ref();
        match value.get_ref() {
            DeValue::Table(rows) if self.is_section(section) => {
                rows.iter().try_for_each(|(key, value)| self.set_one(target, section, key, value))
            }
            _ => self.set_one(target, "", key, value),
        }
    }

    fn is_section(&self, name: &str) -> bool {
        !name.is_empty() && self.keys.iter().any(|key| key.section == name)
    }

    fn set_one(
        &self,
        target: &mut T,
        section: &str,
        key: &Name,
        value: &Spanned<DeValue>,
    ) -> Result<(), Wrong> {
        let name = key.get_ref();
        if section.is_empty() && self.is_section(name) {
            let full = self.full(name);
            let said = format!("`{full}` is a table: write [{full}] and its keys below it");
            return Err((key.span(), said));
        }
        let Some(row) = find(self.keys, section, name) else {
            return Err((key.span(), self.unknown(section, name)));
        };
        let given = given(value.get_ref());
        let path = self.full(&row.path());
        row.set(target, &given).map_err(|said| (value.span(), format!("{path} {said}")))
    }

    /// A section or a key as the whole file knows it.
    fn full(&self, name: &str) -> String {
        match (self.prefix.as_str(), name) {
            ("", name) => name.to_owned(),
            (prefix, "") => prefix.to_owned(),
            (prefix, name) => format!("{prefix}.{name}"),
        }
    }

    fn unknown(&self, section: &str, name: &str) -> String {
        let place = self.full(section);
        let place = if place.is_empty() { place } else { format!(" in [{place}]") };
        let elsewhere = self.keys.iter().find(|key| key.name == name);
        let cure = match (elsewhere, self.nearest(section, name)) {
            (Some(key), _) if self.full(key.section).is_empty() => {
                "; it stands above all tables".to_owned()
            }
            (Some(key), _) => format!("; it belongs to [{}]", self.full(key.section)),
            (None, Some(known)) => format!("; did you mean `{known}`?"),
            (None, None) => format!("; known here are {}", self.known_in(section).join(", ")),
        };
        format!("unknown key `{}`{place}{cure}", name.escape_debug())
    }

    fn nearest(&self, section: &str, name: &str) -> Option<String> {
        let known = self.known_in(section);
        let near = likeness::nearest(name, known.iter().map(|known| bare(known)))?;
        known.iter().find(|known| bare(known) == near).cloned()
    }

    /// The names allowed in a section; at the top level, these include the tables.
    fn known_in(&self, section: &str) -> Vec<String> {
        let keys = self.keys.iter();
        let mut names: Vec<String> =
            keys.filter(|key| key.section == section).map(|key| key.name.to_owned()).collect();
        if section.is_empty() {
            let mut tables: Vec<String> = self
                .keys
                .iter()
                .filter(|key| !key.section.is_empty())
                .map(|key| format!("[{}]", self.full(key.section)))
                .collect();
            tables.dedup();
            names.extend(tables);
        }
        names
    }
}

fn bare(known: &str) -> &str {
    known.trim_matches(['[', ']'])
}

fn given(value: &DeValue) -> Given {
    match value {
        DeValue::String(text) => Given::Text(text.clone().into_owned()),
        DeValue::Integer(integer) => i64::from_str_radix(integer.as_str(), integer.radix())
            .map_or(Given::Other("a number beyond 64 bits"), Given::Number),
        DeValue::Array(items) => {
            Given::List(items.iter().map(|item| given(item.get_ref())).collect())
        }
        DeValue::Boolean(on) => Given::Switch(*on),
        DeValue::Float(_) => Given::Other("a floating-point number"),
        DeValue::Datetime(_) => Given::Other("a date or time"),
        DeValue::Table(rows) => Given::Table(
            rows.iter()
                .map(|(key, value)| (key.get_ref().to_string(), given(value.get_ref())))
                .collect(),
        ),
    }
}

fn line(text: &str, place: usize) -> usize {
    text.bytes().take(place).filter(|byte| *byte == b'\n').count() + 1
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Duration;

    use super::super::LogFormat;
    use super::*;
    use crate::cluster::{OnBackendLoss, Policy};

    /// Every setting with a value other than its default.
    pub const EVERY_SETTING_CHANGED: &str = r#"
        workers = 3
        [listen]
        tcp = "10.0.0.1:1"
        udp = 2
        api = ":3"
        api_tls = ":5"
        control = "[::1]:4"
        admin = "off"
        proxy_from = ["10.0.0.0/8"]
        [balance]
        policy = "source_hash"
        hash = "address_port"
        on_backend_loss = "close"
        [health]
        interval_ms = 900
        timeout_ms = 800
        misses = 2
        [timeouts]
        connect_ms = 11
        tcp_idle_ms = 12
        half_close_ms = 13
        udp_idle_ms = 17
        drain_ms = 14
        [limits]
        sessions = 15
        control_connections = 16
        buffer_bytes = 1_048_576
        udp_sessions = 18
        udp_sockets = 19
        [udp]
        on_backend_loss = "drop"
        responses = 20
        quarantine_ms = 21
        source_sessions = 22
        source_new_per_second = 23
        local_addresses = ["10.0.0.5", "::1"]
        gro = false
        [api]
        line_bytes = 1024
        field_bytes = 1025
        head_bytes = 4096
        fields = 50
        body_bytes = 24
        head_ms = 25
        body_ms = 26
        answer_ms = 27
        idle_ms = 28
        tunnel_idle_ms = 29
        upstream_idle_ms = 30
        upstream_idle_max = 31
        upstream_private_max = 32
        retries = 1
        via = "edge"
        request_id = true
        trusted = ["10.0.0.0/8"]
        h2c = false
        h2_streams = 35
        [tls]
        strict_sni = true
        ragged_end = "end"
        clients = "required"
        client_ca = "ca.pem"
        client_crl = ["ca.crl"]
        client_chain = true
        ticket_file = "tickets"
        handshake_ms = 33
        handshakes = 34
        [[tls.certificate]]
        certificate = "a.pem"
        key = "a.key"
        ocsp = "a.ocsp"
        [backend_tls]
        ca = "authorities.pem"
        verify = "off"
        [control]
        allow = ["10.0.0.0/8"]
        secret_file = "secrets"
        [cluster]
        name = "shop"
        node = "lb-a"
        endpoints = ["https://10.1.0.5:2379"]
        user = "lb"
        password_file = "password"
        ca_file = "etcd.pem"
        cert_file = "lb.pem"
        key_file = "lb.key"
        secret_file = "cluster"
        lease_ms = 3500
        orphan_ms = 3600
        [admin]
        token_file = "tokens"
        socket = "admin.sock"
        [log]
        level = "debug"
        format = "json"
        requests_per_second = 32
    "#;

    #[test]
    fn an_empty_file_is_the_defaults() {
        assert_eq!(read("lb.toml", ""), Ok(Config::default()));
    }

    #[test]
    fn every_key_reads_back_as_it_is_shown() {
        let text: String = KEYS
            .iter()
            .map(|key| {
                let value = key.show(&Config::default());
                match key.section {
                    "" => format!("{} = {value}\n", key.name),
                    section => format!("{section}.{} = {value}\n", key.name),
                }
            })
            .collect();
        assert_eq!(read("lb.toml", &text), Ok(Config::default()), "{text}");
    }

    #[test]
    fn a_full_file_sets_every_field() {
        let config = read("lb.toml", EVERY_SETTING_CHANGED).unwrap();
        let defaults = Config::default();
        for key in KEYS {
            assert_ne!(key.show(&config), key.show(&defaults), "{} was not set", key.path());
        }
        assert_eq!(config.workers, Some(3));
        assert_eq!(config.listen.udp, Some("[::]:2".parse().unwrap()));
        assert_eq!(config.listen.admin, None);
        assert_eq!(config.balance.policy, Policy::SourceHash);
        assert_eq!(config.balance.on_backend_loss, OnBackendLoss::Close);
        assert_eq!(config.timeouts.half_close, Duration::from_millis(13));
        assert_eq!(config.limits.buffer_bytes, 1 << 20);
        assert_eq!(config.log.format, LogFormat::Json);
    }

    /// Expects each text to be refused with the sentence beside it.
    #[track_caller]
    fn refuses(cases: &[(&str, &str)]) {
        for (text, said) in cases {
            assert_eq!(read("f", text), Err((*said).to_owned()), "{text}");
        }
    }

    #[test]
    fn an_unknown_key_is_reported_with_its_line_and_the_nearest_known_one() {
        refuses(&[
            (
                "\n[balance]\npolcy = 1",
                "f line 3: unknown key `polcy` in [balance]; did you mean `policy`?",
            ),
            (
                "[listen]\ninterval_ms = 1",
                "f line 2: unknown key `interval_ms` in [listen]; it belongs to [health]",
            ),
            ("[limit]\nsessions = 1", "f line 1: unknown key `limit`; did you mean `[limits]`?"),
            ("worker = 1", "f line 1: unknown key `worker`; did you mean `workers`?"),
            (
                "[log]\nworkers = 1",
                "f line 2: unknown key `workers` in [log]; it stands above all tables",
            ),
            ("health = 5", "f line 1: `health` is a table: write [health] and its keys below it"),
            (
                "[log]\nzzz = 1",
                "f line 2: unknown key `zzz` in [log]; known here are level, format, \
                 requests_per_second",
            ),
        ]);
    }

    #[test]
    fn a_value_that_does_not_fit_is_reported_with_its_line_and_what_the_key_takes() {
        refuses(&[
            (
                "[health]\ninterval_ms = \"5x\"",
                "f line 2: health.interval_ms takes a time from 10ms to 1h, such as \"3s\", \"250ms\" or \
                 3000 (milliseconds), not \"5x\", whose unit is none of ms, s, m, h, d: write \"3s\"",
            ),
            (
                "[health]\nmisses = 2.5",
                "f line 2: health.misses takes a whole number from 1 to 100, not a floating-point \
                 number",
            ),
            (
                "[balance]\npolicy = \"random\"",
                "f line 2: balance.policy takes one of \"round_robin\", \"least_sessions\", \
                 \"p2c\", \"source_hash\", not \"random\"",
            ),
            (
                "[control]\nallow = [\"10.0.0.0/33\"]",
                "f line 2: control.allow takes a list of networks such as [\"10.0.0.0/8\", \
                 \"192.0.2.7\"], not \"10.0.0.0/33\"",
            ),
            (
                "[udp]\nlocal_addresses = [\"10.0.0.5\", \"10.0.0.5\"]",
                "f line 2: udp.local_addresses takes a list of up to 16 addresses such as \
                 [\"10.0.0.5\"], not \"10.0.0.5\"",
            ),
            (
                "[udp]\nlocal_addresses = [\"0.0.0.0\"]",
                "f line 2: udp.local_addresses takes a list of up to 16 addresses such as \
                 [\"10.0.0.5\"], not \"0.0.0.0\"",
            ),
            (
                "[control]\nallow = [1]",
                "f line 2: control.allow takes a list of networks such as [\"10.0.0.0/8\", \
                 \"192.0.2.7\"], not a list of anything but text",
            ),
            (
                "workers = 99999999999999999999",
                "f line 1: workers takes a number from 1 to 128 or \"auto\", not a number beyond \
                 64 bits",
            ),
        ]);
    }

    #[test]
    fn a_time_or_a_size_has_a_unit_or_is_a_bare_number() {
        for (one, other) in [
            ("health.interval_ms = \"3s\"", "health.interval_ms = 3000"),
            ("timeouts.tcp_idle_ms = \"30d\"", "timeouts.tcp_idle_ms = 2_592_000_000"),
            ("limits.buffer_bytes = \"64M\"", "limits.buffer_bytes = 67108864"),
            ("limits.buffer_bytes = \"64MiB\"", "limits.buffer_bytes = 67108864"),
            ("api.body_bytes = \"0B\"", "api.body_bytes = 0"),
            ("udp.quarantine_ms = \"0s\"", "udp.quarantine_ms = 0"),
            (
                "service.a = { protocol = \"tcp\", connect_ms = \"250ms\" }",
                "service.a = { protocol = \"tcp\", connect_ms = 250 }",
            ),
            (
                "[service.a]\nprotocol = \"tcp\"\ncheck = { kind = \"tcp\", interval_ms = \"1m\" }",
                "[service.a]\nprotocol = \"tcp\"\ncheck = { kind = \"tcp\", interval_ms = 60_000 }",
            ),
        ] {
            assert_eq!(read("f", one), read("f", other), "{one}");
            assert!(read("f", one).is_ok(), "{one}");
        }
    }

    #[test]
    fn a_wrong_time_or_size_is_told_with_its_line_its_key_and_an_example() {
        const SIZE: &str = "limits.buffer_bytes takes a size from 1MiB to 64GiB, such as \"48MiB\", \
                            \"48M\" or 50331648 (bytes), not ";
        for (value, fault) in [
            ("\"48MB\"", "\"48MB\", whose unit is unclear: write \"48MiB\""),
            ("\"1.5GiB\"", "\"1.5GiB\", which is a fraction: write \"1536MiB\""),
            ("\"65GiB\"", "\"65GiB\""),
            ("\"1B\"", "\"1B\""),
            ("\"-1M\"", "\"-1M\", which is below zero"),
            ("\"99999999999999999999G\"", "\"99999999999999999999G\", which is too large"),
            ("99999999999999999999", "a number beyond 64 bits"),
            ("1.5", "a floating-point number"),
            ("-1", "-1"),
            ("\"50331648\"", "\"50331648\", which has no unit: write \"50331648B\" or 50331648"),
        ] {
            let text = format!("\n[limits]\nbuffer_bytes = {value}");
            assert_eq!(read("f", &text), Err(format!("f line 3: {SIZE}{fault}")), "{value}");
        }
        let text = "[service.a]\nprotocol = \"tcp\"\n[service.a.check]\ntimeout_ms = \"2min\"";
        let said = read("f", text).unwrap_err();
        assert!(
            said.starts_with("f line 4: service.a.check.timeout_ms takes a time from 1ms to 1m")
        );
        assert!(said.ends_with("not \"2min\", whose unit is unclear: write \"2m\""), "{said}");
    }

    #[test]
    fn broken_syntax_is_one_line_that_names_the_line() {
        for text in ["\n\n[listen\n", "a = ", "a = 1\na = 2", "[log]\nlevel = \"x", "\u{0}"] {
            let said = read("f", text).unwrap_err();
            assert!(said.starts_with("f line "), "{said}");
            assert!(!said.contains('\n'), "{said}");
        }
        assert!(read("f", "\n\n[listen\n").unwrap_err().starts_with("f line 3: "));
    }
}

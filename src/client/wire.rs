//! The control protocol as a backend speaks it. Owns the messages' JSON and the splitting of the
//! balancer's stream into lines; knows no socket.

use serde::Deserialize;
use serde_json::{Value, json};

use crate::cluster::{AskedCheck, Protocol};

/// Limit on the bytes that wait for their line end. A balancer's message is far shorter.
const LINE_BYTES_MAX: usize = 64 * 1024;

/// A backend as it registers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Offer {
    /// The service it joins, of [`Offer::protocol`] if that is given; without one, the built-in service
    /// of that protocol.
    pub service: Option<String>,
    pub protocol: Option<Protocol>,
    /// The port that the balancer connects to, on the host that registers.
    pub port: u16,
    /// Share of new sessions relative to other backends.
    pub weight: u16,
    /// Its name in status and logs.
    pub name: Option<String>,
    /// The group of its service that it joins, if the service has any.
    pub group: Option<String>,
    /// Whether each connection to it is to begin with a PROXY header, of version 2.
    pub proxy: bool,
    /// Whether it speaks HTTP/2, rather than HTTP/1.1.
    pub http2: bool,
    /// Whether it is to be reached by TLS, and the host that its certificate is for.
    pub tls: bool,
    pub tls_name: Option<String>,
    /// Whether the balancer may try the port with an empty connection.
    pub probe: bool,
    /// How the balancer is to check it.
    pub check: Option<AskedCheck>,
}

/// A message from the balancer. Unknown fields are ignored.
#[derive(Clone, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Said {
    pub cmd: Option<String>,
    pub ack: Option<String>,
    pub event: Option<String>,
    /// The service that an answer is about. Balancers without named services never say it.
    pub service: Option<String>,
    /// Why something failed.
    pub msg: Option<String>,
    /// The challenge of `{"cmd":"auth"}`.
    pub nonce: Option<String>,
    /// What a refused message would have needed.
    pub needs: Option<String>,
    /// What the balancer found odd about the message that it answers.
    pub warning: Option<String>,
    /// The check that was asked for, in the answer to `register`.
    pub check: Option<String>,
    /// How often the balancer will say hello, stated in its answer to `register`.
    pub interval_ms: Option<u64>,
    /// The other balancers of the cluster, stated in the answer to `register`.
    pub nodes: Vec<String>,
    /// Who has caused an event, if not the backend itself.
    pub by: Option<String>,
    /// Sessions of a backend that drains.
    pub left: Option<u64>,
    /// How long they may go on; absent too if they end by themselves.
    pub deadline_ms: Option<u64>,
    /// Sessions that were ended at the deadline.
    pub cut: Option<u64>,
    /// Sessions that an operator has ended.
    pub sessions: Option<u64>,
    pub weight: Option<u16>,
}

impl Offer {
    /// An offer to the built-in service of a protocol.
    pub fn to_built_in(protocol: Protocol, port: u16) -> Offer {
        Offer {
            service: None,
            protocol: Some(protocol),
            port,
            weight: 1,
            name: None,
            group: None,
            proxy: false,
            http2: false,
            tls: false,
            tls_name: None,
            probe: true,
            check: None,
        }
    }

    /// The message that joins.
    pub fn register(&self) -> String {
        let mut message = self.message("register");
        message["weight"] = json!(self.weight);
        if let Some(name) = &self.name {
            message["name"] = json!(name);
        }
        if let Some(group) = &self.group {
            message["group"] = json!(group);
        }
        if self.proxy {
            message["proxy"] = json!(2);
        }
        if self.http2 {
            message["http"] = json!(2);
        }
        if self.tls {
            message["tls"] = json!(true);
        }
        if let Some(name) = &self.tls_name {
            message["tls_name"] = json!(name);
        }
        if !self.probe {
            message["probe"] = json!(false);
        }
        if let Some(check) = &self.check {
            message["check"] = json!(check.to_string());
        }
        message.to_string()
    }

    /// The message that leaves.
    pub fn unregister(&self) -> String {
        self.message("unregister").to_string()
    }

    fn message(&self, cmd: &str) -> Value {
        let mut message = json!({ "cmd": cmd, "port": self.port });
        if let Some(protocol) = self.protocol {
            message["protocol"] = json!(protocol);
        }
        if let Some(service) = &self.service {
            message["service"] = json!(service);
        }
        message
    }

    /// Who it offers to serve: the service's name, or the protocol's.
    pub fn whom(&self) -> &str {
        let protocol = self.protocol.map_or("", Protocol::name);
        self.service.as_deref().unwrap_or(protocol)
    }

    /// The name under which the secret is proven.
    pub fn id(&self) -> String {
        let fallback = || format!("{}-{}", self.whom(), self.port);
        self.name.clone().unwrap_or_else(fallback)
    }
}

/// The answer to `{"cmd":"hello"}`.
pub const HELLO_ANSWER: &str = r#"{"ack":"hello"}"#;

/// The answer to a challenge.
pub fn proof(id: &str, mac: &str) -> String {
    json!({ "cmd": "auth", "id": id, "mac": mac }).to_string()
}

/// The balancer's stream, cut into messages.
#[derive(Default)]
pub struct Incoming {
    waiting: Vec<u8>,
}

impl Incoming {
    /// Takes what was received and returns every message that it completes.
    ///
    /// # Errors
    /// Half a sentence if the stream is not a balancer's.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Vec<Said>, String> {
        self.waiting.extend_from_slice(bytes);
        let mut messages = Vec::new();
        let mut start = 0;
        while let Some(length) = self.waiting[start..].iter().position(|byte| *byte == b'\n') {
            let line = self.waiting[start..start + length].trim_ascii();
            start += length + 1;
            if !line.is_empty() {
                let said = serde_json::from_slice(line).map_err(|_| not_a_balancer(line))?;
                messages.push(said);
            }
        }
        self.waiting.drain(..start);
        if self.waiting.len() > LINE_BYTES_MAX {
            return Err(not_a_balancer(&self.waiting));
        }
        Ok(messages)
    }
}

fn not_a_balancer(line: &[u8]) -> String {
    let start = String::from_utf8_lossy(&line[..line.len().min(60)]).escape_debug().to_string();
    format!("it does not speak as a balancer does but says \"{start}\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_out_however_the_stream_is_cut() {
        let stream =
            "{\"cmd\":\"hello\"}\n\r\n{\"ack\":\"failed\",\"msg\":\"no\",\"new\":[1]}\n{\"cmd\"";
        let hello = Said { cmd: Some("hello".into()), ..Said::default() };
        let failed = Said { ack: Some("failed".into()), msg: Some("no".into()), ..Said::default() };
        for cut in 0..stream.len() {
            let mut incoming = Incoming::default();
            let mut all = incoming.push(&stream.as_bytes()[..cut]).unwrap();
            all.extend(incoming.push(&stream.as_bytes()[cut..]).unwrap());
            assert_eq!(all, [hello.clone(), failed.clone()], "cut at {cut}");
        }
    }

    #[test]
    fn a_stranger_is_noticed() {
        let said = Incoming::default().push(b"HTTP/1.1 400 Bad Request\r\n").unwrap_err();
        assert_eq!(
            said,
            "it does not speak as a balancer does but says \"HTTP/1.1 400 Bad Request\""
        );
        let mut incoming = Incoming::default();
        let flood = vec![b'x'; 10_000];
        assert!((0..7).any(|_| incoming.push(&flood).is_err()), "a line without end is cut off");
    }

    #[test]
    fn a_backend_registers_with_what_it_is() {
        let mut offer = Offer { weight: 2, ..Offer::to_built_in(Protocol::Tcp, 9991) };
        let read = |text: String| serde_json::from_str::<Value>(&text).unwrap();
        assert_eq!(
            read(offer.register()),
            json!({"cmd": "register", "protocol": "tcp", "port": 9991, "weight": 2})
        );
        assert_eq!(offer.id(), "tcp-9991");
        offer.proxy = true;
        assert_eq!(read(offer.register())["proxy"], 2);
        assert_eq!(read(offer.register()).get("http"), None);
        offer.http2 = true;
        assert_eq!(read(offer.register())["http"], 2);
        assert_eq!(read(offer.register()).get("tls"), None);
        (offer.tls, offer.tls_name) = (true, Some("shop.internal".into()));
        let sealed = read(offer.register());
        assert_eq!((&sealed["tls"], &sealed["tls_name"]), (&json!(true), &json!("shop.internal")));
        offer.probe = false;
        assert_eq!(read(offer.register())["probe"], false);
        offer.name = Some("a \"b\"".into());
        assert_eq!(read(offer.register())["name"], "a \"b\"");
        assert_eq!(
            read(offer.unregister()),
            json!({"cmd": "unregister", "protocol": "tcp", "port": 9991})
        );
    }

    #[test]
    fn a_backend_of_a_named_service_may_leave_the_protocol_out() {
        let mut offer = Offer {
            service: Some("redis".into()),
            protocol: None,
            ..Offer::to_built_in(Protocol::Tcp, 6379)
        };
        let read = |text: String| serde_json::from_str::<Value>(&text).unwrap();
        assert_eq!(
            read(offer.register()),
            json!({"cmd": "register", "service": "redis", "port": 6379, "weight": 1})
        );
        let in_green = Offer { group: Some("green".into()), ..offer.clone() };
        assert_eq!(read(in_green.register())["group"], "green");
        assert_eq!(
            read(offer.unregister()),
            json!({"cmd": "unregister", "service": "redis", "port": 6379})
        );
        assert_eq!(offer.id(), "redis-6379");
        offer.protocol = Some(Protocol::Tcp);
        assert_eq!(read(offer.register())["protocol"], "tcp");
    }
}

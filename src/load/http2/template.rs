//! The request of a run as HTTP/2 has it: its fields, and what each stream of a connection adds to them.
//! Owns how an HTTP/1.1 head becomes these; the checks of that head are those of `web`.

use std::sync::Arc;

use http::header::{HOST, TE};
use http::{HeaderName, HeaderValue, Method, Uri};

use super::super::web::{self, IDENTITY};
use crate::http::Limits;
use crate::http::head::{self, RequestHead, Space, Target};

/// Fields about an HTTP/1.1 connection, which no message of HTTP/2 has (RFC 9113 8.2.2).
const CONNECTIONS_OWN: [&str; 5] =
    ["connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade"];

/// What every stream asks.
#[derive(Clone, Debug)]
pub struct Template {
    head: http::Request<()>,
    pub request: Arc<web::Request>,
}

impl Template {
    /// # Errors
    /// One sentence on what HTTP/2 cannot carry.
    pub fn new(request: &Arc<web::Request>, is_secured: bool) -> Result<Template, String> {
        let mut bytes = Vec::new();
        request.write_head(0, 0, &mut bytes);
        let mut space = Space::new();
        let read = head::request(&bytes, 0, &Limits::default(), &mut space);
        let Ok(Some(read)) = read else { return Err("this is not one request".to_owned()) };
        let head = translated(&read, if is_secured { "https" } else { "http" })?;
        Ok(Template { head, request: Arc::clone(request) })
    }

    /// The head of one request.
    pub fn head(&self, connection: u32, sequence: u64) -> http::Request<()> {
        let mut head = self.head.clone();
        let mut identity = Vec::new();
        web::write_identity(connection, sequence, &mut identity);
        if let Ok(mut value) = HeaderValue::try_from(identity) {
            // A value of one request only is not worth a place in the server's table (RFC 7541 7.1.3).
            value.set_sensitive(true);
            head.headers_mut().insert(HeaderName::from_static(IDENTITY), value);
        }
        head
    }
}

fn translated(read: &RequestHead<'_, '_>, scheme: &str) -> Result<http::Request<()>, String> {
    let refused = |what: &str| Err(format!("HTTP/2 cannot carry {what}"));
    let path = match read.target {
        Target::Origin(path) => path,
        Target::Absolute { .. } | Target::Asterisk => return refused("a path that is none"),
    };
    let uri = Uri::builder().scheme(scheme).authority(read.host.unwrap_or_default());
    let Ok(uri) = uri.path_and_query(path).build() else { return refused("this host and path") };
    let Ok(method) = Method::from_bytes(read.method.as_bytes()) else {
        return refused("this method");
    };
    let mut head = http::Request::new(());
    (*head.method_mut(), *head.uri_mut(), *head.version_mut()) =
        (method, uri, http::Version::HTTP_2);
    for (_, field) in read.fields.iter() {
        let name = HeaderName::from_bytes(field.name.as_bytes());
        let (Ok(name), Ok(value)) = (name, HeaderValue::from_bytes(field.value)) else {
            return refused(&format!("the header {}", field.name));
        };
        if CONNECTIONS_OWN.contains(&name.as_str()) || name == TE && value != "trailers" {
            return refused(&format!("the header {name}"));
        }
        // What it says is in the authority.
        if name != HOST && name.as_str() != IDENTITY {
            head.headers_mut().append(name, value);
        }
    }
    Ok(head)
}

#[cfg(test)]
mod tests {
    use super::super::super::web::{Payload, Request};
    use super::*;

    fn template(fields: &[&str], is_secured: bool) -> Result<Template, String> {
        let fields: Vec<String> = fields.iter().map(|&line| line.to_owned()).collect();
        let payload = Payload::Content(3);
        let request = Request::new("POST", "/count?a=b", "host:80", &fields, payload).unwrap();
        Template::new(&Arc::new(request), is_secured)
    }

    #[test]
    fn a_request_keeps_its_method_path_host_and_fields() {
        for (is_secured, scheme) in [(false, "http"), (true, "https")] {
            let template = template(&["accept: a", "Accept: b"], is_secured).unwrap();
            let head = template.head(0x2a, 7);
            assert_eq!(head.method(), "POST");
            assert_eq!(head.uri().to_string(), format!("{scheme}://host:80/count?a=b"));
            let values: Vec<_> = head.headers().get_all("accept").iter().collect();
            assert_eq!(values, ["a", "b"]);
            assert_eq!(head.headers()["content-length"], "3");
            assert_eq!(head.headers()[IDENTITY], "0000002a-0000000000000007");
            assert_eq!(head.headers().get("host"), None);
        }
        let named = template(&["host: other.example"], false).unwrap();
        assert_eq!(named.head(0, 0).uri().authority().unwrap(), "other.example");
    }

    #[test]
    fn what_is_about_an_http_1_connection_is_refused_in_words() {
        for field in ["connection: close", "upgrade: h2c", "te: gzip", "keep-alive: timeout=5"] {
            let (name, _) = field.split_once(':').unwrap();
            let said = template(&[field], false).unwrap_err();
            assert_eq!(said, format!("HTTP/2 cannot carry the header {name}"));
        }
        assert!(template(&["te: trailers"], false).is_ok());
    }
}

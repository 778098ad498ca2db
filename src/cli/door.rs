//! The admin door as a flag, for the commands that change something on a running balancer. Owns what its
//! refusals mean when the balancer is an older one.

use std::path::PathBuf;

use clap::Args;
use serde_json::Value;

use super::text::shown;
use super::{Failure, peer, token};
use crate::client::admin;
use crate::control::status::{BackendStatus, Changed, Status};

/// Where to ask for a change, and by which right.
#[derive(Args)]
pub struct Door {
    /// The balancer's admin door on this host, or the path of its admin.socket
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8084", value_parser = door)]
    pub admin: String,
    /// The balancer's [admin] token_file; over its socket, root needs none
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
}

/// Where the admin door is: like any peer, or the path of a unix socket.
pub fn door(text: &str) -> Result<String, String> {
    if admin::is_socket(text) && !text.contains("://") {
        return Ok(text.to_owned());
    }
    match peer(text) {
        Ok(door) if !admin::is_socket(&door) => Ok(door),
        _ => {
            Err("write HOST:PORT such as 127.0.0.1:8084, a port of this host, or the path of the \
                  balancer's admin.socket"
                .to_owned())
        }
    }
}

impl Door {
    /// Whether a token was given to ask with.
    pub fn has_token(&self) -> bool {
        self.token_file.is_some()
    }

    /// Requests a change.
    ///
    /// # Errors
    /// One sentence with the cure.
    pub async fn change(&self, path: &str) -> Result<Changed, String> {
        let token = token(self.token_file.as_deref()).map_err(|Failure(said)| said)?;
        admin::change(&self.admin, path, token.as_deref()).await
    }

    /// The status, and whether the balancer knows this program's verbs.
    ///
    /// # Errors
    /// One sentence with the cure.
    pub async fn look(&self) -> Result<(Status, bool), String> {
        let text = admin::status_text(&self.admin).await?;
        let value: Value = serde_json::from_slice(&text).unwrap_or_default();
        Ok((admin::read_status(&self.admin, &text)?, knows_drains(&value)))
    }

    /// What a balancer is told to get that does not know a verb.
    pub fn too_old(&self, verb: &str) -> String {
        format!(
            "the balancer at {} is older than `{verb}` and has changed nothing: update it",
            self.admin
        )
    }
}

/// Whether a balancer that describes itself so tells how each backend drains, even if none does.
fn knows_drains(status: &Value) -> bool {
    let backends = status["backends"].as_array();
    backends.is_some_and(|all| all.iter().all(|backend| backend.get("drain").is_some()))
}

/// A backend as the lines of these commands call it: `b3 web1 (shop 10.0.0.1:80)`.
pub fn called(backend: &BackendStatus) -> String {
    let name = backend.name.as_deref().map(|name| format!(" {}", shown(name))).unwrap_or_default();
    format!("{}{name} ({} {})", backend.id, backend.membership(), backend.address)
}

/// The path of a change to a backend.
pub fn path_of(backend: &BackendStatus, verb: &str) -> String {
    format!("/backends/{}/{verb}", backend.id)
}

/// An answer as a line of JSON.
pub fn json_line(changed: &Changed) -> String {
    serde_json::to_string(changed).expect("an answer is plain values") + "\n"
}

/// `1 session`, `12 sessions`.
pub fn sessions(count: u64) -> String {
    let unit = if count == 1 { "session" } else { "sessions" };
    format!("{} {unit}", super::table::grouped(count))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_door_is_an_address_or_the_path_of_a_socket() {
        for (text, expected) in [
            ("8084", "127.0.0.1:8084"),
            ("[::1]:8084", "[::1]:8084"),
            ("/run/lb/admin.sock", "/run/lb/admin.sock"),
            ("./admin.sock", "./admin.sock"),
        ] {
            assert_eq!(door(text).as_deref(), Ok(expected));
        }
        for text in ["", "lb", "http://127.0.0.1:8084"] {
            assert!(door(text).unwrap_err().contains("admin.socket"), "{text}");
        }
    }

    #[test]
    fn a_balancer_knows_the_verbs_if_it_tells_how_its_backends_drain() {
        assert!(knows_drains(&json!({"backends": [{"drain": {}}]})));
        assert!(!knows_drains(&json!({"backends": [{"id": "b1"}]})));
        assert!(knows_drains(&json!({"backends": []})), "it has nobody to tell of");
    }
}

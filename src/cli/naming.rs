//! Which backend is meant: what a person types is an id, a name or an address. Owns the match and, where it
//! is none or more than one, the sentence with what there is. Pure.

use std::net::{IpAddr, SocketAddr};

use clap::Args;

use super::door::{Door, called, sessions};
use super::trouble;
use crate::control::status::{BackendState, BackendStatus, Status};

/// Most backends listed in one sentence.
const LISTED_MAX: usize = 8;

/// Which backends a command is about, and how its answer is shown.
#[derive(Args)]
pub struct Among {
    /// Look among the backends of this service only
    #[arg(long, value_name = "NAME")]
    service: Option<String>,
    /// Take every backend that a name or address means, not only a single one
    #[arg(long)]
    all: bool,
    /// Print the balancer's answers as JSON, one a line
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub door: Door,
}

impl Among {
    pub fn scope(&self) -> Scope<'_> {
        Scope { service: self.service.as_deref(), all: self.all }
    }
}

/// What narrows or widens a match.
#[derive(Clone, Copy, Debug, Default)]
pub struct Scope<'a> {
    /// Only backends of this service.
    pub service: Option<&'a str>,
    /// More than one is fine.
    pub all: bool,
}

/// The registered backends meant by each of these words, each once.
///
/// # Errors
/// One sentence about the first word that means none, or one too many.
pub fn registered<'s>(
    status: &'s Status,
    words: &[String],
    scope: Scope<'_>,
) -> Result<Vec<&'s BackendStatus>, String> {
    if let Some(service) = scope.service {
        trouble::find(status, service)?;
    }
    let mut found: Vec<&BackendStatus> = Vec::new();
    for word in words {
        for backend in matching(status, word, scope)? {
            if backend.state == BackendState::Left {
                return Err(format!(
                    "{} has left already; its {} will end by themselves",
                    called(backend),
                    sessions(backend.sessions_active)
                ));
            }
            if !found.iter().any(|other| other.id == backend.id) {
                found.push(backend);
            }
        }
    }
    Ok(found)
}

/// The backend meant by a word; it may have left.
///
/// # Errors
/// As of [`registered`].
pub fn any<'s>(
    status: &'s Status,
    word: &str,
    scope: Scope<'_>,
) -> Result<&'s BackendStatus, String> {
    let found = matching(status, word, scope)?;
    Ok(found[0])
}

/// At least one.
fn matching<'s>(
    status: &'s Status,
    word: &str,
    scope: Scope<'_>,
) -> Result<Vec<&'s BackendStatus>, String> {
    let in_scope = |it: &&BackendStatus| scope.service.is_none_or(|name| it.service == name);
    let all: Vec<&BackendStatus> = status.backends.iter().filter(in_scope).collect();
    let meant = Meant::read(word);
    let matches = |left: bool| {
        let is = move |it: &&BackendStatus| (it.state == BackendState::Left) == left;
        all.iter().copied().filter(is).filter(|it| meant.is(it)).collect::<Vec<_>>()
    };
    // One that has left is meant only if nobody else can be.
    let mut found = matches(false);
    if found.is_empty() {
        found = matches(true);
    }
    match found.len() {
        0 => Err(unknown(word, &all, scope)),
        1 => Ok(found),
        _ if scope.all => Ok(found),
        _ => Err(ambiguous(word, &found)),
    }
}

/// A word, and what else it can be read as.
struct Meant<'a> {
    word: &'a str,
    address: Option<SocketAddr>,
    host: Option<IpAddr>,
}

impl Meant<'_> {
    fn read(word: &str) -> Meant<'_> {
        let bare = word.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(word);
        let canonical = |it: SocketAddr| SocketAddr::new(it.ip().to_canonical(), it.port());
        Meant {
            word,
            address: word.parse().ok().map(canonical),
            host: bare.parse().ok().map(|it: IpAddr| it.to_canonical()),
        }
    }

    fn is(&self, backend: &BackendStatus) -> bool {
        backend.id == self.word
            || backend.name.as_deref() == Some(self.word)
            || self.address == Some(backend.address)
            || self.host == Some(backend.address.ip())
    }
}

fn unknown(word: &str, all: &[&BackendStatus], scope: Scope<'_>) -> String {
    let service = scope.service.map(|name| format!(" of service {name}")).unwrap_or_default();
    let none = format!("there is no backend {word}{service}");
    if all.is_empty() {
        return format!("{none}, nor any other; `lb status` shows who is registered");
    }
    let words = all.iter().flat_map(|it| {
        let name = it.name.iter().cloned();
        name.chain([it.id.clone(), it.address.to_string()]).map(|word| (word, &*it.id))
    });
    let words: Vec<(String, &str)> = words.collect();
    let near = trouble::near(words.iter().map(|(word, id)| (&**word, *id)), word);
    let near: Vec<&BackendStatus> =
        near.iter().filter_map(|id| all.iter().copied().find(|it| it.id == *id)).collect();
    match near.as_slice() {
        [] => format!("{none}; `lb status` lists the {} that there are", all.len()),
        [one] => format!("{none}; the nearest of {} is {}", all.len(), called(one)),
        near => format!("{none}; the nearest of {} are: {}", all.len(), listed(near)),
    }
}

fn ambiguous(word: &str, found: &[&BackendStatus]) -> String {
    // Where an id is also somebody's name, it is no help.
    let by = if found.iter().any(|it| it.id == word) { "address" } else { "id" };
    format!(
        "{word} may be any of {} backends: {}; give the {by}, narrow it with --service NAME, or mean all of \
         them with --all",
        found.len(),
        listed(found)
    )
}

fn listed(backends: &[&BackendStatus]) -> String {
    let mut shown: Vec<String> = backends.iter().take(LISTED_MAX).map(|it| called(it)).collect();
    if backends.len() > LISTED_MAX {
        shown.push(format!("and {} more", backends.len() - LISTED_MAX));
    }
    shown.join(", ")
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::cli::status::tests::{backend, status};

    fn example() -> Status {
        let named = |id: &str, name: &str, address: &str, service: &str, state| BackendStatus {
            id: id.into(),
            name: (!name.is_empty()).then(|| name.into()),
            address: address.parse().unwrap(),
            service: service.into(),
            state,
            ..backend()
        };
        use BackendState::{Left, Serving};
        let backends = vec![
            named("b1", "web1", "10.0.0.1:80", "shop", Serving),
            named("b2", "web2", "10.0.0.2:80", "shop", Serving),
            named("b3", "web1", "10.0.0.1:53", "dns", Serving),
            named("b4", "", "[2001:db8::1]:80", "shop", Serving),
            named("b5", "b2", "10.0.0.9:80", "shop", Serving),
            named("b6", "web2", "10.0.0.2:80", "shop", Left),
            named("b7", "old", "10.0.0.7:80", "shop", Left),
        ];
        let service = |name| crate::cli::trouble::tests::service(name, 1, 0);
        Status { backends, services: vec![service("shop"), service("dns")], ..status() }
    }

    fn found(words: &[&str], service: Option<&str>, all: bool) -> Result<Vec<String>, String> {
        let words: Vec<String> = words.iter().map(|&word| word.into()).collect();
        let status = example();
        let found = registered(&status, &words, Scope { service, all })?;
        Ok(found.iter().map(|it| it.id.clone()).collect())
    }

    #[test]
    fn an_id_a_name_or_an_address_is_a_backend() {
        for (word, id) in [
            ("b1", "b1"),
            ("web2", "b2"),
            ("10.0.0.1:80", "b1"),
            ("[::ffff:10.0.0.1]:53", "b3"),
            ("10.0.0.2", "b2"),
            ("2001:db8::1", "b4"),
            ("[2001:db8::1]", "b4"),
            ("[2001:db8::1]:80", "b4"),
        ] {
            assert_eq!(found(&[word], None, false), Ok(vec![id.to_owned()]), "{word}");
        }
        let both = Ok(vec!["b1".to_owned(), "b4".to_owned()]);
        assert_eq!(found(&["b1", "10.0.0.1:80", "b4"], None, false), both, "each once");
        assert_eq!(found(&["web1"], Some("dns"), false), Ok(vec!["b3".to_owned()]));
        let all = Ok(vec!["b1".to_owned(), "b3".to_owned()]);
        assert_eq!(found(&["web1"], None, true), all);
    }

    #[test]
    fn what_is_none_or_more_than_one_is_answered_with_what_there_is() {
        for (word, service, words) in [
            (
                "web1",
                None,
                "may be any of 2 backends: b1 web1 (shop 10.0.0.1:80), b3 web1 (dns 10.0.0.1:53); give the id",
            ),
            ("10.0.0.1", None, "b3 web1 (dns 10.0.0.1:53)"),
            (
                "b2",
                None,
                "may be any of 2 backends: b2 web2 (shop 10.0.0.2:80), b5 b2 (shop 10.0.0.9:80); give the address",
            ),
            ("wbe2", None, "there is no backend wbe2; the nearest of 7 are: b2 web2"),
            ("10.0.0.1:8", None, "b1 web1 (shop 10.0.0.1:80)"),
            (":53", None, "b3 web1 (dns 10.0.0.1:53)"),
            ("zzzzzzzzzz", None, "`lb status` lists the 7 that there are"),
            ("web2", Some("dns"), "there is no backend web2 of service dns"),
            ("web1", Some("shp"), "there is no service shp; similar names among the 2 are: shop"),
            ("old", None, "b7 old (shop 10.0.0.7:80) has left already"),
        ] {
            let said = found(&[word], service, false).unwrap_err();
            assert!(said.contains(words) && !said.contains('\n'), "{word}: {said}");
        }
        let only = Status { backends: vec![example().backends.swap_remove(0)], ..status() };
        let said = registered(&only, &["wbe1".into()], Scope::default()).unwrap_err();
        assert!(said.contains("; the nearest of 1 is b1 web1 (shop 10.0.0.1:80)"), "{said}");
        let nobody = Status { backends: Vec::new(), ..status() };
        let said = registered(&nobody, &["b1".into()], Scope::default()).unwrap_err();
        assert!(said.contains("nor any other"), "{said}");
    }

    #[test]
    fn sessions_may_be_asked_for_of_one_that_has_left() {
        let status = example();
        assert_eq!(any(&status, "old", Scope::default()).unwrap().id, "b7");
        assert_eq!(any(&status, "b6", Scope::default()).unwrap().id, "b6");
    }
}

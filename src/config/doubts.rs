//! What settings may say and deserves a second thought all the same. Owns these sentences; what settings must
//! not say is up to `rules`.

use super::Config;
use super::rules::is_open;

/// What is allowed and deserves a second thought, each in one sentence.
pub fn warnings(config: &Config) -> Vec<String> {
    named(config).into_iter().map(|(_, doubt)| doubt).collect()
}

/// The same, each with what it is about.
pub fn named(config: &Config) -> Vec<(&'static str, String)> {
    let admin = open_admin(config).map(|doubt| ("admin door", doubt));
    admin.into_iter().chain(unverified(config).map(|doubt| ("backend TLS", doubt))).collect()
}

fn unverified(config: &Config) -> Option<String> {
    (!config.backend_tls.verifies).then(|| {
        "backend_tls.verify is \"off\", so whoever answers at a backend's address is taken for it, and reads \
         and changes what users send: name the authority in backend_tls.ca instead"
            .to_owned()
    })
}

fn open_admin(config: &Config) -> Option<String> {
    let door = config.listen.admin.filter(is_open)?;
    let changes = match config.admin.token_file {
        Some(_) => "; the tokens of admin.token_file guard changes only, and no reader needs one",
        None => "",
    };
    Some(format!(
        "listen.admin is {door}, where anybody who can reach it reads the status, the addresses of users and \
         backends and the metrics{changes}: keep it on 127.0.0.1 and reach it with `ssh -L`, or let a \
         firewall choose who may"
    ))
}

#[cfg(test)]
mod tests {
    use super::super::file;
    use super::*;

    #[test]
    fn backends_that_nobody_verifies_deserve_a_warning() {
        let warned = |text: &str| warnings(&file::read("f", text).unwrap());
        assert!(warned("backend_tls.verify = \"full\"").is_empty());
        let told = warned("backend_tls.verify = \"off\"").concat();
        assert!(told.starts_with("backend_tls.verify is \"off\""), "{told}");
    }

    #[test]
    fn an_admin_door_that_other_hosts_can_reach_deserves_a_warning_with_tokens_too() {
        let warned = |admin: &str, tokens: &str| {
            let config = file::read("f", &format!("listen.admin = \"{admin}\"\n{tokens}")).unwrap();
            warnings(&config).concat()
        };
        const TOKENS: &str = "admin.token_file = \"tokens\"";
        for closed in ["off", "127.0.0.1:8084", "127.9.9.9:1", "[::1]:8084", "[::ffff:127.0.0.1]:1"]
        {
            assert_eq!(warned(closed, ""), "", "{closed}");
            assert_eq!(warned(closed, TOKENS), "", "{closed}");
        }
        for open in ["8084", "0.0.0.0:8084", "[::]:8084", "192.168.1.5:8084", "[2001:db8::1]:8084"]
        {
            let without = warned(open, "");
            let told =
                without.starts_with("listen.admin is ") && without.contains("keep it on 127.0.0.1");
            assert!(told && !without.contains("tokens"), "{open}: {without}");
            assert!(warned(open, TOKENS).contains("guard changes only"), "{open}");
        }
    }
}

//! The certificates in use as operators see them, and when their files are looked at. Owns how many days before
//! its end a certificate is spoken of, and what counts as a change of a file; reading them is up to `reload`.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::base::time::Now;
use crate::cluster::Snapshot;
use crate::tls::clients::Authorities;
use crate::tls::keys::{Identity, days};

/// A certificate that ends within these days is spoken of wherever an operator looks.
pub const DAYS_MIN: i64 = 21;
/// How often the files are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(60);
/// How often the log speaks of a certificate that ends soon.
const WARN_EVERY: Duration = Duration::from_secs(24 * 60 * 60);

/// One certificate.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CertificateStatus {
    /// The hosts that it is for.
    pub names: Vec<String>,
    /// Where it was read from.
    pub file: PathBuf,
    /// The kind of its key.
    pub key: String,
    /// When it ends, in milliseconds since 1970.
    pub not_after_unix_ms: i64,
    /// Whole days until then; negative once it has ended.
    pub days_left: i64,
}

impl CertificateStatus {
    /// What the certificate is as of `now`, in seconds of Unix time.
    pub fn of(identity: &Identity, now: i64) -> CertificateStatus {
        CertificateStatus {
            names: identity.names.clone(),
            file: identity.files.certificate.clone(),
            key: identity.kind.to_string(),
            not_after_unix_ms: identity.not_after.saturating_mul(1000),
            days_left: identity.days_left(now),
        }
    }

    /// Whether it ends soon.
    pub fn is_due(&self) -> bool {
        self.days_left < DAYS_MIN
    }

    /// The first of its names, or its file if it has none.
    pub fn name(&self) -> String {
        self.names.first().cloned().unwrap_or_else(|| self.file.display().to_string())
    }

    /// How long it has, as it follows its name in a sentence.
    pub fn remaining(&self) -> String {
        remaining(self.days_left)
    }
}

/// How long something has that ends in so many days, as it follows its name in a sentence.
pub fn remaining(days: i64) -> String {
    match days {
        ..0 => "has ended".to_owned(),
        0 => "ends today".to_owned(),
        1 => "ends in 1 day".to_owned(),
        days => format!("ends in {days} days"),
    }
}

/// Those in use, in the order of the file.
pub fn all(snapshot: &Snapshot, now: Now) -> Vec<CertificateStatus> {
    let now = now.unix_seconds();
    let identities = snapshot.tls.agreed.iter().flat_map(|agreed| agreed.identities.iter());
    identities.map(|identity| CertificateStatus::of(identity, now)).collect()
}

/// Those who judge the certificates of users, by policy.
pub fn authorities(snapshot: &Snapshot) -> &[Authorities] {
    let agreed = snapshot.tls.agreed.as_ref();
    agreed.map_or(&[], |agreed| agreed.identities.authorities())
}

/// Says in the log which certificates end soon, and which lists of revoked ones are out of date.
pub fn warn(snapshot: &Snapshot, now: Now) {
    for one in all(snapshot, now).iter().filter(|it| it.is_due()) {
        let (names, days, file) = (one.names.join(" "), one.days_left, one.file.display());
        warn!(%names, days, %file, "certificate ends soon");
    }
    let now = now.unix_seconds();
    for authorities in authorities(snapshot) {
        let (file, days) = (authorities.policy.ca.display(), days(authorities.not_after, now));
        if days < DAYS_MIN {
            warn!(%file, days, "an authority for the certificates of users ends soon");
        }
        for list in authorities.lists.iter().filter(|list| list.is_overdue(now)) {
            let file = list.file.display();
            warn!(%file, "list of revoked certificates is out of date");
        }
    }
}

/// What tells a file from what it was: when its content was last changed, when anything about it was (who may
/// read it, or which file has its name), its number and its length.
type Stamp = Option<(SystemTime, (i64, i64), u64, u64)>;

/// The look at the files.
pub struct Watch {
    seen: Vec<(PathBuf, Stamp)>,
    look_at: Now,
    warn_at: Now,
}

impl Watch {
    /// The files as they are.
    pub fn new(files: &[PathBuf], now: Now) -> Watch {
        Watch { seen: stamps(files), look_at: now.plus(LOOK_EVERY), warn_at: now }
    }

    /// Whether it is time to look.
    pub fn looks(&mut self, now: Now) -> bool {
        let is_time = now >= self.look_at;
        if is_time {
            self.look_at = now.plus(LOOK_EVERY);
        }
        is_time
    }

    /// Whether any of them has changed since the last look.
    pub fn finds_change(&mut self, files: &[PathBuf]) -> bool {
        let before = std::mem::replace(&mut self.seen, stamps(files));
        before != self.seen
    }

    /// Whether it is time to speak of those that end soon: once a day, and when they have been read.
    pub fn warns(&mut self, now: Now) -> bool {
        let is_time = now >= self.warn_at;
        if is_time {
            self.warn_at = now.plus(WARN_EVERY);
        }
        is_time
    }

    /// They have been read again.
    pub fn renewed(&mut self, now: Now) {
        self.warn_at = now;
    }
}

fn stamps(files: &[PathBuf]) -> Vec<(PathBuf, Stamp)> {
    files.iter().map(|path| (path.clone(), stamp(path))).collect()
}

fn stamp(path: &Path) -> Stamp {
    let about = fs::metadata(path).ok()?;
    let changed = (about.ctime(), about.ctime_nsec());
    Some((about.modified().ok()?, changed, about.ino(), about.len()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn status(days_left: i64) -> CertificateStatus {
        CertificateStatus {
            names: vec!["a.example".into(), "b.example".into()],
            file: "a.pem".into(),
            key: "RSA-2048".into(),
            not_after_unix_ms: 0,
            days_left,
        }
    }

    #[test]
    fn a_certificate_is_spoken_of_three_weeks_before_its_end() {
        for (days, due, said) in [
            (22, false, "ends in 22 days"),
            (21, false, "ends in 21 days"),
            (20, true, "ends in 20 days"),
            (1, true, "ends in 1 day"),
            (0, true, "ends today"),
            (-1, true, "has ended"),
        ] {
            let status = status(days);
            assert_eq!((status.is_due(), status.remaining().as_str()), (due, said));
        }
        assert_eq!(status(1).name(), "a.example");
        assert_eq!(CertificateStatus { names: Vec::new(), ..status(1) }.name(), "a.pem");
    }

    #[test]
    fn files_are_looked_at_once_a_minute() {
        let at = |seconds: u64| Now::from_nanos(seconds * 1_000_000_000);
        let mut watch = Watch::new(&[], at(0));
        let looks = [0, 59, 60, 61, 119, 120].map(|second| watch.looks(at(second)));
        assert_eq!(looks, [false, false, true, false, false, true]);
    }

    #[test]
    fn a_file_that_comes_goes_or_changes_is_noticed_once() {
        let folder = std::env::temp_dir().join(format!("lb-watch-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let at = |name: &str| folder.join(name);
        let files = [at("a.pem"), at("a.key")];
        fs::write(at("a.pem"), "one").unwrap();
        let mut watch = Watch::new(&files, Now::default());
        assert!(!watch.finds_change(&files));
        fs::write(at("a.pem"), "another").unwrap();
        assert!(watch.finds_change(&files) && !watch.finds_change(&files));
        fs::write(at("a.key"), "key").unwrap();
        assert!(watch.finds_change(&files) && !watch.finds_change(&files));
        // Another file of the same length and age, and one that may be read now.
        let age = fs::metadata(at("a.key")).unwrap().modified().unwrap();
        fs::write(at("b.key"), "yek").unwrap();
        fs::File::options().write(true).open(at("b.key")).unwrap().set_modified(age).unwrap();
        fs::rename(at("b.key"), at("a.key")).unwrap();
        assert!(watch.finds_change(&files) && !watch.finds_change(&files));
        fs::set_permissions(at("a.key"), fs::Permissions::from_mode(0o600)).unwrap();
        assert!(watch.finds_change(&files) && !watch.finds_change(&files));
        fs::remove_file(at("a.key")).unwrap();
        assert!(watch.finds_change(&files) && !watch.finds_change(&files));
        fs::remove_dir_all(&folder).unwrap();
    }
}

//! Files of ticket keys: one that an operator writes for several balancers, and one in which a balancer keeps
//! its own over a restart. Owns their syntax, and who may read and write them.

use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::{KEYS_MAX, Key, SHARED_MIN, line_of};

/// The most bytes of a file.
const FILE_BYTES_MAX: u64 = 16 * 1024;
/// A key of a file has this many bytes before they are encoded, as those of other balancers have: 48 or 80.
const KEY_BYTES: [usize; 2] = [48, 80];

/// The keys of an operator's file, each a line in Base64.
///
/// # Errors
/// One sentence that names the file and the cure.
pub fn shared(path: &Path) -> Result<Vec<Arc<Key>>, String> {
    let shown = path.display();
    let text = read(path).map_err(|error| format!("cannot read {shown}: {error}"))?;
    let is_open = fs::metadata(path).is_ok_and(|it| it.permissions().mode() & 0o027 != 0);
    if is_open {
        return Err(format!(
            "others may read or change the ticket keys in {shown}, and so listen in: run \
             `chmod 600 {shown}`"
        ));
    }
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    if !(SHARED_MIN..=KEYS_MAX).contains(&lines.len()) {
        return Err(format!(
            "{shown} holds {} keys for tickets, not {SHARED_MIN} to {KEYS_MAX}: write one a line, the \
             oldest first, for example with `openssl rand -base64 48`; the last but one seals, and the \
             last is the next",
            lines.len()
        ));
    }
    let key = |(number, line): (usize, &&str)| {
        let bytes = STANDARD.decode(line).ok().filter(|it| KEY_BYTES.contains(&it.len()));
        let key = bytes.and_then(|bytes| Key::of(&bytes, 0)).map(Arc::new);
        key.ok_or_else(|| {
            format!(
                "line {} of {shown} is no key for tickets: make one with `openssl rand -base64 48`",
                number + 1
            )
        })
    };
    lines.iter().enumerate().map(key).collect()
}

/// What an earlier process has kept. Nothing if the file could have been somebody else's: whoever knows a key
/// can read what its tickets were given for.
pub fn kept(path: &Path) -> Option<Vec<Arc<Key>>> {
    let about = fs::symlink_metadata(path).ok()?;
    let own = nix::unistd::geteuid().as_raw();
    let is_ours = about.is_file() && about.uid() == own && about.mode() & 0o077 == 0;
    let text = is_ours.then(|| read(path).ok())??;
    let key = |line: &str| {
        let (made, key) = line.split_once(' ')?;
        Key::of(&STANDARD.decode(key).ok()?, made.parse().ok()?).map(Arc::new)
    };
    let keys = text.lines().map(key).collect::<Option<Vec<_>>>()?;
    (keys.len() <= KEYS_MAX).then_some(keys)
}

/// Keeps keys in place of those that are there. The file is whole at any moment.
///
/// # Errors
/// One sentence: it cannot be written.
pub fn keep(path: &Path, keys: &[Arc<Key>]) -> Result<(), String> {
    let lines = keys.iter().map(|key| format!("{} {}\n", key.made, line_of(key)));
    let text: String = lines.collect();
    let next = path.with_extension("next");
    // One that was left behind half written.
    let _ = fs::remove_file(&next);
    let written = || {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&next)?;
        file.write_all(text.as_bytes())?;
        fs::rename(&next, path)
    };
    written().map_err(|error| {
        format!("the keys for TLS tickets cannot be kept in {}: {error}", path.display())
    })
}

fn read(path: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    fs::File::open(path)?.take(FILE_BYTES_MAX).read_to_string(&mut text)?;
    Ok(text)
}

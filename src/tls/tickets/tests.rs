//! Tests of `tls::tickets`.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::*;

const HOUR: i64 = 60 * 60;
const START: i64 = 1_800_000_000;

fn ring(now: i64) -> Arc<Keyring> {
    Arc::new(Keyring::own(None, now).unwrap())
}

fn policy(word: &str) -> Binding {
    Binding::of([word.as_bytes()])
}

fn sealer(ring: &Arc<Keyring>) -> Arc<dyn ProducesTickets> {
    ring.sealer(policy("a"))
}

/// A file that is gone with it.
struct File(PathBuf);

impl File {
    fn new(test: &str) -> File {
        let name = format!("lb-tickets-{test}-{}", std::process::id());
        File(std::env::temp_dir().join(name))
    }

    fn write(&self, text: &str) {
        fs::write(&self.0, text).unwrap();
        self.set_mode(0o600);
    }

    fn set_mode(&self, mode: u32) {
        fs::set_permissions(&self.0, fs::Permissions::from_mode(mode)).unwrap();
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

#[test]
fn a_ticket_opens_under_its_own_policy_and_no_other() {
    let ring = ring(START);
    let ticket = sealer(&ring).encrypt(b"state").unwrap();
    assert_eq!(sealer(&ring).decrypt(&ticket).as_deref(), Some(&b"state"[..]));
    assert_eq!(ring.sealer(policy("b")).decrypt(&ticket), None);
    let words = |words: &[&'static str]| Binding::of(words.iter().map(|word| word.as_bytes()));
    assert_ne!(words(&["ab", "c"]), words(&["a", "bc"]));
    assert_ne!(words(&["a"]), words(&["a", ""]));
    // Nothing of the state can be read in it, and no two are alike.
    assert!(!ticket.windows(5).any(|part| part == b"state"));
    assert_ne!(sealer(&ring).encrypt(b"state").unwrap(), ticket);
}

#[test]
fn garbled_tickets_open_nowhere() {
    let ring = ring(START);
    let sealer = sealer(&ring);
    let ticket = sealer.encrypt(&[7; 100]).unwrap();
    assert_eq!(ticket.len(), 16 + 12 + 100 + 16);
    for bit in 0..ticket.len() * 8 {
        let mut other = ticket.clone();
        other[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(sealer.decrypt(&other), None, "bit {bit}");
    }
    for length in 0..ticket.len() {
        assert_eq!(sealer.decrypt(&ticket[..length]), None, "{length} bytes");
    }
    assert_eq!(sealer.decrypt(&[&ticket[..], b"x"].concat()), None);
}

#[test]
fn tickets_are_bounded() {
    let ring = ring(START);
    let sealer = sealer(&ring);
    let most = TICKET_BYTES_MAX - NAME_BYTES - NONCE_BYTES - TAG_BYTES;
    let ticket = sealer.encrypt(&vec![1; most]).unwrap();
    assert_eq!((ticket.len(), sealer.decrypt(&ticket).unwrap().len()), (TICKET_BYTES_MAX, most));
    assert_eq!(sealer.encrypt(&vec![1; most + 1]), None);
    assert_eq!(sealer.decrypt(&vec![1; TICKET_BYTES_MAX + 1]), None);
}

#[test]
fn a_key_seals_for_six_hours_and_opens_for_twelve() {
    let first = ring(START);
    let ticket = sealer(&first).encrypt(b"state").unwrap();
    assert!(first.turned(START + 6 * HOUR - 1).unwrap().is_none());
    let second = Arc::new(first.turned(START + 6 * HOUR).unwrap().unwrap());
    let newer = sealer(&second).encrypt(b"state").unwrap();
    assert_eq!(sealer(&first).decrypt(&newer), None, "it is sealed with another key");
    assert!(sealer(&second).decrypt(&ticket).is_some());
    assert!(second.turned(START + 12 * HOUR - 1).unwrap().is_none());
    let third = Arc::new(second.turned(START + 12 * HOUR).unwrap().unwrap());
    assert_eq!((sealer(&third).decrypt(&ticket), third.count()), (None, 2));
    assert!(sealer(&third).decrypt(&newer).is_some());
    // Whoever was told to keep a ticket for so long can use it for so long.
    assert_eq!(sealer(&third).lifetime(), 6 * 60 * 60);
    // After a long sleep nothing is left.
    let late = Arc::new(third.turned(START + 100 * HOUR).unwrap().unwrap());
    assert_eq!((sealer(&late).decrypt(&newer), late.count()), (None, 1));
}

#[test]
fn a_clock_that_is_put_back_neither_loses_keys_nor_keeps_them_for_ever() {
    let first = ring(START);
    assert!(first.turned(START - 60).unwrap().is_none());
    let other = first.turned(START - 7 * HOUR).unwrap().unwrap();
    assert_eq!(other.count(), 1, "it would seal for thirteen hours");
    assert!(!Arc::ptr_eq(&other.keys[0], &first.keys[0]));
}

#[test]
fn own_keys_outlast_a_restart_and_no_other_user_reads_them() {
    let file = File::new("kept");
    let first = Arc::new(Keyring::own(Some(&file.0), START).unwrap());
    first.keep().unwrap();
    assert_eq!(fs::metadata(&file.0).unwrap().permissions().mode() & 0o777, 0o600);
    let ticket = sealer(&first).encrypt(b"state").unwrap();
    let again = |now| Arc::new(Keyring::own(Some(&file.0), now).unwrap());
    assert!(sealer(&again(START + HOUR)).decrypt(&ticket).is_some());
    let later = again(START + 7 * HOUR);
    assert!(sealer(&later).decrypt(&ticket).is_some());
    assert_eq!(later.count(), 2, "the old one seals no more");
    assert_eq!(sealer(&again(START + 12 * HOUR)).decrypt(&ticket), None);
    // A file in which somebody else could have read or written is not believed.
    for mode in [0o640, 0o604, 0o660] {
        file.set_mode(mode);
        assert_eq!(sealer(&again(START)).decrypt(&ticket), None, "{mode:o}");
    }
    file.set_mode(0o600);
    assert!(sealer(&again(START)).decrypt(&ticket).is_some());
    for garbled in ["", "x", "1 x\n", "x AAAA\n", "1 AAAA\n"] {
        file.write(garbled);
        assert_eq!(again(START).count(), 1, "{garbled:?}");
    }
}

#[test]
fn of_shared_keys_the_last_but_one_seals_and_all_open() {
    let file = File::new("shared");
    let line = |byte: u8, length| STANDARD.encode(vec![byte; length]);
    let lines = [line(1, 48), line(2, 80), line(3, 48)];
    let shared = || Keyring::shared(&file.0).map(Arc::new);
    file.write(&lines[..2].join("\n"));
    let before = sealer(&shared().unwrap()).encrypt(b"state").unwrap();
    assert_eq!(before[..16], [1; 16]);
    file.write(&format!("{}\n\n", lines.join("\n")));
    let after = shared().unwrap();
    assert_eq!((after.count(), after.is_own()), (3, false));
    let ticket = sealer(&after).encrypt(b"state").unwrap();
    assert_eq!(ticket[..16], [2; 16]);
    assert!(sealer(&after).decrypt(&before).is_some());
    // Another host has the same file.
    assert!(sealer(&shared().unwrap()).decrypt(&ticket).is_some());
    assert!(after.turned(START + 100 * HOUR).unwrap().is_none(), "they are the operator's");
}

#[test]
fn what_is_wrong_with_a_file_of_keys_is_said_with_the_cure() {
    let file = File::new("wrong");
    let shown = file.0.display().to_string();
    let said = || Keyring::shared(&file.0).unwrap_err();
    assert!(said().starts_with(&format!("cannot read {shown}: No such file")));
    let key = STANDARD.encode([1; 48]);
    file.write(&key);
    assert!(said().starts_with(&format!("{shown} holds 1 keys for tickets, not 2 to 16: ")));
    file.write(&[key.as_str(); 17].join("\n"));
    assert!(said().contains("holds 17 keys"));
    file.write(&format!("{key}\n{}\n", STANDARD.encode([1; 32])));
    assert!(said().starts_with(&format!("line 2 of {shown} is no key for tickets: make one")));
    file.write(&format!("{key}\n{key}\n"));
    assert!(Keyring::shared(&file.0).is_ok());
    file.set_mode(0o644);
    assert!(said().ends_with(&format!("run `chmod 600 {shown}`")));
}

//! Users who keep to the letter of TLS and cost what they can.

use rustls::crypto::cipher::OutboundPlainMessage;
use rustls::{ConnectionTrafficSecrets, ContentType, ProtocolVersion};

use super::*;

/// Seals a handshake message in pieces, each in a record of its own.
fn handshake_records(user: Connection, message: &[u8], piece: usize) -> Vec<u8> {
    let secrets = user.dangerous_extract_secrets().unwrap();
    let (first, secrets) = secrets.tx;
    let ConnectionTrafficSecrets::Aes128Gcm { key, iv } = secrets else {
        panic!("another cipher was agreed");
    };
    let suite = aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256.tls13().unwrap();
    let mut sealer = suite.aead_alg.encrypter(key, iv);
    let records = message.chunks(piece).zip(first..).map(|(piece, number)| {
        let plain = OutboundPlainMessage {
            typ: ContentType::Handshake,
            version: ProtocolVersion::TLSv1_2,
            payload: piece.into(),
        };
        sealer.encrypt(plain, number).unwrap().encode()
    });
    records.flatten().collect()
}

#[test]
fn a_message_in_pieces_that_never_ends_ends_the_connection() {
    let (identities, pem) = identities_and_pem();
    let mut user = Connection::Client(client(pem, &[&rustls::version::TLS13]));
    let mut up = Vec::new();
    let mut engine = shake_hands(&mut user, identities, &mut up);
    engine.take(&mut up.as_slice(), Now::default()).unwrap();
    // A NewSessionTicket of 60,000 bytes.
    let mut message = vec![0; 60_000];
    message[..4].copy_from_slice(&[4, 0, 0xea, 0x5c]);
    let records = handshake_records(user, &message[..59_000], 8);
    for some in records.chunks(4096) {
        let mut rest = some;
        match engine.take(&mut rest, Now::default()) {
            Ok(()) => assert!(rest.is_empty(), "nothing to read, and no room"),
            Err(fault) => return assert_eq!(fault, Fault::Protocol),
        }
    }
    panic!("it was taken");
}

/// Changes of keys that an engine takes, each followed by so many bytes of data, one every so often.
fn key_updates_taken(data: usize, every: Duration) -> usize {
    let (identities, pem) = identities_and_pem();
    let mut user = Connection::Client(client(pem, &[&rustls::version::TLS13]));
    let mut up = Vec::new();
    let mut engine = shake_hands(&mut user, identities, &mut up);
    let mut now = Now::from_nanos(1 << 40);
    engine.take(&mut up.as_slice(), now).unwrap();
    for number in 0..1000 {
        up.clear();
        user.refresh_traffic_keys().unwrap();
        user.writer().write_all(&vec![b'x'; data]).unwrap();
        while user.wants_write() {
            user.write_tls(&mut up).unwrap();
        }
        for part in up.chunks(20) {
            if engine.take(&mut &*part, now).is_err() {
                assert!(!engine.why().is_empty());
                return number;
            }
        }
        assert_eq!(engine.plaintext().len(), data);
        engine.consume(data);
        now = now.plus(every);
    }
    1000
}

#[test]
fn keys_may_be_changed_now_and_then_and_not_without_end() {
    let ms = Duration::from_millis;
    assert_eq!(key_updates_taken(0, ms(100)), 32, "without data between");
    assert_eq!(key_updates_taken(1, ms(0)), 100, "a hundred at once");
    assert_eq!(key_updates_taken(1, ms(10)), 1000, "a hundred a second");
    assert_eq!(key_updates_taken(1, ms(5)), 199, "two hundred a second");
}

//! An authority that vouches for users of TLS, with those below it and its lists of whom it has revoked.
#![allow(dead_code, reason = "each test needs a part of it")]

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertificateRevocationListParams,
    CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose,
    RevokedCertParams, SerialNumber, date_time_ymd,
};

pub struct Authority(CertifiedIssuer<'static, KeyPair>);

/// A certificate and its key.
pub struct Client {
    pub certificate: Certificate,
    pub key: KeyPair,
}

fn params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params
}

fn above_others(name: &str) -> CertificateParams {
    let mut params = params(name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

impl Authority {
    pub fn new(name: &str) -> Authority {
        let key = KeyPair::generate().unwrap();
        Authority(CertifiedIssuer::self_signed(above_others(name), key).unwrap())
    }

    /// One below it.
    pub fn below(&self, name: &str) -> Authority {
        let key = KeyPair::generate().unwrap();
        let mut params = above_others(name);
        params.serial_number = Some(900.into());
        Authority(CertifiedIssuer::signed_by(params, key, &self.0).unwrap())
    }

    pub fn pem(&self) -> String {
        self.0.pem()
    }

    pub fn der(&self) -> &[u8] {
        self.0.der()
    }

    /// A certificate of this number for a user.
    pub fn client(&self, serial: u64) -> Client {
        self.client_with(serial, |_| {})
    }

    /// One that ended long ago.
    pub fn former_client(&self, serial: u64) -> Client {
        self.client_with(serial, |params| {
            (params.not_before, params.not_after) =
                (date_time_ymd(2001, 1, 1), date_time_ymd(2002, 1, 1));
        })
    }

    pub fn client_with(&self, serial: u64, change: impl FnOnce(&mut CertificateParams)) -> Client {
        let mut params = params("a user");
        params.serial_number = Some(serial.into());
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        Client { certificate, key }
    }

    /// The list of the numbers that it has revoked, in PEM; a newer one is due in that year.
    pub fn revokes(&self, serials: &[u64], due: i32) -> String {
        let revoked = serials.iter().map(|serial| RevokedCertParams {
            serial_number: (*serial).into(),
            revocation_time: date_time_ymd(2020, 1, 1),
            reason_code: None,
            invalidity_date: None,
        });
        let params = CertificateRevocationListParams {
            this_update: date_time_ymd(2020, 1, 1),
            next_update: date_time_ymd(due, 1, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: revoked.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&self.0).unwrap().pem().unwrap()
    }
}

impl Client {
    pub fn pem(&self) -> String {
        self.certificate.pem()
    }

    pub fn der(&self) -> &[u8] {
        self.certificate.der()
    }
}

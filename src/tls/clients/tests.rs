//! Tests of `tls::clients`.

use std::fs;

use super::super::keys::provider;
use super::*;

#[path = "../../../tests/common/authority.rs"]
mod authority;
use authority::Authority;

/// A folder that is gone with it.
struct Folder(PathBuf);

impl Folder {
    fn new(test: &str) -> Folder {
        let at = std::env::temp_dir().join(format!("lb-clients-{test}-{}", std::process::id()));
        fs::create_dir_all(&at).unwrap();
        Folder(at)
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let at = self.0.join(name);
        fs::write(&at, content).unwrap();
        at
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn policy(ca: PathBuf, crl: Vec<PathBuf>) -> Arc<ClientPolicy> {
    Arc::new(ClientPolicy { is_required: true, ca, crl, tells_chain: false })
}

fn read_in(ca: PathBuf, crl: Vec<PathBuf>) -> Result<Authorities, String> {
    Authorities::read(&policy(ca, crl), provider())
}

/// Those who judge the certificates of users, who are required to have one.
pub fn required(test: &str) -> Authorities {
    let folder = Folder::new(test);
    let ca = folder.write("ca.pem", Authority::new("one").pem());
    read_in(ca, Vec::new()).unwrap()
}

#[test]
fn a_certificate_is_told_as_a_structured_field() {
    let [own, middle, top] =
        [[1, 2, 3], [4, 5, 6], [251, 255, 254]].map(|bytes| CertificateDer::from(bytes.to_vec()));
    let told = |chain: &[CertificateDer<'_>], tells_chain| {
        String::from_utf8(fields(chain, tells_chain).into_vec()).unwrap()
    };
    let all = [own, middle, top];
    assert_eq!(told(&all, false), "Client-Cert: :AQID:\r\n");
    let whole = "Client-Cert: :AQID:\r\nClient-Cert-Chain: :BAUG:, :+//+:\r\n";
    assert_eq!(told(&all, true), whole);
    assert_eq!(told(&all[..1], true), "Client-Cert: :AQID:\r\n");
    assert_eq!(told(&[], true), "");
}

#[test]
fn authorities_tell_how_many_they_are_and_what_they_have_revoked() {
    let folder = Folder::new("read");
    let [one, other] = ["one", "other"].map(Authority::new);
    let (gone, good) = (one.client(7), one.client(8));
    let ca = folder.write("ca.pem", one.pem() + &other.pem());
    let lists = one.revokes(&[7], 2040) + &other.revokes(&[], 2021);
    let pem = folder.write("lists.pem", &lists);
    let der = CertificateRevocationListDer::from_pem_slice(lists.as_bytes()).unwrap();
    let der = folder.write("one.crl", der.as_ref());
    let read = read_in(ca, vec![pem.clone(), der.clone()]).unwrap();
    assert_eq!(read.count, 2);
    let [year_2040, year_2021] = [2_208_988_800, 1_609_459_200];
    let list = |file, next_update| List { file, revoked: 1, next_update: Some(next_update) };
    assert_eq!(read.lists, [list(pem, year_2021), list(der, year_2040)]);
    let overdue = |now| [0, 1].map(|at: usize| read.lists[at].is_overdue(now));
    assert_eq!([overdue(year_2021), overdue(year_2021 + 1)], [[false, false], [true, false]]);
    let judge = |client: &authority::Client, above: &[CertificateDer<'_>]| {
        let own = CertificateDer::from(client.der().to_vec());
        read.verifier().verify_client_cert(&own, above, UnixTime::now()).map(|_| ())
    };
    // The list that is out of date still counts.
    assert_eq!(judge(&good, &[]), Ok(()));
    assert_eq!(judge(&gone, &[]), Err(CertificateError::Revoked.into()));
    assert_eq!(judge(&other.client(7), &[]), Ok(()));
    let stranger = Authority::new("stranger").client(1);
    assert_eq!(judge(&stranger, &[]), Err(CertificateError::UnknownIssuer.into()));
    let many = |many| vec![CertificateDer::from(other.der().to_vec()); many];
    assert_eq!(judge(&good, &many(INTERMEDIATES_MAX)), Ok(()));
    let too_much = Err(CertificateError::ApplicationVerificationFailure.into());
    assert_eq!(judge(&good, &many(INTERMEDIATES_MAX + 1)), too_much);
    assert_eq!(judge(&good, &[CertificateDer::from(vec![0; SHOWN_BYTES_MAX])]), too_much);
}

#[test]
fn an_authority_without_a_list_beside_others_that_have_one_lets_nobody_in() {
    let folder = Folder::new("unknown");
    let [one, other] = ["one", "other"].map(Authority::new);
    let ca = folder.write("ca.pem", one.pem() + &other.pem());
    let list = folder.write("one.pem", one.revokes(&[], 2040));
    let read = read_in(ca, vec![list]).unwrap();
    let judge = |client: authority::Client| {
        let own = CertificateDer::from(client.der().to_vec());
        read.verifier().verify_client_cert(&own, &[], UnixTime::now()).map(|_| ())
    };
    assert_eq!(judge(one.client(1)), Ok(()));
    assert_eq!(judge(other.client(1)), Err(CertificateError::UnknownRevocationStatus.into()));
}

#[test]
fn what_is_wrong_with_files_is_said_with_their_names() {
    let folder = Folder::new("wrong");
    let one = Authority::new("one");
    let good = folder.write("ca.pem", one.pem());
    let said = |ca: &PathBuf, crl: Option<&PathBuf>| {
        let refused = read_in(ca.clone(), crl.cloned().into_iter().collect()).unwrap_err();
        refused.replace(&format!("{}/", folder.0.display()), "")
    };
    let missing = folder.0.join("missing");
    assert!(said(&missing, None).starts_with("cannot read missing: No such file"));
    assert!(said(&good, Some(&missing)).starts_with("cannot read missing: No such file"));
    let empty = folder.write("empty", "");
    assert_eq!(said(&empty, None), "empty holds no certificate in PEM");
    let leaf = folder.write("leaf.pem", one.client(1).pem());
    let not_above = "leaf.pem holds a certificate that may not vouch for others (CN=a user): ";
    assert!(said(&leaf, None).starts_with(not_above), "{}", said(&leaf, None));
    let many = folder.write("many.pem", one.pem().repeat(AUTHORITIES_MAX + 1));
    assert!(said(&many, None).starts_with("many.pem holds 257 certificates, of which"));
    let broken = folder.write("broken.pem", one.pem().replace("MII", "AAA"));
    assert!(said(&broken, None).starts_with("broken.pem holds a certificate that cannot be read"));
    let no_list = "holds no certificate list";
    for (list, start) in [
        (&empty, format!("empty {no_list} that can be read: ")),
        (&good, format!("ca.pem {no_list} (X509 CRL)")),
        (&folder.write("torn", &[0x30, 0x82, 1][..]), format!("torn {no_list} that can be read: ")),
    ] {
        assert!(said(&good, Some(list)).starts_with(&start), "{}", said(&good, Some(list)));
    }
}

#[test]
fn each_policy_is_read_once() {
    let folder = Folder::new("all");
    let ca = folder.write("ca.pem", Authority::new("one").pem());
    let required = policy(ca.clone(), Vec::new());
    let optional = Arc::new(ClientPolicy { is_required: false, ..(*required).clone() });
    let asked = [&required, &optional, &required, &policy(ca, Vec::new())].map(Arc::clone);
    let read = all(asked, &provider()).unwrap();
    let told: Vec<bool> = read.iter().map(|it| it.policy.is_required).collect();
    assert_eq!(told, [false, true]);
    let must = read.iter().map(|it| it.verifier().client_auth_mandatory());
    assert_eq!(must.collect::<Vec<_>>(), told);
}

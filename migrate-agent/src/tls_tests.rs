//! Tests of `tls`, with certificates made on the spot.

use super::*;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};

struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

fn authority() -> Authority {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(vec![]).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let pem = params.self_signed(&key).unwrap().pem();
    Authority { issuer: Issuer::new(params, key), pem }
}

impl Authority {
    /// The certificate and key of somebody with these URIs.
    fn sign(&self, uris: &[&str]) -> (rcgen::Certificate, KeyPair) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        let names = uris.iter().map(|uri| SanType::URI((*uri).try_into().unwrap()));
        params.subject_alt_names.extend(names);
        (params.signed_by(&key, &self.issuer).unwrap(), key)
    }

    fn write(&self, directory: &Path, uris: &[&str]) {
        let (certificate, key) = self.sign(uris);
        std::fs::write(directory.join("ca.pem"), &self.pem).unwrap();
        std::fs::write(directory.join("cert.pem"), certificate.pem()).unwrap();
        std::fs::write(directory.join("key.pem"), key.serialize_pem()).unwrap();
    }

    fn role(&self, uris: &[&str]) -> Result<(Role, String), TlsError> {
        let (certificate, _) = self.sign(uris);
        peer_role(&[certificate.der().clone()])
    }
}

#[test]
fn a_certificate_gives_the_one_role_that_it_names() {
    let authority = authority();
    for role in Role::ALL {
        let uri = format!("lifeboat://{role}/h1");
        assert_eq!(authority.role(&[&uri]).unwrap(), (role, "h1".to_owned()));
    }
    let unrelated = "https://example.org/x";
    assert!(authority.role(&[unrelated, "lifeboat://agent/h1"]).is_ok());
    for none in [
        &[][..],
        &[unrelated],
        &["lifeboat://root/h1"],
        &["lifeboat://agent/"],
        &["lifeboat://agent/a/b"],
        &["lifeboat://agent/h1", "lifeboat://controller/c1"],
    ] {
        assert!(matches!(authority.role(none), Err(TlsError::NoRole)), "{none:?}");
    }
    assert!(matches!(peer_role(&[]), Err(TlsError::NoCertificate)));
    assert!(matches!(peer_role(&[vec![1, 2, 3].into()]), Err(TlsError::Malformed)));
}

#[test]
fn an_identity_is_loaded_only_whole() {
    let directory = tempfile::tempdir().unwrap();
    let error = TlsIdentity::load(directory.path()).unwrap_err().to_string();
    assert!(error.contains("ca.pem"), "{error}");
    authority().write(directory.path(), &["lifeboat://agent/h1"]);
    assert!(TlsIdentity::load(directory.path()).is_ok());
    std::fs::write(directory.path().join("key.pem"), "nonsense").unwrap();
    assert!(matches!(TlsIdentity::load(directory.path()), Err(TlsError::Pem { .. })));
    let other = KeyPair::generate().unwrap().serialize_pem();
    std::fs::write(directory.path().join("key.pem"), other).unwrap();
    assert!(matches!(TlsIdentity::load(directory.path()), Err(TlsError::Unusable { .. })));
}

async fn handshake(server: &TlsIdentity, client: &TlsIdentity) -> (bool, bool) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let (near, far) = tokio::io::duplex(64 << 10);
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::clone(server.server_config()));
    let connector = tokio_rustls::TlsConnector::from(Arc::clone(client.client_config()));
    let name = rustls::pki_types::ServerName::try_from("localhost").unwrap();
    let serve = async {
        let Ok(mut stream) = acceptor.accept(near).await else { return false };
        stream.write_all(b"x").await.is_ok()
    };
    let connect = async {
        let Ok(mut stream) = connector.connect(name, far).await else { return false };
        stream.read_u8().await.is_ok()
    };
    tokio::join!(serve, connect)
}

#[tokio::test]
async fn two_of_one_authority_trust_each_other_and_a_stranger_is_refused_by_both() {
    let directory = tempfile::tempdir().unwrap();
    let load = |authority: &Authority| {
        authority.write(directory.path(), &["lifeboat://agent/h1"]);
        TlsIdentity::load(directory.path()).unwrap()
    };
    let ours = authority();
    let (one, two, stranger) = (load(&ours), load(&ours), load(&authority()));
    assert_eq!(handshake(&one, &two).await, (true, true));
    assert!(!handshake(&one, &stranger).await.1);
    assert!(!handshake(&stranger, &one).await.0);
}

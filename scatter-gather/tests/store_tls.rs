//! A store as other hosts reach it: over TLS, with certificates of both sides. redis-server has to
//! be installed, with TLS as Debian builds it.

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use lifeboat_protocol::ids::MigrationId;
use lifeboat_protocol::units::Bytes;
use lifeboat_scatter_gather::page::PackId;
use lifeboat_scatter_gather::store::{
    KeySpace, Login, RedisStore, Secret, Settings, StoreError, StoreServer, TlsListen, User,
};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use rustls::pki_types::{PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

const PATIENCE: Duration = Duration::from_secs(20);

struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: rcgen::Certificate,
}

impl Authority {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // OpenSSL takes a certificate for self-signed whose subject is called as its issuer is.
        params.distinguished_name.push(DnType::CommonName, "authority");
        let certificate = params.self_signed(&key).unwrap();
        Self { issuer: Issuer::new(params, key), certificate }
    }

    fn sign(&self) -> (rcgen::Certificate, KeyPair) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec!["store".to_owned()]).unwrap();
        (params.signed_by(&key, &self.issuer).unwrap(), key)
    }

    /// Writes what a server needs into `folder`.
    fn serve(&self, folder: &Path, address: SocketAddr) -> TlsListen {
        let (certificate, key) = self.sign();
        let write = |name: &str, pem: String| {
            let path = folder.join(name);
            std::fs::write(&path, pem).unwrap();
            path
        };
        TlsListen {
            address,
            certificate: write("cert.pem", certificate.pem()),
            key: write("key.pem", key.serialize_pem()),
            authority: write("ca.pem", self.certificate.pem()),
        }
    }

    /// A client that trusts this authority, and shows a certificate of `of`'s.
    fn client(&self, of: Option<&Authority>) -> TlsConnector {
        let mut roots = RootCertStore::empty();
        roots.add(self.certificate.der().clone()).unwrap();
        let builder = ClientConfig::builder().with_root_certificates(roots);
        let config = match of {
            None => builder.with_no_client_auth(),
            Some(of) => {
                let (certificate, key) = of.sign();
                let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
                builder.with_client_auth_cert(vec![certificate.der().clone()], key).unwrap()
            }
        };
        TlsConnector::from(Arc::new(config))
    }
}

fn user(name: &str, byte: u8) -> User {
    User { name: name.to_owned(), secret: Secret::new(&[byte; 32]) }
}

async fn connect(settings: &Settings, connector: TlsConnector) -> Result<RedisStore, StoreError> {
    let address = settings.tls.as_ref().unwrap().address;
    let stream = TcpStream::connect(address).await.unwrap();
    let name = ServerName::try_from("store").unwrap();
    // TLS 1.3 tells a client that it is refused only after the handshake.
    let stream = connector.connect(name, stream).await.unwrap();
    let (user, keys) = (settings.migration.clone(), settings.keys.clone());
    let login = Login { user, keys, patience: PATIENCE, expected: None };
    RedisStore::connect(stream, &login).await
}

#[tokio::test]
async fn other_hosts_come_in_with_a_certificate_and_a_password() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let folder = TempDir::new().unwrap();
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let settings = Settings {
        folder: folder.path().to_owned(),
        room: Bytes::from_mib(8),
        keys: KeySpace::new(&MigrationId::new("m1").unwrap()),
        owner: user("owner", 1),
        migration: user("m1", 2),
        tls: Some(ours.serve(folder.path(), address)),
    };
    let server = StoreServer::start(Path::new("redis-server"), &settings, PATIENCE).await.unwrap();

    let store = connect(&settings, ours.client(Some(&ours))).await.unwrap();
    assert_eq!(store.run(), server.run());
    let bytes = vec![7; 300_000];
    let key = store.keys().pack(PackId(0));
    store.put(&key, &bytes).await.unwrap();
    assert_eq!(store.get(&key).await.unwrap(), bytes);

    for stranger in [None, Some(&theirs)] {
        let refused = connect(&settings, ours.client(stranger)).await;
        assert!(matches!(refused, Err(StoreError::Broken(_))), "{refused:?}");
    }
    server.stop(PATIENCE).await.unwrap();
}

//! Who may command an agent over TCP: only a controller, by a certificate of the same authority.
//!
//! The agent's binary with certificates made on the spot; no QEMU is started.

use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;

use super::agent::Agent;
use super::stores::{PATIENCE, enter_by, intermediary, wish};
use lifeboat_agent::handover::gathering::StoreAt;
use lifeboat_agent::stores;
use lifeboat_agent::tls::TlsIdentity;
use lifeboat_protocol::agent::ListVmsRequest;
use lifeboat_protocol::agent::agent_client::AgentClient;
use lifeboat_protocol::ids::MigrationId;
use lifeboat_protocol::units::Bytes;
use lifeboat_scatter_gather::page::PackId;
use lifeboat_scatter_gather::store::{KeySpace, Secret, Settings, StoreServer, TlsListen, User};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, SanType};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::Code;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // OpenSSL takes a certificate for self-signed whose subject is called as its issuer is.
        params.distinguished_name.push(DnType::CommonName, "authority");
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    /// Certificate and key of somebody of this role.
    fn sign(&self, role: &str, name: &str) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        let uri = format!("lifeboat://{role}/{name}");
        params.subject_alt_names.push(SanType::URI(uri.as_str().try_into().unwrap()));
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }
}

/// Lets the agent listen on TCP too, and returns the port.
fn protect(agent: &Agent, authority: &Authority) -> u16 {
    let root = agent.directory.path();
    let (certificate, key) = authority.sign("agent", "h1");
    std::fs::create_dir(root.join("tls")).unwrap();
    for (name, text) in [("ca", &authority.pem), ("cert", &certificate), ("key", &key)] {
        std::fs::write(root.join(format!("tls/{name}.pem")), text).unwrap();
    }
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let file = root.join("agent.toml");
    let config = std::fs::read_to_string(&file).unwrap();
    let listen = format!("agent.sock\", \"127.0.0.1:{port}\"]\ntls_dir = \"{}\"", tls(root));
    std::fs::write(file, config.replace("agent.sock\"]", &listen)).unwrap();
    port
}

fn tls(root: &Path) -> String {
    root.join("tls").display().to_string()
}

/// Asks for the VMs; the code of the refusal and its words, if it was refused.
async fn ask(
    port: u16,
    trusts: &Authority,
    shows: Option<(String, String)>,
) -> Result<(), (Code, String)> {
    let mut config =
        ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&trusts.pem)).domain_name("h1");
    if let Some((certificate, key)) = shows {
        config = config.identity(Identity::from_pem(certificate, key));
    }
    let endpoint = Endpoint::from_shared(format!("https://127.0.0.1:{port}")).unwrap();
    let channel: Channel = endpoint.tls_config(config).unwrap().connect_lazy();
    let answer = AgentClient::new(channel).list_vms(ListVmsRequest {}).await;
    answer.map(|_| ()).map_err(|status| (status.code(), status.message().to_owned()))
}

#[tokio::test]
async fn only_a_controller_of_the_same_authority_commands_an_agent() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let mut agent = Agent::prepare(&[]);
    let port = protect(&agent, &ours);
    agent.start().await;

    ask(port, &ours, Some(ours.sign("controller", "c1"))).await.unwrap();
    for role in ["agent", "operator"] {
        let (code, said) = ask(port, &ours, Some(ours.sign(role, "x1"))).await.unwrap_err();
        assert_eq!(code, Code::PermissionDenied, "{said}");
        assert!(said.contains(role) && said.contains("controller"), "{said}");
    }
    // Without a certificate, or with one that somebody else signed, no word is exchanged.
    let strangers = [None, Some(theirs.sign("controller", "c1"))];
    for shown in strangers {
        let (code, said) = ask(port, &ours, shown).await.unwrap_err();
        assert!(!matches!(code, Code::Ok | Code::PermissionDenied), "{code:?} {said}");
    }
    // And who asks finds out whether it is the agent that it means.
    let own = theirs.sign("controller", "c1");
    assert!(ask(port, &theirs, Some(own)).await.is_err());
    assert_eq!(agent.terminate(), Some(0));
}

/// A connector of an agent's, whose certificate `signs` has signed.
fn connector(trusts: &Authority, signs: &Authority) -> TlsConnector {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(trusts.pem.as_bytes()).unwrap()).unwrap();
    let (certificate, key) = signs.sign("agent", "h2");
    let certificate = CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap();
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(vec![certificate], key)
        .unwrap();
    TlsConnector::from(Arc::new(config))
}

#[tokio::test]
async fn a_store_takes_agents_of_the_same_authority_alone() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let mut agent = intermediary("ports = \"27150-27159\"");
    protect(&agent, &ours);
    let mut client = agent.start().await;
    let request = wish(&mut agent, "e5-m1", 16);
    let store = client.prepare_store(request).await.unwrap().into_inner().store.unwrap();
    assert!(!store.plain);
    let name = || ServerName::try_from("h1").unwrap();

    let stream = TcpStream::connect(&store.address).await.unwrap();
    let stream = connector(&ours, &ours).connect(name(), stream).await.unwrap();
    let inside = enter_by(stream, &store, "e5-m1").await.unwrap();
    inside.put(&inside.keys().pack(PackId(3)), b"sealed").await.unwrap();
    // TLS 1.3 tells a client that it is refused only after the handshake.
    let stream = TcpStream::connect(&store.address).await.unwrap();
    let stream = connector(&ours, &theirs).connect(name(), stream).await.unwrap();
    assert!(enter_by(stream, &store, "e5-m1").await.is_err());
    // The key was a copy for the server's start.
    let folder = agent.directory.path().join("state/stores/e5-m1");
    assert!(folder.join("store.sock").exists() && !folder.join("key.pem").exists());
    let request = super::stores::release(&mut agent, "e5-m1");
    assert!(client.release_store(request).await.unwrap().into_inner().held_pages);
    assert_eq!(agent.terminate(), Some(0));
}

/// A Redis of somebody else's shows a certificate for its own address, and not for the host whose agent has it
/// named; whoever puts pages there, and gets them, comes in by what that agent tells.
#[tokio::test]
async fn a_redis_that_runs_already_is_reached_over_tls_by_its_own_name() {
    let authority = Authority::new();
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    let (certificate, key) = authority.sign("store", "127.0.0.1");
    for (name, text) in [("ca", &authority.pem), ("cert", &certificate), ("key", &key)] {
        std::fs::write(file(name), text).unwrap();
    }
    let listen = TlsListen {
        address: "127.0.0.1:27160".parse().unwrap(),
        certificate: file("cert"),
        key: file("key"),
        authority: file("ca"),
    };
    let migration = MigrationId::new("e6-m1").unwrap();
    let settings = Settings {
        folder: folder.path().to_owned(),
        room: Bytes::from_mib(64),
        keys: KeySpace::new(&migration),
        owner: User { name: "lb".to_owned(), secret: Secret::given("hush") },
        migration: User { name: "other".to_owned(), secret: Secret::given("hush") },
        tls: Some(listen),
    };
    let server = StoreServer::start(Path::new("redis-server"), &settings, PATIENCE).await.unwrap();

    let mut agent = intermediary("redis = \"rediss://lb:hush@127.0.0.1:27160\"");
    protect(&agent, &authority);
    let mut client = agent.start().await;
    let request = wish(&mut agent, "e6-m1", 16);
    let store = client.prepare_store(request).await.unwrap().into_inner().store.unwrap();
    assert_eq!((store.plain, store.address.as_str()), (false, "127.0.0.1:27160"));

    let at = StoreAt::from(&store);
    let identity = TlsIdentity::load(Path::new(&tls(agent.directory.path()))).unwrap();
    let inside = stores::connect(&at, &migration, Some(&identity), None, PATIENCE).await;
    let inside = inside.unwrap_or_else(|error| panic!("{error:?}"));
    inside.put(&inside.keys().pack(PackId(3)), b"sealed").await.unwrap();
    let request = super::stores::release(&mut agent, "e6-m1");
    assert!(client.release_store(request).await.unwrap().into_inner().held_pages);
    assert!(inside.packs().await.unwrap().is_empty());
    assert_eq!(agent.terminate(), Some(0));
    server.stop(PATIENCE).await.unwrap();
}

//! Who may command an agent over TCP: only a controller, by a certificate of the same authority.
//!
//! The agent's binary with certificates made on the spot; no QEMU is started.

use std::net::TcpListener;
use std::path::Path;

use super::agent::Agent;
use lifeboat_protocol::agent::ListVmsRequest;
use lifeboat_protocol::agent::agent_client::AgentClient;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};
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

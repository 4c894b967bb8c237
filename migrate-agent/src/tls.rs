//! This host's certificates: for the gRPC server, and for page links in both directions.
//!
//! One directory holds `ca.pem`, `cert.pem` and `key.pem`, as `lifeboat certs init` makes them.
//! Both ends always show a certificate of the same CA; the role in it (`lifeboat_protocol::roles`)
//! says what its holder may do. Not here: revocation (a lost key means a new CA), and who may do
//! what (`server/` and `link/`).

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use lifeboat_protocol::roles::Role;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

/// What is wrong with certificates.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file of the directory cannot be read.
    #[error("{} cannot be read; `lifeboat certs init` makes ca.pem, cert.pem and key.pem", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A file of the directory is not PEM of the right kind.
    #[error("{} holds no {what} in PEM", file.display())]
    Pem {
        /// The file.
        file: PathBuf,
        /// What it should hold.
        what: &'static str,
        /// What the parser said.
        #[source]
        source: rustls::pki_types::pem::Error,
    },
    /// The files do not fit together.
    #[error("the certificates in {} cannot be used together", directory.display())]
    Unusable {
        /// The directory.
        directory: PathBuf,
        /// What TLS said.
        #[source]
        source: rustls::Error,
    },
    /// The CA cannot judge other certificates.
    #[error("the CA in {} cannot be used to check certificates", directory.display())]
    Verifier {
        /// The directory.
        directory: PathBuf,
        /// What TLS said.
        #[source]
        source: rustls::server::VerifierBuilderError,
    },
    /// Bytes that are no certificate.
    #[error("the peer's certificate cannot be read")]
    Malformed,
    /// No certificate was shown.
    #[error("the peer showed no certificate")]
    NoCertificate,
    /// A certificate without exactly one `lifeboat://` name.
    #[error("the peer's certificate names no role: it needs one URI such as lifeboat://agent/h1")]
    NoRole,
}

/// This host's certificates, ready for use. Cheap to clone.
#[derive(Clone)]
pub struct TlsIdentity {
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
    pem: Arc<Pem>,
}

/// The files as they are, for tonic, which makes its own configuration of them.
pub struct Pem {
    /// The CA's certificate.
    pub ca: Vec<u8>,
    /// This host's certificate, with its chain.
    pub cert: Vec<u8>,
    /// Its private key.
    pub key: Vec<u8>,
}

impl fmt::Debug for TlsIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Never the key.
        f.debug_struct("TlsIdentity").finish_non_exhaustive()
    }
}

impl TlsIdentity {
    /// Reads the directory.
    ///
    /// # Errors
    /// With the first thing that is missing or does not fit.
    pub fn load(directory: &Path) -> Result<Self, TlsError> {
        let pem = Pem {
            ca: read(directory, "ca.pem")?,
            cert: read(directory, "cert.pem")?,
            key: read(directory, "key.pem")?,
        };
        let error = |name: &str, what| {
            let file = directory.join(name);
            move |source| TlsError::Pem { file, what, source }
        };
        let unusable = |source| TlsError::Unusable { directory: directory.to_owned(), source };
        let mut roots = RootCertStore::empty();
        for ca in CertificateDer::pem_slice_iter(&pem.ca) {
            roots.add(ca.map_err(error("ca.pem", "certificate"))?).map_err(unusable)?;
        }
        let chain = CertificateDer::pem_slice_iter(&pem.cert)
            .collect::<Result<Vec<_>, _>>()
            .map_err(error("cert.pem", "certificate"))?;
        let key =
            PrivateKeyDer::from_pem_slice(&pem.key).map_err(error("key.pem", "private key"))?;

        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let roots = Arc::new(roots);
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
                .build()
                .map_err(|source| TlsError::Verifier { directory: directory.to_owned(), source })?;
        let versions = [&rustls::version::TLS13];
        let server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&versions)
            .map_err(unusable)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain.clone(), key.clone_key())
            .map_err(unusable)?;
        let client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&versions)
            .map_err(unusable)?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .map_err(unusable)?;
        Ok(Self { server: Arc::new(server), client: Arc::new(client), pem: Arc::new(pem) })
    }

    /// For accepting page links: asks for a certificate of the same CA.
    #[must_use]
    pub const fn server_config(&self) -> &Arc<ServerConfig> {
        &self.server
    }

    /// For opening page links.
    #[must_use]
    pub const fn client_config(&self) -> &Arc<ClientConfig> {
        &self.client
    }

    /// The files as they are.
    #[must_use]
    pub fn pem(&self) -> &Pem {
        &self.pem
    }
}

fn read(directory: &Path, name: &str) -> Result<Vec<u8>, TlsError> {
    let file = directory.join(name);
    std::fs::read(&file).map_err(|source| TlsError::Read { file, source })
}

/// The role and the name of the peer that showed `certificates` (its own first).
///
/// # Errors
/// When it showed none, or one without exactly one role.
pub fn peer_role(certificates: &[CertificateDer<'_>]) -> Result<(Role, String), TlsError> {
    let first = certificates.first().ok_or(TlsError::NoCertificate)?;
    let (_, certificate) = X509Certificate::from_der(first).map_err(|_| TlsError::Malformed)?;
    let names = certificate.subject_alternative_name().map_err(|_| TlsError::Malformed)?;
    let mut found = Vec::new();
    for name in names.iter().flat_map(|names| names.value.general_names.iter()) {
        if let GeneralName::URI(uri) = name {
            found.extend(Role::in_uri(uri));
        }
    }
    match (found.pop(), found.is_empty()) {
        (Some(role), true) => Ok(role),
        _ => Err(TlsError::NoRole),
    }
}

#[cfg(test)]
#[path = "tls_tests.rs"]
mod tests;

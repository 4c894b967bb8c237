//! Who is who: certificates with a role, and where they lie.
//!
//! A certificate says its role in a URI among its alternative names: `lifeboat://operator/ann`,
//! `lifeboat://agent/h1`, `lifeboat://controller/c1`. One directory holds `ca.pem`, `cert.pem` and
//! `key.pem`. Used by the gRPC server, by the connections to the agents, and by the CLI; made by
//! `lifeboat certs init`. Deliberately not here: revocation; a lost key means a new CA.

use std::fmt;
use std::path::{Path, PathBuf};

pub use lifeboat_protocol::roles::Role;
use tonic::transport::{Certificate, ClientTlsConfig, Identity, ServerTlsConfig};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

/// What is wrong with a certificate or its directory.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file of the directory cannot be read.
    #[error(
        "{file} cannot be read; `lifeboat certs init` makes a directory with ca.pem, cert.pem and key.pem"
    )]
    Read {
        /// The file.
        file: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A file of the directory for switches cannot be read.
    #[error(
        "{file} cannot be read; controller.switch_tls_dir needs ca.pem (of the switches), cert.pem and key.pem, as `ovs-pki` makes them"
    )]
    ReadForSwitches {
        /// The file.
        file: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// What is in them cannot be used.
    #[error("the certificates in {dir} cannot be used")]
    ForSwitches {
        /// The directory.
        dir: PathBuf,
        /// Why not.
        #[source]
        source: lifeboat_ovs::TlsError,
    },
    /// Bytes that are no certificate.
    #[error("the peer's certificate cannot be read")]
    Malformed,
    /// A certificate without exactly one `lifeboat://` name.
    #[error(
        "the certificate names no role: it needs one URI such as lifeboat://operator/NAME (see `lifeboat certs init`)"
    )]
    NoRole,
}

/// The three files of a directory.
#[derive(Clone)]
pub struct TlsFiles {
    ca: Vec<u8>,
    cert: Vec<u8>,
    key: Vec<u8>,
}

impl fmt::Debug for TlsFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsFiles").finish_non_exhaustive()
    }
}

impl TlsFiles {
    /// Reads `ca.pem`, `cert.pem` and `key.pem`.
    ///
    /// # Errors
    /// With the first file that cannot be read.
    pub fn load(dir: &Path) -> Result<Self, TlsError> {
        let read = |name: &str| {
            let file = dir.join(name);
            std::fs::read(&file).map_err(|source| TlsError::Read { file, source })
        };
        Ok(Self { ca: read("ca.pem")?, cert: read("cert.pem")?, key: read("key.pem")? })
    }

    /// To serve with: the caller must show a certificate of the same CA.
    #[must_use]
    pub fn server(&self) -> ServerTlsConfig {
        ServerTlsConfig::new()
            .identity(Identity::from_pem(&self.cert, &self.key))
            .client_ca_root(Certificate::from_pem(&self.ca))
    }

    /// To call with: `name` must be among the names of the one that is called.
    #[must_use]
    pub fn client(&self, name: &str) -> ClientTlsConfig {
        ClientTlsConfig::new()
            .identity(Identity::from_pem(&self.cert, &self.key))
            .ca_certificate(Certificate::from_pem(&self.ca))
            .domain_name(name)
    }
}

/// Reads what switches and their databases are spoken to with: `ca.pem` (the authority of the
/// switches), `cert.pem` and `key.pem`.
///
/// # Errors
/// With the first file that cannot be read, or when they do not fit together.
pub fn for_switches(dir: &Path) -> Result<lifeboat_ovs::Tls, TlsError> {
    let read = |name: &str| {
        let file = dir.join(name);
        std::fs::read(&file).map_err(|source| TlsError::ReadForSwitches { file, source })
    };
    let (authority, certificate, key) = (read("ca.pem")?, read("cert.pem")?, read("key.pem")?);
    lifeboat_ovs::Tls::new(&authority, &certificate, &key)
        .map_err(|source| TlsError::ForSwitches { dir: dir.to_owned(), source })
}

/// The role and the name that a certificate (DER) carries.
///
/// # Errors
/// When it is no certificate, or carries no role or more than one.
pub fn role_of(der: &[u8]) -> Result<(Role, String), TlsError> {
    let (_, certificate) = X509Certificate::from_der(der).map_err(|_| TlsError::Malformed)?;
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
mod tests {
    use super::*;

    #[test]
    fn bytes_that_are_no_certificate_have_no_role() {
        assert!(matches!(role_of(b"no certificate"), Err(TlsError::Malformed)));
    }
}

//! TLS for both protocols, as Open vSwitch does it: each side shows a certificate, and believes the
//! other's because of who signed it.
//!
//! Used by both protocols' `io`, for `ssl:` endpoints and for switches that connect. What
//! `ovs-pki` makes can be used as it is. **Names are not compared**: certificates of switches carry
//! no DNS name (`ovs-pki` writes a common name and a unique id there), so the authority that signed
//! them must sign nothing but switches. Not here: files, revocation.

use std::fmt;
use std::io;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{
    ClientConfig, DigitallySignedStruct, Error, RootCertStore, ServerConfig, SignatureScheme,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::endpoint::Stream;

/// What can be wrong with certificates.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A text in which there is no certificate or no key.
    #[error("the {part} for switches cannot be read as PEM")]
    Pem {
        /// `authority`, `certificate` or `key`.
        part: &'static str,
    },
    /// They do not fit together, or are of a kind that is not known.
    #[error("the certificates for switches cannot be used")]
    Unusable(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Our certificate and key, and whose signature on a switch's certificate is believed.
#[derive(Clone)]
pub struct Tls {
    connector: TlsConnector,
    acceptor: TlsAcceptor,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").finish_non_exhaustive()
    }
}

fn unusable(error: impl std::error::Error + Send + Sync + 'static) -> TlsError {
    TlsError::Unusable(Box::new(error))
}

fn certificates(pem: &[u8], part: &'static str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
    let read = read.map_err(|_| TlsError::Pem { part })?;
    if read.is_empty() { Err(TlsError::Pem { part }) } else { Ok(read) }
}

impl Tls {
    /// From PEM texts: the authority of the switches (`switchca/cacert.pem` of `ovs-pki`), our
    /// certificate with what signed it, and our key.
    ///
    /// # Errors
    /// When one of them is not that, or they do not belong together.
    pub fn new(authority: &[u8], certificate: &[u8], key: &[u8]) -> Result<Self, TlsError> {
        let mut roots = RootCertStore::empty();
        for root in certificates(authority, "authority")? {
            roots.add(root).map_err(unusable)?;
        }
        let roots = Arc::new(roots);
        let chain = certificates(certificate, "certificate")?;
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| TlsError::Pem { part: "key" })?;
        let provider = Arc::new(ring::default_provider());
        let client = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(unusable)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Signed {
                roots: Arc::clone(&roots),
                provider: Arc::clone(&provider),
            }))
            .with_client_auth_cert(chain.clone(), key.clone_key())
            .map_err(unusable)?;
        let verifier =
            WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider)).build();
        let server = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(unusable)?
            .with_client_cert_verifier(verifier.map_err(unusable)?)
            .with_single_cert(chain, key)
            .map_err(unusable)?;
        Ok(Self {
            connector: TlsConnector::from(Arc::new(client)),
            acceptor: TlsAcceptor::from(Arc::new(server)),
        })
    }

    /// Speaks TLS over a stream that we have opened.
    ///
    /// # Errors
    /// When the handshake fails: the other side shows no certificate that is believed, or does not
    /// believe ours.
    pub async fn connect(&self, stream: impl Stream + 'static) -> io::Result<Box<dyn Stream>> {
        // The name is not compared; what stands here is not sent either, as it is no name.
        let nameless = ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into());
        Ok(Box::new(self.connector.connect(nameless, stream).await?))
    }

    /// Speaks TLS over a stream that a switch has opened.
    ///
    /// # Errors
    /// As [`Self::connect`].
    pub async fn accept(&self, stream: impl Stream + 'static) -> io::Result<Box<dyn Stream>> {
        Ok(Box::new(self.acceptor.accept(stream).await?))
    }
}

/// Believes whoever the authority has signed, whatever their name.
#[derive(Debug)]
struct Signed {
    roots: Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Signed {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let certificate = ParsedCertificate::try_from(end_entity)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(
            &certificate,
            &self.roots,
            intermediates,
            now,
            algorithms,
        )?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_pem_is_named() {
        let error = Tls::new(b"", b"", b"").unwrap_err().to_string();
        assert_eq!(error, "the authority for switches cannot be read as PEM");
    }
}

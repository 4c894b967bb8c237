//! TCP and TLS under a page link: who may connect, and with what socket options.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use lifeboat_protocol::ids::HostId;
use rustls::pki_types::ServerName;
use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::io::{FrameReader, FrameWriter, LinkError};
use crate::tls::{Role, TlsIdentity};

/// How long a connection may take to be made, TLS included.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// What the kernel may hold of a link besides what is on its way (TCP_NOTSENT_LOWAT).
const UNSENT_BYTES: u32 = 128 << 10;

/// The other end of an accepted link.
#[derive(Debug, Clone)]
pub struct Peer {
    /// Where it comes from.
    pub address: SocketAddr,
    /// The name in its certificate; `None` without TLS.
    pub name: Option<String>,
}

/// Connects to the page listener of `host`'s agent. Its certificate must name the host: who is
/// at the other end counts, not by which address it was reached.
///
/// # Errors
/// When the address is none, nobody answers in time, or the other side is not that host's agent.
pub async fn connect(
    address: &str,
    host: &HostId,
    identity: Option<&TlsIdentity>,
) -> Result<(FrameReader, FrameWriter), LinkError> {
    let attempt = connect_now(address, host, identity);
    match tokio::time::timeout(CONNECT_LIMIT, attempt).await {
        Ok(link) => link,
        Err(_) => Err(LinkError::Silent(CONNECT_LIMIT)),
    }
}

async fn connect_now(
    address: &str,
    host: &HostId,
    identity: Option<&TlsIdentity>,
) -> Result<(FrameReader, FrameWriter), LinkError> {
    let bad_address = || LinkError::Address { address: address.to_owned() };
    if !address.contains(':') {
        return Err(bad_address());
    }
    let socket = TcpStream::connect(address).await?;
    prepare(&socket)?;
    let Some(identity) = identity else {
        let (reading, writing) = socket.into_split();
        return Ok((FrameReader::new(reading), FrameWriter::new(writing)));
    };
    let name = ServerName::try_from(host.to_string())
        .map_err(|_| LinkError::Role(format!("`{host}` cannot stand in a certificate")))?;
    let connector = TlsConnector::from(Arc::clone(identity.client_config()));
    let stream = connector
        .connect(name, socket)
        .await
        .map_err(|source| LinkError::Tls { address: address.to_owned(), source })?;
    let certified = check_role(stream.get_ref().1.peer_certificates())?;
    if certified != host.as_str() {
        return Err(LinkError::Role(format!("{address} is `{certified}`, not `{host}`")));
    }
    let (reading, writing) = tokio::io::split(stream);
    Ok((FrameReader::new(reading), FrameWriter::new(writing)))
}

/// Takes page links.
pub struct Listener {
    socket: TcpListener,
    identity: Option<TlsIdentity>,
}

impl Listener {
    /// A listener on a bound socket. The caller has checked that a socket without certificates
    /// is a loopback one.
    #[must_use]
    pub fn new(socket: TcpListener, identity: Option<TlsIdentity>) -> Self {
        Self { socket, identity }
    }

    /// The next connection, before TLS: fast, so that one slow peer holds nobody up.
    ///
    /// # Errors
    /// When the listening socket itself fails.
    pub async fn accept(&self) -> Result<(TcpStream, SocketAddr), LinkError> {
        Ok(self.socket.accept().await?)
    }

    /// TLS, role check and halves of an accepted connection.
    ///
    /// # Errors
    /// When the peer is no agent of ours, or too slow.
    pub async fn establish(
        identity: Option<TlsIdentity>,
        socket: TcpStream,
        address: SocketAddr,
    ) -> Result<(FrameReader, FrameWriter, Peer), LinkError> {
        prepare(&socket)?;
        let Some(identity) = identity else {
            let (reading, writing) = socket.into_split();
            let peer = Peer { address, name: None };
            return Ok((FrameReader::new(reading), FrameWriter::new(writing), peer));
        };
        let acceptor = TlsAcceptor::from(Arc::clone(identity.server_config()));
        let stream = tokio::time::timeout(CONNECT_LIMIT, acceptor.accept(socket))
            .await
            .map_err(|_| LinkError::Silent(CONNECT_LIMIT))?
            .map_err(|source| LinkError::Tls { address: address.to_string(), source })?;
        let name = check_role(stream.get_ref().1.peer_certificates())?;
        let (reading, writing) = tokio::io::split(stream);
        let peer = Peer { address, name: Some(name) };
        Ok((FrameReader::new(reading), FrameWriter::new(writing), peer))
    }

    /// The identity that [`Listener::establish`] wants.
    #[must_use]
    pub fn identity(&self) -> Option<TlsIdentity> {
        self.identity.clone()
    }
}

fn check_role(
    certificates: Option<&[rustls::pki_types::CertificateDer<'_>]>,
) -> Result<String, LinkError> {
    let (role, name) = crate::tls::peer_role(certificates.unwrap_or_default())
        .map_err(|error| LinkError::Role(error.to_string()))?;
    match role {
        Role::Agent => Ok(name),
        other => Err(LinkError::Role(format!("`{name}` is a {other}"))),
    }
}

/// No delay: the hand-over's words are small and someone is paused meanwhile. And little that
/// waits unsent in the kernel: left alone it takes megabytes, which at 100 Mbit/s are a tenth of
/// a second that a paused guest stands and waits for.
fn prepare(socket: &TcpStream) -> Result<(), LinkError> {
    socket.set_nodelay(true)?;
    SockRef::from(socket).set_tcp_notsent_lowat(UNSENT_BYTES)?;
    Ok(())
}

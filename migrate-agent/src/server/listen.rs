//! Where the service listens, and who may speak.
//!
//! Used by `main.rs`. Three kinds of listeners, and nothing else:
//!
//! - TCP with certificates: mutual TLS, and the peer's certificate must have the role
//!   `controller`, whatever it calls.
//! - TCP without certificates: loopback only, which the configuration has made sure of.
//! - A unix socket: root's alone, by its file mode.

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use lifeboat_protocol::agent::agent_server::AgentServer;
use tokio::net::{TcpListener, UnixListener};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::server::{TcpConnectInfo, TcpIncoming, TlsConnectInfo};
use tonic::transport::{Certificate, Identity, Server, ServerTlsConfig};
use tonic::{Request, Status};

use super::Service;
use crate::config::Listen;
use crate::tls::{Role, TlsIdentity, peer_role};

/// A connection that does not answer for this long is closed.
const KEEPALIVE: Duration = Duration::from_secs(10);

/// Why the service cannot be offered at an address.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// TCP.
    #[error("cannot listen on {address}")]
    Tcp {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Unix.
    #[error("cannot listen on {}", path.display())]
    Unix {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Without certificates, to others.
    #[error(
        "{address} is reachable by others, and there are no certificates: make them with `lifeboat certs init`"
    )]
    Unprotected {
        /// The address.
        address: SocketAddr,
    },
    /// gRPC.
    #[error("the gRPC server has failed")]
    Grpc(#[from] tonic::transport::Error),
}

/// A listener that is bound and serves nobody yet: so that a wrong address is told at the start.
pub struct Bound {
    socket: Socket,
    identity: Option<TlsIdentity>,
}

enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// Binds one of the configured addresses.
///
/// # Errors
/// When it cannot be bound, or is open to others without certificates.
pub async fn bind(listen: &Listen, identity: Option<TlsIdentity>) -> Result<Bound, ListenError> {
    let socket = match listen {
        Listen::Tcp(address) => {
            let address = *address;
            if identity.is_none() && !address.ip().is_loopback() {
                return Err(ListenError::Unprotected { address });
            }
            let bound = TcpListener::bind(address).await;
            Socket::Tcp(bound.map_err(|source| ListenError::Tcp { address, source })?)
        }
        Listen::Unix(path) => Socket::Unix(
            bind_unix(path).map_err(|source| ListenError::Unix { path: path.clone(), source })?,
        ),
    };
    Ok(Bound { socket, identity })
}

/// The socket of an agent before us is removed: whoever holds the state directory's lock is the
/// only agent.
fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => (),
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

impl Bound {
    /// Serves until `stop` resolves; then lets the calls that run come to an end.
    ///
    /// # Errors
    /// When the server fails.
    pub async fn serve(
        self,
        service: Service,
        stop: impl Future<Output = ()>,
    ) -> Result<(), ListenError> {
        let mut server = Server::builder()
            .http2_keepalive_interval(Some(KEEPALIVE))
            .http2_keepalive_timeout(Some(KEEPALIVE));
        match self.socket {
            Socket::Unix(listener) => {
                let service = AgentServer::new(service);
                let incoming = UnixListenerStream::new(listener);
                server.add_service(service).serve_with_incoming_shutdown(incoming, stop).await?;
            }
            Socket::Tcp(listener) => {
                let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
                let Some(identity) = self.identity else {
                    let server = server.add_service(AgentServer::new(service));
                    return Ok(server.serve_with_incoming_shutdown(incoming, stop).await?);
                };
                let service = InterceptedService::new(AgentServer::new(service), controllers_only);
                let mut server = server.tls_config(tls_config(&identity))?;
                server.add_service(service).serve_with_incoming_shutdown(incoming, stop).await?;
            }
        }
        Ok(())
    }
}

/// On a TLS listener: lets only controllers through.
fn controllers_only(request: Request<()>) -> Result<Request<()>, Status> {
    let connection = request.extensions().get::<TlsConnectInfo<TcpConnectInfo>>();
    let certificates = connection.and_then(TlsConnectInfo::peer_certs);
    let certificates = certificates.as_ref().map_or(&[][..], |list| list.as_slice());
    match peer_role(certificates) {
        Ok((Role::Controller, _)) => Ok(request),
        Ok((role, name)) => Err(Status::permission_denied(format!(
            "`{name}` has the role `{role}` by its certificate; an agent takes commands from the role `{}`",
            Role::Controller
        ))),
        Err(error) => Err(Status::permission_denied(error.to_string())),
    }
}

/// A client without a certificate of our CA does not get past the handshake.
fn tls_config(identity: &TlsIdentity) -> ServerTlsConfig {
    let pem = identity.pem();
    ServerTlsConfig::new()
        .identity(Identity::from_pem(&pem.cert, &pem.key))
        .client_ca_root(Certificate::from_pem(&pem.ca))
}

//! Opens the sockets of the configuration and serves until told to stop.

use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use lifeboat_protocol::controller::controller_server::ControllerServer;
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::watch;
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
use tonic::transport::Server;

use super::methods::Methods;
use crate::config::Listen;
use crate::service::Service;
use crate::tasks;
use crate::tls::TlsFiles;

/// Why the controller does not serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address cannot be opened.
    #[error(
        "cannot listen on {address}; is another controller running, or the address not this machine's?"
    )]
    Listen {
        /// The address.
        address: Listen,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// Another process answers on the unix socket.
    #[error("{path} is in use by another process; stop it first")]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// There is something at the path that is no socket.
    #[error("{path} exists and is no socket; move it away or choose another path")]
    NoSocket {
        /// The path.
        path: PathBuf,
    },
    /// Certificates that cannot be used, or a server that broke.
    #[error("serving on {address} failed")]
    Transport {
        /// The address.
        address: Listen,
        /// Why.
        #[source]
        source: tonic::transport::Error,
    },
}

/// Serves on every address until `stop` becomes true. All addresses are open before the first call
/// is answered.
///
/// # Errors
/// With the first address that cannot be opened or breaks.
pub async fn serve(
    service: Arc<Service>,
    addresses: &[Listen],
    tls: Option<&TlsFiles>,
    stop: watch::Receiver<bool>,
) -> Result<(), ServeError> {
    let mut open = Vec::new();
    for address in addresses {
        open.push((address.clone(), bind(address).await?));
    }
    let served = open.into_iter().map(|(address, socket)| {
        let tls = tls.cloned();
        tasks::spawn(serve_one(Arc::clone(&service), address, socket, tls, stop.clone()))
    });
    for ended in join_all(served).await {
        if let Ok(Err(error)) = ended {
            return Err(error);
        }
    }
    Ok(())
}

enum Socket {
    Unix(UnixListener),
    Tcp(TcpListener),
}

async fn bind(address: &Listen) -> Result<Socket, ServeError> {
    let failed = |source| ServeError::Listen { address: address.clone(), source };
    match address {
        Listen::Tcp(at) => TcpListener::bind(at).await.map(Socket::Tcp).map_err(failed),
        Listen::Unix(path) => {
            clear(path).await?;
            if let Some(dir) = path.parent() {
                std::fs::create_dir_all(dir).map_err(failed)?;
            }
            let listener = UnixListener::bind(path).map_err(failed)?;
            let owner_only = std::fs::Permissions::from_mode(0o600);
            std::fs::set_permissions(path, owner_only).map_err(failed)?;
            Ok(Socket::Unix(listener))
        }
    }
}

/// Takes away a socket that a killed controller left; one that answers stays.
async fn clear(path: &Path) -> Result<(), ServeError> {
    let Ok(found) = std::fs::symlink_metadata(path) else { return Ok(()) };
    if !found.file_type().is_socket() {
        return Err(ServeError::NoSocket { path: path.to_owned() });
    }
    if UnixStream::connect(path).await.is_ok() {
        return Err(ServeError::InUse { path: path.to_owned() });
    }
    let gone = std::fs::remove_file(path);
    gone.map_err(|source| ServeError::Listen { address: Listen::Unix(path.to_owned()), source })
}

async fn serve_one(
    service: Arc<Service>,
    address: Listen,
    socket: Socket,
    tls: Option<TlsFiles>,
    stop: watch::Receiver<bool>,
) -> Result<(), ServeError> {
    let failed = |source| ServeError::Transport { address: address.clone(), source };
    let mut server = Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .concurrency_limit_per_connection(64);
    let methods = ControllerServer::new(Methods(service)).max_decoding_message_size(1 << 20);
    tracing::info!(%address, tls = tls.is_some(), "serving operators");
    let served = match socket {
        Socket::Unix(listener) => {
            let incoming = UnixListenerStream::new(listener);
            server.add_service(methods).serve_with_incoming_shutdown(incoming, until(stop)).await
        }
        Socket::Tcp(listener) => {
            if let Some(files) = &tls {
                server = server.tls_config(files.server()).map_err(failed)?;
            }
            let incoming = TcpListenerStream::new(listener);
            server.add_service(methods).serve_with_incoming_shutdown(incoming, until(stop)).await
        }
    };
    if let Listen::Unix(path) = &address {
        // A path that somebody took away already is as good.
        let _ = std::fs::remove_file(path);
    }
    served.map_err(failed)
}

async fn until(mut stop: watch::Receiver<bool>) {
    // A sender that is gone means stop, too.
    let _ = stop.wait_for(|stop| *stop).await;
}

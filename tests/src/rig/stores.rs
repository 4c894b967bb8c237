//! A way into a store, from a host's namespace and with its certificates, as its agent has one.
//!
//! Used by the experiments that measure stores. Who runs them is not known here.

use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;

use lifeboat_agent::tls::TlsIdentity;
use lifeboat_scatter_gather::store::{Login, RedisStore};
use rustls::pki_types::ServerName;
use tokio_rustls::TlsConnector;

use super::RigError;
use super::network::Namespace;

/// Comes into the store at `address`, whose certificate names that.
///
/// # Errors
/// When it does not answer, or refuses.
pub async fn connect(
    from: &Namespace,
    address: SocketAddr,
    login: &Login,
    identity: &TlsIdentity,
) -> Result<RedisStore, RigError> {
    let lost = || RigError::io("cannot connect to the store");
    // A socket belongs to the namespace that it was made in.
    let stream = from.within(move || {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        Ok(stream)
    })?;
    let stream = stream.and_then(tokio::net::TcpStream::from_std).map_err(lost())?;
    let connector = TlsConnector::from(Arc::clone(identity.client_config()));
    let name = ServerName::from(address.ip());
    let stream = connector.connect(name, stream).await.map_err(lost())?;
    RedisStore::connect(stream, login).await.map_err(RigError::refused("a login"))
}

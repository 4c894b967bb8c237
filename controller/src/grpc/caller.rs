//! Who calls: by certificate, by the unix socket's credentials, or from loopback.

use std::net::SocketAddr;

use tonic::transport::server::{TcpConnectInfo, TlsConnectInfo, UdsConnectInfo};
use tonic::{Request, Status};

use crate::service::Caller;
use crate::tls::{Role, role_of};

/// The caller of a request.
///
/// # Errors
/// `UNAUTHENTICATED` without a readable certificate, `PERMISSION_DENIED` with one of a wrong role.
pub(super) fn caller<T>(request: &Request<T>) -> Result<Caller, Status> {
    let extensions = request.extensions();
    if let Some(info) = extensions.get::<UdsConnectInfo>() {
        let user = info.peer_cred.map_or(u32::MAX, |cred| cred.uid());
        return Ok(Caller { name: format!("uid {user}"), by: "unix socket" });
    }
    if let Some(info) = extensions.get::<TlsConnectInfo<TcpConnectInfo>>() {
        let certificates = info.peer_certs();
        let first = certificates.as_ref().and_then(|chain| chain.first());
        return by_certificate(first.map(|der| der.as_ref()));
    }
    match extensions.get::<TcpConnectInfo>().and_then(TcpConnectInfo::remote_addr) {
        Some(from) if from.ip().is_loopback() => by_loopback(from),
        _ => Err(Status::unauthenticated(
            "this controller answers without a certificate only on loopback and its unix socket",
        )),
    }
}

fn by_loopback(from: SocketAddr) -> Result<Caller, Status> {
    Ok(Caller { name: from.to_string(), by: "loopback" })
}

fn by_certificate(der: Option<&[u8]>) -> Result<Caller, Status> {
    let der = der.ok_or_else(|| {
        Status::unauthenticated("no certificate was shown; use one made by `lifeboat certs init`")
    })?;
    match role_of(der) {
        Ok((Role::Operator | Role::Controller, name)) => Ok(Caller { name, by: "certificate" }),
        Ok((Role::Agent, name)) => Err(Status::permission_denied(format!(
            "the certificate of agent {name} may not give commands; use an operator's"
        ))),
        Err(error) => Err(Status::unauthenticated(error.to_string())),
    }
}

//! The connection to the controller.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use lifeboat_protocol::controller::controller_client::ControllerClient;
use tonic::transport::{Channel, Endpoint};

use super::CliError;
use crate::tls::TlsFiles;

/// What every command is given.
#[derive(Debug, Clone)]
pub(super) struct Context {
    pub(super) server: String,
    pub(super) tls_dir: Option<PathBuf>,
    pub(super) json: bool,
}

/// For the connection alone; a plan measures first and may take longer.
const CONNECT: Duration = Duration::from_secs(5);

impl Context {
    /// Connects.
    pub(super) async fn client(&self) -> Result<ControllerClient<Channel>, CliError> {
        let failed = |error: tonic::transport::Error| {
            // The transport's own sentence is only "transport error": the cause says more.
            let mut detail = error.to_string();
            let mut cause = std::error::Error::source(&error);
            while let Some(inner) = cause {
                detail = inner.to_string();
                cause = inner.source();
            }
            CliError::Connect { server: self.server.clone(), detail }
        };
        let endpoint = self.endpoint()?.connect_timeout(CONNECT);
        let channel = endpoint.connect().await.map_err(failed)?;
        Ok(ControllerClient::new(channel))
    }

    fn endpoint(&self) -> Result<Endpoint, CliError> {
        let wrong = || CliError::Server { server: self.server.clone() };
        if let Some(path) = self.server.strip_prefix("unix:") {
            return Endpoint::from_shared(format!("unix://{path}")).map_err(|_| wrong());
        }
        let (host, _) = self.server.rsplit_once(':').ok_or_else(wrong)?;
        let Some(dir) = &self.tls_dir else {
            if !is_loopback(host) {
                return Err(CliError::NeedsCertificates { server: self.server.clone() });
            }
            return Endpoint::from_shared(format!("http://{}", self.server)).map_err(|_| wrong());
        };
        let name = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let files = TlsFiles::load(dir)?;
        let endpoint =
            Endpoint::from_shared(format!("https://{}", self.server)).map_err(|_| wrong())?;
        endpoint.tls_config(files.client(&name)).map_err(|error| CliError::Connect {
            server: self.server.clone(),
            detail: error.to_string(),
        })
    }
}

/// Without certificates a controller serves nothing else, so asking there would only end in a
/// connection that closes without a word.
fn is_loopback(host: &str) -> bool {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// An id for a command: the same one sent again would be the same command.
pub(super) fn operation_id() -> String {
    format!("cli-{}-{}", crate::clock::now().0, std::process::id())
}

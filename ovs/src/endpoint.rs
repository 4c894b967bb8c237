//! Where a switch or a database server listens: `tcp:ADDRESS:PORT`, `ssl:ADDRESS:PORT` or
//! `unix:PATH`.
//!
//! Used by both protocols' `io`. Not here: what certificates an `ssl:` endpoint is spoken to with
//! ([`Tls`]).

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::str::FromStr;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

use crate::tls::Tls;

/// A stream of either kind.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// Where to connect to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// Name or address (IPv6 in brackets) and port.
    Tcp(String),
    /// The same, with TLS.
    Ssl(String),
    /// A socket in the file system.
    Unix(PathBuf),
}

/// Text that names no endpoint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is not an address of a switch: write tcp:ADDRESS:PORT, ssl:ADDRESS:PORT or unix:/PATH"
)]
pub struct EndpointError {
    /// What was given.
    pub text: String,
}

impl Endpoint {
    /// Opens a stream.
    ///
    /// # Errors
    /// Those of the operating system, and of the TLS handshake.
    pub async fn open(&self, tls: Option<&Tls>) -> io::Result<Box<dyn Stream>> {
        Ok(match self {
            Self::Tcp(address) => Box::new(connect(address).await?),
            Self::Ssl(address) => {
                let tls = tls.ok_or_else(|| {
                    io::Error::new(io::ErrorKind::Unsupported, "no certificates for ssl: are set")
                })?;
                tls.connect(connect(address).await?).await?
            }
            Self::Unix(path) => Box::new(UnixStream::connect(path).await?),
        })
    }
}

async fn connect(address: &str) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address).await?;
    // Requests are small and waited for.
    stream.set_nodelay(true)?;
    Ok(stream)
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "tcp:{address}"),
            Self::Ssl(address) => write!(f, "ssl:{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        let refuse = || EndpointError { text: text.to_owned() };
        match text.split_once(':').ok_or_else(refuse)? {
            ("unix", path) if path.starts_with('/') => Ok(Self::Unix(path.into())),
            (kind @ ("tcp" | "ssl"), address) => {
                let (name, port) = address.rsplit_once(':').ok_or_else(refuse)?;
                let sound = !name.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0);
                match (sound, kind) {
                    (false, _) => Err(refuse()),
                    (true, "ssl") => Ok(Self::Ssl(address.to_owned())),
                    (true, _) => Ok(Self::Tcp(address.to_owned())),
                }
            }
            _ => Err(refuse()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_read_as_they_print() {
        for text in ["tcp:127.0.0.1:6640", "tcp:[::1]:6640", "ssl:h:6640", "unix:/run/db.sock"] {
            assert_eq!(text.parse::<Endpoint>().unwrap().to_string(), text);
        }
        for text in ["", "6640", "tcp:6640", "tcp::6640", "tcp:h:0", "unix:db.sock", "ssl:h"] {
            assert!(text.parse::<Endpoint>().is_err(), "{text:?} was accepted");
        }
    }
}

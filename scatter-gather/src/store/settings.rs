//! What a redis-server is told at its start, as the text of its configuration; pure. Used by the
//! server's driver.
//!
//! The text is given to the program on its standard input, so that no secret shows on a command
//! line or lies in a file. Passwords are in it only as their SHA-256, as Redis keeps them itself.

use std::fmt;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use lifeboat_protocol::units::Bytes;
use ring::digest::{SHA256, digest};

use super::keys::KeySpace;

/// Memory beside the packs: Redis itself and buffers of connections, and, in parts of 1024 of the
/// room, what the allocator's classes waste (0.2 % with packs of the default size; smaller packs
/// waste more).
const BESIDE: Bytes = Bytes::from_mib(48);
const BESIDE_IN_1024: u64 = 20;

/// The commands that a migration's agents may use, and only on its own names.
const COMMANDS: &str = "+get +set +getrange +unlink +scan +ping +info +hello +auth";

/// A password.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl Secret {
    /// A password that somebody else has chosen.
    #[must_use]
    pub fn given(password: impl Into<String>) -> Self {
        Self(password.into())
    }

    /// A password from bytes that the caller has drawn.
    #[must_use]
    pub fn new(drawn: &[u8; 32]) -> Self {
        Self(hex(drawn))
    }

    /// The password.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

/// One login.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// Its name.
    pub name: String,
    /// Its password.
    pub secret: Secret,
}

/// Where other hosts reach the server. Both sides show certificates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsListen {
    /// The address.
    pub address: SocketAddr,
    /// The server's certificate, PEM.
    pub certificate: PathBuf,
    /// Its key, PEM.
    pub key: PathBuf,
    /// Who may have signed a client's, PEM.
    pub authority: PathBuf,
}

/// How a store's server is run.
#[derive(Debug, Clone)]
pub struct Settings {
    /// A folder that only its user can read: the socket and the log.
    pub folder: PathBuf,
    /// Bytes of packs that it takes.
    pub room: Bytes,
    /// The names that the migration may use.
    pub keys: KeySpace,
    /// The login of the intermediary's own agent, which may do everything.
    pub owner: User,
    /// The login of the migration's agents.
    pub migration: User,
    /// Where other hosts reach it; `None` for this host alone.
    pub tls: Option<TlsListen>,
}

impl Settings {
    /// Where this host reaches the server.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.folder.join("store.sock")
    }

    /// Where the server writes what happens to it.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.folder.join("store.log")
    }

    /// What the server may use in all.
    #[must_use]
    pub fn memory(&self) -> Bytes {
        self.room + Bytes(self.room.0 / 1024 * BESIDE_IN_1024) + BESIDE
    }

    /// The room for pages of a server that may use so much in all: what [`Self::memory`] is then no more
    /// than.
    #[must_use]
    pub fn room_within(memory: Bytes) -> Bytes {
        Bytes(memory.0.saturating_sub(BESIDE.0) / (1024 + BESIDE_IN_1024) * 1024)
    }

    /// The configuration; `plain` is an address without TLS.
    pub(super) fn text(&self, plain: Option<SocketAddr>) -> String {
        let mut text = String::from(FIXED);
        let mut line = |name: &str, value: &str| {
            let _ = writeln!(text, "{name} {value}");
        };
        line("dir", &quoted(&self.folder));
        line("logfile", &quoted(&self.log()));
        line("unixsocket", &quoted(&self.socket()));
        line("maxmemory", &self.memory().0.to_string());
        let all = "~* &* +@all".to_owned();
        let own = format!("~{}* resetchannels -@all {COMMANDS}", self.keys.prefix());
        for (user, rights) in [(&self.owner, all), (&self.migration, own)] {
            let hash = hex(digest(&SHA256, user.secret.reveal().as_bytes()).as_ref());
            line("user", &format!("{} on #{hash} {rights}", user.name));
        }
        if let Some(plain) = plain {
            line("bind", &plain.ip().to_string());
            line("port", &plain.port().to_string());
        }
        if let Some(tls) = &self.tls {
            line("bind", &tls.address.ip().to_string());
            line("tls-port", &tls.address.port().to_string());
            line("tls-cert-file", &quoted(&tls.certificate));
            line("tls-key-file", &quoted(&tls.key));
            line("tls-ca-cert-file", &quoted(&tls.authority));
            line("tls-auth-clients", "yes");
            line("tls-protocols", "TLSv1.3");
        }
        text
    }
}

/// What is the same for every store: nothing on disk, nothing dropped, nobody without a password.
const FIXED: &str = "\
port 0
unixsocketperm 700
daemonize no
databases 1
save \"\"
appendonly no
maxmemory-policy noeviction
maxclients 64
timeout 0
tcp-keepalive 30
lazyfree-lazy-user-del yes
client-output-buffer-limit normal 0 0 0
enable-debug-command no
enable-module-command no
enable-protected-configs no
user default off
";

/// A path as one word of the configuration.
fn quoted(path: &Path) -> String {
    let mut text = String::from("\"");
    for byte in path.as_os_str().as_encoded_bytes() {
        match byte {
            b'"' | b'\\' => text.extend(['\\', *byte as char]),
            b' '..=b'~' => text.push(*byte as char),
            other => {
                let _ = write!(text, "\\x{other:02x}");
            }
        }
    }
    text.push('"');
    text
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use lifeboat_protocol::ids::MigrationId;

    use super::*;

    fn settings() -> Settings {
        let user =
            |name: &str, byte| User { name: name.to_owned(), secret: Secret::new(&[byte; 32]) };
        Settings {
            folder: PathBuf::from("/run/a \"b\"\n"),
            room: Bytes::from_mib(1024),
            keys: KeySpace::new(&MigrationId::new("m1").unwrap()),
            owner: user("owner", 1),
            migration: user("m1", 2),
            tls: None,
        }
    }

    #[test]
    fn a_store_never_drops_or_writes_anything() {
        let text = settings().text(None);
        for line in ["save \"\"", "appendonly no", "maxmemory-policy noeviction", "port 0"] {
            assert!(text.lines().any(|found| found == line), "{line}");
        }
        assert!(text.contains("\nmaxmemory 1145044992\n"), "{text}");
        assert!(text.contains("user default off\n"));
    }

    #[test]
    fn a_migration_may_touch_its_own_names_alone() {
        let text = settings().text(None);
        let user = text.lines().find(|line| line.starts_with("user m1 ")).unwrap();
        assert!(user.contains(" ~lifeboat:m1:* resetchannels -@all +get "), "{user}");
        assert!(!text.contains(settings().migration.secret.reveal()), "a password in the clear");
        assert_eq!(format!("{:?}", settings().migration.secret), "Secret(..)");
    }

    #[test]
    fn without_tls_it_is_reached_at_one_address_and_by_a_password() {
        let text = settings().text("127.0.0.1:7100".parse().ok());
        let last = |name: &str| text.lines().rfind(|line| line.starts_with(name));
        assert_eq!(last("port "), Some("port 7100"));
        assert_eq!(last("bind "), Some("bind 127.0.0.1"));
        assert!(text.contains("user default off\n"));
    }

    #[test]
    fn what_is_offered_fits_with_what_the_server_needs_itself() {
        for mib in [48, 64, 256, 257, 4000] {
            let most = Bytes::from_mib(mib);
            let room = Settings::room_within(most);
            let needed = |room| Settings { room, ..settings() }.memory();
            assert!(needed(room) <= most, "{mib} MiB");
            assert!(needed(room + Bytes(2048)) > most, "{mib} MiB: more would fit");
        }
        assert_eq!(Settings::room_within(Bytes::from_mib(1)), Bytes::ZERO);
    }

    #[test]
    fn a_path_is_one_word_whatever_it_holds() {
        let text = settings().text(None);
        assert!(text.contains("dir \"/run/a \\\"b\\\"\\x0a\"\n"), "{text}");
    }

    #[test]
    fn other_hosts_show_certificates() {
        let tls = TlsListen {
            address: "192.0.2.1:7000".parse().unwrap(),
            certificate: "c.pem".into(),
            key: "k.pem".into(),
            authority: "a.pem".into(),
        };
        let text = Settings { tls: Some(tls), ..settings() }.text(None);
        for line in ["bind 192.0.2.1", "tls-port 7000", "tls-auth-clients yes", "port 0"] {
            assert!(text.lines().any(|found| found == line), "{line}");
        }
    }
}

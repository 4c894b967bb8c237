//! The parameters of both programs: words `key=value`, checked.
//!
//! A guest reads them from its kernel command line (`lb.role=NO lb.dirty=103 ...`, see
//! [`GuestParams`]), the client from its arguments (`--guest name=web,ip=10.0.0.101`, see
//! [`ClientParams`]). Pure: who reads the command line is the caller. Addresses of interfaces
//! (`lb.ip=`, `lb.ip2=`) and a CD (`lb.cd=`) are the business of the guest's init script.

use std::fmt;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// A parameter that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ParamError {
    /// The value does not have the form that the key asks for.
    #[error("{key}={value} cannot be used: expected {expected}")]
    Bad {
        /// The key.
        key: String,
        /// The value as given.
        value: String,
        /// What would be right.
        expected: &'static str,
    },
    /// A key that must be given is not.
    #[error("{key} is missing: give {expected}")]
    Missing {
        /// The key.
        key: &'static str,
        /// What it needs.
        expected: &'static str,
    },
    /// A key that nobody knows.
    #[error("{key} is not a parameter; known are {known}")]
    Unknown {
        /// The key.
        key: String,
        /// The keys that exist.
        known: &'static str,
    },
}

/// What a guest does besides proving that it is unharmed (SOLive IV-A).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// Outgoing network-intensive: sends to the client.
    No,
    /// Incoming network-intensive: receives from the client.
    Ni,
    /// Memory-intensive: writes its region quickly.
    M,
    /// CPU-intensive: computes.
    C,
    /// Only proves.
    Idle,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::No => "NO",
            Self::Ni => "NI",
            Self::M => "M",
            Self::C => "C",
            Self::Idle => "idle",
        })
    }
}

/// What carries traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transport {
    /// Datagrams at a rate, whatever is lost.
    Udp,
    /// A connection that slows down when the path is full.
    Tcp,
}

/// The parameters of a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct GuestParams {
    /// `lb.name`: how its lines on the serial console are signed.
    pub(crate) name: String,
    /// `lb.role`.
    pub(crate) role: Role,
    /// `lb.client`: where role NO sends to.
    pub(crate) client: Option<Ipv4Addr>,
    /// `lb.rate`: traffic of role NO in bit/s.
    pub(crate) rate: u64,
    /// `lb.transport`: of that traffic.
    pub(crate) transport: Transport,
    /// `lb.region`: bytes of seeded pages.
    pub(crate) region: u64,
    /// `lb.dirty`: pages rewritten per second.
    pub(crate) dirty: u64,
    /// `lb.check`: pages checked per second.
    pub(crate) check: u64,
    /// `lb.cpu`: percent of what one CPU could compute when the guest began (role C).
    pub(crate) cpu: u64,
    /// `lb.mtu`: the largest packet, bytes; `lab/guest-init` sets it.
    pub(crate) mtu: usize,
    /// `lb.stream`: bytes/s sent on the checked stream.
    pub(crate) stream: u64,
    /// `lb.disk`: bytes of a disk that are written and checked; 0 for none.
    pub(crate) disk: u64,
    /// `lb.disks`: how many disks are written so, from the first on; at most 26.
    pub(crate) disks: u8,
    /// `lb.disk_block`: bytes of one write to it: a multiple of 4 KiB, at most 1 MiB.
    pub(crate) disk_block: u64,
    /// `lb.disk_rate`: writes per second.
    pub(crate) disk_rate: u64,
    /// `lb.disk_check`: blocks read back and checked for 100 that are written.
    pub(crate) disk_check: u64,
    /// `lb.disk_trim`: bytes behind them that are filled and discarded in turn; 0 for none.
    pub(crate) disk_trim: u64,
    /// `lb.spoil`: harm one page on purpose after so many seconds, so that a test can see the
    /// alarm ring.
    pub(crate) spoil_after: Option<Duration>,
}

const GUEST_KEYS: &str = "lb.name lb.role lb.client lb.rate lb.transport lb.region lb.dirty \
                          lb.check lb.cpu lb.stream lb.disk lb.disks lb.disk_block lb.disk_rate lb.disk_check lb.disk_trim lb.spoil \
                          lb.ip lb.ip2 lb.mtu lb.cd";

impl GuestParams {
    /// Reads a kernel command line; words without `lb.` are the kernel's own.
    pub(crate) fn from_command_line(line: &str) -> Result<Self, ParamError> {
        let mut params = Self {
            name: "guest".to_owned(),
            role: Role::Idle,
            client: None,
            rate: 0,
            transport: Transport::Udp,
            region: 16 << 20,
            dirty: 50,
            check: 1000,
            cpu: 0,
            mtu: 1500,
            stream: 20_000,
            disk: 0,
            disks: 1,
            disk_block: 4096,
            disk_rate: 50,
            disk_check: 200,
            disk_trim: 0,
            spoil_after: None,
        };
        for word in line.split_whitespace().filter(|word| word.starts_with("lb.")) {
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            params.set(key, value)?;
        }
        if params.role == Role::No && params.client.is_none() {
            return Err(ParamError::Missing { key: "lb.client", expected: "the client's address" });
        }
        Ok(params)
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), ParamError> {
        match key {
            "lb.name" => self.name = value.to_owned(),
            "lb.role" => self.role = role(key, value)?,
            "lb.client" => self.client = Some(parsed(key, value, "an IPv4 address")?),
            "lb.rate" => self.rate = number(key, value)?,
            "lb.transport" => self.transport = transport(key, value)?,
            "lb.region" => self.region = size(key, value)?,
            "lb.dirty" => self.dirty = number(key, value)?,
            "lb.check" => self.check = number(key, value)?,
            "lb.cpu" => self.cpu = number(key, value)?.min(100),
            "lb.stream" => self.stream = number(key, value)?,
            "lb.disk" => self.disk = size(key, value)?,
            "lb.disks" => self.disks = number(key, value)?.min(26) as u8,
            "lb.disk_block" => self.disk_block = disk_block(key, value)?,
            "lb.disk_rate" => self.disk_rate = number(key, value)?,
            "lb.disk_check" => self.disk_check = number(key, value)?,
            "lb.disk_trim" => self.disk_trim = size(key, value)?,
            "lb.spoil" => self.spoil_after = Some(Duration::from_secs(number(key, value)?)),
            "lb.mtu" => self.mtu = number(key, value)?.clamp(576, 9000) as usize,
            "lb.ip" | "lb.ip2" | "lb.cd" => {}
            _ => return Err(ParamError::Unknown { key: key.to_owned(), known: GUEST_KEYS }),
        }
        Ok(())
    }
}

/// One guest as the client sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct GuestPeer {
    /// Its name in the report: letters, digits, `.`, `_` and `-`.
    pub(crate) name: String,
    /// Its address.
    pub(crate) ip: Ipv4Addr,
    /// Traffic to send to it in bit/s (role NI), or 0.
    pub(crate) source: u64,
    /// What carries that traffic.
    pub(crate) transport: Transport,
}

/// The parameters of the client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ClientParams {
    /// `--guest name=NAME,ip=IP[,source=BITS_PER_S][,transport=udp|tcp]`, once per guest.
    pub(crate) guests: Vec<GuestPeer>,
    /// `--out FILE`: where the report goes at the end.
    pub(crate) out: PathBuf,
    /// `--status FILE`: rewritten each second (default: `out` with `.status` behind it).
    pub(crate) status: PathBuf,
    /// `--interval MILLISECONDS` between heartbeats.
    pub(crate) interval: Duration,
    /// `--threshold MILLISECONDS`: longer gaps are reported one by one.
    pub(crate) threshold: Duration,
    /// `--duration SECONDS`: ends by itself; without it SIGTERM or SIGINT ends it.
    pub(crate) duration: Option<Duration>,
    /// `--stream BYTES_PER_S` sent on each checked stream.
    pub(crate) stream: u64,
}

const CLIENT_KEYS: &str = "--guest --out --status --interval --threshold --duration --stream";

impl ClientParams {
    /// Reads the arguments after `client`.
    pub(crate) fn from_args(args: &[String]) -> Result<Self, ParamError> {
        let mut params = Self {
            guests: Vec::new(),
            out: PathBuf::new(),
            status: PathBuf::new(),
            interval: Duration::from_millis(10),
            threshold: Duration::from_millis(50),
            duration: None,
            stream: 20_000,
        };
        for pair in args.chunks(2) {
            let value = pair.get(1).map_or("", String::as_str);
            params.set(&pair[0], value)?;
        }
        if params.guests.is_empty() {
            return Err(ParamError::Missing { key: "--guest", expected: "name=NAME,ip=ADDRESS" });
        }
        if params.out.as_os_str().is_empty() {
            return Err(ParamError::Missing { key: "--out", expected: "a file for the report" });
        }
        if params.status.as_os_str().is_empty() {
            let mut status = params.out.clone().into_os_string();
            status.push(".status");
            params.status = status.into();
        }
        Ok(params)
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), ParamError> {
        match key {
            "--guest" => self.guests.push(guest_peer(value)?),
            "--out" => self.out = value.into(),
            "--status" => self.status = value.into(),
            "--interval" => self.interval = Duration::from_millis(number(key, value)?.max(1)),
            "--threshold" => self.threshold = Duration::from_millis(number(key, value)?),
            "--duration" => self.duration = Some(Duration::from_secs(number(key, value)?)),
            "--stream" => self.stream = number(key, value)?,
            _ => return Err(ParamError::Unknown { key: key.to_owned(), known: CLIENT_KEYS }),
        }
        Ok(())
    }
}

fn guest_peer(text: &str) -> Result<GuestPeer, ParamError> {
    let missing = ParamError::Missing { key: "--guest", expected: "name=NAME,ip=ADDRESS" };
    let (mut name, mut ip, mut source, mut carrier) = (None, None, 0, Transport::Udp);
    for word in text.split(',') {
        let (key, value) = word.split_once('=').unwrap_or((word, ""));
        match key {
            "name" => name = Some(plain_name(key, value)?),
            "ip" => ip = Some(parsed(key, value, "an IPv4 address")?),
            "source" => source = number(key, value)?,
            "transport" => carrier = transport(key, value)?,
            _ => {
                let known = "name ip source transport";
                return Err(ParamError::Unknown { key: key.to_owned(), known });
            }
        }
    }
    let (Some(name), Some(ip)) = (name, ip) else { return Err(missing) };
    Ok(GuestPeer { name, ip, source, transport: carrier })
}

fn plain_name(key: &str, value: &str) -> Result<String, ParamError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if value.is_empty() || !value.chars().all(plain) {
        return Err(bad(key, value, "letters, digits, '.', '_' and '-'"));
    }
    Ok(value.to_owned())
}

fn role(key: &str, value: &str) -> Result<Role, ParamError> {
    match value {
        "NO" => Ok(Role::No),
        "NI" => Ok(Role::Ni),
        "M" => Ok(Role::M),
        "C" => Ok(Role::C),
        "idle" => Ok(Role::Idle),
        _ => Err(bad(key, value, "NO, NI, M, C or idle")),
    }
}

fn transport(key: &str, value: &str) -> Result<Transport, ParamError> {
    match value {
        "udp" => Ok(Transport::Udp),
        "tcp" => Ok(Transport::Tcp),
        _ => Err(bad(key, value, "udp or tcp")),
    }
}

fn disk_block(key: &str, value: &str) -> Result<u64, ParamError> {
    let bytes = size(key, value)?;
    let fits = bytes > 0 && bytes.is_multiple_of(4096) && bytes <= 1 << 20;
    if fits { Ok(bytes) } else { Err(bad(key, value, "4KiB to 1MiB, a multiple of 4KiB")) }
}

fn size(key: &str, value: &str) -> Result<u64, ParamError> {
    let (digits, shift) = match value {
        _ if value.ends_with("KiB") => (value.trim_end_matches("KiB"), 10),
        _ if value.ends_with("MiB") => (value.trim_end_matches("MiB"), 20),
        _ => (value, 0),
    };
    let expected = "bytes, or a number with KiB or MiB behind it (at most 1048576MiB)";
    let number: u64 = digits.parse().map_err(|_| bad(key, value, expected))?;
    let bytes = number.checked_shl(shift).filter(|bytes| bytes >> shift == number);
    bytes.filter(|bytes| *bytes <= 1 << 40).ok_or_else(|| bad(key, value, expected))
}

fn number(key: &str, value: &str) -> Result<u64, ParamError> {
    parsed(key, value, "a whole number")
}

fn parsed<T: FromStr>(key: &str, value: &str, expected: &'static str) -> Result<T, ParamError> {
    value.parse().map_err(|_| bad(key, value, expected))
}

fn bad(key: &str, value: &str, expected: &'static str) -> ParamError {
    ParamError::Bad { key: key.to_owned(), value: value.to_owned(), expected }
}

#[cfg(test)]
#[path = "params_tests.rs"]
mod tests;

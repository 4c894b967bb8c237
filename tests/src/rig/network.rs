//! Hosts as network namespaces, and the veths that plug them into a switch's namespace.
//!
//! Used by the experiments, inside [`super::private`] namespaces only.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::Command;
use std::thread;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::RigError;
use super::program::{run, words};

/// A network namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Namespace(Which);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Which {
    /// The program's own, where the switch is.
    Own,
    /// One with a name.
    Named(String),
    /// One that somebody else has made: the file that stands for it.
    At(PathBuf),
}

impl Namespace {
    /// The one that the program is in.
    #[must_use]
    pub const fn own() -> Self {
        Self(Which::Own)
    }

    /// One that is there: `file` stands for it, as `/proc/PID/ns/net` does.
    #[must_use]
    pub const fn at(file: PathBuf) -> Self {
        Self(Which::At(file))
    }

    /// Makes one.
    ///
    /// # Errors
    /// When the name is taken or the system does not allow it.
    pub fn make(name: &str) -> Result<Self, RigError> {
        run(&mut words(&format!("ip netns add {name}")))?;
        let made = Self(Which::Named(name.to_owned()));
        run(&mut made.command("ip link set lo up"))?;
        Ok(made)
    }

    /// A program in it, from a line of words. It becomes the program: the process id is its own.
    #[must_use]
    pub fn command(&self, line: &str) -> Command {
        match &self.0 {
            Which::Named(name) => words(&format!("ip netns exec {name} {line}")),
            Which::Own | Which::At(_) => self.command_beside(line),
        }
    }

    /// As [`Self::command`], with the mounts of its caller: `ip netns exec` gives every program a
    /// mount namespace of its own, in which one that is started later does not see what was mounted.
    #[must_use]
    pub fn command_beside(&self, line: &str) -> Command {
        match self.file() {
            Some(file) => words(&format!("nsenter --net={} {line}", file.display())),
            None => words(line),
        }
    }

    /// What stands for it; `None` for the program's own.
    fn file(&self) -> Option<PathBuf> {
        match &self.0 {
            Which::Own => None,
            Which::Named(name) => Some(PathBuf::from(format!("/run/netns/{name}"))),
            Which::At(file) => Some(file.clone()),
        }
    }

    /// `netns NAME`, where `ip link` is to put an end there.
    fn place(&self) -> String {
        match &self.0 {
            Which::Own => String::new(),
            Which::Named(name) => format!("netns {name}"),
            Which::At(file) => format!("netns {}", file.display()),
        }
    }

    /// Does `work` on a thread in it, and returns the thread.
    ///
    /// # Errors
    /// When it cannot be entered.
    pub fn spawn<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<thread::JoinHandle<Result<T, RigError>>, RigError> {
        let path = self.file().unwrap_or_else(|| PathBuf::from("/proc/self/ns/net"));
        let cannot = format!("cannot enter the namespace {}", path.display());
        let file = File::open(path).map_err(RigError::io(cannot.clone()))?;
        Ok(thread::spawn(move || {
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
                .map_err(|errno| RigError::io(cannot)(errno.into()))?;
            Ok(work())
        }))
    }

    /// Does `work` in it and waits for it.
    ///
    /// # Errors
    /// When it cannot be entered.
    pub fn within<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, RigError> {
        match self.spawn(work)?.join() {
            Ok(done) => done,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    /// Bytes sent by each of its interfaces since they were made.
    ///
    /// # Errors
    /// When it cannot be entered.
    pub fn bytes_sent(&self) -> Result<BTreeMap<String, u64>, RigError> {
        let text = self.within(|| fs::read_to_string("/proc/thread-self/net/dev"))?;
        Ok(parse_sent(&text.map_err(RigError::io("cannot read the interfaces' counters"))?))
    }
}

/// `/proc/net/dev`: after the colon 8 columns of what was received, then the bytes that were sent.
fn parse_sent(text: &str) -> BTreeMap<String, u64> {
    let line = |line: &str| {
        let (name, columns) = line.split_once(':')?;
        let sent = columns.split_whitespace().nth(8)?.parse().ok()?;
        Some((name.trim().to_owned(), sent))
    };
    text.lines().filter_map(line).collect()
}

/// Plugs `host` into `switch`: interface `eth0` with an address at the host, `port` at the switch.
///
/// Checksums are finished by the sending host (`tx off`): OVS' userspace datapath passes frames on
/// as they are.
///
/// # Errors
/// When an interface exists already or the system does not allow it.
pub fn plug(
    host: &Namespace,
    address: Ipv4Addr,
    switch: &Namespace,
    port: &str,
) -> Result<(), RigError> {
    let (here, there) = (host.place(), switch.place());
    run(&mut words(&format!("ip link add eth0 {here} type veth peer name {port} {there}")))?;
    run(&mut host.command(&format!("ip address add {address}/24 dev eth0")))?;
    run(&mut host.command("ip link set eth0 up"))?;
    run(&mut switch.command(&format!("ip link set {port} up")))?;
    run(&mut host.command("ethtool -K eth0 tx off")).map(drop)
}

/// Two ports of one namespace, joined by a cable.
///
/// # Errors
/// When an interface exists already or the system does not allow it.
pub fn join(switch: &Namespace, one: &str, other: &str) -> Result<(), RigError> {
    run(&mut switch.command(&format!("ip link add {one} type veth peer name {other}")))?;
    for port in [one, other] {
        run(&mut switch.command(&format!("ip link set {port} up")))?;
    }
    Ok(())
}

/// Limits what `port` sends, as a link of that capacity would: a queue of 25 ms, then loss. `None`
/// takes the limit away.
///
/// # Errors
/// When the system refuses.
pub fn limit(at: &Namespace, port: &str, bits_per_sec: Option<u64>) -> Result<(), RigError> {
    let Some(rate) = bits_per_sec else {
        // There may be none; what is left then is what is wanted.
        let _ = run(&mut at.command(&format!("tc qdisc del dev {port} root")));
        return Ok(());
    };
    // 2 ms of the rate at once, and no less than two full-sized segments of a veth.
    let burst = (rate / 8 / 500).max(128 << 10);
    let queue = rate / 8 / 40 + burst;
    run(&mut at.command(&format!(
        "tc qdisc replace dev {port} root tbf rate {rate}bit burst {burst} limit {queue}"
    )))
    .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read_by_their_columns() {
        let text = "Inter-|   Receive  |  Transmit\n face |bytes packets|bytes\n    \
                    lo: 1 2 0 0 0 0 0 0 77 2 0 0 0 0 0 0\n  eth0:10 1 0 0 0 0 0 0 12345 9 0 0 0 0 0 0\n";
        let sent = parse_sent(text);
        assert_eq!(sent.get("eth0"), Some(&12345));
        assert_eq!(sent.get("lo"), Some(&77));
        assert_eq!(sent.len(), 2);
    }
}

//! Keeps the descriptors of FUSE servers, so that the death of one is no guest's error.
//!
//! The last descriptor of `/dev/fuse` that closes ends its mount: every request fails with
//! `ENOTCONN`, and QEMU can neither flush nor be swapped away any more. So a process that does nothing
//! else (`lifeboat-disk hold`) keeps a duplicate of it and of the server's memory. While no server
//! reads, requests wait in the kernel; the next server takes both and goes on.
//!
//! ```text
//!   server 1 --park NAME [device, memory]--> holder        the connection stays open: it is the
//!      killed: connection closes                           sign that NAME is served
//!   server 2 --take NAME--> holder --[device, memory]--> server 2
//!   server 2 --forget NAME--> holder                       after a proper unmount
//! ```
//!
//! One packet for each message: a byte that says what, then the name. Deliberately not here: starting
//! the next server, which is the agent's business, and anything that could make the holder fail.

use std::collections::HashMap;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::io::{Errno, IoSlice, IoSliceMut};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

use crate::clock;

/// The longest name of a mount, bytes.
const LONGEST_NAME: usize = 255;
/// A server that was killed may still be ending for so long, on a busy machine,
const ENDING_LIMIT: Duration = Duration::from_secs(2);
/// and is looked at this often.
const ENDING_LOOK: Duration = Duration::from_millis(2);

/// What a holder was asked for and did not give.
#[derive(Debug, thiserror::Error)]
pub enum HolderError {
    /// Nobody listens, or the connection broke.
    #[error("cannot speak with the holder of FUSE descriptors")]
    Socket(#[from] Errno),
    /// The name is empty or too long.
    #[error("`{0}` is no name for a mount: 1 to 255 bytes are")]
    Name(String),
    /// Another server serves it.
    #[error("the mount {0} is being served by another process; end that first")]
    Served(String),
    /// The holder has no such mount.
    #[error("the holder has no mount {0}")]
    Unknown(String),
    /// It answered with something else.
    #[error("what the holder answered about {0} makes no sense")]
    Answer(String),
}

/// The proof that this process serves a mount; dropping it (or dying) lets another take it.
#[derive(Debug)]
pub struct Serving {
    connection: OwnedFd,
    name: String,
}

impl Serving {
    /// Hands `device` and `memory` to the holder at `socket`, under `name`.
    ///
    /// # Errors
    /// When the holder cannot be reached or another process serves `name`.
    pub fn park(
        socket: &Path,
        name: &str,
        (device, memory): (BorrowedFd<'_>, BorrowedFd<'_>),
    ) -> Result<Self, HolderError> {
        let connection = connect(socket)?;
        let serving = Self { connection, name: checked(name)? };
        serving.ask(b'P', &[device, memory]).map(|_| serving)
    }

    /// Takes what a dead server left under `name`: its device and memory. The holder may learn of that
    /// death after us: it is asked again for a moment.
    ///
    /// # Errors
    /// When it is still served, or unknown.
    pub fn take(socket: &Path, name: &str) -> Result<(Self, OwnedFd, OwnedFd), HolderError> {
        let begin = clock::now();
        loop {
            match Self::take_now(socket, name) {
                Err(HolderError::Served(_)) if begin.elapsed() < ENDING_LIMIT => {
                    clock::pause_thread(ENDING_LOOK);
                }
                outcome => return outcome,
            }
        }
    }

    fn take_now(socket: &Path, name: &str) -> Result<(Self, OwnedFd, OwnedFd), HolderError> {
        let connection = connect(socket)?;
        let serving = Self { connection, name: checked(name)? };
        match <[OwnedFd; 2]>::try_from(serving.ask(b'T', &[])?) {
            Ok([device, memory]) => Ok((serving, device, memory)),
            Err(_) => Err(HolderError::Answer(name.to_owned())),
        }
    }

    /// Has the holder close its duplicates: the mount is gone.
    ///
    /// # Errors
    /// When the holder cannot be reached.
    pub fn forget(self) -> Result<(), HolderError> {
        self.ask(b'F', &[]).map(drop)
    }

    fn ask(&self, verb: u8, descriptors: &[BorrowedFd<'_>]) -> Result<Vec<OwnedFd>, HolderError> {
        send(&self.connection, verb, &self.name, descriptors)?;
        let name = || self.name.clone();
        let (answer, _, descriptors) =
            receive(&self.connection)?.ok_or(HolderError::Socket(Errno::CONNRESET))?;
        match answer {
            b'O' => Ok(descriptors),
            b'S' => Err(HolderError::Served(name())),
            b'U' => Err(HolderError::Unknown(name())),
            _ => Err(HolderError::Answer(name())),
        }
    }
}

fn checked(name: &str) -> Result<String, HolderError> {
    if name.is_empty() || name.len() > LONGEST_NAME {
        return Err(HolderError::Name(name.to_owned()));
    }
    Ok(name.to_owned())
}

fn connect(path: &Path) -> Result<OwnedFd, Errno> {
    let socket = seqpacket()?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

fn seqpacket() -> Result<OwnedFd, Errno> {
    let kind = (AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC);
    rustix::net::socket_with(kind.0, kind.1, kind.2, None)
}

struct Entry {
    device: OwnedFd,
    memory: OwnedFd,
    /// Which connection serves it.
    served_by: Option<u64>,
}

type Entries = Arc<Mutex<HashMap<String, Entry>>>;

/// When a holder ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ends {
    /// By a signal only.
    Never,
    /// When it has forgotten the last mount that it held.
    WithTheLastMount,
}

/// Holds, at the socket `path`, which it makes, until it `ends`.
///
/// # Errors
/// When it cannot listen there.
pub fn hold(path: &Path, ends: Ends) -> Result<(), io::Error> {
    let listener = Arc::new(seqpacket()?);
    rustix::net::bind(&listener, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&listener, 16)?;
    let entries = Entries::default();
    let mut clients = 0;
    loop {
        let connection = match rustix::net::accept_with(&*listener, SocketFlags::CLOEXEC) {
            Ok(connection) => connection,
            Err(Errno::INTR | Errno::CONNABORTED) => continue,
            // Shut down by the client that had the last mount forgotten.
            Err(Errno::INVAL) if ends == Ends::WithTheLastMount => return Ok(()),
            Err(errno) => return Err(errno.into()),
        };
        clients += 1;
        let (entries, client) = (Arc::clone(&entries), clients);
        let listener = Arc::clone(&listener);
        let serve = move || {
            let held = !lock(&entries).is_empty();
            let parked = serve_client(&entries, client, &connection);
            if ends == Ends::WithTheLastMount && (held || parked) && lock(&entries).is_empty() {
                // Nobody will come any more; if it cannot be told, it waits for nobody.
                let _ = rustix::net::shutdown(&*listener, rustix::net::Shutdown::Both);
            }
        };
        // Without a thread the connection is closed: the client sees it and goes without.
        drop(std::thread::Builder::new().name(format!("client-{client}")).spawn(serve));
    }
}

fn lock(entries: &Entries) -> MutexGuard<'_, HashMap<String, Entry>> {
    entries.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Serves one connection to its end. Whether anything was held meanwhile.
fn serve_client(entries: &Entries, client: u64, connection: &OwnedFd) -> bool {
    let mut held = false;
    while let Ok(Some((verb, name, descriptors))) = receive(connection) {
        held |= verb == b'P';
        if answer(entries, client, connection, (verb, &name, descriptors)).is_err() {
            break;
        }
    }
    for entry in lock(entries).values_mut() {
        if entry.served_by == Some(client) {
            entry.served_by = None;
        }
    }
    held
}

fn answer(
    entries: &Entries,
    client: u64,
    connection: &OwnedFd,
    (verb, name, descriptors): (u8, &str, Vec<OwnedFd>),
) -> Result<(), Errno> {
    let mut entries = lock(entries);
    let by_another = |entry: &Entry| entry.served_by.is_some_and(|other| other != client);
    if entries.get(name).is_some_and(by_another) {
        return send(connection, b'S', name, &[]);
    }
    match (verb, <[OwnedFd; 2]>::try_from(descriptors)) {
        (b'P', Ok([device, memory])) => {
            let entry = Entry { device, memory, served_by: Some(client) };
            entries.insert(name.to_owned(), entry);
            send(connection, b'O', name, &[])
        }
        (b'T', _) => match entries.get_mut(name) {
            Some(entry) => {
                entry.served_by = Some(client);
                send(connection, b'O', name, &[entry.device.as_fd(), entry.memory.as_fd()])
            }
            None => send(connection, b'U', name, &[]),
        },
        (b'F', _) => {
            entries.remove(name);
            send(connection, b'O', name, &[])
        }
        _ => send(connection, b'?', name, &[]),
    }
}

fn send(
    socket: &OwnedFd,
    verb: u8,
    name: &str,
    descriptors: &[BorrowedFd<'_>],
) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(descriptors));
    }
    let verb = [verb];
    let parts = [IoSlice::new(&verb), IoSlice::new(name.as_bytes())];
    rustix::net::sendmsg(socket, &parts, &mut control, SendFlags::NOSIGNAL).map(drop)
}

type Packet = (u8, String, Vec<OwnedFd>);

/// The next packet; `None` at the end of the connection.
fn receive(socket: &OwnedFd) -> Result<Option<Packet>, Errno> {
    let mut bytes = [0; LONGEST_NAME + 1];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let received = loop {
        match rustix::net::recvmsg(socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            other => break other?.bytes,
        }
    };
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    let Some((verb, name)) = bytes[..received].split_first() else { return Ok(None) };
    Ok(Some((*verb, String::from_utf8_lossy(name).into_owned(), descriptors)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    /// A holder on a thread that lives as long as the test's process.
    fn holder(directory: &Path) -> std::path::PathBuf {
        let path = directory.join("holder");
        let own = path.clone();
        std::thread::spawn(move || hold(&own, Ends::Never));
        while !path.exists() {
            clock::pause_thread(Duration::from_millis(1));
        }
        path
    }

    #[test]
    fn what_a_dead_server_left_is_handed_to_the_next_one_only() {
        let directory = tempfile::tempdir().unwrap();
        let socket = holder(directory.path());
        let (mut outside, inside) = UnixStream::pair().unwrap();
        let serving = Serving::park(&socket, "vm", (inside.as_fd(), inside.as_fd())).unwrap();
        assert!(matches!(Serving::take(&socket, "vm"), Err(HolderError::Served(_))));
        drop((serving, inside));
        let (serving, device, _memory) = Serving::take(&socket, "vm").unwrap();
        UnixStream::from(device).write_all(b"alive").unwrap();
        let mut bytes = [0; 5];
        outside.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"alive");
        serving.forget().unwrap();
        assert!(matches!(Serving::take(&socket, "vm"), Err(HolderError::Unknown(_))));
    }

    #[test]
    fn a_holder_of_one_vms_mounts_ends_with_the_last_of_them() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("holder");
        let own = path.clone();
        let holding = std::thread::spawn(move || hold(&own, Ends::WithTheLastMount));
        while !path.exists() {
            clock::pause_thread(Duration::from_millis(1));
        }
        let (_outside, inside) = UnixStream::pair().unwrap();
        let parts = || (inside.as_fd(), inside.as_fd());
        // Somebody who only asks does not end it.
        assert!(matches!(Serving::take(&path, "a"), Err(HolderError::Unknown(_))));
        let one = Serving::park(&path, "a", parts()).unwrap();
        let other = Serving::park(&path, "b", parts()).unwrap();
        one.forget().unwrap();
        drop(other);
        let (other, ..) = Serving::take(&path, "b").unwrap();
        other.forget().unwrap();
        holding.join().unwrap().unwrap();
    }

    #[test]
    fn names_have_bounds() {
        let directory = tempfile::tempdir().unwrap();
        let socket = holder(directory.path());
        for name in ["", &"x".repeat(256)] {
            assert!(matches!(Serving::take(&socket, name), Err(HolderError::Name(_))));
        }
    }
}

//! What is between two hosts, one way: a TCP relay that can be cut, in two manners, and healed, and that
//! can be slow to connect.
//!
//! It listens in one host's namespace and connects in another's, so that a host reaches its peers
//! only through these. Used by [`super::World`]. Not here: rates; the agents have theirs.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use super::Host;
use crate::clock;
use crate::rig::RigError;
use crate::rig::network::Namespace;

/// Where every agent takes page links, in its own namespace.
pub const PAGE_PORT: u16 = 7001;
/// Where a host reaches host 0; the others follow.
const FIRST_PORT: u16 = 7100;
/// Where host 0's stores are, in every namespace; the others' follow in tens.
const FIRST_STORE: u16 = 7200;
/// Stores that a host can have at once: one VM needs one, and its last one may still be owed.
const STORES: u16 = 3;
/// Looks at the state at least so often.
const LOOK: Duration = Duration::from_millis(10);

/// Where every other host reaches a host's page listener.
#[must_use]
pub fn page_address(host: Host) -> String {
    format!("127.0.0.1:{}", port(host))
}

fn port(host: Host) -> u16 {
    FIRST_PORT + u16::try_from(host).unwrap_or_default()
}

/// Where a host's stores are reached, by itself and by everybody.
#[must_use]
pub fn store_ports(host: Host) -> std::ops::RangeInclusive<u16> {
    let first = FIRST_STORE + 10 * u16::try_from(host).unwrap_or_default();
    first..=first + STORES - 1
}

/// What the link does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Carries.
    Whole,
    /// Connections are closed, new ones at once: a host that is gone.
    Closed,
    /// Nothing comes through and nobody is told: a cable that is pulled. What was on the way
    /// arrives when it is plugged in again.
    Silent,
}

impl State {
    const ALL: [Self; 3] = [Self::Whole, Self::Closed, Self::Silent];
}

/// One direction of one link. Its threads end with the process.
#[derive(Debug)]
pub struct Relay {
    ends: (Host, Host),
    state: Arc<AtomicU8>,
    /// What a new connection waits before it is made, milliseconds.
    late_ms: Arc<AtomicU64>,
}

impl Relay {
    /// Starts to relay page links from a host's `near` namespace to the other's.
    ///
    /// # Errors
    /// When it cannot listen.
    pub fn start(ends: (Host, Host), near: Namespace, far: Namespace) -> Result<Self, RigError> {
        Self::between(ends, (near, port(ends.1)), (far, PAGE_PORT))
    }

    /// The same for what goes to a store of the other one, by the port that it has there.
    ///
    /// # Errors
    /// When it cannot listen.
    pub fn to_store(
        ends: (Host, Host),
        near: Namespace,
        far: Namespace,
        port: u16,
    ) -> Result<Self, RigError> {
        Self::between(ends, (near, port), (far, port))
    }

    fn between(
        ends: (Host, Host),
        (near, here): (Namespace, u16),
        (far, there): (Namespace, u16),
    ) -> Result<Self, RigError> {
        let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, here);
        let listener = near.within(move || TcpListener::bind(address))?;
        let listener = listener.map_err(RigError::io("cannot listen for a relay"))?;
        let state = Arc::new(AtomicU8::new(State::Whole as u8));
        let relay = Self { ends, state, late_ms: Arc::default() };
        let (state, late_ms) = (Arc::clone(&relay.state), Arc::clone(&relay.late_ms));
        // New connections are made in the other namespace, so that is where this thread lives.
        far.spawn(move || {
            for socket in listener.incoming().flatten() {
                let (late, state) = (late_ms.load(Ordering::SeqCst), Arc::clone(&state));
                thread::spawn(move || {
                    clock::rest(Duration::from_millis(late));
                    take(socket, there, &state);
                });
            }
        })?;
        Ok(relay)
    }

    /// From where to where.
    #[must_use]
    pub fn ends(&self) -> (Host, Host) {
        self.ends
    }

    /// Whoever connects from now on is kept waiting for so long first.
    pub fn connect_after(&self, late: Duration) {
        let late = u64::try_from(late.as_millis()).unwrap_or(u64::MAX);
        self.late_ms.store(late, Ordering::SeqCst);
    }

    /// Cuts or heals it.
    pub fn set(&self, state: State) {
        self.state.store(state as u8, Ordering::SeqCst);
    }
}

fn now(state: &AtomicU8) -> State {
    let at = usize::from(state.load(Ordering::SeqCst));
    State::ALL.get(at).copied().unwrap_or(State::Whole)
}

fn take(near: TcpStream, port: u16, state: &Arc<AtomicU8>) {
    if now(state) == State::Closed {
        return;
    }
    let far = TcpStream::connect(SocketAddrV4::new(Ipv4Addr::LOCALHOST, port));
    // Nobody listens: closing says so.
    let Ok(far) = far else { return };
    let halves = (near.try_clone(), far.try_clone());
    if let (Ok(near_again), Ok(far_again)) = halves {
        let (there, back) = (Arc::clone(state), Arc::clone(state));
        thread::spawn(move || carry(near, far_again, &there));
        thread::spawn(move || carry(far, near_again, &back));
    }
}

/// Carries one direction of one connection to its end.
fn carry(mut from: TcpStream, mut to: TcpStream, state: &AtomicU8) {
    let mut buffer = vec![0; 64 << 10];
    // What fails closes both, which is all that there is to say.
    let _ = from.set_read_timeout(Some(LOOK));
    let _ = to.set_nodelay(true);
    loop {
        let count = match from.read(&mut buffer) {
            Ok(count) => count,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                if now(state) == State::Closed {
                    break;
                }
                continue;
            }
            Err(_) => break,
        };
        while now(state) == State::Silent {
            clock::rest(LOOK);
        }
        if now(state) == State::Closed {
            break;
        }
        if count == 0 {
            // One direction ended; the other one may go on.
            let _ = to.shutdown(Shutdown::Write);
            return;
        }
        if to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

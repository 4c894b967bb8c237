//! Traffic for its own sake: a flow that is sent at a rate, and a sink that counts what comes.
//!
//! Role NO sends from the guest to the client's sink, role NI receives from the client. The
//! content is not checked (that is `checked`'s work); only rates matter here. Losing a datagram
//! or a connection is no error: a flow that lost its connection begins a new one a second later.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::Duration;

use crate::checked::unless_blocked;
use crate::pace::Pace;
use crate::params::Transport;
use crate::ports;
use crate::sys::{Watch, connect_without_blocking};

/// So much less than its network's MTU is a datagram's payload: with its headers it is never cut, also
/// where a tunnel takes its part.
const HEADERS: usize = 100;
/// The largest payload.
const DATAGRAM_MOST: usize = 9000 - HEADERS;
/// What a flow may make up for at once: an emulated CPU that shares its core stands still longer than a
/// tick of its own clock, and a flow that forgot that time would send a third less than its rate.
const CATCH_UP: Duration = Duration::from_millis(250);
/// Datagrams (or reads) per turn, so that traffic never starves the heartbeats.
const BATCH: usize = 64;
const RECONNECT_AFTER: Duration = Duration::from_secs(1);
/// Connections a sink keeps; the oldest gives way.
const CONNECTIONS: usize = 16;

/// A flow of traffic towards one sink.
#[derive(Debug)]
pub(crate) struct Outflow {
    peer: SocketAddrV4,
    pace: Pace,
    carrier: Carrier,
    sent: u64,
}

#[derive(Debug)]
enum Carrier {
    Udp { socket: UdpSocket, payload: usize },
    Tcp { socket: Option<TcpStream>, tried: Option<Duration> },
}

impl Outflow {
    /// A flow of `bits_per_s` to the sink at `peer`, in packets of at most `mtu` bytes.
    pub(crate) fn new(
        peer: Ipv4Addr,
        transport: Transport,
        (bits_per_s, mtu): (u64, usize),
        now: Duration,
    ) -> io::Result<Self> {
        let payload = mtu.saturating_sub(HEADERS).clamp(1, DATAGRAM_MOST);
        let carrier = match transport {
            Transport::Udp => Carrier::Udp { socket: any_udp_socket()?, payload },
            Transport::Tcp => Carrier::Tcp { socket: None, tried: None },
        };
        let pace = Pace::new(bits_per_s / 8, CATCH_UP, payload as u64, now);
        Ok(Self { peer: SocketAddrV4::new(peer, ports::SINK), pace, carrier, sent: 0 })
    }

    /// Bytes that were sent.
    pub(crate) fn sent(&self) -> u64 {
        self.sent
    }

    /// Sends what is due.
    pub(crate) fn drive(&mut self, now: Duration) {
        let due = self.pace.due(now) as usize;
        let taken = match &mut self.carrier {
            Carrier::Udp { socket, payload } => send_datagrams(socket, self.peer, due, *payload),
            Carrier::Tcp { socket, tried } => {
                reconnect(socket, tried, self.peer, now);
                send_stream(socket, due)
            }
        };
        self.pace.took(taken);
        self.sent += taken;
    }
}

/// A full buffer or an unreachable peer ends the turn; the credit is kept up to its cap.
fn send_datagrams(socket: &UdpSocket, peer: SocketAddrV4, due: usize, payload: usize) -> u64 {
    let datagram = &[0x5a; DATAGRAM_MOST][..payload];
    let count = (due / payload).min(BATCH);
    (0..count).take_while(|_| socket.send_to(datagram, peer).is_ok()).count() as u64
        * payload as u64
}

fn send_stream(socket: &mut Option<TcpStream>, due: usize) -> u64 {
    let block = [0x5a; 64 * 1024];
    let due = due.min(block.len());
    let Some(stream) = socket.as_mut().filter(|_| due > 0) else { return 0 };
    match unless_blocked(stream.write(&block[..due])) {
        Ok(taken) => taken.unwrap_or(0) as u64,
        Err(_) => {
            *socket = None;
            0
        }
    }
}

fn reconnect(
    socket: &mut Option<TcpStream>,
    tried: &mut Option<Duration>,
    peer: SocketAddrV4,
    now: Duration,
) {
    let wait = tried.is_some_and(|at| now.saturating_sub(at) < RECONNECT_AFTER);
    if socket.is_none() && !wait {
        *tried = Some(now);
        *socket = connect_without_blocking(peer).ok();
    }
}

fn any_udp_socket() -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// Takes what others send, counts it and drops it.
#[derive(Debug)]
pub(crate) struct Sink {
    udp: UdpSocket,
    listener: TcpListener,
    connections: Vec<TcpStream>,
    received: u64,
}

impl Sink {
    /// Listens on UDP and TCP on every address.
    pub(crate) fn new() -> io::Result<Self> {
        let udp = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, ports::SINK))?;
        udp.set_nonblocking(true)?;
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, ports::SINK))?;
        listener.set_nonblocking(true)?;
        Ok(Self { udp, listener, connections: Vec::new(), received: 0 })
    }

    /// Bytes that came.
    pub(crate) fn received(&self) -> u64 {
        self.received
    }

    /// What to wake up for: new connections only. Data is fetched at the loop's own pace, so
    /// that thousands of datagrams per second do not cost a wake-up each.
    pub(crate) fn watch(&self) -> Watch {
        Watch { fd: self.listener.as_raw_fd(), writable: false }
    }

    /// Takes what came.
    pub(crate) fn drive(&mut self) {
        let mut buffer = [0; 64 * 1024];
        for _ in 0..BATCH * 4 {
            let Ok(Some(count)) = unless_blocked(self.udp.recv(&mut buffer)) else { break };
            self.received += count as u64;
        }
        while let Ok((socket, _)) = self.listener.accept() {
            if socket.set_nonblocking(true).is_ok() {
                self.connections.push(socket);
            }
        }
        if self.connections.len() > CONNECTIONS {
            self.connections.remove(0);
        }
        let received = &mut self.received;
        self.connections.retain_mut(|socket| drain(socket, &mut buffer, received));
    }
}

/// Reads what is there; false when the connection has ended.
fn drain(socket: &mut TcpStream, buffer: &mut [u8], received: &mut u64) -> bool {
    for _ in 0..BATCH {
        match unless_blocked(socket.read(buffer)) {
            Ok(None) => return true,
            Ok(Some(0)) | Err(_) => return false,
            Ok(Some(count)) => *received += count as u64,
        }
    }
    true
}

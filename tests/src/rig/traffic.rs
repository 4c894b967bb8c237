//! Traffic whose bytes are counted where they arrive: TCP and UDP floods between two namespaces.
//!
//! Used by the experiments. Counting by ourselves, instead of reading what two programs report at
//! their ends, gives one window for all that shares a link. Plain threads: a flood must not share
//! an executor with what it competes against.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use super::RigError;
use super::network::Namespace;
use crate::clock;

/// Payload of a full TCP segment with timestamps, and its length as a link counts it (Ethernet
/// header included, as HTB does).
const SEGMENT: (f64, f64) = (1448.0, 1514.0);
/// Payload of our datagrams, and its length as a link counts it.
const DATAGRAM: (usize, f64) = (1458, 1500.0);
const TICK: Duration = Duration::from_millis(1);
const PATIENCE: Duration = Duration::from_millis(200);

/// What carries a flood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Carrier {
    /// As much as there is room for.
    Tcp,
    /// So many bit/s, whatever becomes of them.
    Udp(u64),
}

/// A flood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flow {
    /// What carries it.
    pub carrier: Carrier,
    /// Where it arrives.
    pub to: SocketAddrV4,
    /// The mark that its packets carry when they leave, 0 to 63.
    pub dscp: u8,
}

/// A flood that is under way; it ends when this is dropped.
#[derive(Debug)]
pub struct Flood {
    arrived: Arc<AtomicU64>,
    carrier: Carrier,
    over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<(), RigError>>>,
}

impl Flood {
    /// Starts to send from `source` to `destination`.
    ///
    /// # Errors
    /// When the address cannot be reached.
    pub fn start(
        source: &Namespace,
        destination: &Namespace,
        flow: Flow,
    ) -> Result<Self, RigError> {
        let arrived = Arc::new(AtomicU64::new(0));
        let over = Arc::new(AtomicBool::new(false));
        let mut flood = Self {
            arrived: arrived.clone(),
            carrier: flow.carrier,
            over: over.clone(),
            threads: vec![],
        };
        let cannot = format!("cannot send to {}", flow.to);
        match flow.carrier {
            Carrier::Tcp => {
                let listener = destination.within(move || TcpListener::bind(flow.to))?;
                let listener = listener.map_err(RigError::io(cannot.clone()))?;
                let stream =
                    source.within(move || connect(flow))?.map_err(RigError::io(cannot.clone()))?;
                let (accepted, _) = listener.accept().map_err(RigError::io(cannot))?;
                let counting = over.clone();
                flood.thread(destination, move || count_stream(accepted, &arrived, &counting))?;
                flood.thread(source, move || push_stream(stream, &over))?;
            }
            Carrier::Udp(rate) => {
                let socket = destination.within(move || UdpSocket::bind(flow.to))?;
                let socket = socket.map_err(RigError::io(cannot.clone()))?;
                let from = source.within(move || open(flow))?.map_err(RigError::io(cannot))?;
                let counting = over.clone();
                flood.thread(destination, move || count_datagrams(&socket, &arrived, &counting))?;
                flood.thread(source, move || push_datagrams(&from, flow.to, rate, &over))?;
            }
        }
        Ok(flood)
    }

    fn thread(
        &mut self,
        at: &Namespace,
        work: impl FnOnce() + Send + 'static,
    ) -> Result<(), RigError> {
        self.threads.push(at.spawn(work)?);
        Ok(())
    }

    /// Bits that arrived since the beginning, as a link counts them.
    #[must_use]
    pub fn bits_on_the_wire(&self) -> f64 {
        let payload = self.arrived.load(Ordering::Relaxed) as f64;
        let overhead = match self.carrier {
            Carrier::Tcp => SEGMENT.1 / SEGMENT.0,
            Carrier::Udp(_) => DATAGRAM.1 / DATAGRAM.0 as f64,
        };
        payload * 8.0 * overhead
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so on standard error.
            let _ = thread.join();
        }
    }
}

fn connect(flow: Flow) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect(flow.to)?;
    mark(&stream, flow.dscp)?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

fn open(flow: Flow) -> std::io::Result<UdpSocket> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    mark(&socket, flow.dscp)?;
    Ok(socket)
}

fn mark(socket: &impl AsFd, dscp: u8) -> std::io::Result<()> {
    Ok(rustix::net::sockopt::set_ip_tos(socket, dscp << 2)?)
}

fn push_stream(mut stream: TcpStream, over: &AtomicBool) {
    let chunk = vec![0x5a; 64 << 10];
    while !over.load(Ordering::Relaxed) {
        match stream.write(&chunk) {
            Ok(_) => (),
            Err(error) if is_patience(&error) => (),
            Err(_) => return,
        }
    }
    // What is still queued need not arrive.
    let _ = stream.shutdown(Shutdown::Both);
}

fn count_stream(mut stream: TcpStream, arrived: &AtomicU64, over: &AtomicBool) {
    let mut buffer = vec![0; 256 << 10];
    if stream.set_read_timeout(Some(PATIENCE)).is_err() {
        return;
    }
    while !over.load(Ordering::Relaxed) {
        match stream.read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => {
                arrived.fetch_add(length as u64, Ordering::Relaxed);
            }
            Err(error) if is_patience(&error) => (),
            Err(_) => return,
        }
    }
}

fn push_datagrams(socket: &UdpSocket, to: SocketAddrV4, rate: u64, over: &AtomicBool) {
    let datagram = vec![0x5a; DATAGRAM.0];
    let begin = clock::now();
    let mut sent = 0.0;
    while !over.load(Ordering::Relaxed) {
        let due = rate as f64 * clock::now().duration_since(begin).as_secs_f64();
        while sent < due {
            // A full queue loses a datagram here instead of on the way: the same to a flood.
            let _ = socket.send_to(&datagram, to);
            sent += DATAGRAM.1 * 8.0;
        }
        clock::rest(TICK);
    }
}

fn count_datagrams(socket: &UdpSocket, arrived: &AtomicU64, over: &AtomicBool) {
    let mut buffer = vec![0; 4096];
    if socket.set_read_timeout(Some(PATIENCE)).is_err() {
        return;
    }
    while !over.load(Ordering::Relaxed) {
        match socket.recv(&mut buffer) {
            Ok(length) => {
                arrived.fetch_add(length as u64, Ordering::Relaxed);
            }
            Err(error) if is_patience(&error) => (),
            Err(_) => return,
        }
    }
}

fn is_patience(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut)
}

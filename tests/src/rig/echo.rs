//! Round trips of small datagrams between two namespaces, at a steady beat.
//!
//! Used by the experiments that ask what somebody else's traffic does to an application. Measured
//! where an application would: from before the send to after the receive, in user space, so that
//! what the machine's scheduler adds is in it, with and without what is compared.

use std::net::{SocketAddr, SocketAddrV4, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::RigError;
use super::network::Namespace;
use crate::clock;

const PATIENCE: Duration = Duration::from_millis(200);
/// Of a small request and its answer.
const BYTES: usize = 64;

/// Asks `count` times, one question each `beat`, and returns how long each answer took; a lost one
/// took [`PATIENCE`].
///
/// # Errors
/// When the address cannot be had.
pub fn round_trips(
    from: &Namespace,
    at: &Namespace,
    to: SocketAddrV4,
    count: usize,
    beat: Duration,
) -> Result<Vec<Duration>, RigError> {
    let cannot = format!("cannot ask {to}");
    let answering =
        at.within(move || UdpSocket::bind(to))?.map_err(RigError::io(cannot.clone()))?;
    answering.set_read_timeout(Some(PATIENCE)).map_err(RigError::io(cannot.clone()))?;
    let over = Arc::new(AtomicBool::new(false));
    let ended = over.clone();
    let answerer = at.spawn(move || answer(&answering, &ended))?;
    let asked = from.within(move || ask(to, count, beat))?.map_err(RigError::io(cannot));
    over.store(true, Ordering::Relaxed);
    // A thread that panicked has said so on standard error.
    let _ = answerer.join();
    asked
}

fn answer(socket: &UdpSocket, over: &AtomicBool) {
    let mut buffer = [0; BYTES];
    while !over.load(Ordering::Relaxed) {
        if let Ok((length, from)) = socket.recv_from(&mut buffer) {
            // A full queue loses the answer, as the network might.
            let _ = socket.send_to(&buffer[..length], from);
        }
    }
}

fn ask(to: SocketAddrV4, count: usize, beat: Duration) -> std::io::Result<Vec<Duration>> {
    let socket = UdpSocket::bind(("0.0.0.0", 0))?;
    socket.connect(SocketAddr::V4(to))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let begin = clock::now();
    let mut took = Vec::with_capacity(count);
    for number in 0..count {
        let due = begin + beat.saturating_mul(u32::try_from(number).unwrap_or(u32::MAX));
        clock::rest(due.saturating_duration_since(clock::now()));
        took.push(one(&socket, number as u64)?);
    }
    Ok(took)
}

fn one(socket: &UdpSocket, number: u64) -> std::io::Result<Duration> {
    let mut question = [0; BYTES];
    question[..8].copy_from_slice(&number.to_be_bytes());
    let asked = clock::now();
    if socket.send(&question).is_err() {
        return Ok(PATIENCE);
    }
    let mut answer = [0; BYTES];
    loop {
        match socket.recv(&mut answer) {
            // A late answer to an earlier question is not this one's.
            Ok(_) if answer[..8] == question[..8] => {
                return Ok(clock::now().duration_since(asked));
            }
            Ok(_) => (),
            Err(error) if is_patience(&error) => return Ok(PATIENCE),
            Err(error) => return Err(error),
        }
    }
}

fn is_patience(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut)
}

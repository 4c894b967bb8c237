//! One connection with checked data flowing both ways at a rate: socket plus the two halves of
//! `stream`.
//!
//! Both sides use it. It never reconnects: that is the client's decision, and a loss that counts.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::time::Duration;

use crate::pace::Pace;
use crate::stream::{Incoming, Outgoing, WrongByte};
use crate::sys::Watch;

const BUFFER: usize = 16 * 1024;
/// Data leaves in portions of this much time's worth: a packet costs an emulated guest far more
/// than its bytes do.
const PORTIONS_PER_SECOND: u64 = 10;
/// Reads per turn: one busy connection must not keep the loop from the heartbeats.
const READS: usize = 8;

/// A connection with checked data.
#[derive(Debug)]
pub(crate) struct Checked {
    socket: TcpStream,
    outgoing: Outgoing,
    incoming: Incoming,
    pace: Pace,
    portion: u64,
}

impl Checked {
    /// Takes over a non-blocking socket. `ours` and `theirs` are the keys of the two directions.
    pub(crate) fn new(socket: TcpStream, ours: u64, theirs: u64, rate: u64, now: Duration) -> Self {
        Self {
            socket,
            outgoing: Outgoing::new(ours),
            incoming: Incoming::new(theirs),
            pace: Pace::new(rate, Duration::from_millis(200), 1, now),
            portion: (rate / PORTIONS_PER_SECOND).clamp(1, BUFFER as u64),
        }
    }

    /// Wake up when something came; what is to be sent waits for the pace, not for the socket.
    pub(crate) fn watch(&self) -> Watch {
        Watch { fd: self.socket.as_raw_fd(), writable: false }
    }

    /// Bytes that came so far.
    pub(crate) fn received(&self) -> u64 {
        self.incoming.position()
    }

    /// Bytes that the socket took so far.
    pub(crate) fn sent(&self) -> u64 {
        self.outgoing.position()
    }

    /// Sends what is due and checks what came. `Ok(Some(..))` is a wrong byte; `Err` is the end
    /// of the connection (an orderly end is `UnexpectedEof`).
    pub(crate) fn drive(&mut self, now: Duration) -> io::Result<Option<WrongByte>> {
        self.send(now)?;
        self.receive()
    }

    fn send(&mut self, now: Duration) -> io::Result<()> {
        let due = self.pace.due(now).min(BUFFER as u64) as usize;
        if (due as u64) < self.portion {
            return Ok(());
        }
        let mut buffer = [0; BUFFER];
        self.outgoing.peek(&mut buffer[..due]);
        if let Some(taken) = unless_blocked(self.socket.write(&buffer[..due]))? {
            self.outgoing.advance(taken);
            self.pace.took(taken as u64);
        }
        Ok(())
    }

    fn receive(&mut self) -> io::Result<Option<WrongByte>> {
        let mut buffer = [0; BUFFER];
        for _ in 0..READS {
            match unless_blocked(self.socket.read(&mut buffer))? {
                None => break,
                Some(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Some(count) => {
                    if let Err(wrong) = self.incoming.check(&buffer[..count]) {
                        return Ok(Some(wrong));
                    }
                }
            }
        }
        Ok(None)
    }
}

/// Turns "not now" into `None`. A connection that is still being made says `NotConnected`.
pub(crate) fn unless_blocked(result: io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Ok(count) => Ok(Some(count)),
        Err(error) => match error.kind() {
            io::ErrorKind::WouldBlock
            | io::ErrorKind::Interrupted
            | io::ErrorKind::NotConnected => Ok(None),
            _ => Err(error),
        },
    }
}

//! The client: outside of every guest, it asks, streams, sends, receives and keeps account.
//!
//! Runs in the lab's client host during a demo, test or experiment; writes a JSON report at the
//! end and a status file each second (see `report`). One thread, one `poll`. What it judges is
//! in `peer` and `gaps`; here are only the sockets and the beat.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

use crate::checked::Checked;
use crate::clock::{Clock, unix_time};
use crate::gaps::Gaps;
use crate::heartbeat;
use crate::params::{ClientParams, GuestPeer};
use crate::peer::Peer;
use crate::ports;
use crate::report::{Report, Row};
use crate::stream::{FROM_CLIENT, FROM_GUEST};
use crate::sys::{Watch, connect_without_blocking, stop_requested, wait};
use crate::traffic::{Outflow, Sink};

const SECOND: Duration = Duration::from_secs(1);
/// How long answers are still awaited after the last question.
const GRACE: Duration = Duration::from_millis(300);
/// A connection that brought nothing for so long is given up while it has carried nothing yet:
/// the guest was still booting when the first packets were sent.
const UNANSWERED: Duration = Duration::from_secs(3);

/// What ends a client early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    /// A socket could not be had, or waiting on the sockets failed.
    #[error("the client's sockets cannot be used")]
    Socket(#[from] io::Error),
    /// The report or status file cannot be written.
    #[error("cannot write {path}: check that its folder exists and has room")]
    Write {
        /// The file.
        path: std::path::PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
}

/// Runs until a signal comes or the duration is over, then writes the report.
pub(crate) fn run(params: ClientParams) -> Result<(), ClientError> {
    let mut client = Client::new(params)?;
    let mut end = client.params.duration;
    loop {
        client.beat()?;
        let now = client.clock.now();
        if stop_requested() && !client.ending {
            end = Some(now);
        }
        if let Some(end) = end.filter(|end| now >= *end) {
            client.ending = true;
            if now >= end + GRACE {
                return client.finish();
            }
        }
    }
}

struct Client {
    params: ClientParams,
    clock: Clock,
    epoch: Duration,
    guests: Vec<Guest>,
    sink: Sink,
    stalls: Gaps,
    next_question: Duration,
    next_status: Duration,
    ending: bool,
}

impl Client {
    fn new(params: ClientParams) -> io::Result<Self> {
        let clock = Clock::start();
        let guests = params.guests.iter().map(|guest| Guest::new(guest, &params, clock.now()));
        Ok(Self {
            guests: guests.collect::<io::Result<_>>()?,
            sink: Sink::new()?,
            stalls: Gaps::new(params.threshold / 2),
            epoch: unix_time(),
            next_question: Duration::ZERO,
            next_status: SECOND,
            ending: false,
            params,
            clock,
        })
    }

    fn beat(&mut self) -> Result<(), ClientError> {
        let rest = self.next_question.saturating_sub(self.clock.now());
        let watched: Vec<Watch> = self.guests.iter().flat_map(Guest::watched).collect();
        wait(&watched, rest)?;
        let now = self.clock.now();
        self.stalls.answered(now);
        self.guests.iter_mut().for_each(|guest| guest.hear(now));
        if now >= self.next_question {
            self.act(now);
            // After a stall the missed questions are not made up for: they would not have told
            // when the guest was silent.
            self.next_question = (self.next_question + self.params.interval).max(now);
        }
        if now >= self.next_status {
            self.next_status += SECOND;
            write_whole(&self.params.status, &self.report(false).to_json())?;
        }
        Ok(())
    }

    fn act(&mut self, now: Duration) {
        let ask = !self.ending;
        self.guests.iter_mut().for_each(|guest| guest.act(now, ask));
        self.sink.drive();
    }

    fn report(&self, last: bool) -> Report<'_> {
        let rows = self.guests.iter().map(|guest| Row {
            name: &guest.config.name,
            peer: &guest.peer,
            traffic_sent: guest.outflow.as_ref().map_or(0, Outflow::sent),
        });
        Report {
            last,
            now: self.clock.now(),
            epoch: self.epoch,
            interval: self.params.interval,
            threshold: self.params.threshold,
            sink_received: self.sink.received(),
            stalls: &self.stalls,
            rows: rows.collect(),
        }
    }

    /// The open gap of a guest that is silent now is seen in `silent_ms`; a guest that answered
    /// to the end has none, because the grace is shorter than what counts as alive.
    fn finish(mut self) -> Result<(), ClientError> {
        let now = self.clock.now();
        for guest in &mut self.guests {
            if guest.peer.gaps.silent_for(now).is_some_and(|silent| silent > GRACE * 2) {
                guest.peer.gaps.finish(now);
            }
        }
        let report = self.report(true).to_json();
        write_whole(&self.params.status, &report)?;
        write_whole(&self.params.out, &report)
    }
}

/// Writes beside the file and renames, so that a reader never sees half a report.
fn write_whole(path: &Path, text: &str) -> Result<(), ClientError> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    fs::write(&beside, text)
        .and_then(|()| fs::rename(&beside, path))
        .map_err(|cause| ClientError::Write { path: path.to_owned(), cause })
}

struct Guest {
    config: GuestPeer,
    peer: Peer,
    heartbeat: UdpSocket,
    stream: Option<Stream>,
    stream_rate: u64,
    outflow: Option<Outflow>,
}

struct Stream {
    checked: Checked,
    since: Duration,
    counted: u64,
}

/// Of the packets that it sends to guests of role NI, bytes: what every network takes.
const MTU: usize = 1500;

impl Guest {
    fn new(config: &GuestPeer, params: &ClientParams, now: Duration) -> io::Result<Self> {
        let heartbeat = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        heartbeat.set_nonblocking(true)?;
        let outflow = match config.source {
            0 => None,
            rate => Some(Outflow::new(config.ip, config.transport, (rate, MTU), now)?),
        };
        let peer = Peer::new(params.threshold);
        let (config, stream_rate) = (config.clone(), params.stream);
        Ok(Self { config, peer, heartbeat, stream: None, stream_rate, outflow })
    }

    fn watched(&self) -> impl Iterator<Item = Watch> {
        let heartbeat = Watch { fd: self.heartbeat.as_raw_fd(), writable: false };
        let stream = self.stream.as_ref().map(|stream| stream.checked.watch());
        std::iter::once(heartbeat).chain(stream)
    }

    fn hear(&mut self, now: Duration) {
        let mut buffer = [0; heartbeat::ANSWER_BYTES + 1];
        while let Ok((count, from)) = self.heartbeat.recv_from(&mut buffer) {
            let answer = heartbeat::read_answer(&buffer[..count]);
            if let Some(answer) = answer.filter(|_| from.ip() == self.config.ip) {
                self.peer.answered(now, answer);
            }
        }
        self.drive_stream(now);
    }

    fn act(&mut self, now: Duration, ask: bool) {
        if ask {
            let question = heartbeat::question(self.peer.next_question());
            let to = SocketAddrV4::new(self.config.ip, ports::HEARTBEAT);
            // A question that the network refuses is one that gets no answer: it is counted so.
            let _ = self.heartbeat.send_to(&question, to);
        }
        if let Some(outflow) = &mut self.outflow {
            outflow.drive(now);
        }
        self.keep_stream(now);
    }

    fn keep_stream(&mut self, now: Duration) {
        let stale =
            |stream: &Stream| stream.counted == 0 && now.saturating_sub(stream.since) > UNANSWERED;
        if self.stream.as_ref().is_some_and(stale) {
            self.stream = None;
        }
        // Only a guest that answers is connected to: the others are booting or gone.
        let answers = self.peer.gaps.silent_for(now).is_some_and(|silent| silent < SECOND);
        if self.stream.is_none() && answers {
            let to = SocketAddrV4::new(self.config.ip, ports::STREAM);
            self.stream = connect_without_blocking(to).ok().map(|socket| {
                let checked = Checked::new(socket, FROM_CLIENT, FROM_GUEST, self.stream_rate, now);
                Stream { checked, since: now, counted: 0 }
            });
        }
    }

    fn drive_stream(&mut self, now: Duration) {
        let Some(stream) = &mut self.stream else { return };
        let outcome = stream.checked.drive(now);
        let received = stream.checked.received();
        self.peer.streamed(now, received - stream.counted);
        stream.counted = received;
        match outcome {
            Ok(None) => {}
            Ok(Some(wrong)) => {
                eprintln!("LIFEBOAT-CORRUPT {} {wrong}", self.config.name);
                self.peer.stream_errors += 1;
            }
            Err(_) => {
                self.peer.stream_lost += u64::from(received > 0);
                self.stream = None;
            }
        }
    }
}

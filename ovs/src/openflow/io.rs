//! OpenFlow connections on tokio: accepting switches, connecting to one, and a handle on each.
//!
//! Used by the controller. [`run_connection`] runs over any stream, so that whoever has
//! certificates can wrap it first. Not here: what the messages mean ([`super::session`] knows what
//! belongs together, nobody here knows what it is for).
//!
//! One task a connection. It is the only one that touches the session; handles send it requests.
//! Every branch of its `select!` is cancel-safe: `read_buf` and `write_buf` have either happened or
//! not, and a channel's `recv` loses nothing.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use rust_openflow::Message;
use rust_openflow::flow::FlowMod;
use rust_openflow::meter::MeterMod;
use rust_openflow::multipart::{
    ALL_QUEUES, Description, FlowFilter, FlowStats, MeterStats, PortStats, QueueStats, Reply,
    Request,
};
use rust_openflow::packet::PacketOut;
use rust_openflow::switch::{Features, Port};
use rust_openflow::types::PortNo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{sleep_until, timeout};

use super::session::{Answer, Event, RequestError, RequestId, Session, SessionError, Settings};
use crate::clock::now;
use crate::endpoint::Endpoint;
use crate::tasks;

/// Requests that wait for the connection's task, and events that wait for their reader.
const QUEUE: usize = 1024;

/// How long to wait before accepting again when the system has no descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Something that has happened on a connection.
#[derive(Debug)]
pub struct SwitchEvent {
    /// Where the switch is, for people.
    pub peer: String,
    /// Who it is; `None` before it has said so.
    pub datapath_id: Option<u64>,
    /// What has happened.
    pub what: WhatHappened,
}

/// What has happened on a connection.
#[derive(Debug)]
pub enum WhatHappened {
    /// A switch is there.
    Connected {
        /// To ask it and change it.
        handle: SwitchHandle,
        /// What it says of itself.
        features: Features,
    },
    /// It is gone; `None` when it (or we) just closed the connection.
    Disconnected(Option<ConnectionError>),
    /// A message that was not asked for: port status, packet-in, flow removed, or an error.
    Message(Message),
}

/// Why a connection has ended.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// What the switch says, or does not say.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// What the operating system says.
    #[error("the connection to the switch broke")]
    Io(#[from] io::Error),
}

/// What happens on all connections of one listener, or on one connection.
pub type Switches = mpsc::Receiver<SwitchEvent>;

/// A socket that switches connect to. Dropping it closes it, not the connections.
#[derive(Debug)]
pub struct Listener {
    address: SocketAddr,
    _task: tasks::Owned,
}

impl Listener {
    /// Where it listens, with the port that was chosen when 0 was asked for.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

/// Accepts switches over TCP, with TLS where the settings have it.
///
/// # Errors
/// When the address cannot be listened on.
pub async fn listen(address: SocketAddr, settings: Settings) -> io::Result<(Listener, Switches)> {
    let listener = TcpListener::bind(address).await?;
    let address = listener.local_addr()?;
    let (events, switches) = mpsc::channel(QUEUE);
    let task = tasks::Owned::start(accept(listener, settings, events));
    Ok((Listener { address, _task: task }, switches))
}

async fn accept(listener: TcpListener, settings: Settings, events: mpsc::Sender<SwitchEvent>) {
    while !events.is_closed() {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a switch");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, %peer, "cannot set nodelay");
        }
        let (settings, events) = (settings.clone(), events.clone());
        tasks::start(begin(stream, peer, settings, events));
    }
}

/// From an accepted stream to a connection. Who does not get through the handshake is told of, as
/// any other connection that ends.
async fn begin(
    stream: TcpStream,
    peer: SocketAddr,
    settings: Settings,
    events: mpsc::Sender<SwitchEvent>,
) {
    let Some(tls) = settings.tls.clone() else {
        return run_connection(stream, format!("tcp:{peer}"), settings, events).await;
    };
    let peer = format!("ssl:{peer}");
    let secured = timeout(settings.handshake_within, tls.accept(stream)).await;
    match secured.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
        Ok(stream) => run_connection(stream, peer, settings, events).await,
        Err(error) => {
            let what = WhatHappened::Disconnected(Some(error.into()));
            // Without a reader there is nobody to tell.
            let _ = events.send(SwitchEvent { peer, datapath_id: None, what }).await;
        }
    }
}

/// Connects to a switch, such as `unix:/run/openvswitch/br0.mgmt`. Once; whoever wants it again
/// after [`WhatHappened::Disconnected`] asks again.
///
/// # Errors
/// When there is nobody.
pub async fn connect(endpoint: &Endpoint, settings: Settings) -> io::Result<Switches> {
    let stream = endpoint.open(settings.tls.as_ref()).await?;
    let (events, switches) = mpsc::channel(QUEUE);
    tasks::start(run_connection(stream, endpoint.to_string(), settings, events));
    Ok(switches)
}

/// Runs one connection over any stream until it ends, and tells what happens.
///
/// Packet-ins and flow removals are dropped when `events` is full, as a switch may send them
/// faster than anybody reads; the rest waits for room, and the switch with it.
pub async fn run_connection(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin,
    peer: String,
    settings: Settings,
    events: mpsc::Sender<SwitchEvent>,
) {
    let (requests, inbox) = mpsc::channel(QUEUE);
    let mut connection = Connection {
        session: Session::new(settings, now()),
        peer,
        datapath_id: None,
        waiting: BTreeMap::new(),
        handle: Some(SwitchHandle { requests }),
        events,
        dropped: 0,
    };
    let end = connection.run(stream, inbox).await;
    connection.session.close();
    connection.tell_events().await;
    tracing::debug!(peer = connection.peer, dropped = connection.dropped, "switch gone");
    connection.tell(WhatHappened::Disconnected(end.err())).await;
}

type Outcome = Result<Answer, RequestError>;

#[derive(Debug)]
enum Wanted {
    Question(Message),
    Changes(Vec<Message>),
}

#[derive(Debug)]
struct Asked {
    wanted: Wanted,
    within: Duration,
    reply: oneshot::Sender<Outcome>,
}

struct Connection {
    session: Session,
    peer: String,
    datapath_id: Option<u64>,
    waiting: BTreeMap<RequestId, oneshot::Sender<Outcome>>,
    /// Kept until the switch is up; then it is given away, and the inbox closes with the last one.
    handle: Option<SwitchHandle>,
    events: mpsc::Sender<SwitchEvent>,
    dropped: u64,
}

impl Connection {
    async fn run(
        &mut self,
        stream: impl AsyncRead + AsyncWrite + Send + Unpin,
        mut inbox: mpsc::Receiver<Asked>,
    ) -> Result<(), ConnectionError> {
        let (mut reading, mut writing) = tokio::io::split(stream);
        let mut arrived = BytesMut::with_capacity(16 << 10);
        loop {
            self.tell_events().await;
            let deadline = self.session.next_tick().into();
            let unwritten = !self.session.output().is_empty();
            tokio::select! {
                read = reading.read_buf(&mut arrived) => {
                    if read? == 0 {
                        return Ok(());
                    }
                    let taken = self.session.receive(now(), &arrived);
                    arrived.clear();
                    if let Err(error) = taken {
                        // The switch's own log should say why, too; it may be gone already.
                        let last = self.session.output().split();
                        let _ = timeout(ACCEPT_PAUSE, writing.write_all(&last)).await;
                        return Err(error.into());
                    }
                }
                written = writing.write_buf(self.session.output()), if unwritten => {
                    if written? == 0 && self.session.output().has_remaining() {
                        return Err(io::Error::from(io::ErrorKind::WriteZero).into());
                    }
                }
                asked = inbox.recv() => match asked {
                    Some(asked) => self.ask(asked),
                    None => return Ok(()),
                },
                () = sleep_until(deadline) => self.session.tick(now())?,
            }
        }
    }

    fn ask(&mut self, asked: Asked) {
        let Asked { wanted, within, reply } = asked;
        let sent = match wanted {
            Wanted::Question(message) => self.session.ask(now(), within, &message),
            Wanted::Changes(messages) => self.session.change(now(), within, &messages),
        };
        match sent {
            Ok(id) => {
                self.waiting.insert(id, reply);
            }
            // Who asked may have stopped waiting; then nobody wants to know.
            Err(error) => drop(reply.send(Err(error))),
        }
    }

    async fn tell_events(&mut self) {
        while let Some(event) = self.session.next_event() {
            match event {
                Event::Up(features) => {
                    self.datapath_id = Some(features.datapath_id);
                    if let Some(handle) = self.handle.take() {
                        self.tell(WhatHappened::Connected { handle, features }).await;
                    }
                }
                Event::Finished(id, outcome) => {
                    if let Some(reply) = self.waiting.remove(&id) {
                        drop(reply.send(outcome));
                    }
                }
                Event::Asynchronous(message) => self.tell_message(message).await,
                Event::Skipped(error) => {
                    tracing::warn!(%error, peer = self.peer, "skipped a message of the switch");
                }
            }
        }
    }

    async fn tell_message(&mut self, message: Message) {
        let droppable = matches!(message, Message::PacketIn(_) | Message::FlowRemoved(_));
        if droppable && self.events.capacity() == 0 {
            self.dropped += 1;
            return;
        }
        self.tell(WhatHappened::Message(message)).await;
    }

    async fn tell(&self, what: WhatHappened) {
        let (peer, datapath_id) = (self.peer.clone(), self.datapath_id);
        // Without a reader there is nobody to tell; requests still work.
        let _ = self.events.send(SwitchEvent { peer, datapath_id, what }).await;
    }
}

/// A connected switch. Cloning is cheap; when the last one is dropped the connection closes.
#[derive(Debug, Clone)]
pub struct SwitchHandle {
    requests: mpsc::Sender<Asked>,
}

impl SwitchHandle {
    /// Does all changes in their order, then waits until the switch says that it has.
    ///
    /// # Errors
    /// The first refusal; the changes after it have been tried all the same.
    pub async fn change(
        &self,
        changes: Vec<Message>,
        within: Duration,
    ) -> Result<(), RequestError> {
        self.request(Wanted::Changes(changes), within).await.map(|_| ())
    }

    /// Changes flows.
    ///
    /// # Errors
    /// As [`Self::change`].
    pub async fn flow_mod(&self, flow: FlowMod, within: Duration) -> Result<(), RequestError> {
        self.change(vec![Message::FlowMod(flow)], within).await
    }

    /// Changes a meter.
    ///
    /// # Errors
    /// As [`Self::change`].
    pub async fn meter_mod(&self, meter: MeterMod, within: Duration) -> Result<(), RequestError> {
        self.change(vec![Message::MeterMod(meter)], within).await
    }

    /// Waits until the switch has done all that it was sent.
    ///
    /// # Errors
    /// When it does not say so in time.
    pub async fn barrier(&self, within: Duration) -> Result<(), RequestError> {
        self.change(Vec::new(), within).await
    }

    /// Has the switch send a packet.
    ///
    /// # Errors
    /// As [`Self::change`].
    pub async fn packet_out(
        &self,
        packet: PacketOut,
        within: Duration,
    ) -> Result<(), RequestError> {
        self.change(vec![Message::PacketOut(packet)], within).await
    }

    /// Counters of a port, or of all ([`PortNo::ANY`]).
    ///
    /// # Errors
    /// No answer. For a port that does not exist Open vSwitch answers with none.
    pub async fn port_stats(
        &self,
        port: PortNo,
        within: Duration,
    ) -> Result<Vec<PortStats>, RequestError> {
        match self.question(Request::Port(port), within).await? {
            Reply::Port(stats) => Ok(stats),
            _ => Err(WRONG),
        }
    }

    /// Counters of all queues of a port, or of all ports.
    ///
    /// # Errors
    /// `OFPQOFC_BAD_PORT` for a port that does not exist; or no answer.
    pub async fn queue_stats(
        &self,
        port: PortNo,
        within: Duration,
    ) -> Result<Vec<QueueStats>, RequestError> {
        match self.question(Request::Queue { port, queue: ALL_QUEUES }, within).await? {
            Reply::Queue(stats) => Ok(stats),
            _ => Err(WRONG),
        }
    }

    /// The flows of all tables whose cookie agrees with `cookie` in the bits of `mask`.
    ///
    /// # Errors
    /// No answer.
    pub async fn flow_stats(
        &self,
        cookie: u64,
        mask: u64,
        within: Duration,
    ) -> Result<Vec<FlowStats>, RequestError> {
        let request = Request::Flow(FlowFilter::by_cookie(cookie, mask));
        match self.question(request, within).await? {
            Reply::Flow(stats) => Ok(stats),
            _ => Err(WRONG),
        }
    }

    /// Counters of a meter, or of all ([`rust_openflow::meter::ALL_METERS`]).
    ///
    /// # Errors
    /// `OFPMMFC_UNKNOWN_METER`; or no answer.
    pub async fn meter_stats(
        &self,
        meter: u32,
        within: Duration,
    ) -> Result<Vec<MeterStats>, RequestError> {
        match self.question(Request::Meter(meter), within).await? {
            Reply::Meter(stats) => Ok(stats),
            _ => Err(WRONG),
        }
    }

    /// The ports.
    ///
    /// # Errors
    /// No answer.
    pub async fn port_desc(&self, within: Duration) -> Result<Vec<Port>, RequestError> {
        match self.question(Request::PortDescription, within).await? {
            Reply::PortDescription(ports) => Ok(ports),
            _ => Err(WRONG),
        }
    }

    /// Who made the switch.
    ///
    /// # Errors
    /// No answer.
    pub async fn desc(&self, within: Duration) -> Result<Description, RequestError> {
        match self.question(Request::Description, within).await? {
            Reply::Description(description) => Ok(*description),
            _ => Err(WRONG),
        }
    }

    /// Any multipart question.
    ///
    /// # Errors
    /// The switch's refusal, or no answer.
    pub async fn question(
        &self,
        request: Request,
        within: Duration,
    ) -> Result<Reply, RequestError> {
        let wanted = Wanted::Question(Message::question(request));
        match self.request(wanted, within).await? {
            Answer::Reply(reply) => Ok(reply),
            Answer::Done | Answer::Message(_) => Err(WRONG),
        }
    }

    async fn request(&self, wanted: Wanted, within: Duration) -> Outcome {
        let (reply, outcome) = oneshot::channel();
        let asked = Asked { wanted, within, reply };
        // The session keeps the deadline; this one holds even when its task waits for a reader of
        // its events.
        let answer = async {
            self.requests.send(asked).await.map_err(|_| RequestError::Disconnected)?;
            outcome.await.map_err(|_| RequestError::Disconnected)?
        };
        let patience = within + within / 4;
        timeout(patience, answer).await.unwrap_or(Err(RequestError::TimedOut { within }))
    }
}

/// The session has compared the types already; this is what the compiler still asks about.
const WRONG: RequestError = RequestError::WrongAnswer { kind: 19 };

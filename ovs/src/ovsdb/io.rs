//! A database server over tokio: one task that connects, and connects again, and a handle on it.
//!
//! Used by [`crate::qos`] and the controller. Not here: what transactions are for.
//!
//! The task is the only one that touches the session. A request fails at once while there is no
//! connection; monitors survive, and are asked for anew with each connection. Every branch of the
//! `select!` is cancel-safe: `read_buf` and `write_buf` have either happened or not, and a
//! channel's `recv` loses nothing.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use bytes::BytesMut;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{sleep, sleep_until, timeout};

use super::cache::{Cache, Change};
use super::operation::{Condition, Mutation, Operation, Outcome, TransactError, outcomes};
use super::session::{Event, RequestError, RequestId, Session, SessionError, Settings};
use super::value::{Datum, Row};
use crate::clock::now;
use crate::endpoint::{Endpoint, Stream};
use crate::tasks;

/// Requests that wait for the task.
const QUEUE: usize = 256;
/// The database of a switch.
const DATABASE: &str = "Open_vSwitch";

/// Whether there is a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Status {
    /// Not yet, or not any more; and the last reason, if there was one.
    Disconnected(Option<String>),
    /// There is.
    Connected,
}

/// Why a transaction has no result, or changed nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClientError {
    /// There is no answer.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// The answer is no.
    #[error(transparent)]
    Transact(#[from] TransactError),
    /// The rows are there, and the switch has not installed them.
    #[error("the switch has not installed configuration {wanted} within {within:?}")]
    NotInstalled {
        /// Number of the configuration that was waited for.
        wanted: i64,
        /// The limit.
        within: Duration,
    },
}

type Outcomes = Result<Value, RequestError>;

#[derive(Debug)]
enum Asked {
    Request {
        method: &'static str,
        params: Value,
        within: Duration,
        reply: oneshot::Sender<Outcomes>,
    },
    Monitor {
        tables: Value,
        within: Duration,
        reply: oneshot::Sender<Result<Monitor, RequestError>>,
    },
}

/// A database server. Cloning is cheap; when the last one is dropped the connection closes.
#[derive(Debug, Clone)]
pub struct Client {
    requests: mpsc::Sender<Asked>,
    status: watch::Receiver<Status>,
}

/// Rows of some columns of some tables, kept up to date across reconnections.
#[derive(Debug)]
pub struct Monitor {
    newest: watch::Receiver<Cache>,
    seen: Cache,
}

impl Monitor {
    /// The rows as they are now.
    pub fn rows(&self) -> Cache {
        self.newest.borrow().clone()
    }

    /// Waits for changes since the last call (the first one: since the beginning). Several changes
    /// of a row may have become one. `None` when the client is gone.
    pub async fn changes(&mut self) -> Option<Vec<Change>> {
        loop {
            self.newest.changed().await.ok()?;
            let newest = self.newest.borrow_and_update().clone();
            let changes = newest.changes_since(&self.seen);
            self.seen = newest;
            if !changes.is_empty() {
                return Some(changes);
            }
        }
    }
}

impl Client {
    /// Starts connecting to a server, and keeps doing so.
    pub fn start(endpoint: Endpoint, settings: Settings) -> Self {
        let (requests, inbox) = mpsc::channel(QUEUE);
        let (status, reader) = watch::channel(Status::Disconnected(None));
        let driver =
            Driver { endpoint, settings, inbox, status, monitors: BTreeMap::new(), named: 0 };
        tasks::start(driver.run());
        Self { requests, status: reader }
    }

    /// Whether there is a connection, now and when it changes.
    pub fn status(&self) -> watch::Receiver<Status> {
        self.status.clone()
    }

    /// Waits for a connection.
    ///
    /// # Errors
    /// When there is none in time.
    pub async fn connected(&self, within: Duration) -> Result<(), RequestError> {
        let mut status = self.status.clone();
        match timeout(within, status.wait_for(|status| *status == Status::Connected)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(RequestError::Disconnected),
        }
    }

    /// Does all of these, or none.
    ///
    /// # Errors
    /// With the server's own words, when it refuses. After [`RequestError::TimedOut`] and
    /// [`RequestError::Disconnected`] it may have been done.
    pub async fn transact(
        &self,
        operations: &[Operation],
        within: Duration,
    ) -> Result<Vec<Outcome>, ClientError> {
        let database = std::iter::once(json!(DATABASE));
        let params = database.chain(operations.iter().map(Operation::to_json)).collect();
        let result = self.request("transact", params, within).await?;
        Ok(outcomes(operations.len(), &result)?)
    }

    /// The same, and waits until the switch has installed it.
    ///
    /// # Errors
    /// As [`Self::transact`]; [`ClientError::NotInstalled`] when it is written and not installed
    /// in time.
    pub async fn install(
        &self,
        mut operations: Vec<Operation>,
        within: Duration,
    ) -> Result<Vec<Outcome>, ClientError> {
        let deadline = now() + within;
        let count = operations.len();
        operations.push(next_configuration());
        operations.push(Operation::select("Open_vSwitch", Vec::new(), &["next_cfg"]));
        let mut outcomes = self.transact(&operations, within).await?;
        let wanted = integer(outcomes.last(), "next_cfg");
        outcomes.truncate(count);
        let left = deadline.saturating_duration_since(now());
        match self.wait_for_cur_cfg(wanted, left).await {
            Err(ClientError::NotInstalled { .. }) => {
                Err(ClientError::NotInstalled { wanted, within })
            }
            other => other.map(|()| outcomes),
        }
    }

    /// Waits until the switch has installed configuration `wanted` or a later one.
    ///
    /// Others may ask for configurations, too, so that the switch can skip a number: what is waited
    /// for is a change, not the number.
    ///
    /// # Errors
    /// [`ClientError::NotInstalled`] when it has not in time.
    pub async fn wait_for_cur_cfg(&self, wanted: i64, within: Duration) -> Result<(), ClientError> {
        let deadline = now() + within;
        loop {
            let read = Operation::select("Open_vSwitch", Vec::new(), &["cur_cfg"]);
            let patience = Duration::from_secs(1).max(within);
            let current = integer(self.transact(&[read], patience).await?.first(), "cur_cfg");
            if current >= wanted {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(now());
            let not_installed = ClientError::NotInstalled { wanted, within };
            let wait = changed_from(current, left);
            match self.transact(&[wait], left + Duration::from_secs(1)).await {
                Err(ClientError::Transact(error)) if error.is_timed_out() => {
                    return Err(not_installed);
                }
                other => other?,
            };
        }
    }

    /// Follows columns of tables.
    ///
    /// # Errors
    /// When there is no connection, or the server knows no such table or column.
    pub async fn monitor(
        &self,
        tables: &[(&str, &[&str])],
        within: Duration,
    ) -> Result<Monitor, RequestError> {
        let columns = |columns: &[&str]| json!({ "columns": columns });
        let tables = tables.iter().map(|(table, wanted)| ((*table).to_owned(), columns(wanted)));
        let tables = Value::Object(tables.collect());
        let (reply, monitor) = oneshot::channel();
        self.send(Asked::Monitor { tables, within, reply }).await?;
        monitor.await.map_err(|_| RequestError::Disconnected)?
    }

    async fn request(&self, method: &'static str, params: Value, within: Duration) -> Outcomes {
        let (reply, outcome) = oneshot::channel();
        self.send(Asked::Request { method, params, within, reply }).await?;
        outcome.await.map_err(|_| RequestError::Disconnected)?
    }

    async fn send(&self, asked: Asked) -> Result<(), RequestError> {
        self.requests.send(asked).await.map_err(|_| RequestError::Disconnected)
    }
}

/// The switch answers a new `next_cfg` with an equal `cur_cfg` when it has done all before it.
fn next_configuration() -> Operation {
    let column = "next_cfg".to_owned();
    let mutation = Mutation { column, mutator: "+=", value: 1.into() };
    let (table, conditions) = ("Open_vSwitch".to_owned(), Vec::<Condition>::new());
    Operation::Mutate { table, conditions, mutations: vec![mutation] }
}

fn changed_from(current: i64, within: Duration) -> Operation {
    Operation::Wait {
        table: "Open_vSwitch".to_owned(),
        conditions: Vec::new(),
        columns: vec!["cur_cfg".to_owned()],
        equal: false,
        rows: vec![Row::from([("cur_cfg".to_owned(), Datum::from(current))])],
        within,
    }
}

fn integer(outcome: Option<&Outcome>, column: &str) -> i64 {
    let row = outcome.and_then(|outcome| outcome.rows.first());
    row.and_then(|row| row.get(column)?.integer()).unwrap_or_default()
}

impl From<i32> for Datum {
    fn from(value: i32) -> Self {
        i64::from(value).into()
    }
}

struct Watched {
    tables: Value,
    newest: watch::Sender<Cache>,
}

struct Driver {
    endpoint: Endpoint,
    settings: Settings,
    inbox: mpsc::Receiver<Asked>,
    status: watch::Sender<Status>,
    monitors: BTreeMap<u64, Watched>,
    named: u64,
}

#[derive(Debug, thiserror::Error)]
enum End {
    #[error("all handles are gone")]
    Unwanted,
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error("the connection broke: {0}")]
    Io(#[from] io::Error),
}

impl Driver {
    async fn run(mut self) {
        let mut pause = self.settings.backoff_min;
        loop {
            let begun = now();
            let end = self.connection().await;
            if matches!(end, End::Unwanted) {
                return;
            }
            tracing::debug!(server = %self.endpoint, %end, "no connection");
            self.status.send_replace(Status::Disconnected(Some(end.to_string())));
            // A connection that lasted has earned a quick return.
            if now().saturating_duration_since(begun) > self.settings.backoff_max {
                pause = self.settings.backoff_min;
            }
            if self.refuse_during(sleep(pause)).await.is_err() {
                return;
            }
            pause = (pause * 2).min(self.settings.backoff_max);
        }
    }

    /// Until `done`, tells everybody who asks that there is no connection.
    async fn refuse_during<T>(&mut self, done: impl Future<Output = T>) -> Result<T, End> {
        tokio::pin!(done);
        loop {
            tokio::select! {
                result = &mut done => return Ok(result),
                asked = self.inbox.recv() => match asked {
                    // Who asked may have stopped waiting; then nobody wants to know.
                    Some(Asked::Request { reply, .. }) => {
                        drop(reply.send(Err(RequestError::Disconnected)));
                    }
                    Some(Asked::Monitor { reply, .. }) => {
                        drop(reply.send(Err(RequestError::Disconnected)));
                    }
                    None => return Err(End::Unwanted),
                },
            }
        }
    }

    async fn connection(&mut self) -> End {
        let (endpoint, tls) = (self.endpoint.clone(), self.settings.tls.clone());
        let opening = timeout(self.settings.probe_after, endpoint.open(tls.as_ref()));
        let stream = match self.refuse_during(opening).await {
            Ok(Ok(Ok(stream))) => stream,
            Ok(Ok(Err(error))) => return error.into(),
            Ok(Err(_)) => return io::Error::from(io::ErrorKind::TimedOut).into(),
            Err(end) => return end,
        };
        let mut connection = Connection {
            session: Session::new(self.settings.clone(), now()),
            waiting: BTreeMap::new(),
            driver: self,
        };
        connection.ask_for_monitors();
        connection.driver.status.send_replace(Status::Connected);
        let end = connection.run(stream).await;
        connection.session.close();
        connection.tell_events();
        end
    }
}

enum Waiting {
    Answer(oneshot::Sender<Outcomes>),
    /// Rows for the monitor of this name, and who waits for the monitor itself.
    Rows(u64, Option<oneshot::Sender<Result<Monitor, RequestError>>>),
}

struct Connection<'a> {
    session: Session,
    waiting: BTreeMap<RequestId, Waiting>,
    driver: &'a mut Driver,
}

impl Connection<'_> {
    async fn run(&mut self, stream: Box<dyn Stream>) -> End {
        match self.serve(stream).await {
            Ok(()) => io::Error::from(io::ErrorKind::UnexpectedEof).into(),
            Err(end) => end,
        }
    }

    async fn serve(&mut self, stream: Box<dyn Stream>) -> Result<(), End> {
        let (mut reading, mut writing) = tokio::io::split(stream);
        let mut arrived = BytesMut::with_capacity(64 << 10);
        loop {
            self.tell_events();
            let deadline = self.session.next_tick().into();
            let unwritten = !self.session.output().is_empty();
            tokio::select! {
                read = reading.read_buf(&mut arrived) => {
                    if read? == 0 {
                        return Ok(());
                    }
                    self.session.receive(now(), &arrived)?;
                    arrived.clear();
                }
                written = writing.write_buf(self.session.output()), if unwritten => {
                    written?;
                }
                asked = self.driver.inbox.recv() => match asked {
                    Some(asked) => self.ask(asked),
                    None => return Err(End::Unwanted),
                },
                () = sleep_until(deadline) => self.session.tick(now())?,
            }
        }
    }

    fn ask(&mut self, asked: Asked) {
        match asked {
            Asked::Request { method, params, within, reply } => {
                match self.session.request(now(), within, method, &params) {
                    Ok(id) => drop(self.waiting.insert(id, Waiting::Answer(reply))),
                    Err(error) => drop(reply.send(Err(error))),
                }
            }
            Asked::Monitor { tables, within, reply } => {
                self.driver.named += 1;
                let name = self.driver.named;
                let (newest, _) = watch::channel(Cache::default());
                self.driver.monitors.insert(name, Watched { tables, newest });
                self.ask_for_rows(name, within, Some(reply));
            }
        }
    }

    fn ask_for_monitors(&mut self) {
        self.driver.monitors.retain(|_, watched| watched.newest.receiver_count() > 0);
        let names: Vec<_> = self.driver.monitors.keys().copied().collect();
        for name in names {
            self.ask_for_rows(name, self.driver.settings.probe_after, None);
        }
    }

    fn ask_for_rows(
        &mut self,
        name: u64,
        within: Duration,
        reply: Option<oneshot::Sender<Result<Monitor, RequestError>>>,
    ) {
        let Some(watched) = self.driver.monitors.get(&name) else { return };
        let params = json!([DATABASE, name, watched.tables]);
        match self.session.request(now(), within, "monitor", &params) {
            Ok(id) => drop(self.waiting.insert(id, Waiting::Rows(name, reply))),
            Err(error) => {
                self.driver.monitors.remove(&name);
                drop(reply.map(|reply| reply.send(Err(error))));
            }
        }
    }

    fn tell_events(&mut self) {
        while let Some(event) = self.session.next_event() {
            match event {
                Event::Finished(id, result) => match self.waiting.remove(&id) {
                    Some(Waiting::Answer(reply)) => drop(reply.send(result)),
                    Some(Waiting::Rows(name, reply)) => self.begin(name, result, reply),
                    None => {}
                },
                Event::Update { monitor, updates } => {
                    let watched = monitor.as_u64().and_then(|name| self.driver.monitors.get(&name));
                    if let Some(watched) = watched {
                        watched.newest.send_modify(|cache| take(cache, &updates));
                    }
                }
            }
        }
    }

    /// The rows with which a monitor begins, or begins anew.
    fn begin(
        &mut self,
        name: u64,
        result: Outcomes,
        reply: Option<oneshot::Sender<Result<Monitor, RequestError>>>,
    ) {
        let rows = match (result, reply.is_some()) {
            (Ok(rows), _) => rows,
            // The next connection asks again for a monitor that has worked before.
            (Err(_), false) => return,
            (Err(error), true) => {
                self.driver.monitors.remove(&name);
                drop(reply.map(|reply| reply.send(Err(error))));
                return;
            }
        };
        let Some(watched) = self.driver.monitors.get(&name) else { return };
        let mut cache = Cache::default();
        take(&mut cache, &rows);
        watched.newest.send_replace(cache);
        if let Some(reply) = reply {
            let mut newest = watched.newest.subscribe();
            newest.mark_changed();
            drop(reply.send(Ok(Monitor { newest, seen: Cache::default() })));
        }
    }
}

fn take(cache: &mut Cache, updates: &Value) {
    if let Err(error) = cache.update(updates) {
        tracing::warn!(%error, "skipped an update of the database server");
    }
}

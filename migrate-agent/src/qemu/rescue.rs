//! A monitor that stays open when the agent dies, for a guest whose pages are on their way.
//!
//! A device that touches a page which is not there yet holds QEMU's main loop until the page comes.
//! If the agent that should bring it dies meanwhile, the next one finds a monitor that answers nothing:
//! a new connection is greeted by the main loop. `migrate-recover` may be said out of band, past the
//! main loop, but only on a connection that agreed to that while it still turned. So such a connection
//! is made when the guest arrives, on a monitor of its own (a monitor takes one client at a time),
//! and a `cat` holds it: it reads QEMU's events away, ends with QEMU, and needs nobody. The next
//! agent takes the descriptor out of it (pidfd_getfd(2)).
//!
//! Used by `vms/` for the destination. Deliberately not here: when a stream is to be taken up, and the
//! stream (`destination::gathering::recover`). (QEMU's docs/interop/qmp-spec, "out-of-band execution".)

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdStream;
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, Signal};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::process::Command;

use super::run_dir::RunDir;

/// QEMU's monitor thread answers at once.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// The longest line that is read: events are short.
const LINE_MOST: u64 = 1 << 20;
/// Who holds the connection.
const HOLDER: &str = "cat";
/// The id of what we ask.
const ID: &str = "rescue";

/// Why a monitor is not kept, or does not help.
#[derive(Debug, thiserror::Error)]
pub enum RescueError {
    /// The monitor, or who holds it.
    #[error("cannot {doing} the monitor that stays open")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A QEMU that was started before there was one, or one that takes nothing out of band.
    #[error("its QEMU takes no command out of band")]
    Unable,
    /// Nobody holds one.
    #[error("no monitor of it is kept open")]
    NothingKept,
    /// QEMU said no.
    #[error("QEMU refused `migrate-recover` out of band: {0}")]
    Refused(String),
    /// It said nothing.
    #[error("the monitor that stays open does not answer within {} s", ANSWER_LIMIT.as_secs())]
    Silent,
}

fn io_error(doing: &'static str) -> impl FnOnce(io::Error) -> RescueError {
    move |source| RescueError::Io { doing, source }
}

/// Opens a connection that takes commands out of band, and has it held.
///
/// # Errors
/// When QEMU has no such monitor; nothing is held then.
pub async fn keep(run_dir: &RunDir) -> Result<(), RescueError> {
    forget(run_dir);
    let socket = UnixStream::connect(run_dir.rescue_socket()).await;
    let mut talk = Talk::over(socket.map_err(io_error("reach"))?);
    let greeting = talk.until(|message| message.get("QMP").cloned()).await?;
    let able = greeting["capabilities"].as_array().into_iter().flatten();
    if !able.into_iter().any(|capability| capability == "oob") {
        return Err(RescueError::Unable);
    }
    let enable = json!({"execute": "qmp_capabilities", "id": ID, "arguments": {"enable": ["oob"]}});
    talk.ask(&enable).await?;
    hold(run_dir, talk.into_std()?)
}

/// Has QEMU listen for its stream anew, whatever its main loop waits for.
///
/// # Errors
/// When nothing was kept, or with QEMU's words; what was kept stays so.
pub async fn recover(run_dir: &RunDir, uri: &str) -> Result<(), RescueError> {
    let socket = taken_back(run_dir)?;
    socket.set_nonblocking(true).map_err(io_error("use"))?;
    let mut talk = Talk::over(UnixStream::from_std(socket).map_err(io_error("use"))?);
    let recover = json!({"exec-oob": "migrate-recover", "id": ID, "arguments": {"uri": uri}});
    let recovered = talk.ask(&recover).await;
    hold(run_dir, talk.into_std()?)?;
    recovered
}

/// Nothing has to be held any more.
pub fn forget(run_dir: &RunDir) {
    if let Some((_, holder)) = holder(run_dir) {
        // It may have ended.
        let _ = rustix::process::pidfd_send_signal(&holder, Signal::KILL);
    }
    let _ = fs::remove_file(run_dir.rescue_pid());
}

fn hold(run_dir: &RunDir, socket: StdStream) -> Result<(), RescueError> {
    // The flag belongs to the connection, not to who has it: its holder waits for what comes.
    socket.set_nonblocking(false).map_err(io_error("hold"))?;
    let mut command = Command::new(HOLDER);
    // A group of its own: what ends the agent by its terminal does not end it.
    command.process_group(0).current_dir("/").env_clear().env("PATH", "/usr/bin:/bin");
    command.stdin(OwnedFd::from(socket)).stdout(Stdio::null()).stderr(Stdio::null());
    let child = command.spawn().map_err(io_error("hold"))?;
    let pid = child.id().unwrap_or_default();
    fs::write(run_dir.rescue_pid(), pid.to_string()).map_err(io_error("remember"))
}

/// Who holds the connection, if it is held.
fn holder(run_dir: &RunDir) -> Option<(Pid, OwnedFd)> {
    let pid = fs::read_to_string(run_dir.rescue_pid()).ok()?;
    let pid = Pid::from_raw(pid.trim().parse().ok()?)?;
    let holder = rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok()?;
    // Looked at when it cannot change any more whom the descriptor means.
    let name = fs::read_to_string(format!("/proc/{}/comm", pid.as_raw_nonzero())).ok()?;
    (name.trim() == HOLDER).then_some((pid, holder))
}

fn taken_back(run_dir: &RunDir) -> Result<StdStream, RescueError> {
    let (_, holder) = holder(run_dir).ok_or(RescueError::NothingKept)?;
    let socket = rustix::process::pidfd_getfd(&holder, 0, PidfdGetfdFlags::empty());
    let socket = socket.map_err(|errno| io_error("take back")(errno.into()))?;
    // It must not read the answer.
    rustix::process::pidfd_send_signal(&holder, Signal::KILL)
        .map_err(|errno| io_error("take back")(errno.into()))?;
    let _ = fs::remove_file(run_dir.rescue_pid());
    Ok(StdStream::from(socket))
}

/// A connection, line by line.
struct Talk {
    lines: BufReader<UnixStream>,
}

impl Talk {
    fn over(socket: UnixStream) -> Self {
        Self { lines: BufReader::new(socket) }
    }

    async fn ask(&mut self, message: &Value) -> Result<(), RescueError> {
        let line = format!("{message}\r\n");
        let sent = self.lines.get_mut().write_all(line.as_bytes()).await;
        sent.map_err(io_error("ask"))?;
        let answer = self.until(|message| (message["id"] == ID).then(|| message.clone())).await?;
        match answer.get("error") {
            None => Ok(()),
            Some(error) => {
                let words = error["desc"].as_str().unwrap_or_default();
                Err(RescueError::Refused(words.chars().take(300).collect()))
            }
        }
    }

    /// Reads until `wanted` finds something; events before it are of no interest here.
    async fn until<T>(&mut self, wanted: impl Fn(&Value) -> Option<T>) -> Result<T, RescueError> {
        use tokio::io::AsyncReadExt as _;
        let found = async {
            loop {
                let mut line = Vec::new();
                let read = (&mut self.lines).take(LINE_MOST).read_until(b'\n', &mut line).await;
                if read.map_err(io_error("read"))? == 0 {
                    return Err(io_error("read")(io::ErrorKind::UnexpectedEof.into()));
                }
                // A connection that is taken back may begin in the middle of a line.
                let message: Option<Value> = serde_json::from_slice(&line).ok();
                if let Some(found) = message.as_ref().and_then(&wanted) {
                    return Ok(found);
                }
            }
        };
        tokio::time::timeout(ANSWER_LIMIT, found).await.unwrap_or(Err(RescueError::Silent))
    }

    fn into_std(self) -> Result<StdStream, RescueError> {
        self.lines.into_inner().into_std().map_err(io_error("hold"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    /// A QEMU that agrees to everything but the second `migrate-recover`.
    async fn qemu(listener: tokio::net::UnixListener) {
        let (socket, _) = listener.accept().await.unwrap();
        let mut lines = BufReader::new(socket);
        let hello = b"{\"QMP\": {\"capabilities\": [\"oob\"]}}\r\n{\"event\": \"STOP\"}\r\n";
        lines.get_mut().write_all(hello).await.unwrap();
        let mut recovered = 0;
        let mut line = String::new();
        while lines.read_line(&mut line).await.unwrap_or(0) > 0 {
            let asked: Value = serde_json::from_str(&line).unwrap();
            line.clear();
            let mut answer = json!({"return": {}, "id": asked["id"]});
            if asked["exec-oob"] == "migrate-recover" {
                recovered += 1;
                if recovered > 1 {
                    answer = json!({"error": {"desc": "not paused"}, "id": asked["id"]});
                }
            }
            let answer = format!("{{\"event\": \"RESUME\"}}\r\n{answer}\r\n");
            lines.get_mut().write_all(answer.as_bytes()).await.unwrap();
        }
    }

    #[tokio::test]
    async fn what_is_held_can_be_taken_back_again_and_again_and_ends_with_qemu() {
        let folder = tempfile::tempdir().unwrap();
        let run_dir = RunDir::new(folder.path(), "vm");
        fs::create_dir_all(folder.path().join("vm/io")).unwrap();
        assert!(matches!(recover(&run_dir, "unix:/x").await, Err(RescueError::NothingKept)));
        let listener = UnixListener::bind(run_dir.rescue_socket()).unwrap();
        listener.set_nonblocking(true).unwrap();
        let listener = tokio::net::UnixListener::from_std(listener).unwrap();
        let served = crate::tasks::spawn("qemu", qemu(listener));
        keep(&run_dir).await.unwrap();
        recover(&run_dir, "unix:/x").await.unwrap();
        let refused = recover(&run_dir, "unix:/x").await.unwrap_err();
        assert!(refused.to_string().contains("not paused"), "{refused}");
        assert!(holder(&run_dir).is_some());
        served.abort();
        // QEMU has gone: so does the holder.
        let gone = async {
            while holder(&run_dir).is_some() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(ANSWER_LIMIT, gone).await.unwrap();
        assert!(recover(&run_dir, "unix:/x").await.is_err());
        forget(&run_dir);
    }
}

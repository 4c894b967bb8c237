//! `lifeboat-disk serve`: a mount of a directory of images for whatever is not QEMU, which may ask what was
//! changed through it, and limit it.
//!
//! ```text
//!   serve --images DIR --at MOUNT --holder S [--control C] [--limit BYTES]
//!   changed --control C [--reset]      begin, length and image of each run of changed blocks
//!   limit --control C [BYTES]          from now on; without a number no limit
//! ```
//!
//! The control socket takes one line, `changed`, `changed reset`, `limit` or `limit BYTES`, and answers with
//! lines of which the last is `done`, or `refused:` and why. After `changed reset` it waits for one more line,
//! `taken`: without that, what it told counts as changed still.
//!
//! Deliberately not here: a VM's disks that leave (`mover`); those nobody but the agent asks about.

use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use lifeboat_protocol::units::BytesPerSec;

use super::mover::MoverError;
use super::tracked::Tracked;
use crate::disk::fuse::holder::{HolderError, Serving};
use crate::disk::fuse::{DiskLimit, Hook, SLOWEST, ServeError, Server};

/// The longest line that is asked.
const LONGEST: u64 = 64;
/// Whoever connects asks, and reads, within this time.
const PATIENCE: Duration = Duration::from_secs(10);
/// The last line of an answer.
const DONE: &str = "done";
/// What whoever asked says who has what is not told again.
const TAKEN: &str = "taken";
/// How an answer begins that is none.
const REFUSED: &str = "refused: ";

/// What is served.
#[derive(Debug)]
pub struct Plain<'a> {
    /// The directory with the images.
    pub images: &'a Path,
    /// The mount point.
    pub at: &'a Path,
    /// The holder's socket.
    pub holder: &'a Path,
    /// Where it may be asked, if anywhere.
    pub control: Option<&'a Path>,
    /// How fast the images may be changed, together; `None`: whatever their disk takes.
    pub limit: Option<BytesPerSec>,
}

/// Why a plain mount cannot be asked.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Nobody is there, or it hung up.
    #[error("cannot ask at {}: is `lifeboat-disk serve --control` of this path running?", path.display())]
    Socket {
        /// Where.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It does not do it.
    #[error("the mount's server refuses: {0}")]
    Refused(String),
    /// The answer has no end.
    #[error("the mount's server ended before its answer did; what came of it may lack something")]
    CutOff,
    /// Whoever reads the answer has gone.
    #[error("the answer cannot be written")]
    Write(#[source] io::Error),
}

/// Serves until the mount is gone. `ready` is called once requests are answered.
///
/// # Errors
/// When it cannot be served or asked.
pub fn serve(plain: &Plain<'_>, ready: impl FnOnce() -> io::Result<()>) -> Result<(), MoverError> {
    let name = plain.at.to_str().ok_or(MoverError::MountPoint)?;
    let limit = DiskLimit::start().map_err(ServeError::Threads)?;
    limit.set(plain.limit);
    let control = plain.control.map(listen).transpose().map_err(MoverError::Listen)?;
    let (mut server, serving, tracked) = match Serving::take(plain.holder, name) {
        Ok((serving, device, memory)) => {
            let tracked = Tracked::knowing_nothing(plain.images);
            let tracked = Arc::new(tracked.map_err(MoverError::Directory)?);
            let hook: Arc<dyn Hook> = Arc::clone(&tracked) as _;
            let server = Server::take_over(plain.images, device, memory, hook, limit.clone())?;
            (server, serving, tracked)
        }
        Err(HolderError::Unknown(_)) => {
            let tracked = Arc::new(Tracked::new(plain.images));
            let hook: Arc<dyn Hook> = Arc::clone(&tracked) as _;
            let server = Server::mount_within(plain.images, plain.at, hook, limit.clone())?;
            let serving = Serving::park(plain.holder, name, server.parts())?;
            (server, serving, tracked)
        }
        Err(error) => return Err(error.into()),
    };
    if let Some(listener) = control {
        answer_on(listener, tracked, limit).map_err(MoverError::Listen)?;
    }
    ready().map_err(MoverError::Listen)?;
    server.join();
    if let Some(path) = plain.control {
        // It may have been taken away by whoever made its directory.
        let _ = std::fs::remove_file(path);
    }
    Ok(serving.forget()?)
}

/// Where a server before us may have listened.
fn listen(path: &Path) -> io::Result<UnixListener> {
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

fn answer_on(listener: UnixListener, tracked: Arc<Tracked>, limit: DiskLimit) -> io::Result<()> {
    let answering = std::thread::Builder::new().name("control".to_owned());
    // Ends with the process.
    answering.spawn(move || {
        for connection in listener.incoming() {
            let answered = connection.and_then(|socket| answer(&socket, &tracked, &limit));
            if let Err(error) = answered {
                tracing::warn!(%error, "whoever asked a mount something was not answered");
            }
        }
    })?;
    Ok(())
}

/// One question and its answer.
fn answer(socket: &UnixStream, tracked: &Tracked, limit: &DiskLimit) -> io::Result<()> {
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.set_write_timeout(Some(PATIENCE))?;
    let mut from = BufReader::new(socket.take(LONGEST));
    let mut asked = String::new();
    from.read_line(&mut asked)?;
    let mut to = BufWriter::new(socket);
    let words: Vec<&str> = asked.split_whitespace().collect();
    let mut taken = None;
    let refused = match words[..] {
        ["changed"] => tracked.tell(false, &mut to).map(|_| None)?,
        ["changed", "reset"] => {
            taken = Some(tracked.tell(true, &mut to)?);
            None
        }
        ["limit"] => {
            limit.set(None);
            None
        }
        ["limit", rate] => match rate.parse() {
            Ok(rate) if BytesPerSec(rate) >= SLOWEST => {
                limit.set(Some(BytesPerSec(rate)));
                None
            }
            _ => Some(format!("a limit is a number of bytes/s, {} at least", SLOWEST.0)),
        },
        _ => Some("it is `changed`, `changed reset`, `limit` or `limit BYTES`".to_owned()),
    };
    match refused {
        None => writeln!(to, "{DONE}")?,
        Some(why) => writeln!(to, "{REFUSED}{why}")?,
    }
    to.flush()?;
    let Some(taken) = taken else { return Ok(()) };
    let mut said = String::new();
    from.read_line(&mut said)?;
    if said.trim_end() == TAKEN {
        taken.has_arrived();
    }
    Ok(())
}

/// Asks whoever serves with the control socket `path`; the lines of the answer go to `to`.
///
/// # Errors
/// When it is not answered to its end.
pub fn ask(path: &Path, question: &str, to: &mut impl Write) -> Result<(), AskError> {
    let failed = |source| AskError::Socket { path: path.to_owned(), source };
    let socket = UnixStream::connect(path).map_err(failed)?;
    writeln!(&socket, "{question}").map_err(failed)?;
    let mut lines = BufReader::new(&socket).lines();
    while let Some(line) = lines.next().transpose().map_err(failed)? {
        if line == DONE {
            to.flush().map_err(AskError::Write)?;
            // Nobody listens for it unless something was to be forgotten.
            let _ = writeln!(&socket, "{TAKEN}");
            return Ok(());
        }
        if let Some(why) = line.strip_prefix(REFUSED) {
            return Err(AskError::Refused(why.to_owned()));
        }
        writeln!(to, "{line}").map_err(AskError::Write)?;
    }
    Err(AskError::CutOff)
}

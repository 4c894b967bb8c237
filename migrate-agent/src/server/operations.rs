//! Commands done once: the same operation id repeated gives the first outcome.
//!
//! Used by the gRPC server for every command. The work of a command runs in a task of its own, so
//! that a controller which hangs up does not leave it half done; a repetition meanwhile waits for
//! the same outcome. Outcomes are kept encoded, for a bounded number of commands; they do not
//! survive the agent, whose commands are harmless to repeat (a VM that runs already is told so).

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};

use lifeboat_protocol::ids::OperationId;
use prost::Message;
use tokio::sync::watch;
use tonic::Status;
use xxhash_rust::xxh3::xxh3_64;

use crate::tasks;

/// Commands whose outcome is remembered.
const OUTCOMES_MAX: usize = 4096;

type Outcome = Result<Vec<u8>, Status>;

#[derive(Clone)]
struct Slot {
    /// What was asked: the same id for something else is a mistake.
    asked: u64,
    outcome: watch::Receiver<Option<Outcome>>,
}

#[derive(Default)]
struct Slots {
    by_id: HashMap<OperationId, Slot>,
    order: VecDeque<OperationId>,
}

/// The commands of the recent past. Cheap to clone.
#[derive(Clone, Default)]
pub(super) struct Operations {
    slots: Arc<Mutex<Slots>>,
}

impl Operations {
    /// The outcome of operation `id`: that of `work`, which is run unless it was before.
    /// `asked` are bytes that say what is asked, without what may differ in a repetition.
    ///
    /// # Errors
    /// What the work said; or that the id was used for something else.
    pub(super) async fn once<T, F>(
        &self,
        id: OperationId,
        asked: &[u8],
        work: F,
    ) -> Result<T, Status>
    where
        T: Message + Default,
        F: Future<Output = Result<T, Status>> + Send + 'static,
    {
        let asked = xxh3_64(asked);
        let mut outcome = self.slot(id.clone(), asked, work)?;
        let finished = outcome.wait_for(Option::is_some).await;
        let lost =
            || Status::internal(format!("operation `{id}` was lost; look at what it was to do"));
        let outcome = finished.map_err(|_| lost())?.clone().ok_or_else(lost)?;
        T::decode(outcome?.as_slice()).map_err(|_| lost())
    }

    fn slot<T, F>(
        &self,
        id: OperationId,
        asked: u64,
        work: F,
    ) -> Result<watch::Receiver<Option<Outcome>>, Status>
    where
        T: Message,
        F: Future<Output = Result<T, Status>> + Send + 'static,
    {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = slots.by_id.get(&id) {
            if slot.asked != asked {
                return Err(Status::invalid_argument(format!(
                    "operation id `{id}` was used for another command; each command needs its own"
                )));
            }
            return Ok(slot.outcome.clone());
        }
        let (done, outcome) = watch::channel(None);
        slots.by_id.insert(id.clone(), Slot { asked, outcome: outcome.clone() });
        slots.order.push_back(id);
        slots.forget_oldest();
        tasks::spawn("command", async move {
            let result = work.await.map(|reply| reply.encode_to_vec());
            // Whoever asked may have hung up; the slot keeps it.
            let _ = done.send(Some(result));
        });
        Ok(outcome)
    }
}

impl Slots {
    /// Forgets the oldest that has ended. One that runs stays, however old.
    fn forget_oldest(&mut self) {
        while self.order.len() > OUTCOMES_MAX {
            let ended = |id: &OperationId| {
                self.by_id.get(id).is_none_or(|slot| slot.outcome.borrow().is_some())
            };
            let Some(at) = self.order.iter().position(ended) else { return };
            if let Some(id) = self.order.remove(at) {
                self.by_id.remove(&id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lifeboat_protocol::agent::CompletionReply;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn id(text: &str) -> OperationId {
        OperationId::new(text).unwrap()
    }

    #[tokio::test]
    async fn a_command_repeated_is_done_once_and_its_error_too() {
        let operations = Operations::default();
        let runs = Arc::new(AtomicUsize::new(0));
        let work = |fail: bool| {
            let runs = Arc::clone(&runs);
            async move {
                runs.fetch_add(1, Ordering::SeqCst);
                match fail {
                    true => Err(Status::not_found("no such VM")),
                    false => Ok(CompletionReply { completed: true, phase: 3 }),
                }
            }
        };
        let one = operations.once(id("a"), b"x", work(false));
        let two = operations.once(id("a"), b"x", work(false));
        let (one, two) = tokio::join!(one, two);
        assert_eq!(one.unwrap(), two.unwrap());
        for _ in 0..2 {
            let error = operations.once(id("b"), b"x", work(true)).await.unwrap_err();
            assert_eq!(error.message(), "no such VM");
        }
        assert_eq!(runs.load(Ordering::SeqCst), 2);
        let error = operations.once(id("a"), b"y", work(false)).await.unwrap_err();
        assert_eq!(error.code(), tonic::Code::InvalidArgument);
    }

    #[tokio::test]
    async fn a_caller_that_hangs_up_does_not_stop_the_work() {
        let operations = Operations::default();
        let (go, wait) = tokio::sync::oneshot::channel::<()>();
        let work = async move {
            let _ = wait.await;
            Ok(CompletionReply { completed: true, phase: 1 })
        };
        let waiting = operations.once(id("a"), b"x", work);
        let hung_up = tokio::time::timeout(std::time::Duration::from_millis(10), waiting).await;
        assert!(hung_up.is_err());
        go.send(()).unwrap();
        let again = async { Err::<CompletionReply, _>(Status::internal("must not run")) };
        assert!(operations.once(id("a"), b"x", again).await.unwrap().completed);
    }

    #[tokio::test]
    async fn memory_is_bounded() {
        let operations = Operations::default();
        for number in 0..OUTCOMES_MAX + 100 {
            let work = async { Ok(CompletionReply::default()) };
            operations.once(id(&format!("op{number}")), b"", work).await.unwrap();
        }
        assert_eq!(operations.slots.lock().unwrap().by_id.len(), OUTCOMES_MAX);
    }
}

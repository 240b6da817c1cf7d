//! Questions that may have to wait for a lock or for the host, on a thread of their own, so that
//! no other client waits with them.

use std::io;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::time::Duration;

use tokio::sync::oneshot;
use vmm::control::{ApiError, Code};
use vmm::sandbox;

/// How many may wait.
const QUEUE: usize = 32;
/// How long a client waits for its answer.
const LIMIT: Duration = Duration::from_secs(20);

type Question = Box<dyn FnOnce() + Send>;

/// The way to the thread, which ends when this is dropped.
pub(super) struct Inspector(SyncSender<Question>);

impl Inspector {
    /// Starts the thread.
    ///
    /// # Errors
    /// The host has no room for one.
    pub(super) fn start(landlock: bool) -> io::Result<Self> {
        let (sender, questions) = sync_channel::<Question>(QUEUE);
        viommu::thread::spawn("inspector", move || {
            let _paths = landlock.then(|| sandbox::confine_thread(&sandbox::of_inspector()));
            for question in questions {
                question();
            }
        })?;
        Ok(Self(sender))
    }

    /// What `question` says.
    ///
    /// # Errors
    /// It does not say it in time, or too many are waiting.
    pub(super) async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, ApiError> {
        self.ask_within(LIMIT, question).await
    }

    async fn ask_within<T: Send + 'static>(
        &self,
        limit: Duration,
        question: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, ApiError> {
        let (sender, answer) = oneshot::channel();
        let question: Question = Box::new(move || {
            // A client that is gone has no need of it.
            if !sender.is_closed() {
                let _ = sender.send(question());
            }
        });
        match self.0.try_send(question) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => {
                return Err(ApiError::new(
                    Code::TooManyRequests,
                    format!("{QUEUE} questions are waiting for an answer"),
                )
                .remedy("ask again later"));
            }
            Err(TrySendError::Disconnected(_)) => {
                return Err(ApiError::new(
                    Code::Internal,
                    "the inspector's thread is gone",
                ));
            }
        }
        match tokio::time::timeout(limit, answer).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(_)) => Err(ApiError::new(
                Code::Internal,
                "the inspector's thread panicked",
            )),
            Err(_) => Err(ApiError::new(
                Code::Busy,
                format!("the answer was not there within {} s", limit.as_secs()),
            )
            .remedy("ask again; vm.info tells what is being done")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_that_hangs_is_given_up_and_no_other_is_lost() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let inspector = Inspector::start(false).unwrap();
            let (release, wait) = std::sync::mpsc::channel::<()>();
            let limit = Duration::from_millis(50);
            let stuck = inspector.ask_within(limit, move || wait.recv()).await;
            assert_eq!(stuck.unwrap_err().code, Code::Busy);
            release.send(()).unwrap();
            assert_eq!(inspector.ask(|| 7).await.unwrap(), 7);
        });
    }
}

//! Events, to those who follow them: clients of `vm.events`, and the file of `--event-monitor`.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::response::sse;
use futures_util::Stream;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::{OwnedSemaphorePermit, watch};
use vmm::control::{Events, Record};

use super::Api;
use crate::inherited::inherited;

/// How many clients can follow at a time.
pub(super) const MOST: usize = 32;
/// How long the file of `--event-monitor` may take nothing before an event is lost to it.
const WRITE_LIMIT: Duration = Duration::from_secs(10);

/// A place in the events.
struct Follower {
    events: Arc<Events>,
    news: watch::Receiver<()>,
    ending: watch::Receiver<bool>,
    seq: u64,
    waiting: VecDeque<Arc<Record>>,
}

/// What a follower sees next.
enum Next {
    Event(Arc<Record>),
    /// So many were lost to it.
    Lost(u64),
}

impl Follower {
    fn new(api: &Api, seq: u64) -> Self {
        Self {
            events: api.shared.events.clone(),
            news: api.news.clone(),
            ending: api.ending.clone(),
            seq,
            waiting: VecDeque::new(),
        }
    }

    /// `None` when nestling ends, and all was seen.
    async fn next(&mut self) -> Option<Next> {
        loop {
            if let Some(record) = self.waiting.pop_front() {
                self.seq = record.seq;
                return Some(Next::Event(record));
            }
            // Before the look: what comes after it wakes us.
            self.news.mark_unchanged();
            let ending = *self.ending.borrow();
            let batch = self.events.after(self.seq);
            self.waiting.extend(batch.records);
            if batch.lost > 0 {
                self.seq += batch.lost;
                return Some(Next::Lost(batch.lost));
            }
            if !self.waiting.is_empty() {
                continue;
            }
            if ending {
                return None;
            }
            tokio::select! {
                news = self.news.changed() => news.ok()?,
                _ = self.ending.wait_for(|ending| *ending) => {}
            }
        }
    }
}

/// The events after number `seq` as server-sent events, for as long as nestling lives.
pub(super) fn stream(
    api: &Api,
    seq: u64,
    place: OwnedSemaphorePermit,
) -> impl Stream<Item = Result<sse::Event, Infallible>> + use<> {
    let follower = (Follower::new(api, seq), place);
    futures_util::stream::unfold(follower, |(mut follower, place)| async move {
        let event = match follower.next().await? {
            Next::Event(record) => {
                let json = serde_json::to_value(&*record).unwrap_or_default();
                let name = json["event"].as_str().unwrap_or_default().to_owned();
                sse::Event::default()
                    .id(record.seq.to_string())
                    .event(name)
                    .data(json.to_string())
            }
            Next::Lost(count) => sse::Event::default().event("lost").data(lost(count)),
        };
        Some((Ok(event), (follower, place)))
    })
}

fn lost(count: u64) -> String {
    serde_json::json!({ "event": "lost", "properties": { "count": count } }).to_string()
}

/// Where `--event-monitor` writes.
#[derive(Debug)]
pub(crate) struct Monitor(File);

impl Monitor {
    /// A file that is made, or emptied; a pipe that somebody reads.
    ///
    /// # Errors
    /// One sentence.
    pub(crate) fn open(path: &Path) -> Result<Self, String> {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .custom_flags(libc::O_NONBLOCK)
            .open(path);
        file.map(Self).map_err(|why| {
            format!(
                "--event-monitor path={} cannot be written ({why}); correct the path, or open the pipe for reading first",
                path.display()
            )
        })
    }

    /// What who started nestling has opened.
    ///
    /// # Errors
    /// One sentence.
    pub(crate) fn inherit(fd: RawFd) -> Result<Self, String> {
        inherited(fd)
            .map(|fd| Self(fd.into()))
            .map_err(|why| format!("--event-monitor {why}"))
    }

    /// A pipe or a socket, whose reader may be slow.
    fn pollable(&self) -> Option<Box<dyn AsyncWrite + Unpin>> {
        let file = self.0.try_clone().ok()?;
        if file.metadata().ok()?.file_type().is_socket() {
            let stream = std::os::unix::net::UnixStream::from(OwnedFd::from(file));
            stream.set_nonblocking(true).ok()?;
            return Some(Box::new(UnixStream::from_std(stream).ok()?));
        }
        let pipe = pipe::Sender::from_file(file).ok()?;
        Some(Box::new(pipe))
    }

    /// Writes each event as a line of JSON until nestling ends.
    pub(super) async fn follow(self, api: &Api) {
        let mut follower = Follower::new(api, 0);
        let mut pipe = self.pollable();
        while let Some(next) = follower.next().await {
            let line = match next {
                Next::Event(record) => serde_json::to_string(&*record).unwrap_or_default(),
                Next::Lost(count) => lost(count),
            } + "\n";
            let written = match &mut pipe {
                Some(pipe) => {
                    let written = pipe.write_all(line.as_bytes());
                    match tokio::time::timeout(WRITE_LIMIT, written).await {
                        Ok(done) => done,
                        Err(_) => Err(io::ErrorKind::TimedOut.into()),
                    }
                }
                // A regular file is always ready.
                None => (&self.0).write_all(line.as_bytes()),
            };
            if let Err(why) = written {
                log::warn!("the event monitor's file cannot be written ({why}); it gets no more");
                return;
            }
        }
    }
}

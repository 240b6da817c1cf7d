//! The API: HTTP/1.1 with JSON on a Unix socket.
//!
//! One thread (`api`) with one event loop serves all clients; it never waits for the thread that
//! owns the VM. What a client asks for goes to that thread as a request and the answer comes back
//! when it comes; what a client wants to see is a copy that is there already, or is asked of the
//! second thread (`inspector`), which may wait for a lock of a vIOMMU or for the host.
//!
//! - [`socket`] – the path: its mode, its lock, what is left of a nestling that was killed.
//! - [`connection`] – one client's connection, with limits on everything that it can make us hold.
//! - [`routes`] – what each path does; [`document`] describes them as OpenAPI.
//! - [`body`] – from the bytes of a request to a configuration; [`compat`] lets clients of Cloud
//!   Hypervisor's API leave at their defaults what nestling does not have.
//! - [`follow`] – events, to those who follow them.
//! - [`inspector`] – questions that may take a while.

#![forbid(unsafe_code)]

mod body;
mod compat;
mod connection;
mod document;
mod filter;
mod follow;
mod inspector;
mod routes;
mod socket;

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::runtime;
use tokio::sync::watch;
use tokio::task::LocalSet;
use vmm::control::{Controller, Shared};
use vmm::sandbox;

pub(crate) use follow::Monitor;
pub(crate) use socket::Listener;

/// How long answers that are on their way get when nestling ends.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// What is served.
pub(crate) struct Services {
    /// Where clients come in.
    pub(crate) listener: Option<Listener>,
    /// Where events are written.
    pub(crate) monitor: Option<Monitor>,
}

/// The API of a running nestling. Dropping it tells clients good-bye and removes the socket.
pub(crate) struct Server {
    ending: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

/// What every request may need.
pub(crate) struct Api {
    controller: Controller,
    shared: Shared,
    inspector: inspector::Inspector,
    news: watch::Receiver<()>,
    ending: watch::Receiver<bool>,
    followers: Arc<tokio::sync::Semaphore>,
}

impl Server {
    /// Starts the threads, whose paths are confined with `landlock`.
    ///
    /// # Errors
    /// The host has no room for another thread or descriptor.
    pub(crate) fn start(
        services: Services,
        controller: Controller,
        shared: Shared,
        landlock: bool,
    ) -> io::Result<Self> {
        let (ending, told) = watch::channel(false);
        let (tell, news) = watch::channel(());
        shared.events.on_event(move || {
            tell.send_replace(());
        });
        let api = Arc::new(Api {
            controller,
            shared,
            inspector: inspector::Inspector::start(landlock)?,
            news,
            ending: told,
            followers: Arc::new(tokio::sync::Semaphore::new(follow::MOST)),
        });
        let runtime = runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let socket = services.listener.as_ref().and_then(Listener::path);
        let needs = sandbox::of_api(socket);
        let thread = viommu::thread::spawn("api", move || {
            let _paths = landlock.then(|| sandbox::confine_thread(&needs));
            LocalSet::new().block_on(&runtime, serve(services, api));
        })?;
        Ok(Self {
            ending,
            thread: Some(thread),
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.ending.send_replace(true);
        if let Some(thread) = self.thread.take() {
            // A panic was reported when it happened.
            let _ = thread.join();
        }
    }
}

async fn serve(services: Services, api: Arc<Api>) {
    let monitor = services.monitor.map(|monitor| {
        let api = api.clone();
        tokio::task::spawn_local(async move { monitor.follow(&api).await })
    });
    let mut ending = api.ending.clone();
    if let Some(listener) = services.listener {
        let router = routes::router().0.with_state(api);
        // Bound: whoever does not read its answer cannot hold nestling.
        let clients = connection::accept(&listener, router, ending.clone()).await;
        let _ = tokio::time::timeout(LAST_WORDS, clients.all_gone()).await;
    } else {
        // An error is a sender that is gone: the end, too.
        let _ = ending.wait_for(|ending| *ending).await;
    }
    if let Some(monitor) = monitor {
        let _ = tokio::time::timeout(LAST_WORDS, monitor).await;
    }
}

//! One client's connection. Whatever a client does or leaves undone, what it holds of nestling is
//! bounded, in bytes and in time.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, watch};
use tokio::time::Sleep;

use super::socket::Listener;
use crate::descriptors::Received;

/// Connections at a time; one more gets a 503.
pub(super) const MOST: usize = 128;
/// How long a client may take to send the head of a request, and may be idle before it.
const HEAD_LIMIT: Duration = Duration::from_secs(10);
/// How long a client may leave an answer unread before it is cut off.
const WRITE_LIMIT: Duration = Duration::from_secs(10);
/// Bytes of the head of a request.
const HEAD_BYTES: usize = 16 << 10;
/// Header lines of a request.
const HEADERS: usize = 64;
/// Bytes of a connection's buffers.
const BUFFER: usize = 64 << 10;

/// What a client that is one too many gets.
const TOO_MANY: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\n\
    Content-Type: application/json\r\nContent-Length: 98\r\nConnection: close\r\nRetry-After: 1\r\n\r\n\
    {\"code\":\"busy\",\"message\":\"128 clients are connected\",\"remedy\":\"close a connection, and try again\"}";

/// The clients that are connected.
pub(super) struct Clients(Arc<Semaphore>);

impl Clients {
    /// Waits until all have gone.
    pub(super) async fn all_gone(self) {
        // An error is a semaphore that was closed, which nobody does.
        let _ = self.0.acquire_many(MOST as u32).await;
    }
}

/// Lets clients in until nestling ends.
pub(super) async fn accept(
    listener: &Listener,
    router: Router,
    mut ending: watch::Receiver<bool>,
) -> Clients {
    let slots = Arc::new(Semaphore::new(MOST));
    let listener = match listener.for_tokio() {
        Ok(listener) => listener,
        Err(why) => {
            log::error!("the API has no socket ({why}); nobody can connect");
            let _ = ending.wait_for(|ending| *ending).await;
            return Clients(slots);
        }
    };
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = ending.wait_for(|ending| *ending) => return Clients(slots),
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(why) => {
                log::warn!("a client cannot be let in: {why}");
                // Most likely no descriptor is left: not again at once.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Ok(slot) = slots.clone().try_acquire_owned() else {
            // What fits the socket's buffer; a client that is not there any more needs none.
            let _ = stream.try_write(TOO_MANY);
            continue;
        };
        let (router, ending) = (router.clone(), ending.clone());
        tokio::task::spawn_local(async move {
            serve(stream, router, ending).await;
            drop(slot);
        });
    }
}

async fn serve(stream: UnixStream, router: Router, mut ending: watch::Receiver<bool>) {
    let received = Received::default();
    let io = TokioIo::new(Patient {
        stream,
        stuck: None,
        received: received.clone(),
    });
    let router = TowerToHyperService::new(router);
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(received.clone());
        let (answer, received) = (router.call(request), received.clone());
        async move {
            let answer = answer.await;
            // What the request did not use is closed.
            drop(received.take());
            answer
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_LIMIT)
        .max_header_size(HEAD_BYTES)
        .max_headers(HEADERS)
        .max_buf_size(BUFFER)
        // Clients of Cloud Hypervisor look for `Content-Length` in exactly this case.
        .title_case_headers(true)
        .serve_connection(io, service);
    let mut connection = std::pin::pin!(connection);
    let done = tokio::select! {
        done = connection.as_mut() => done,
        _ = ending.wait_for(|ending| *ending) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(why) = done {
        log::debug!("a client was cut off: {why}");
    }
}

/// A stream whose writes fail when the peer does not read for [`WRITE_LIMIT`], and which keeps the
/// descriptors that come with what is read.
struct Patient {
    stream: UnixStream,
    received: Received,
    stuck: Option<Pin<Box<Sleep>>>,
}

impl AsyncRead for Patient {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let Self {
            stream, received, ..
        } = &mut *self;
        loop {
            ready!(stream.poll_read_ready(context))?;
            let room = buffer.initialize_unfilled();
            match stream.try_io(Interest::READABLE, || received.receive(stream, room)) {
                Ok(bytes) => {
                    buffer.advance(bytes);
                    return Poll::Ready(Ok(()));
                }
                Err(why) if why.kind() == io::ErrorKind::WouldBlock => {}
                Err(why) if why.kind() == io::ErrorKind::Interrupted => {}
                Err(why) => return Poll::Ready(Err(why)),
            }
        }
    }
}

impl AsyncWrite for Patient {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if let Poll::Ready(done) = Pin::new(&mut self.stream).poll_write(context, bytes) {
            self.stuck = None;
            return Poll::Ready(done);
        }
        let stuck = self
            .stuck
            .get_or_insert_with(|| Box::pin(tokio::time::sleep(WRITE_LIMIT)));
        ready!(stuck.as_mut().poll(context));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_to_one_client_too_many_is_whole() {
        let text = std::str::from_utf8(TOO_MANY).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(head.contains(&format!("Content-Length: {}\r\n", body.len())));
        let error: vmm::control::ApiError = serde_json::from_str(body).unwrap();
        assert_eq!(error.code, vmm::control::Code::Busy);
        assert!(error.message.contains(&MOST.to_string()));
    }
}

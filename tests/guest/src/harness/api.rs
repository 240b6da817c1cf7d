//! A client of nestling's API: one request on one connection, written out by hand, so that nothing
//! of the server is tested by itself.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// How long an answer may take.
const LIMIT: Duration = Duration::from_secs(400);

/// Where a nestling listens.
#[derive(Clone, Debug)]
pub struct Api(PathBuf);

/// What it answers.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// The body; null when there is none.
    pub body: Value,
}

impl Api {
    /// The API on this socket.
    pub fn new(socket: &Path) -> Self {
        Self(socket.to_owned())
    }

    /// Asks, and gives whatever is answered.
    ///
    /// # Errors
    /// There is no answer, or it is no HTTP.
    pub fn ask(&self, verb: &str, request: &str, body: &Value) -> Result<Answer> {
        let body = match body {
            Value::Null => String::new(),
            body => body.to_string(),
        };
        let mut stream = UnixStream::connect(&self.0)
            .with_context(|| format!("nobody listens at {}", self.0.display()))?;
        stream.set_read_timeout(Some(LIMIT))?;
        write!(
            stream,
            "{verb} /api/v1/{request} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )?;
        let mut answer = String::new();
        stream
            .read_to_string(&mut answer)
            .with_context(|| format!("{request} is not answered"))?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP")?;
        let status = head.split(' ').nth(1).context("no status")?.parse()?;
        let body = match body {
            "" => Value::Null,
            body => serde_json::from_str(body)
                .with_context(|| format!("{request} is answered by {body}"))?,
        };
        Ok(Answer { status, body })
    }

    /// Asks for what must be done, and gives the body of the answer.
    ///
    /// # Errors
    /// It is refused.
    pub fn put(&self, request: &str, body: &Value) -> Result<Value> {
        let Answer { status, body: said } = self.ask("PUT", request, body)?;
        ensure!(
            matches!(status, 200 | 204),
            "{request} {body} is answered with status {status}: {said:#}"
        );
        Ok(said)
    }

    /// Asks for what is there.
    ///
    /// # Errors
    /// It is refused.
    pub fn get(&self, request: &str) -> Result<Value> {
        let Answer { status, body } = self.ask("GET", request, &Value::Null)?;
        ensure!(
            status == 200,
            "{request} is answered with status {status}: {body:#}"
        );
        Ok(body)
    }

    /// Waits until the server has closed the connections of all its clients, which it does in its
    /// own time.
    ///
    /// # Errors
    /// It keeps one.
    pub fn is_alone(&self) -> Result<()> {
        let path = self.0.display().to_string();
        let deadline = Instant::now() + LIMIT;
        loop {
            // The socket that listens has a name, and so has its end of each connection.
            let sockets = fs::read_to_string("/proc/net/unix")?;
            let open = sockets.lines().filter(|line| line.ends_with(&path)).count();
            if open <= 1 {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "{path} has {open} sockets");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until somebody listens.
    ///
    /// # Errors
    /// Nobody does within `limit`.
    pub fn wait(&self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        while UnixStream::connect(&self.0).is_err() {
            if Instant::now() >= deadline {
                bail!("nobody listens at {}", self.0.display());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

//! One request on one connection, which the server closes.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use serde_json::Value;
use vmm::control::ApiError;

use crate::{Failure, descriptors};

/// A server, which is asked.
pub(super) struct Client(PathBuf);

impl Client {
    /// The server of this socket.
    pub(super) fn new(socket: PathBuf) -> Self {
        Self(socket)
    }

    /// Asks, with `descriptors` that the body names, and waits for as long as the answer takes.
    /// `None`: done, with nothing to say.
    ///
    /// # Errors
    /// Nobody answers, or the answer is a refusal.
    pub(super) fn ask(
        &self,
        verb: &str,
        request: &str,
        body: Option<&Value>,
        descriptors: &[OwnedFd],
    ) -> Result<Option<Value>, Failure> {
        let (status, mut rest) = self.send(verb, request, body, descriptors)?;
        let mut text = String::new();
        rest.read_to_string(&mut text)
            .map_err(|why| self.lost(&why))?;
        if !(200..300).contains(&status) {
            return Err(refusal(status, &text));
        }
        if text.is_empty() {
            return Ok(None);
        }
        serde_json::from_str(&text)
            .map(Some)
            .map_err(|why| Failure::Error(format!("the answer is not JSON ({why})").into()))
    }

    /// Gives `each` the data of each server-sent event.
    ///
    /// # Errors
    /// Nobody answers, or the answer is a refusal.
    pub(super) fn follow(&self, request: &str, each: impl Fn(&str)) -> Result<(), Failure> {
        let (status, mut rest) = self.send("GET", request, None, &[])?;
        if status != 200 {
            let mut text = String::new();
            rest.read_to_string(&mut text)
                .map_err(|why| self.lost(&why))?;
            return Err(refusal(status, &text));
        }
        for line in rest.lines() {
            // The last event may be cut when nestling is killed: what came is told.
            let Ok(line) = line else { break };
            if let Some(data) = line.strip_prefix("data: ") {
                each(data);
            }
        }
        Ok(())
    }

    /// The status, and the body to be read. HTTP/1.0 has no chunks: the body ends with the
    /// connection.
    fn send(
        &self,
        verb: &str,
        request: &str,
        body: Option<&Value>,
        descriptors: &[OwnedFd],
    ) -> Result<(u16, BufReader<UnixStream>), Failure> {
        let mut stream = UnixStream::connect(&self.0).map_err(|why| {
            Failure::Error(
                format!(
                    "nobody listens at {} ({why}); start nestling run --api-socket path={0}",
                    self.0.display()
                )
                .into(),
            )
        })?;
        let body = body.map(Value::to_string).unwrap_or_default();
        let text = format!(
            "{verb} /api/v1/{request} HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let bytes = text.as_bytes();
        // They go with the first bytes.
        let sent = match descriptors {
            [] => Ok(0),
            some => descriptors::send(&stream, bytes, some),
        };
        let asked = sent.and_then(|sent| stream.write_all(bytes.get(sent..).unwrap_or_default()));
        let mut rest = BufReader::new(stream);
        let (mut first, mut line) = (String::new(), String::new());
        // An answer may be there although not all was read.
        let answered = rest.read_line(&mut first);
        if first.is_empty() {
            asked.map_err(|why| self.lost(&why))?;
        }
        answered.map_err(|why| self.lost(&why))?;
        let status = first.split(' ').nth(1).and_then(|s| s.parse().ok());
        let status = status.ok_or_else(|| self.lost(&io::ErrorKind::UnexpectedEof.into()))?;
        while rest.read_line(&mut line).map_err(|why| self.lost(&why))? > 0 {
            if line.trim_end().is_empty() {
                break;
            }
            line.clear();
        }
        Ok((status, rest))
    }

    fn lost(&self, why: &io::Error) -> Failure {
        let socket = self.0.display();
        Failure::Error(format!("nestling at {socket} does not answer ({why})").into())
    }
}

fn refusal(status: u16, text: &str) -> Failure {
    match serde_json::from_str::<ApiError>(text) {
        Ok(error) => Failure::Error(format!("{error} ({})", error.code).into()),
        Err(_) => Failure::Error(format!("the server answers with status {status}").into()),
    }
}

/// `text` for a query.
pub(super) fn escaped(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b':' | b'.' | b'-' => {
                char::from(byte).to_string()
            }
            other => format!("%{other:02X}"),
        })
        .collect()
}

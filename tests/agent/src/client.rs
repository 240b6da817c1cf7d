//! The test's end of the channel: a Unix socket whose other end a VMM carries into the guest.

use std::fmt;
use std::io::{self, BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::HELLO;
use crate::frame::{Answer, Request, read_answer, write_request};

/// How long a socket read waits before the client looks at its own limit again.
const TICK: Duration = Duration::from_millis(250);

/// How often a machine is pinged that is [watched](Client::run_watched).
const PULSE: Duration = Duration::from_secs(5);

/// How long a machine may need to say that a command passed its limit.
const GRACE: Duration = Duration::from_secs(60);

/// What a command left behind.
#[derive(Clone, Debug)]
pub struct Output {
    /// The exit status; 128 and the signal's number when one ended it, [`crate::TIMED_OUT`] when
    /// its limit passed.
    pub status: i32,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

/// Why the agent could not be asked.
#[derive(Debug)]
pub enum Error {
    /// No answer came within the limit.
    Silent {
        /// The channel's socket.
        socket: PathBuf,
        /// What was waited for.
        waited_for: String,
        /// How long.
        limit: Duration,
    },
    /// The channel ended: the guest, or the VMM that carries the channel, is gone.
    Closed {
        /// The channel's socket.
        socket: PathBuf,
        /// What was waited for.
        waited_for: String,
    },
    /// The socket failed.
    Io {
        /// The channel's socket.
        socket: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Silent {
                socket,
                waited_for,
                limit,
            } => write!(
                f,
                "the agent behind {} did not answer {waited_for} within {} s",
                socket.display(),
                limit.as_secs()
            ),
            Self::Closed { socket, waited_for } => {
                write!(
                    f,
                    "the channel {} ended while {waited_for} ran",
                    socket.display()
                )
            }
            Self::Io { socket, .. } => write!(f, "the channel {} failed", socket.display()),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io { source, .. } => Some(source),
            Self::Silent { .. } | Self::Closed { .. } => None,
        }
    }
}

/// A connection to one guest's agent.
#[derive(Debug)]
pub struct Client {
    socket: PathBuf,
    stream: UnixStream,
    from: BufReader<Ticking>,
}

/// Each request of this process has a number of its own: what answers an earlier connection is no
/// answer to a later one.
static NEXT_ID: AtomicU64 = AtomicU64::new(1);

/// A socket reader that gives up at a deadline.
#[derive(Debug)]
struct Ticking {
    stream: UnixStream,
    deadline: Instant,
}

impl io::Read for Ticking {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.stream.read(buf) {
                Err(e)
                    if matches!(
                        e.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
                    ) =>
                {
                    if Instant::now() >= self.deadline {
                        return Err(io::ErrorKind::TimedOut.into());
                    }
                }
                other => return other,
            }
        }
    }
}

impl Client {
    /// Connects to `socket` and waits until the agent behind it answers.
    ///
    /// `alive` is asked at every turn; when it gives a reason the wait ends at once with it.
    ///
    /// # Errors
    /// [`Error::Silent`] after `limit`; [`Error::Closed`] when `alive` says that the machine has
    /// ended.
    pub fn connect(
        socket: &Path,
        limit: Duration,
        mut alive: impl FnMut() -> bool,
    ) -> Result<Self, Error> {
        let deadline = Instant::now() + limit;
        let waited_for = "the first ping".to_owned();
        loop {
            if let Ok(stream) = UnixStream::connect(socket)
                && let Ok(mut client) = Self::over(socket, stream)
            {
                // Any ping's answer will do: the agent of a slow guest may need longer than a turn.
                let oldest = id();
                while Instant::now() < deadline && alive() {
                    let id = id();
                    match client.ping_answered_from(oldest, id, Duration::from_millis(500)) {
                        Ok(()) => return Ok(client),
                        Err(Error::Silent { .. }) => {}
                        Err(_) => break,
                    }
                }
            }
            if !alive() {
                return Err(Error::Closed {
                    socket: socket.to_owned(),
                    waited_for,
                });
            }
            if Instant::now() >= deadline {
                return Err(Error::Silent {
                    socket: socket.to_owned(),
                    waited_for,
                    limit,
                });
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn over(socket: &Path, stream: UnixStream) -> io::Result<Self> {
        stream.set_read_timeout(Some(TICK))?;
        stream.set_write_timeout(Some(Duration::from_secs(60)))?;
        let reader = Ticking {
            stream: stream.try_clone()?,
            deadline: Instant::now(),
        };
        Ok(Self {
            socket: socket.to_owned(),
            stream,
            from: BufReader::new(reader),
        })
    }

    /// Asks whether the agent is there now: an answer to an earlier ping is none to this one.
    ///
    /// # Errors
    /// Any of [`Error`].
    pub fn ping(&mut self, limit: Duration) -> Result<(), Error> {
        let id = id();
        self.ping_answered_from(id, id, limit)
    }

    /// Waits until an agent begins, and asks nothing meanwhile: a kernel that starts another one
    /// leaves its devices as they are, and what they are sent lands in the next one's memory.
    ///
    /// # Errors
    /// Any of [`Error`].
    pub fn begins(&mut self, limit: Duration) -> Result<(), Error> {
        self.answer("the next boot", limit, |answer| match answer {
            Answer::Pong { id: HELLO } => Some(()),
            _ => None,
        })
    }

    /// Sends ping `id` and waits for the answer to it or to one that was sent since `oldest`.
    fn ping_answered_from(&mut self, oldest: u64, id: u64, limit: Duration) -> Result<(), Error> {
        self.send(&Request::Ping { id })?;
        self.answer("a ping", limit, |answer| match answer {
            Answer::Pong { id: got } if (oldest..=id).contains(&got) => Some(()),
            _ => None,
        })
    }

    /// Runs `command` in the guest's shell and waits for its end.
    ///
    /// # Errors
    /// Any of [`Error`]. That the command failed is no error: see [`Output::status`].
    pub fn run(&mut self, command: &str, limit: Duration) -> Result<Output, Error> {
        let id = self.start(command, limit)?;
        // The agent kills the command at its limit; what comes later is a dead agent.
        self.answer(
            &format!("`{command}`"),
            limit + GRACE,
            |answer| match answer {
                Answer::Done {
                    id: got,
                    status,
                    stdout,
                    stderr,
                } if got == id => Some(Output {
                    status,
                    stdout: String::from_utf8_lossy(&stdout).into_owned(),
                    stderr: String::from_utf8_lossy(&stderr).into_owned(),
                }),
                _ => None,
            },
        )
    }

    /// The same, for a machine that may be lost: it is pinged again and again while the command
    /// runs, and given up when it has not answered for `silence`. Before that `wake` is told how
    /// long it has been silent, at each ping that follows one without an answer.
    ///
    /// # Errors
    /// Any of [`Error`]; [`Error::Silent`] also when the machine itself is silent.
    pub fn run_watched(
        &mut self,
        command: &str,
        limit: Duration,
        silence: Duration,
        mut wake: impl FnMut(Duration),
    ) -> Result<Output, Error> {
        let id = self.start(command, limit)?;
        let deadline = Instant::now() + limit + silence;
        let what = format!("`{command}`");
        let mut heard = Instant::now();
        loop {
            if self.hears(PULSE.min(silence)) {
                // Whole answers only: what has begun to come gets the time that it needs.
                let answer = self.answer(&what, silence, Some)?;
                heard = Instant::now();
                if let Answer::Done {
                    id: got,
                    status,
                    stdout,
                    stderr,
                } = answer
                    && got == id
                {
                    return Ok(Output {
                        status,
                        stdout: String::from_utf8_lossy(&stdout).into_owned(),
                        stderr: String::from_utf8_lossy(&stderr).into_owned(),
                    });
                }
                continue;
            }
            let (waited_for, limit) = if heard.elapsed() >= silence {
                (format!("a ping while {what} runs"), silence)
            } else if Instant::now() >= deadline {
                (what, limit + silence)
            } else {
                if heard.elapsed() > 2 * PULSE {
                    wake(heard.elapsed());
                }
                self.send(&Request::Ping { id: self::id() })?;
                continue;
            };
            return Err(Error::Silent {
                socket: self.socket.clone(),
                waited_for,
                limit,
            });
        }
    }

    /// Whether something arrives within `limit`; the end of the channel does, too.
    fn hears(&mut self, limit: Duration) -> bool {
        self.from.get_mut().deadline = Instant::now() + limit;
        match self.from.fill_buf() {
            Ok(_) => true,
            Err(error) => error.kind() != io::ErrorKind::TimedOut,
        }
    }

    /// Sends `command` and does not wait: for the last command of a guest's life.
    ///
    /// # Errors
    /// [`Error::Io`] when the channel is gone already.
    pub fn start(&mut self, command: &str, limit: Duration) -> Result<u64, Error> {
        let id = id();
        let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        self.send(&Request::Run {
            id,
            limit_ms,
            command: command.to_owned(),
        })?;
        Ok(id)
    }

    fn send(&mut self, request: &Request) -> Result<(), Error> {
        write_request(&mut self.stream, request).map_err(|source| Error::Io {
            socket: self.socket.clone(),
            source,
        })
    }

    fn answer<T>(
        &mut self,
        waited_for: &str,
        limit: Duration,
        mut wanted: impl FnMut(Answer) -> Option<T>,
    ) -> Result<T, Error> {
        self.from.get_mut().deadline = Instant::now() + limit;
        loop {
            match read_answer(&mut self.from) {
                Ok(answer) => {
                    if let Some(found) = wanted(answer) {
                        return Ok(found);
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::TimedOut => {
                    return Err(Error::Silent {
                        socket: self.socket.clone(),
                        waited_for: waited_for.to_owned(),
                        limit,
                    });
                }
                Err(e)
                    if matches!(
                        e.kind(),
                        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset
                    ) =>
                {
                    return Err(Error::Closed {
                        socket: self.socket.clone(),
                        waited_for: waited_for.to_owned(),
                    });
                }
                Err(source) => {
                    return Err(Error::Io {
                        socket: self.socket.clone(),
                        source,
                    });
                }
            }
        }
    }
}

fn id() -> u64 {
    NEXT_ID.fetch_add(1, Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{read_request, write_answer};
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_command_is_run_and_a_silent_agent_is_named() {
        let dir = std::env::temp_dir().join(format!("agent-client-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("channel");
        let listener = UnixListener::bind(&path).unwrap();
        let agent = std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut to = stream.try_clone().unwrap();
            let mut from = BufReader::new(stream);
            while let Ok(request) = read_request(&mut from) {
                let answer = match request {
                    Request::Ping { id } => Answer::Pong { id },
                    Request::Run { command, .. } if command == "hang" => continue,
                    Request::Run { id, command, .. } => Answer::Done {
                        id,
                        status: 3,
                        stdout: command.into_bytes(),
                        stderr: Vec::new(),
                    },
                };
                write_answer(&mut to, &answer).unwrap();
            }
        });
        let mut client = Client::connect(&path, Duration::from_secs(60), || true).unwrap();
        let output = client.run("say", Duration::from_secs(60)).unwrap();
        assert_eq!((output.status, output.stdout.as_str()), (3, "say"));
        let long = Duration::from_secs(60);
        let output = client.run_watched("say", long, long, |_| {});
        assert_eq!(output.unwrap().status, 3);
        let silent = client.run_watched("hang", Duration::ZERO, Duration::ZERO, |_| {});
        assert!(matches!(silent, Err(Error::Silent { .. })));
        let error = client.ping(Duration::ZERO).err();
        assert!(error.is_none_or(|e| matches!(e, Error::Silent { .. })));
        client.start("hang", Duration::from_secs(1)).unwrap();
        drop(client);
        agent.join().unwrap();
        std::fs::remove_dir_all(&dir).unwrap();
    }
}

//! The frames: total decoding of what arrives on a channel that may carry anything.

use std::io::{self, BufRead, Read, Write};

use crate::OUTPUT_LIMIT;

/// The longest header line that can be a frame; a longer line is skipped without being kept.
const HEADER_LIMIT: u64 = 128;
/// The longest command line, in bytes.
const COMMAND_LIMIT: usize = 1 << 20;

/// What a test asks of the agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Are you there?
    Ping {
        /// Chosen by the asker and repeated in the answer.
        id: u64,
    },
    /// Run a shell command.
    Run {
        /// Chosen by the asker and repeated in the answer.
        id: u64,
        /// The command is killed after this many milliseconds.
        limit_ms: u64,
        /// What `sh -c` is given.
        command: String,
    },
}

/// What the agent says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The agent is there.
    Pong {
        /// The request's id.
        id: u64,
    },
    /// A command has ended.
    Done {
        /// The request's id.
        id: u64,
        /// The exit status; 128 and the signal's number when one ended it.
        status: i32,
        /// What the command wrote on its standard output.
        stdout: Vec<u8>,
        /// What the command wrote on its standard error.
        stderr: Vec<u8>,
    },
}

/// Reads the next request, skipping whatever is not one.
///
/// # Errors
/// The channel's own errors, and `UnexpectedEof` at its end.
pub fn read_request(from: &mut impl BufRead) -> io::Result<Request> {
    loop {
        let line = header(from)?;
        let words: Vec<&str> = line.split(' ').collect();
        match words.as_slice() {
            ["PING", id] => {
                if let Ok(id) = id.parse() {
                    return Ok(Request::Ping { id });
                }
            }
            ["RUN", id, limit, length] => {
                let (Ok(id), Ok(limit_ms), Ok(length)) =
                    (id.parse(), limit.parse(), length.parse::<usize>())
                else {
                    continue;
                };
                if length > COMMAND_LIMIT {
                    continue;
                }
                let command = payload(from, length)?;
                if let Ok(command) = String::from_utf8(command) {
                    return Ok(Request::Run {
                        id,
                        limit_ms,
                        command,
                    });
                }
            }
            _ => {}
        }
    }
}

/// Reads the next answer, skipping whatever is not one.
///
/// # Errors
/// The channel's own errors, and `UnexpectedEof` at its end.
pub fn read_answer(from: &mut impl BufRead) -> io::Result<Answer> {
    loop {
        let line = header(from)?;
        let words: Vec<&str> = line.split(' ').collect();
        match words.as_slice() {
            ["PONG", id] => {
                if let Ok(id) = id.parse() {
                    return Ok(Answer::Pong { id });
                }
            }
            ["DONE", id, status, out, err] => {
                let (Ok(id), Ok(status), Ok(out), Ok(err)) = (
                    id.parse(),
                    status.parse(),
                    out.parse::<usize>(),
                    err.parse::<usize>(),
                ) else {
                    continue;
                };
                if out > OUTPUT_LIMIT || err > OUTPUT_LIMIT {
                    continue;
                }
                let stdout = payload(from, out)?;
                let stderr = payload(from, err)?;
                return Ok(Answer::Done {
                    id,
                    status,
                    stdout,
                    stderr,
                });
            }
            _ => {}
        }
    }
}

/// Writes one request.
///
/// # Errors
/// The channel's own errors.
pub fn write_request(to: &mut impl Write, request: &Request) -> io::Result<()> {
    let frame = match request {
        Request::Ping { id } => format!("\n@lab PING {id}\n"),
        Request::Run {
            id,
            limit_ms,
            command,
        } => {
            format!("\n@lab RUN {id} {limit_ms} {}\n{command}", command.len())
        }
    };
    to.write_all(frame.as_bytes())?;
    to.flush()
}

/// Writes one answer.
///
/// # Errors
/// The channel's own errors.
pub fn write_answer(to: &mut impl Write, answer: &Answer) -> io::Result<()> {
    match answer {
        Answer::Pong { id } => to.write_all(format!("\n@lab PONG {id}\n").as_bytes())?,
        Answer::Done {
            id,
            status,
            stdout,
            stderr,
        } => {
            let mut frame = format!(
                "\n@lab DONE {id} {status} {} {}\n",
                stdout.len(),
                stderr.len()
            )
            .into_bytes();
            frame.extend_from_slice(stdout);
            frame.extend_from_slice(stderr);
            to.write_all(&frame)?;
        }
    }
    to.flush()
}

/// The next header line without its `@lab ` and its end.
fn header(from: &mut impl BufRead) -> io::Result<String> {
    loop {
        let mut line = Vec::new();
        if from
            .by_ref()
            .take(HEADER_LIMIT)
            .read_until(b'\n', &mut line)?
            == 0
        {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // A terminal that was not yet raw adds a carriage return.
        let text = line.trim_ascii_end();
        if let Some(rest) = text.strip_prefix(b"@lab ".as_slice()) {
            return Ok(String::from_utf8_lossy(rest).into_owned());
        }
    }
}

fn payload(from: &mut impl BufRead, length: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    from.by_ref().take(length as u64).read_to_end(&mut bytes)?;
    if bytes.len() < length {
        Err(io::ErrorKind::UnexpectedEof.into())
    } else {
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_survives_the_channel() {
        let sent = Request::Run {
            id: 7,
            limit_ms: 1000,
            command: "echo 'a\nb'".into(),
        };
        let mut wire = Vec::new();
        write_request(&mut wire, &Request::Ping { id: 6 }).unwrap();
        write_request(&mut wire, &sent).unwrap();
        let mut from = wire.as_slice();
        assert_eq!(read_request(&mut from).unwrap(), Request::Ping { id: 6 });
        assert_eq!(read_request(&mut from).unwrap(), sent);
    }

    #[test]
    fn an_answer_is_found_among_a_kernels_words_and_echoes() {
        let sent = Answer::Done {
            id: 1,
            status: -3,
            stdout: b"@lab x".into(),
            stderr: vec![0; 9],
        };
        let mut wire = b"[ 0.1] noise\r\n@lab PING 1\r\n@lab DONE 1 2\n\xff\xfe".to_vec();
        write_answer(&mut wire, &sent).unwrap();
        assert_eq!(read_answer(&mut wire.as_slice()).unwrap(), sent);
    }

    #[test]
    fn lengths_beyond_the_limits_are_skipped() {
        let mut wire = format!("@lab DONE 1 0 {} 0\n@lab RUN 1 1 99999999\n", usize::MAX);
        wire.push_str("@lab PONG 4\n");
        assert_eq!(
            read_answer(&mut wire.as_bytes()).unwrap(),
            Answer::Pong { id: 4 }
        );
    }

    #[test]
    fn a_channel_that_ends_inside_a_frame_says_so() {
        let wire = b"@lab RUN 1 1 10\nabc";
        let error = read_request(&mut wire.as_slice()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}

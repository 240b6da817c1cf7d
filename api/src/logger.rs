//! Log lines on standard error, at most a few per second from each place in the code: a guest
//! can cause some of them.

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use log::{LevelFilter, Log, Metadata, Record};

/// Lines from one place in one [`PERIOD`].
const BURST: u32 = 10;
const PERIOD: Duration = Duration::from_secs(5);

/// Starts logging: warnings and errors, and with each `-v` one level more.
pub(crate) fn start(verbose: u8) {
    let level = match verbose {
        0 => LevelFilter::Warn,
        1 => LevelFilter::Info,
        2 => LevelFilter::Debug,
        _ => LevelFilter::Trace,
    };
    static LOGGER: LazyLock<Stderr> = LazyLock::new(Stderr::default);
    // Refused only when a logger is there already.
    if log::set_logger(&*LOGGER).is_ok() {
        log::set_max_level(level);
    }
}

#[derive(Default)]
struct Stderr {
    /// As many entries as the code has places that log.
    places: Mutex<HashMap<(&'static str, u32), Place>>,
}

struct Place {
    since: Instant,
    lines: u32,
}

impl Stderr {
    /// Whether a line from this place may be written at `now`, and how many were not before it.
    fn admit(&self, file: &'static str, line: u32, now: Instant) -> Option<u32> {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let place = places.entry((file, line)).or_insert(Place {
            since: now,
            lines: 0,
        });
        let mut dropped = 0;
        if now.duration_since(place.since) >= PERIOD {
            dropped = place.lines.saturating_sub(BURST);
            *place = Place {
                since: now,
                lines: 0,
            };
        }
        place.lines = place.lines.saturating_add(1);
        (place.lines <= BURST).then_some(dropped)
    }
}

impl Log for Stderr {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let place = (
            record.file_static().unwrap_or_default(),
            record.line().unwrap_or_default(),
        );
        if let Some(dropped) = self.admit(place.0, place.1, Instant::now()) {
            let level = record.level().as_str().to_lowercase();
            let note = match dropped {
                0 => String::new(),
                n => format!(" ({n} lines like this were left out)"),
            };
            eprintln!("nestling: {level}: {}{note}", record.args());
        }
    }

    fn flush(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_that_floods_is_cut_and_the_loss_is_told() {
        let logger = Stderr::default();
        let start = Instant::now();
        let written = (0..1000)
            .filter(|_| logger.admit("a", 1, start).is_some())
            .count();
        assert_eq!(written, BURST as usize);
        assert_eq!(logger.admit("b", 1, start), Some(0));
        assert_eq!(logger.admit("a", 1, start + PERIOD), Some(990));
        assert_eq!(logger.admit("a", 1, start + PERIOD), Some(0));
    }
}

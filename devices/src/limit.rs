//! A bound on log lines that a guest can cause (promise 3 of `viommu`).

#![forbid(unsafe_code)]

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lines in each [`PERIOD`].
const BURST: u32 = 5;
const PERIOD: Duration = Duration::from_secs(30);

/// How often one place in the code has logged lately.
pub(crate) struct Limit(Mutex<Option<(Instant, u32)>>);

impl Limit {
    pub(crate) const fn new() -> Self {
        Self(Mutex::new(None))
    }

    /// Whether another line may be logged now.
    pub(crate) fn admits(&self) -> bool {
        self.admits_at(Instant::now())
    }

    fn admits_at(&self, now: Instant) -> bool {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (since, count) = match *state {
            Some((since, count)) if now.duration_since(since) < PERIOD => (since, count),
            _ => (now, 0),
        };
        *state = Some((since, count.saturating_add(1)));
        count < BURST
    }
}

/// `log::warn!` for what a guest can cause at will.
macro_rules! warn_limited {
    ($($line:tt)+) => {{
        static LIMIT: $crate::limit::Limit = $crate::limit::Limit::new();
        if LIMIT.admits() {
            log::warn!($($line)+);
        }
    }};
}

pub(crate) use warn_limited;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_logs_a_few_lines_per_period_and_then_again() {
        let limit = Limit::new();
        let start = Instant::now();
        let admitted = (0..100).filter(|_| limit.admits_at(start)).count();
        assert_eq!(admitted, BURST as usize);
        assert!(!limit.admits_at(start + PERIOD - Duration::from_secs(1)));
        assert!(limit.admits_at(start + PERIOD));
    }
}

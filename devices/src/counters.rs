//! What devices count, for whoever asks: from any thread, at any time, also of a device that is
//! gone meanwhile.

#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};

/// Numbers that only grow, by name. They hold nothing of the device that counts.
pub trait Counters: Send + Sync {
    /// Calls `tell` with the name and the number of each.
    fn read(&self, tell: &mut dyn FnMut(&str, u64));
}

/// A number that only grows.
#[derive(Default, Debug)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds, from any thread.
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    /// Adds, from the only thread that adds: no locked instruction.
    pub fn add_alone(&self, count: u64) {
        let sum = self.get().wrapping_add(count);
        self.0.store(sum, Ordering::Relaxed);
    }

    /// What it is now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Makes a struct of [`Counter`]s whose names are those of its fields.
#[macro_export]
macro_rules! counters {
    ($(#[$about:meta])* $seen:vis struct $name:ident {
        $( $(#[$about_field:meta])* $field:ident, )*
    }) => {
        $(#[$about])*
        #[derive(Default, Debug)]
        $seen struct $name {
            $( $(#[$about_field])* $seen $field: $crate::counters::Counter, )*
        }

        impl $crate::counters::Counters for $name {
            fn read(&self, tell: &mut dyn FnMut(&str, u64)) {
                $( tell(stringify!($field), self.$field.get()); )*
            }
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    counters! {
        /// Of a shop.
        struct Shop {
            /// Who came.
            guests,
            /// What was sold.
            sales,
        }
    }

    #[test]
    fn counters_are_told_by_the_names_of_their_fields() {
        let shop = Shop::default();
        shop.guests.add(3);
        shop.sales.add_alone(2);
        shop.sales.add_alone(5);
        let mut told = Vec::new();
        shop.read(&mut |name, count| told.push((name.to_owned(), count)));
        assert_eq!(told, [("guests".to_owned(), 3), ("sales".to_owned(), 7)]);
    }
}

//! Guest memory: where it lies ([`layout`]) and what holds it ([`ram`]).

pub mod layout;
pub mod ram;

#[cfg(test)]
mod hosts_tests;

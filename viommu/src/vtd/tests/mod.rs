//! Tests that drive a unit through its registers and guest memory, as a guest does.

mod bring_up;
mod engine;
mod faults;
mod invalidation;
mod page_requests;
mod peers;
mod replay;
mod tables;

//! The conformance suite that any back end must pass.

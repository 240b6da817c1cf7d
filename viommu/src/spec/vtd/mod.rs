//! VT-d registers, tables and descriptors (VT-d specification 4.x/5.x).

pub mod paging;
pub mod vcmd;

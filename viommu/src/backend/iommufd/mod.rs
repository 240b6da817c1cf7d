//! The host kernel as a back end: nested HWPTs over one nest parent, domains as their own HWPTs.

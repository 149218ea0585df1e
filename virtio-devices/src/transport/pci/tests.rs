//! The device as its driver sees it, through the BAR.

//! The device as its driver sees it.

mod driver;
mod hostile;
mod life;
mod registers;

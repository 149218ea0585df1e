//! What the fuzz targets share.

pub mod device;

use std::fmt::Debug;
use std::sync::OnceLock;

/// Prints what a target is about to do, when one input is reproduced (`scripts/fuzz.sh TARGET FILE` sets `FUZZ_SHOW`).
pub fn show(what: &dyn Debug) {
    static SHOWN: OnceLock<bool> = OnceLock::new();
    if *SHOWN.get_or_init(|| std::env::var_os("FUZZ_SHOW").is_some()) {
        eprintln!("{what:?}");
    }
}

//! How a test, or a driver under test, ends.

/// What a test ends with: nothing more to say, or why it failed.
pub type Outcome<T = ()> = Result<T, Reason>;

/// Why a test failed: a sentence and the numbers it is about (got, wanted).
#[derive(Clone, Copy)]
pub struct Reason(pub &'static str, pub u64, pub u64);

/// Fails with the sentence unless `got == wanted`.
pub fn same(what: &'static str, got: u64, wanted: u64) -> Outcome {
    if got == wanted {
        Ok(())
    } else {
        Err(Reason(what, got, wanted))
    }
}

/// Fails with the sentence unless it holds.
pub fn ensure(what: &'static str, holds: bool) -> Outcome {
    same(what, u64::from(holds), 1)
}

//! Entropy: bytes that a guest draws, and that a host program reads of the same source.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::counters::{Plain, own_time};
use crate::vmm::{Measured, Vmm, limits};

/// Bytes of a request, for which costs are told.
pub const REQUEST: usize = 4096;

/// By a VMM with the bare-metal guest: operations are bytes.
///
/// # Errors
/// What the VMM or the guest says.
pub fn in_guest(binary: &Path, guest: &Path, time: Duration, tracing: bool) -> Result<Measured> {
    let words = format!("test=bench_rng size={REQUEST} {}", limits(time));
    let mut vmm = Vmm::start(
        binary,
        guest,
        &words,
        &["--rng".into(), "src=/dev/urandom".into()],
        tracing,
    )?;
    let measured = vmm.measured()?;
    vmm.finish()?;
    Ok(measured)
}

/// Bytes a second, by a read for each request.
///
/// # Errors
/// When there is no entropy.
pub fn on_host(time: Duration) -> Result<Plain> {
    let path = "/dev/urandom";
    let mut source = File::open(path).context(path)?;
    let mut request = [0; REQUEST];
    let mut requests = 0u32;
    let (before, start) = (own_time(), Instant::now());
    while requests == 0 || start.elapsed() < time {
        source.read_exact(&mut request).context(path)?;
        requests += 1;
    }
    let of_requests = Plain::rate(requests, start.elapsed().as_secs_f64(), before);
    Ok(Plain {
        value: of_requests.value * REQUEST as f64,
        ..of_requests
    })
}

//! `bench`: how fast an image is read or written, with several requests in flight.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use qcow::{Image, OpenOptions};

use crate::args::Bench;
use crate::output::{self, Bar};

/// Most requests in flight.
const MAX_DEPTH: usize = 256;
/// Of memory: what direct I/O asks for, or more.
const PAGE: usize = 4096;
/// Largest request.
const MAX_BLOCK: u64 = 64 << 20;

/// What was measured.
pub struct Measured {
    pub requests: u64,
    pub block: u64,
    pub elapsed: Duration,
    /// Of each request, the shortest first.
    pub latencies: Vec<Duration>,
}

impl Measured {
    /// The latency that `percent` of the requests do not exceed.
    pub fn latency(&self, percent: usize) -> Duration {
        let index =
            (self.latencies.len() * percent / 100).min(self.latencies.len().saturating_sub(1));
        self.latencies.get(index).copied().unwrap_or_default()
    }

    pub fn requests_a_second(&self) -> f64 {
        self.requests as f64 / self.elapsed.as_secs_f64().max(1e-9)
    }
}

pub fn run(a: &Bench) -> Result<()> {
    let block = a.block_size.0;
    if !(1..=MAX_BLOCK).contains(&block) {
        bail!("a block size of {block} bytes; 1 to 64M are possible");
    }
    if !(1..=MAX_DEPTH).contains(&a.depth) {
        bail!("a depth of {}; 1 to {MAX_DEPTH} are possible", a.depth);
    }
    if a.requests == 0 {
        bail!("no requests");
    }
    let options = OpenOptions::new()
        .write(a.write)
        .follow_backing(a.follow)
        .follow_data_file(a.follow)
        .direct(a.direct);
    let image = Image::open(&a.path, &options).with_context(|| a.path.display().to_string())?;
    let blocks = image.len() / block;
    if blocks == 0 {
        bail!(
            "{}: the disk has {} bytes, less than a block",
            a.path.display(),
            image.len()
        );
    }
    let measured = measure(a, &image, blocks)?;
    image
        .close()
        .with_context(|| a.path.display().to_string())?;
    output::bench(a, &measured);
    Ok(())
}

/// Makes the requests, `a.depth` at a time, each on a thread.
fn measure(a: &Bench, image: &Image, blocks: u64) -> Result<Measured> {
    let next = AtomicU64::new(0);
    let ended = AtomicUsize::new(0);
    let failed = Mutex::new(None);
    let latencies = Mutex::new(Vec::new());
    let begin = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..a.depth {
            scope.spawn(|| {
                let result = work(a, image, blocks, &next);
                ended.fetch_add(1, Ordering::Release);
                match result {
                    Ok(own) => lock(&latencies).extend(own),
                    Err(e) => {
                        // The others stop too.
                        next.store(a.requests, Ordering::Relaxed);
                        lock(&failed).get_or_insert(e);
                    }
                }
            });
        }
        let mut bar = Bar::new();
        while bar.is_shown() && ended.load(Ordering::Acquire) < a.depth {
            bar.show(next.load(Ordering::Relaxed).min(a.requests), a.requests);
            std::thread::park_timeout(Duration::from_millis(100));
        }
        bar.show(a.requests, a.requests);
    });
    if a.write && lock(&failed).is_none() {
        image.flush()?;
    }
    let elapsed = begin.elapsed();
    if let Some(e) = lock(&failed).take() {
        return Err(e).with_context(|| a.path.display().to_string());
    }
    let mut latencies = std::mem::take(&mut *lock(&latencies));
    latencies.sort_unstable();
    Ok(Measured {
        requests: a.requests,
        block: a.block_size.0,
        elapsed,
        latencies,
    })
}

/// Takes requests until there are no more; how long each took.
fn work(a: &Bench, image: &Image, blocks: u64, next: &AtomicU64) -> qcow::Result<Vec<Duration>> {
    let size = a.block_size.0 as usize;
    // At a page, so that direct I/O needs no copy.
    let mut memory = vec![0xa5; size + PAGE];
    let start = memory.as_ptr().addr().next_multiple_of(PAGE) - memory.as_ptr().addr();
    let buffer = &mut memory[start..start + size];
    let mut latencies = Vec::new();
    loop {
        let number = next.fetch_add(1, Ordering::Relaxed);
        if number >= a.requests {
            return Ok(latencies);
        }
        let index = if a.random { scatter(number) } else { number };
        let offset = index % blocks * a.block_size.0;
        let begin = Instant::now();
        if a.write {
            image.write_at(buffer, offset)?;
        } else {
            image.read_at(buffer, offset)?;
        }
        latencies.push(begin.elapsed());
    }
}

/// Numbers that follow no order, the same in each run (splitmix64).
fn scatter(number: u64) -> u64 {
    let mut z = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What a thread that panicked left behind is whole.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

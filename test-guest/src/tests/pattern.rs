//! What the disk tests write: every 8 bytes of a disk tell their place and a seed.
//!
//! Word `w` of sector `s` is `(s * 64 + w) ^ (seed << 48)`, times 0x9e3779b97f4a7c15 modulo 2^64, little-endian.

use crate::map::{read, write};
use crate::outcome::{Outcome, Reason};

const WORDS: u64 = 64;

fn word(seed: u64, sector: u64, index: u64) -> u64 {
    ((sector * WORDS + index) ^ seed << 48).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Writes what `count` sectors from `sector` on hold into memory.
pub fn fill(at: u64, seed: u64, sector: u64, count: u64) {
    for i in 0..count * WORDS {
        write(at + i * 8, word(seed, sector + i / WORDS, i % WORDS));
    }
}

/// True when memory holds one sector.
pub fn is(at: u64, seed: u64, sector: u64) -> bool {
    (0..WORDS).all(|i| read::<u64>(at + i * 8) == word(seed, sector, i))
}

/// Fails with the first sector that memory doesn't hold.
pub fn check(at: u64, seed: u64, sector: u64, count: u64) -> Outcome {
    match (0..count).find(|&i| !is(at + i * 512, seed, sector + i)) {
        Some(i) => Err(Reason("a sector that differs", sector + i, sector)),
        None => Ok(()),
    }
}

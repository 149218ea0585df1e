//! What the streams and datagrams between guest and host hold: both sides make it with this file.

/// The bytes of stream or datagram `seed`. Where both sides send in one stream, each has a seed of its own.
pub fn pattern(seed: u32, len: usize) -> Vec<u8> {
    let mut x = seed.wrapping_mul(2_654_435_761) | 1;
    let words = std::iter::from_fn(|| {
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        Some(x.to_le_bytes())
    });
    words.flatten().take(len).collect()
}

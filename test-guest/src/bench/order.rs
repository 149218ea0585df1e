//! Which blocks a benchmark touches, and what they hold. The host's side uses this very file.

/// Bytes of the blocks that [`mark`] tells apart.
pub const BLOCK: u64 = 4096;

/// Place number `n` of `count`, a power of two, in an order that looks random and has each place once.
pub const fn nth(n: u64, count: u64) -> u64 {
    let mask = count - 1;
    let shift = count.trailing_zeros() / 2 + 1;
    // Each step can be undone within the mask.
    let a = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) & mask;
    let b = (a ^ a >> shift).wrapping_mul(0xd6e8_feb8_6659_fd93) & mask;
    b ^ b >> shift
}

/// The first eight bytes of block number `block` of a disk, little-endian.
pub const fn mark(block: u64) -> u64 {
    (block + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Where operation `n` of a job goes, in bytes: `size` bytes somewhere in place `n` of the `span / stride` places, which are taken
/// one after the other or in the order of [`nth`].
pub const fn offset(n: u64, size: u64, stride: u64, span: u64, sequential: bool) -> u64 {
    let places = span / stride;
    let place = if sequential {
        n % places
    } else {
        nth(n, places)
    };
    place * stride + n % (stride / size) * size
}

//! Packets of IPv4 (RFC 791) and what is in them, as bytes.

use crate::map::write;

/// Bytes of an Ethernet header.
pub const ETHERNET: u64 = 14;
/// Bytes of an IPv4 header without options.
pub const IP: u64 = 20;
/// Bytes of a UDP header.
pub const UDP: u64 = 8;
/// The protocol number of UDP.
pub const PROTOCOL_UDP: u8 = 17;
/// Ethernet type of IPv4.
pub const TYPE_IPV4: [u8; 2] = [0x08, 0x00];
/// Ethernet type of ARP (RFC 826).
pub const TYPE_ARP: [u8; 2] = [0x08, 0x06];

/// Writes bytes, and gives the address past them.
pub fn put(at: u64, bytes: &[u8]) -> u64 {
    for (i, byte) in bytes.iter().enumerate() {
        write(at + i as u64, *byte);
    }
    at + bytes.len() as u64
}

/// The big-endian words of some bytes.
pub fn words(bytes: &[u8]) -> impl Iterator<Item = u16> {
    let pairs = bytes.chunks_exact(2);
    pairs.map(|pair| u16::from_be_bytes([pair[0], pair[1]]))
}

/// A sum in ones' complement of 16-bit words (RFC 1071).
pub fn ones_sum(words: impl Iterator<Item = u16>) -> u16 {
    words.fold(0, |sum, word| {
        let (sum, carry) = sum.overflowing_add(word);
        sum + u16::from(carry)
    })
}

/// Writes the headers of Ethernet, IPv4 and UDP before `data` bytes of a datagram; gives the address past them. `macs` and the others
/// are destination and source, in the order of each header; the checksum of UDP is as told.
pub fn put_headers(
    at: u64,
    macs: [[u8; 6]; 2],
    addresses: [[u8; 4]; 2],
    ports: [u16; 2],
    data: u64,
    checksum: u16,
) -> u64 {
    let [to, from] = addresses;
    let mut ip = [0; IP as usize];
    ip[0] = 0x45;
    ip[2..4].copy_from_slice(&((IP + UDP + data) as u16).to_be_bytes());
    ip[8] = 64;
    ip[9] = PROTOCOL_UDP;
    ip[12..16].copy_from_slice(&from);
    ip[16..20].copy_from_slice(&to);
    let sum = !ones_sum(words(&ip));
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let at = macs.iter().fold(at, |at, mac| put(at, mac));
    let at = put(put(at, &TYPE_IPV4), &ip);
    [ports[1], ports[0], (UDP + data) as u16, checksum]
        .into_iter()
        .fold(at, |at, word| put(at, &word.to_be_bytes()))
}

//! Compressed clusters, packed and unpacked in memory (qcow2 "Compressed Clusters Descriptor").

use flate2::{Compress, Decompress, FlushCompress, FlushDecompress, Status};
use zstd::stream::raw::{Decoder, InBuffer, Operation, OutBuffer};

use crate::header::Compression;

/// Window of the deflate streams that are written: readers may allow no more than 4 KiB.
const WINDOW_BITS: u8 = 12;

/// Fills `out`; what follows in `packed` does not count.
pub(crate) fn unpack(
    compression: Compression,
    packed: &[u8],
    out: &mut [u8],
) -> Result<(), String> {
    let size = out.len();
    let produced = match compression {
        Compression::Zlib => {
            let mut stream = Decompress::new_with_window_bits(false, 15);
            loop {
                let (read, written) = (stream.total_in() as usize, stream.total_out() as usize);
                let input = packed.get(read..).unwrap_or_default();
                let status = stream.decompress(input, &mut out[written..], FlushDecompress::None);
                let now = stream.total_out() as usize;
                match status {
                    Err(e) => return Err(e.to_string()),
                    Ok(Status::StreamEnd) => break now,
                    _ if now == size => break now,
                    _ if stream.total_in() as usize == read && now == written => break now,
                    _ => {}
                }
            }
        }
        Compression::Zstd => {
            let mut stream = Decoder::new().map_err(|e| e.to_string())?;
            let mut input = InBuffer::around(packed);
            let mut written = 0;
            loop {
                let before = input.pos();
                let mut output = OutBuffer::around(&mut out[written..]);
                stream
                    .run(&mut input, &mut output)
                    .map_err(|e| e.to_string())?;
                let produced = output.pos();
                written += produced;
                if written == size || (produced == 0 && input.pos() == before) {
                    break written;
                }
            }
        }
    };
    if produced != size {
        return Err(format!("{produced} bytes instead of {size}"));
    }
    Ok(())
}

/// Packs a cluster; `None` if that does not make it smaller.
pub(crate) fn pack(compression: Compression, cluster: &[u8]) -> Result<Option<Vec<u8>>, String> {
    let packed = match compression {
        Compression::Zlib => {
            let mut out = vec![0u8; cluster.len()];
            let mut stream =
                Compress::new_with_window_bits(flate2::Compression::default(), false, WINDOW_BITS);
            match stream
                .compress(cluster, &mut out, FlushCompress::Finish)
                .map_err(|e| e.to_string())?
            {
                Status::StreamEnd => out.truncate(stream.total_out() as usize),
                // Out of room: no gain.
                _ => return Ok(None),
            }
            out
        }
        Compression::Zstd => zstd::bulk::compress(cluster, 0).map_err(|e| e.to_string())?,
    };
    Ok((packed.len() < cluster.len()).then_some(packed))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(size: usize) -> Vec<u8> {
        (0..size).map(|i| ((i * i) >> 9) as u8).collect()
    }

    #[test]
    fn round_trip_with_trailing_bytes() {
        for compression in [Compression::Zlib, Compression::Zstd] {
            for bits in [9, 12, 16, 21] {
                let cluster = sample(1 << bits);
                let Some(mut packed) = pack(compression, &cluster).unwrap() else {
                    assert!(bits < 12, "{compression} gained nothing on 2^{bits}");
                    continue;
                };
                packed.extend_from_slice(&[0xaa; 511]);
                let mut out = vec![0x55; cluster.len()];
                unpack(compression, &packed, &mut out).unwrap();
                assert_eq!(out, cluster);
            }
        }
    }

    #[test]
    fn noise_is_not_packed_and_garbage_is_an_error() {
        let mut x = 1u32;
        let noise: Vec<u8> = (0..4096)
            .map(|_| {
                x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (x >> 24) as u8
            })
            .collect();
        let mut out = [0; 4096];
        for compression in [Compression::Zlib, Compression::Zstd] {
            assert_eq!(pack(compression, &noise).unwrap(), None);
            assert!(unpack(compression, &noise, &mut out).is_err());
            assert!(unpack(compression, &[], &mut out).is_err());
            let packed = pack(compression, &sample(4096)).unwrap().unwrap();
            assert!(unpack(compression, &packed[..packed.len() / 2], &mut out).is_err());
        }
    }
}

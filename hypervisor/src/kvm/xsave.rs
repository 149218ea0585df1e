//! The XSAVE area of a vCPU in and out (KVM API, KVM_GET_XSAVE2 and KVM_SET_XSAVE).

use kvm_bindings::{Xsave, kvm_xsave};
use kvm_ioctls::VcpuFd;

/// Bytes of the area where no state component lies past the first page.
pub(super) const SMALLEST: usize = size_of::<kvm_xsave>();

const WORD: usize = size_of::<u32>();

/// Reads the area of `fd` into `area`, whose length is that which the VM reported.
pub(super) fn read(fd: &VcpuFd, area: &mut [u8]) -> Result<(), kvm_ioctls::Error> {
    let mut buffer = buffer(area.len())?;
    if area.len() > SMALLEST {
        // SAFETY: the buffer is as long as KVM_CAP_XSAVE2 of this VM says, and this process
        // enables no dynamic feature afterwards.
        unsafe { fd.get_xsave2(&mut buffer) }?;
    } else {
        let plain = fd.get_xsave()?;
        // SAFETY: the length, which is the field not to be changed, stays.
        unsafe { buffer.as_mut_fam_struct() }.xsave.region = plain.region;
    }
    let (head, tail) = area.split_at_mut(SMALLEST);
    bytes_from(head, &buffer.as_fam_struct_ref().xsave.region);
    bytes_from(tail, buffer.as_slice());
    Ok(())
}

/// Sets the area of `fd` from `area`, whose length is that which the VM reported.
pub(super) fn write(fd: &VcpuFd, area: &[u8]) -> Result<(), kvm_ioctls::Error> {
    let mut buffer = buffer(area.len())?;
    let (head, tail) = area.split_at(SMALLEST);
    // SAFETY: the length, which is the field not to be changed, stays.
    words_from(
        &mut unsafe { buffer.as_mut_fam_struct() }.xsave.region,
        head,
    );
    words_from(buffer.as_mut_slice(), tail);
    // SAFETY: the buffer is as long as KVM_CAP_XSAVE2 of this VM says, and this process enables no
    // dynamic feature afterwards.
    unsafe { fd.set_xsave2(&buffer) }
}

/// Zeroes, for `size` bytes.
fn buffer(size: usize) -> Result<Xsave, kvm_ioctls::Error> {
    let extra = size
        .checked_sub(SMALLEST)
        .ok_or(kvm_ioctls::Error::new(libc::EINVAL))?;
    Xsave::new(extra.div_ceil(WORD)).map_err(|_| kvm_ioctls::Error::new(libc::ENOMEM))
}

fn bytes_from(bytes: &mut [u8], words: &[u32]) {
    for (bytes, word) in bytes.chunks_mut(WORD).zip(words) {
        let count = bytes.len();
        bytes.copy_from_slice(&word.to_ne_bytes()[..count]);
    }
}

fn words_from(words: &mut [u32], bytes: &[u8]) {
    for (word, bytes) in words.iter_mut().zip(bytes.chunks(WORD)) {
        let mut whole = [0; WORD];
        whole[..bytes.len()].copy_from_slice(bytes);
        *word = u32::from_ne_bytes(whole);
    }
}

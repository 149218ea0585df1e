//! A program for the Linux guest: says words to port 5000 of the host and prints the answer. `tests/integration/devices.rs` builds it
//! and packs it into the initramfs as `/tests/vsock_words`.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::FromRawFd;

const AF_VSOCK: u16 = 40;
const SOCK_STREAM: i32 = 1;
const HOST: u32 = 2;
const PORT: u32 = 5000;

/// `struct sockaddr_vm` of Linux.
#[repr(C)]
struct Address {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    rest: [u8; 4],
}

unsafe extern "C" {
    fn socket(domain: i32, kind: i32, protocol: i32) -> i32;
    fn connect(fd: i32, address: *const Address, len: u32) -> i32;
}

fn main() -> io::Result<()> {
    let address = Address {
        family: AF_VSOCK,
        reserved: 0,
        port: PORT,
        cid: HOST,
        rest: [0; 4],
    };
    // SAFETY: the descriptor is new and has one owner; the address is as long as is told, and lives during the call.
    let mut stream = unsafe {
        let fd = socket(AF_VSOCK.into(), SOCK_STREAM, 0);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let file = File::from_raw_fd(fd);
        if connect(fd, &raw const address, size_of::<Address>() as u32) < 0 {
            return Err(io::Error::last_os_error());
        }
        file
    };
    stream.write_all(b"words of the guest")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    println!("{answer}");
    Ok(())
}

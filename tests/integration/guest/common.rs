//! What programs for the Linux guest that talk with the host share.

#[path = "pattern.rs"]
mod pattern;

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::process::Command;
use std::thread;

pub use pattern::pattern;

/// Bytes each way in a stream.
const STREAM: usize = 1 << 20;

pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Runs a command of busybox to its good end; what it said.
pub fn busybox(words: &[&str]) -> Result<String> {
    let output = Command::new("/bin/busybox").args(words).output()?;
    if output.status.success() {
        Ok(String::from_utf8(output.stdout)?)
    } else {
        Err(format!("{words:?}: {output:?}").into())
    }
}

/// Sends the bytes of stream `id` while those of `id + 100` come.
pub fn both_ways(mut stream: TcpStream, id: u32) -> Result<()> {
    let mut sender = stream.try_clone()?;
    let sending = thread::spawn(move || -> io::Result<()> {
        sender.write_all(&pattern(id, STREAM))?;
        sender.shutdown(Shutdown::Write)
    });
    let mut got = Vec::with_capacity(STREAM);
    stream.read_to_end(&mut got)?;
    sending.join().expect("it does not panic")?;
    if got != pattern(id + 100, STREAM) {
        return Err(format!("stream {id}: {} bytes, and not those", got.len()).into());
    }
    Ok(())
}

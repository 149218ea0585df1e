//! A program for the Linux guest: its side of `tests/integration/traffic.rs`, which builds it, packs it into the initramfs as
//! `/tests/traffic`, and is its peer. Says lines `CH-NET: ...`; ends with 0 if all works.

use std::fs;
use std::io::{self, BufRead, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::thread;
use std::time::Duration;

const GUEST: &str = "192.168.249.2";
const HOST: &str = "192.168.249.1";
/// Processors of the guest.
const CPUS: u32 = 2;
/// Bytes each way in a stream.
const STREAM: usize = 1 << 20;
/// Bytes of the datagrams that go to the host and come back.
const DATAGRAMS: [usize; 5] = [1, 100, 1472, 8972, 30_000];

unsafe extern "C" {
    fn sched_setaffinity(pid: i32, size: usize, mask: *const u64) -> i32;
}

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// The bytes of stream or datagram `seed`: the host knows them as well.
fn pattern(seed: u32, len: usize) -> Vec<u8> {
    let mut x = seed.wrapping_mul(2_654_435_761) | 1;
    let words = std::iter::from_fn(|| {
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        Some(x.to_le_bytes())
    });
    words.flatten().take(len).collect()
}

/// Runs a command of busybox to its good end.
fn busybox(words: &[&str]) -> Result<()> {
    let output = Command::new("/bin/busybox").args(words).output()?;
    if output.status.success() {
        Ok(())
    } else {
        Err(format!("{words:?}: {output:?}").into())
    }
}

/// This thread stays on one processor, so that it uses the queues that belong to it.
fn stay_on(cpu: u32) -> io::Result<()> {
    let mask = 1 << cpu;
    // SAFETY: the mask is a word that lives during the call; 0 is this thread.
    match unsafe { sched_setaffinity(0, size_of_val(&mask), &raw const mask) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Sends the bytes of stream `id` while those of `id + 100` come.
fn both_ways(mut stream: TcpStream, id: u32) -> Result<()> {
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

/// The host has connected four times and says which stream each is; each is served on a processor of its own.
fn streams(listener: &TcpListener) -> Result<()> {
    let mut threads = Vec::new();
    for _ in 0..4 {
        let (mut stream, _) = listener.accept()?;
        let mut id = [0];
        stream.read_exact(&mut id)?;
        let id = u32::from(id[0]);
        threads.push(thread::spawn(move || {
            let served = stay_on(id % CPUS).map_err(Into::into);
            let served = served.and_then(|()| both_ways(stream, id));
            served.map_err(|e| e.to_string())
        }));
    }
    for thread in threads {
        thread.join().expect("it does not panic")?;
    }
    Ok(())
}

/// Datagrams of all sizes to the host, which sends each back. One that gets lost is sent again.
fn datagrams(socket: &UdpSocket) -> Result<()> {
    let mut buffer = vec![0; 1 << 16];
    for (id, len) in (200..).zip(DATAGRAMS) {
        let bytes = pattern(id, len);
        loop {
            socket.send(&bytes)?;
            match socket.recv(&mut buffer) {
                Ok(count) if buffer[..count] == bytes => break,
                // What was sent twice comes back twice.
                Ok(count) if count < len => {}
                Ok(count) => return Err(format!("{count} bytes for {len}").into()),
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
    Ok(())
}

/// Sends back what the host sends, until it sends nothing.
fn echo(socket: &UdpSocket) -> Result<()> {
    let mut buffer = vec![0; 1 << 16];
    loop {
        let (count, from) = socket.recv_from(&mut buffer)?;
        socket.send_to(&buffer[..count], from)?;
        if count == 0 {
            return Ok(());
        }
    }
}

fn said_at_the_console(wanted: &str) -> Result<()> {
    let mut line = String::new();
    io::stdin().lock().read_line(&mut line)?;
    if line.trim() == wanted {
        Ok(())
    } else {
        Err(format!("{line:?} where {wanted} was to come").into())
    }
}

fn run() -> Result<()> {
    busybox(&["ifconfig", "eth0", GUEST, "netmask", "255.255.255.0", "up"])?;
    let mtu = fs::read_to_string("/sys/class/net/eth0/mtu")?;
    let queues = fs::read_dir("/sys/class/net/eth0/queues")?.count();
    println!("CH-NET: mtu {} queues {queues}", mtu.trim());

    let listener = TcpListener::bind((GUEST, 7000))?;
    let server = UdpSocket::bind((GUEST, 7001))?;
    let client = UdpSocket::bind((GUEST, 0))?;
    client.set_read_timeout(Some(Duration::from_secs(5)))?;
    client.connect((HOST, 5002))?;
    // Of the largest size that goes in one packet.
    busybox(&["ping", "-c", "2", "-s", "8972", HOST])?;
    println!("CH-NET: pinged");

    let mut control = TcpStream::connect((HOST, 5000))?;
    streams(&listener)?;
    println!("CH-NET: streams from the host");
    both_ways(TcpStream::connect((HOST, 5001))?, 10)?;
    println!("CH-NET: stream to the host");
    for line in fs::read_to_string("/proc/interrupts")?.lines() {
        let mut words = line.split_whitespace().rev();
        if let Some(name) = words.next().filter(|name| name.contains("-input.")) {
            // Between the number and the names stands a count for each processor.
            let count: u64 = words.filter_map(|w| w.parse::<u64>().ok()).sum();
            println!("CH-NET: interrupts {name} {count}");
        }
    }

    datagrams(&client)?;
    println!("CH-NET: datagrams to the host");
    echo(&server)?;
    println!("CH-NET: datagrams from the host");

    println!("CH-NET: take the link away");
    said_at_the_console("away")?;
    for _ in 0..10 {
        client.send(b"into the void")?;
    }
    println!("CH-NET: bring it back");
    said_at_the_console("back")?;
    control.write_all(b"still here")?;
    let mut answer = String::new();
    control.read_to_string(&mut answer)?;
    if answer != "so am I" {
        return Err(format!("{answer:?} after the link came back").into());
    }
    both_ways(TcpStream::connect((HOST, 5001))?, 11)?;
    datagrams(&client)?;
    println!("CH-NET: all as before");
    Ok(())
}

fn main() {
    if let Err(e) = run() {
        println!("CH-NET: failed: {e}");
        std::process::exit(1);
    }
}

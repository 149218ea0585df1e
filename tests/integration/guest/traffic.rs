//! A program for the Linux guest: its side of `tests/integration/traffic.rs`, which builds it, packs it into the initramfs as
//! `/tests/traffic`, and is its peer. Says lines `CH-NET: ...`; ends with 0 if all works.

mod common;

use std::fs;
use std::io::{self, BufRead, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::Duration;

use common::{Result, both_ways, busybox, pattern};

const GUEST: &str = "192.168.249.2";
const HOST: &str = "192.168.249.1";
const GUEST6: &str = "fd00:249::2";
const HOST6: &str = "fd00:249::1";
/// Whatever comes, over IPv4 or IPv6.
const ANY: &str = "::";
/// Processors of the guest.
const CPUS: u32 = 4;
/// Bytes of the datagrams that go to the host and come back.
const DATAGRAMS: [usize; 5] = [1, 100, 1472, 8972, 30_000];

unsafe extern "C" {
    fn sched_setaffinity(pid: i32, size: usize, mask: *const u64) -> i32;
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

/// Waits until the interface has a carrier, `1`, or none, `0`.
fn wait_for_carrier(wanted: &str) -> Result<()> {
    let mut found = String::new();
    // Half a minute.
    for _ in 0..600 {
        found = fs::read_to_string("/sys/class/net/eth0/carrier")?;
        if found.trim_end() == wanted {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(50));
    }
    Err(format!("the carrier is {found:?}").into())
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

/// A socket for datagrams to the host, over IPv4 or IPv6.
fn client(guest: &str, host: &str) -> Result<UdpSocket> {
    let client = UdpSocket::bind((guest, 0))?;
    client.set_read_timeout(Some(Duration::from_secs(5)))?;
    client.connect((host, 5002))?;
    Ok(client)
}

fn run() -> Result<()> {
    // An address is good at once, without a look for others that have it.
    fs::write("/proc/sys/net/ipv6/conf/eth0/accept_dad", "0")?;
    busybox(&["ifconfig", "eth0", GUEST, "netmask", "255.255.255.0", "up"])?;
    busybox(&["ifconfig", "eth0", "add", &format!("{GUEST6}/64")])?;
    let mtu = fs::read_to_string("/sys/class/net/eth0/mtu")?;
    let queues = fs::read_dir("/sys/class/net/eth0/queues")?.count();
    println!("CH-NET: mtu {} queues {queues}", mtu.trim());

    let listener = TcpListener::bind((ANY, 7000))?;
    let server = UdpSocket::bind((ANY, 7001))?;
    let client4 = client(GUEST, HOST)?;
    let client6 = client(GUEST6, HOST6)?;
    // Of the largest size that goes in one packet.
    busybox(&["ping", "-c", "2", "-s", "8972", HOST])?;
    println!("CH-NET: pinged");

    let mut control = TcpStream::connect((HOST, 5000))?;
    streams(&listener)?;
    println!("CH-NET: streams from the host");
    both_ways(TcpStream::connect((HOST, 5001))?, 10)?;
    println!("CH-NET: stream to the host");
    both_ways(TcpStream::connect((HOST6, 5001))?, 20)?;
    println!("CH-NET: stream over IPv6");
    for line in fs::read_to_string("/proc/interrupts")?.lines() {
        let mut words = line.split_whitespace().rev();
        if let Some(name) = words.next().filter(|name| name.contains("-input.")) {
            // Between the number and the names stands a count for each processor.
            let count: u64 = words.filter_map(|w| w.parse::<u64>().ok()).sum();
            println!("CH-NET: interrupts {name} {count}");
        }
    }

    datagrams(&client4)?;
    println!("CH-NET: datagrams to the host");
    echo(&server)?;
    println!("CH-NET: datagrams from the host");
    datagrams(&client6)?;
    println!("CH-NET: datagrams to the host over IPv6");
    echo(&server)?;
    println!("CH-NET: datagrams from the host over IPv6");

    println!("CH-NET: take the link away");
    said_at_the_console("away")?;
    wait_for_carrier("0")?;
    println!("CH-NET: no carrier");
    for _ in 0..10 {
        client4.send(b"into the void")?;
    }
    println!("CH-NET: bring it back");
    said_at_the_console("back")?;
    wait_for_carrier("1")?;
    println!("CH-NET: a carrier");
    control.write_all(b"still here")?;
    let mut answer = String::new();
    control.read_to_string(&mut answer)?;
    if answer != "so am I" {
        return Err(format!("{answer:?} after the link came back").into());
    }
    both_ways(TcpStream::connect((HOST, 5001))?, 11)?;
    datagrams(&client4)?;
    println!("CH-NET: all as before");
    Ok(())
}

fn main() {
    if let Err(e) = run() {
        println!("CH-NET: failed: {e}");
        std::process::exit(1);
    }
}

//! A program for the Linux guest: its side of `tests/integration/user_net.rs`, which builds it, packs it into the initramfs as
//! `/tests/user_net`, and is its peer. Says lines `CH-USER: ...`; ends with 0 if all works.
//!
//! eth0 is on a network as it is by default; by eth1 the gateway leads to the host's own programs.

mod common;

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use common::{Result, both_ways, busybox, pattern};

/// An address of the host that is not its loopback's.
const HOST: &str = "192.0.2.1";
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
const OPEN_GATEWAY: &str = "192.168.7.2";
/// A program of the host listens there at 127.0.0.1.
const PRIVATE: u16 = 9000;
/// Bytes of datagrams; the last fills a packet.
const DATAGRAMS: [usize; 3] = [1, 100, 1472];

/// An address by DHCP; the script says which.
fn lease(interface: &str) -> Result<()> {
    busybox(&["ifconfig", interface, "up"])?;
    let said = busybox(&[
        "udhcpc", "-i", interface, "-n", "-q", "-f", "-O", "mtu", "-s", "/tests/lease",
    ])?;
    print!("{said}");
    Ok(())
}

/// Datagrams to the host, which sends each back.
fn datagrams() -> Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.set_read_timeout(Some(Duration::from_secs(60)))?;
    socket.connect((HOST, 8001))?;
    let mut buffer = vec![0; 1 << 16];
    for (id, len) in (200..).zip(DATAGRAMS) {
        let bytes = pattern(id, len);
        socket.send(&bytes)?;
        let count = socket.recv(&mut buffer)?;
        if buffer[..count] != bytes {
            return Err(format!("{count} bytes for {len}").into());
        }
    }
    Ok(())
}

fn comes_from_the_gateway(peer: SocketAddr) -> Result<()> {
    if peer.ip() == GATEWAY {
        Ok(())
    } else {
        Err(format!("{peer} is not the gateway").into())
    }
}

fn run() -> Result<()> {
    lease("eth0")?;
    lease("eth1")?;
    busybox(&["ping", "-c", "2", &GATEWAY.to_string()])?;
    println!("CH-USER: pinged");
    let found = busybox(&["nslookup", "host.test", "10.0.2.3"])?;
    if !found.contains(HOST) {
        return Err(format!("host.test: {found}").into());
    }
    println!("CH-USER: found the host");

    both_ways(TcpStream::connect((HOST, 8000))?, 1)?;
    println!("CH-USER: stream to the host");
    datagrams()?;
    println!("CH-USER: datagrams to the host");

    match TcpStream::connect((GATEWAY, PRIVATE)) {
        Ok(_) => return Err("the host's loopback is open".into()),
        Err(e) => println!("CH-USER: closed: {}", e.kind()),
    }
    both_ways(TcpStream::connect((OPEN_GATEWAY, PRIVATE))?, 2)?;
    println!("CH-USER: the other network is open");

    let listener = TcpListener::bind("0.0.0.0:22")?;
    let socket = UdpSocket::bind("0.0.0.0:53")?;
    println!("CH-USER: listening");
    let (stream, peer) = listener.accept()?;
    comes_from_the_gateway(peer)?;
    both_ways(stream, 3)?;
    println!("CH-USER: stream from the host");
    let mut buffer = vec![0; 1 << 16];
    let (count, peer) = socket.recv_from(&mut buffer)?;
    comes_from_the_gateway(peer)?;
    socket.send_to(&buffer[..count], peer)?;
    println!("CH-USER: datagram from the host");

    let stream = TcpStream::connect((HOST, 8000))?;
    println!("CH-USER: hold me");
    both_ways(stream, 4)?;
    println!("CH-USER: went on");
    Ok(())
}

fn main() {
    if let Err(e) = run() {
        println!("CH-USER: failed: {e}");
        std::process::exit(1);
    }
}

//! How fast TCP goes through the network, host to guest and guest to host, in MB/s: `cargo run --release -p user_net --example
//! throughput [MIB]`. The guest is a stack in this process on a thread of its own, so it needs a core as a guest would.

use std::error::Error;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::num::NonZeroUsize;
use std::os::fd::AsRawFd;
use std::thread;
use std::time::Instant;

use smoltcp::iface::{Config, Interface, SocketSet};
use smoltcp::phy::{
    Checksum, Device, DeviceCapabilities, Medium, PacketMeta, RxToken, SegmentationCapabilities,
    TxToken,
};
use smoltcp::socket::tcp::{Socket, SocketBuffer};
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpCidr};
use user_net::{UserNet, UserNetConfig};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

const HEADER: usize = 12;
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);

fn main() -> Result<(), Box<dyn Error>> {
    let mib: usize = match std::env::args().nth(1) {
        Some(text) => text.parse()?,
        None => 512,
    };
    for offloads in [false, true] {
        for to_guest in [true, false] {
            let speed = measure(mib << 20, offloads, to_guest)?;
            println!(
                "{}, {}: {speed:.0} MB/s",
                if to_guest {
                    "host to guest"
                } else {
                    "guest to host"
                },
                if offloads {
                    "segments of 64 KiB"
                } else {
                    "1500 bytes"
                },
            );
        }
    }
    Ok(())
}

fn measure(bytes: usize, offloads: bool, to_guest: bool) -> Result<f64, Box<dyn Error>> {
    let config = UserNetConfig {
        host_loopback: true,
        ..UserNetConfig::default()
    };
    let (network, device) = UserNet::new(&config)?;
    network.offloads().set(offloads, offloads);
    let thread = thread::spawn(|| network.run());
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let port = listener.local_addr()?.port();
    let server = thread::spawn(move || -> std::io::Result<()> {
        let (mut stream, _) = listener.accept()?;
        let mut block = vec![0x5a; 256 << 10];
        let mut done = 0;
        while done < bytes {
            done += if to_guest {
                stream.write(&block)?
            } else {
                stream.read(&mut block)?
            };
        }
        Ok(())
    });

    let epoll = Epoll::new()?;
    let readable = EpollEvent::new(EventSet::IN, 0);
    epoll.ctl(ControlOperation::Add, device.as_raw_fd(), readable)?;
    let mut wire = Wire {
        file: File::from(device),
        offloads,
        waiting: None,
        buffer: vec![0; 66_000],
    };
    let started = Instant::now();
    let now = || smoltcp::time::Instant::from_micros(started.elapsed().as_micros() as i64);
    let hardware = HardwareAddress::Ethernet(EthernetAddress([2, 0, 0, 0, 0, 1]));
    let mut interface = Interface::new(Config::new(hardware), &mut wire, now());
    let address = IpCidr::new(Ipv4Addr::new(10, 0, 2, 15).into(), 24);
    interface.update_ip_addrs(|all| all.extend([address]));
    let buffer = || SocketBuffer::new(vec![0; 1 << 20]);
    let mut socket = Socket::new(buffer(), buffer());
    socket.set_ack_delay(None);
    socket.connect(interface.context(), (GATEWAY, port), 40_000)?;
    let mut sockets = SocketSet::new(Vec::new());
    let handle = sockets.add(socket);
    let block = vec![0x5a; 256 << 10];
    let mut done = 0;
    while done < bytes {
        interface.poll(now(), &mut wire, &mut sockets);
        let socket = sockets.get_mut::<Socket<'_>>(handle);
        let mut moved = 0;
        while to_guest && socket.can_recv() {
            moved += socket.recv(|b| (b.len(), b.len()))?;
        }
        if !to_guest && socket.can_send() {
            moved = socket.send_slice(&block[..block.len().min(bytes - done)])?;
        }
        done += moved;
        if moved == 0 {
            let _ = epoll.wait(10, &mut [EpollEvent::default()]);
        }
    }
    while !to_guest && sockets.get::<Socket<'_>>(handle).send_queue() > 0 {
        interface.poll(now(), &mut wire, &mut sockets);
        let _ = epoll.wait(1, &mut [EpollEvent::default()]);
    }
    let speed = done as f64 / started.elapsed().as_secs_f64() / 1e6;
    drop(wire);
    let _ = (server.join(), thread.join());
    Ok(speed)
}

/// The device's end.
struct Wire {
    file: File,
    offloads: bool,
    waiting: Option<Vec<u8>>,
    buffer: Vec<u8>,
}

impl Wire {
    fn send(&mut self, message: Vec<u8>) {
        if let Err(e) = self.file.write(&message)
            && e.kind() == ErrorKind::WouldBlock
        {
            self.waiting = Some(message);
        }
    }
}

impl Device for Wire {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sent<'a>;

    fn receive(&mut self, _now: smoltcp::time::Instant) -> Option<(Received, Sent<'_>)> {
        let len = self.file.read(&mut self.buffer).ok()?;
        let frame = self.buffer.get(HEADER..len)?.to_vec();
        Some((Received(frame), Sent(self, None)))
    }

    fn transmit(&mut self, _now: smoltcp::time::Instant) -> Option<Sent<'_>> {
        if let Some(message) = self.waiting.take() {
            self.send(message);
        }
        self.waiting.is_none().then_some(Sent(self, None))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut all = DeviceCapabilities::default();
        all.medium = Medium::Ethernet;
        all.max_transmission_unit = 1514;
        if self.offloads {
            all.checksum.tcp = Checksum::None;
        }
        let mut segmentation = SegmentationCapabilities::default();
        segmentation.tcpv4 = NonZeroUsize::new(65_535).filter(|_| self.offloads);
        all.segmentation = segmentation;
        all
    }
}

struct Received(Vec<u8>);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

struct Sent<'a>(&'a mut Wire, Option<u16>);

impl TxToken for Sent<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut message = vec![0; HEADER + len];
        let result = f(&mut message[HEADER..]);
        // Whether it is TCP or not: of ARP nobody looks at the checksum.
        message[0] = u8::from(self.0.offloads);
        message[1] = u8::from(self.1.is_some());
        self.0.send(message);
        result
    }

    fn set_meta(&mut self, meta: PacketMeta) {
        self.1 = meta.segmentation_offload_size.map(|size| size.get());
    }
}

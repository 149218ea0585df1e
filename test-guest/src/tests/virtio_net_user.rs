//! The network that is in the VMM (`--net user`): the gateway answers ARP, DHCP gives the address that it always gives, and what the
//! host sends to a forwarded port arrives.
//!
//! After `READY virtio_net_user` datagrams to port 7 are sent back, until one begins with `end`.

use super::{at_cpl3, ensure, same};
use crate::clock::within;
use crate::ipv4::{ETHERNET, IP, PROTOCOL_UDP, TYPE_ARP, TYPE_IPV4, UDP, put, put_headers};
use crate::map::{read, write};
use crate::outcome::Outcome;
use crate::virtio::net::{F_MAC, F_MRG_RXBUF, HEADER, Net, Setup};
use crate::virtio::{F_VERSION_1, PATIENCE, wait_for};
use crate::{dma, line};

const GATEWAY: [u8; 4] = [10, 0, 2, 2];
const GUEST: [u8; 4] = [10, 0, 2, 15];
const NOBODY: [u8; 4] = [0; 4];
const EVERYBODY: [u8; 4] = [255; 4];
const EVERY_STATION: [u8; 6] = [255; 6];
/// Room for a frame.
const ROOM: u64 = 2048;
/// Ports of DHCP servers and clients (RFC 2131).
const DHCP: [u16; 2] = [67, 68];
/// Bytes of a DHCP message up to its options, with the cookie.
const BOOTP: u64 = 240;
/// Where the address that is given stands in it.
const YOURS: u64 = 16;
const ECHO_PORT: u16 = 7;

/// A device, and room for a frame in each direction.
struct Link {
    net: Net,
    out: u64,
    room: u64,
}

impl Link {
    fn open() -> Outcome<Self> {
        dma::reset();
        let mut net = Net::open(Setup {
            features: F_VERSION_1 | F_MAC | F_MRG_RXBUF,
            pairs: 1,
            size: 64,
        })?;
        net.refill(0)?;
        let (out, room) = (dma::take(HEADER + ROOM, 64)?, dma::take(ROOM, 64)?);
        Ok(Self { net, out, room })
    }

    /// Where the next frame is composed.
    fn frame(&self) -> u64 {
        self.out + HEADER
    }

    /// Sends what was composed up to `end`.
    fn send(&mut self, end: u64) -> Outcome {
        ensure("room to send", self.net.send(0, self.out, end - self.out)?)?;
        self.net.transmitter(0)?.kick();
        wait_for(self.net.transmitter(0)?, false)?;
        Ok(())
    }

    /// The next frame's length; it is at `room`.
    fn receive(&mut self) -> Outcome<u64> {
        ensure("a frame comes", within(PATIENCE, || self.net.has_packet()))?;
        self.try_receive().map(|length| length.unwrap_or(0))
    }

    fn try_receive(&mut self) -> Outcome<Option<u64>> {
        let packet = self.net.take_into(0, self.room, ROOM)?;
        Ok(packet.map(|(length, _)| length))
    }

    /// The frame is a datagram to that port of ours.
    fn is_datagram(&self, length: u64, port: u16) -> bool {
        let ip = self.room + ETHERNET;
        length >= ETHERNET + IP + UDP
            && read::<[u8; 2]>(self.room + 12) == TYPE_IPV4
            && read::<u8>(ip + 9) == PROTOCOL_UDP
            && read::<[u8; 2]>(ip + IP + 2) == port.to_be_bytes()
    }
}

/// Address resolution, an address, and datagrams until the host has had enough.
pub fn user() -> Outcome {
    at_cpl3(|| {
        let mut link = Link::open()?;
        let gateway = resolve(&mut link)?;
        ensure("the gateway is a station", gateway[0] & 1 == 0)?;
        discover(&mut link)?;
        line!("READY virtio_net_user");
        echo(&mut link)
    })
}

/// Asks who has the gateway's address (RFC 826).
fn resolve(link: &mut Link) -> Outcome<[u8; 6]> {
    let mac = link.net.mac();
    let at = put(put(put(link.frame(), &EVERY_STATION), &mac), &TYPE_ARP);
    // Ethernet, IPv4, their lengths, a question.
    let at = put(at, &[0, 1, 8, 0, 6, 4, 0, 1]);
    let at = put(put(put(at, &mac), &GUEST), &[0; 6]);
    let end = put(at, &GATEWAY);
    link.send(end)?;
    loop {
        let length = link.receive()?;
        let arp = link.room + ETHERNET;
        if length >= ETHERNET + 28
            && read::<[u8; 2]>(link.room + 12) == TYPE_ARP
            && read::<[u8; 2]>(arp + 6) == [0, 2]
        {
            ensure("the gateway answers", read::<[u8; 4]>(arp + 14) == GATEWAY)?;
            return Ok(read(arp + 8));
        }
    }
}

/// Asks for an address (RFC 2131), and is offered the one.
fn discover(link: &mut Link) -> Outcome {
    let options = [0x63, 0x82, 0x53, 0x63, 53, 1, 1, 255];
    let data = BOOTP - 4 + options.len() as u64;
    let macs = [EVERY_STATION, link.net.mac()];
    let addresses = [EVERYBODY, NOBODY];
    let at = put_headers(link.frame(), macs, addresses, DHCP, data, 0);
    dma::fill(at, data, 0);
    // A request over Ethernet, with a number, by one who can only hear what is for everybody.
    put(at, &[1, 1, 6, 0, 7, 7, 7, 7, 0, 0, 0x80, 0]);
    put(at + 28, &link.net.mac());
    let end = put(at + BOOTP - 4, &options);
    link.send(end)?;
    loop {
        let length = link.receive()?;
        let answer = link.room + ETHERNET + IP + UDP;
        if link.is_datagram(length, DHCP[1]) && length >= ETHERNET + IP + UDP + BOOTP {
            ensure("an answer to that", read::<[u8; 4]>(answer + 4) == [7; 4])?;
            let offered: [u8; 4] = read(answer + YOURS);
            return ensure("the address", offered == GUEST);
        }
    }
}

/// Answers who asks for our address, and sends datagrams back.
fn echo(link: &mut Link) -> Outcome {
    loop {
        let Some(length) = link.try_receive()? else {
            core::hint::spin_loop();
            continue;
        };
        let (frame, mac) = (link.room, link.net.mac());
        if length >= ETHERNET + 28 && read::<[u8; 2]>(frame + 12) == TYPE_ARP {
            answer(link, mac)?;
        } else if link.is_datagram(length, ECHO_PORT) {
            let ip = frame + ETHERNET;
            let size = u64::from(u16::from_be_bytes(read(ip + IP + 4)));
            ensure(
                "a whole datagram",
                UDP <= size && ETHERNET + IP + size <= length,
            )?;
            let from: [u8; 4] = read(ip + 12);
            let port = u16::from_be_bytes(read(ip + IP));
            let macs = [read(frame + 6), mac];
            let out = link.frame();
            let out = put_headers(out, macs, [from, GUEST], [port, ECHO_PORT], size - UDP, 0);
            for i in 0..size - UDP {
                write(out + i, read::<u8>(ip + IP + UDP + i));
            }
            link.send(out + size - UDP)?;
            if size - UDP >= 3 && read::<[u8; 3]>(ip + IP + UDP) == *b"end" {
                return same("the client is the gateway", u64::from(from == GATEWAY), 1);
            }
        }
    }
}

/// Says that our address is ours.
fn answer(link: &mut Link, mac: [u8; 6]) -> Outcome {
    let arp = link.room + ETHERNET;
    if read::<[u8; 2]>(arp + 6) != [0, 1] || read::<[u8; 4]>(arp + 24) != GUEST {
        return Ok(());
    }
    let (asker, its): ([u8; 6], [u8; 4]) = (read(arp + 8), read(arp + 14));
    let at = put(put(put(link.frame(), &asker), &mac), &TYPE_ARP);
    let at = put(at, &[0, 1, 8, 0, 6, 4, 0, 2]);
    let at = put(put(put(at, &mac), &GUEST), &asker);
    let end = put(at, &its);
    link.send(end)
}

//! UDP datagrams longer than the MTU (virtio 1.2 §5.1.6): one goes out as a single packet that whoever sends it further cuts into
//! fragments (`VIRTIO_NET_HDR_GSO_UDP`), and the host sends it back, as a single packet or in fragments.
//!
//! The datagram: [`DATA`] bytes, number `i` of which is [`content`], from 192.168.249.2 port 5003 to 192.168.249.1 port 5002.
//! `READY virtio_net_ufo` says that the host is to type a byte when it listens.

use super::{at_cpl3, ensure, same};
use crate::clock::within;
use crate::ipv4::{ETHERNET, IP, PROTOCOL_UDP, TYPE_IPV4, UDP, ones_sum, put_headers, words};
use crate::map::{read, write};
use crate::outcome::Outcome;
use crate::virtio::net::{
    F_CSUM, F_GUEST_CSUM, F_GUEST_UFO, F_HOST_UFO, F_MAC, F_MRG_RXBUF, HEADER, Net, Setup,
};
use crate::virtio::{F_VERSION_1, PATIENCE, wait_for};
use crate::{dma, line, serial};

/// Bytes of the datagram.
const DATA: u64 = 20_000;
/// What one fragment carries at the MTU of 1500.
const FRAGMENT: u16 = 1480;

const HOST: [u8; 4] = [192, 168, 249, 1];
const GUEST: [u8; 4] = [192, 168, 249, 2];
/// The test gives it to the host's end.
const HOST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// Flag of a packet header: a checksum is to be completed.
const NEEDS_CSUM: u8 = 1;
/// Kind of a packet: a datagram to be cut into fragments.
const GSO_UDP: u8 = 3;

/// A datagram goes out as one packet and comes back.
pub fn ufo() -> Outcome {
    at_cpl3(|| {
        line!("READY virtio_net_ufo");
        let typed = within(PATIENCE, || serial::poll().is_some());
        ensure("the peer listens", typed)?;
        dma::reset();
        let wanted = F_CSUM | F_GUEST_CSUM | F_HOST_UFO | F_GUEST_UFO;
        let mut net = Net::open(Setup {
            features: F_VERSION_1 | F_MAC | F_MRG_RXBUF | wanted,
            pairs: 1,
            size: 64,
        })?;
        same("offloads", net.features & wanted, wanted)?;
        net.refill(0)?;
        let at = compose(&net)?;
        let length = HEADER + ETHERNET + IP + UDP + DATA;
        ensure("room to send", net.send(0, at, length)?)?;
        net.transmitter(0)?.kick();
        let parts = await_datagram(&mut net)?;
        line!("VALUE net_ufo_parts {parts}");
        wait_for(net.transmitter(0)?, false)?;
        Ok(())
    })
}

/// Byte number `i` of what the datagram carries.
fn content(i: u64) -> u8 {
    ((i * 7) >> (i & 3)) as u8
}

/// Writes the whole datagram as one packet; where it is.
fn compose(net: &Net) -> Outcome<u64> {
    let at = dma::take(HEADER + ETHERNET + IP + UDP + DATA, 64)?;
    let start = ETHERNET + IP;
    write(at, NEEDS_CSUM);
    write(at + 1, GSO_UDP);
    write(at + 2, (start + UDP) as u16);
    write(at + 4, FRAGMENT);
    write(at + 6, start as u16);
    write(at + 8, 6u16);
    // Of the pseudo-header; the device adds the rest.
    let begun = words(&GUEST)
        .chain(words(&HOST))
        .chain([u16::from(PROTOCOL_UDP), (UDP + DATA) as u16]);
    let sum = ones_sum(begun);
    let macs = [HOST_MAC, net.mac()];
    let data = put_headers(at + HEADER, macs, [HOST, GUEST], [5002, 5003], DATA, sum);
    for i in 0..DATA {
        write(data + i, content(i));
    }
    Ok(at)
}

/// Waits until all of the datagram has come back, and checks it; the packets that it came in.
fn await_datagram(net: &mut Net) -> Outcome<u64> {
    let room = dma::take(ETHERNET + IP + UDP + DATA, 64)?;
    let whole = dma::take(UDP + DATA, 64)?;
    let (mut got, mut parts) = (0, 0);
    while got < UDP + DATA {
        ensure(
            "the datagram comes back",
            within(PATIENCE, || net.has_packet()),
        )?;
        let packet = net.take_into(0, room, ETHERNET + IP + UDP + DATA)?;
        let ip = room + ETHERNET;
        // The host has words of its own to say.
        let Some((length, _)) = packet.filter(|(length, _)| *length >= ETHERNET + IP) else {
            continue;
        };
        if read::<[u8; 2]>(room + 12) != TYPE_IPV4
            || read::<[u8; 4]>(ip + 12) != HOST
            || read::<u8>(ip + 9) != PROTOCOL_UDP
        {
            continue;
        }
        let carried = u64::from(u16::from_be_bytes(read(ip + 2))).saturating_sub(IP);
        let offset = 8 * u64::from(u16::from_be_bytes(read(ip + 6)) & 0x1fff);
        ensure("a fragment of the datagram", offset + carried <= UDP + DATA)?;
        ensure(
            "the length of a fragment",
            ETHERNET + IP + carried <= length,
        )?;
        for i in 0..carried {
            write(whole + offset + i, read::<u8>(ip + IP + i));
        }
        got += carried;
        parts += 1;
    }
    same("its bytes", got, UDP + DATA)?;
    let length = u16::from_be_bytes(read(whole + 4));
    same("its length", u64::from(length), UDP + DATA)?;
    ensure(
        "its bytes are those that were sent",
        (0..DATA).all(|i| read::<u8>(whole + UDP + i) == content(i)),
    )?;
    Ok(parts)
}

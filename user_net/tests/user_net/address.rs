//! How the guest comes by its address, and whose address is answered for.

use std::net::Ipv4Addr;

use smoltcp::socket::dhcpv4;
use smoltcp::wire::{ArpOperation, ArpPacket, ArpRepr, EthernetAddress};

use crate::guest::{ADDRESS, DNS, GATEWAY, Guest, MAC, config};

#[test]
fn dhcp_gives_the_address() {
    let mut guest = Guest::without_address(&config(), false);
    let handle = guest.sockets.add(dhcpv4::Socket::new());
    let mut given = None;
    guest.until("a lease", |guest| {
        let socket = guest.sockets.get_mut::<dhcpv4::Socket<'_>>(handle);
        if let Some(dhcpv4::Event::Configured(config)) = socket.poll() {
            given = Some((config.address, config.router, config.dns_servers.to_vec()));
        }
        given.is_some()
    });
    let (address, router, dns) = given.unwrap();
    assert_eq!((address.address(), address.prefix_len()), (ADDRESS, 24));
    assert_eq!(router, Some(GATEWAY));
    assert_eq!(dns, [DNS]);
    guest.end();
}

fn ask(guest: &mut Guest, sender: Ipv4Addr, target: Ipv4Addr) {
    let question = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Request,
        source_hardware_addr: EthernetAddress(MAC),
        source_protocol_addr: sender,
        target_hardware_addr: EthernetAddress([0; 6]),
        target_protocol_addr: target,
    };
    let mut message = vec![0; 12 + 14 + question.buffer_len()];
    message[12..18].fill(0xff);
    message[18..24].copy_from_slice(&MAC);
    message[24..26].copy_from_slice(&[8, 6]);
    question.emit(&mut ArpPacket::new_unchecked(&mut message[26..]));
    guest.wire.send(message);
}

#[test]
fn only_gateway_and_dns_server_answer_arp() {
    let mut guest = Guest::without_address(&config(), false);
    // The guest's own address is not answered for, else it would find it taken; nor is another.
    ask(&mut guest, Ipv4Addr::UNSPECIFIED, ADDRESS);
    ask(&mut guest, ADDRESS, ADDRESS);
    ask(&mut guest, ADDRESS, Ipv4Addr::new(10, 0, 2, 77));
    for address in [DNS, GATEWAY] {
        ask(&mut guest, ADDRESS, address);
        let mut frame = None;
        while frame.is_none() {
            guest.wire.wait(20);
            frame = guest.wire.receive_frame();
        }
        let frame = frame.unwrap();
        let packet = ArpPacket::new_checked(&frame[14..]).unwrap();
        let ArpRepr::EthernetIpv4 {
            operation,
            source_protocol_addr,
            target_hardware_addr,
            ..
        } = ArpRepr::parse(&packet).unwrap()
        else {
            panic!("{packet}");
        };
        assert_eq!(operation, ArpOperation::Reply);
        assert_eq!(source_protocol_addr, address);
        assert_eq!(target_hardware_addr, EthernetAddress(MAC));
    }
}

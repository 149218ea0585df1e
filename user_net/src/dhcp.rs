//! The DHCP server (RFC 2131): one lease, for whoever asks.

use std::net::Ipv4Addr;

use smoltcp::wire::{
    DHCP_CLIENT_PORT, DhcpMessageType, DhcpOption, DhcpPacket, DhcpRepr, EthernetAddress,
};

use crate::config::Network;

/// Seconds of a lease. Nobody else ever gets the address, so it only says how often the guest asks again.
const LEASE: u32 = 24 * 60 * 60;
/// The option with the MTU (RFC 2132 §5.1).
const OPTION_MTU: u8 = 26;
/// The shortest answer that every client takes (BOOTP, RFC 1542 §2.1).
const MIN_LEN: usize = 300;

/// An answer, and to whom it goes.
#[derive(Debug)]
pub struct Answer {
    pub mac: EthernetAddress,
    pub address: Ipv4Addr,
    pub port: u16,
    pub message: Vec<u8>,
}

/// Answers a client's message; None if it wants no answer, or makes no sense.
pub fn answer(network: Network, mtu: u16, message: &[u8]) -> Option<Answer> {
    let packet = DhcpPacket::new_checked(message).ok()?;
    let asked = DhcpRepr::parse(&packet).ok()?;
    if !asked.client_hardware_address.is_unicast() {
        return None;
    }
    let (server, guest) = (network.gateway(), network.guest());
    let kind = match asked.message_type {
        DhcpMessageType::Discover => DhcpMessageType::Offer,
        DhcpMessageType::Request => {
            if asked.server_identifier.is_some_and(|other| other != server) {
                // It has chosen another server.
                return None;
            }
            // When it renews, the address is in the header (RFC 2131 §4.3.2).
            if asked.requested_ip.unwrap_or(asked.client_ip) == guest {
                DhcpMessageType::Ack
            } else {
                DhcpMessageType::Nak
            }
        }
        DhcpMessageType::Inform => DhcpMessageType::Ack,
        // A release or a refusal changes nothing: the address stays the guest's.
        _ => return None,
    };
    let refused = kind == DhcpMessageType::Nak;
    let inform = asked.message_type == DhcpMessageType::Inform;
    let mtu = mtu.to_be_bytes();
    let options = [DhcpOption {
        kind: OPTION_MTU,
        data: &mtu,
    }];
    let lease = !refused && !inform;
    let reply = DhcpRepr {
        message_type: kind,
        transaction_id: asked.transaction_id,
        secs: 0,
        client_hardware_address: asked.client_hardware_address,
        client_ip: if inform {
            asked.client_ip
        } else {
            Ipv4Addr::UNSPECIFIED
        },
        your_ip: if lease { guest } else { Ipv4Addr::UNSPECIFIED },
        server_ip: Ipv4Addr::UNSPECIFIED,
        router: (!refused).then_some(server),
        subnet_mask: (!refused).then_some(network.mask()),
        relay_agent_ip: Ipv4Addr::UNSPECIFIED,
        broadcast: asked.broadcast,
        requested_ip: None,
        client_identifier: None,
        server_identifier: Some(server),
        parameter_request_list: None,
        dns_servers: (!refused).then(|| [network.dns()].into_iter().collect()),
        max_size: None,
        lease_duration: lease.then_some(LEASE),
        renew_duration: None,
        rebind_duration: None,
        additional_options: if refused { &[] } else { &options },
    };
    let mut bytes = vec![0; reply.buffer_len().max(MIN_LEN)];
    reply
        .emit(&mut DhcpPacket::new_unchecked(&mut bytes[..]))
        .ok()?;
    // RFC 2131 §4.1: to the address that it has, else to everybody if it says so, else to the one that it is given.
    let everybody = (EthernetAddress::BROADCAST, Ipv4Addr::BROADCAST);
    let (mac, address) = if refused {
        everybody
    } else if !asked.client_ip.is_unspecified() {
        (asked.client_hardware_address, asked.client_ip)
    } else if asked.broadcast {
        everybody
    } else {
        (asked.client_hardware_address, guest)
    };
    Some(Answer {
        mac,
        address,
        port: DHCP_CLIENT_PORT,
        message: bytes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: EthernetAddress = EthernetAddress([2, 0, 0, 0, 0, 1]);

    fn request(kind: DhcpMessageType) -> DhcpRepr<'static> {
        DhcpRepr {
            message_type: kind,
            transaction_id: 0x1234_5678,
            secs: 0,
            client_hardware_address: MAC,
            client_ip: Ipv4Addr::UNSPECIFIED,
            your_ip: Ipv4Addr::UNSPECIFIED,
            server_ip: Ipv4Addr::UNSPECIFIED,
            router: None,
            subnet_mask: None,
            relay_agent_ip: Ipv4Addr::UNSPECIFIED,
            broadcast: false,
            requested_ip: None,
            client_identifier: None,
            server_identifier: None,
            parameter_request_list: None,
            dns_servers: None,
            max_size: None,
            lease_duration: None,
            renew_duration: None,
            rebind_duration: None,
            additional_options: &[],
        }
    }

    fn ask(request: &DhcpRepr<'_>) -> Option<Answer> {
        let mut bytes = vec![0; request.buffer_len()];
        request
            .emit(&mut DhcpPacket::new_unchecked(&mut bytes[..]))
            .unwrap();
        answer(Network::default(), 1400, &bytes)
    }

    fn kind(answer: &Answer) -> DhcpMessageType {
        let packet = DhcpPacket::new_checked(&answer.message[..]).unwrap();
        DhcpRepr::parse(&packet).unwrap().message_type
    }

    #[test]
    fn an_offer_has_all_that_a_guest_needs() {
        let answer = ask(&request(DhcpMessageType::Discover)).unwrap();
        assert_eq!(
            (answer.mac, answer.address),
            (MAC, Ipv4Addr::new(10, 0, 2, 15))
        );
        let packet = DhcpPacket::new_checked(&answer.message[..]).unwrap();
        let mtu = packet.options().find(|option| option.kind == OPTION_MTU);
        assert_eq!(mtu.unwrap().data, 1400u16.to_be_bytes());
        let offer = DhcpRepr::parse(&packet).unwrap();
        assert_eq!(offer.message_type, DhcpMessageType::Offer);
        assert_eq!(offer.transaction_id, 0x1234_5678);
        assert_eq!(offer.your_ip, Ipv4Addr::new(10, 0, 2, 15));
        assert_eq!(offer.router, Some(Ipv4Addr::new(10, 0, 2, 2)));
        assert_eq!(offer.subnet_mask, Some(Ipv4Addr::new(255, 255, 255, 0)));
        assert_eq!(offer.dns_servers.unwrap()[..], [Ipv4Addr::new(10, 0, 2, 3)]);
        assert_eq!(offer.lease_duration, Some(LEASE));
    }

    #[test]
    fn only_the_guests_address_is_acknowledged() {
        let mut asked = request(DhcpMessageType::Request);
        asked.requested_ip = Some(Ipv4Addr::new(10, 0, 2, 15));
        assert_eq!(kind(&ask(&asked).unwrap()), DhcpMessageType::Ack);
        asked.requested_ip = Some(Ipv4Addr::new(10, 0, 2, 16));
        let refused = ask(&asked).unwrap();
        assert_eq!(kind(&refused), DhcpMessageType::Nak);
        assert_eq!(refused.address, Ipv4Addr::BROADCAST);
        // A renewal.
        asked.requested_ip = None;
        asked.client_ip = Ipv4Addr::new(10, 0, 2, 15);
        assert_eq!(kind(&ask(&asked).unwrap()), DhcpMessageType::Ack);
        // Another server was chosen.
        asked.server_identifier = Some(Ipv4Addr::new(10, 0, 2, 9));
        assert!(ask(&asked).is_none());
    }

    #[test]
    fn inform_gives_parameters_and_no_address_and_a_release_is_not_answered() {
        let mut asked = request(DhcpMessageType::Inform);
        asked.client_ip = Ipv4Addr::new(10, 0, 2, 15);
        let answer = ask(&asked).unwrap();
        let packet = DhcpPacket::new_checked(&answer.message[..]).unwrap();
        let told = DhcpRepr::parse(&packet).unwrap();
        assert_eq!(told.message_type, DhcpMessageType::Ack);
        assert_eq!(
            (told.your_ip, told.lease_duration),
            (Ipv4Addr::UNSPECIFIED, None)
        );
        assert!(told.router.is_some());
        assert!(ask(&request(DhcpMessageType::Release)).is_none());
        assert!(ask(&request(DhcpMessageType::Decline)).is_none());
        // What a server says is no question.
        assert!(ask(&request(DhcpMessageType::Offer)).is_none());
    }
}

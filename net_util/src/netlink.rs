//! Addresses of interfaces by route netlink (rtnetlink(7)): IPv4 and IPv6 alike.

use std::convert::Infallible;
use std::io;
use std::net::IpAddr;

use netlink_packet_core::{
    Emitable, NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkDeserializable,
    NetlinkHeader, NetlinkMessage, NetlinkPayload, NetlinkSerializable,
};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{
    AddressAttribute, AddressHeader, AddressMessage, AddressScope,
};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

/// RTM_NEWADDR of linux/rtnetlink.h.
const NEW_ADDRESS: u16 = 20;

/// The one message that is sent here. What comes back is the kernel's yes or no, which has no message in it.
struct NewAddress(AddressMessage);

impl NetlinkSerializable for NewAddress {
    fn message_type(&self) -> u16 {
        NEW_ADDRESS
    }

    fn buffer_len(&self) -> usize {
        self.0.buffer_len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        self.0.emit(buffer);
    }
}

impl NetlinkDeserializable for NewAddress {
    type Error = Infallible;

    fn deserialize(_header: &NetlinkHeader, _payload: &[u8]) -> Result<Self, Infallible> {
        Ok(Self(AddressMessage::default()))
    }
}

/// Gives interface number `index` an address with a network of `prefix` bits, beside those that it has. It may have it already.
pub(crate) fn add_address(index: u32, address: IpAddr, prefix: u8) -> io::Result<()> {
    let mut message = AddressMessage::default();
    message.header = AddressHeader {
        family: match address {
            IpAddr::V4(_) => AddressFamily::Inet,
            IpAddr::V6(_) => AddressFamily::Inet6,
        },
        prefix_len: prefix,
        scope: AddressScope::Universe,
        index,
        ..AddressHeader::default()
    };
    message.attributes = vec![
        AddressAttribute::Local(address),
        AddressAttribute::Address(address),
    ];
    if let IpAddr::V4(address) = address
        && prefix < 31
    {
        let host = u32::MAX.checked_shr(prefix.into()).unwrap_or(0);
        let broadcast = (u32::from(address) | host).into();
        message
            .attributes
            .push(AddressAttribute::Broadcast(broadcast));
    }
    ask(message)
}

/// Sends a request and waits for the kernel's answer, which it gives before `send` returns.
fn ask(message: AddressMessage) -> io::Result<()> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_CREATE | NLM_F_REPLACE | NLM_F_ACK;
    let mut request =
        NetlinkMessage::new(header, NetlinkPayload::InnerMessage(NewAddress(message)));
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    socket.send(&bytes, 0)?;
    let (answer, _) = socket.recv_from_full()?;
    let answer = NetlinkMessage::<NewAddress>::deserialize(&answer)
        .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
    match answer.payload {
        NetlinkPayload::Error(error) if error.code.is_some() => Err(error.to_io()),
        _ => Ok(()),
    }
}

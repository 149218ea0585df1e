//! The control queue (virtio 1.2 §5.1.6.5): what the driver asks besides moving packets.

use net_util::MacAddr;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, VIRTIO_NET_CTRL_MAC,
    VIRTIO_NET_CTRL_MAC_ADDR_SET, VIRTIO_NET_CTRL_MAC_TABLE_SET, VIRTIO_NET_CTRL_MQ,
    VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_ALLMULTI,
    VIRTIO_NET_CTRL_RX_PROMISC, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};

use log::debug;
use vm_memory::GuestMemory;
use vm_virtio::{Chain, Fault, Outcome, Reader};

use super::config::{CTRL_GUEST_OFFLOADS, CTRL_MAC_ADDR, CTRL_RX, MQ, guest_offloads};
use super::shared::Shared;

/// Bytes of an address.
const MAC_LEN: usize = 6;

/// What a driver can ask.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Command {
    /// Which packets it wants. That is for less work of the driver's: the host's end gives all, and others may come (§5.1.6.5.1).
    Filter,
    /// It has another address.
    Mac(MacAddr),
    /// It uses so many pairs.
    Pairs(u16),
    /// It has only these offloads.
    Offloads(u64),
}

impl Command {
    /// The command, from class, number and data. None if there is none such, not with `features` anyway.
    fn parse<M: GuestMemory>(
        reader: &mut Reader<'_, M>,
        features: u64,
        pairs: u16,
    ) -> Result<Option<Self>, Fault> {
        let [class, number] = bytes(reader)?;
        let has = |feature| features & feature != 0;
        let left = reader.left();
        Ok(match (u32::from(class), u32::from(number)) {
            (VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_PROMISC | VIRTIO_NET_CTRL_RX_ALLMULTI)
                if has(CTRL_RX) && left == 1 =>
            {
                Some(Self::Filter)
            }
            (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET) if has(CTRL_RX) => {
                // One for stations, one for groups.
                let tables = skip_table(reader)? && skip_table(reader)? && reader.left() == 0;
                tables.then_some(Self::Filter)
            }
            (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET)
                if has(CTRL_MAC_ADDR) && left == MAC_LEN =>
            {
                let mac = MacAddr::new(bytes(reader)?);
                (!mac.is_group()).then_some(Self::Mac(mac))
            }
            (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) if has(MQ) && left == 2 => {
                let wanted = u16::from_le_bytes(bytes(reader)?);
                (1..=pairs).contains(&wanted).then_some(Self::Pairs(wanted))
            }
            (VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET)
                if has(CTRL_GUEST_OFFLOADS) && left == 8 =>
            {
                let chosen = u64::from_le_bytes(bytes(reader)?);
                (chosen & !guest_offloads(features) == 0).then_some(Self::Offloads(chosen))
            }
            _ => None,
        })
    }

    /// Does it. Whether that went well.
    fn run(self, shared: &Shared) -> bool {
        let done = match self {
            Self::Filter => Ok(()),
            Self::Mac(mac) => {
                shared.set_mac(mac);
                Ok(())
            }
            Self::Pairs(pairs) => shared.set_pairs(pairs),
            Self::Offloads(chosen) => shared.set_offloads(chosen),
        };
        if let Err(error) = &done {
            debug!("{self:?} for network device {:?}: {error}", shared.id);
        }
        done.is_ok()
    }
}

fn bytes<const N: usize, M: GuestMemory>(reader: &mut Reader<'_, M>) -> Result<[u8; N], Fault> {
    let mut bytes = [0; N];
    reader.read(&mut bytes)?;
    Ok(bytes)
}

/// Passes a list of addresses. False if it is cut short.
fn skip_table<M: GuestMemory>(reader: &mut Reader<'_, M>) -> Result<bool, Fault> {
    if reader.left() < 4 {
        return Ok(false);
    }
    let entries = u32::from_le_bytes(bytes(reader)?);
    match (entries as usize).checked_mul(MAC_LEN) {
        Some(len) if len <= reader.left() => reader.skip(len).map(|()| true),
        _ => Ok(false),
    }
}

/// Does what `chain` asks, and answers it.
pub(super) fn answer<M: GuestMemory>(
    memory: &M,
    chain: &Chain,
    features: u64,
    shared: &Shared,
) -> Result<Outcome, Fault> {
    let mut writer = chain.writer(memory);
    if writer.left() == 0 {
        return Err(Fault::Request("a command has no room for its answer"));
    }
    let command = Command::parse(&mut chain.reader(memory), features, shared.facts.pairs)?;
    let ack = match command {
        Some(command) if command.run(shared) => VIRTIO_NET_OK,
        _ => VIRTIO_NET_ERR,
    };
    writer.write(&[ack as u8])?;
    Ok(Outcome::Used(1))
}

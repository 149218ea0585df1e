//! Features and the configuration space of a network device (virtio 1.2 §5.1.3, §5.1.4), and what they mean to the host's end.

use net_util::{MacAddr, Offloads};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};
use vm_virtio::feature::RING_FEATURES;

const CSUM: u64 = 1 << VIRTIO_NET_F_CSUM;
/// The driver takes packets without checksums.
pub(super) const GUEST_CSUM: u64 = 1 << VIRTIO_NET_F_GUEST_CSUM;
/// It chooses its offloads anew whenever it likes.
pub(super) const CTRL_GUEST_OFFLOADS: u64 = 1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS;
const MTU: u64 = 1 << VIRTIO_NET_F_MTU;
const MAC: u64 = 1 << VIRTIO_NET_F_MAC;
const GUEST_TSO4: u64 = 1 << VIRTIO_NET_F_GUEST_TSO4;
const GUEST_TSO6: u64 = 1 << VIRTIO_NET_F_GUEST_TSO6;
const GUEST_ECN: u64 = 1 << VIRTIO_NET_F_GUEST_ECN;
const GUEST_UFO: u64 = 1 << VIRTIO_NET_F_GUEST_UFO;
const HOST_TSO4: u64 = 1 << VIRTIO_NET_F_HOST_TSO4;
const HOST_TSO6: u64 = 1 << VIRTIO_NET_F_HOST_TSO6;
const HOST_ECN: u64 = 1 << VIRTIO_NET_F_HOST_ECN;
const HOST_UFO: u64 = 1 << VIRTIO_NET_F_HOST_UFO;
/// A packet may be received into several chains.
pub(super) const MRG_RXBUF: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const STATUS: u64 = 1 << VIRTIO_NET_F_STATUS;
/// There is a control queue.
pub(super) const CTRL_VQ: u64 = 1 << VIRTIO_NET_F_CTRL_VQ;
/// The driver says which packets it wants.
pub(super) const CTRL_RX: u64 = 1 << VIRTIO_NET_F_CTRL_RX;
/// There is more than one pair of queues.
pub(super) const MQ: u64 = 1 << VIRTIO_NET_F_MQ;
/// The driver chooses its address.
pub(super) const CTRL_MAC_ADDR: u64 = 1 << VIRTIO_NET_F_CTRL_MAC_ADDR;

/// What the driver takes, what it means to the host's end, and the feature of the other direction.
const SEGMENTS: [(u64, Offloads, u64); 4] = [
    (GUEST_TSO4, Offloads::TSO4, HOST_TSO4),
    (GUEST_TSO6, Offloads::TSO6, HOST_TSO6),
    (GUEST_ECN, Offloads::TSO_ECN, HOST_ECN),
    (GUEST_UFO, Offloads::UFO, HOST_UFO),
];

/// Features of the driver by which packets may be longer than the MTU.
const BIG: u64 = GUEST_TSO4 | GUEST_TSO6 | GUEST_UFO;

/// All that can come to a driver of this device.
pub(super) const OFFLOADS: Offloads = Offloads::CSUM
    .union(Offloads::TSO4)
    .union(Offloads::TSO6)
    .union(Offloads::TSO_ECN)
    .union(Offloads::UFO);

/// Bytes, up to the MTU.
pub(super) const SIZE: usize = 12;

/// What does not change.
#[derive(Clone, Copy, Debug)]
pub(super) struct Facts {
    /// What the host's end can leave to the driver.
    pub offloads: Offloads,
    pub mtu: Option<u16>,
    pub pairs: u16,
}

impl Facts {
    pub fn features(&self) -> u64 {
        let mut features = RING_FEATURES | MAC | STATUS | MRG_RXBUF;
        features |= CTRL_VQ | CTRL_RX | CTRL_MAC_ADDR;
        if self.offloads.contains(Offloads::CSUM) {
            features |= CSUM | GUEST_CSUM | CTRL_GUEST_OFFLOADS;
            for (guest, offload, host) in SEGMENTS {
                if self.offloads.contains(offload) {
                    features |= guest | host;
                }
            }
        }
        if self.mtu.is_some() {
            features |= MTU;
        }
        if self.pairs > 1 {
            features |= MQ;
        }
        features
    }

    /// The whole space.
    pub fn bytes(&self, mac: MacAddr, link_up: bool) -> [u8; SIZE] {
        let [a, b, c, d, e, f] = mac.bytes();
        let status = if link_up { VIRTIO_NET_S_LINK_UP } else { 0 };
        let [p0, p1] = self.pairs.to_le_bytes();
        let [m0, m1] = self.mtu.unwrap_or(0).to_le_bytes();
        [a, b, c, d, e, f, status as u8, 0, p0, p1, m0, m1]
    }

    /// The longest packet that a driver with `features` is to expect, with its header.
    pub fn longest_packet(&self, features: u64) -> usize {
        /// Ethernet with a VLAN tag.
        const ETHERNET: usize = 18;
        if features & BIG != 0 {
            net_util::MAX_PACKET_LEN
        } else {
            usize::from(self.mtu.unwrap_or(1500)) + ETHERNET + net_util::VNET_HEADER_LEN
        }
    }
}

/// Which of a driver's `features` are offloads that it may choose anew (§5.1.6.5.6.1).
pub(super) fn guest_offloads(features: u64) -> u64 {
    features & (GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | GUEST_UFO)
}

/// What the host's end may leave to a driver with `features`. Without checksums nothing (§5.1.3.1).
pub(super) fn host_offloads(features: u64) -> Offloads {
    if features & GUEST_CSUM == 0 {
        return Offloads::empty();
    }
    let mut offloads = Offloads::CSUM;
    for (guest, offload, _) in SEGMENTS {
        if features & guest != 0 {
            offloads |= offload;
        }
    }
    // ECN is of TCP's segments.
    if !offloads.intersects(Offloads::TSO4 | Offloads::TSO6) {
        offloads -= Offloads::TSO_ECN;
    }
    offloads
}

#[cfg(test)]
mod tests {
    use super::*;

    const FACTS: Facts = Facts {
        offloads: OFFLOADS,
        mtu: Some(9000),
        pairs: 4,
    };

    fn bits(bits: &[u32]) -> u64 {
        bits.iter().map(|bit| 1 << bit).sum()
    }

    #[test]
    fn every_field_is_told() {
        let mac = MacAddr::new([2, 1, 2, 3, 4, 5]);
        let bytes = FACTS.bytes(mac, true);
        assert_eq!(bytes, [2, 1, 2, 3, 4, 5, 1, 0, 4, 0, 0x28, 0x23]);
        assert_eq!(FACTS.bytes(mac, false)[6..8], [0, 0]);
    }

    #[test]
    fn features_are_what_the_host_has() {
        let always = RING_FEATURES | bits(&[5, 15, 16, 17, 18, 23]);
        let all = [0, 1, 2, 3, 7, 8, 9, 10, 11, 12, 13, 14, 22];
        assert_eq!(FACTS.features(), always | bits(&all));
        let mut facts = Facts {
            offloads: OFFLOADS - Offloads::UFO,
            mtu: None,
            pairs: 1,
        };
        let some = [0, 1, 2, 7, 8, 9, 11, 12, 13];
        assert_eq!(facts.features(), always | bits(&some));
        facts.offloads = Offloads::empty();
        assert_eq!(facts.features(), always);
    }

    #[test]
    fn offloads_are_what_the_driver_takes() {
        assert_eq!(host_offloads(bits(&[1, 7, 9])).bits(), 1 | 2 | 8);
        assert_eq!(host_offloads(bits(&[1, 8, 10])).bits(), 1 | 4 | 16);
        assert_eq!(host_offloads(bits(&[1, 9])), Offloads::CSUM);
        assert_eq!(host_offloads(bits(&[7, 8, 9, 10])), Offloads::empty());
        assert_eq!(guest_offloads(u64::MAX), bits(&[1, 7, 8, 9, 10]));
    }

    #[test]
    fn packets_are_as_long_as_the_features_allow() {
        assert_eq!(FACTS.longest_packet(bits(&[1, 7])), 65_565);
        assert_eq!(FACTS.longest_packet(bits(&[1])), 9030);
        let facts = Facts { mtu: None, ..FACTS };
        assert_eq!(facts.longest_packet(0), 1530);
    }
}

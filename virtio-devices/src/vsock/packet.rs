//! The header that every packet begins with (virtio 1.2 §5.10.6).

/// Bytes of a header.
pub const HEADER_LEN: usize = 44;
/// The host's context id (§5.10.4).
pub const HOST_CID: u64 = 2;
/// The type of packets of streams (§5.10.6).
pub const STREAM: u16 = 1;

/// What a packet is for (§5.10.6).
pub mod op {
    /// Asks for a connection.
    pub const REQUEST: u16 = 1;
    /// Grants one.
    pub const RESPONSE: u16 = 2;
    /// There is no such connection, or no more.
    pub const RST: u16 = 3;
    /// The sender is done with the halves that its flags tell.
    pub const SHUTDOWN: u16 = 4;
    /// Bytes.
    pub const RW: u16 = 5;
    /// Tells how much the sender can take.
    pub const CREDIT_UPDATE: u16 = 6;
    /// Asks for that.
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Flag of SHUTDOWN (§5.10.6.5): the sender takes no more bytes.
pub const NO_RECEIVE: u32 = 1;
/// Flag of SHUTDOWN (§5.10.6.5): the sender sends no more bytes.
pub const NO_SEND: u32 = 2;
/// Both.
pub const NOTHING: u32 = NO_RECEIVE | NO_SEND;

/// A packet's header. All fields are what the other side says.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Header {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    /// Bytes that follow.
    pub len: u32,
    /// [`STREAM`].
    pub kind: u16,
    /// One of [`op`].
    pub op: u16,
    pub flags: u32,
    /// Bytes that the sender holds for this stream.
    pub buf_alloc: u32,
    /// Bytes that left that buffer so far, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// Of the bytes in the guest's memory.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Self {
        let mut rest = bytes.as_slice();
        Self {
            src_cid: u64::from_le_bytes(take(&mut rest)),
            dst_cid: u64::from_le_bytes(take(&mut rest)),
            src_port: u32::from_le_bytes(take(&mut rest)),
            dst_port: u32::from_le_bytes(take(&mut rest)),
            len: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            op: u16::from_le_bytes(take(&mut rest)),
            flags: u32::from_le_bytes(take(&mut rest)),
            buf_alloc: u32::from_le_bytes(take(&mut rest)),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)),
        }
    }

    /// As it is in the guest's memory.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let mut rest = bytes.as_mut_slice();
        put(&mut rest, &self.src_cid.to_le_bytes());
        put(&mut rest, &self.dst_cid.to_le_bytes());
        put(&mut rest, &self.src_port.to_le_bytes());
        put(&mut rest, &self.dst_port.to_le_bytes());
        put(&mut rest, &self.len.to_le_bytes());
        put(&mut rest, &self.kind.to_le_bytes());
        put(&mut rest, &self.op.to_le_bytes());
        put(&mut rest, &self.flags.to_le_bytes());
        put(&mut rest, &self.buf_alloc.to_le_bytes());
        put(&mut rest, &self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// The refusal of it: to its sender, from where it was sent to.
    pub fn refusal(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: op::RST,
            ..Self::default()
        }
    }
}

/// The first bytes of `rest`, which has them.
fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    match rest.split_first_chunk() {
        Some((first, later)) => {
            *rest = later;
            *first
        }
        None => [0; N],
    }
}

/// Puts `bytes` at the start of `rest`, which has room.
fn put(rest: &mut &mut [u8], bytes: &[u8]) {
    if let Some((first, later)) = std::mem::take(rest).split_at_mut_checked(bytes.len()) {
        first.copy_from_slice(bytes);
        *rest = later;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn fields_are_where_the_specification_has_them() {
        let header = Header {
            src_cid: 2,
            dst_cid: 3,
            src_port: 4,
            dst_port: 5,
            len: 6,
            kind: 7,
            op: 8,
            flags: 9,
            buf_alloc: 10,
            fwd_cnt: 11,
        };
        let bytes = header.encode();
        let values = [
            (0, 2),
            (8, 3),
            (16, 4),
            (20, 5),
            (24, 6),
            (28, 7),
            (30, 8),
            (32, 9),
            (36, 10),
            (40, 11),
        ];
        for (at, byte) in bytes.iter().enumerate() {
            let wanted = values.iter().find(|v| v.0 == at).map_or(0, |v| v.1);
            assert_eq!(*byte, wanted, "byte {at}");
        }
        assert_eq!(Header::decode(&bytes), header);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_header(bytes in proptest::array::uniform32(any::<u8>()), tail in proptest::array::uniform12(any::<u8>())) {
            let mut all = [0; HEADER_LEN];
            all[..32].copy_from_slice(&bytes);
            all[32..].copy_from_slice(&tail);
            prop_assert_eq!(Header::decode(&all).encode(), all);
        }
    }
}

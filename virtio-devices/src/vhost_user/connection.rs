//! One connection to a back end: what it offers, and a way to ask it things that cannot take forever.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};

use vhost::VhostBackend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag};
use vhost::vhost_user::{
    Frontend, VhostUserFrontend, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vm_virtio::feature::VERSION_1;

use super::{VhostUserConfig, VhostUserError};
use crate::unix;

/// The feature bit that is the protocol's own: there are protocol features.
pub(super) const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// What of the protocol is used where the back end has it.
const WANTED: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::BACKEND_REQ);

/// A back end that is there, or was.
pub(super) struct Connection {
    config: VhostUserConfig,
    frontend: Frontend,
    /// The same socket, to be closed and watched.
    stream: UnixStream,
    /// What the back end offers, all of it.
    features: u64,
    protocol: VhostUserProtocolFeatures,
    /// Somebody was told that it is lost.
    lost: AtomicBool,
}

impl Connection {
    /// Connects, and hears what the back end offers. It is to serve the queues of `config`, and to have a configuration space if
    /// `has_config` says so.
    pub fn open(config: &VhostUserConfig, has_config: bool) -> Result<Self, VhostUserError> {
        let failed = |source| VhostUserError::Connect {
            socket: config.socket.clone(),
            source,
        };
        let stream = unix::connect(&config.socket).map_err(failed)?;
        stream.set_nonblocking(false).map_err(failed)?;
        let socket = stream.try_clone().map_err(failed)?;
        let mut connection = Self {
            config: config.clone(),
            frontend: Frontend::from_stream(socket, config.queues.into()),
            stream,
            features: 0,
            protocol: VhostUserProtocolFeatures::empty(),
            lost: AtomicBool::new(false),
        };
        let (features, protocol) = connection.session(|session| session.meet(has_config))?;
        connection.features = features;
        connection.protocol = protocol;
        Ok(connection)
    }

    /// Virtio's features that the back end offers, and [`PROTOCOL_FEATURES`].
    pub fn features(&self) -> u64 {
        self.features
    }

    /// It can say that its configuration changed.
    pub fn tells_changes(&self) -> bool {
        self.protocol
            .contains(VhostUserProtocolFeatures::BACKEND_REQ | VhostUserProtocolFeatures::CONFIG)
    }

    /// Readable, and hung up, when the back end is gone.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Somebody was told that it is lost.
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// Who has to know hears `why` the back end is lost, if it does not know. Nothing can be asked from now on.
    pub fn lose(&self, why: &VhostUserError) {
        if !self.lost.swap(true, Ordering::AcqRel) {
            // Fails only if it is closed.
            let _ = self.stream.shutdown(Shutdown::Both);
            (self.config.lost)(why);
        }
    }

    /// Asks several things, all in the time of [`patience`](VhostUserConfig::patience).
    pub fn session<T>(
        &self,
        work: impl FnOnce(&Session<'_>) -> Result<T, VhostUserError>,
    ) -> Result<T, VhostUserError> {
        let prepare = |source| VhostUserError::Prepare {
            socket: self.config.socket.clone(),
            source,
        };
        let slow = Arc::new(AtomicBool::new(false));
        let (done, wait) = sync_channel::<()>(0);
        let (late, stream) = (slow.clone(), self.stream.try_clone().map_err(prepare)?);
        let patience = self.config.patience;
        let guard = move || {
            if wait.recv_timeout(patience) == Err(RecvTimeoutError::Timeout) {
                late.store(true, Ordering::Release);
                // Who waits for an answer gets the end of the stream.
                let _ = stream.shutdown(Shutdown::Both);
            }
        };
        let name = format!("{}_vu", self.config.id);
        (self.config.spawn)(name, Box::new(guard)).map_err(prepare)?;
        let worked = work(&Session {
            connection: self,
            slow: &slow,
        });
        // That ends the guard.
        drop(done);
        worked
    }

    /// `len` bytes of the configuration space, from its start.
    pub fn read_config(&self, len: usize) -> Result<Vec<u8>, VhostUserError> {
        self.session(|session| session.config(len))
    }

    /// The driver writes the configuration space.
    pub fn write_config(&self, offset: usize, data: &[u8]) -> Result<(), VhostUserError> {
        self.session(|session| {
            session.ask("take what the driver configures", |frontend| {
                let offset = u32::try_from(offset).unwrap_or(u32::MAX);
                // 0 is the driver's write; the crate's WRITABLE is 1, which is that of a migration.
                frontend.set_config(offset, VhostUserConfigFlags::empty(), data)
            })
        })
    }
}

/// A time in which things are asked.
pub(super) struct Session<'a> {
    connection: &'a Connection,
    slow: &'a AtomicBool,
}

impl Session<'_> {
    /// Asks one thing. `what` says which, as the end of "the back end does not".
    pub fn ask<T>(
        &self,
        what: &'static str,
        request: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> Result<T, VhostUserError> {
        let socket = || self.connection.config.socket.clone();
        // Another handle of the same.
        request(&mut self.connection.frontend.clone()).map_err(|source| {
            if self.slow.load(Ordering::Acquire) {
                return VhostUserError::Slow {
                    socket: socket(),
                    what,
                    patience: self.connection.config.patience,
                };
            }
            VhostUserError::Ask {
                socket: socket(),
                what,
                source,
            }
        })
    }

    /// The first of all: who we are, and what each can do.
    fn meet(&self, has_config: bool) -> Result<(u64, VhostUserProtocolFeatures), VhostUserError> {
        let socket = || self.connection.config.socket.clone();
        let lacks = |what| VhostUserError::Lacks {
            socket: socket(),
            what,
        };
        let features = self.ask("say what it can do", |frontend| frontend.get_features())?;
        self.ask("take an owner", |frontend| frontend.set_owner())?;
        if features & VERSION_1 == 0 {
            return Err(lacks("VIRTIO_F_VERSION_1"));
        }
        let mut protocol = VhostUserProtocolFeatures::empty();
        if features & PROTOCOL_FEATURES != 0 {
            let offered = self.ask("say what it knows of the protocol", |frontend| {
                frontend.get_protocol_features()
            })?;
            protocol = offered & WANTED;
            self.ask("agree on the protocol", |frontend| {
                frontend.set_protocol_features(protocol)
            })?;
        }
        if has_config && !protocol.contains(VhostUserProtocolFeatures::CONFIG) {
            return Err(lacks("configuration space"));
        }
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            // From now on it answers whatever it is told.
            let flags = VhostUserHeaderFlag::NEED_REPLY;
            self.connection.frontend.set_hdr_flags(flags);
        }
        let wanted = self.connection.config.queues;
        // Without MQ it serves as many as its type has at least, and does not say so.
        if protocol.contains(VhostUserProtocolFeatures::MQ) {
            let most = self.ask("say how many queues it serves", |frontend| {
                frontend.get_queue_num()
            })?;
            if most < wanted.into() {
                return Err(VhostUserError::Queues {
                    socket: socket(),
                    most,
                    wanted,
                });
            }
        }
        Ok((features, protocol))
    }

    /// `len` bytes of the configuration space, from its start.
    pub fn config(&self, len: usize) -> Result<Vec<u8>, VhostUserError> {
        let (_, bytes) = self.ask("tell its configuration", |frontend| {
            let size = u32::try_from(len).unwrap_or(u32::MAX);
            let flags = VhostUserConfigFlags::empty();
            frontend.get_config(0, size, flags, &vec![0; len])
        })?;
        Ok(bytes)
    }

    /// Whether rings are enabled one by one, and not from the start.
    pub fn enables_rings(&self) -> bool {
        self.connection.features & PROTOCOL_FEATURES != 0
    }
}

//! The REST API: HTTP over a UNIX socket, and what can be asked through it.
//!
//! The API thread turns HTTP into [`Request`]s (`http`, `route`, `config`), the control thread answers them, since it owns the VM
//! (`crate::control`). `docs/api.md` is for users, `docs/openapi.json` for programs; tests hold the server to the latter.

mod call;
pub mod client;
mod config;
mod http;
mod request;
mod route;
mod socket;
#[cfg(test)]
mod tests;

pub use crate::socket_file::SocketFile;
pub use call::{Call, CallReceiver, CallSender, Reply, call_channel};
pub use http::{Server, Status};
pub use request::{
    Answer, DeviceNode, Failure, Ping, Request, Resize, ResizeDisk, VmInfo, VmState,
};
pub use route::read_request;
pub use socket::{ApiSocket, Listening, SocketError};

//! The engine that every kernel has: each request is done, on the caller's thread, when it is submitted.

use std::io;
use std::sync::Arc;

use super::target::Target;
use super::transfer::{Step, Transfer};
use crate::call::CallIo;
use crate::io::{DiskIo, Operation, Request};

/// A queue that blocks.
pub fn open(target: Arc<Target>, depth: usize) -> io::Result<Box<dyn DiskIo>> {
    let mut transfer = Transfer::new();
    let call = move |operation: &Operation<'_>| {
        let request = Request {
            operation: *operation,
            user_data: 0,
        };
        transfer.start(&target, &request);
        loop {
            if let Step::Done(result) = transfer.step() {
                return result.map_err(io::Error::from_raw_os_error);
            }
            transfer.run_step(&target);
        }
    };
    Ok(Box::new(CallIo::new(depth, call)?))
}

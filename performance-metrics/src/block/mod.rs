//! Disks: a pattern of requests from the guest's driver, and the same from a host program straight on the file.

mod images;
mod uring;

use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;

pub use images::{Image, Images};

use crate::counters::Plain;
use crate::vmm::{Measured, Vmm, limits};

/// Bytes of each disk.
pub const SPAN: u64 = 64 << 20;
/// Bytes of a cluster of a qcow2 image.
pub const CLUSTER: u64 = 64 << 10;
const KIB: u64 = 1024;

/// What a request does.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// Reads, and looks whether it is what should be there.
    Read,
    /// Writes.
    Write,
    /// Writes, and flushes when that is done.
    Flush,
}

/// A pattern of requests.
#[derive(Clone, Copy, Debug)]
pub struct Pattern {
    /// What each does.
    pub kind: Kind,
    /// One after the other, or at random.
    pub sequential: bool,
    /// Bytes of each.
    pub size: u64,
    /// How many are in flight.
    pub depth: u32,
}

/// All patterns: name and what it is.
pub const PATTERNS: &[(&str, Pattern)] = &[
    ("seq-read-256k", pattern(Kind::Read, true, 256 * KIB, 8)),
    ("seq-write-256k", pattern(Kind::Write, true, 256 * KIB, 8)),
    ("rand-read-4k-qd1", pattern(Kind::Read, false, 4 * KIB, 1)),
    ("rand-read-4k-qd32", pattern(Kind::Read, false, 4 * KIB, 32)),
    (
        "rand-read-4k-qd128",
        pattern(Kind::Read, false, 4 * KIB, 128),
    ),
    ("rand-write-4k-qd1", pattern(Kind::Write, false, 4 * KIB, 1)),
    (
        "rand-write-4k-qd32",
        pattern(Kind::Write, false, 4 * KIB, 32),
    ),
    (
        "rand-write-4k-qd128",
        pattern(Kind::Write, false, 4 * KIB, 128),
    ),
    ("write-flush-4k", pattern(Kind::Flush, false, 4 * KIB, 1)),
];

const fn pattern(kind: Kind, sequential: bool, size: u64, depth: u32) -> Pattern {
    Pattern {
        kind,
        sequential,
        size,
        depth,
    }
}

/// A pattern on an image.
#[derive(Clone, Copy, Debug)]
pub struct Job {
    /// The pattern.
    pub pattern: Pattern,
    /// The image.
    pub image: Image,
    /// Past the host's page cache.
    pub direct: bool,
}

impl Job {
    /// Each write goes to a cluster of its own, which the image doesn't own yet: a copy a write.
    fn copies(&self) -> bool {
        self.pattern.kind != Kind::Read && self.image.is_used_up()
    }

    fn stride(&self) -> u64 {
        if self.copies() {
            self.pattern.size.max(CLUSTER)
        } else {
            self.pattern.size
        }
    }

    /// Operations, at most. Where each copies, as many as there are clusters.
    fn count(&self) -> u64 {
        if self.copies() {
            SPAN / self.stride()
        } else {
            u64::MAX
        }
    }

    /// By a VMM with the bare-metal guest. `owner` names its images.
    ///
    /// # Errors
    /// What the image, the VMM or the guest says.
    pub fn in_guest(
        &self,
        binary: &Path,
        guest: &Path,
        images: &Images,
        owner: &str,
        time: Duration,
        tracing: bool,
    ) -> Result<Measured> {
        let path = images.ready(self.image, owner, self.copies())?;
        let mut disk = OsString::from("path=");
        disk.push(&path);
        disk.push(",queue_size=256");
        if self.direct {
            disk.push(",direct=on");
        }
        if self.image == Image::Backing {
            disk.push(",backing_files=on");
        }
        let Pattern {
            kind,
            sequential,
            size,
            depth,
        } = self.pattern;
        let op = match kind {
            Kind::Read => "read",
            Kind::Write => "write",
            Kind::Flush => "flush",
        };
        let cmdline = format!(
            "test=bench_blk op={op} depth={depth} size={size} stride={} span={SPAN} sequential={} count={} {}",
            self.stride(),
            u8::from(sequential),
            self.count(),
            limits(time)
        );
        let mut vmm = Vmm::start(binary, guest, &cmdline, &["--disk".into(), disk], tracing)?;
        let measured = vmm.measured()?;
        vmm.finish()?;
        Ok(measured)
    }

    /// By a host program, on a raw image.
    ///
    /// # Errors
    /// What the image or io_uring says.
    pub fn on_host(&self, images: &Images, time: Duration) -> Result<Plain> {
        let path = images.ready(self.image, "host", false)?;
        uring::run(&path, self, time)
    }
}

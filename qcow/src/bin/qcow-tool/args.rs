//! The command line.

use std::path::PathBuf;
use std::str::FromStr;

use argh::FromArgs;

/// Makes, looks at, checks and changes qcow2 images.
#[derive(FromArgs, Debug)]
pub struct Args {
    #[argh(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(FromArgs, Debug)]
#[argh(subcommand)]
pub enum Command {
    Create(Create),
    Info(Info),
    Check(Check),
    Convert(Convert),
    Map(Map),
    Snapshot(Snapshot),
    Resize(Resize),
    Commit(Commit),
    Bench(Bench),
}

/// A number of bytes: digits, and K, M, G or T for powers of 1024.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes(pub u64);

impl FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let shift = match text.chars().last().map(|c| c.to_ascii_uppercase()) {
            Some('K') => 10,
            Some('M') => 20,
            Some('G') => 30,
            Some('T') => 40,
            _ => 0,
        };
        let digits = if shift == 0 {
            text
        } else {
            &text[..text.len() - 1]
        };
        let number: u64 = digits
            .parse()
            .map_err(|_| format!("{text:?} is not a size such as 512, 64K or 10G"))?;
        number
            .checked_mul(1 << shift)
            .map(Bytes)
            .ok_or_else(|| format!("{text:?} is more than 64 bits hold"))
    }
}

/// How results are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Output {
    #[default]
    Text,
    Json,
}

impl FromStr for Output {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "text" => Ok(Output::Text),
            "json" => Ok(Output::Json),
            _ => Err(format!("output {text:?}; text and json are possible")),
        }
    }
}

/// Makes an empty image.
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "create")]
pub struct Create {
    /// the image
    #[argh(positional)]
    pub path: PathBuf,
    /// size of the disk, such as 10G; without it that of the backing file
    #[argh(positional)]
    pub size: Option<Bytes>,
    /// bytes of a cluster (64K)
    #[argh(option, default = "Bytes(65536)")]
    pub cluster_size: Bytes,
    /// width of a refcount in bits (16)
    #[argh(option, default = "16")]
    pub refcount_bits: u32,
    /// version of the format, 2 or 3 (3)
    #[argh(option, default = "3")]
    pub version: u32,
    /// subclusters
    #[argh(switch)]
    pub extended_l2: bool,
    /// postpone refcount updates
    #[argh(switch)]
    pub lazy_refcounts: bool,
    /// compressed clusters are zlib or zstd (zlib)
    #[argh(option, default = "String::from(\"zlib\")")]
    pub compression: String,
    /// backing file; a relative path counts from the image
    #[argh(option)]
    pub backing: Option<PathBuf>,
    /// format of the backing file, raw or qcow2
    #[argh(option)]
    pub backing_format: Option<String>,
    /// file that takes the guest's data
    #[argh(option)]
    pub data_file: Option<PathBuf>,
    /// keep the data file a raw image
    #[argh(switch)]
    pub raw_data_file: bool,
    /// replace an existing file
    #[argh(switch)]
    pub replace: bool,
}

/// Describes an image. Nothing else is opened.
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "info")]
pub struct Info {
    /// the image
    #[argh(positional)]
    pub path: PathBuf,
    /// text or json (text)
    #[argh(option, default = "Output::Text")]
    pub output: Output,
}

/// Checks an image. Exit code 0: fine; 2: corrupt; 3: leaks.
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "check")]
pub struct Check {
    /// the image
    #[argh(positional)]
    pub path: PathBuf,
    /// what to repair: leaks or all
    #[argh(option)]
    pub repair: Option<String>,
    /// text or json (text)
    #[argh(option, default = "Output::Text")]
    pub output: Output,
}

/// Copies a disk into another file.
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "convert")]
pub struct Convert {
    /// what to copy
    #[argh(positional)]
    pub source: PathBuf,
    /// the new file
    #[argh(positional)]
    pub target: PathBuf,
    /// format of the source: raw or qcow2
    #[argh(option)]
    pub from: String,
    /// format of the target: raw or qcow2
    #[argh(option)]
    pub to: String,
    /// compress clusters: zlib or zstd
    #[argh(option)]
    pub compress: Option<String>,
    /// bytes of a cluster of the target (64K)
    #[argh(option, default = "Bytes(65536)")]
    pub cluster_size: Bytes,
    /// copy the disk as it was at this snapshot
    #[argh(option)]
    pub snapshot: Option<String>,
    /// read the source's backing and data files
    #[argh(switch)]
    pub follow: bool,
    /// threads that copy (2)
    #[argh(option, default = "2")]
    pub threads: usize,
    /// replace an existing file
    #[argh(switch)]
    pub replace: bool,
}

/// Says what is where.
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "map")]
pub struct Map {
    /// the image
    #[argh(positional)]
    pub path: PathBuf,
    /// look into backing files too
    #[argh(switch)]
    pub follow: bool,
    /// text or json (text)
    #[argh(option, default = "Output::Text")]
    pub output: Output,
}

/// Internal snapshots.
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "snapshot")]
pub struct Snapshot {
    #[argh(subcommand)]
    pub action: SnapshotAction,
}

/// What to do with snapshots.
#[derive(FromArgs, Debug)]
#[argh(subcommand)]
pub enum SnapshotAction {
    List(SnapshotList),
    Create(SnapshotCreate),
    Apply(SnapshotApply),
    Delete(SnapshotDelete),
}

/// Lists them.
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "list")]
pub struct SnapshotList {
    /// the image
    #[argh(positional)]
    pub path: PathBuf,
    /// text or json (text)
    #[argh(option, default = "Output::Text")]
    pub output: Output,
}

/// Keeps the disk as it is now.
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "create")]
pub struct SnapshotCreate {
    /// the image
    #[argh(positional)]
    pub path: PathBuf,
    /// name of the snapshot
    #[argh(positional)]
    pub name: String,
}

/// Makes the disk what it was. What was written since is gone.
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "apply")]
pub struct SnapshotApply {
    /// the image
    #[argh(positional)]
    pub path: PathBuf,
    /// id or name of the snapshot
    #[argh(positional)]
    pub name: String,
}

/// Deletes one.
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "delete")]
pub struct SnapshotDelete {
    /// the image
    #[argh(positional)]
    pub path: PathBuf,
    /// id or name of the snapshot
    #[argh(positional)]
    pub name: String,
}

/// Changes the size of the disk.
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "resize")]
pub struct Resize {
    /// the image
    #[argh(positional)]
    pub path: PathBuf,
    /// the new size
    #[argh(positional)]
    pub size: Bytes,
    /// discard what lies past the new end
    #[argh(switch)]
    pub discard: bool,
}

/// Writes an image's data into its backing file, and empties the image.
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "commit")]
pub struct Commit {
    /// the image
    #[argh(positional)]
    pub path: PathBuf,
}

/// Measures how fast an image is read, or written with --write, which overwrites what the disk holds. Each request in flight has a
/// thread; a run of writes ends with a flush, which counts.
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "bench")]
pub struct Bench {
    /// the image
    #[argh(positional)]
    pub path: PathBuf,
    /// write instead of reading: the disk's content is lost
    #[argh(switch)]
    pub write: bool,
    /// requests at places without order, rather than one after the other
    #[argh(switch)]
    pub random: bool,
    /// bytes of a request (64K)
    #[argh(option, default = "Bytes(65536)")]
    pub block_size: Bytes,
    /// requests in flight, 1 to 256 (1)
    #[argh(option, default = "1")]
    pub depth: usize,
    /// requests in all (10000); past the end of the disk it begins again
    #[argh(option, default = "10000")]
    pub requests: u64,
    /// read the image's backing and data files
    #[argh(switch)]
    pub follow: bool,
    /// past the page cache (O_DIRECT)
    #[argh(switch)]
    pub direct: bool,
    /// text or json (text)
    #[argh(option, default = "Output::Text")]
    pub output: Output,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!("512".parse(), Ok(Bytes(512)));
        assert_eq!("64k".parse(), Ok(Bytes(65536)));
        assert_eq!("2T".parse(), Ok(Bytes(2 << 40)));
        for bad in ["", "K", "1.5G", "-1", "99999999999T", "10é"] {
            assert!(bad.parse::<Bytes>().is_err(), "{bad}");
        }
    }
}

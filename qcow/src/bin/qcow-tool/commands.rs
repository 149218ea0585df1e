//! The subcommands.

use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use qcow::{Compression, CreateOptions, Format, Image, OpenOptions, Repair, Shrink};
use serde_json::json;

use crate::args::{
    Args, Check, Command, Commit, Convert, Create, Info, Map, Output, Resize, SnapshotAction,
};
use crate::output;

pub fn run(args: Args) -> Result<ExitCode> {
    match args.command {
        Command::Create(a) => create(&a)?,
        Command::Info(a) => info(&a)?,
        Command::Check(a) => return check(&a),
        Command::Convert(a) => convert(&a)?,
        Command::Map(a) => map(&a)?,
        Command::Snapshot(a) => snapshot(a.action)?,
        Command::Resize(a) => resize(&a)?,
        Command::Commit(a) => commit(&a)?,
        Command::Bench(a) => crate::bench::run(&a)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn compression(name: &str) -> Result<Compression> {
    match name {
        "zlib" => Ok(Compression::Zlib),
        "zstd" => Ok(Compression::Zstd),
        _ => bail!("compression {name:?}; zlib and zstd are possible"),
    }
}

fn format(name: &str) -> Result<Format> {
    match name {
        "raw" => Ok(Format::Raw),
        "qcow2" => Ok(Format::Qcow2),
        _ => bail!("format {name:?}; raw and qcow2 are possible"),
    }
}

/// Opens an image for a command that changes it: its backing and data files are part of it.
fn open_to_change(path: &std::path::Path) -> Result<Image> {
    let options = OpenOptions::new()
        .write(true)
        .follow_backing(true)
        .follow_data_file(true);
    Image::open(path, &options).with_context(|| path.display().to_string())
}

fn create(a: &Create) -> Result<()> {
    let backing_size = || -> Result<u64> {
        let (Some(name), Some(kind)) = (&a.backing, &a.backing_format) else {
            bail!("a size is needed, or a backing file with its format");
        };
        let path = a
            .path
            .parent()
            .map_or_else(|| name.clone(), |dir| dir.join(name));
        Ok(match format(kind)? {
            Format::Raw => std::fs::metadata(&path)
                .with_context(|| path.display().to_string())?
                .len(),
            Format::Qcow2 => {
                qcow::info(&path)
                    .with_context(|| path.display().to_string())?
                    .header
                    .size
            }
        })
    };
    let size = match a.size {
        Some(size) => size.0,
        None => backing_size()?,
    };
    let mut options = CreateOptions::new(size)
        .cluster_size(a.cluster_size.0)
        .refcount_bits(a.refcount_bits)
        .version(a.version)
        .extended_l2(a.extended_l2)
        .lazy_refcounts(a.lazy_refcounts)
        .compression(compression(&a.compression)?)
        .raw_data_file(a.raw_data_file)
        .replace(a.replace);
    if let Some(path) = &a.backing {
        let Some(format) = &a.backing_format else {
            bail!("--backing needs --backing-format raw or qcow2")
        };
        options = options.backing(path, format);
    }
    if let Some(path) = &a.data_file {
        options = options.data_file(path);
    }
    Image::create(&a.path, &options)
        .and_then(Image::close)
        .with_context(|| a.path.display().to_string())
}

fn info(a: &Info) -> Result<()> {
    let info = qcow::info(&a.path).with_context(|| a.path.display().to_string())?;
    output::info(&info, a.output);
    Ok(())
}

fn check(a: &Check) -> Result<ExitCode> {
    let repair = match a.repair.as_deref() {
        None => Repair::Nothing,
        Some("leaks") => Repair::Leaks,
        Some("all") => Repair::All,
        Some(other) => bail!("repair {other:?}; leaks and all are possible"),
    };
    let report = qcow::check(&a.path, repair).with_context(|| a.path.display().to_string())?;
    output::report(&report, a.output);
    Ok(match (report.corruptions, report.leaks) {
        (0, 0) => ExitCode::SUCCESS,
        (0, _) => ExitCode::from(3),
        _ => ExitCode::from(2),
    })
}

fn convert(a: &Convert) -> Result<()> {
    let mut open = OpenOptions::new()
        .follow_backing(a.follow)
        .follow_data_file(a.follow);
    if let Some(name) = &a.snapshot {
        open = open.snapshot(name);
    }
    let mut convert = qcow::Convert::new(format(&a.from)?)
        .open(open)
        .threads(a.threads)
        .replace(a.replace);
    match format(&a.to)? {
        Format::Qcow2 => {
            let mut options = CreateOptions::new(0).cluster_size(a.cluster_size.0);
            if let Some(name) = &a.compress {
                options = options.compression(compression(name)?);
            }
            convert = convert.to_qcow2(options).compress(a.compress.is_some());
        }
        Format::Raw if a.compress.is_some() => bail!("a raw file cannot be compressed"),
        Format::Raw => {}
    }
    let mut bar = output::Bar::new();
    convert
        .run(&a.source, &a.target, &mut |done, all| bar.show(done, all))
        .with_context(|| format!("{} to {}", a.source.display(), a.target.display()))
}

fn map(a: &Map) -> Result<()> {
    let options = OpenOptions::new()
        .follow_backing(a.follow)
        .follow_data_file(a.follow);
    let image = Image::open(&a.path, &options).with_context(|| a.path.display().to_string())?;
    let mut extents = output::Extents::new(a.output);
    image.map(0, image.len(), |e| {
        extents.show(&e);
        Ok(())
    })?;
    extents.finish();
    Ok(())
}

fn snapshot(action: SnapshotAction) -> Result<()> {
    match action {
        SnapshotAction::List(a) => {
            let info = qcow::info(&a.path).with_context(|| a.path.display().to_string())?;
            match a.output {
                Output::Json => println!("{:#}", json!(output::snapshots(&info.snapshots))),
                Output::Text => output::snapshot_lines(&info.snapshots),
            }
        }
        SnapshotAction::Create(a) => {
            let image = open_to_change(&a.path)?;
            let id = image.create_snapshot(&a.name)?;
            image.close()?;
            println!("{id}");
        }
        SnapshotAction::Apply(a) => {
            let image = open_to_change(&a.path)?;
            image.apply_snapshot(&a.name)?;
            image.close()?;
        }
        SnapshotAction::Delete(a) => {
            let image = open_to_change(&a.path)?;
            image.delete_snapshot(&a.name)?;
            image.close()?;
        }
    }
    Ok(())
}

fn resize(a: &Resize) -> Result<()> {
    let image = open_to_change(&a.path)?;
    image.resize(
        a.size.0,
        if a.discard {
            Shrink::Discard
        } else {
            Shrink::IfFree
        },
    )?;
    Ok(image.close()?)
}

fn commit(a: &Commit) -> Result<()> {
    let mut bar = output::Bar::new();
    let options = OpenOptions::new().follow_data_file(true);
    qcow::commit(&a.path, &options, &mut |done, all| bar.show(done, all))
        .with_context(|| a.path.display().to_string())
}

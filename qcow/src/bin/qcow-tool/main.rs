//! `qcow-tool`: what the library does, from a shell. Text for people, JSON for programs.

mod args;
mod bench;
mod commands;
mod output;

use std::process::ExitCode;

fn main() -> ExitCode {
    let args: args::Args = argh::from_env();
    match commands::run(args) {
        Ok(code) => code,
        Err(e) => {
            let causes: Vec<String> = e.chain().map(ToString::to_string).collect();
            eprintln!("qcow-tool: {}", causes.join(": "));
            ExitCode::FAILURE
        }
    }
}

//! Tells the program its version: the package's, and the commit it is built from where there is a repository.

use std::process::Command;

/// Everything that the program is built from.
const SOURCES: [&str; 7] = ["src", "shaders", "kernels", "data/toy.txt", "build.rs", "Cargo.toml", "Cargo.lock"];

fn main() {
    for source in SOURCES {
        println!("cargo::rerun-if-changed={source}");
    }
    let version = env!("CARGO_PKG_VERSION");
    let version = commit().map_or(version.to_string(), |commit| format!("{version} ({commit})"));
    println!("cargo::rustc-env=BANDTRAIN_VERSION={version}");
}

/// The commit that the sources are at, and whether they were changed since.
fn commit() -> Option<String> {
    // The repository of somebody who carries this package inside his own says nothing about it.
    git(&["rev-parse", "--show-prefix"]).filter(String::is_empty)?;
    let commit = git(&["rev-parse", "--short=12", "HEAD"])?;
    let changes = git(&[&["status", "--porcelain", "--"], &SOURCES[..]].concat())?;
    Some(if changes.is_empty() { commit } else { format!("{commit} and changes") })
}

/// What git prints, without the line's end.
fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok().filter(|output| output.status.success())?;
    String::from_utf8(output.stdout).ok().map(|text| text.trim().to_string())
}

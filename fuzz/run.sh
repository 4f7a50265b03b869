#!/usr/bin/env bash
# Fuzzes a target for some seconds: fuzz/run.sh TARGET [SECONDS] [LIBFUZZER OPTIONS]
#
# With the stable toolchain, since libFuzzer needs nothing but its coverage counters, which LLVM makes in any of them. (With a
# nightly one, `cargo fuzz run TARGET` does the same with the address sanitizer on top.) New inputs go to
# target/fuzz/corpus/TARGET, what fails to target/fuzz/artifacts/TARGET; the inputs kept in fuzz/corpus are where it starts.
# `fuzz/run.sh TARGET keep` adds to the kept inputs those found that reach the most of what these do not.
set -euo pipefail
cd "$(dirname "$0")"
target=$1 seconds=${2:-60}
shift $(($# < 2 ? $# : 2))

triple=$(rustc -vV | sed -n 's/^host: //p')
export CARGO_TARGET_DIR=$PWD/../target/fuzz
export RUSTFLAGS="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Ccodegen-units=1 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares"
# The program's own versions of everything.
cp ../Cargo.lock .
# Naming the target keeps the counters out of build scripts and procedural macros, which have no fuzzer to count for.
cargo build --release --quiet --target "$triple" --bin "$target"

found=$CARGO_TARGET_DIR/corpus/$target failed=$CARGO_TARGET_DIR/artifacts/$target/
mkdir -p "$found" "$failed" "corpus/$target"
# Inputs become files, many thousands a second.
TMPDIR=$(mktemp -d -p "$([ -d /dev/shm ] && echo /dev/shm || echo "${TMPDIR:-/tmp}")")
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT
program=$CARGO_TARGET_DIR/$triple/release/$target
# Nothing that a file of this size says may cost half a minute; what it may cost of memory is in src/lib.rs.
limits=(-timeout=30 -max_len=8192)
if [ "$seconds" = keep ]; then
    mkdir "$TMPDIR/merged"
    "$program" -set_cover_merge=1 -use_counters=0 -merge_control_file="$TMPDIR/control" "${limits[@]}" \
        "$TMPDIR/merged" "corpus/$target" "$found"
    python3 keep.py "$TMPDIR/control" "corpus/$target"
    exit
fi
"$program" -max_total_time="$seconds" -artifact_prefix="$failed" "${limits[@]}" "$@" "$found" "corpus/$target"

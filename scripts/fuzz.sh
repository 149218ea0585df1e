#!/usr/bin/env bash
# Runs fuzz targets for a bounded time on the stable toolchain; docs/fuzzing.md says what they hold to.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly OUT=${CARGO_TARGET_DIR:-$PWD/target}/fuzz
readonly TRIPLE=x86_64-unknown-linux-gnu
# What cargo-fuzz sets for `--sanitizer none`: coverage counters and traced comparisons, checks on.
readonly FLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-trace-compares -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
-Cllvm-args=-sanitizer-coverage-pc-table -Ccodegen-units=1 -Cdebug-assertions -Coverflow-checks"

usage() {
    cat <<'TEXT'
usage: fuzz.sh TARGET SECONDS [-- LIBFUZZER-OPTION...]   fuzz one target, or `all`, for so many seconds each, as many
                                                         at a time as there are cores
       fuzz.sh TARGET FILE...                            run one target once on each file, to reproduce a crash
       fuzz.sh --list                                    the targets, and what they are about
       fuzz.sh --build                                   only build them
       fuzz.sh --minimize TARGET                         keep of what runs found only as few files as cover as much

Exits with 1 when a target crashed, hung (10 s an input) or took too much memory; the input is then in fuzz/artifacts.
What a run discovers is kept in target/fuzz/corpus and used by the next.
TEXT
}

die() {
    printf 'fuzz.sh: %s\n' "$*" >&2
    exit 2
}

targets() { sed -n '/^\[\[bin\]\]/{n;s/^name = "\(.*\)"/\1/p}' fuzz/Cargo.toml; }

list() {
    local name
    for name in $(targets); do
        printf '%-16s %s\n' "$name" "$(sed -n '1s,^//! ,,p' "fuzz/fuzz_targets/$name.rs")"
    done
}

# build [TARGET]: one target, or all.
build() {
    command -v c++ >/dev/null || die "c++ is missing, which libFuzzer is built with: apt-get install g++"
    local which=(--bins)
    [ $# -eq 0 ] || which=(--bin "$1")
    # With --target, build scripts and procedural macros are left without these flags.
    RUSTFLAGS=$FLAGS cargo build --release --manifest-path fuzz/Cargo.toml \
        --target "$TRIPLE" --target-dir "$OUT" "${which[@]}"
}

binary() { printf '%s' "$OUT/$TRIPLE/release/$1"; }

# The options that belong to a target.
options() {
    printf '%s\n' -timeout=10 -rss_limit_mb=2048 "-artifact_prefix=fuzz/artifacts/$1/"
    case $1 in
    qcow*) printf '%s\n' -dict=fuzz/qcow.dict -max_len=65536 ;;
    linux_loader) printf '%s\n' -max_len=65536 ;;
    *)
        # A device's driver does little in the few bytes that libFuzzer begins with.
        ! grep -q 'fuzz::device' "fuzz/fuzz_targets/$1.rs" || printf '%s\n' -len_control=0 -max_len=2048
        ;;
    esac
}

# fuzz TARGET SECONDS [OPTION...]: the first corpus directory is written to, the seeds are only read.
fuzz() {
    local target=$1 seconds=$2 log status=0 opts
    shift 2
    local found=$OUT/corpus/$target
    mkdir -p "$found" "fuzz/artifacts/$target" "fuzz/corpus/$target"
    log=$OUT/$target.log
    mapfile -t opts < <(options "$target")
    printf '==> %s for %s s\n' "$target" "$seconds"
    "$(binary "$target")" "${opts[@]}" "-max_total_time=$seconds" -print_final_stats=1 "$@" \
        "$found" "fuzz/corpus/$target" >"$log" 2>&1 || status=$?
    # The last lines of progress: coverage (cov), features (ft), corpus, executions a second.
    printf '%s: %s\n' "$target" "$(grep -E '^#[0-9]+' "$log" | tail -1)"
    if [ "$status" -eq 0 ]; then
        return
    fi
    tail -60 "$log" >&2
    local artifact
    artifact=$(sed -n 's/.*Test unit written to //p' "$log" | tail -1)
    printf '\nfuzz.sh: %s failed (%s); all it said is in %s\n' "$target" "$status" "$log" >&2
    if [ -n "$artifact" ]; then
        printf 'reproduce:  scripts/fuzz.sh %s %s\n' "$target" "$artifact" >&2
        printf 'make small: %s -minimize_crash=1 -max_total_time=60 %s\n' "$(binary "$target")" "$artifact" >&2
    fi
    return 1
}

# fuzz_all SECONDS [OPTION...]: prints the names of those that failed to the file descriptor 3.
fuzz_all() {
    local name running=0 cores
    cores=$(nproc)
    for name in $(targets); do
        if [ "$running" -ge "$cores" ]; then
            wait -n || true
            running=$((running - 1))
        fi
        { fuzz "$name" "$@" || printf '%s\n' "$name" >&3; } &
        running=$((running + 1))
    done
    wait
}

reproduce() {
    local target=$1 opts
    shift
    mkdir -p "fuzz/artifacts/$target"
    mapfile -t opts < <(options "$target")
    FUZZ_SHOW=1 RUST_BACKTRACE=1 "$(binary "$target")" "${opts[@]}" "$@"
}

minimize() {
    local target=$1 found=$OUT/corpus/$1 merged=$OUT/merged/$1 opts
    rm -rf "$merged"
    mkdir -p "$merged" "$found" "fuzz/artifacts/$target"
    mapfile -t opts < <(options "$target")
    "$(binary "$target")" "${opts[@]}" -set_cover_merge=1 "$merged" "$found" 2>&1 | tail -1
    rm -rf "$found"
    mv "$merged" "$found"
}

known() { targets | grep -qx -- "$1" || die "there is no target \"$1\"; these exist: $(targets | tr '\n' ' ')"; }

main() {
    case ${1:-} in
    --list) list ;;
    --build) build ;;
    --minimize)
        [ $# -eq 2 ] || die "usage: --minimize TARGET"
        known "$2"
        build "$2"
        minimize "$2"
        ;;
    -h | --help) usage ;;
    '' | -*)
        usage >&2
        exit 2
        ;;
    *)
        [ $# -ge 2 ] || die "how many seconds, or which files? (see --help)"
        local target=$1 what=$2 failed=() list
        if [[ ! $what =~ ^[0-9]+$ ]]; then
            known "$target"
            shift
            build "$target"
            reproduce "$target" "$@"
            return
        fi
        shift 2
        [ "${1:-}" != -- ] || shift
        if [ "$target" = all ]; then
            build
            list=$(mktemp)
            fuzz_all "$what" "$@" 3>"$list"
            mapfile -t failed <"$list"
            rm "$list"
        else
            known "$target"
            build "$target"
            fuzz "$target" "$what" "$@" || failed+=("$target")
        fi
        if [ ${#failed[@]} -gt 0 ]; then
            printf 'fuzz.sh: failed: %s\n' "${failed[*]}" >&2
            exit 1
        fi
        ;;
    esac
}

main "$@"

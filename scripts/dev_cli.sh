#!/usr/bin/env bash
# Everything a developer does, in one place: build, test, run a guest. Works on the host, and with --container inside
# resources/Dockerfile.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly IMAGE=cloud-hypervisor-dev
readonly TARGET=${CARGO_TARGET_DIR:-$PWD/target}
readonly ASSETS=${CH_GUEST_ASSETS:-$PWD/guest-assets}
# What building and testing needs, as command and Debian package. prepare_guest_assets.sh sees to its own needs.
readonly NEEDS=(cc:gcc iasl:acpica-tools qemu-img:qemu-utils qemu-storage-daemon:qemu-system-common mkfs.ext4:e2fsprogs)

usage() {
    cat <<'TEXT'
usage: dev_cli.sh [--container] COMMAND

  build [--release]     build the binaries: for development (target/ci), or for use (target/release)
  tests [--unit | --integration | --all] [-- FILTER...]
                        run the tests: those that start no guest, those that do, or all (the default);
                        FILTER is passed on to the test runner, as in: tests --integration -- bare_metal
  run [OPTION...]       boot a Linux guest and give you its shell; OPTIONs go to the VMM,
                        as in: run --cpus boot=2 --memory size=1G
  shell                 a shell with the variables set that the tests read; with --container, in the container
  clean                 remove what was built; guest kernels stay in their cache
  --help                this text

  --container           do it in a container of resources/Dockerfile (docker or podman)

On Debian and as root, missing packages are installed; otherwise it says what to install.
CH_TESTS_WITHOUT_KVM=1 skips the tests that need /dev/kvm.
TEXT
}

say() { printf '==> %s\n' "$*"; }
die() {
    printf 'dev_cli.sh: %s\n' "$*" >&2
    exit 1
}

# --- what the host must have --------------------------------------------------------------------

need_tools() {
    local missing=() need
    for need in "${NEEDS[@]}"; do
        command -v "${need%%:*}" >/dev/null || missing+=("${need##*:}")
    done
    if [ ${#missing[@]} -gt 0 ]; then
        install_packages "${missing[@]}"
    fi
    command -v cargo >/dev/null || die "cargo is missing: install Rust $(rust_version) or newer (https://rustup.rs)"
}

rust_version() { sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml; }

install_packages() {
    if ! command -v apt-get >/dev/null || [ "$(id -u)" -ne 0 ]; then
        die "packages are missing; as root: apt-get install $*"
    fi
    say "installing $*"
    local log
    log=$(mktemp)
    # The package lists may be missing or old.
    if ! apt_install "$@" >"$log" 2>&1 && ! { apt-get update -qq && apt_install "$@"; } >>"$log" 2>&1; then
        cat "$log" >&2
        die "apt-get install $* failed"
    fi
    rm "$log"
}

apt_install() { DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@"; }

need_kvm() {
    if [ -r /dev/kvm ] && [ -w /dev/kvm ]; then
        return
    fi
    [ -e /dev/kvm ] || die "no /dev/kvm: this host has no KVM, or its module (kvm_intel, kvm_amd) is not loaded"
    die "/dev/kvm is not yours to use: become a member of its group ($(stat -c %G /dev/kvm))"
}

# --- commands -----------------------------------------------------------------------------------

build() {
    case ${1:-} in
    '') build_profile ci ;;
    --release) build_profile release ;;
    *) die "build: $1 is unknown; --release would do" ;;
    esac
}

build_profile() {
    cargo build --locked --profile "$1"
    say "built $TARGET/$1/cloud-hypervisor"
}

tests() {
    local kind=--all
    case ${1:-} in
    --unit | --integration | --all)
        kind=$1
        shift
        ;;
    esac
    if [ "${1:-}" = -- ]; then
        shift
    elif [ $# -gt 0 ]; then
        die "tests: $1 is unknown; --unit, --integration, --all or -- FILTER would do"
    fi
    if [ "${CH_TESTS_WITHOUT_KVM:-}" != 1 ]; then
        need_kvm
        [ "$kind" = --unit ] || ./scripts/prepare_guest_assets.sh
    fi
    if cargo nextest --version >/dev/null 2>&1; then
        tests_with_nextest "$kind" "$@"
    else
        say 'cargo-nextest is not installed; cargo test does the same, in a plainer order'
        tests_with_cargo "$kind" "$@"
    fi
}

tests_with_nextest() {
    local kind=$1 select=()
    shift
    case $kind in
    --unit) select=(-E 'not binary(integration)') ;;
    --integration) select=(-E 'binary(integration)') ;;
    esac
    use_test_guest
    [ "$kind" = --unit ] || use_mmio_binary
    cargo nextest run --locked --cargo-profile ci --workspace "${select[@]}" "$@"
    doc_tests "$kind" "$@"
}

tests_with_cargo() {
    local kind=$1
    shift
    use_test_guest
    if [ "$kind" != --integration ]; then
        # The bare-metal guest is no program of the host, which --bins would make it.
        cargo test --locked --profile ci --workspace --exclude test-guest --lib --bins "$@"
        cargo test --locked --profile ci --workspace --exclude cloud-hypervisor --test '*' "$@"
        cargo test --locked --profile ci -p cloud-hypervisor --test dependency_rule "$@"
    fi
    if [ "$kind" != --unit ]; then
        use_mmio_binary
        # A guest and its VMM keep a core busy each.
        cargo test --locked --profile ci -p cloud-hypervisor --test integration "$@" -- --test-threads=2
    fi
    doc_tests "$kind" "$@"
}

# The examples in the documentation, unless the person asked for certain tests.
doc_tests() {
    if [ "$1" != --integration ] && [ $# -eq 1 ]; then
        cargo test --locked --profile ci --workspace --doc --quiet
    fi
}

# Builds the bare-metal guest, which cargo doesn't do for tests of another package.
use_test_guest() {
    cargo build --locked --profile ci -p test-guest
    export CH_TEST_GUEST=${CH_TEST_GUEST:-$TARGET/ci/test-guest}
}

# Builds the VMM with the feature mmio beside the one without, which cargo puts back into its place as it builds the tests.
use_mmio_binary() {
    if [ -z "${CH_BINARY_MMIO:-}" ]; then
        cargo build --locked --profile ci --features mmio --bin cloud-hypervisor
        # It may be there, as the same file: then mv would refuse.
        rm -f "$TARGET/ci/cloud-hypervisor-mmio"
        mv "$TARGET/ci/cloud-hypervisor" "$TARGET/ci/cloud-hypervisor-mmio"
        export CH_BINARY_MMIO=$TARGET/ci/cloud-hypervisor-mmio
    fi
}

run() {
    need_kvm
    build_profile ci
    ./scripts/prepare_guest_assets.sh
    local options=("$@")
    given --cpus "$@" || options+=(--cpus boot=1)
    given --memory "$@" || options+=(--memory size=256M)
    given --cmdline "$@" || options+=(--cmdline "$(cat "$ASSETS/cmdline")")
    given --kernel "$@" || options+=(--kernel "$ASSETS/vmlinux")
    given --initramfs "$@" || options+=(--initramfs "$ASSETS/initramfs.cpio")
    given --serial "$@" || options+=(--serial tty)
    say 'starting the guest; Ctrl-A x ends it'
    exec "$TARGET/ci/cloud-hypervisor" "${options[@]}"
}

# Whether an option is among the words that follow it.
given() {
    local option=$1 word
    shift
    for word in "$@"; do
        case $word in
        "$option" | "$option"=*) return 0 ;;
        esac
    done
    return 1
}

shell() {
    export CH_GUEST_ASSETS=$ASSETS PATH=$TARGET/ci:$PATH
    say "cloud-hypervisor of target/ci is in PATH, guests are in \$CH_GUEST_ASSETS"
    exec "${SHELL:-/bin/bash}"
}

clean() {
    cargo clean
    rm -rf "$ASSETS"
    say 'guest kernels are still in ~/.cache/cloud-hypervisor-guest'
}

# --- in a container -----------------------------------------------------------------------------

container_engine() {
    local engine
    for engine in podman docker; do
        if command -v $engine >/dev/null && $engine info >/dev/null 2>&1; then
            echo $engine
            return
        fi
    done
    die '--container needs podman or docker, with its daemon running and yours to use'
}

in_container() {
    local engine options=()
    engine=$(container_engine)
    [ ! -t 0 ] || options+=(--interactive --tty)
    # The tests use /dev/kvm, taps, loop devices and network namespaces.
    options+=(--privileged)
    $engine build --quiet --tag "$IMAGE" --build-arg "RUST=$(rust_version)" --file resources/Dockerfile resources >/dev/null
    # What is built stays in a volume of its own: the container's root leaves no files in the tree.
    exec $engine run --rm "${options[@]}" \
        --volume "$PWD:/src" --volume "$IMAGE-cache:/cache" --workdir /src \
        --env CARGO_TARGET_DIR=/cache/target --env CARGO_HOME=/cache/cargo \
        --env CH_GUEST_ASSETS=/cache/guest-assets --env CH_GUEST_CACHE=/cache/guest \
        --env CH_TESTS_WITHOUT_KVM="${CH_TESTS_WITHOUT_KVM:-}" \
        "$IMAGE" ./scripts/dev_cli.sh "$@"
}

main() {
    if [ "${1:-}" = --container ]; then
        shift
        [ $# -gt 0 ] || die '--container needs a command; --help lists them'
        in_container "$@"
    fi
    local command=${1:-}
    [ $# -eq 0 ] || shift
    case $command in
    build | tests | run | shell)
        need_tools
        "$command" "$@"
        ;;
    clean) clean ;;
    -h | --help) usage ;;
    '')
        usage >&2
        exit 1
        ;;
    *) die "$command is unknown; --help lists the commands" ;;
    esac
}

main "$@"

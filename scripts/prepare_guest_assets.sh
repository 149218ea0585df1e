#!/usr/bin/env bash
# Makes the guests of the tests and of `dev_cli.sh run`, from Debian packages alone:
#
#   vmlinux, bzImage   kernels from linux-source-6.1 with resources/linux-config-x86_64 and -small
#   vmlinuz-cloud      the distribution's cloud kernel, untouched
#   vmlinux-cloud      the ELF file that vmlinuz-cloud carries
#   initramfs.cpio     busybox-static, and resources/guest/{init,shellrc,tests}
#   debian.raw         a disk with a GPT and Debian 12 on ext4 in its only partition, for the test root_disk
#   cmdline, cmdline-cloud   kernel command lines that start them quickly
#   manifest           what they were made from, and their SHA-256 sums
#
# Every part is kept in a cache under the hash of its inputs, so a fresh clone finds a finished build.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly USAGE='usage: prepare_guest_assets.sh [--update | --verify | --help]'
readonly ASSETS=${CH_GUEST_ASSETS:-$PWD/guest-assets}
readonly CACHE=${CH_GUEST_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/cloud-hypervisor-guest}
readonly GUEST=resources/guest
readonly CONFIG=resources/linux-config-x86_64
readonly SOURCE=linux-source-6.1
readonly SUITE=bookworm
readonly PACKAGES=(bc bison flex gcc libc6-dev libelf-dev lz4 make xz-utils)
readonly IMAGE_PACKAGES=(e2fsprogs fdisk mmdebstrap)
# Counts up when the steps below change what they make from the same inputs.
readonly RECIPE=1

say() { printf '==> guest assets: %s\n' "$*"; }
die() {
    printf 'prepare_guest_assets.sh: %s\n' "$*" >&2
    exit 1
}

usage_text() {
    cat <<TEXT
$USAGE

Puts guest kernels, an initramfs and a Debian disk into $ASSETS.
Does nothing when they are there and their inputs have not changed.

  --update   fetch the packages anew, and rebuild what a newer version changes
  --verify   check the files against the manifest's SHA-256 sums, change nothing

CH_GUEST_ASSETS   where the files go (default: guest-assets in the repository)
CH_GUEST_CACHE    where builds are kept (default: ~/.cache/cloud-hypervisor-guest)
TEXT
}

# The hash of the named files' names and contents, and of the words after `--`.
hash_of() {
    local files=()
    while [ "$1" != -- ]; do
        files+=("$1")
        shift
    done
    shift
    { [ ${#files[@]} -eq 0 ] || sha256sum "${files[@]}"; echo "$RECIPE $*"; } | sha256sum | cut -c1-16
}

# --- packages -----------------------------------------------------------------------------------

installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

candidate() { apt-cache policy "$1" 2>/dev/null | awk '$1 == "Candidate:" && $2 != "(none)" { print $2 }'; }

update_lists() {
    [ "$(id -u)" -eq 0 ] || die 'the package lists are missing or old; as root: apt-get update'
    say 'reading the package lists'
    apt-get update -qq >"$CACHE/apt.log" 2>&1 || die "apt-get update failed; see $CACHE/apt.log"
}

# Installs those of the named packages that are missing.
need() {
    local missing=() package
    for package; do
        installed "$package" || missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    [ "$(id -u)" -eq 0 ] || die "missing packages; as root: apt-get install ${missing[*]}"
    [ -n "$(candidate "${missing[0]}")" ] || update_lists
    say "installing ${missing[*]}"
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}" \
        >"$CACHE/apt.log" 2>&1 || die "apt-get install failed; see $CACHE/apt.log"
}

# Fetches package $1 into directory $2, unpacks it there as $2/root, and notes its version in $2/inputs.
fetch() {
    local package=$1 dir=$2 sandbox=()
    # apt drops its rights for downloads, to a user who may not write to our directory.
    [ "$(id -u)" -ne 0 ] || sandbox=(-o APT::Sandbox::User=root)
    [ -n "$(candidate "$package")" ] || update_lists
    [ -n "$(candidate "$package")" ] || die "no package $package here; Debian 12 (bookworm) has it"
    say "fetching $package $(candidate "$package")"
    if ! (cd "$dir" && apt-get "${sandbox[@]}" -qq download "$package" >"$CACHE/apt.log" 2>&1); then
        update_lists
        (cd "$dir" && apt-get "${sandbox[@]}" -qq download "$package" >"$CACHE/apt.log" 2>&1) ||
            die "fetching $package failed; see $CACHE/apt.log"
    fi
    dpkg-deb -x "$dir/$package"_*.deb "$dir/root"
    echo "package $package $(dpkg-deb -f "$dir/$package"_*.deb Version)" >>"$dir/inputs"
    rm -f "$dir/$package"_*.deb
}

# --- the cache ----------------------------------------------------------------------------------

# Makes a part unless the cache has it: runs `make_PART DIR`, which leaves its files in DIR/out.
part() {
    local name=$1 key=$2
    local kept=$CACHE/$name-$key work
    if [ -d "$kept" ] && ! outdated "$kept"; then
        return 0
    fi
    work=$(mktemp -d "$CACHE/tmp.$name.XXXXXX")
    # shellcheck disable=SC2064 # the directory of this call
    trap "rm -rf '$work'" EXIT
    mkdir "$work/out"
    : >"$work/inputs"
    "make_$name" "$work"
    (cd "$work/out" && sha256sum -- * >../sums)
    find "$work" -mindepth 1 -maxdepth 1 ! -name out ! -name inputs ! -name sums -exec rm -rf {} +
    rm -rf "$kept"
    mv "$work" "$kept"
    trap - EXIT
}

# With --update: whether the archive has another version of a package than the kept part came from.
outdated() {
    local package version
    [ "$update" = yes ] || return 1
    while read -r _ package version; do
        [ "$(candidate "$package")" = "$version" ] || return 0
    done < <(grep '^package ' "$1/inputs")
    # The cloud kernel's package has its version in its name.
    case $1 in
    */cloud-*) ! grep -q "^package $(cloud_package) " "$1/inputs" ;;
    *) return 1 ;;
    esac
}

# --- the parts ----------------------------------------------------------------------------------

cloud_package() {
    apt-cache depends linux-image-cloud-amd64 2>/dev/null | awk '$1 == "Depends:" { print $2; exit }'
}

# $1/out/{vmlinuz,vmlinux}-cloud
make_cloud() {
    local work=$1
    [ -n "$(cloud_package)" ] || update_lists
    fetch "$(cloud_package)" "$work"
    cp "$work"/root/boot/vmlinuz-* "$work/out/vmlinuz-cloud"
    need "${PACKAGES[@]}"
    say 'unpacking the cloud kernel'
    unpack_bzimage "$work/out/vmlinuz-cloud" "$work/out/vmlinux-cloud"
}

# Writes the ELF file that bzImage $1 carries to $2 (Documentation/arch/x86/boot.rst, payload_offset).
unpack_bzimage() {
    local image=$1 elf=$2 sectors offset length start magic size
    number() { od -An -t "u$3" -j "$2" -N "$3" "$1" | tr -d ' '; }
    sectors=$(number "$image" 497 1)
    offset=$(number "$image" 584 4)
    length=$(number "$image" 588 4)
    start=$(((sectors + 1) * 512 + offset))
    # The build appends the unpacked size, which no unpacker expects.
    dd if="$image" of="$elf.packed" bs=1M iflag=skip_bytes,count_bytes skip="$start" \
        count="$((length - 4))" status=none
    size=$(number "$image" "$((start + length - 4))" 4)
    magic=$(od -An -tx1 -N4 "$elf.packed" | tr -d ' ')
    case $magic in
    02214c18) lz4 -dqc "$elf.packed" >"$elf" ;;
    fd377a58) xz -dc "$elf.packed" >"$elf" ;;
    *) die "the cloud kernel is packed in a way unknown here (it begins with $magic)" ;;
    esac
    rm "$elf.packed"
    [ "$(stat -c %s "$elf")" -eq "$size" ] || die "the cloud kernel unpacks to a wrong size"
}

# $1/out/vmlinux
make_vmlinux() {
    build_kernel "$1" "$CONFIG" vmlinux '5 minutes'
    # Symbols are a tenth of the file, and the VMM has no use for them.
    strip -s -o "$1/out/vmlinux" "$1/build/vmlinux"
}

# $1/out/bzImage
make_bzimage() {
    build_kernel "$1" "$CONFIG-small" bzImage '1 minute'
    cp "$1/build/arch/x86/boot/bzImage" "$1/out/bzImage"
}

# Builds target $3 with configuration fragment $2 in $1/build; $4 is how long that takes on 2 cores.
build_kernel() {
    local work=$1 fragment=$2 target=$3 begin=$SECONDS job
    need "${PACKAGES[@]}"
    unpack_source "$work"
    configure "$work" "$fragment"
    say "building $target from $fragment (about $4 on 2 cores)"
    kernel_make "$work" -j"$(nproc)" "$target" &
    job=$!
    while kill -0 "$job" 2>/dev/null; do
        sleep 1
        [ $(((SECONDS - begin) % 20)) -ne 19 ] ||
            say "$(find "$work/build" -name '*.o' | wc -l) files compiled, $((SECONDS - begin)) s"
    done
    wait "$job" || exit 1
    say "built $target in $((SECONDS - begin)) s"
}

# The kernel's source as $1/source, from the installed package where there is one.
unpack_source() {
    local work=$1 archive=/usr/src/$SOURCE.tar.xz
    if installed "$SOURCE" && [ -f "$archive" ]; then
        echo "package $SOURCE $(dpkg-query -W -f '${Version}' "$SOURCE")" >>"$work/inputs"
    else
        fetch "$SOURCE" "$work"
        archive=$work/root$archive
    fi
    say 'unpacking the kernel source'
    mkdir "$work/source"
    tar -xf "$archive" -C "$work/source" --strip-components=1
}

kernel_make() {
    local work=$1
    shift
    # Fixed names and times: the same inputs give the same kernel.
    make -C "$work/source" O="$work/build" ARCH=x86_64 KBUILD_BUILD_USER=builder KBUILD_BUILD_HOST=debian \
        KBUILD_BUILD_TIMESTAMP='Thu Jan 1 00:00:00 UTC 2026' "$@" >>"$work/build.log" 2>&1 && return 0
    cp "$work/build.log" "$CACHE/failed.log"
    die "make $* failed; see $CACHE/failed.log"
}

# Puts fragment $2 over tinyconfig, and checks that every line of it held.
configure() {
    local work=$1 fragment=$2 line lost=()
    echo "config $fragment $(sha256sum "$fragment" | cut -c1-64)" >>"$work/inputs"
    mkdir "$work/build"
    kernel_make "$work" tinyconfig
    cat "$fragment" >>"$work/build/.config"
    kernel_make "$work" olddefconfig
    while read -r line; do
        case $line in
        CONFIG_*=n) ! grep -q "^${line%n}" "$work/build/.config" || lost+=("$line") ;;
        CONFIG_*) grep -qxF "$line" "$work/build/.config" || lost+=("$line") ;;
        esac
    done <"$fragment"
    [ ${#lost[@]} -eq 0 ] || die "$fragment: the kernel's configuration does not take ${lost[*]}"
}

# $1/out/initramfs.cpio
make_initramfs() {
    local work=$1 test
    fetch busybox-static "$work"
    say 'packing the initramfs'
    inode=0
    {
        for dir in bin dev proc sys tests tmp etc; do
            entry "$dir" 040755
        done
        # The kernel opens it for /init before devtmpfs is there.
        entry dev/console 020600 - 5 1
        entry bin/busybox 0100755 "$work/root/bin/busybox"
        entry init 0100755 $GUEST/init
        entry etc/shellrc 0100644 $GUEST/shellrc
        for test in "$GUEST"/tests/*.sh; do
            entry "tests/$(basename "$test" .sh)" 0100755 "$test"
        done
        inode=0
        entry 'TRAILER!!!' 0
    } >"$work/out/initramfs.cpio"
}

# Writes one entry of a cpio archive in the kernel's format (driver-api/early-userspace/buffer-format):
# name, octal mode, file with the contents or -, device numbers. Unlike cpio it needs no root for a
# device, and leaves out times and owners, so that the same files give the same archive.
entry() {
    local name=$1 mode=$2 file=${3:--} size=0
    inode=$((inode + 1))
    [ "$file" = - ] || size=$(stat -c %s "$file")
    printf '070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X' \
        "$inode" "$((mode))" 0 0 1 0 "$size" 0 0 "${4:-0}" "${5:-0}" "$((${#name} + 1))" 0
    # The header is 110 bytes; name and contents are filled up to 4.
    printf '%s\0' "$name"
    fill $((110 + ${#name} + 1))
    [ "$file" = - ] || cat "$file"
    fill "$size"
}

fill() { head -c $(((4 - $1 % 4) % 4)) /dev/zero; }

# $1/out/debian.raw: the essential packages and sysvinit, 320 MiB with holes.
make_debian() {
    local work=$1 image=$1/out/debian.raw tree=$1/tree sectors
    [ "$(id -u)" -eq 0 ] || die 'files of other owners are needed for the Debian disk; run this as root once'
    need "${IMAGE_PACKAGES[@]}"
    say "unpacking Debian $SUITE (about 1 minute)"
    mmdebstrap --quiet --mode=root --variant=essential --include=sysvinit-core --format=directory \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' \
        "$SUITE" "$tree" >"$CACHE/mmdebstrap.log" 2>&1 || die "mmdebstrap failed; see $CACHE/mmdebstrap.log"
    dpkg-query --admindir="$tree/var/lib/dpkg" -W -f 'package ${Package} ${Version}\n' >>"$work/inputs"
    cp "$GUEST/debian/inittab" "$tree/etc/inittab"
    install -m 755 "$GUEST/debian/ch-root-disk" "$tree/usr/local/sbin/"

    truncate -s 320M "$image"
    printf 'label: gpt\n2048,,L\n' | /sbin/sfdisk -q "$image"
    sectors=$(/sbin/sfdisk -d "$image" | sed -n 's/.*size= *\([0-9]*\).*/\1/p')
    /sbin/mkfs.ext4 -q -b 4096 -E offset=1048576 -d "$tree" "$image" $((sectors / 2))k
}

# --- all together -------------------------------------------------------------------------------

# Whether the files are there as the manifest says, from the inputs of this tree.
current() {
    grep -qxF "inputs $1" "$ASSETS/manifest" 2>/dev/null && intact
}

intact() {
    (cd "$ASSETS" && sed -n 's/^sha256 //p' manifest | sha256sum --status --strict -c - 2>/dev/null)
}

main() {
    local inputs vmlinux bzimage cloud initramfs debian dir file
    update=no
    [ $# -le 1 ] || die "$USAGE"
    case ${1:-} in
    '') ;;
    --update) update=yes ;;
    --verify)
        [ -f "$ASSETS/manifest" ] || die "no manifest in $ASSETS"
        intact || die "the files in $ASSETS differ from its manifest"
        say "the files in $ASSETS are as the manifest says"
        return
        ;;
    -h | --help)
        usage_text
        return
        ;;
    *) die "$USAGE" ;;
    esac

    vmlinux=$(hash_of "$CONFIG" -- vmlinux "$SOURCE")
    bzimage=$(hash_of "$CONFIG-small" -- bzimage "$SOURCE")
    cloud=$(hash_of -- cloud)
    initramfs=$(hash_of "$GUEST/init" "$GUEST/shellrc" "$GUEST"/tests/*.sh -- initramfs)
    debian=$(hash_of "$GUEST"/debian/* -- debian "$SUITE")
    inputs=$(hash_of "$GUEST/cmdline" "$GUEST/cmdline-cloud" -- \
        "$vmlinux $bzimage $cloud $initramfs $debian")
    if [ $update = no ] && current "$inputs"; then
        return
    fi

    command -v apt-get >/dev/null || die 'this needs Debian (apt-get is missing)'
    mkdir -p "$CACHE" "$ASSETS"
    exec 9>"$CACHE/lock"
    flock -n 9 || { say 'waiting for another run'; flock 9; }
    if [ $update = yes ] && [ "$(id -u)" -eq 0 ]; then
        update_lists
    fi
    # Left by runs that were killed.
    rm -rf "$CACHE"/tmp.*

    part initramfs "$initramfs"
    part debian "$debian"
    part cloud "$cloud"
    part bzimage "$bzimage"
    part vmlinux "$vmlinux"

    # Each file appears whole, the manifest last.
    rm -f "$ASSETS/manifest"
    {
        echo "inputs $inputs"
        for dir in "initramfs-$initramfs" "debian-$debian" "cloud-$cloud" "bzimage-$bzimage" "vmlinux-$vmlinux"; do
            cat "$CACHE/$dir/inputs"
            sed 's/^/sha256 /' "$CACHE/$dir/sums"
            for file in "$CACHE/$dir/out"/*; do
                put "$file"
            done
        done
        for file in cmdline cmdline-cloud; do
            put "$GUEST/$file"
            (cd "$GUEST" && sha256sum "$file" | sed 's/^/sha256 /')
        done
    } >"$CACHE/manifest"
    put "$CACHE/manifest"
    intact || die "the files in $ASSETS differ from what was built"
    say "ready in $ASSETS"
}

put() {
    cp --reflink=auto "$1" "$ASSETS/.new"
    mv "$ASSETS/.new" "$ASSETS/$(basename "$1")"
}

main "$@"

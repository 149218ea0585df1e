#!/usr/bin/env bash
# QEMU behind the part of our command line that performance-metrics uses, so that it can be the other VMM:
#
#   performance-metrics target/release/cloud-hypervisor --other scripts/qemu.sh
#
# Devices are virtio on PCI, disks have an I/O thread and io_uring, as a person would have them who wants QEMU to be fast.
set -euo pipefail

readonly QEMU=${QEMU:-qemu-system-x86_64}

die() {
    printf 'qemu.sh: %s\n' "$*" >&2
    exit 1
}

# Two flags that KVM may not have for a guest keep QEMU from starting where it is software.
qemu=("$QEMU" -nodefaults -no-user-config -no-reboot -display none -monitor none
    -accel kvm -cpu 'host,-arch-capabilities')
machine=microvm,acpi=on
devices=()

# value LIST KEY [DEFAULT]: of key=value,key=value.
value() {
    local item
    local IFS=,
    for item in $1; do
        if [ "${item%%=*}" = "$2" ]; then
            printf '%s' "${item#*=}"
            return
        fi
    done
    printf '%s' "${3:-}"
}

disk() {
    local path format cache=off queues
    path=$(value "$1" path)
    queues=$(value "$1" num_queues 1)
    [ -n "$path" ] || die "--disk $1: path is missing"
    [ "$(value "$1" direct off)" != on ] || cache=on
    format=$(value "$1" image_type)
    if [ -z "$format" ]; then
        # qcow2 images begin with these bytes.
        if [ "$(head -c 3 "$path" | od -An -c | tr -d ' ')" = QFI ]; then format=qcow2; else format=raw; fi
    fi
    machine=q35
    devices+=(-object "iothread,id=io"
        -blockdev "driver=file,node-name=f,filename=$path,aio=io_uring,cache.direct=$cache"
        -blockdev "driver=$format,node-name=d,file=f,cache.direct=$cache"
        -device "virtio-blk-pci,disable-legacy=on,drive=d,iothread=io,num-queues=$queues,queue-size=$(value "$1" queue_size 128)")
}

net() {
    local name
    name=$(value "$1" tap)
    machine=q35
    devices+=(-netdev "tap,id=n,script=$(realpath "$0"),downscript=no,vhost=off${name:+,ifname=$name}"
        -device 'virtio-net-pci,disable-legacy=on,netdev=n,rx_queue_size=256,tx_queue_size=256')
}

# QEMU calls this script, too, with the tap that it made.
if [ $# -eq 1 ]; then
    exec ip link set "$1" up
fi

while [ $# -gt 0 ]; do
    option=$1
    shift
    [ $# -gt 0 ] || die "$option needs a value"
    case $option in
    --kernel) qemu+=(-kernel "$1") ;;
    --cmdline) qemu+=(-append "$1") ;;
    --cpus) qemu+=(-smp "$(value "$1" boot 1)") ;;
    --memory) qemu+=(-m "$(value "$1" size 512M)") ;;
    --serial)
        [ "$1" = tty ] || die "--serial $1: tty is possible"
        qemu+=(-serial stdio)
        ;;
    --console) [ "$1" = off ] || die "--console $1: off is possible" ;;
    --disk) disk "$1" ;;
    --net) net "$1" ;;
    --rng)
        machine=q35
        devices+=(-object "rng-random,id=r,filename=$(value "$1" src /dev/urandom)"
            -device "virtio-rng-pci,disable-legacy=on,rng=r")
        ;;
    *) die "$option is not known to this script" ;;
    esac
    shift
done

if [ "$machine" = q35 ]; then
    machine+=,kernel-irqchip=split
fi
exec "${qemu[@]}" -machine "$machine" "${devices[@]}"

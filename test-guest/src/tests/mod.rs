//! The tests, one file a topic. A test takes nothing and answers with a detail for its `OK` line or the reason it failed.

mod acpi;
mod api;
mod boot;
mod firmware;
mod insn;
mod irq;
mod pattern;
mod pci;
mod pci_bar;
mod ports;
mod pvpanic;
mod smp;
mod virtio_balloon;
mod virtio_blk;
mod virtio_data;
mod virtio_hostile;
mod virtio_iommu;
mod virtio_mem;
mod virtio_mmio;
mod virtio_net;
mod virtio_net_ufo;
mod virtio_net_user;
mod virtio_pmem;
mod virtio_reset;
mod virtio_rng;
mod virtio_transport;
mod virtio_vsock;
mod virtio_watchdog;

use crate::bench;
use crate::cpu::cpl3;
use crate::line;
use crate::outcome::{Outcome, Reason, ensure, same};

/// A name and what it runs.
type Test = (&'static str, fn() -> Outcome);

const TESTS: &[Test] = &[
    ("boot", boot::boot),
    ("firmware", firmware::firmware),
    ("memory", boot::memory),
    ("initramfs", boot::initramfs),
    ("acpi", acpi::acpi),
    ("cpuid", acpi::cpuid_leaves),
    ("cmos", ports::cmos_registers),
    ("cmos_advances", ports::cmos_advances),
    ("ports", ports::ports),
    ("pm_timer", ports::pm_timer),
    ("ioapic", irq::ioapic),
    ("echo", irq::echo),
    ("timer", irq::timer),
    ("clock", irq::clock),
    ("nmi", api::nmi),
    ("latency", irq::latency),
    ("smp", smp::processors),
    ("instructions", insn::instructions),
    ("syscall", insn::syscall),
    ("pci", pci::pci),
    ("pci_bar_move", pci_bar::moves),
    ("pci_bar_hostile", pci_bar::hostile),
    ("pvpanic", pvpanic::pvpanic),
    ("virtio_rng", virtio_rng::rng),
    ("virtio_msix", virtio_rng::msix),
    ("virtio_transport", virtio_transport::transport),
    ("virtio_strict", virtio_transport::strict),
    ("virtio_blk", virtio_blk::blk),
    ("virtio_blk_fill", virtio_data::fill),
    ("virtio_blk_verify", virtio_data::verify),
    ("virtio_blk_reset", virtio_reset::reset),
    ("virtio_blk_resize", api::resize),
    ("virtio_blk_hostile", virtio_hostile::hostile),
    ("virtio_vsock", virtio_vsock::vsock),
    ("virtio_vsock_left", virtio_vsock::left),
    ("virtio_vsock_bulk", virtio_vsock::bulk),
    ("virtio_balloon", virtio_balloon::balloon),
    ("virtio_balloon_reporting", virtio_balloon::reporting),
    ("virtio_balloon_hostile", virtio_balloon::hostile),
    ("virtio_mem", virtio_mem::mem),
    ("virtio_mem_dma", virtio_mem::dma),
    ("virtio_mem_hostile", virtio_mem::hostile),
    ("virtio_pmem", virtio_pmem::pmem),
    ("virtio_pmem_dma", virtio_pmem::dma),
    ("virtio_iommu", virtio_iommu::iommu),
    ("virtio_iommu_bypass", virtio_iommu::bypass),
    ("virtio_watchdog", virtio_watchdog::watchdog),
    ("virtio_watchdog_silence", virtio_watchdog::silence),
    ("virtio_net", virtio_net::net),
    ("virtio_net_ufo", virtio_net_ufo::ufo),
    ("virtio_net_user", virtio_net_user::user),
    ("virtio_mmio_rng", virtio_mmio::rng),
    ("virtio_mmio_blk", virtio_mmio::blk),
    ("bench_blk", bench::blk::run),
    ("bench_rng", bench::rng::run),
    ("bench_vsock_tx", bench::vsock::transmit),
    ("bench_vsock_rx", bench::vsock::receive),
    ("bench_net_tx", bench::net::transmit),
    ("bench_net_rx", bench::net::receive),
    ("bench_net_echo", bench::net::echo),
];

/// Runs the body of a test at CPL 3, where it is native.
pub fn at_cpl3(body: fn() -> Outcome) -> Outcome {
    struct Call {
        body: fn() -> Outcome,
        outcome: Outcome,
    }
    extern "C" fn go(at: u64) -> u64 {
        // SAFETY: `at` points at the call that `at_cpl3` keeps on its stack meanwhile.
        let call = unsafe { &mut *(at as *mut Call) };
        call.outcome = (call.body)();
        0
    }
    let mut call = Call {
        body,
        outcome: Ok(()),
    };
    cpl3::run(go, &raw mut call as u64);
    call.outcome
}

/// Runs the tests named in a `,`-separated list; how many failed, unknown names included.
pub fn run(names: &str) -> u32 {
    let mut failed = 0;
    for name in names.split(',') {
        line!("BEGIN {name}");
        let outcome = match TESTS.iter().find(|t| t.0 == name) {
            Some((_, test)) => test(),
            None => Err(Reason("no such test", 0, 0)),
        };
        match outcome {
            Ok(()) => line!("OK {name}"),
            Err(Reason(why, got, wanted)) => {
                failed += 1;
                line!("FAIL {name} {why}: got {got:#x}, wanted {wanted:#x}");
            }
        }
    }
    failed
}

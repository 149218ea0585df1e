//! The API: a VM's life by `ch-remote` and by HTTP, and what the guest notices of it.

use std::fs;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use vmm::api::client;

use crate::linux::Linux;
use crate::support::report::finish;
use crate::support::{BareMetal, Kvm, Report, Vmm, pause_to_the_end, test_guest};

/// A directory with the socket of an API.
struct Api {
    directory: tempfile::TempDir,
    socket: PathBuf,
}

impl Api {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("api.sock");
        Self { directory, socket }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A VMM without a VM, and its API, which answers.
    fn start(&self) -> Vmm {
        let vmm = Vmm::builder().option("--api-socket", &self.socket).start();
        self.wait();
        vmm
    }

    /// Waits until something listens.
    fn wait(&self) {
        while std::os::unix::net::UnixStream::connect(&self.socket).is_err() {
            std::thread::yield_now();
        }
    }

    fn remote(&self, words: &[&str], input: &str) -> Output {
        let mut child = Command::new(env!("CARGO_BIN_EXE_ch-remote"))
            .arg("--api-socket")
            .arg(&self.socket)
            .args(words)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // It may not want to read it.
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        child.wait_with_output().unwrap()
    }

    /// A command that succeeds; what it printed.
    fn works(&self, words: &[&str]) -> String {
        self.works_with(words, "")
    }

    fn works_with(&self, words: &[&str], input: &str) -> String {
        let output = self.remote(words, input);
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        assert_eq!(text(&output.stderr), "", "{words:?}");
        assert_eq!(output.status.code(), Some(0), "{words:?}");
        text(&output.stdout)
    }

    /// A command that is refused; the line that says why.
    fn refuses(&self, words: &[&str], input: &str) -> String {
        let output = self.remote(words, input);
        assert_eq!(output.status.code(), Some(1), "{words:?}");
        assert_eq!(output.stdout, b"", "{words:?}");
        let line = String::from_utf8(output.stderr).unwrap();
        let line = line.strip_suffix('\n').unwrap();
        assert!(!line.contains('\n'), "{line:?}");
        line.strip_prefix("ch-remote: ").unwrap().to_owned()
    }

    fn json(&self, words: &[&str]) -> serde_json::Value {
        serde_json::from_str(&self.works(words)).unwrap()
    }

    fn state(&self) -> String {
        self.json(&["info"])["state"].as_str().unwrap().to_owned()
    }
}

/// The bare-metal guest with these tests, as a client of the API writes it.
fn config(tests: &str) -> String {
    serde_json::json!({
        "cpus": {"boot_vcpus": 2, "max_vcpus": 2},
        "memory": {"size": 128 << 20},
        "payload": {"kernel": test_guest(), "cmdline": format!("test={tests} cpus=2")},
        "serial": {"mode": "Tty"},
        "console": {"mode": "Off"},
    })
    .to_string()
}

fn threads(vmm: &Vmm) -> Vec<String> {
    fs::read_dir(format!("/proc/{}/task", vmm.pid()))
        .unwrap()
        .filter_map(|task| fs::read_to_string(task.unwrap().path().join("comm")).ok())
        .map(|name| name.trim_end().to_owned())
        .collect()
}

#[test]
fn the_life_of_a_vm() {
    let Some(_kvm) = Kvm::here() else { return };
    let api = Api::new();
    let mut vmm = api.start();
    let mode = fs::metadata(&api.socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o077, 0, "for its owner alone");
    let ping = api.json(&["ping"]);
    assert_eq!(ping["pid"], vmm.pid());
    for command in ["info", "boot", "pause", "counters", "delete"] {
        assert!(api.refuses(&[command], "").contains("there is no VM"));
    }

    api.works_with(&["create", "-"], &config("echo"));
    assert_eq!(api.state(), "Created");
    assert!(
        api.refuses(&["create"], &config("echo"))
            .contains("there is one already")
    );
    for command in [
        "pause",
        "resume",
        "shutdown",
        "reboot",
        "counters",
        "nmi",
        "power-button",
    ] {
        assert!(
            api.refuses(&[command], "").contains("the VM is Created"),
            "{command}"
        );
    }

    api.works(&["boot"]);
    vmm.wait_for("READY\r\n");
    assert!(api.refuses(&["boot"], "").contains("the VM is Running"));
    let info = api.json(&["info"]);
    assert_eq!(info["state"], "Running");
    assert_eq!(info["memory_actual_size"], 128 << 20);
    assert_eq!(info["config"]["cpus"]["boot_vcpus"], 2);
    assert_eq!(info["device_tree"]["_rng"]["pci_bdf"], "0000:00:01.0");
    let counters = api.json(&["counters"]);
    assert!(
        counters["vcpu0"].is_object() && counters["vcpu1"].is_object(),
        "{counters}"
    );

    api.works(&["pause"]);
    assert_eq!(api.state(), "Paused");
    // Nobody is left who could run the guest, or serve its devices.
    let names = threads(&vmm);
    assert!(
        !names.iter().any(|name| name.starts_with("vcpu")),
        "{names:?}"
    );
    assert!(api.json(&["counters"])["vcpu0"].is_object());
    assert!(api.refuses(&["pause"], "").contains("the VM is Paused"));
    vmm.send("typed at a guest that is held\n");
    api.works(&["ping"]);
    assert!(!vmm.said("ECHO"));
    api.works(&["resume"]);
    vmm.wait_for("ECHO TYPED AT A GUEST THAT IS HELD\r\n");

    api.works(&["reboot"]);
    vmm.wait_for("HELLO test-guest\r\n");
    vmm.wait_for("READY\r\n");
    // A paused one starts anew, too.
    api.works(&["pause"]);
    api.works(&["reboot"]);
    vmm.wait_for("READY\r\n");
    assert_eq!(api.state(), "Running");

    api.works(&["shutdown"]);
    assert_eq!(api.state(), "Shutdown");
    assert!(
        api.refuses(&["shutdown"], "")
            .contains("the VM is Shutdown")
    );
    api.works(&["boot"]);
    vmm.wait_for("READY\r\n");
    api.works(&["delete"]);
    assert!(api.refuses(&["info"], "").contains("there is no VM"));

    api.works(&["shutdown-vmm"]);
    vmm.wait().expect_clean();
    assert!(!api.socket.exists());
    assert!(api.refuses(&["ping"], "").contains("connecting to"));
}

#[test]
fn configurations_that_cannot_be() {
    let Some(_kvm) = Kvm::here() else { return };
    let api = Api::new();
    let vmm = api.start();
    let broken = config("boot").replace("\"boot_vcpus\":2", "\"boot_vcpus\":3");
    for (body, wanted) in [
        ("", "the body cannot be understood"),
        ("{}", "--kernel: missing"),
        (broken.as_str(), "--cpus: max=2 is wrong"),
        (r#"{"colour": "red"}"#, "unknown field `colour`"),
        (r#"{"tpm": {"socket": "/t"}}"#, "tpm is not built yet"),
    ] {
        let line = api.refuses(&["create"], body);
        assert!(line.contains(wanted), "{line}");
    }
    // What only the host knows comes out when it is booted; then it can be corrected.
    let missing =
        serde_json::json!({"payload": {"kernel": api.file("none")}, "console": {"mode": "Off"}});
    api.works_with(&["create"], &missing.to_string());
    let line = api.refuses(&["boot"], "");
    assert!(line.contains("booting the VM: --kernel: opening"), "{line}");
    assert!(
        line.ends_with("No such file or directory (os error 2)"),
        "{line}"
    );
    assert_eq!(api.state(), "Created");
    api.works(&["delete"]);
    api.works_with(&["create"], &config("boot"));
    api.works(&["boot"]);
    // A guest that powers off ends the VMM, however it was started.
    let ended = vmm.wait().expect_clean();
    Report::parse(&ended.out).unwrap().expect(&["boot"]);
    assert!(!api.socket.exists());
}

#[test]
fn status_codes_as_curl_sees_them() {
    let Some(_kvm) = Kvm::here() else { return };
    let api = Api::new();
    let vmm = api.start();
    let curl = |method: &str, path: &str, body: &str| -> String {
        let output = Command::new("curl")
            .args([
                "--silent",
                "--show-error",
                "--max-time",
                "60",
                "--write-out",
                " %{http_code}",
            ])
            .arg("--unix-socket")
            .arg(&api.socket)
            .args(["--request", method, "--data", body])
            .arg(format!("http://localhost/api/v1/{path}"))
            .output()
            .expect("curl");
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(curl("GET", "vmm.ping", "").ends_with(" 200"));
    assert!(curl("GET", "vm.info", "").ends_with(" 404"));
    assert!(curl("GET", "vm.inf", "").ends_with(" 404"));
    assert!(curl("PUT", "vm.snapshot", "{}").ends_with("not built yet in this version\"] 404"));
    assert!(curl("POST", "vmm.ping", "").ends_with(" 400"));
    assert!(curl("PUT", "vm.create", "{").ends_with(" 400"));
    assert_eq!(curl("PUT", "vm.create", &config("boot")), " 204");
    assert!(curl("PUT", "vm.pause", "").ends_with(" 405"));
    assert!(curl("PUT", "vm.resize-disk", r#"{"id":"a","desired_size":1}"#).ends_with(" 405"));
    // A body that curl asks leave to send.
    let long = config("boot").replace("cpus=2", &format!("cpus=2 {}", "x".repeat(60_000)));
    assert_eq!(curl("PUT", "vm.delete", ""), " 204");
    assert_eq!(curl("PUT", "vm.create", &long), " 204");
    assert_eq!(curl("PUT", "vmm.shutdown", ""), " 204");
    vmm.wait().expect_clean();
}

#[test]
fn pauses_lose_nothing_of_what_a_disk_does() {
    let Some(kvm) = Kvm::here() else { return };
    let api = Api::new();
    let disk = api.file("disk");
    fs::write(&disk, vec![0; 4 << 20]).unwrap();
    let tests = ["virtio_blk_fill", "virtio_blk_verify"];
    let vmm = BareMetal::new(kvm)
        .cpus(2)
        .builder(&tests)
        .option("--disk", format!("path={},num_queues=2", disk.display()))
        .option("--api-socket", &api.socket)
        .start();
    api.wait();
    let pauses = pause_to_the_end(&api.socket);
    finish(vmm.wait(), &tests);
    assert!(pauses > 3, "{pauses}");
}

#[test]
fn a_disk_grows_under_the_guest() {
    let Some(kvm) = Kvm::here() else { return };
    for format in ["raw", "qcow2"] {
        let api = Api::new();
        let disk = api.file("disk");
        let status = Command::new("qemu-img")
            .args(["create", "-q", "-f", format])
            .arg(&disk)
            .arg("1M")
            .status()
            .expect("qemu-img");
        assert!(status.success());
        let mut vmm = BareMetal::new(kvm)
            .word("blk_wanted=6144")
            .builder(&["virtio_blk_resize"])
            .option(
                "--disk",
                format!("path={},image_type={format},id=d", disk.display()),
            )
            .option("--api-socket", &api.socket)
            .start();
        vmm.wait_for("READY\r\n");
        let line = api.refuses(&["resize-disk", "--disk", "e", "--size", "3M"], "");
        assert!(line.contains("there is none with id \"e\""), "{line}");
        let line = api.refuses(&["resize-disk", "--disk", "d", "--size", "3X"], "");
        assert!(line.contains("--size"), "{line}");
        api.works(&["resize-disk", "--disk", "d", "--size", "3M"]);
        finish(vmm.wait(), &["virtio_blk_resize"]);
        if format == "raw" {
            assert_eq!(fs::metadata(&disk).unwrap().len(), 3 << 20);
        }
    }
}

#[test]
fn resizing_what_is_not_there() {
    let Some(kvm) = Kvm::here() else { return };
    let api = Api::new();
    let mut vmm = BareMetal::new(kvm)
        .builder(&["echo"])
        .option("--api-socket", &api.socket)
        .start();
    vmm.wait_for("READY\r\n");
    for (words, wanted) in [
        (["resize", "--cpus", "2"], "desired_vcpus is not built yet"),
        (["resize", "--memory", "1G"], "resizing the VM"),
        (["resize", "--balloon", "1M"], "--balloon"),
    ] {
        let line = api.refuses(&words, "");
        assert!(line.contains(wanted), "{line}");
    }
    assert!(
        api.refuses(&["resize"], "")
            .contains("--cpus, --memory and --balloon")
    );
    vmm.send("quit\n");
    finish(vmm.wait(), &["echo"]);
}

#[test]
fn a_non_maskable_interrupt() {
    let Some(kvm) = Kvm::here() else { return };
    let api = Api::new();
    let mut vmm = BareMetal::new(kvm)
        .builder(&["nmi"])
        .option("--api-socket", &api.socket)
        .start();
    vmm.wait_for("READY\r\n");
    api.works(&["nmi"]);
    finish(vmm.wait(), &["nmi"]);
}

#[test]
fn linux_hears_the_power_button() {
    let Some(kvm) = Kvm::here() else { return };
    let api = Api::new();
    let socket = api.socket.to_str().unwrap().to_owned();
    let mut vmm = Linux::new(kvm)
        .option("--api-socket", socket)
        .start("ch.test=button");
    vmm.wait_for("CH-BUTTON: waiting");
    api.works(&["power-button"]);
    vmm.wait_for("CH-BUTTON: 0100740001000000");
    Linux::finish(vmm, "button");
}

#[test]
fn sockets_that_cannot_be() {
    let Some(kvm) = Kvm::here() else { return };
    let api = Api::new();
    let occupied = UnixListener::bind(&api.socket).unwrap();
    let refuses = |text: &str, wanted: &str| {
        let ended = BareMetal::new(kvm)
            .builder(&["boot"])
            .option("--api-socket", text)
            .start()
            .wait();
        assert_eq!(ended.out, "");
        let line = ended.expect_refusal();
        assert!(
            line.starts_with("--api-socket: ") && line.contains(wanted),
            "{line}"
        );
    };
    let path = api.socket.to_str().unwrap();
    refuses(path, "in use");
    drop(occupied);
    refuses(path, "there already");
    refuses(&format!("path={path}"), "there already");
    refuses("/nowhere/at/all", "No such file");
    refuses(&"x".repeat(200), "making");
    refuses("fd=0", "fd=N is allowed");
    refuses("fd=99", "no listening UNIX socket");
    assert!(api.socket.exists(), "what was there stays");
}

#[test]
#[allow(unsafe_code)]
fn an_inherited_socket() {
    let Some(kvm) = Kvm::here() else { return };
    let api = Api::new();
    let listener = UnixListener::bind(&api.socket).unwrap();
    let fd = listener.as_raw_fd();
    // SAFETY: clears a flag of a descriptor of ours, so that the child gets it.
    assert_eq!(unsafe { libc::fcntl(fd, libc::F_SETFD, 0) }, 0);
    let mut vmm = BareMetal::new(kvm)
        .builder(&["echo"])
        .option("--api-socket", format!("fd={fd}"))
        .start();
    drop(listener);
    vmm.wait_for("READY\r\n");
    assert_eq!(api.json(&["ping"])["pid"], vmm.pid());
    api.works(&["shutdown-vmm"]);
    vmm.wait().expect_clean();
    assert!(api.socket.exists(), "it is another's");
}

#[test]
#[allow(unsafe_code)]
fn the_default_socket_comes_and_goes() {
    let Some(kvm) = Kvm::here() else { return };
    let mut vmm = BareMetal::new(kvm).start(&["echo"]);
    vmm.wait_for("READY\r\n");
    // SAFETY: reads the user's number.
    let directory = match unsafe { libc::geteuid() } {
        0 => "/run".to_owned(),
        user => format!("/run/user/{user}"),
    };
    if !Path::new(&directory).is_dir() {
        println!("skipped: no {directory}");
        return;
    }
    let socket = Path::new(&directory).join(format!("cloud-hypervisor.{}", vmm.pid()));
    client::request(&socket, "GET", "vmm.ping", None).unwrap();
    vmm.signal(libc::SIGTERM);
    vmm.wait().expect_clean();
    assert!(!socket.exists());
}

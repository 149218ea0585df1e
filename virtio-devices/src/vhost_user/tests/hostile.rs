//! Back ends that break the rules, or hold the front end up.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use proptest::prelude::*;

use super::*;

/// What the front end finds wrong with a script that speaks to it.
fn scripted(script: impl FnOnce(UnixStream) + Send + 'static) -> String {
    outcome(script).expect_err("the back end is taken")
}

fn outcome(script: impl FnOnce(UnixStream) + Send + 'static) -> Result<(), String> {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let listener = UnixListener::bind(&socket).unwrap();
    let thread = std::thread::spawn(move || script(listener.accept().unwrap().0));
    let (config, _) = config(&socket, 1);
    let made = VhostUserBlock::<TestMemory>::new(config, false);
    let error = made.map(drop).err();
    thread.join().unwrap();
    let Some(error) = error else { return Ok(()) };
    let mut text = error.to_string().replace(socket.to_str().unwrap(), "S");
    if let Some(source) = std::error::Error::source(&error) {
        text += &format!(": {source}");
    }
    Err(text)
}

fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(payload.len()).unwrap();
    let words = [request, flags, size].map(u32::to_ne_bytes);
    [&words.concat(), payload].concat()
}

const REPLY: u32 = 5;
const GET_FEATURES: u32 = 1;

#[test]
fn nobody_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let error = |socket: &Path| {
        let (config, _) = config(socket, 1);
        let error = VhostUserBlock::<TestMemory>::new(config, false)
            .err()
            .unwrap();
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert!(error.to_string().starts_with("connecting to"), "{error}");
        source
    };
    assert!(error(&socket).contains("No such file"));
    drop(UnixListener::bind(&socket).unwrap());
    assert!(error(&socket).contains("refused"));
    assert!(!error(Path::new(&format!("/{}", "x".repeat(200)))).is_empty());
}

#[test]
fn it_hangs_up_at_once() {
    let error = scripted(drop);
    assert!(
        error.starts_with(r#"the vhost-user back end at "S" does not say what it can do: "#),
        "{error}"
    );
}

#[test]
fn its_answers_are_none() {
    for answer in [
        vec![],
        vec![0],
        vec![0xff; 20],
        message(GET_FEATURES, REPLY, &[]),
        // To another question, no answer, of another version.
        message(2, REPLY, &[0; 8]),
        message(GET_FEATURES, 1, &[0; 8]),
        message(GET_FEATURES, 4, &[0; 8]),
        message(GET_FEATURES, REPLY, &[0xff; 4096]),
        message(GET_FEATURES, REPLY, &[0; 7]),
        vec![0xff; 100_000],
    ] {
        scripted(move |mut stream| {
            stream.read_exact(&mut [0; 12]).unwrap();
            // It may have closed the socket by then.
            let _ = stream.write_all(&answer);
        });
    }
}

#[test]
fn it_lacks_what_a_disk_needs() {
    let lacks = |change: fn(&mut Manner)| {
        let mut manner = Manner::default();
        change(&mut manner);
        let server = Server::new(8, manner);
        refused(&server, 1, false).replace(server.socket.to_str().unwrap(), "S")
    };
    let with = |what: &str| format!(r#"the vhost-user back end at "S" {what}"#);
    assert_eq!(
        lacks(|manner| manner.hidden = VERSION_1),
        with("has no VIRTIO_F_VERSION_1")
    );
    assert_eq!(
        lacks(|manner| manner.protocol = VhostUserProtocolFeatures::MQ),
        with("has no configuration space")
    );
    assert_eq!(
        lacks(|manner| manner.hidden = connection::PROTOCOL_FEATURES),
        with("has no configuration space")
    );
    let manner = Manner {
        queues: 4,
        hidden: 1 << 12,
        ..Manner::default()
    };
    let error = refused(&Server::new(8, manner), 4, false);
    assert!(
        error.ends_with("serves 1 queues, and num_queues is 4"),
        "{error}"
    );
}

#[test]
fn it_does_not_answer() {
    let slow = |socket: &Path| {
        let (mut config, _) = config(socket, 1);
        config.patience = Duration::from_millis(200);
        let error = VhostUserBlock::<TestMemory>::new(config, false).err();
        let error = error.unwrap().to_string();
        error.replace(socket.to_str().unwrap(), "S")
    };
    // To nothing: it listens, and accepts nobody.
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let _listener = UnixListener::bind(&socket).unwrap();
    assert_eq!(
        slow(&socket),
        r#"the vhost-user back end at "S" does not say what it can do within 200ms"#
    );
    // With a part of the configuration.
    let manner = Manner {
        short_config: 1,
        ..Manner::default()
    };
    let server = Server::new(8, manner);
    assert_eq!(
        slow(&server.socket),
        r#"the vhost-user back end at "S" does not tell its configuration within 200ms"#
    );
}

/// Starts a device whose back end is like that.
fn starts(manner: Manner) -> (Server, Guest, Losses) {
    let server = Server::new(8, manner);
    let (mut config, losses) = config(&server.socket, 1);
    config.patience = Duration::from_secs(3);
    let device = VhostUserBlock::new(config, false).unwrap();
    let mut guest = Guest::with_memory(Box::new(device), shared_memory());
    let offered = guest.core.registers().offered_features();
    assert!(guest.negotiate(offered));
    guest.set_up_queues();
    guest.driver_ok();
    (server, guest, losses)
}

#[test]
fn it_refuses_guest_memory() {
    let (_server, guest, losses) = starts(Manner {
        refuses_memory: true,
        ..Manner::default()
    });
    assert!(asks_for_reset(&guest));
    assert_eq!(losses.lock().unwrap().len(), 1);
    let why = losses.lock().unwrap()[0].clone();
    assert!(why.ends_with("does not take guest memory"), "{why}");
}

#[test]
fn it_says_something_else_on_its_channel() {
    let (_server, mut guest, losses) = starts(Manner {
        talks: true,
        ..Manner::default()
    });
    assert_eq!(guest.ask(0, &read(1, 512))[..512], [2; 512]);
    assert!(!asks_for_reset(&guest));
    assert!(losses.lock().unwrap().is_empty());
}

#[test]
fn it_lies_about_how_far_it_is() {
    for base in [0, 2, 500, 0x1_0000, u32::MAX] {
        let (server, mut guest, losses) = starts(Manner {
            base: Some(base),
            ..Manner::default()
        });
        assert_eq!(guest.ask(0, &read(1, 512))[..512], [2; 512]);
        guest.core.pause().unwrap();
        assert!(asks_for_reset(&guest), "{base}");
        let why = losses.lock().unwrap()[0].clone();
        assert!(
            why.ends_with("stopped queue 0 with requests in it"),
            "{why}"
        );
        guest.core.resume().unwrap();
        assert!(!guest.core.is_active());
        // With a back end that does not it works again.
        server.change(|manner| manner.base = None);
        guest.reset();
        guest.start(u64::MAX);
        assert_eq!(guest.ask(0, &read(2, 512))[..512], [3; 512]);
    }
}

/// An answer to some request, more or less.
fn answer() -> impl Strategy<Value = Vec<u8>> {
    // Requests that have answers, and any other.
    let request =
        prop_oneof![4 => prop::sample::select(vec![1_u32, 15, 17, 24]), 1 => any::<u32>()];
    let flags = prop_oneof![8 => Just(REPLY), 1 => any::<u32>()];
    let features = VERSION_1 | connection::PROTOCOL_FEATURES;
    let word = any::<u64>().prop_map(move |word| (word | features).to_ne_bytes().to_vec());
    // Offset 0, 60 bytes, no flags.
    let space = any::<[u8; 32]>()
        .prop_map(|space| [&[0, 0, 0, 0, 60, 0, 0, 0, 0, 0, 0, 0][..], &space, &[0; 28]].concat());
    let payload =
        prop_oneof![4 => word, 2 => space, 1 => prop::collection::vec(any::<u8>(), 0..80)];
    let size = prop::option::weighted(0.1, any::<u32>());
    (request, flags, payload, size).prop_map(|(request, flags, payload, size)| {
        let mut bytes = message(request, flags, &payload);
        if let Some(size) = size {
            bytes[8..12].copy_from_slice(&size.to_ne_bytes());
        }
        bytes
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Nothing that a back end says takes the front end down, or makes it wait for more.
    #[test]
    fn it_says_anything(answers in prop::collection::vec(answer(), 0..8)) {
        let outcome = outcome(move |mut stream| {
            // The other side may have heard enough.
            let _ = stream.write_all(&answers.concat());
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let _ = stream.read_to_end(&mut Vec::new());
        });
        if let Err(text) = outcome {
            prop_assert!(text.starts_with(r#"the vhost-user back end at "S""#), "{text}");
        }
    }
}

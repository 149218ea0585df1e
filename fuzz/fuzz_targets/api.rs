//! What a client of the API sends: HTTP requests, one after another, and the JSON in them.
//!
//! Holds to: no panic; a request takes at least one of the bytes that were sent and no others, and is the same however much follows
//! it; what is no request is refused with a status of a client's mistake and a sentence.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vmm::api::{Status, read_request};

fuzz_target!(|data: &[u8]| {
    let mut rest = data;
    loop {
        match read_request(rest) {
            Ok(Some((request, length))) => {
                assert!(length > 0, "a request of no bytes");
                let (own, after) = rest.split_at(length);
                let (alone, same) = read_request(own)
                    .expect("the request without what follows it")
                    .expect("whole without what follows it");
                assert_eq!(same, length);
                assert_eq!(format!("{alone:?}"), format!("{request:?}"));
                rest = after;
            }
            Ok(None) => break,
            Err(failure) => {
                assert!(
                    matches!(failure.status, Status::BadRequest | Status::NotFound),
                    "{failure:?}"
                );
                assert!(failure.chain.iter().all(|sentence| !sentence.is_empty()));
                break;
            }
        }
    }
});

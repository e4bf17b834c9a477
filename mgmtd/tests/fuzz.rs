//! Whatever arrives at mgmtd's socket, or stands in a file of the configuration, is a call or an error with a reason.

use lunar_api::mgmt::VERBS;
use mgmtd::varlink;

#[path = "../../fixtures/fuzz/mutate.rs"]
mod mutate;
use mutate::{Random, cases, corpus, mutate};

#[test]
fn messages_of_any_bytes() {
    let mut corpus = corpus("control");
    corpus.extend(VERBS.iter().map(|(verb, _)| {
        format!(r#"{{"method":"{verb}","parameters":{{"name":"data","disks":["1-4"]}}}}"#)
            .into_bytes()
    }));
    let mut random = Random(5);
    let (mut calls, mut answers, mut errors) = (0, 0, 0);
    for _ in 0..cases() {
        match varlink::decode(&mutate(&mut random, &corpus, false)) {
            Ok(varlink::Asked::Verb { .. }) => calls += 1,
            Ok(varlink::Asked::Answer(_)) => answers += 1,
            Err(error) => {
                assert!(!error.causes.is_empty(), "{error:?}");
                errors += 1;
            }
        }
    }
    assert!(
        calls > 0 && answers > 0 && errors > 0,
        "{calls} {answers} {errors}"
    );
}

//! The connection to ublk-target, against a fake at the other end of a socketpair.

use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use lunar_api::DiskUuid;
use lunar_api::target::{MESSAGE_MAX, TargetAnswer, TargetReply, TargetRequest};
use lunar_api::{ApiError, ErrorKind};
use mgmtd::link::{Link, LinkError};
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, send, socketpair,
};

fn pair() -> (OwnedFd, OwnedFd) {
    let flags = SockFlag::SOCK_CLOEXEC;
    let (ours, fake) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
    let nonblocking = nix::fcntl::OFlag::O_NONBLOCK;
    nix::fcntl::fcntl(&ours, nix::fcntl::FcntlArg::F_SETFL(nonblocking)).unwrap();
    (ours, fake)
}

/// Reads one request and how many descriptors came with it; answers with these bytes.
fn answer_once(fake: OwnedFd, answer: Vec<u8>) -> std::thread::JoinHandle<(TargetRequest, usize)> {
    std::thread::spawn(move || {
        let mut bytes = vec![0; MESSAGE_MAX];
        let mut space = nix::cmsg_space!([i32; 64]);
        let mut iov = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let got = recvmsg::<()>(fake.as_raw_fd(), &mut iov, Some(&mut space), flags).unwrap();
        let (len, mut count) = (got.bytes, 0);
        for message in got.cmsgs().unwrap() {
            if let ControlMessageOwned::ScmRights(fds) = message {
                count += fds.len();
            }
        }
        send(fake.as_raw_fd(), &answer, MsgFlags::empty()).unwrap();
        (serde_json::from_slice(&bytes[..len]).unwrap(), count)
    })
}

fn run<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(work)
}

const LIMIT: Duration = Duration::from_secs(10);

#[test]
fn call_carries_descriptors_and_gets_the_answer() {
    let (ours, fake) = pair();
    let reply: TargetReply = Ok(TargetAnswer::Done);
    let fake = answer_once(fake, serde_json::to_vec(&reply).unwrap());
    let asked = TargetRequest::Label {
        path: "/dev/x".into(),
        disk: DiskUuid::from_bytes([3; 16]),
    };
    let file = std::fs::File::open("/dev/null").unwrap();
    let got = run(async {
        let mut link = Link::over(ours).unwrap();
        link.call(&asked, &[file.as_raw_fd()], LIMIT).await.unwrap()
    });
    assert_eq!(got, reply);
    assert_eq!(fake.join().unwrap(), (asked, 1));
}

#[test]
fn call_gives_the_targets_error_back() {
    let (ours, fake) = pair();
    let error = ApiError::new(ErrorKind::Busy, "in use").hint("umount /srv");
    let reply: TargetReply = Err(error.clone());
    let fake = answer_once(fake, serde_json::to_vec(&reply).unwrap());
    let got = run(async {
        Link::over(ours)
            .unwrap()
            .call(&TargetRequest::Status, &[], LIMIT)
            .await
            .unwrap()
    });
    assert_eq!(got, Err(error));
    fake.join().unwrap();
}

#[test]
fn call_unanswered_ends_in_its_limit() {
    let (ours, _fake) = pair();
    let got = run(async {
        let limit = Duration::from_millis(50);
        Link::over(ours)
            .unwrap()
            .call(&TargetRequest::Status, &[], limit)
            .await
    });
    assert!(matches!(got, Err(LinkError::Slow(_))));
}

#[test]
fn call_to_a_dead_target_is_unreachable() {
    let (ours, fake) = pair();
    drop(fake);
    let got = run(async {
        Link::over(ours)
            .unwrap()
            .call(&TargetRequest::Status, &[], LIMIT)
            .await
    });
    assert_eq!(
        ApiError::from(got.unwrap_err()).kind,
        ErrorKind::Unreachable
    );
}

#[test]
fn call_answered_with_garbage_fails() {
    let (ours, fake) = pair();
    let fake = answer_once(fake, b"\xff{".to_vec());
    let got = run(async {
        Link::over(ours)
            .unwrap()
            .call(&TargetRequest::Status, &[], LIMIT)
            .await
    });
    assert!(matches!(got, Err(LinkError::Garbled(_))));
    fake.join().unwrap();
}

//! Servers that fail, lie, stall and change their minds: each gives exact bytes, or an error that says which
//! object and where, within bounds.

#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "../../../tests/src/server.rs"]
#[allow(dead_code, unreachable_pub, missing_docs)]
mod server;

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use fst_object::{Cause, Difference, Error, Object, Settings};
use server::{Fault, Server};

const LEN: usize = 3 << 20;
const NAME: &str = "/m/a.safetensors";
const NEVER: &dyn Fn() -> bool = &|| false;
/// A range that starts and ends in the middle.
const RANGE: std::ops::Range<u64> = 1000..2_500_001;

fn body(seed: usize) -> Vec<u8> {
    (0..LEN).map(|i| ((i * 31 + i / 251 + seed) % 251) as u8).collect()
}

/// Little patience: waits are for what never comes.
fn settings() -> Settings {
    let mut settings = Settings::default();
    settings.read_timeout = Duration::from_millis(600);
    settings.rate_window = Duration::from_millis(600);
    settings.least_bytes = 1 << 20;
    settings.attempts = 3;
    settings.patience = Duration::from_secs(20);
    settings.backoff = Duration::from_millis(10);
    settings
}

/// A server with an object that was opened.
fn opened() -> (Server, Object) {
    let server = Server::start();
    server.put(NAME, body(0));
    let url = server.origin() + NAME;
    let (object, head) = Object::open(&url, 100, &settings(), NEVER).unwrap();
    assert_eq!(head, body(0)[..100]);
    assert_eq!((object.len(), object.url()), (LEN as u64, &*url));
    (server, object)
}

fn read(object: &Object) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::new();
    object.read(RANGE, &mut |part| bytes.extend_from_slice(part), NEVER)?;
    Ok(bytes)
}

fn assert_right(bytes: &[u8]) {
    assert!(bytes == &body(0)[RANGE.start as usize..RANGE.end as usize], "wrong bytes");
}

#[test]
fn what_passes_is_survived() {
    let busy = Fault::Status("503 Slow Down", "SlowDown", "");
    let throttled = Fault::Status("429 Too Many Requests", "", "Retry-After: 1\r\n");
    let half = 1 << 20;
    for (fault, count) in [
        (Fault::None, 0),
        (busy, 2),
        (throttled, 1),
        (Fault::Status("500 Internal Server Error", "InternalError", ""), 2),
        (Fault::Status("400 Bad Request", "RequestTimeout", ""), 1),
        (Fault::Cut(half, true), 1),
        (Fault::Cut(half, false), 1),
        (Fault::Cut(0, true), 2),
        (Fault::Short, 1),
        (Fault::StallHead, 1),
        (Fault::Stall(half), 1),
        (Fault::Stall(0), 2),
        (Fault::Drip(1000, Duration::from_millis(50)), 1),
        (Fault::Status("403 Forbidden", "ExpiredToken", ""), 1),
        (Fault::Status("400 Bad Request", "ExpiredToken", ""), 1),
    ] {
        let (server, object) = opened();
        server.fault(NAME, 0, count, fault.clone());
        let began = Instant::now();
        let bytes = read(&object).unwrap_or_else(|error| panic!("{fault:?}: {error}"));
        assert_right(&bytes);
        let requests = server.log().len() - 1;
        assert_eq!(requests, count + 1, "{fault:?}");
        assert_eq!(object.counters().retries as usize, count, "{fault:?}");
        if matches!(fault, Fault::Status("429 Too Many Requests", ..)) {
            assert!(began.elapsed() >= Duration::from_secs(1), "Retry-After is kept");
            assert_eq!(object.counters().throttled, 1);
        }
    }
}

#[test]
fn a_transfer_goes_on_at_the_exact_byte() {
    let (server, object) = opened();
    server.fault(NAME, 0, 1, Fault::Cut(1_000_000, false));
    server.fault(NAME, 1, 1, Fault::Cut(77, false));
    assert_right(&read(&object).unwrap());
    let ranges: Vec<_> = server.log()[1..].iter().map(|request| request.range.unwrap()).collect();
    assert_eq!(ranges, [(1000, 2_500_001), (1_001_000, 2_500_001), (1_001_077, 2_500_001)]);
    let tag = object.identity().etag.clone().unwrap();
    assert!(server.log()[1..].iter().all(|request| request.headers["if-match"] == tag));
}

#[test]
fn many_failures_are_survived_while_there_is_progress() {
    let (server, object) = opened();
    server.fault(NAME, 0, 2, Fault::Cut(1 << 20, false));
    server.fault(NAME, 2, 1, Fault::Cut(0, false));
    assert_right(&read(&object).unwrap());
}

#[test]
fn what_does_not_pass_is_an_error_that_says_where() {
    type Expected = fn(&Cause) -> bool;
    let wrong: Expected = |cause| matches!(cause, Cause::Answer { .. });
    let exhausted: Expected = |cause| matches!(cause, Cause::Exhausted { attempts: 3, .. });
    let changed: Expected = |cause| matches!(cause, Cause::Changed(Difference::Version));
    let redirect = |to| Fault::Status("302 Found", "", to);
    let cases: [(Fault, u64, Expected); 22] = [
        (Fault::Status("503 Slow Down", "SlowDown", ""), 0, exhausted),
        (Fault::Cut(1000, true), 3000, exhausted),
        (Fault::Cut(0, false), 0, exhausted),
        (Fault::StallHead, 0, exhausted),
        (Fault::Stall(10), 30, exhausted),
        (Fault::Status("404 Not Found", "NoSuchKey", ""), 0, |c| matches!(c, Cause::NotFound)),
        (Fault::Status("403 Forbidden", "AccessDenied", ""), 0, |c| {
            matches!(c, Cause::Denied { status: 403, .. })
        }),
        (Fault::Status("401 Unauthorized", "", ""), 0, |c| {
            matches!(c, Cause::Denied { status: 401, .. })
        }),
        (Fault::Status("403 Forbidden", "ExpiredToken", ""), 0, |c| {
            matches!(c, Cause::Denied { status: 403, .. })
        }),
        (Fault::Status("403 Forbidden", "RequestTimeTooSkewed", ""), 0, |c| {
            matches!(c, Cause::Denied { status: 403, .. })
        }),
        (
            Fault::Status(
                "301 Moved Permanently",
                "PermanentRedirect",
                "x-amz-bucket-region: eu-x\r\n",
            ),
            0,
            |c| matches!(c, Cause::Refused { status: 301, code } if code.contains("eu-x")),
        ),
        (redirect("Location: /m/a.safetensors\r\n"), 0, wrong),
        (Fault::ShortChunked, 0, wrong),
        (Fault::Long, 0, wrong),
        (Fault::WrongRange, 0, wrong),
        (Fault::NoRange, 0, wrong),
        (Fault::Whole, 0, wrong),
        (Fault::Gzip, 0, wrong),
        (Fault::OtherTag, 0, changed),
        (Fault::NoIdentity, 0, changed),
        (Fault::OtherSize, 0, |c| matches!(c, Cause::Changed(Difference::Length { .. }))),
        (Fault::Drip(100, Duration::from_millis(30)), u64::MAX, exhausted),
    ];
    for (fault, at, expected) in cases {
        let (server, object) = opened();
        server.fault(NAME, 0, usize::MAX, fault.clone());
        let began = Instant::now();
        let error = read(&object).unwrap_err();
        assert!(expected(&error.cause), "{fault:?}: {error:?}");
        let text = error.to_string();
        assert!(text.starts_with(&(server.origin() + NAME)), "{fault:?}: {text}");
        if at != u64::MAX && fault != Fault::Long {
            assert_eq!(error.offset, Some(RANGE.start + at), "{fault:?}: {text}");
        }
        assert!(began.elapsed() < Duration::from_secs(15), "{fault:?}");
    }
}

/// An answer whose bytes are others than it says cannot be told from a right one by HTTP: that is for sums.
#[test]
fn flipped_bytes_come_through() {
    let (server, object) = opened();
    server.fault(NAME, 0, 1, Fault::Flip);
    let bytes = read(&object).unwrap();
    let right = body(0);
    let right = &right[RANGE.start as usize..RANGE.end as usize];
    assert_eq!(bytes.iter().zip(right).filter(|(a, b)| a != b).count(), 1);
}

#[test]
fn another_object_in_its_place_is_noticed() {
    // Between opening and reading, and where If-Match is ignored.
    for ignores in [false, true] {
        let (server, object) = opened();
        server.put(NAME, body(1));
        if ignores {
            server.fault(NAME, 0, usize::MAX, Fault::OtherTag);
        }
        let error = read(&object).unwrap_err();
        assert!(matches!(error.cause, Cause::Changed(Difference::Version)), "{error}");
        let error = object.verify(NEVER).unwrap_err();
        assert!(matches!(error.cause, Cause::Changed(Difference::Version)), "{error}");
    }
    // In the middle of a body.
    for ignores in [false, true] {
        let (server, object) = opened();
        server.fault(NAME, 0, 1, Fault::Cut(5000, false));
        if ignores {
            server.fault(NAME, 1, 1, Fault::OtherTag);
        }
        let mut first = true;
        let mut replace = |_: &[u8]| {
            if std::mem::take(&mut first) {
                server.put(NAME, body(1));
            }
        };
        let error = object.read(RANGE, &mut replace, NEVER).unwrap_err();
        assert!(matches!(error.cause, Cause::Changed(Difference::Version)), "{error}");
        assert_eq!(error.offset, Some(RANGE.start + 5000));
    }
    // Shorter, and gone.
    let (server, object) = opened();
    object.verify(NEVER).unwrap();
    server.put(NAME, [1; 10]);
    let error = object.verify(NEVER).unwrap_err();
    let length = Difference::Length { was: LEN as u64, now: 10 };
    assert!(matches!(error.cause, Cause::Changed(found) if found == length), "{error}");
    server.remove(NAME);
    let error = object.verify(NEVER).unwrap_err();
    assert!(matches!(error.cause, Cause::NotFound), "{error}");
}

#[test]
fn redirects_are_followed() {
    let (server, object) = opened();
    server.put("/elsewhere", body(0));
    server.fault(NAME, 0, 1, Fault::Status("302 Found", "", "Location: /elsewhere\r\n"));
    assert_right(&read(&object).unwrap());
    let asked = &server.log()[2];
    assert_eq!((&*asked.target, asked.range), ("/elsewhere", Some((RANGE.start, RANGE.end))));
    // To something else.
    server.put("/elsewhere", body(1));
    server.fault(NAME, 0, 1, Fault::Status("302 Found", "", "Location: /elsewhere\r\n"));
    assert!(matches!(read(&object).unwrap_err().cause, Cause::Changed(_)));
}

#[test]
fn opening_finds_what_there_is() {
    let server = Server::start();
    let open = |name: &str, head| Object::open(&(server.origin() + name), head, &settings(), NEVER);
    server.put("/short", *b"abc");
    let (object, head) = open("/short", 100).unwrap();
    assert_eq!((object.len(), &head[..]), (3, &b"abc"[..]));
    server.put("/empty", []);
    let (object, head) = open("/empty", 100).unwrap();
    assert!(object.is_empty() && head.is_empty());
    object.read(0..0, &mut |_| panic!("no bytes"), NEVER).unwrap();
    server.put("/odd%20name/%C3%A9+a", *b"x");
    assert_eq!(open("/odd%20name/é+a", 1).unwrap().1, b"x");
    assert!(matches!(open("/none", 1).unwrap_err().cause, Cause::NotFound));
    server.fault("/short", 0, 1, Fault::NoIdentity);
    let error = open("/short", 1).unwrap_err();
    assert!(error.to_string().contains("neither an ETag"), "{error}");
    server.fault("/short", 0, 1, Fault::Cut(1, true));
    assert_eq!(open("/short", 100).unwrap().1, b"abc");

    let error = Object::open("http://127.0.0.1:1/a", 1, &settings(), NEVER).unwrap_err();
    assert!(matches!(error.cause, Cause::Exhausted { .. }), "{error}");
    assert!(error.to_string().contains("refused"), "{error}");
}

#[test]
fn a_stop_is_heard_in_a_stall_and_in_a_wait() {
    for fault in [
        Fault::StallHead,
        Fault::Stall(10),
        Fault::Status("503 Slow Down", "SlowDown", "Retry-After: 15\r\n"),
        Fault::Drip(10, Duration::from_millis(10)),
    ] {
        let (server, object) = opened();
        server.fault(NAME, 0, usize::MAX, fault.clone());
        let stop = AtomicBool::new(false);
        let stopped = std::thread::scope(|scope| {
            let read = scope.spawn(|| {
                let error = object.read(RANGE, &mut |_| {}, &|| stop.load(Relaxed)).unwrap_err();
                (error, Instant::now())
            });
            std::thread::sleep(Duration::from_millis(200));
            let at = Instant::now();
            stop.store(true, Relaxed);
            let (error, ended) = read.join().unwrap();
            assert!(matches!(error.cause, Cause::Cancelled), "{fault:?}: {error}");
            ended - at
        });
        assert!(stopped < Duration::from_millis(500), "{fault:?}: {stopped:?}");
    }
}

#[test]
fn many_threads_read_one_object_at_once() {
    let (server, object) = opened();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| assert_right(&read(&object).unwrap()));
        }
    });
    assert_eq!(object.counters().requests, 9);
    assert_eq!(server.log().len(), 9);
}

/// The caller's thread may belong to another runtime: nothing here may panic in one.
#[test]
fn works_in_another_runtime() {
    let (_server, object) = opened();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async { assert_right(&read(&object).unwrap()) });
}

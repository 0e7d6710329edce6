//! `TcpControl`: gatherings, and ranks that fail, leave, come late or are no ranks at all.

#![allow(clippy::unwrap_used, clippy::panic)]

mod port;

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use fst_dist::GroupError;
use fst_dist::group::{Control, LaunchEnv, TcpControl};
use port::Port;

fn on_ranks<T: Send>(world: u32, deadline: Duration, f: impl Fn(TcpControl) -> T + Sync) -> Vec<T> {
    let port = Port::new();
    std::thread::scope(|scope| {
        let run = |rank| {
            let (f, port) = (&f, port.number());
            scope.spawn(move || {
                f(TcpControl::join(rank, world, "127.0.0.1", port, deadline).unwrap())
            })
        };
        let threads: Vec<_> = (0..world).map(run).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Nobody waits for so long, unless something is broken.
const LONG: Duration = Duration::from_secs(60);

fn gather_for_ever(control: &TcpControl) -> GroupError {
    loop {
        if let Err(error) = control.gather_messages(b"still here") {
            return error;
        }
    }
}

#[test]
fn messages_are_gathered_by_rank_again_and_again() {
    for world in [1, 2, 5] {
        on_ranks(world, LONG, |control| {
            for turn in 0..50u32 {
                let text = |rank: u32| vec![rank as u8; (turn * rank * 100) as usize];
                let all = control.gather_messages(&text(control.rank())).unwrap();
                assert_eq!(all, (0..world).map(text).collect::<Vec<_>>());
            }
        });
    }
}

#[test]
fn messages_too_long_to_be_sent_are_refused_by_who_sends_them() {
    // One rank's own; and those of all, which rank 0 sends on.
    for (lens, sender, bytes) in
        [([0, 64 << 20], 1, 64usize << 20), ([40 << 20, 40 << 20], 0, (80 << 20) + 8)]
    {
        let errors = on_ranks(2, LONG, |control| {
            let message = vec![7; lens[control.rank() as usize]];
            let error = control.gather_messages(&message).unwrap_err();
            let typed = matches!(error, GroupError::MessageSize { .. });
            assert_eq!(typed, control.rank() == sender, "{error}");
            error.to_string()
        });
        let refused = format!(
            "rank {sender} has {bytes} bytes to tell in one gathering, {} at most can be sent",
            (64 << 20) - 8
        );
        let other = 1 - sender as usize;
        assert_eq!(errors[sender as usize], refused);
        assert_eq!(errors[other], format!("rank {sender} failed: {refused}"));
    }
}

#[test]
fn strangers_that_say_nothing_use_up_nobodys_deadline() {
    let deadline = Duration::from_secs(2);
    let port = Port::new();
    let number = port.number();
    let joined = |rank| TcpControl::join(rank, 2, "127.0.0.1", number, deadline);
    let strangers = || -> Vec<TcpStream> {
        let stranger = || loop {
            match TcpStream::connect(("127.0.0.1", number)) {
                Ok(stream) => break stream,
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        (0..6).map(|_| stranger()).collect()
    };
    std::thread::scope(|scope| {
        let start = Instant::now();
        let first = scope.spawn(|| joined(0));
        let silent = strangers();
        let error = first.join().unwrap().unwrap_err();
        assert!(matches!(error, GroupError::Deadline { .. }), "{error}");
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
        drop(silent);
    });
    std::thread::scope(|scope| {
        let port = Port::new();
        let number = port.number();
        let joined = move |rank| TcpControl::join(rank, 2, "127.0.0.1", number, LONG);
        let first = scope.spawn(move || joined(0));
        let silent = loop {
            match TcpStream::connect(("127.0.0.1", number)) {
                Ok(stream) => break stream,
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        let start = Instant::now();
        let second = scope.spawn(move || joined(1));
        assert!(first.join().unwrap().is_ok() && second.join().unwrap().is_ok());
        assert!(start.elapsed() < Duration::from_secs(4), "the stranger was waited for");
        drop(silent);
    });
}

#[test]
fn an_abort_reaches_all_with_rank_and_cause() {
    for failing in 0..3 {
        let start = Instant::now();
        let errors = on_ranks(3, LONG, |control| {
            if control.rank() == failing {
                std::thread::sleep(Duration::from_millis(20));
                control.abort("out of paper");
            }
            gather_for_ever(&control).to_string()
        });
        assert_eq!(errors, vec![format!("rank {failing} failed: out of paper"); 3]);
        assert!(start.elapsed() < LONG / 2);
    }
}

#[test]
fn a_rank_that_leaves_is_lost_to_those_that_wait() {
    for leaving in 0..3 {
        let errors = on_ranks(3, LONG, |control| match control.rank() == leaving {
            true => String::new(),
            false => gather_for_ever(&control).to_string(),
        });
        for (_, error) in (0..).zip(&errors).filter(|(rank, _)| *rank != leaving) {
            assert_eq!(*error, format!("rank {leaving} is lost: it left the group"));
        }
    }
}

#[test]
fn a_silent_rank_meets_the_deadline() {
    let done = std::sync::Barrier::new(3);
    // Long enough for all to have joined, which has the same deadline.
    let errors = on_ranks(3, Duration::from_secs(2), |control| {
        let result = if control.rank() == 2 { Ok(()) } else { control.barrier() };
        done.wait();
        result.err().map(|error| error.to_string())
    });
    // Rank 0 knows for whom it waited; whichever deadline comes first is told to all.
    for error in &errors[..2] {
        let error = error.as_ref().unwrap();
        assert!(error.contains("waited 2s in gather"), "{error}");
    }
}

#[test]
fn a_deadline_counts_silence() {
    let deadline = Duration::from_secs(1);
    for living in 0..3 {
        let results = on_ranks(3, deadline, |control| {
            if control.rank() == living {
                for _ in 0..12 {
                    std::thread::sleep(deadline / 4);
                    control.alive();
                }
            }
            control.barrier().map_err(|error| error.to_string())
        });
        assert_eq!(results, vec![Ok(()); 3], "{living}");
        // Another one hangs, while this one gets on and on.
        let silent = (living + 1) % 3;
        let errors = on_ranks(3, deadline, |control| {
            if control.rank() == (living + 2) % 3 {
                return control.barrier().unwrap_err().to_string();
            }
            let start = Instant::now();
            while control.failure().is_none() && start.elapsed() < deadline * 8 {
                std::thread::sleep(Duration::from_millis(5));
                if control.rank() == living {
                    control.alive();
                }
            }
            control.failure().map_or_else(|| "nothing".to_owned(), |error| error.to_string())
        });
        for error in errors {
            assert!(error.contains(&format!("for rank {silent}")), "{living}: {error}");
        }
    }
}

#[test]
fn a_dropped_connection_is_a_lost_rank() {
    let held = Port::new();
    let port = held.number();
    let errors = std::thread::scope(|scope| {
        let join = |rank| {
            scope.spawn(move || {
                let joined = TcpControl::join(rank, 3, "127.0.0.1", port, LONG);
                joined.and_then(|control| Err::<(), _>(gather_for_ever(&control))).unwrap_err()
            })
        };
        let threads = [join(0), join(1)];
        // A rank that says hello and dies, as if killed; strangers are not counted.
        let connect = || loop {
            if let Ok(stream) = TcpStream::connect(("127.0.0.1", port)) {
                return stream;
            }
        };
        connect().write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        drop(connect());
        let mut dying = connect();
        dying.write_all(b"fst-dist\x02\0\0\0\x03\0\0\0").unwrap();
        std::thread::sleep(Duration::from_millis(300));
        drop(dying);
        threads.map(|thread| thread.join().unwrap().to_string())
    });
    for error in errors {
        assert!(error.starts_with("rank 2 is lost: "), "{error}");
    }
}

#[test]
fn ranks_that_do_not_come_or_do_not_fit_are_named() {
    let short = Duration::from_millis(300);
    let join = |rank, world, port: &Port, deadline| {
        TcpControl::join(rank, world, "127.0.0.1", port.number(), deadline)
    };
    let port = Port::new();
    let error = join(0, 2, &port, short).unwrap_err();
    let missing = matches!(error, GroupError::Deadline { waiting_for: Some(1), .. });
    assert!(missing, "{error}");
    let error = join(1, 2, &port, short).unwrap_err();
    assert!(matches!(error, GroupError::Network { what: "connect to", .. }), "{error}");
    let errors = std::thread::scope(|scope| {
        let threads = [(0, 2), (1, 3)].map(|(rank, world)| {
            let port = &port;
            scope.spawn(move || join(rank, world, port, LONG).unwrap_err().to_string())
        });
        threads.map(|thread| thread.join().unwrap())
    });
    assert_eq!(errors[0], "rank 1 was started with world size 3, rank 0 with 2");
    assert_eq!(errors[1], format!("rank 0 failed: {}", errors[0]));
}

#[test]
fn ranks_of_another_job_are_strangers() {
    let port = Port::new();
    let join = |job: &str, rank, deadline| {
        let mut env = LaunchEnv::new(rank, 2, "127.0.0.1", port.number());
        env.job = job.to_owned();
        TcpControl::from_env(&env, deadline)
    };
    let short = Duration::from_millis(800);
    std::thread::scope(|scope| {
        let first = scope.spawn(|| join("ours", 0, LONG));
        while TcpStream::connect(("127.0.0.1", port.number())).is_err() {}
        // They come first, as the same rank, and of other world sizes.
        let wide = TcpControl::join(1, 3, "127.0.0.1", port.number(), short);
        for error in [join("theirs", 1, short).unwrap_err(), wide.unwrap_err()] {
            let typed = matches!(error, GroupError::Unwelcome { rank: 1, .. });
            assert!(typed, "{error}");
        }
        assert!(!first.is_finished());
        let second = scope.spawn(|| join("ours", 1, LONG).unwrap().gather_messages(b"b").unwrap());
        let all = first.join().unwrap().unwrap().gather_messages(b"a").unwrap();
        assert_eq!((&all, &all), (&second.join().unwrap(), &vec![b"a".to_vec(), b"b".to_vec()]));
    });
}

#[test]
fn a_rank_that_meets_something_else_at_the_port_goes_on_trying() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::scope(|scope| {
        let second = scope.spawn(move || TcpControl::join(1, 2, "127.0.0.1", port, LONG));
        for _ in 0..3 {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n");
        }
        drop(listener);
        let first = TcpControl::join(0, 2, "127.0.0.1", port, LONG);
        assert!(first.is_ok() && second.join().unwrap().is_ok());
    });
}

#[test]
fn frames_that_are_not_due_end_the_group() {
    // Kind, length and number of the gathering.
    let gather = |len: u32, turn: u64| [&[1], &len.to_le_bytes()[..], &turn.to_le_bytes()].concat();
    let cases: [(&str, Vec<u8>); 6] = [
        ("of kind 1 and 9", [gather(8, 2), gather(9, 3)].concat()),
        ("it is at gathering 3 where 2 is due", gather(8, 3)),
        ("of kind 1 and 67108865", gather((64 << 20) + 1, 2)),
        ("of kind 2 and 8", [&[2], &gather(8, 2)[1..]].concat()),
        ("of kind 3 and 16777216", vec![3, 0, 0, 0, 1]),
        ("of kind 77 and 1", vec![77, 1, 0, 0, 0]),
    ];
    for (what, frames) in cases {
        let port = Port::new();
        let number = port.number();
        let (joined, joins) = std::sync::mpsc::channel();
        let first = std::thread::spawn(move || {
            let control = TcpControl::join(0, 2, "127.0.0.1", number, LONG).unwrap();
            joined.send(()).unwrap();
            while control.failure().is_none() {
                std::thread::sleep(Duration::from_millis(1));
            }
            control.failure().unwrap().to_string()
        });
        let mut peer = loop {
            if let Ok(peer) = TcpStream::connect(("127.0.0.1", number)) {
                break peer;
            }
        };
        peer.write_all(b"fst-dist\x01\0\0\0\x02\0\0\0").unwrap();
        peer.write_all(&gather(8, 1)).unwrap();
        // Or else it is the joining that they end.
        joins.recv().unwrap();
        peer.write_all(&frames).unwrap();
        let error = first.join().unwrap();
        assert!(error.starts_with("rank 1 is lost: ") && error.contains(what), "{what}: {error}");
    }
}

/// Whoever connects while the last rank's hello is on its way gets no place later.
#[test]
fn who_came_while_ranks_joined_is_turned_away_once_they_have() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let join = move || TcpControl::join(0, 2, "127.0.0.1", port, Duration::from_secs(60));
    let zero = std::thread::spawn(join);
    let connect = || loop {
        if let Ok(stream) = TcpStream::connect(("127.0.0.1", port)) {
            return stream;
        }
    };
    let (mut one, mut stranger) = (connect(), connect());
    std::thread::sleep(Duration::from_millis(200));
    let hello = [&b"fst-dist"[..], &1u32.to_le_bytes(), &2u32.to_le_bytes()].concat();
    // The hello and the message of the first gathering.
    let gather = [&[1u8][..], &8u32.to_le_bytes(), &1u64.to_le_bytes()].concat();
    one.write_all(&[&hello[..], &gather].concat()).unwrap();
    let zero = zero.join().unwrap().unwrap();
    // Its end comes, or has come.
    let _ = stranger.write_all(&hello);
    stranger.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let end = stranger.read(&mut [0; 8]);
    assert!(matches!(end, Ok(0)) || end.is_err_and(|e| e.kind() == ErrorKind::ConnectionReset));
    assert!(zero.failure().is_none(), "{:?}", zero.failure());
}

//! What a `TcpControl` takes of its process ends with it. Alone in its process, so that it can count.

#![allow(clippy::unwrap_used)]

mod port;

use std::io::Write;
use std::net::TcpStream;
use std::time::Duration;

use fst_dist::group::TcpControl;
use port::Port;

/// Threads and descriptors of this process.
fn counts() -> [usize; 2] {
    ["task", "fd"].map(|of| std::fs::read_dir(format!("/proc/self/{of}")).unwrap().count())
}

#[test]
fn threads_and_sockets_end_with_the_control_whatever_peers_do() {
    let before = counts();
    let ports: Vec<Port> = (0..4).map(|_| Port::new()).collect();
    let mut peers = Vec::new();
    for port in &ports {
        let number = port.number();
        let joined = std::thread::spawn(move || {
            drop(TcpControl::join(0, 2, "127.0.0.1", number, Duration::from_secs(60)).unwrap());
        });
        let mut peer = loop {
            if let Ok(peer) = TcpStream::connect(("127.0.0.1", number)) {
                break peer;
            }
        };
        // Rank 1 of 2, in the first gathering; it neither reads nor closes.
        peer.write_all(b"fst-dist\x01\0\0\0\x02\0\0\0").unwrap();
        peer.write_all(b"\x01\x08\0\0\0\x01\0\0\0\0\0\0\0").unwrap();
        peers.push(peer);
        joined.join().unwrap();
    }
    let [threads, files] = counts();
    // A peer's own socket, and the two that hold its port.
    assert_eq!([threads, files], [before[0], before[1] + 3 * peers.len()]);
}

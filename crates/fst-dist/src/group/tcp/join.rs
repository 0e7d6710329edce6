//! The way of a rank to rank 0.

use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::wire::{Wire, wait};
use super::{ABORT, CAUSE, WELCOME, failure};
use crate::error::GroupError;

/// The shortest time in which to connect.
const LEAST: Duration = Duration::from_millis(1);

/// How long to wait before the next try to connect.
const RETRY: Duration = Duration::from_millis(20);

/// A rank on its way to rank 0.
pub(super) struct Join<'a> {
    pub(super) rank: u32,
    pub(super) address: &'a str,
    pub(super) start: Instant,
    pub(super) deadline: Duration,
}

impl Join<'_> {
    /// Not more of the deadline is used up by one that does not answer.
    fn left(&self) -> Duration {
        self.deadline.saturating_sub(self.start.elapsed()).max(LEAST)
    }

    /// The connection to rank 0, which may come later than this rank.
    pub(super) fn connect(
        &self,
        resolved: &[SocketAddr],
        hello: &[u8],
    ) -> Result<Wire, GroupError> {
        loop {
            let mut tried = Err(io::Error::new(ErrorKind::NotFound, "the name has no address"));
            for (at, address) in (0u32..).zip(resolved) {
                // One that does not answer leaves time for the others.
                let share = self.left() / (resolved.len() as u32 - at);
                tried = TcpStream::connect_timeout(address, share.max(LEAST));
                if tried.is_ok() {
                    break;
                }
            }
            let address = self.address.to_owned();
            let error = match tried.and_then(Wire::new) {
                Ok(wire) => match self.greet(wire, hello)? {
                    Some(wire) => return Ok(wire),
                    None => GroupError::Unwelcome { rank: self.rank, address },
                },
                Err(source) => {
                    GroupError::Network { what: "connect to", address, source: Arc::new(source) }
                }
            };
            if self.start.elapsed() >= self.deadline {
                return Err(error);
            }
            std::thread::sleep(RETRY);
        }
    }

    /// Says hello; `None` if nobody answers who speaks the language and knows the job.
    fn greet(&self, mut wire: Wire, hello: &[u8]) -> Result<Option<Wire>, GroupError> {
        wire.queue(hello.into());
        while wire.ended.is_none() && self.start.elapsed() < self.deadline {
            wait(vec![wire.interest()], Some(self.left()));
            wire.pump();
            match wire.head() {
                None => {}
                Some((WELCOME, 0)) => return Ok(wire.take(0).map(|_| wire)),
                Some((ABORT, len)) if len <= 4 + CAUSE => {
                    if let Some(body) = wire.take(len) {
                        return Err(failure(ABORT, &body));
                    }
                }
                Some(_) => break,
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::net::TcpListener;

    use super::*;

    /// An address whose connections are neither taken nor refused: the queue of its listener is full.
    fn silent() -> (TcpListener, Vec<TcpStream>, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let address = listener.local_addr().unwrap();
        let connect = || TcpStream::connect_timeout(&address, Duration::from_millis(200)).ok();
        let held = std::iter::from_fn(connect).collect();
        (listener, held, address)
    }

    #[test]
    fn an_address_that_does_not_answer_leaves_time_for_the_others() {
        let (_listener, _held, silent) = silent();
        let good = TcpListener::bind("127.0.0.1:0").unwrap();
        let answers = good.local_addr().unwrap();
        let welcome = std::thread::spawn(move || {
            let serve = || {
                let (mut stream, _) = good.accept().unwrap();
                std::io::Read::read_exact(&mut stream, &mut [0; 5]).unwrap();
                std::io::Write::write_all(&mut stream, &super::super::frame(WELCOME, &[])).unwrap();
                stream
            };
            [serve(), serve()]
        });
        for resolved in [[answers, silent], [silent, answers]] {
            let deadline = Duration::from_secs(4);
            let join = Join { rank: 1, address: "master", start: Instant::now(), deadline };
            assert!(join.connect(&resolved, b"hello").is_ok());
        }
        drop(welcome.join().unwrap());
    }
}

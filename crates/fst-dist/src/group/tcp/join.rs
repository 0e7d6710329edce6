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
        let none = || Err(io::Error::new(ErrorKind::NotFound, "the name has no address"));
        loop {
            let connect = |address| TcpStream::connect_timeout(address, self.left());
            let tried = resolved.iter().map(connect).reduce(|one, other| one.or(other));
            let address = self.address.to_owned();
            let error = match tried.unwrap_or_else(none).and_then(Wire::new) {
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

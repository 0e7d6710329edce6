//! Ports for ranks to meet at, which nobody else is given meanwhile.

#![allow(clippy::unwrap_used)]

use std::net::{TcpListener, TcpStream};

/// A port at which nobody listens. The connection that holds it keeps it from those who ask for any
/// port, and not from those who then listen at it by its number.
pub(crate) struct Port {
    number: u16,
    _held: [TcpStream; 2],
}

impl Port {
    pub(crate) fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let near = TcpStream::connect(address).unwrap();
        let (far, _) = listener.accept().unwrap();
        Self { number: address.port(), _held: [near, far] }
    }

    pub(crate) fn number(&self) -> u16 {
        self.number
    }
}

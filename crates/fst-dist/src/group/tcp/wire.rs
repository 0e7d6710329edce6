//! A connection that never blocks: frames in, frames out.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Kind and length, before each frame's body.
const HEAD: usize = 5;

/// Bytes read at a time.
const CHUNK: usize = 64 << 10;

/// Frames that wait to be sent, beyond which a peer takes none.
const FULL: usize = 64;

/// A frame with its head, shared by the connections that it is sent on.
pub(super) type Frame = Arc<[u8]>;

pub(super) fn frame(kind: u8, body: &[&[u8]]) -> Frame {
    let len = body.iter().map(|part| part.len() as u32).sum::<u32>().to_le_bytes();
    [&[&[kind], &len[..]], body].concat().concat().into()
}

#[derive(Debug)]
pub(super) struct Wire {
    stream: TcpStream,
    /// What has come and is not taken yet.
    pub(super) input: Vec<u8>,
    output: VecDeque<Frame>,
    /// Bytes of the first frame that are sent.
    sent: usize,
    /// Nothing is sent after what is queued.
    closing: bool,
    /// Why nothing more comes.
    pub(super) ended: Option<String>,
}

impl Wire {
    pub(super) fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        let (input, output) = (Vec::new(), VecDeque::new());
        Ok(Self { stream, input, output, sent: 0, closing: false, ended: None })
    }

    pub(super) fn queue(&mut self, frame: Frame) {
        self.output.push_back(frame);
    }

    /// Leaves out what need not be told, if the peer has not taken much of what is.
    pub(super) fn queue_unless_full(&mut self, frame: &Frame) {
        if self.output.len() < FULL {
            self.output.push_back(frame.clone());
        }
    }

    /// Sends nothing after what is queued.
    pub(super) fn close(&mut self) {
        self.closing = true;
    }

    /// What to wait for.
    pub(super) fn interest(&self) -> PollFd<'_> {
        let out = if self.output.is_empty() { PollFlags::empty() } else { PollFlags::OUT };
        PollFd::new(&self.stream, PollFlags::IN | out)
    }

    /// Writes what can be written and reads a piece of what has come; whether anything moved.
    pub(super) fn pump(&mut self) -> bool {
        let mut moved = false;
        while let Some(first) = self.output.front() {
            match (&self.stream).write(&first[self.sent..]) {
                Ok(written) => {
                    moved = true;
                    self.sent += written;
                    if self.sent == first.len() {
                        self.output.pop_front();
                        self.sent = 0;
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                // Reading tells why, maybe in the peer's own words.
                Err(_) => self.output.clear(),
            }
        }
        if self.closing && self.output.is_empty() {
            self.closing = false;
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        let mut chunk = [0; CHUNK];
        match self.stream.read(&mut chunk) {
            Ok(0) => self.ended = Some("its connection ended".to_owned()),
            Ok(read) => {
                moved = true;
                self.input.extend_from_slice(&chunk[..read]);
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => self.ended = Some(error.to_string()),
        }
        moved
    }

    /// Kind and length of the frame that comes next.
    pub(super) fn head(&self) -> Option<(u8, usize)> {
        let (head, _) = self.input.split_first_chunk::<HEAD>()?;
        Some((head[0], u32::from_le_bytes([head[1], head[2], head[3], head[4]]) as usize))
    }

    /// The body of that frame, once all of it has come.
    pub(super) fn take(&mut self, len: usize) -> Option<Vec<u8>> {
        (self.input.len() >= HEAD + len).then(|| {
            let rest = self.input.split_off(HEAD + len);
            std::mem::replace(&mut self.input, rest).split_off(HEAD)
        })
    }
}

/// Waits until one of `fds` is ready, for `timeout` at most; which of them are.
pub(super) fn wait(mut fds: Vec<PollFd<'_>>, timeout: Option<Duration>) -> Vec<bool> {
    let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
    match poll(&mut fds, timeout.as_ref()) {
        Ok(_) => fds.iter().map(|fd| !fd.revents().is_empty()).collect(),
        Err(rustix::io::Errno::INTR) => vec![false; fds.len()],
        Err(_) => {
            // Short of memory: nothing blocks, so that all can be tried.
            std::thread::sleep(Duration::from_millis(10));
            vec![true; fds.len()]
        }
    }
}

//! A server of files over HTTP, and of a bucket as S3 has them, that does what a test tells it to do wrong.

use std::collections::{BTreeMap, HashMap};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

/// What goes wrong with one request for an object.
#[derive(Clone, Debug, PartialEq)]
pub enum Fault {
    /// Nothing.
    None,
    /// This status line, S3's code for the reason, and header lines.
    Status(&'static str, &'static str, &'static str),
    /// The connection ends after so many bytes of the body; with `true` by a reset.
    Cut(usize, bool),
    /// The body is shorter than its Content-Range says, and so says its Content-Length.
    Short,
    /// The same without a Content-Length.
    ShortChunked,
    /// The body and its Content-Length are longer than its Content-Range says.
    Long,
    /// Bytes from one byte later on, and a Content-Range that says so.
    WrongRange,
    /// Bytes from one byte later on, and a Content-Range that does not say so.
    Shifted,
    /// A Content-Range with another size of the whole.
    OtherSize,
    /// No Content-Range.
    NoRange,
    /// 200 and the whole object.
    Whole,
    /// A Content-Encoding.
    Gzip,
    /// Another ETag, whatever was to match.
    OtherTag,
    /// Neither ETag nor Last-Modified.
    NoIdentity,
    /// Last-Modified, and no ETag.
    TimeOnly,
    /// Another byte in the middle.
    Flip,
    /// No answer until the server ends.
    StallHead,
    /// Nothing more after so many bytes of the body.
    Stall(usize),
    /// Pieces of the body of so many bytes, with a wait before each.
    Drip(usize, Duration),
}

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Request {
    /// `GET` or `HEAD`.
    pub method: String,
    /// Path and query.
    pub target: String,
    /// First byte and the one behind the last.
    pub range: Option<(u64, u64)>,
    /// All headers, names in lower case.
    pub headers: HashMap<String, String>,
}

#[derive(Debug, Clone)]
struct File {
    bytes: Arc<Vec<u8>>,
    tag: String,
}

/// A fault, and the numbers that say when it is due.
type Due = (usize, usize, Fault);

#[derive(Debug, Default)]
struct State {
    files: Mutex<BTreeMap<String, File>>,
    /// By path: from which request on, for how many, and what.
    faults: Mutex<HashMap<String, Vec<Due>>>,
    seen: Mutex<HashMap<String, usize>>,
    /// Header lines by path.
    redirects: Mutex<HashMap<String, String>>,
    log: Mutex<Vec<Request>>,
    ended: AtomicBool,
}

/// A server on a port of its own. It ends when it is dropped.
#[derive(Debug)]
pub struct Server {
    port: u16,
    state: Arc<State>,
}

impl Server {
    /// Starts a server without files.
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let state = Arc::<State>::default();
        let shared = state.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                if shared.ended.load(Relaxed) {
                    break;
                }
                let Ok(stream) = stream else { continue };
                let state = shared.clone();
                thread::spawn(move || state.serve(stream));
            }
        });
        Self { port, state }
    }

    /// `http://` and where it listens.
    pub fn origin(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Adds or replaces a file. `path` begins with a slash and is as requests have it.
    pub fn put(&self, path: &str, bytes: impl Into<Vec<u8>>) {
        let bytes: Vec<u8> = bytes.into();
        let mut sum = 0u64;
        bytes.iter().for_each(|byte| sum = sum.wrapping_mul(31).wrapping_add(u64::from(*byte)));
        let file = File { bytes: Arc::new(bytes), tag: format!("\"{sum:016x}\"") };
        self.state.files.lock().unwrap().insert(path.to_owned(), file);
    }

    /// Answers requests for `path` with 302 and these header lines.
    pub fn redirect(&self, path: &str, headers: impl Into<String>) {
        self.state.redirects.lock().unwrap().insert(path.to_owned(), headers.into());
    }

    /// Removes a file.
    pub fn remove(&self, path: &str) {
        self.state.files.lock().unwrap().remove(path);
    }

    /// Has `fault` happen to `count` requests for `path`, behind the first `skip` from now on.
    pub fn fault(&self, path: &str, skip: usize, count: usize, fault: Fault) {
        let seen = self.state.seen.lock().unwrap().get(path).copied().unwrap_or(0);
        let mut faults = self.state.faults.lock().unwrap();
        faults.entry(path.to_owned()).or_default().push((seen + skip, count, fault));
    }

    /// The requests so far.
    pub fn log(&self) -> Vec<Request> {
        self.state.log.lock().unwrap().clone()
    }

    /// Forgets the requests so far.
    pub fn clear_log(&self) {
        self.state.log.lock().unwrap().clear();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.state.ended.store(true, Relaxed);
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

impl State {
    fn serve(&self, stream: TcpStream) {
        let _ = stream.set_nodelay(true);
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        while let Some(request) = request(&mut reader) {
            self.log.lock().unwrap().push(request.clone());
            if self.answer(&stream, &request).is_none() {
                return;
            }
        }
    }

    /// What is to go wrong with the next request for `path`.
    fn next_fault(&self, path: &str) -> Fault {
        let mut seen = self.seen.lock().unwrap();
        let number = seen.entry(path.to_owned()).or_insert(0);
        let at = *number;
        *number += 1;
        let faults = self.faults.lock().unwrap();
        let of_path = faults.get(path).into_iter().flatten();
        let mut due = of_path.filter(|(skip, count, _)| at >= *skip && at - skip < *count);
        due.next().map_or(Fault::None, |(_, _, fault)| fault.clone())
    }

    /// `None`: the connection is over.
    fn answer(&self, mut to: &TcpStream, request: &Request) -> Option<()> {
        let (path, query) = request.target.split_once('?').unwrap_or((&request.target, ""));
        let refuse = |mut to: &TcpStream, status: &str, code: &str, headers: &str| {
            let body = match code {
                "" => String::new(),
                code => format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code></Error>"),
            };
            let len = body.len();
            let body = if request.method == "HEAD" { "" } else { &body };
            write!(to, "HTTP/1.1 {status}\r\n{headers}Content-Length: {len}\r\n\r\n{body}").ok()
        };
        if query.contains("list-type=2") {
            let fault = self.next_fault(path);
            if let Fault::Status(status, code, headers) = fault {
                return refuse(to, status, code, headers);
            }
            let body = self.list(path, query);
            return write!(to, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len())
                .ok();
        }
        let fault = self.next_fault(path);
        if let Fault::Status(status, code, headers) = fault {
            return refuse(to, status, code, headers);
        }
        if fault == Fault::StallHead {
            return self.stall();
        }
        if let Some(headers) = self.redirects.lock().unwrap().get(path) {
            return refuse(to, "302 Found", "", headers);
        }
        let Some(file) = self.files.lock().unwrap().get(path).cloned() else {
            return refuse(to, "404 Not Found", "NoSuchKey", "");
        };
        let matches = request.headers.get("if-match").is_none_or(|tag| *tag == file.tag);
        if !matches && fault != Fault::OtherTag {
            return refuse(to, "412 Precondition Failed", "PreconditionFailed", "");
        }
        let len = file.bytes.len();
        let identity = match fault {
            Fault::NoIdentity => String::new(),
            Fault::TimeOnly => "Last-Modified: Sat, 28 Nov 2026 13:34:50 GMT\r\n".to_owned(),
            Fault::OtherTag => "ETag: \"other\"\r\n".to_owned(),
            _ => format!("ETag: {}\r\nLast-Modified: Sat, 28 Nov 2026 13:34:50 GMT\r\n", file.tag),
        };
        if request.method == "HEAD" {
            return write!(to, "HTTP/1.1 200 OK\r\n{identity}Content-Length: {len}\r\n\r\n").ok();
        }
        let (start, end) = match request.range {
            _ if fault == Fault::Whole => {
                write!(to, "HTTP/1.1 200 OK\r\n{identity}Content-Length: {len}\r\n\r\n").ok()?;
                return to.write_all(&file.bytes).ok();
            }
            None => {
                write!(to, "HTTP/1.1 200 OK\r\n{identity}Content-Length: {len}\r\n\r\n").ok()?;
                return to.write_all(&file.bytes).ok();
            }
            Some((start, _)) if start >= len as u64 => {
                let headers = format!("Content-Range: bytes */{len}\r\n");
                return refuse(to, "416 Range Not Satisfiable", "InvalidRange", &headers);
            }
            Some((start, end)) => (start as usize, (end as usize).min(len)),
        };
        let mut body = file.bytes[start..end].to_vec();
        let shift = usize::from(fault == Fault::WrongRange);
        let size = if fault == Fault::OtherSize { 2 * len } else { len };
        let mut range =
            format!("Content-Range: bytes {}-{}/{size}\r\n", start + shift, end - 1 + shift);
        let mut length = body.len();
        let mut encoding = "";
        match fault {
            Fault::NoRange => range.clear(),
            Fault::Gzip => encoding = "Content-Encoding: gzip\r\n",
            Fault::Short => {
                body.truncate(length / 2);
                length = body.len();
            }
            Fault::Long => {
                body.extend([7; 10]);
                length = body.len();
            }
            Fault::Shifted | Fault::WrongRange => body.rotate_left(1),
            Fault::Flip => {
                let middle = length / 2;
                body[middle] ^= 1;
            }
            Fault::ShortChunked => {
                let half = &body[..length / 2];
                let head = "HTTP/1.1 206 Partial Content\r\nTransfer-Encoding: chunked\r\n";
                write!(to, "{head}{identity}{range}\r\n{:x}\r\n", half.len()).ok()?;
                to.write_all(half).ok()?;
                return to.write_all(b"\r\n0\r\n\r\n").ok();
            }
            _ => {}
        }
        let head = "HTTP/1.1 206 Partial Content\r\n";
        write!(to, "{head}{identity}{range}{encoding}Content-Length: {length}\r\n\r\n").ok()?;
        match fault {
            Fault::Cut(after, reset) => {
                to.write_all(&body[..after.min(length)]).ok()?;
                if reset {
                    thread::sleep(Duration::from_millis(20));
                    reset_on_close(to);
                }
                None
            }
            Fault::Stall(after) => {
                to.write_all(&body[..after.min(length)]).ok()?;
                self.stall()
            }
            Fault::Drip(len, wait) => body.chunks(len).try_for_each(|piece| {
                thread::sleep(wait);
                (!self.ended.load(Relaxed)).then_some(())?;
                to.write_all(piece).ok()
            }),
            _ => to.write_all(&body).ok(),
        }
    }

    fn stall(&self) -> Option<()> {
        while !self.ended.load(Relaxed) {
            thread::sleep(Duration::from_millis(20));
        }
        None
    }

    /// The objects of a bucket, `/bucket`, a thousand a page.
    fn list(&self, bucket: &str, query: &str) -> String {
        let field = |name: &str| {
            let value =
                query.split('&').find_map(|part| part.strip_prefix(name)?.strip_prefix('='));
            value.map(|value| value.replace("%2F", "/").replace("%20", " "))
        };
        let prefix = field("prefix").unwrap_or_default();
        let from: usize = field("continuation-token").map_or(0, |token| token.parse().unwrap());
        let bucket = format!("{}/", bucket.trim_end_matches('/'));
        let files = self.files.lock().unwrap();
        let keys =
            files.iter().filter_map(|(path, file)| Some((path.strip_prefix(&bucket)?, file)));
        let keys = keys
            .filter(|(key, _)| key.strip_prefix(&prefix).is_some_and(|rest| !rest.contains('/')));
        let all: Vec<_> = keys.collect();
        let page = all.iter().skip(from).take(1000);
        let mut body = String::from("<?xml version=\"1.0\"?><ListBucketResult>");
        for (key, file) in page {
            let (size, tag) = (file.bytes.len(), file.tag.replace('"', "&quot;"));
            body += &format!(
                "<Contents><Key>{key}</Key><LastModified>2026-11-28T13:34:50.000Z</LastModified>\
                 <ETag>{tag}</ETag><Size>{size}</Size></Contents>"
            );
        }
        if from + 1000 < all.len() {
            body += &format!(
                "<IsTruncated>true</IsTruncated><NextContinuationToken>{}</NextContinuationToken>",
                from + 1000
            );
        }
        body + "</ListBucketResult>"
    }
}

fn request(from: &mut BufReader<TcpStream>) -> Option<Request> {
    let mut line = String::new();
    from.read_line(&mut line).ok().filter(|read| *read > 0)?;
    let mut parts = line.split(' ');
    let (method, target) = (parts.next()?.to_owned(), parts.next()?.to_owned());
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        from.read_line(&mut line).ok().filter(|read| *read > 0)?;
        match line.trim_end().split_once(": ") {
            Some((name, value)) => {
                headers.insert(name.to_ascii_lowercase(), value.to_owned());
            }
            None => break,
        }
    }
    let range = headers.get("range").and_then(|range| {
        let (start, last) = range.strip_prefix("bytes=")?.split_once('-')?;
        Some((start.parse().ok()?, last.parse::<u64>().ok()? + 1))
    });
    Some(Request { method, target, range, headers })
}

/// Has closing the connection reset it.
fn reset_on_close(stream: &TcpStream) {
    use std::os::fd::AsRawFd;
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    // SAFETY: the option has this type and length, and the descriptor is open.
    let set = unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_LINGER,
            (&raw const linger).cast(),
            size_of::<libc::linger>() as libc::socklen_t,
        )
    };
    assert_eq!(set, 0);
}

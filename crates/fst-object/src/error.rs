//! What can go wrong with an object. No message holds a query, a signature or a token.

use std::fmt;
use std::time::Duration;

/// Why something about an object failed.
#[derive(Debug, thiserror::Error)]
#[error("{url}: {}{cause}", at(*.offset))]
pub struct Error {
    /// The object, or the folder, by its URL without a query.
    pub url: String,
    /// Up to where its bytes were read, where any were to be.
    pub offset: Option<u64>,
    /// What happened.
    pub cause: Cause,
}

fn at(offset: Option<u64>) -> String {
    offset.map(|offset| format!("at offset {offset}: ")).unwrap_or_default()
}

/// What happened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Cause {
    /// The URL cannot be used.
    #[error("{reason}")]
    Url {
        /// What is wrong with it.
        reason: String,
    },
    /// There is no such object.
    #[error("no such object")]
    NotFound,
    /// The server denies access.
    #[error("access denied ({status}{}){hint}", in_code(.code))]
    Denied {
        /// Status of the answer, 401 or 403.
        status: u16,
        /// The server's name for the reason, where it gives one.
        code: String,
        /// Where credentials are looked for.
        hint: &'static str,
    },
    /// Credentials are needed, and nobody has any.
    #[error("no credentials are set, and this machine has none{hint}")]
    NoCredentials {
        /// Where credentials are looked for.
        hint: &'static str,
    },
    /// The server refuses the request.
    #[error("the server answers {status}{}", in_code(.code))]
    Refused {
        /// Status of the answer.
        status: u16,
        /// The server's name for the reason, where it gives one.
        code: String,
    },
    /// The server's answer is not what was asked for.
    #[error("wrong answer of the server: {reason}")]
    Answer {
        /// What is wrong with it.
        reason: String,
    },
    /// The object is another than the one that was opened.
    #[error("the object changed meanwhile: {0}")]
    Changed(Difference),
    /// The connection fails, stalls, or is too slow.
    #[error("{reason}")]
    Transport {
        /// What happened last.
        reason: String,
    },
    /// Requests failed again and again.
    #[error("gave up after {attempts} attempts in {:.0} s: {last}", waited.as_secs_f64())]
    Exhausted {
        /// Requests that failed in succession.
        attempts: u32,
        /// Since when nothing worked.
        waited: Duration,
        /// The last failure.
        last: Box<Cause>,
    },
    /// A folder holds more objects than are looked at.
    #[error("more than {limit} objects in one folder; name a file or an index in it")]
    TooMany {
        /// How many are looked at.
        limit: usize,
    },
    /// Something of this process could not be set up.
    #[error("{reason}")]
    Setup {
        /// What, and why.
        reason: String,
    },
    /// The caller wants no more.
    #[error("cancelled")]
    Cancelled,
}

fn in_code(code: &str) -> String {
    if code.is_empty() { String::new() } else { format!(" {code}") }
}

/// How an object differs from the one that was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Difference {
    /// Its length is another.
    Length {
        /// Bytes when it was opened.
        was: u64,
        /// Bytes now.
        now: u64,
    },
    /// Its `ETag`, version or time is another, or the server says that it does not match.
    Version,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Length { was, now } => write!(f, "its length was {was} bytes and is {now}"),
            Self::Version => f.write_str("another version took its place"),
        }
    }
}

impl Cause {
    /// Whether the same request may work a little later.
    pub(crate) fn is_transient(&self) -> bool {
        match self {
            Self::Transport { .. } => true,
            Self::Refused { status, code } => {
                matches!(status, 408 | 429 | 500..)
                    || matches!(&**code, "SlowDown" | "RequestTimeout" | "InternalError")
            }
            _ => false,
        }
    }

    /// Whether credentials have expired, so that the same request may work with new ones.
    pub(crate) fn is_expired(&self) -> bool {
        let (Self::Denied { code, .. } | Self::Refused { code, .. }) = self else { return false };
        matches!(
            &**code,
            "ExpiredToken" | "ExpiredTokenException" | "TokenRefreshRequired" | "RequestExpired"
        )
    }
}

//! Where an object is, by its URL.

use object_store::path::Path;
use url::Url;

use crate::error::{Cause, Error};
use crate::hub::HubFile;

/// Whether `text` is a URL of a kind that this crate reads: `s3://`, `gs://`, `az://`, `hf://`, `http://` or
/// `https://`.
pub fn is_url(text: &str) -> bool {
    Scheme::of(text).is_some()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scheme {
    S3,
    Gcs,
    Azure,
    Hub,
    Web,
}

impl Scheme {
    const ALL: [(&'static str, Self); 6] = [
        ("s3://", Self::S3),
        ("gs://", Self::Gcs),
        ("az://", Self::Azure),
        ("hf://", Self::Hub),
        ("http://", Self::Web),
        ("https://", Self::Web),
    ];

    fn of(text: &str) -> Option<(&'static str, Self)> {
        let begins = |prefix: &str| text.get(..prefix.len()).is_some_and(|t| t == prefix);
        Self::ALL.into_iter().find(|(prefix, _)| begins(prefix))
    }
}

/// A place that was parsed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Location {
    /// A key in a bucket or container. Keys are taken as they are written: nothing in them is decoded.
    Bucket { scheme: Scheme, bucket: String, key: String },
    /// A file of the hub, or a folder.
    Hub(HubFile),
    /// A file of a web server.
    Web(Url),
}

impl Location {
    pub(crate) fn parse(text: &str) -> Result<Self, Error> {
        let error =
            |reason: String| Error { url: shown(text), offset: None, cause: Cause::Url { reason } };
        let Some((prefix, scheme)) = Scheme::of(text) else {
            return Err(error("no URL that can be read".to_owned()));
        };
        if scheme == Scheme::Web {
            let url = Url::parse(text).map_err(|e| error(format!("malformed URL: {e}")))?;
            if !url.username().is_empty() || url.password().is_some() {
                return Err(error("URLs with a user name or password are not taken".to_owned()));
            }
            if url.query().is_some() || url.fragment().is_some() {
                return Err(error("URLs with a query or a fragment are not taken".to_owned()));
            }
            return Ok(Self::Web(url));
        }
        if scheme == Scheme::Hub {
            return HubFile::parse(&text[prefix.len()..]).map(Self::Hub).map_err(error);
        }
        let (bucket, key) =
            text[prefix.len()..].split_once('/').unwrap_or((&text[prefix.len()..], ""));
        let sound = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if bucket.is_empty() || !bucket.chars().all(sound) {
            return Err(error(format!("{bucket:?} is no name of a bucket")));
        }
        Ok(Self::Bucket { scheme, bucket: bucket.to_owned(), key: key.to_owned() })
    }

    /// The key as the crate `object_store` takes it, which can express most keys and no others.
    pub(crate) fn path(&self) -> Result<Path, Cause> {
        match self {
            // The address of its store is the whole URL.
            Self::Web(_) | Self::Hub(_) => Ok(Path::default()),
            Self::Bucket { key, .. } => {
                let unsound = |why: &str| Cause::Url { reason: format!("the key {key:?} {why}") };
                if key.starts_with('/') || key.ends_with('/') {
                    return Err(unsound("begins or ends with a slash, and is no object's"));
                }
                Path::parse(key).ok().filter(|path| path.as_ref() == key).ok_or_else(|| {
                    unsound("has an empty, `.` or `..` part or a control character: such objects cannot be read")
                })
            }
        }
    }
}

/// A URL without what may be a secret: its query and its fragment, and a user's name and password.
pub(crate) fn shown(url: &str) -> String {
    let web = Scheme::of(url).is_some_and(|(_, scheme)| scheme == Scheme::Web);
    if !web {
        return url.to_owned();
    }
    let url = &url[..url.find(['?', '#']).unwrap_or(url.len())];
    let (scheme, rest) = url.split_once("://").unwrap_or(("", url));
    let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let host = host.rsplit_once('@').map_or(host, |(_, host)| host);
    format!("{scheme}://{host}{path}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_taken_as_they_are_or_refused() {
        for key in ["a", "m/model.safetensors", "a b+c%20é~/ñ #?.x", "a%2Fb", "%", "...", "a*b"] {
            let location = Location::parse(&format!("s3://bucket/{key}")).unwrap();
            assert_eq!(location.path().unwrap().as_ref(), key);
        }
        for key in ["a//b", "/a", "x/../y", "./y", "tab\tkey", "a/\u{7f}", "a/"] {
            let location = Location::parse(&format!("s3://bucket/{key}")).unwrap();
            assert!(matches!(location.path(), Err(Cause::Url { .. })), "{key:?}");
        }
    }

    #[test]
    fn urls_that_cannot_be_read_are_refused() {
        for url in
            ["s3://", "s3:///key", "s3://a b/key", "gs://x@y/key", "http://", "ftp://a/b", "m"]
        {
            assert!(Location::parse(url).is_err(), "{url}");
        }
        assert!(!is_url("model"));
        assert!(!is_url("s3:/x"));
        assert!(is_url("az://c/x"));
    }

    #[test]
    fn no_message_has_a_secret() {
        let error = Location::parse("https://me:word@host/a?X-Amz-Signature=s#f").unwrap_err();
        assert!(error.to_string().starts_with("https://host/a: URLs with a user"), "{error}");
        assert_eq!(shown("s3://bucket/a?b#c"), "s3://bucket/a?b#c");
    }
}

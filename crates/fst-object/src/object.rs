//! Objects that are open for reading.

use std::ops::Range;
use std::sync::Arc;

use object_store::list::PaginatedListOptions;
use object_store::path::Path;

use crate::cache::{Cache, Copy};
use crate::error::{Cause, Error};
use crate::fetch::Fetch;
use crate::location::{Location, shown};
use crate::runtime::block_on;
use crate::settings::{Counted, Counters, Settings};
use crate::store::Store;

/// Names of a folder that are looked at.
const MAX_NAMES: usize = 10_000;

/// What tells that an object is the one that it was.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Identity {
    /// Length in bytes.
    pub len: u64,
    /// Its `ETag`, with quotes.
    pub etag: Option<String>,
    /// Its version or generation.
    pub version: Option<String>,
    /// When it was written, in seconds since 1970.
    pub modified: Option<i64>,
}

/// An object that was found, and whose identity is kept. A clone is the same one.
#[derive(Debug, Clone)]
pub struct Object {
    inner: Arc<Inner>,
    copy: Option<Arc<Copy>>,
}

#[derive(Debug)]
struct Inner {
    store: Arc<Store>,
    key: Path,
    /// Without what may be a secret.
    url: String,
    identity: Identity,
    settings: Settings,
    counted: Arc<Counted>,
}

impl Object {
    /// Finds the object that `url` names; also returns its first bytes, `head` of them or all that there are,
    /// by the same request. `stopped` is asked, every 50 ms or so, whether the caller wants no more.
    ///
    /// # Errors
    ///
    /// What is wrong with the URL, the credentials, the server or its answer; see [`Cause`].
    pub fn open(
        url: &str,
        head: u64,
        settings: &Settings,
        stopped: &dyn Fn() -> bool,
    ) -> Result<(Self, Vec<u8>), Error> {
        let location = Location::parse(url)?;
        let (counted, mut bytes) = (Arc::<Counted>::default(), Vec::new());
        let mut opened = || {
            let key = location.path()?;
            let store = Store::of(&location)?;
            let mut fetch = Fetch::new(&store, &key, settings, &counted, stopped);
            fetch.range = 0..head.max(1);
            let identity = block_on(async {
                match fetch.run(&mut |part| bytes.extend_from_slice(part)).await {
                    Ok(()) => fetch.identity.take().ok_or(Cause::NotFound),
                    // No range of an empty object can be had.
                    Err(Cause::Refused { status: 416, .. }) => fetch.head().await,
                    Err(cause) => Err(cause),
                }
            })??;
            Ok((store, key, identity))
        };
        let (store, key, identity) =
            opened().map_err(|cause| Error { url: shown(url), offset: None, cause })?;
        bytes.truncate(head as usize);
        let (url, settings) = (shown(url), settings.clone());
        let inner = Inner { store, key, url, identity, settings, counted };
        Ok((Self { inner: Arc::new(inner), copy: None }, bytes))
    }

    /// Has what is read of it, from its first bytes `head` on, copied into a cache.
    pub fn copy_to(&mut self, cache: &Cache, head: &[u8]) {
        self.copy = cache.copy(self.url(), self.identity(), head);
    }

    /// Keeps the [copy](Self::copy_to), if all was read: the caller knows that it is right.
    pub fn keep_copy(&self) {
        if let Some(copy) = &self.copy {
            copy.keep();
        }
    }

    /// Its URL, without a query.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.inner.url
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.inner.identity.len
    }

    /// Whether it has no byte.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What it was when it was opened.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.inner.identity
    }

    /// What its requests came to so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.inner.counted.now()
    }

    /// The server that ranges of it are asked of.
    #[must_use]
    pub fn endpoint(&self) -> &str {
        self.inner.store.endpoint()
    }

    /// Whether both are one object of one store.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        self.inner.url == other.inner.url
    }

    /// Whether both are one version of one object, as far as that is certain: by a strong `ETag` or a version. The
    /// time alone, in seconds, proves nothing.
    #[must_use]
    pub fn is_same_version(&self, other: &Self) -> bool {
        let one = &self.inner.identity;
        let certain = one.strong_etag().is_some() || one.version.is_some();
        self.is_same(other) && *one == other.inner.identity && certain
    }

    /// Reads `range`: `take` gets its bytes in order and each of them once, on the calling thread. After an
    /// error it may have got some. `stopped` is asked whether the caller wants no more.
    ///
    /// # Errors
    ///
    /// [`Cause::Changed`] as soon as the server answers with another object; [`Cause::Exhausted`] once the
    /// bounds of the [`Settings`] are reached; and others that will not pass.
    pub fn read(
        &self,
        range: Range<u64>,
        take: &mut dyn FnMut(&[u8]),
        stopped: &dyn Fn() -> bool,
    ) -> Result<(), Error> {
        let (start, len) = (range.start, range.end.saturating_sub(range.start));
        let mut fetch = self.fetch(range, stopped);
        let mut copied = self.copy.as_ref().and_then(|copy| Some((copy, copy.room(len)?)));
        let mut take_both = |part: &[u8]| {
            if let Some((_, bytes)) = &mut copied {
                bytes.extend_from_slice(part);
            }
            take(part);
        };
        let read = block_on(fetch.run(&mut take_both)).flatten();
        match (copied, &read) {
            (Some((copy, bytes)), Ok(())) => copy.put(start, bytes),
            (Some((copy, _)), Err(_)) => copy.put_nothing(len),
            (None, _) => {}
        }
        read.map_err(|cause| self.error(Some(fetch.range.start), cause))
    }

    /// Asks whether the object is still what it was when it was opened.
    ///
    /// # Errors
    ///
    /// [`Cause::Changed`], and others where that cannot be told.
    pub fn verify(&self, stopped: &dyn Fn() -> bool) -> Result<(), Error> {
        let mut fetch = self.fetch(0..0, stopped);
        let now = block_on(fetch.head()).flatten();
        now.and_then(|now| self.inner.identity.compare(&now).map_err(Cause::Changed))
            .map_err(|cause| self.error(None, cause))
    }

    fn fetch<'a>(&'a self, range: Range<u64>, stopped: &'a dyn Fn() -> bool) -> Fetch<'a> {
        let Inner { store, key, identity, settings, counted, .. } = &*self.inner;
        let mut fetch = Fetch::new(store, key, settings, counted, stopped);
        (fetch.identity, fetch.range) = (Some(identity.clone()), range);
        fetch
    }

    fn error(&self, offset: Option<u64>, cause: Cause) -> Error {
        Error { url: self.inner.url.clone(), offset, cause }
    }
}

/// What a folder holds.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Listing {
    /// Its URL; of a folder of the hub, that at the commit which the revision is now.
    pub url: String,
    /// The names of its objects, in no particular order, without those of folders in it.
    pub names: Vec<String>,
}

/// Lists a folder of a bucket or of the hub; `None` where the server cannot list, as web servers cannot. What
/// is no folder holds nothing.
///
/// # Errors
///
/// As for [`Object::open`], and [`Cause::TooMany`].
pub fn list(
    url: &str,
    settings: &Settings,
    stopped: &dyn Fn() -> bool,
) -> Result<Option<Listing>, Error> {
    let location = Location::parse(url)?;
    let listed = || {
        let (key, counted) = (Path::default(), Counted::default());
        let store = Store::of(&location)?;
        let mut fetch = Fetch::new(&store, &key, settings, &counted, stopped);
        let (url, names) = match &location {
            Location::Web(_) => return Ok(None),
            Location::Hub(file) => file.at(&block_on(fetch.commit(file))??),
            Location::Bucket { key, .. } => {
                let prefix = match key.trim_end_matches('/') {
                    "" => String::new(),
                    key => format!("{key}/"),
                };
                (url.to_owned(), block_on(fetch.names(&prefix, MAX_NAMES))??)
            }
        };
        Ok(Some(Listing { url, names }))
    };
    listed().map_err(|cause| Error { url: shown(url), offset: None, cause })
}

impl Fetch<'_> {
    /// The names behind `prefix`, up to the next slash, page by page.
    async fn names(&mut self, prefix: &str, limit: usize) -> Result<Vec<String>, Cause> {
        let (mut names, mut token) = (Vec::new(), None);
        loop {
            let options = || PaginatedListOptions {
                delimiter: Some("/".into()),
                page_token: token.clone(),
                ..PaginatedListOptions::default()
            };
            let page = self.page(prefix, &options).await?;
            let Some(page) = page else { return Ok(names) };
            let of_page = page.result.objects.iter().map(|object| object.location.as_ref());
            names.extend(of_page.filter_map(|key| key.strip_prefix(prefix)).map(str::to_owned));
            if names.len() > limit {
                return Err(Cause::TooMany { limit });
            }
            match page.page_token {
                // A server that repeats itself would do so for ever.
                Some(next) if token.as_ref() == Some(&next) => {
                    let reason = "the same page of the listing again".to_owned();
                    return Err(Cause::Answer { reason });
                }
                None => return Ok(names),
                next => token = next,
            }
        }
    }
}

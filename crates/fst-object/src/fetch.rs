//! One range of one object, however many requests it takes.

use std::ops::Range;
use std::pin::pin;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future::{Either, select};
use futures_util::stream::BoxStream;
use object_store::list::{PaginatedListOptions, PaginatedListResult};
use object_store::path::Path;
use object_store::{Attribute, GetOptions, GetRange, GetResult, ObjectMeta};
use tokio::time::sleep;

use crate::error::{Cause, Difference};
use crate::hub::{Commit, HubFile};
use crate::object::Identity;
use crate::settings::{Counted, Settings};
use crate::store::Store;
use crate::transport;

/// How often somebody who waits looks whether the caller wants no more.
const TICK: Duration = Duration::from_millis(50);
/// Progress that ends a succession of failures, in bytes.
const PROGRESS: u64 = 1 << 20;
/// The longest wait between two requests that the server did not ask for.
const MAX_BACKOFF: Duration = Duration::from_secs(10);

/// A range that is being fetched.
pub(crate) struct Fetch<'a> {
    store: &'a Store,
    key: &'a Path,
    settings: &'a Settings,
    counted: &'a Counted,
    stopped: &'a dyn Fn() -> bool,
    /// What every answer must be of; of an object that is being opened, what the first was of.
    pub(crate) identity: Option<Identity>,
    /// Bytes that are still to come. Of an object that is being opened they may end behind its end.
    pub(crate) range: Range<u64>,
}

/// A request that failed.
struct Failure {
    cause: Cause,
    /// How long the server asks to wait.
    wait: Option<Duration>,
    generation: u64,
}

impl<'a> Fetch<'a> {
    /// A fetch of nothing yet, of any object at `key`.
    pub(crate) fn new(
        store: &'a Store,
        key: &'a Path,
        settings: &'a Settings,
        counted: &'a Counted,
        stopped: &'a dyn Fn() -> bool,
    ) -> Self {
        Self { store, key, settings, counted, stopped, identity: None, range: 0..0 }
    }

    /// Fetches the range; `take` gets its bytes in order, each of them once.
    pub(crate) async fn run(&mut self, take: &mut dyn FnMut(&[u8])) -> Result<(), Cause> {
        let start = self.range.start;
        let read = self.persist(async |fetch: &mut Self| fetch.once(&mut *take).await).await;
        self.counted.received(start..self.range.start);
        read
    }

    /// Asks what the object is now.
    pub(crate) async fn head(&mut self) -> Result<Identity, Cause> {
        let mut found = None;
        self.persist(async |fetch: &mut Self| {
            let options = GetOptions { head: true, ..GetOptions::default() };
            found = Some(Identity::of(&fetch.get(options).await?.meta));
            Ok(())
        })
        .await?;
        found.ok_or(Cause::Cancelled)
    }

    /// A page of a listing; `None` of a store that has none.
    pub(crate) async fn page(
        &mut self,
        prefix: &str,
        options: &dyn Fn() -> PaginatedListOptions,
    ) -> Result<Option<PaginatedListResult>, Cause> {
        let mut found = None;
        self.persist(async |fetch: &mut Self| {
            let store = fetch.store.current();
            let Some(lists) = &store.lists else { return Ok(()) };
            fetch.counted.requests.fetch_add(1, Relaxed);
            let prefix = Some(prefix).filter(|prefix| !prefix.is_empty());
            let page = lists.list_paginated(prefix, options());
            let failed = |(cause, wait)| Failure { cause, wait, generation: store.generation };
            let page = fetch.within(fetch.settings.read_timeout, page).await;
            let page = page.map_err(|cause| failed((cause, None)))?;
            let page = page.map_err(|error| transport::cause(&error, fetch.store.hint()));
            found = Some(page.map_err(failed)?);
            Ok(())
        })
        .await?;
        Ok(found)
    }

    /// What a revision of the hub is.
    pub(crate) async fn commit(&mut self, file: &HubFile) -> Result<Commit, Cause> {
        let mut found = None;
        self.persist(async |fetch: &mut Self| {
            let generation = fetch.store.current().generation;
            let failed = |(cause, wait)| Failure { cause, wait, generation };
            let client = transport::client();
            let client = client.map_err(|reason| failed((Cause::Setup { reason }, None)))?;
            fetch.counted.requests.fetch_add(1, Relaxed);
            let commit = fetch.within(fetch.settings.read_timeout, file.commit(&client)).await;
            let commit = commit.map_err(|cause| failed((cause, None)))?;
            found = Some(commit.map_err(|fault| failed(fault.cause(fetch.store.hint())))?);
            Ok(())
        })
        .await?;
        found.ok_or(Cause::NotFound)
    }

    /// Has `request` made again and again while it fails for reasons that may pass.
    async fn persist(
        &mut self,
        mut request: impl AsyncFnMut(&mut Self) -> Result<(), Failure>,
    ) -> Result<(), Cause> {
        let (mut failures, mut since, mut from) = (0, Instant::now(), self.range.start);
        let mut renewed = false;
        loop {
            let Err(Failure { cause, wait, generation }) = request(self).await else {
                return Ok(());
            };
            if self.range.start - from >= PROGRESS {
                (failures, since, from) = (0, Instant::now(), self.range.start);
            }
            failures += 1;
            if cause.is_expired() && !renewed {
                renewed = true;
                self.store.renew(generation)?;
            } else if !cause.is_transient() {
                return Err(cause);
            } else {
                let wait = self.backoff(failures).max(wait.unwrap_or_default());
                if failures >= self.settings.attempts
                    || since.elapsed() + wait > self.settings.patience
                {
                    let (attempts, waited) = (failures, since.elapsed());
                    return Err(Cause::Exhausted { attempts, waited, last: Box::new(cause) });
                }
                self.within(wait + TICK, sleep(wait)).await?;
            }
            self.counted.retries.fetch_add(1, Relaxed);
        }
    }

    /// The wait after so many failures, half of it by chance, so that those who failed together do not come
    /// back together.
    fn backoff(&self, failures: u32) -> Duration {
        use std::hash::{BuildHasher, RandomState};
        let most =
            self.settings.backoff.saturating_mul(1 << (failures - 1).min(16)).min(MAX_BACKOFF);
        let chance = RandomState::new().hash_one(failures) as u32;
        most / 2 + (most / 2).mul_f64(f64::from(chance) / f64::from(u32::MAX))
    }

    /// One request for what is left of the range.
    async fn once(&mut self, take: &mut dyn FnMut(&[u8])) -> Result<(), Failure> {
        if self.range.is_empty() {
            return Ok(());
        }
        let tag = self.identity.as_ref().and_then(Identity::strong_etag);
        let options = GetOptions {
            range: Some(GetRange::Bounded(self.range.clone())),
            if_match: tag.map(str::to_owned),
            ..GetOptions::default()
        };
        let generation = self.store.current().generation;
        let answer = self.get(options).await?;
        let failed = |cause| Failure { cause, wait: None, generation };
        self.check(&answer).map_err(failed)?;
        self.drain(answer.into_stream(), take).await.map_err(failed)
    }

    /// Makes a request, and waits until its answer begins.
    async fn get(&mut self, options: GetOptions) -> Result<GetResult, Failure> {
        let store = self.store.current();
        self.counted.requests.fetch_add(1, Relaxed);
        let began = Instant::now();
        let answer = store.objects.get_opts(self.key, options);
        // Connecting and redirects may take their time, too.
        let answer = self.within(self.settings.read_timeout, answer).await;
        let failed = |(cause, wait)| Failure { cause, wait, generation: store.generation };
        let answer = answer.map_err(|cause| failed((cause, None)))?;
        let answer = answer.map_err(|error| transport::cause(&error, self.store.hint()));
        if let Err((Cause::Refused { status, code }, _)) = &answer
            && (matches!(status, 429 | 503) || code == "SlowDown")
        {
            self.counted.throttled.fetch_add(1, Relaxed);
        }
        let answer = answer.map_err(failed)?;
        self.counted.answered(began.elapsed());
        Ok(answer)
    }

    /// Compares an answer with what was asked for and of what. Servers ignore `If-Match`, and caches between
    /// them and here answer with what they have.
    fn check(&mut self, answer: &GetResult) -> Result<(), Cause> {
        let wrong = |reason: String| Err(Cause::Answer { reason });
        let found = Identity::of(&answer.meta);
        match &self.identity {
            Some(identity) => identity.compare(&found).map_err(Cause::Changed)?,
            None if found.etag.is_none() && found.modified.is_none() => {
                return wrong(
                    "neither an ETag nor a time of modification: a change of the object could not be noticed"
                        .to_owned(),
                );
            }
            None => {
                self.range.end = self.range.end.min(found.len);
                self.identity = Some(found);
            }
        }
        if answer.range != self.range {
            return wrong(format!("bytes {:?} for {:?}", answer.range, self.range));
        }
        // Also said by answers that pass through something else than our transport.
        match answer.attributes.get(&Attribute::ContentEncoding) {
            Some(encoding) if &**encoding != "identity" => {
                wrong(format!("the bytes are encoded as {:?}", &**encoding))
            }
            _ => Ok(()),
        }
    }

    /// Takes what an answer brings. It may be short, which is tried again, and must not be long.
    async fn drain(
        &mut self,
        mut body: BoxStream<'static, object_store::Result<Bytes>>,
        take: &mut dyn FnMut(&[u8]),
    ) -> Result<(), Cause> {
        let (mut window, mut in_window) = (Instant::now(), 0u64);
        loop {
            let bytes = match self.within(self.settings.read_timeout, body.next()).await? {
                Some(Ok(bytes)) => bytes,
                Some(Err(error)) => return Err(transport::cause(&error, "").0),
                None if self.range.is_empty() => return Ok(()),
                None => {
                    let reason =
                        "the answer ends before the range that it says it holds".to_owned();
                    return Err(Cause::Transport { reason });
                }
            };
            let len = bytes.len() as u64;
            if len > self.range.end - self.range.start {
                let reason = "more bytes than the range that it says it holds".to_owned();
                return Err(Cause::Answer { reason });
            }
            take(&bytes);
            self.range.start += len;
            in_window += len;
            let took = window.elapsed();
            if took >= self.settings.rate_window {
                if in_window < self.settings.least_bytes && !self.range.is_empty() {
                    let reason = format!("only {in_window} bytes in {:.1} s", took.as_secs_f64());
                    return Err(Cause::Transport { reason });
                }
                (window, in_window) = (Instant::now(), 0);
            }
        }
    }

    /// Waits for something, but not longer than `limit`, and not if the caller wants no more.
    async fn within<T>(&self, limit: Duration, what: impl Future<Output = T>) -> Result<T, Cause> {
        let began = Instant::now();
        let mut what = pin!(what);
        loop {
            if (self.stopped)() {
                return Err(Cause::Cancelled);
            }
            if let Either::Left((done, _)) = select(&mut what, pin!(sleep(TICK))).await {
                return Ok(done);
            }
            if began.elapsed() >= limit {
                let reason = format!("nothing came for {:.1} s", limit.as_secs_f64());
                return Err(Cause::Transport { reason });
            }
        }
    }
}

impl Identity {
    /// What an answer says of the object that it is of.
    pub(crate) fn of(meta: &ObjectMeta) -> Self {
        // The crate's word for a time that the server does not tell.
        let modified = Some(meta.last_modified.timestamp()).filter(|seconds| *seconds != 0);
        let (etag, version) = (meta.e_tag.clone(), meta.version.clone());
        Self { len: meta.size, etag, version, modified }
    }

    /// Its `ETag`, if equal ones mean equal bytes.
    pub(crate) fn strong_etag(&self) -> Option<&str> {
        self.etag.as_deref().filter(|tag| !tag.starts_with("W/"))
    }

    /// How another object differs from this one. A tag, version or time counts where this one has it: what a
    /// server told once it must tell again.
    pub(crate) fn compare(&self, now: &Self) -> Result<(), Difference> {
        fn differs<T: PartialEq>(was: &Option<T>, now: &Option<T>) -> bool {
            was.is_some() && was != now
        }
        if self.len != now.len {
            return Err(Difference::Length { was: self.len, now: now.len });
        }
        if differs(&self.etag, &now.etag)
            || differs(&self.version, &now.version)
            // A tag says more than a time, and servers behind one address may disagree on times.
            || (self.etag.is_none() && differs(&self.modified, &now.modified))
        {
            return Err(Difference::Version);
        }
        Ok(())
    }
}

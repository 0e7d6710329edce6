//! Models of the Hugging Face hub: what a revision has, and where its bytes are.
//!
//! The hub says which commit a revision is and which files that has, and what each file is
//! (`X-Linked-Etag`, `X-Linked-Size`). The bytes of large ones come from other hosts, at addresses that are
//! signed for a while: the hub is asked for one once, and again when it is refused.

use std::env;
use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use http::header::{AUTHORIZATION, CONTENT_RANGE, ETAG, HeaderValue, IF_MATCH};
use http::{HeaderMap, Method, StatusCode};
use reqwest::{Client, Request, Response};
use serde::Deserialize;
use url::Url;

use crate::error::Cause;
use crate::transport::{Fault, follow};

/// Bytes of a list of files that are looked at.
const MAX_LIST: usize = 64 << 20;

/// A file, or a folder, of a revision of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HubFile {
    org: String,
    name: String,
    revision: String,
    /// Empty for all of it.
    path: String,
}

/// A commit, as the hub describes it.
#[derive(Debug, Deserialize)]
pub(crate) struct Commit {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Debug, Deserialize)]
struct Sibling {
    rfilename: String,
}

/// Organisation, name, revision and path of `ORG/NAME[@REVISION][/PATH]`, which follows `hf://`, whether there are
/// such or not.
#[must_use]
pub fn hub_parts(text: &str) -> (&str, &str, String, &str) {
    let (org, rest) = text.split_once('/').unwrap_or((text, ""));
    let (name, path) = rest.split_once('/').unwrap_or((rest, ""));
    let (name, revision) = name.split_once('@').unwrap_or((name, "main"));
    (org, name, revision.replace("%2F", "/").replace("%2f", "/"), path)
}

impl HubFile {
    /// Parses what follows `hf://`.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let sound = |part: &str| {
            let inside = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            !part.is_empty() && !part.starts_with('.') && part.chars().all(inside)
        };
        let (org, name, revision, path) = hub_parts(text);
        if !sound(org) || !sound(name) {
            return Err("a model of the hub is written hf://ORG/NAME".to_owned());
        }
        if !revision.split('/').all(sound) {
            return Err(format!("{revision:?} is no revision; slashes in one are written %2F"));
        }
        let (org, name, path) = (org.to_owned(), name.to_owned(), path.trim_end_matches('/'));
        Ok(Self { org, name, revision, path: path.to_owned() })
    }

    fn url(&self, prefix: &[&str], kind: &str, path: &str) -> Result<Url, Cause> {
        let endpoint = variable("HF_ENDPOINT").and_then(|value| value.into_string().ok());
        let endpoint = endpoint.as_deref().unwrap_or("https://huggingface.co");
        let unsound =
            || Cause::Setup { reason: "HF_ENDPOINT is no address of a server".to_owned() };
        let mut url = Url::parse(endpoint).map_err(|_| unsound())?;
        let web = matches!(url.scheme(), "http" | "https") && url.username().is_empty();
        let mut parts = url.path_segments_mut().map_err(|()| unsound())?;
        parts.pop_if_empty().extend(prefix).extend([&*self.org, &self.name, kind, &self.revision]);
        parts.extend(path.split('/').filter(|part| !part.is_empty()));
        drop(parts);
        if web { Ok(url) } else { Err(unsound()) }
    }

    /// Where the hub gives the file.
    pub(crate) fn address(&self) -> Result<Url, Cause> {
        self.url(&[], "resolve", &self.path)
    }

    /// Asks the hub what the revision is.
    pub(crate) async fn commit(&self, client: &Client) -> Result<Commit, Fault> {
        let url = self.url(&["api", "models"], "revision", "");
        let url = url.map_err(|cause| Fault::Answer(cause.to_string()))?;
        let mut request = Request::new(Method::GET, url);
        if let Some(token) = token() {
            request.headers_mut().insert(AUTHORIZATION, token);
        }
        let answer = follow(client, request, |_, _| true).await?;
        let document = crate::transport::document(answer, MAX_LIST).await?;
        serde_json::from_slice(&document)
            .ok()
            .filter(|commit: &Commit| {
                commit.sha.len() >= 40 && commit.sha.bytes().all(|byte| byte.is_ascii_hexdigit())
            })
            .ok_or_else(|| Fault::Answer("no description of a revision".to_owned()))
    }

    /// Its URL at this commit, and the names of the files in it if it is a folder.
    pub(crate) fn at(&self, commit: &Commit) -> (String, Vec<String>) {
        let Self { org, name, path, .. } = self;
        let slash = if path.is_empty() { "" } else { "/" };
        let prefix = format!("{path}{slash}");
        let names = commit.siblings.iter().filter_map(|file| file.rfilename.strip_prefix(&prefix));
        let names = names.filter(|name| !name.contains('/')).map(str::to_owned).collect();
        (format!("hf://{org}/{name}@{}{slash}{path}", commit.sha), names)
    }
}

fn variable(name: &str) -> Option<OsString> {
    env::var_os(name).filter(|value| !value.is_empty())
}

/// The user's token, where the hub's own tools look for it.
fn token() -> Option<HeaderValue> {
    let given = || variable("HF_TOKEN").or_else(|| variable("HUGGING_FACE_HUB_TOKEN"));
    let home = || {
        let home = || variable("HOME").map(PathBuf::from);
        let cache = || variable("XDG_CACHE_HOME").map(PathBuf::from);
        let cache = || cache().or_else(|| Some(home()?.join(".cache")));
        let place = variable("HF_HOME").map(PathBuf::from);
        let place = place.map(|place| match (place.strip_prefix("~"), home()) {
            (Ok(rest), Some(home)) => home.join(rest),
            _ => place,
        });
        place.or_else(|| Some(cache()?.join("huggingface")))
    };
    let file = || {
        let file = variable("HF_TOKEN_PATH").map(PathBuf::from);
        std::fs::read_to_string(file.or_else(|| Some(home()?.join("token")))?).ok()
    };
    let token = given().and_then(|token| token.into_string().ok()).or_else(file)?;
    let mut header = HeaderValue::from_str(&format!("Bearer {}", token.trim())).ok()?;
    header.set_sensitive(true);
    (!token.trim().is_empty()).then_some(header)
}

/// What the hub says of a file whose bytes are elsewhere.
#[derive(Debug, Clone, Default)]
struct Linked {
    etag: Option<HeaderValue>,
    size: Option<HeaderValue>,
}

impl Linked {
    fn of(headers: &HeaderMap) -> Self {
        let of = |name: &str| headers.get(name).cloned();
        Self { etag: of("x-linked-etag"), size: of("x-linked-size") }
    }

    /// An answer with bytes, held to what the hub says.
    fn onto(&self, mut answer: Response) -> Result<Response, Fault> {
        let size = |value: &HeaderValue| value.to_str().ok()?.parse::<u64>().ok();
        let whole =
            |value: &HeaderValue| value.to_str().ok()?.rsplit_once('/')?.1.parse::<u64>().ok();
        if let Some(expected) = self.size.as_ref().and_then(size)
            && let Some(found) = answer.headers().get(CONTENT_RANGE).and_then(whole)
            && expected != found
        {
            let reason = format!("{found} bytes where the hub says that there are {expected}");
            return Err(Fault::Answer(reason));
        }
        if let Some(etag) = &self.etag {
            answer.headers_mut().insert(ETAG, etag.clone());
        }
        Ok(answer)
    }
}

/// The way to the bytes of one file.
#[derive(Debug, Default)]
pub(crate) struct HubWay {
    token: Option<HeaderValue>,
    /// Where the hub led to, with a signature.
    elsewhere: Mutex<Option<(Url, Linked)>>,
}

impl HubWay {
    pub(crate) fn new() -> Self {
        Self { token: token(), ..Self::default() }
    }

    fn elsewhere(&self) -> std::sync::MutexGuard<'_, Option<(Url, Linked)>> {
        self.elsewhere.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a request for the file.
    pub(crate) async fn send(
        &self,
        client: &Client,
        mut request: Request,
    ) -> Result<Response, Fault> {
        // Other hosts have tags of their own; answers are compared with the hub's.
        request.headers_mut().remove(IF_MATCH);
        let get = request.method() == Method::GET;
        let known = self.elsewhere().clone().filter(|_| get);
        if let Some((url, linked)) = known
            && let Some(mut direct) = request.try_clone()
        {
            *direct.url_mut() = url;
            let answer = follow(client, direct, |_, _| true).await?;
            if !matches!(answer.status().as_u16(), 400 | 401 | 403 | 404 | 410) {
                return linked.onto(answer);
            }
            // The signature has expired.
            *self.elsewhere() = None;
        }
        if let Some(token) = &self.token {
            request.headers_mut().insert(AUTHORIZATION, token.clone());
        }
        let hub = request.url().origin();
        let mut linked = Linked::default();
        let answer = follow(client, request, |answer, to| {
            if answer.url().origin() == hub && to.origin() != hub {
                linked = Linked::of(answer.headers());
            }
            // What is signed for a GET serves no HEAD, and the hub has said all.
            get || to.origin() == hub || linked.size.is_none()
        })
        .await?;
        if answer.url().origin() == hub {
            return match (Linked::of(answer.headers()), answer.status().is_redirection()) {
                (Linked { size: Some(size), etag }, true) => {
                    let mut head = http::Response::new("");
                    *head.status_mut() = StatusCode::OK;
                    head.headers_mut().insert(http::header::CONTENT_LENGTH, size);
                    etag.and_then(|etag| head.headers_mut().insert(ETAG, etag));
                    Ok(head.into())
                }
                (linked, _) => linked.onto(answer),
            };
        }
        if answer.status().is_success() {
            *self.elsewhere() = Some((answer.url().clone(), linked.clone()));
        }
        linked.onto(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_name_a_model_a_revision_and_a_path() {
        let of = |text| {
            let HubFile { org, name, revision, path } = HubFile::parse(text)?;
            Ok::<_, String>([org, name, revision, path].join(" "))
        };
        assert_eq!(of("a/b.c").unwrap(), "a b.c main ");
        assert_eq!(of("a/b@v1.0/").unwrap(), "a b v1.0 ");
        assert_eq!(of("a/b@refs%2Fpr%2F1/x/y z").unwrap(), "a b refs/pr/1 x/y z");
        for text in ["", "a", "a/", "/b", "a/b@", "a/..", "a/b@..", "a/b@x%2F", "a b/c", "~/a"] {
            assert!(HubFile::parse(text).is_err(), "{text}");
        }
    }
}

//! HTTP for the crate `object_store`: one client of the process, and every answer looked at before that
//! crate sees it.

use std::error::Error as StdError;
use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::StreamExt;
use http::header::{ACCEPT, CONTENT_ENCODING, LOCATION, RANGE, RETRY_AFTER};
use http::{HeaderMap, Method, StatusCode};
use http_body_util::BodyExt;
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse,
    HttpResponseBody, HttpService,
};
use reqwest::redirect::Policy;
use reqwest::{Request, Response};
use rustls_platform_verifier::BuilderVerifierExt;
use url::Url;

use crate::error::{Cause, Difference};
use crate::hub::HubWay;

/// How long a connection may take to be made.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const MAX_REDIRECTS: usize = 5;
/// Where clouds tell their machines credentials, and how long that may take.
const METADATA: [&str; 3] = ["169.254.169.254", "[fd00:ec2::254]", "metadata.google.internal"];
const METADATA_TIMEOUT: Duration = Duration::from_secs(2);
/// Bytes of a refusal that are looked at for the server's reason.
const MAX_REFUSAL: usize = 64 << 10;

/// What is wrong with an answer, on its way through `object_store`'s errors.
#[derive(Debug)]
pub(crate) enum Fault {
    /// The server says no.
    Refusal { status: u16, code: String, retry_after: Option<Duration>, region: Option<String> },
    /// The answer cannot be used.
    Answer(String),
    /// There is none, or it breaks off.
    Transport(String),
    /// Nothing answers where the machine's credentials would be.
    NoCredentials,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refusal { status, code, .. } => write!(f, "{status} {code}"),
            Self::Answer(reason) | Self::Transport(reason) => f.write_str(reason),
            Self::NoCredentials => f.write_str("no credentials"),
        }
    }
}

impl StdError for Fault {}

impl Fault {
    /// The fault that an error of `object_store` comes from.
    fn within(error: &object_store::Error) -> Option<&Self> {
        let mut at: &(dyn StdError + 'static) = error;
        loop {
            if let Some(fault) = at.downcast_ref() {
                return Some(fault);
            }
            at = at.source()?;
        }
    }

    /// What it means, and how long the server asks to wait.
    pub(crate) fn cause(&self, hint: &'static str) -> (Cause, Option<Duration>) {
        let cause = match self {
            Self::Refusal { status, code, retry_after, region } => {
                let (status, mut code) = (*status, code.clone());
                let cause = match status {
                    404 => Cause::NotFound,
                    412 => Cause::Changed(Difference::Version),
                    401 | 403 => Cause::Denied { status, code, hint },
                    _ => {
                        if let (301 | 307 | 400, Some(region)) = (status, region) {
                            code = format!(
                                "{code} (the bucket is in region {region}: set AWS_REGION)"
                            );
                        }
                        Cause::Refused { status, code }
                    }
                };
                return (cause, *retry_after);
            }
            Self::Answer(reason) => Cause::Answer { reason: reason.clone() },
            Self::Transport(reason) => Cause::Transport { reason: reason.clone() },
            Self::NoCredentials => Cause::NoCredentials { hint },
        };
        (cause, None)
    }
}

impl From<Fault> for HttpError {
    fn from(fault: Fault) -> Self {
        // The kind is for retries, which are made elsewhere.
        Self::new(HttpErrorKind::Unknown, fault)
    }
}

/// Makes clients for `object_store`.
#[derive(Debug)]
pub(crate) struct Connector {
    /// For a file of the hub.
    pub(crate) hub: Option<Arc<HubWay>>,
    /// The server that was first asked for a range.
    pub(crate) endpoint: Arc<OnceLock<String>>,
}

impl HttpConnector for Connector {
    fn connect(&self, _options: &ClientOptions) -> object_store::Result<HttpClient> {
        let (hub, endpoint) = (self.hub.clone(), self.endpoint.clone());
        match client() {
            Ok(client) => Ok(HttpClient::new(Service { client, hub, endpoint })),
            Err(reason) => {
                Err(object_store::Error::Generic { store: "HTTP", source: reason.into() })
            }
        }
    }
}

/// The client of the process.
pub(crate) fn client() -> Result<reqwest::Client, String> {
    static CLIENT: OnceLock<Result<reqwest::Client, String>> = OnceLock::new();
    CLIENT.get_or_init(new_client).clone()
}

fn new_client() -> Result<reqwest::Client, String> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(BuilderVerifierExt::with_platform_verifier)
        .map_err(|error| format!("TLS cannot be set up: {error}"))?
        .with_no_client_auth();
    reqwest::Client::builder()
        .tls_backend_preconfigured(tls)
        // Many connections, each with a window of its own, are what large ranges need.
        .http1_only()
        .connect_timeout(CONNECT_TIMEOUT)
        // Followed below, where it is known what they may be told.
        .redirect(Policy::none())
        .user_agent(concat!("fst/", env!("CARGO_PKG_VERSION")))
        .build()
        .map_err(|error| format!("no HTTP client: {}", reason(error)))
}

/// Makes a request, and those that its answers redirect to while `on` agrees. Another host or port is told
/// the range that is wanted, and no credentials.
pub(crate) async fn follow(
    client: &reqwest::Client,
    mut request: Request,
    mut on: impl FnMut(&Response, &Url) -> bool,
) -> Result<Response, Fault> {
    for _ in 0..=MAX_REDIRECTS {
        let readable = matches!(*request.method(), Method::GET | Method::HEAD);
        let again = request.try_clone().filter(|_| readable);
        let answer = client.execute(request).await.map_err(transport)?;
        let to = answer.headers().get(LOCATION).filter(|_| answer.status().is_redirection());
        let (Some(to), Some(mut again)) = (to, again) else { return Ok(answer) };
        let to = to.to_str().ok().and_then(|to| answer.url().join(to).ok());
        let to = to.filter(|to| matches!(to.scheme(), "http" | "https"));
        let to = to.ok_or_else(|| Fault::Answer("a redirect to nowhere".to_owned()))?;
        if answer.url().scheme() == "https" && to.scheme() != "https" {
            let reason = "a redirect from https to http is not followed";
            return Err(Fault::Answer(reason.to_owned()));
        }
        if !on(&answer, &to) {
            return Ok(answer);
        }
        if to.origin() != answer.url().origin() {
            let told = again.headers_mut();
            let kept = [ACCEPT, RANGE].map(|name| told.remove(&name).map(|value| (name, value)));
            told.clear();
            told.extend(kept.into_iter().flatten());
        }
        *again.url_mut() = to;
        request = again;
    }
    Err(Fault::Answer("too many redirects".to_owned()))
}

/// The whole of a short answer.
pub(crate) async fn document(answer: Response, most: usize) -> Result<Vec<u8>, Fault> {
    let (parts, body) = http::Response::from(answer).into_parts();
    if !parts.status.is_success() {
        return Err(refusal(parts.status, &parts.headers, body).await);
    }
    let mut document = Vec::new();
    let mut body = body.into_data_stream();
    while let Some(bytes) = body.next().await {
        document.extend_from_slice(&bytes.map_err(transport)?);
        if document.len() > most {
            return Err(Fault::Answer(format!("more than {most} bytes")));
        }
    }
    Ok(document)
}

#[derive(Debug)]
struct Service {
    client: reqwest::Client,
    hub: Option<Arc<HubWay>>,
    endpoint: Arc<OnceLock<String>>,
}

#[async_trait]
impl HttpService for Service {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let (parts, body) = request.into_parts();
        let url = parts.uri.to_string().parse();
        let url = url.map_err(|error| Fault::Answer(format!("malformed URL: {error}")))?;
        let ranged = parts.headers.contains_key(RANGE);
        let mut request = Request::new(parts.method, url);
        if ranged {
            self.endpoint.get_or_init(|| request.url().origin().ascii_serialization());
        }
        *request.headers_mut() = parts.headers;
        *request.body_mut() = body.as_bytes().map(|bytes| bytes.clone().into());
        // The last place where credentials are looked for, and not there on most machines.
        let metadata = request.url().host_str().is_some_and(|host| METADATA.contains(&host));
        let answer = if let Some(hub) = &self.hub {
            hub.send(&self.client, request).await?
        } else if metadata {
            let answer = tokio::time::timeout(METADATA_TIMEOUT, self.client.execute(request)).await;
            let answer = answer.ok().and_then(Result::ok);
            // Where it is switched off it says no, which `object_store` may have another way round.
            let falls_back = std::env::var_os("AWS_IMDSV1_FALLBACK").is_some();
            let denies =
                |answer: &Response| answer.status() == StatusCode::FORBIDDEN && !falls_back;
            answer.filter(|answer| !denies(answer)).ok_or(Fault::NoCredentials)?
        } else {
            follow(&self.client, request, |_, _| true).await?
        };
        let (parts, body) = http::Response::from(answer).into_parts();
        if !parts.status.is_success() {
            return Err(refusal(parts.status, &parts.headers, body).await.into());
        }
        if ranged && parts.status == StatusCode::OK {
            let reason =
                "200 and the whole object for a range of it: the server has no range requests";
            return Err(Fault::Answer(reason.to_owned()).into());
        }
        let encoding = parts.headers.get(CONTENT_ENCODING).map(|value| value.as_bytes());
        if ranged && let Some(encoding) = encoding.filter(|encoding| *encoding != b"identity") {
            let encoding = String::from_utf8_lossy(encoding);
            return Err(Fault::Answer(format!("the bytes are encoded as {encoding:?}")).into());
        }
        let body = HttpResponseBody::new(body.map_err(|error| transport(error).into()));
        Ok(HttpResponse::from_parts(parts, body))
    }
}

/// What a server says when it says no.
async fn refusal(status: StatusCode, headers: &HeaderMap, body: reqwest::Body) -> Fault {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let mut start = Vec::new();
    let mut body = body.into_data_stream();
    while let Some(Ok(bytes)) = body.next().await
        && start.len() < MAX_REFUSAL
    {
        start.extend_from_slice(&bytes);
    }
    let code = code(&String::from_utf8_lossy(&start));
    // Azure's and the hub's.
    let named = text("x-ms-error-code").or_else(|| text("x-error-code"));
    let code = code.or_else(|| named.map(str::to_owned)).unwrap_or_default();
    let seconds = headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
    Fault::Refusal {
        status: status.as_u16(),
        code: code.chars().filter(char::is_ascii_alphanumeric).take(64).collect(),
        retry_after: seconds.map(Duration::from_secs),
        region: text("x-amz-bucket-region").map(str::to_owned),
    }
}

/// The server's name for the reason, in the XML of S3 and its likes.
fn code(body: &str) -> Option<String> {
    let (_, rest) = body.split_once("<Code>")?;
    let (code, _) = rest.split_once("</Code>")?;
    Some(code.to_owned())
}

fn transport(error: reqwest::Error) -> Fault {
    Fault::Transport(reason(error))
}

/// What an error says without the URL, which may hold a signature, down to the system's own words.
fn reason(error: reqwest::Error) -> String {
    let error = error.without_url();
    let mut reason = error.to_string();
    let mut at = error.source();
    while let Some(cause) = at {
        let cause_text = cause.to_string();
        if !reason.contains(&cause_text) {
            reason += &format!(": {cause_text}");
        }
        at = cause.source();
    }
    reason
}

/// What an error of `object_store` says, and how long the server asks to wait.
pub(crate) fn cause(error: &object_store::Error, hint: &'static str) -> (Cause, Option<Duration>) {
    if let Some(fault) = Fault::within(error) {
        return fault.cause(hint);
    }
    // The innermost words: those around them have URLs.
    let mut at: &dyn StdError = error;
    while let Some(source) = at.source() {
        at = source;
    }
    (Cause::Answer { reason: at.to_string() }, None)
}

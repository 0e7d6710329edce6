//! Stores: a bucket with its credentials, or a file of a web server.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::http::HttpBuilder;
use object_store::list::PaginatedListStore;
use object_store::{ObjectStore, RetryConfig};
use url::Url;

use crate::error::Cause;
use crate::hub::HubWay;
use crate::location::{Location, Scheme};
use crate::profile;
use crate::transport::{self, Connector};

/// A store, which can be made anew when its credentials have expired.
#[derive(Debug)]
pub(crate) struct Store {
    location: Location,
    endpoint: Arc<OnceLock<String>>,
    current: Mutex<Connected>,
}

/// A store as it is now.
#[derive(Clone)]
pub(crate) struct Connected {
    pub(crate) objects: Arc<dyn ObjectStore>,
    pub(crate) lists: Option<Arc<dyn PaginatedListStore>>,
    /// How often it was made.
    pub(crate) generation: u64,
}

impl std::fmt::Debug for Connected {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The stores' own words may hold secrets.
        f.debug_struct("Connected").field("generation", &self.generation).finish_non_exhaustive()
    }
}

/// The stores of buckets that are in use: all objects of one share its credentials.
static BUCKETS: Mutex<Option<HashMap<String, Weak<Store>>>> = Mutex::new(None);

impl Store {
    /// The store of a place.
    pub(crate) fn of(location: &Location) -> Result<Arc<Self>, Cause> {
        let new = || {
            let endpoint = Arc::default();
            let current = Mutex::new(connect(location, &endpoint, 0)?);
            Ok(Arc::new(Self { location: location.clone(), endpoint, current }))
        };
        let Location::Bucket { scheme, bucket, .. } = location else { return new() };
        let mut buckets = BUCKETS.lock().unwrap_or_else(PoisonError::into_inner);
        let buckets = buckets.get_or_insert_default();
        let name = format!("{scheme:?} {bucket}");
        if let Some(store) = buckets.get(&name).and_then(Weak::upgrade) {
            return Ok(store);
        }
        let store = new()?;
        buckets.retain(|_, store| store.strong_count() > 0);
        buckets.insert(name, Arc::downgrade(&store));
        Ok(store)
    }

    pub(crate) fn current(&self) -> Connected {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Makes the store anew, with credentials as they are now, unless that was done since `generation`.
    pub(crate) fn renew(&self, generation: u64) -> Result<(), Cause> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.generation == generation {
            *current = connect(&self.location, &self.endpoint, generation + 1)?;
        }
        Ok(())
    }

    /// The server that was asked for ranges; empty before that.
    pub(crate) fn endpoint(&self) -> &str {
        self.endpoint.get().map_or("", String::as_str)
    }

    /// Where credentials come from, for messages.
    pub(crate) fn hint(&self) -> &'static str {
        match &self.location {
            Location::Bucket { scheme: Scheme::S3, .. } => {
                "; credentials are those of AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, of a web identity, of a \
                 profile in ~/.aws, or of the machine; AWS_SKIP_SIGNATURE=true asks without any"
            }
            Location::Bucket { scheme: Scheme::Gcs, .. } => {
                "; credentials are those of GOOGLE_APPLICATION_CREDENTIALS or of the machine; \
                 GOOGLE_SKIP_SIGNATURE=true asks without any"
            }
            Location::Bucket { scheme: Scheme::Azure, .. } => {
                "; the account is that of AZURE_STORAGE_ACCOUNT_NAME, and credentials are those of \
                 AZURE_STORAGE_ACCOUNT_KEY, of other AZURE_ variables, or of the machine; \
                 AZURE_SKIP_SIGNATURE=true asks without any"
            }
            Location::Hub(_) => {
                "; the token is that of HF_TOKEN, of the file HF_TOKEN_PATH, or of `hf auth login`, and \
                 models may ask for consent on their page"
            }
            _ => "",
        }
    }
}

fn connect(
    location: &Location,
    endpoint: &Arc<OnceLock<String>>,
    generation: u64,
) -> Result<Connected, Cause> {
    let connector = |hub| Connector { hub, endpoint: endpoint.clone() };
    // Retries are made where it is known how far a transfer is.
    let retry = RetryConfig { max_retries: 0, ..RetryConfig::default() };
    let listed = |store: Arc<dyn ObjectStore>, lists: Arc<dyn PaginatedListStore>| Connected {
        objects: store,
        lists: Some(lists),
        generation,
    };
    let web = |url: &Url, connector| {
        let builder = HttpBuilder::new().with_url(url.as_str()).with_retry(retry.clone());
        let store = builder.with_http_connector(connector).build();
        store.map(|store| Connected { objects: Arc::new(store), lists: None, generation })
    };
    let connected = match location {
        Location::Web(url) => web(url, connector(None)),
        Location::Hub(file) => web(&file.address()?, connector(Some(Arc::new(HubWay::new())))),
        Location::Bucket { scheme: Scheme::Gcs, bucket, .. } => {
            GoogleCloudStorageBuilder::from_env()
                .with_bucket_name(bucket)
                .with_retry(retry)
                .with_http_connector(connector(None))
                .build()
                .map(Arc::new)
                .map(|store| listed(store.clone(), store))
        }
        Location::Bucket { scheme: Scheme::Azure, bucket, .. } => MicrosoftAzureBuilder::from_env()
            .with_container_name(bucket)
            .with_retry(retry)
            .with_http_connector(connector(None))
            .build()
            .map(Arc::new)
            .map(|store| listed(store.clone(), store)),
        Location::Bucket { bucket, .. } => profile::complete(AmazonS3Builder::from_env())?
            .with_bucket_name(bucket)
            .with_retry(retry)
            .with_http_connector(connector(None))
            .build()
            .map(Arc::new)
            .map(|store| listed(store.clone(), store)),
    };
    connected.map_err(|error| match transport::cause(&error, "").0 {
        Cause::Answer { reason } => Cause::Setup { reason },
        cause => cause,
    })
}

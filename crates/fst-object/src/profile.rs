//! Profiles of `~/.aws`: what the environment leaves open of S3.
//!
//! Read are keys, `credential_process`, `region` and `endpoint_url`. Single sign-on and roles to assume are
//! not; the AWS command line as a `credential_process` brings them.

use std::collections::HashMap;
use std::env;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use object_store::StaticCredentialProvider;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey, AwsCredential};
use serde::Deserialize;

use crate::error::Cause;

/// How long a `credential_process` may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// What cannot be had from a profile.
const NOT_READ: [&str; 4] = ["sso_session", "sso_start_url", "role_arn", "login_session"];

/// Adds to `builder` what it lacks and the profile in use has.
pub(crate) fn complete(builder: AmazonS3Builder) -> Result<AmazonS3Builder, Cause> {
    use AmazonS3ConfigKey as Key;
    let lacks = |keys: &[Key]| keys.iter().all(|key| builder.get_config_value(key).is_none());
    let skips = builder.get_config_value(&Key::SkipSignature).is_some_and(|skips| skips == "true");
    let region = lacks(&[Key::Region, Key::DefaultRegion]);
    let endpoint = lacks(&[Key::Endpoint, Key::S3Endpoint]);
    let credentials = !skips && lacks(&[Key::AccessKeyId, Key::WebIdentityTokenFile]);
    if !(region || endpoint || credentials) {
        return Ok(builder);
    }
    let Some(profile) = Profile::current()? else { return Ok(builder) };
    let mut builder = builder;
    if let Some(region) = profile.get("region").filter(|_| region) {
        builder = builder.with_region(region);
    }
    if let Some(endpoint) = profile.get("endpoint_url").filter(|_| endpoint) {
        builder = builder.with_endpoint(endpoint);
    }
    if credentials && let Some(credential) = profile.credential()? {
        builder = builder.with_credentials(Arc::new(StaticCredentialProvider::new(credential)));
    }
    Ok(builder)
}

/// The profile that `AWS_PROFILE` names, or `default`.
struct Profile {
    name: String,
    values: HashMap<String, String>,
}

impl Profile {
    fn current() -> Result<Option<Self>, Cause> {
        let variable = |name: &str| env::var_os(name).filter(|value| !value.is_empty());
        let text = |name: &str, file: &str| {
            let home = || Some(env::home_dir()?.join(".aws").join(file));
            let path = variable(name).map(PathBuf::from).or_else(home)?;
            std::fs::read_to_string(path).ok()
        };
        let named = variable("AWS_PROFILE").and_then(|name| name.into_string().ok());
        let name = named.as_deref().unwrap_or("default");
        let config = text("AWS_CONFIG_FILE", "config").unwrap_or_default();
        let keys = text("AWS_SHARED_CREDENTIALS_FILE", "credentials").unwrap_or_default();
        let mut values = HashMap::new();
        let of_config = |title: &str| match title.strip_prefix("profile ") {
            Some(title) => title.trim() == name,
            None => title == "default" && name == title,
        };
        let found = section(&config, of_config, &mut values);
        let found = section(&keys, |title| title == name, &mut values) || found;
        if !found && named.is_some() {
            let reason = format!("AWS_PROFILE is {name:?}, and ~/.aws has no such profile");
            return Err(Cause::Setup { reason });
        }
        Ok(found.then(|| Self { name: name.to_owned(), values }))
    }

    fn get(&self, key: &str) -> Option<&str> {
        self.values.get(key).map(String::as_str).filter(|value| !value.is_empty())
    }

    fn credential(&self) -> Result<Option<AwsCredential>, Cause> {
        let failed = |what: String| {
            let reason = format!("the profile {:?} of ~/.aws {what}", self.name);
            Err(Cause::Setup { reason })
        };
        let keys = self.get("aws_access_key_id").zip(self.get("aws_secret_access_key"));
        if let Some((key_id, secret_key)) = keys {
            let token = self.get("aws_session_token").map(str::to_owned);
            let (key_id, secret_key) = (key_id.to_owned(), secret_key.to_owned());
            return Ok(Some(AwsCredential { key_id, secret_key, token }));
        }
        if let Some(command) = self.get("credential_process") {
            // Its output is not for messages, whatever it is.
            return match run(command) {
                Ok(credential) => Ok(Some(credential)),
                Err(what) => failed(format!("has a credential_process that {what}")),
            };
        }
        match NOT_READ.iter().find(|key| self.get(key).is_some()) {
            None => Ok(None),
            Some(key) => failed(format!(
                "has {key}, which is not read here; \
                 `credential_process = aws configure export-credentials --profile NAME` in another profile is"
            )),
        }
    }
}

/// Adds the values of the sections with a title that `is_it` takes; says whether there are any.
fn section(text: &str, is_it: impl Fn(&str) -> bool, values: &mut HashMap<String, String>) -> bool {
    let (mut inside, mut found) = (false, false);
    for line in text.lines() {
        if let Some(title) = line.trim().strip_prefix('[') {
            inside = title.split_once(']').is_some_and(|(title, _)| is_it(title.trim()));
            found |= inside;
        // What is indented belongs to the value before it.
        } else if inside
            && !line.starts_with([' ', '\t', '#', ';'])
            && let Some((key, value)) = line.split_once('=')
        {
            values.insert(key.trim().to_ascii_lowercase(), value.trim().to_owned());
        }
    }
    found
}

/// What a `credential_process` prints.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Printed {
    version: u32,
    access_key_id: String,
    secret_access_key: String,
    session_token: Option<String>,
}

/// Runs a `credential_process`. It is run again when what it gave has expired.
fn run(command: &str) -> Result<AwsCredential, String> {
    let mut process = Command::new("sh");
    process.arg("-c").arg(command).stdin(Stdio::null());
    let (tell, told) = mpsc::channel();
    let thread = std::thread::Builder::new().name("fst-credentials".to_owned());
    let spawned = thread.spawn(move || drop(tell.send(process.output())));
    spawned.map_err(|error| format!("has no thread: {error}"))?;
    let output = told.recv_timeout(PATIENCE);
    let output = output.map_err(|_| format!("takes longer than {} s", PATIENCE.as_secs()))?;
    let output = output.map_err(|error| format!("cannot be run: {error}"))?;
    if !output.status.success() {
        return Err(format!("fails ({})", output.status));
    }
    let printed = serde_json::from_slice(&output.stdout).ok();
    let printed = printed.filter(|printed: &Printed| printed.version == 1);
    let printed = printed.ok_or("prints no credentials of version 1")?;
    let Printed {
        access_key_id: key_id, secret_access_key: secret_key, session_token: token, ..
    } = printed;
    Ok(AwsCredential { key_id, secret_key, token })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_those_of_the_section() {
        let text = "# c\n[default]\nregion = a\n[profile  x ]\nREGION=b=c\ns3 =\n  endpoint_url = d\n\
                    ; e\naws_session_token =\n[other]\nregion = f\n";
        let mut values = HashMap::new();
        assert!(section(text, |title| title == "profile  x", &mut values));
        let profile = Profile { name: "x".to_owned(), values };
        assert_eq!(profile.get("region"), Some("b=c"));
        assert_eq!(profile.get("endpoint_url"), None);
        assert_eq!(profile.get("aws_session_token"), None);
        assert!(!section(text, |title| title == "none", &mut HashMap::new()));
    }
}

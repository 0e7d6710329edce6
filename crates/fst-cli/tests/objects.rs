//! `fst` with URLs, as a script would run it: a bucket as S3 has them and a web server, both in this process.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

#[path = "objects/cache.rs"]
mod cache;
#[path = "program/fixture.rs"]
#[allow(dead_code, reason = "each test binary uses its part")]
mod fixture;
#[path = "../../../tests/src/server.rs"]
#[allow(dead_code, unreachable_pub, missing_docs, reason = "each test binary uses its part")]
mod server;

use std::path::PathBuf;

use fixture::{Folder, Run, fst, names_in, run};
use server::{Fault, Server};

const MODEL: [&str; 8] =
    ["--model", "llama-2-7b", "--layers", "1", "--shrink", "32", "--shards", "2"];

struct Case {
    _folder: Folder,
    local: PathBuf,
    server: Server,
}

impl Case {
    /// A checkpoint on disk, and in a bucket below `prefix`, which ends with a slash.
    fn new(prefix: &str) -> Self {
        let folder = Folder::new();
        let local = folder.synth("model", &MODEL);
        let server = Server::start();
        for name in names_in(&local) {
            let bytes = std::fs::read(local.join(&name)).unwrap();
            server.put(&format!("/bucket/{prefix}{name}"), bytes);
        }
        Self { _folder: folder, local, server }
    }

    /// Runs the program with the server as S3.
    fn s3(&self, args: &[&str]) -> Run {
        let mut command = fst(args);
        command
            .env("AWS_ENDPOINT_URL", self.server.origin())
            .env("AWS_ACCESS_KEY_ID", "AKEY")
            .env("AWS_SECRET_ACCESS_KEY", "hidden-secret")
            .env("AWS_SESSION_TOKEN", "hidden-token")
            .env("AWS_REGION", "us-east-1");
        Run::of(command.output().unwrap())
    }
}

#[test]
fn sums_of_a_bucket_are_those_of_the_files() {
    let case = Case::new("models/m/");
    let local = case.local.to_str().unwrap();
    let url = "s3://bucket/models/m";
    for options in
        [&[][..], &["--dtype", "F32"], &["--slice", "lm_head.weight:1:3..70", "--dtype", "F16"]]
    {
        let expected = run([&["sum", local, "--json"], options].concat()).json();
        let found = case.s3(&[&["sum", url, "--json"], options].concat()).json();
        assert_eq!(found, expected, "{options:?}");
    }
    let report = case.s3(&["load", url, "--json"]).json();
    assert_eq!(report["engine"].as_str().or(report["engine"]["used"].as_str()), Some("object"));
    let shown = case.s3(&["inspect", "s3://bucket/models/m/"]);
    assert_eq!(shown.status, 0, "{}", shown.stderr);
    // Requests are signed, and for this key.
    let log = case.server.log();
    assert!(log.iter().all(|r| r.headers["authorization"].contains("Credential=AKEY/")));
    assert!(log.iter().any(|r| r.target.starts_with("/bucket/models/m/model-")));
}

#[test]
fn a_web_server_and_its_faults() {
    let case = Case::new("m/");
    let local = case.local.to_str().unwrap();
    let url = case.server.origin() + "/bucket/m";
    for name in names_in(&case.local) {
        let path = format!("/bucket/m/{name}");
        case.server.fault(&path, 1, 2, Fault::Cut(10_000, true));
        case.server.fault(&path, 4, 1, Fault::Status("503 Slow Down", "SlowDown", ""));
    }
    let expected = run(["sum", local, "--json"]).json();
    assert_eq!(run(["sum", &url, "--json"]).json(), expected);
    let loaded = run(["load", &url, "--no-progress"]);
    assert_eq!(loaded.status, 0, "{}", loaded.stderr);
    assert!(loaded.stdout.contains(&url), "{}", loaded.stdout);
}

#[test]
fn what_cannot_be_read_is_one_line_without_secrets() {
    let case = Case::new("m/");
    let shard = names_in(&case.local).into_iter().find(|name| name.ends_with(".safetensors"));
    let path = format!("/bucket/m/{}", shard.unwrap());
    let denied = Fault::Status("403 Forbidden", "SignatureDoesNotMatch", "");
    for (url, fault, says) in [
        ("s3://bucket/m", Some(&denied), "access denied (403 SignatureDoesNotMatch)"),
        ("s3://bucket/none/", None, "no "),
        ("s3://bucket/none.safetensors", None, "no such object"),
        ("s3://bucket/a//b.safetensors", None, "empty, `.` or `..` part"),
        ("s3://bucket/x/../m/a.safetensors", None, "empty, `.` or `..` part"),
        ("s3://bucket/a\tb.safetensors", None, "control character"),
        ("https://host/m?X-Amz-Signature=hidden-signature", None, "query"),
        ("hf://org", None, "hf://ORG/NAME"),
        ("ftp://host/name", None, "no URL that can be read"),
    ] {
        if let Some(fault) = fault {
            case.server.fault(&path, 0, usize::MAX, fault.clone());
        }
        let run = case.s3(&["load", url, "--no-progress"]);
        let error = run.error();
        assert!(error.contains(says), "{url}: {error}");
        assert!(!error.contains("hidden") && !error.contains("Credential"), "{error}");
        let place = url.split('?').next().unwrap().trim_end_matches('/').replace('\t', "\\t");
        assert!(error.starts_with(&place), "{error}");
    }
}

/// The requests of a report hold no secret.
#[test]
fn a_report_says_what_requests_came_to() {
    let case = Case::new("m/");
    let shard =
        names_in(&case.local).into_iter().find(|name| name.ends_with("1-of-00002.safetensors"));
    let path = format!("/bucket/m/{}", shard.unwrap());
    case.server.fault(&path, 1, 1, Fault::Cut(10_000, true));
    case.server.fault(&path, 2, 1, Fault::Status("503 Slow Down", "SlowDown", ""));
    let run = case.s3(&["load", "s3://bucket/m", "--json"]);
    let remote = &run.json()["remote"];
    assert_eq!(remote["endpoints"], serde_json::json!([case.server.origin()]));
    let of_shards = |request: &&server::Request| request.target.ends_with(".safetensors");
    let requests = case.server.log().iter().filter(of_shards).count();
    assert_eq!(
        (remote["requests"].as_u64(), remote["retries"].as_u64()),
        (Some(requests as u64), Some(2))
    );
    assert_eq!(remote["throttled"], 1);
    let (received, repeated) =
        (remote["received_bytes"].as_u64(), remote["repeated_bytes"].as_u64());
    let files = names_in(&case.local).into_iter().filter(|name| name.ends_with(".safetensors"));
    let bytes: u64 =
        files.map(|name| std::fs::metadata(case.local.join(name)).unwrap().len()).sum();
    assert_eq!(received.unwrap() - repeated.unwrap(), bytes);
    assert!(remote["first_byte_p99_seconds"].as_f64() >= remote["first_byte_p50_seconds"].as_f64());
    let text = case.s3(&["load", "s3://bucket/m", "--no-progress"]);
    assert!(
        text.stdout.contains(&format!("to {}, answered in", case.server.origin())),
        "{}",
        text.stdout
    );
    assert!(![run.stdout, text.stdout].concat().contains("hidden"));
}

/// A store is one storage of all ranks: what they need is asked for once by all of them together.
#[test]
fn four_ranks_ask_for_each_byte_once() {
    let case = Case::new("m/");
    let (local, url) = (case.local.to_str().unwrap(), "s3://bucket/m");
    let options = ["--world", "4", "--preset", "llama", "--json"];
    let expected = run([&["sum", local], &options[..]].concat()).json();
    assert_eq!(case.s3(&[&["sum", url], &options[..]].concat()).json(), expected);
    case.server.clear_log();
    assert_eq!(case.s3(&[&["load", url], &options[..]].concat()).json()["engine"], "object");
    let log = case.server.log();
    for name in names_in(&case.local).iter().filter(|name| name.ends_with(".safetensors")) {
        let bytes = std::fs::read(case.local.join(name)).unwrap();
        let data = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap());
        let of_shard = log.iter().filter(|request| request.target.ends_with(name));
        // The first one is for the header.
        let mut ranges: Vec<_> = of_shard.filter_map(|request| request.range).skip(1).collect();
        ranges.sort_unstable();
        let (mut end, mut again) = (data, 0);
        for (start, behind) in ranges {
            assert!(start <= end, "{name}: a gap at {end}");
            again += end.min(behind) - start;
            end = end.max(behind);
        }
        assert_eq!(end, bytes.len() as u64);
        // A tiny tensor in a gap that another rank's request goes over.
        assert!(again < 64, "{name}: {again} bytes twice");
    }
}

/// Nothing answers where the credentials of the machine would be.
#[test]
fn no_credentials_are_an_error_that_says_where_they_are_looked_for() {
    let case = Case::new("m/");
    let mut command = fst(["load", "s3://bucket/m"]);
    command.env("AWS_ENDPOINT_URL", case.server.origin()).env("AWS_REGION", "us-east-1");
    command.env("AWS_METADATA_ENDPOINT", "http://169.254.169.254:1");
    command.env("AWS_CONFIG_FILE", "/dev/null").env("AWS_SHARED_CREDENTIALS_FILE", "/dev/null");
    let run = Run::of(command.output().unwrap());
    let error = run.error();
    assert!(error.contains("no credentials are set, and this machine has none"), "{error}");
    assert!(error.contains("AWS_ACCESS_KEY_ID") && error.contains("~/.aws"), "{error}");
    assert!(case.server.log().is_empty());
}

#[test]
fn a_load_ends_within_its_time() {
    let case = Case::new("m/");
    let names = names_in(&case.local);
    for name in names.iter().filter(|name| name.ends_with(".safetensors")) {
        case.server.fault(&format!("/bucket/m/{name}"), 1, usize::MAX, Fault::StallHead);
    }
    let began = std::time::Instant::now();
    let run = case.s3(&["load", "s3://bucket/m", "--timeout", "1"]);
    assert!(run.error().contains("not done within 1 s"), "{}", run.error());
    assert!(began.elapsed() < std::time::Duration::from_secs(8), "{:?}", began.elapsed());
}

/// Files of `~/.aws` in place of variables.
#[test]
fn profiles_say_what_the_environment_does_not() {
    let case = Case::new("m/");
    let folder = Folder::new();
    let (config, keys) = (folder.join("config"), folder.join("credentials"));
    let origin = case.server.origin();
    std::fs::write(
        &config,
        format!(
            "[default]\nregion = eu-x-1\nendpoint_url = {origin}\n[profile keys]\nendpoint_url = {origin}\n\
             [profile process]\nendpoint_url = {origin}\ncredential_process = echo run >> '{}'; printf \
             '{{\"Version\":1,\"AccessKeyId\":\"PKEY\",\"SecretAccessKey\":\"hidden\",\"SessionToken\":\"hidden\"}}'\n\
             [profile fails]\nendpoint_url = {origin}\ncredential_process = echo hidden; exit 3\n\
             [profile sso]\nsso_session = x\n",
            folder.join("runs").display()
        ),
    )
    .unwrap();
    let of_keys = "[default]\naws_access_key_id = DKEY\naws_secret_access_key = hidden\n\
                   [keys]\naws_access_key_id=KKEY\naws_secret_access_key=hidden\naws_session_token=hidden\n";
    std::fs::write(&keys, of_keys).unwrap();
    let run = |profile: &str| {
        let mut command = fst(["load", "s3://bucket/m", "--no-progress"]);
        command.env("AWS_CONFIG_FILE", &config).env("AWS_SHARED_CREDENTIALS_FILE", &keys);
        command.env("AWS_PROFILE", profile).env("AWS_EC2_METADATA_DISABLED", "true");
        Run::of(command.output().unwrap())
    };
    for (profile, key, region) in
        [("", "DKEY", "eu-x-1"), ("keys", "KKEY", "us-east-1"), ("process", "PKEY", "us-east-1")]
    {
        case.server.clear_log();
        let run = run(profile);
        assert_eq!(run.status, 0, "{profile}: {}", run.stderr);
        for request in case.server.log() {
            let signed = &request.headers["authorization"];
            let scope = format!("Credential={key}/");
            assert!(signed.contains(&scope) && signed.contains(region), "{profile}: {signed}");
        }
    }
    // The process is asked again when what it gave has expired.
    let runs = || std::fs::read_to_string(folder.join("runs")).unwrap().lines().count();
    let before = runs();
    let shard = names_in(&case.local).into_iter().find(|name| name.ends_with(".safetensors"));
    let expired = Fault::Status("400 Bad Request", "ExpiredToken", "");
    case.server.fault(&format!("/bucket/m/{}", shard.unwrap()), 0, 1, expired);
    assert_eq!(run("process").status, 0);
    assert_eq!(runs(), 2 * before + 1);
    for (profile, says) in [
        ("fails", "credential_process that fails"),
        ("sso", "sso_session, which is not read here"),
        ("none", "no such profile"),
    ] {
        let run = run(profile);
        assert!(run.error().contains(says), "{}", run.error());
        assert!(!run.error().contains("hidden"), "{}", run.error());
    }
}

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A hub with the checkpoint as `org/name`, whose shards are on another server, at addresses with a signature.
struct Hub {
    case: Case,
    elsewhere: Server,
}

impl Hub {
    fn new() -> Self {
        let case = Case::new("m/");
        let elsewhere = Server::start();
        let hub = Self { case, elsewhere };
        let names = names_in(&hub.case.local);
        let siblings: Vec<String> =
            names.iter().map(|name| format!(r#"{{"rfilename":"{name}"}}"#)).collect();
        let siblings = siblings.join(",");
        let revision = format!(
            r#"{{"sha":"{COMMIT}","siblings":[{{"rfilename":"sub/model.safetensors"}},{siblings}]}}"#
        );
        hub.case.server.put("/api/models/org/name/revision/v%2F1", revision);
        for name in &names {
            let bytes = std::fs::read(hub.case.local.join(name)).unwrap();
            if name.ends_with(".safetensors") {
                hub.lead(name, &format!("\"{}\"", "ab".repeat(32)), bytes.len());
                hub.elsewhere.put(&format!("/blobs/{name}"), bytes);
            } else {
                hub.case.server.put(&Self::path(name), bytes);
            }
        }
        hub
    }

    fn path(name: &str) -> String {
        format!("/org/name/resolve/{COMMIT}/{name}")
    }

    fn lead(&self, name: &str, etag: &str, size: usize) {
        let to = format!("{}/blobs/{name}?Signature=hidden", self.elsewhere.origin());
        let linked = format!("X-Linked-Etag: {etag}\r\nX-Linked-Size: {size}\r\n");
        self.case.server.redirect(&Self::path(name), format!("Location: {to}\r\n{linked}"));
    }

    fn run(&self, args: &[&str], variables: &[(&str, &str)]) -> Run {
        let mut command = fst(args);
        command.env("HF_ENDPOINT", self.case.server.origin() + "/").env("HF_TOKEN", "hidden-token");
        command.envs(variables.iter().copied());
        Run::of(command.output().unwrap())
    }

    fn shard(&self) -> String {
        names_in(&self.case.local).into_iter().find(|name| name.ends_with(".safetensors")).unwrap()
    }
}

#[test]
fn a_model_of_the_hub_is_read_at_one_commit_from_where_its_bytes_are() {
    let hub = Hub::new();
    let expected = run(["sum", hub.case.local.to_str().unwrap(), "--json"]).json();
    let url = "hf://org/name@v%2F1";
    assert_eq!(hub.run(&["sum", url, "--json"], &[]).json(), expected);
    let (asked, elsewhere) = (hub.case.server.log(), hub.elsewhere.log());
    assert!(asked.iter().all(|r| r.headers["authorization"] == "Bearer hidden-token"));
    assert!(asked[1..].iter().all(|r| r.target.starts_with(&Hub::path(""))), "{asked:?}");
    // The bytes of a shard are asked for once of the hub, and whether it is the same.
    let of_shard = asked.iter().filter(|r| r.target == Hub::path(&hub.shard()));
    assert_eq!(of_shard.map(|r| &*r.method).collect::<Vec<_>>(), ["GET", "HEAD"]);
    assert!(elsewhere.len() > 2);
    for request in &elsewhere {
        assert!(!request.headers.contains_key("authorization"), "{request:?}");
        assert!(!format!("{request:?}").contains("hidden-token"), "{request:?}");
    }
    // A file, by a token from a file.
    let folder = Folder::new();
    let token = folder.join("token");
    std::fs::write(&token, "of-a-file\n").unwrap();
    hub.case.server.clear_log();
    let file = format!("{url}/{}", hub.shard());
    let of_file = [("HF_TOKEN", ""), ("HF_TOKEN_PATH", token.to_str().unwrap())];
    assert_eq!(hub.run(&["load", &file, "--no-progress"], &of_file).status, 0);
    assert!(hub.case.server.log().iter().all(|r| r.headers["authorization"] == "Bearer of-a-file"));
}

#[test]
fn the_hub_says_what_a_file_is_and_signatures_expire() {
    let hub = Hub::new();
    let (url, shard) = ("hf://org/name@v%2F1", hub.shard());
    let blob = format!("/blobs/{shard}");
    let refused = Fault::Status("403 Forbidden", "AccessDenied", "");
    hub.elsewhere.fault(&blob, 1, 1, refused.clone());
    let loaded = hub.run(&["load", url, "--no-progress"], &[]);
    assert_eq!(loaded.status, 0, "{}", loaded.stderr);
    let expect = |says: &str| {
        let run = hub.run(&["load", url, "--no-progress"], &[]);
        let error = run.error();
        assert!(error.contains(says), "{error}");
        assert!(!error.contains("hidden") && !error.contains("Signature"), "{error}");
    };
    hub.lead(&shard, "\"x\"", 77);
    expect("where the hub says that there are 77");
    hub.lead(
        &shard,
        "\"x\"",
        std::fs::metadata(hub.case.local.join(&shard)).unwrap().len() as usize,
    );
    hub.elsewhere.fault(&blob, 0, usize::MAX, refused);
    expect("access denied (403 AccessDenied); the token is that of HF_TOKEN");
    let gated = Fault::Status("401 Unauthorized", "", "X-Error-Code: GatedRepo\r\n");
    hub.case.server.fault("/api/models/org/name/revision/v%2F1", 0, 1, gated);
    expect("access denied (401 GatedRepo)");
    let run = hub.run(&["load", "hf://org/name@none"], &[]);
    assert!(run.error().starts_with("hf://org/name@none: no such object"), "{}", run.error());
}

#[test]
fn offline_a_model_of_the_hub_is_that_of_its_cache() {
    let hub = Hub::new();
    let home = Folder::new();
    let repository = home.join("hub/models--org--name");
    std::fs::create_dir_all(repository.join("snapshots")).unwrap();
    std::fs::create_dir_all(repository.join("refs/v")).unwrap();
    std::fs::write(repository.join("refs/v/1"), COMMIT).unwrap();
    let snapshot = repository.join("snapshots").join(COMMIT);
    std::os::unix::fs::symlink(&hub.case.local, snapshot).unwrap();
    let expected = run(["sum", hub.case.local.to_str().unwrap(), "--json"]).json();
    let place = home.join("");
    let offline = [("HF_HUB_OFFLINE", "1"), ("HF_HOME", place.to_str().unwrap())];
    for url in ["hf://org/name@v%2F1", &format!("hf://org/name@{COMMIT}")] {
        assert_eq!(hub.run(&["sum", url, "--json"], &offline).json(), expected, "{url}");
    }
    for url in ["hf://org/name", "hf://org/other@v%2F1", "hf://org/name@v%2F1/../refs"] {
        let run = hub.run(&["load", url], &offline);
        assert!(run.error().contains("HF_HUB_OFFLINE is set"), "{}", run.error());
    }
    assert!(hub.case.server.log().is_empty());
}

#[test]
fn listings_go_page_by_page_and_have_an_end() {
    let case = Case::new("m/");
    for number in 0..2500 {
        case.server.put(&format!("/bucket/m/0-{number}.txt"), *b"x");
        case.server.put(&format!("/bucket/m/deeper/{number}.safetensors"), *b"x");
    }
    let first = case.s3(&["inspect", "s3://bucket/m", "--json"]);
    let local = run(["inspect", case.local.to_str().unwrap(), "--json"]).json();
    assert_eq!(first.json()["tensors"], local["tensors"]);
    for number in 0..50_000 {
        case.server.put(&format!("/bucket/many/{number}.bin"), []);
    }
    let run = case.s3(&["inspect", "s3://bucket/many"]);
    assert!(run.error().contains("more than 10000 objects"), "{}", run.error());
}

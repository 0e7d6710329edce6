//! Manifests: what the bytes of tensors should be, as SHA-256 sums, and their JSON.

use std::collections::HashMap;
use std::fmt::{self, Write as _};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::checkpoint::Checkpoint;
use crate::dtype::Dtype;

/// A SHA-256 sum. Shown and parsed as 64 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Digest([u8; 32]);

impl Digest {
    /// The sum of some bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// The sum whose bytes these are, as a hasher gives it.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// A text that is no SHA-256 sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not 64 hexadecimal digits")]
pub struct NotADigest;

impl FromStr for Digest {
    type Err = NotADigest;

    fn from_str(text: &str) -> Result<Self, NotADigest> {
        let digit = |byte: u8| (byte as char).to_digit(16).ok_or(NotADigest);
        let mut digest = [0; 32];
        let text = text.as_bytes();
        if text.len() != 64 {
            return Err(NotADigest);
        }
        for (byte, pair) in digest.iter_mut().zip(text.chunks_exact(2)) {
            *byte = (digit(pair[0])? << 4 | digit(pair[1])?) as u8;
        }
        Ok(Self(digest))
    }
}

/// What one tensor should be.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Checksum {
    /// The tensor's name.
    pub name: String,
    /// Type of its elements, if that is to be checked.
    pub dtype: Option<Dtype>,
    /// Its shape, if that is to be checked.
    pub shape: Option<Vec<usize>>,
    /// Sum of its bytes as they are loaded: of a slice, of the slice; converted, of the result.
    pub sha256: Digest,
}

impl Checksum {
    /// A sum for a tensor of this name, of any dtype and shape.
    pub fn new(name: impl Into<String>, sha256: Digest) -> Self {
        Self { name: name.into(), dtype: None, shape: None, sha256 }
    }
}

/// The sums of a checkpoint's tensors, in an order of their own.
///
/// `fst sum -o FILE` writes one, `Loader::verify` of the facade compares loads with it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Manifest {
    checksums: Vec<Checksum>,
    by_name: HashMap<String, usize>,
}

#[derive(Serialize, Deserialize)]
struct Document {
    tensors: Vec<Record>,
}

/// What JSON says of one tensor; fields that are not known are let pass.
#[derive(Serialize, Deserialize)]
struct Record {
    name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    dtype: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    shape: Option<Vec<usize>>,
    sha256: String,
}

impl Manifest {
    /// A manifest of these sums.
    ///
    /// # Errors
    ///
    /// [`ManifestError::Duplicate`].
    pub fn new(checksums: impl IntoIterator<Item = Checksum>) -> Result<Self, ManifestError> {
        let mut manifest = Self::default();
        for checksum in checksums {
            let at = manifest.checksums.len();
            if manifest.by_name.insert(checksum.name.clone(), at).is_some() {
                return Err(ManifestError::Duplicate { tensor: checksum.name });
            }
            manifest.checksums.push(checksum);
        }
        Ok(manifest)
    }

    /// Reads a manifest from a file.
    ///
    /// # Errors
    ///
    /// [`ManifestFileError`], with the path.
    pub fn read(path: impl AsRef<Path>) -> Result<Self, ManifestFileError> {
        let path = path.as_ref();
        let fail = |source| ManifestFileError { path: path.to_owned(), source };
        let text = std::fs::read(path).map_err(|source| fail(ManifestError::Read(source)))?;
        Self::from_json(&text).map_err(fail)
    }

    /// Parses `{"tensors":[{"name", "sha256", "dtype", "shape"}]}`, where dtype and shape may be
    /// missing, and other fields are ignored.
    ///
    /// # Errors
    ///
    /// [`ManifestError`] says where or in which tensor's record.
    pub fn from_json(text: &[u8]) -> Result<Self, ManifestError> {
        let document: Document = serde_json::from_slice(text).map_err(|e| ManifestError::Json {
            line: e.line(),
            column: e.column(),
            reason: e.to_string(),
        })?;
        let checksum = |record: Record| {
            let Record { name, dtype, shape, sha256 } = record;
            let digest = sha256.parse();
            let dtype = dtype.map(|dtype| {
                let parsed: Result<Dtype, _> = dtype.parse();
                parsed.map_err(|_| ManifestError::Dtype { tensor: name.clone(), dtype })
            });
            Ok(Checksum {
                dtype: dtype.transpose()?,
                shape,
                sha256: digest.map_err(|_| ManifestError::Digest { tensor: name.clone() })?,
                name,
            })
        };
        Self::new(document.tensors.into_iter().map(checksum).collect::<Result<Vec<_>, _>>()?)
    }

    /// The manifest as JSON, in one line.
    pub fn to_json(&self) -> String {
        let mut out = String::from("{\"tensors\":[");
        for (index, sum) in self.checksums.iter().enumerate() {
            let record = Record {
                name: sum.name.clone(),
                dtype: sum.dtype.map(|dtype| dtype.as_str().to_owned()),
                shape: sum.shape.clone(),
                sha256: sum.sha256.to_string(),
            };
            let comma = if index == 0 { "" } else { "," };
            // Strings and numbers have a JSON form, and writing to a `String` cannot fail.
            let record = serde_json::to_string(&record).unwrap_or_default();
            let _ = write!(out, "{comma}{record}");
        }
        out.push_str("]}");
        out
    }

    /// The sum of the tensor of this name.
    pub fn get(&self, name: &str) -> Option<&Checksum> {
        self.by_name.get(name).and_then(|at| self.checksums.get(*at))
    }

    /// All sums.
    pub fn iter(&self) -> std::slice::Iter<'_, Checksum> {
        self.checksums.iter()
    }

    /// Number of sums.
    pub fn len(&self) -> usize {
        self.checksums.len()
    }

    /// Whether there is no sum.
    pub fn is_empty(&self) -> bool {
        self.checksums.is_empty()
    }

    /// Checks what can be without reading: that `checkpoint` has all tensors of the manifest, and that those
    /// to be loaded (name, dtype and shape as loaded) are in it, with that dtype and shape.
    ///
    /// # Errors
    ///
    /// [`VerifyError`], all but [`Mismatch`](VerifyError::Mismatch).
    pub fn check<'t>(
        &self,
        checkpoint: &Checkpoint,
        tensors: impl IntoIterator<Item = (&'t str, Dtype, &'t [usize])>,
    ) -> Result<(), VerifyError> {
        if let Some(lost) = self.iter().find(|sum| checkpoint.get(&sum.name).is_none()) {
            return Err(VerifyError::Missing { tensor: lost.name.clone() });
        }
        for (name, dtype, shape) in tensors {
            let tensor = || name.to_owned();
            let Some(sum) = self.get(name) else {
                return Err(VerifyError::Unlisted { tensor: tensor() });
            };
            if let Some(expected) = sum.dtype.filter(|expected| *expected != dtype) {
                return Err(VerifyError::Dtype { tensor: tensor(), expected, found: dtype });
            }
            if let Some(expected) = sum.shape.as_ref().filter(|expected| *expected != shape) {
                let (expected, found) = (expected.clone(), shape.to_vec());
                return Err(VerifyError::Shape { tensor: tensor(), expected, found });
            }
        }
        Ok(())
    }

    /// Checks the bytes of one tensor, as loaded.
    ///
    /// # Errors
    ///
    /// [`VerifyError::Unlisted`] and [`VerifyError::Mismatch`].
    pub fn check_bytes(&self, name: &str, bytes: &[u8]) -> Result<(), VerifyError> {
        let tensor = || name.to_owned();
        let sum = self.get(name).ok_or_else(|| VerifyError::Unlisted { tensor: tensor() })?;
        let (expected, found) = (sum.sha256, Digest::of(bytes));
        if expected == found {
            Ok(())
        } else {
            Err(VerifyError::Mismatch { tensor: tensor(), expected, found })
        }
    }
}

/// Why the manifest in a file cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{}: {source}", path.display())]
#[non_exhaustive]
pub struct ManifestFileError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong.
    pub source: ManifestError,
}

/// Why a manifest cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ManifestError {
    /// Its file cannot be read.
    #[error("cannot read: {0}")]
    Read(std::io::Error),
    /// It is not JSON, or not of a manifest's form.
    #[error("not a manifest: {reason}")]
    Json {
        /// Line of the first mistake, from 1.
        line: usize,
        /// Column of the first mistake.
        column: usize,
        /// What was found, where.
        reason: String,
    },
    /// Two sums for one tensor.
    #[error("tensor {tensor:?} is listed twice")]
    Duplicate {
        /// The tensor.
        tensor: String,
    },
    /// A sum is no SHA-256 sum.
    #[error("tensor {tensor:?}: sha256 is not 64 hexadecimal digits")]
    Digest {
        /// The tensor.
        tensor: String,
    },
    /// A dtype is not one of the format's.
    #[error("tensor {tensor:?}: unknown dtype {dtype:?}")]
    Dtype {
        /// The tensor.
        tensor: String,
        /// What the manifest says.
        dtype: String,
    },
}

/// How a checkpoint differs from its manifest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VerifyError {
    /// The bytes are not those that were summed.
    #[error("tensor {tensor:?}: its bytes have sha256 {found}, the manifest says {expected}")]
    Mismatch {
        /// The tensor.
        tensor: String,
        /// The manifest's sum.
        expected: Digest,
        /// The sum of what was loaded.
        found: Digest,
    },
    /// The manifest lists a tensor that the checkpoint lacks.
    #[error("tensor {tensor:?} is in the manifest and not in the checkpoint")]
    Missing {
        /// The tensor.
        tensor: String,
    },
    /// A tensor that is to be loaded is not in the manifest.
    #[error("tensor {tensor:?} is not in the manifest")]
    Unlisted {
        /// The tensor.
        tensor: String,
    },
    /// The elements are of another type.
    #[error("tensor {tensor:?} is {found}, the manifest says {expected}")]
    Dtype {
        /// The tensor.
        tensor: String,
        /// The manifest's type.
        expected: Dtype,
        /// The type as it would be loaded.
        found: Dtype,
    },
    /// The shape is another.
    #[error("tensor {tensor:?} has the shape {found:?}, the manifest says {expected:?}")]
    Shape {
        /// The tensor.
        tensor: String,
        /// The manifest's shape.
        expected: Vec<usize>,
        /// The shape as it would be loaded.
        found: Vec<usize>,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_hexadecimal_and_right() {
        // FIPS 180-2, appendix B.1.
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(Digest::of(b"abc").to_string(), abc);
        assert_eq!(abc.parse(), Ok(Digest::of(b"abc")));
        assert_eq!(abc.to_uppercase().parse(), Ok(Digest::of(b"abc")));
        for bad in ["", &abc[1..], &format!("{abc}0"), &abc.replace('b', "g"), &"é".repeat(32)] {
            assert_eq!(bad.parse::<Digest>(), Err(NotADigest), "{bad}");
        }
    }

    #[test]
    fn json_goes_both_ways() {
        let mut sums = vec![Checksum::new("a \"b\"\n", Digest::of(b"1"))];
        sums.push(Checksum {
            dtype: Some(Dtype::BF16),
            shape: Some(vec![2, 0]),
            ..Checksum::new("ü", Digest::of(b""))
        });
        let manifest = Manifest::new(sums).unwrap();
        let json = manifest.to_json();
        assert_eq!(Manifest::from_json(json.as_bytes()).unwrap(), manifest, "{json}");
        assert_eq!(Manifest::default().to_json(), r#"{"tensors":[]}"#);
        assert!(manifest.get("ü").is_some() && manifest.get("u").is_none());
    }

    #[test]
    fn bad_manifests_say_what_is_wrong() {
        let sum = Digest::of(b"");
        let parse = |text: &str| Manifest::from_json(text.as_bytes()).unwrap_err();
        assert!(matches!(parse("{\n]"), ManifestError::Json { line: 2, .. }));
        assert!(matches!(parse(r#"{"tensors":[{"name":"a"}]}"#), ManifestError::Json { .. }));
        let with = |rest: &str| format!(r#"{{"tensors":[{rest}]}}"#);
        let short = with(r#"{"name":"a","sha256":"00"}"#);
        assert!(matches!(parse(&short), ManifestError::Digest { tensor } if tensor == "a"));
        let dtype = with(&format!(r#"{{"name":"a","sha256":"{sum}","dtype":"X1"}}"#));
        assert!(matches!(parse(&dtype), ManifestError::Dtype { dtype, .. } if dtype == "X1"));
        let twice = format!(r#"{{"name":"a","sha256":"{sum}"}}"#);
        let twice = with(&format!("{twice},{twice}"));
        assert!(matches!(parse(&twice), ManifestError::Duplicate { tensor } if tensor == "a"));
        let error = Manifest::read("/no/such/manifest").unwrap_err().to_string();
        assert!(error.starts_with("/no/such/manifest: cannot read"), "{error}");
    }
}

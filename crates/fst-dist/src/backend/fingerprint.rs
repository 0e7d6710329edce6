//! What tells two checkpoints of the same layout apart: lengths of files, and a sample of bytes.

use fst_io::SourceFile;

/// Places that are sampled, over all files: a few milliseconds of cold reads.
const SAMPLES: usize = 32;
/// Bytes at each place.
const SAMPLE: usize = 64;

/// Bytes that differ where checkpoints do, for [`Planner::fingerprint`](crate::Planner::fingerprint).
///
/// Names and times of files are left out: nodes may have copies of their own. Of what is no local file, its
/// own identity counts.
#[derive(Debug)]
pub struct Fingerprint {
    bytes: Vec<u8>,
    /// Places of each file.
    places: u64,
}

impl Fingerprint {
    /// That of `files` files, which are to follow, and of what else ranks should agree on.
    #[must_use]
    pub fn new(files: usize, bytes: Vec<u8>) -> Self {
        Self { bytes, places: (SAMPLES / files.max(1)).max(1) as u64 }
    }

    /// Adds a file: its length, and bytes from places spread over it.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn add(&mut self, file: &SourceFile) -> Result<(), fst_io::Error> {
        self.bytes.extend_from_slice(&file.len().to_le_bytes());
        if let Some(source) = file.source() {
            self.bytes.extend(source.identity());
            return Ok(());
        }
        for place in 0..self.places {
            // The last one ends with the file: tensors at the front may be shared by versions.
            let last = file.len().saturating_sub(SAMPLE as u64);
            let at = (u128::from(last) * u128::from(place + 1) / u128::from(self.places)) as u64;
            let mut sample = [0; SAMPLE];
            let len = file.len().min(SAMPLE as u64) as usize;
            file.read_exact_at(&mut sample[..len], at)?;
            self.bytes.extend_from_slice(&sample);
        }
        Ok(())
    }

    /// The bytes.
    #[must_use]
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }
}

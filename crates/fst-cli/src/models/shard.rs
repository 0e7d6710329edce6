//! Cuts a list of tensors into the files of a checkpoint.

use super::TensorSpec;

/// One file of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardSpec {
    /// Name of the file in the checkpoint's folder.
    pub file_name: String,
    /// The tensors, in the order the official writer gives them: widest dtype first, then by name.
    pub tensors: Vec<TensorSpec>,
}

impl ShardSpec {
    /// Bytes of tensor data in the file; the header comes on top.
    pub fn bytes(&self) -> u64 {
        self.tensors.iter().map(TensorSpec::bytes).sum()
    }
}

/// Where one file ends and the next begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ShardRule {
    /// All tensors in one file, `model.safetensors`.
    Single,
    /// A file takes tensors in order while it holds no more than this many bytes, as transformers
    /// cuts checkpoints. A larger tensor has a file to itself.
    MaxBytes(u64),
    /// The embeddings, each layer, and the rest have a file each.
    PerLayer,
    /// This many files of nearly equal size, cut in order.
    Count(usize),
}

/// A cut that cannot be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ShardError {
    /// A file cannot be empty.
    #[error("{files} files cannot be filled with {tensors} tensors; a file needs at least one")]
    TooManyFiles {
        /// How many files were asked for.
        files: usize,
        /// How many tensors there are.
        tensors: usize,
    },
    /// No files at all.
    #[error("a checkpoint needs at least one file")]
    NoFiles,
}

/// How the files of a sharded checkpoint are named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FileNames {
    /// `model-00001-of-00002.safetensors`
    Dash,
    /// `model_00001-of-00072.safetensors`
    Underscore,
    /// `model-00001-of-000163.safetensors`
    DashSixDigitTotal,
}

impl FileNames {
    fn name(self, index: usize, count: usize) -> String {
        let number = index + 1;
        match self {
            _ if count == 1 => "model.safetensors".to_owned(),
            FileNames::Dash => format!("model-{number:05}-of-{count:05}.safetensors"),
            FileNames::Underscore => format!("model_{number:05}-of-{count:05}.safetensors"),
            FileNames::DashSixDigitTotal => format!("model-{number:05}-of-{count:06}.safetensors"),
        }
    }
}

pub(super) fn cut(
    tensors: Vec<TensorSpec>,
    rule: ShardRule,
    names: FileNames,
) -> Result<Vec<ShardSpec>, ShardError> {
    let files = match rule {
        ShardRule::Single => vec![tensors],
        ShardRule::MaxBytes(limit) => {
            cut_where(tensors, |_, bytes, next| bytes + next.bytes() > limit)
        }
        ShardRule::PerLayer => {
            cut_where(tensors, |first, _, next| layer_of(&first.name) != layer_of(&next.name))
        }
        ShardRule::Count(count) => evenly(tensors, count)?,
    };
    let count = files.len();
    Ok(files
        .into_iter()
        .enumerate()
        .map(|(index, mut tensors)| {
            tensors.sort_by(|a, b| b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name)));
            ShardSpec { file_name: names.name(index, count), tensors }
        })
        .collect())
}

/// Starts a new file wherever `cut(first tensor of the file, its bytes so far, next tensor)` says so.
fn cut_where(
    tensors: Vec<TensorSpec>,
    cut: impl Fn(&TensorSpec, u64, &TensorSpec) -> bool,
) -> Vec<Vec<TensorSpec>> {
    let mut files = Vec::new();
    let mut file: Vec<TensorSpec> = Vec::new();
    let mut bytes = 0;
    for tensor in tensors {
        if file.first().is_some_and(|first| cut(first, bytes, &tensor)) {
            files.push(std::mem::take(&mut file));
            bytes = 0;
        }
        bytes += tensor.bytes();
        file.push(tensor);
    }
    files.push(file);
    files
}

/// The first number among the dotted parts of a name: its layer.
fn layer_of(name: &str) -> Option<usize> {
    name.split('.').find_map(|part| part.parse().ok())
}

/// Cuts at the border between tensors that is nearest to each multiple of the mean file size.
fn evenly(tensors: Vec<TensorSpec>, count: usize) -> Result<Vec<Vec<TensorSpec>>, ShardError> {
    if count == 0 {
        return Err(ShardError::NoFiles);
    }
    if count > tensors.len() {
        return Err(ShardError::TooManyFiles { files: count, tensors: tensors.len() });
    }
    let total: u64 = tensors.iter().map(TensorSpec::bytes).sum();
    let mut files = Vec::with_capacity(count);
    let mut rest = tensors.into_iter().peekable();
    let mut filled = 0;
    for index in 0..count {
        let target = (u128::from(total) * (index as u128 + 1) / count as u128) as u64;
        let files_after = count - index - 1;
        let mut file = Vec::new();
        while let Some(next) = rest.peek() {
            let after = filled + next.bytes();
            // Beyond the target only if that comes nearer to it than stopping here.
            let overshoots = after > target && after - target > target.saturating_sub(filled);
            let needed = rest.len() <= files_after;
            if files_after > 0 && !file.is_empty() && (overshoots || needed) {
                break;
            }
            filled = after;
            file.extend(rest.next());
        }
        files.push(file);
    }
    Ok(files)
}

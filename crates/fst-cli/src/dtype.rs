//! `--dtype`: dtypes by the names that people use, and which of them tensors can be given.

use fst::Dtype;
use fst_cli::synth::is_floating_point;

/// What `load` and `sum` can convert to.
const TARGETS: [Dtype; 6] =
    [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::F8E4M3, Dtype::F8E5M2];

/// Names that safetensors does not use, in lower case: those of PyTorch, and short ones.
const ALIASES: [(&str, Dtype); 25] = [
    ("float64", Dtype::F64),
    ("double", Dtype::F64),
    ("fp64", Dtype::F64),
    ("float32", Dtype::F32),
    ("float", Dtype::F32),
    ("fp32", Dtype::F32),
    ("float16", Dtype::F16),
    ("half", Dtype::F16),
    ("fp16", Dtype::F16),
    ("bfloat16", Dtype::BF16),
    ("float8_e4m3fn", Dtype::F8E4M3),
    ("float8_e4m3", Dtype::F8E4M3),
    ("f8e4m3", Dtype::F8E4M3),
    ("fp8_e4m3", Dtype::F8E4M3),
    ("fp8_e4m3fn", Dtype::F8E4M3),
    ("fp8e4m3", Dtype::F8E4M3),
    ("e4m3", Dtype::F8E4M3),
    ("float8_e5m2", Dtype::F8E5M2),
    ("f8e5m2", Dtype::F8E5M2),
    ("fp8_e5m2", Dtype::F8E5M2),
    ("fp8e5m2", Dtype::F8E5M2),
    ("e5m2", Dtype::F8E5M2),
    ("float8_e4m3fnuz", Dtype::F8E4M3Fnuz),
    ("float8_e5m2fnuz", Dtype::F8E5M2Fnuz),
    ("float8_e8m0fnu", Dtype::F8E8M0),
];

/// A dtype by its name in safetensors or PyTorch, in capitals or not.
fn named(name: &str) -> Option<Dtype> {
    let lower = name.to_lowercase();
    let lower = lower.strip_prefix("torch.").unwrap_or(&lower);
    let alias = ALIASES.iter().find(|(alias, _)| *alias == lower);
    alias.map(|(_, dtype)| *dtype).or_else(|| lower.to_uppercase().parse().ok())
}

/// What tensors can be converted to while they are read.
pub(crate) fn parse_target(name: &str) -> Result<Dtype, String> {
    choose(name, "tensors are converted to", |dtype| TARGETS.contains(dtype))
}

/// What tensors can be made in.
pub(crate) fn parse_made(name: &str) -> Result<Dtype, String> {
    choose(name, "tensors are made in", |dtype| is_floating_point(*dtype))
}

fn choose(name: &str, what: &str, fits: impl Fn(&Dtype) -> bool) -> Result<Dtype, String> {
    let chosen = named(name);
    if let Some(dtype) = chosen.filter(&fits) {
        return Ok(dtype);
    }
    let all: Vec<&str> = Dtype::ALL.iter().filter(|d| fits(d)).map(|d| d.as_str()).collect();
    let known = match chosen {
        Some(dtype) => format!("not {dtype}"),
        None => "no such dtype".to_owned(),
    };
    let others = "or by PyTorch's names, such as bfloat16, half, float8_e4m3fn";
    Err(format!("{known}: {what} {} ({others})", all.join(", ")))
}

#[cfg(test)]
mod tests {
    use fst::gpu::cast::{CastType, supported};

    use super::*;

    #[test]
    fn usual_names_are_known() {
        for (names, dtype) in [
            (&["F16", "f16", "float16", "half", "Half", "torch.float16", "fp16"][..], Dtype::F16),
            (&["BF16", "bf16", "bfloat16", "torch.bfloat16"], Dtype::BF16),
            (&["F32", "float32", "float", "fp32"], Dtype::F32),
            (&["F64", "float64", "double"], Dtype::F64),
            (&["F8_E4M3", "f8_e4m3", "float8_e4m3fn", "fp8_e4m3", "e4m3"], Dtype::F8E4M3),
            (&["F8_E5M2", "float8_e5m2", "fp8_e5m2"], Dtype::F8E5M2),
        ] {
            for name in names {
                assert_eq!(parse_target(name), Ok(dtype), "{name}");
                assert_eq!(parse_made(name), Ok(dtype), "{name}");
            }
        }
        // Each alias is a name of its own: no dtype of safetensors is called so.
        for (alias, _) in ALIASES {
            assert!(alias.to_uppercase().parse::<Dtype>().is_err(), "{alias}");
        }
    }

    #[test]
    fn others_are_refused_with_what_there_is() {
        for name in ["", "bf17", "fp8", "torch.", "float128"] {
            let told = parse_target(name).unwrap_err();
            assert!(told.starts_with("no such dtype: ") && told.contains("F16, BF16"), "{told}");
        }
        // Those that there are, and that cannot be converted to.
        for name in ["I8", "f8_e8m0", "float8_e4m3fnuz"] {
            let told = parse_target(name).unwrap_err();
            assert!(told.starts_with("not "), "{told}");
        }
        assert_eq!(parse_made("F4"), Ok(Dtype::F4));
        assert!(parse_made("i8").unwrap_err().starts_with("not I8: tensors are made in F4"));
    }

    #[test]
    fn targets_are_those_of_the_library() {
        let ours = TARGETS.map(|dtype| dtype.to_string());
        let all = CastType::ALL.iter().filter(|to| supported(CastType::F32, **to));
        assert_eq!(ours.to_vec(), all.map(ToString::to_string).collect::<Vec<_>>());
    }
}

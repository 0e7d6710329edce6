//! What a tensor becomes when it is asked for in another type: compared with candle's own loader, for every
//! pair of types.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use candle_core::{DType, Device};
use candle_nn::VarBuilder;
use fst::Dtype;
use support::{DTYPES, Given, assert_same, noise, write_file};

/// All elements of 8 and 16 bits; of longer ones, noise and those that lie on the borders of rounding.
fn telling(dtype: Dtype) -> Given {
    let bytes: Vec<u8> = match dtype.bits() {
        16 => (0..=u16::MAX).flat_map(u16::to_le_bytes).collect(),
        32 => {
            let halves = [0u16, 1, 0x0fff, 0x1000, 0x1001, 0x7fff, 0x8000, 0x8001, 0xffff];
            let near = |high: u16| halves.map(move |low| u32::from(high) << 16 | u32::from(low));
            let all = (0..=u16::MAX).flat_map(near).flat_map(u32::to_le_bytes);
            all.chain(noise(1 << 18, 1)).collect()
        }
        64 => {
            // Every f32 border as f64, exactly and one bit beside it.
            let borders = (0..=u16::MAX).flat_map(|high| {
                let border = f64::from(f32::from_bits(u32::from(high) << 16 | 0x8000)).to_bits();
                [border - 1, border, border + 1]
            });
            let half = (0..=u16::MAX).map(|bits| half::f16::from_bits(bits).to_f64());
            let half = half.flat_map(|value| [value.to_bits(), value.to_bits() | 1 << 41]);
            borders.chain(half).flat_map(u64::to_le_bytes).chain(noise(1 << 18, 2)).collect()
        }
        _ => (0..=255).collect(),
    };
    let elements = bytes.len() * 8 / dtype.bits() as usize;
    Given("x".to_owned(), dtype, vec![elements], bytes)
}

#[test]
fn every_type_becomes_what_candle_makes_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let cpu = Device::Cpu;
    let (mut both, mut only_here) = (0, Vec::new());
    for from in Dtype::ALL {
        let path = folder.path().join(format!("{from}.safetensors"));
        let given = match from.bits() {
            // Packed: 256 bytes are whole groups of elements.
            4 | 6 => Given("x".to_owned(), *from, vec![1024], noise(128 * from.bits() as usize, 3)),
            _ => telling(*from),
        };
        write_file(&path, &[given]);
        for to in DTYPES {
            let what = format!("{from} to {}", to.as_str());
            // SAFETY: nobody changes the file.
            let theirs = unsafe { VarBuilder::from_mmaped_safetensors(&[&path], to, &cpu) };
            let theirs = match (*from, to) {
                // candle 0.11.1 never returns from it.
                (Dtype::F8E4M3, DType::F64) => Err(candle_core::Error::msg("endless")),
                _ => theirs.and_then(|vb| vb.get_unchecked("x")),
            };
            let ahead = fst_candle::var_builder(&path, to, &cpu).unwrap().get_unchecked("x");
            // Read for another type, and then asked for in this one.
            let vb = fst_candle::var_builder(&path, DType::U8, &cpu).unwrap();
            let later = vb.get_unchecked_dtype("x", to);
            let vb = fst_candle::var_builder(&path, DType::F32, &cpu).unwrap();
            let _ = vb.get_unchecked("x");
            let last = vb.get_unchecked_dtype("x", to);
            match theirs {
                Ok(theirs) => {
                    assert_same(&ahead.unwrap(), &theirs, &what);
                    assert_same(&later.unwrap(), &theirs, &what);
                    assert_same(&last.unwrap(), &theirs, &what);
                    both += 1;
                }
                Err(_) => {
                    assert_eq!(ahead.is_ok(), later.is_ok(), "{what}");
                    assert_eq!(ahead.is_ok(), last.is_ok(), "{what}");
                    if let Ok(tensor) = ahead {
                        assert_same(&tensor, &later.unwrap(), &what);
                        assert_same(&tensor, &last.unwrap(), &what);
                        only_here.push(what);
                    }
                }
            }
        }
    }
    assert!(both > 100, "{both}");
    let floats = ["f32", "f64", "bf16", "f16"];
    assert!(
        only_here.iter().all(|what| floats.iter().any(|float| what.ends_with(float))),
        "{only_here:?}"
    );
    assert_eq!(only_here.len(), 9, "{only_here:?}");
}

#[test]
fn what_candle_has_no_type_for_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    write_file(
        &path,
        &[support::given("flag", Dtype::Bool, &[3]), support::given("b", Dtype::F32, &[3])],
    );
    let vb = fst_candle::var_builder(&path, DType::F32, &Device::Cpu).unwrap();
    let error = vb.get(3, "flag").unwrap_err().to_string();
    assert!(error.contains("\"flag\"") && error.contains("BOOL"), "{error}");
    // Others are not affected.
    vb.get(3, "b").unwrap();
}

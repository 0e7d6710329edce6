//! Host casts against PyTorch's golden table, and the contract of `cast` itself.

#![allow(clippy::unwrap_used)]

mod golden;

use fst_gpu::cast::{CastError, CastType, cast, supported};

fn cast_to_vec(src: &[u8], from: CastType, to: CastType) -> Vec<u8> {
    let mut dst = vec![0xA5; src.len() / from.size() * to.size()];
    cast(src, from, &mut dst, to).unwrap();
    dst
}

#[test]
fn single_values_match_pytorch() {
    let mut wrong = Vec::new();
    for entry in golden::entries() {
        let input = &entry.input.to_le_bytes()[..entry.from.size()];
        let mut output = cast_to_vec(input, entry.from, entry.to);
        golden::one_nan(&mut output, entry.to);
        let found = golden::read(&output);
        if found != entry.output {
            let golden::Entry { from, to, input, output } = entry;
            wrong.push(format!("{from} to {to}: {input:#x} gave {found:#x}, not {output:#x}"));
        }
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn all_inputs_match_pytorch() {
    let mut wrong = Vec::new();
    for pair in golden::pairs() {
        let inputs = golden::inputs(pair.from);
        assert_eq!(inputs.len(), pair.count * pair.from.size(), "{} inputs", pair.from);
        let mut outputs = cast_to_vec(&inputs, pair.from, pair.to);
        let raw = golden::sha256(&outputs);
        golden::one_nan(&mut outputs, pair.to);
        if golden::sha256(&outputs) != pair.sha256 {
            wrong.push(format!("{} to {}", pair.from, pair.to));
        } else if pair.nan_bits.is_some_and(|bits| bits != raw) {
            wrong.push(format!("{} to {}: bits of NaN", pair.from, pair.to));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_table_has_every_supported_pair() {
    let golden: Vec<_> = golden::pairs().iter().map(|pair| (pair.from, pair.to)).collect();
    for from in CastType::ALL {
        for to in CastType::ALL {
            assert_eq!(supported(from, to), from == to || golden.contains(&(from, to)));
        }
    }
}

#[test]
fn any_length_and_alignment_gives_the_same_elements() {
    for pair in golden::pairs() {
        let inputs = golden::inputs(pair.from);
        let outputs = cast_to_vec(&inputs, pair.from, pair.to);
        let (n, m) = (pair.from.size(), pair.to.size());
        for elements in (0..70).chain([255, 256]) {
            let elements = elements.min(pair.count);
            for shift in 0..9 {
                let mut src = vec![0; shift];
                src.extend_from_slice(&inputs[..elements * n]);
                let mut dst = vec![0x5A; (8 - shift) + elements * m + 3];
                cast(&src[shift..], pair.from, &mut dst[8 - shift..][..elements * m], pair.to)
                    .unwrap();
                assert_eq!(dst[8 - shift..][..elements * m], outputs[..elements * m]);
                assert!(dst[..8 - shift].iter().all(|b| *b == 0x5A));
                assert!(dst[8 - shift + elements * m..].iter().all(|b| *b == 0x5A));
            }
        }
    }
}

#[test]
fn a_type_into_itself_is_a_copy_of_all_bits() {
    for ty in CastType::ALL {
        let inputs = golden::inputs(ty);
        assert_eq!(cast_to_vec(&inputs, ty, ty), inputs);
    }
}

#[test]
fn refusals_name_the_cause_and_leave_the_destination_alone() {
    use CastType::{BF16, F8E8M0, F32};
    let mut dst = [7; 8];
    assert_eq!(
        cast(&[0; 8], F32, &mut dst[..2], F8E8M0),
        Err(CastError::Unsupported { from: F32, to: F8E8M0 })
    );
    assert_eq!(
        cast(&[0; 5], BF16, &mut dst, F32),
        Err(CastError::RaggedSource { from: BF16, len: 5 })
    );
    assert_eq!(
        cast(&[0; 6], BF16, &mut dst, F32),
        Err(CastError::DestinationLength { to: F32, elements: 3, expected: 12, found: 8 })
    );
    assert_eq!(dst, [7; 8]);
}

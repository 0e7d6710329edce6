//! The little of a fat binary that loading one needs: which images there are, and the PTX among them.
//!
//! The format is NVIDIA's and undocumented; `tools/kernels/build.sh` makes such files by NVIDIA's own
//! program, and tests hold what is read here to the PTX that went in.

/// An image of a fat binary, decompressed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Machine code, rather than PTX.
    pub is_code: bool,
    /// The architecture that it is for, such as 80 for `sm_80`.
    pub architecture: u32,
    /// An ELF file, or PTX text.
    pub bytes: Vec<u8>,
}

const MAGIC: u32 = 0xBA55_ED50;
/// The flag of an image that is compressed by LZ4.
const LZ4: u64 = 0x2000;

/// The length of the fat binary that starts with these bytes, which are 16 at least.
pub(crate) fn len(header: &[u8]) -> Option<usize> {
    let magic = u32::from_le_bytes(*header.first_chunk()?);
    let header_len = u16::from_le_bytes(*header.get(6..)?.first_chunk()?);
    let len = u64::from_le_bytes(*header.get(8..)?.first_chunk()?);
    (magic == MAGIC).then(|| usize::from(header_len) + len as usize)
}

/// The images of a fat binary, or `None` if it is none.
pub fn images(bytes: &[u8]) -> Option<Vec<Image>> {
    let mut rest = bytes.get(16..len(bytes)?)?;
    let mut images = Vec::new();
    while !rest.is_empty() {
        let number = |at: usize| Some(u32::from_le_bytes(*rest.get(at..)?.first_chunk()?));
        let long = |at: usize| Some(u64::from_le_bytes(*rest.get(at..)?.first_chunk()?));
        let (kind, header, padded) = (number(0)? & 0xFFFF, number(4)? as usize, long(8)? as usize);
        let (stored, architecture, flags) = (number(16)? as usize, number(28)?, long(40)?);
        let end = header.checked_add(padded)?;
        let bytes = if flags & LZ4 != 0 {
            let packed = rest.get(header..header.checked_add(stored)?)?;
            decompress(packed, long(56)? as usize)?
        } else {
            rest.get(header..end)?.to_vec()
        };
        images.push(Image { is_code: kind == 2, architecture, bytes });
        rest = rest.get(end..)?;
    }
    Some(images)
}

/// An LZ4 block.
fn decompress(mut from: &[u8], len: usize) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(len);
    while out.len() < len {
        let token = *from.split_off_first()?;
        let literals = length(token >> 4, &mut from)?;
        out.extend_from_slice(from.split_off(..literals)?);
        if from.is_empty() {
            break;
        }
        let back = usize::from(u16::from_le_bytes(*from.split_off(..2)?.first_chunk()?));
        let count = length(token & 15, &mut from)? + 4;
        let start = out.len().checked_sub(back).filter(|_| back > 0)?;
        // A match may reach into what it makes.
        (start..start + count).for_each(|at| out.push(out[at]));
    }
    (out.len() == len).then_some(out)
}

/// A length of four bits, which goes on in bytes where these are all set.
fn length(first: u8, from: &mut &[u8]) -> Option<usize> {
    let mut length = usize::from(first);
    let mut more = first == 15;
    while more {
        let byte = *from.split_off_first()?;
        length += usize::from(byte);
        more = byte == 255;
    }
    Some(length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_matches_and_long_lengths_decompress() {
        // "abc", then 20 bytes from 3 back, then "xy".
        let packed = [0x3F, b'a', b'b', b'c', 3, 0, 1, 0x20, b'x', b'y'];
        assert_eq!(decompress(&packed, 25).unwrap(), b"abcabcabcabcabcabcabcabxy");
        assert_eq!(decompress(&packed, 26), None);
        assert_eq!(decompress(&packed[..6], 25), None);
        let mut long = vec![0xF0, 255, 0];
        long.extend([7; 270]);
        assert_eq!(decompress(&long, 270).unwrap(), [7; 270]);
        // A match that reaches before the beginning.
        assert_eq!(decompress(&[0x10, b'a', 2, 0, 0], 5), None);
    }

    #[test]
    fn what_is_no_fat_binary_has_no_images() {
        assert_eq!(images(b".version 8.0"), None);
        assert_eq!(images(&[0x50, 0xED, 0x55, 0xBA]), None);
        let mut cut = vec![0x50, 0xED, 0x55, 0xBA, 1, 0, 16, 0];
        cut.extend(64u64.to_le_bytes());
        assert_eq!(images(&cut), None);
    }
}

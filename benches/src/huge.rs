//! Huge-page memory for the two bounds (raw reads, parallel copy): anonymous, 2 MiB-aligned, `MADV_HUGEPAGE`.

use std::io;
use std::ptr::NonNull;

/// Size and alignment of a transparent huge page on x86-64 and most arm64 kernels.
pub const HUGE_PAGE: usize = 2 << 20;

/// An anonymous private mapping, aligned to and advised for huge pages, unmapped on drop.
#[derive(Debug)]
pub struct HugeBuffer {
    /// Start of the usable part; a multiple of [`HUGE_PAGE`]. `len` bytes from here are mapped
    /// readable and writable and owned by this value alone.
    start: NonNull<u8>,
    len: usize,
    mapping: *mut libc::c_void,
    mapping_len: usize,
}

// SAFETY: the mapping belongs to this value alone, like a `Box<[u8]>`.
unsafe impl Send for HugeBuffer {}
// SAFETY: shared access only reads.
unsafe impl Sync for HugeBuffer {}

impl HugeBuffer {
    /// Maps `len` bytes, not yet backed by pages: the first touch of each page faults it in.
    ///
    /// # Errors
    /// The error of `mmap(2)`.
    pub fn fresh(len: usize) -> io::Result<Self> {
        let mapping_len = len.max(1).next_multiple_of(HUGE_PAGE) + HUGE_PAGE;
        // SAFETY: a new anonymous mapping touches no memory that exists already.
        let mapping = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                mapping_len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if mapping == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let skip = mapping.align_offset(HUGE_PAGE);
        // SAFETY: `skip` is below HUGE_PAGE, which the mapping is longer than `len` by.
        let start = unsafe { mapping.cast::<u8>().add(skip) };
        let Some(start) = NonNull::new(start) else {
            return Err(io::Error::other("mmap gave address 0"));
        };
        let buffer = Self { start, len, mapping, mapping_len };
        // SAFETY: the range lies within the mapping above. Advice that the kernel refuses (huge pages
        // off) leaves ordinary pages, which is still correct.
        unsafe {
            libc::madvise(start.as_ptr().cast(), mapping_len - HUGE_PAGE, libc::MADV_HUGEPAGE);
        }
        Ok(buffer)
    }

    /// As [`HugeBuffer::fresh`], with every page faulted in already.
    ///
    /// # Errors
    /// The error of `mmap(2)`.
    pub fn prefaulted(len: usize) -> io::Result<Self> {
        let mut buffer = Self::fresh(len)?;
        for page in buffer.as_mut_slice().chunks_mut(4096) {
            // A volatile write cannot be optimised away.
            // SAFETY: the pointer is to the first byte of a live, non-empty mutable slice.
            unsafe { page.as_mut_ptr().write_volatile(0) };
        }
        Ok(buffer)
    }

    /// The bytes; zero where nothing was written.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: see the invariant on `start`; anonymous memory is initialised to zero.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    /// The bytes, writable.
    #[must_use]
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: see the invariant on `start`; `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for HugeBuffer {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `fresh`, unmapped once; slices borrow `self`, so none is left.
        unsafe { libc::munmap(self.mapping, self.mapping_len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_aligned_zero_and_writable() {
        let mut buffer = HugeBuffer::prefaulted(3 * HUGE_PAGE + 5).unwrap();
        assert_eq!(buffer.as_slice().as_ptr().align_offset(HUGE_PAGE), 0);
        assert_eq!(buffer.as_slice().len(), 3 * HUGE_PAGE + 5);
        assert!(buffer.as_slice().iter().all(|&b| b == 0));
        buffer.as_mut_slice().fill(7);
        assert!(buffer.as_slice().iter().all(|&b| b == 7));
    }
}

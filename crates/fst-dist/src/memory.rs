//! Views of the memory that groups move bytes between: host slices or device addresses.

use std::marker::PhantomData;

/// Which memory an address belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Space {
    /// Memory that the CPU reads and writes.
    Host,
    /// Memory of the CUDA device with this ordinal.
    Device(u32),
}

/// Bytes to be sent; as `&[u8]`, but perhaps on a device.
#[derive(Clone, Copy, Debug)]
pub struct Src<'a> {
    addr: u64,
    len: usize,
    space: Space,
    life: PhantomData<&'a [u8]>,
}

impl<'a> Src<'a> {
    /// A view of `len` bytes at an address.
    ///
    /// # Safety
    /// For `'a` the bytes are initialised, in `space`, and nobody writes them.
    #[must_use]
    pub unsafe fn from_addr(addr: u64, len: usize, space: Space) -> Self {
        Self { addr, len, space, life: PhantomData }
    }

    /// The address.
    #[must_use]
    pub fn addr(&self) -> u64 {
        self.addr
    }

    /// How many bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where they are.
    #[must_use]
    pub fn space(&self) -> Space {
        self.space
    }

    /// The bytes, if they are on the host.
    #[must_use]
    pub fn host(&self) -> Option<&'a [u8]> {
        // SAFETY: by construction the bytes are readable and unwritten for 'a; null only if empty.
        (self.space == Space::Host && self.len > 0)
            .then(|| unsafe { std::slice::from_raw_parts(self.addr as *const u8, self.len) })
            .or_else(|| (self.space == Space::Host).then_some(&[]))
    }
}

impl<'a> From<&'a [u8]> for Src<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        let (addr, len) = (bytes.as_ptr() as u64, bytes.len());
        Self { addr, len, space: Space::Host, life: PhantomData }
    }
}

/// Memory to receive into; as `&mut [u8]`, but perhaps on a device or not initialised.
#[derive(Debug)]
pub struct Dst<'a> {
    addr: u64,
    len: usize,
    space: Space,
    life: PhantomData<&'a mut [u8]>,
}

impl<'a> Dst<'a> {
    /// A view of `len` bytes at an address.
    ///
    /// # Safety
    /// For `'a` the bytes are writable, in `space`, and nobody else reads or writes them.
    #[must_use]
    pub unsafe fn from_addr(addr: u64, len: usize, space: Space) -> Self {
        Self { addr, len, space, life: PhantomData }
    }

    /// The address.
    #[must_use]
    pub fn addr(&self) -> u64 {
        self.addr
    }

    /// How many bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where they are.
    #[must_use]
    pub fn space(&self) -> Space {
        self.space
    }

    /// Copies `bytes` there, if it is on the host and as long; otherwise nothing happens.
    pub fn fill_host(&mut self, bytes: &[u8]) -> bool {
        if self.space != Space::Host || self.len != bytes.len() {
            return false;
        }
        // SAFETY: by construction the range is writable and nobody else's; lengths are equal.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.addr as *mut u8, self.len);
        }
        true
    }

    /// The same memory for a shorter time.
    #[must_use]
    pub fn reborrow(&mut self) -> Dst<'_> {
        Dst { addr: self.addr, len: self.len, space: self.space, life: PhantomData }
    }

    /// The memory as bytes to send, once they are written.
    ///
    /// # Safety
    /// The bytes are initialised.
    #[must_use]
    pub unsafe fn as_src(&self) -> Src<'_> {
        Src { addr: self.addr, len: self.len, space: self.space, life: PhantomData }
    }
}

impl<'a> From<&'a mut [u8]> for Dst<'a> {
    fn from(bytes: &'a mut [u8]) -> Self {
        let (addr, len) = (bytes.as_mut_ptr() as u64, bytes.len());
        Self { addr, len, space: Space::Host, life: PhantomData }
    }
}

//! Where no thread can be started: one thread loads, and what needs another says so.

#![allow(clippy::unwrap_used, clippy::panic)]

mod load_support;

use fst::dist::MeasuredRates;
use fst::{Checkpoint, Error, Loader};
use safetensors::tensor::Dtype as OfficialDtype;

use load_support::*;

/// Has the calling thread, and it alone, get EAGAIN for any thread that it starts.
fn refuse_threads() {
    let op = |code: u32, jf: u8, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf, k };
    let equal = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let answer = libc::BPF_RET | libc::BPF_K;
    let refused = libc::SECCOMP_RET_ERRNO | libc::EAGAIN as u32;
    let mut program = [
        op(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        op(equal, 1, libc::SYS_clone3 as u32),
        op(answer, 0, refused),
        op(equal, 1, libc::SYS_clone as u32),
        op(answer, 0, refused),
        op(answer, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: the kernel copies the program, which lives until the calls return.
    let installed = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter) == 0
    };
    assert!(installed, "{}", std::io::Error::last_os_error());
}

#[test]
fn what_can_do_without_threads_does_and_the_rest_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("some.safetensors");
    write(&path, &[("a", OfficialDtype::BF16, vec![1025, 2048])]);
    let tried = std::thread::spawn(move || {
        refuse_threads();
        assert!(std::thread::Builder::new().spawn(|| ()).is_err());
        let checkpoint = Checkpoint::open(path).unwrap();
        let tensors = Loader::new().load(&checkpoint).unwrap();
        assert_eq!(tensors.len(), 1);
        let Err(error) = Loader::new().stream(&checkpoint) else { panic!("a stream's thread") };
        assert!(matches!(error, Error::Io { .. }), "{error}");
        let error = MeasuredRates::measure(&checkpoint, 1 << 20, 2).unwrap_err();
        assert!(error.to_string().contains("cannot start its thread"), "{error}");
    });
    tried.join().unwrap();
}

//! Which file system a path lies on, as `/proc/self/mountinfo` tells (proc_pid_mountinfo(5)).

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::sys;

/// The file system of a path.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FileSystem {
    /// Its type as the kernel calls it, such as `ext4`, `nfs4` or `fuse.rclone`.
    pub kind: String,
    /// Where it is mounted.
    pub mount_point: PathBuf,
    /// Where its bytes are.
    pub place: Place,
    /// Whether it stores files compressed, or may: reading then costs this machine's processors.
    pub compressed: bool,
}

/// Where the bytes of a file system are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Place {
    /// On a device of this machine, or one that looks like it.
    Local,
    /// On another machine, or on the host of this virtual one.
    Network,
    /// In memory: the page cache is the storage.
    Memory,
    /// In a program of this machine (FUSE), which gets them from wherever it does.
    Program,
}

/// Types that are kept on other machines; those of FUSE follow a `fuse.`.
const NETWORK: [&str; 22] = [
    "9p",
    "afs",
    "beegfs",
    "ceph",
    "cifs",
    "glusterfs",
    "gpfs",
    "lustre",
    "nfs",
    "nfs4",
    "orangefs",
    "smb3",
    "smbfs",
    "virtiofs",
    "wekafs",
    "gcsfuse",
    "juicefs",
    "mountpoint-s3",
    "rclone",
    "s3fs",
    "sshfs",
    "goofys",
];

const MEMORY: [&str; 3] = ["tmpfs", "ramfs", "hugetlbfs"];

/// Types that always compress, or do so unless switched off.
const COMPRESSED: [&str; 4] = ["squashfs", "erofs", "cramfs", "zfs"];

impl FileSystem {
    /// The file system that `path` lies on, links followed.
    ///
    /// # Errors
    ///
    /// `path` or `/proc/self/mountinfo` cannot be read, or the latter does not list the mount.
    pub fn of(path: &Path) -> io::Result<Self> {
        let path = path.canonicalize()?;
        let mounts = fs::read("/proc/self/mountinfo")?;
        Self::in_mounts(&mounts, &path).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// The mount that `path`, absolute and without links, leads to: from the root on, the first one that is
    /// mounted on the way in the mount before.
    fn in_mounts(mounts: &[u8], path: &Path) -> Option<Self> {
        let mounts = mounts.split(|byte| *byte == b'\n').filter_map(Self::parse);
        let mounts: Vec<(u64, u64, Self)> =
            mounts.filter(|(.., mount)| path.starts_with(&mount.mount_point)).collect();
        let is_child = |parent: u64| mounts.iter().any(|(id, ..)| *id == parent);
        let root = mounts.iter().find(|(id, parent, _)| parent == id || !is_child(*parent));
        let (mut id, _, mut found) = root?.clone();
        for _ in 0..mounts.len() {
            let children = mounts.iter().filter(|(child, parent, _)| *parent == id && *child != id);
            let nearest = children.min_by_key(|(.., mount)| mount.mount_point.as_os_str().len());
            let Some((child, _, mount)) = nearest else { break };
            (id, found) = (*child, mount.clone());
        }
        Some(found)
    }

    /// One line: `ID PARENT DEVICE ROOT MOUNT_POINT OPTIONS [FIELD]... - TYPE SOURCE SUPER_OPTIONS`.
    fn parse(line: &[u8]) -> Option<(u64, u64, Self)> {
        let mut fields = line.split(|byte| *byte == b' ');
        let mut number = || str::from_utf8(fields.next()?).ok()?.parse().ok();
        let (id, parent) = (number()?, number()?);
        let mount_point = unescaped(fields.nth(2)?);
        let mut fields = fields.skip_while(|field| *field != b"-").skip(1);
        let kind = String::from_utf8_lossy(fields.next()?).into_owned();
        let options = fields.nth(1).unwrap_or_default();
        let own = kind.strip_prefix("fuse.").unwrap_or(&kind);
        let place = match own {
            own if NETWORK.contains(&own) => Place::Network,
            own if MEMORY.contains(&own) => Place::Memory,
            _ if own.len() < kind.len() || own == "fuse" => Place::Program,
            _ => Place::Local,
        };
        let option = |option: &[u8]| option.starts_with(b"compress") && option != b"compress=no";
        let compressed =
            COMPRESSED.contains(&&*kind) || options.split(|byte| *byte == b',').any(option);
        Some((id, parent, Self { kind, mount_point, place, compressed }))
    }
}

impl fmt::Display for FileSystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = match self.place {
            Place::Local => "local",
            Place::Network => "over the network",
            Place::Memory => "in memory",
            Place::Program => "served by a program (FUSE)",
        };
        let compressed = if self.compressed { ", compressed" } else { "" };
        write!(f, "{}, {place}{compressed}", self.kind)
    }
}

/// A path as it is, from how `/proc/self/mountinfo` writes it: space, tab, line feed and backslash as `\040`
/// and the like.
pub fn unescaped(field: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        let code = (byte == b'\\').then(|| after.get(..3)).flatten();
        let code = code.and_then(|digits| u8::from_str_radix(str::from_utf8(digits).ok()?, 8).ok());
        out.push(code.unwrap_or(byte));
        rest = if code.is_some() { &after[3..] } else { after };
    }
    sys::path_of_bytes(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &[u8] = br"22 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
23 22 0:21 / /proc rw - proc proc rw
30 22 0:40 / /data rw,noatime shared:1 master:2 - btrfs /dev/sdb rw,compress=zstd:3,ssd
31 30 0:41 / /data/my\040models rw - fuse.rclone remote: rw,user_id=0
32 22 0:42 / /dev/shm rw - tmpfs tmpfs rw,size=1k
33 22 0:43 / /net rw - nfs4 host:/x rw,vers=4.2
34 22 0:44 / /home rw - fuse.gocryptfs x rw
35 33 0:45 / /net rw - zfs tank rw
36 22 0:46 / /a/b rw - ext4 /dev/vdb rw
37 22 0:47 / /a rw - tmpfs none rw
broken line
";

    #[test]
    fn mounts_are_followed_from_the_root_on() {
        let of = |path: &str| FileSystem::in_mounts(MOUNTS, Path::new(path)).unwrap().to_string();
        assert_eq!(of("/models/x"), "ext4, local");
        assert_eq!(of("/database"), "ext4, local");
        assert_eq!(of("/data"), "btrfs, local, compressed");
        assert_eq!(of("/data/my models/a"), "fuse.rclone, over the network");
        assert_eq!(of("/dev/shm/a"), "tmpfs, in memory");
        assert_eq!(of("/home/a"), "fuse.gocryptfs, served by a program (FUSE)");
        assert_eq!(of("/net/a"), "zfs, local, compressed");
        // A mount on the way there hides what was mounted below before.
        assert_eq!(of("/a/b/c"), "tmpfs, in memory");
        assert_eq!(FileSystem::in_mounts(b"", Path::new("/")), None);
    }

    #[test]
    fn this_machine_has_some() {
        let here = FileSystem::of(Path::new(".")).unwrap();
        assert!(!here.kind.is_empty() && here.mount_point.is_absolute());
        assert_eq!(FileSystem::of(Path::new("/proc")).unwrap().kind, "proc");
        assert!(FileSystem::of(Path::new("/no such path")).is_err());
    }
}

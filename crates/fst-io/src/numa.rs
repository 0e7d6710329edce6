//! Where storage is attached on machines of several NUMA nodes, and readers beside it.
//!
//! Read from sysfs: `/sys/devices/system/node` lists nodes and their processors, and the devices
//! above a block device say which node they hang on. Memory needs no policy of its own: pages come
//! from the node of the thread that touches them first, and readers touch what they fill.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::file::SourceFile;
use crate::sys;

/// The processors of the node that the files' storage hangs on, where that is one node of several
/// and most of the bytes are not in memory already: copies out of the page cache want all
/// processors.
pub(crate) fn processors_near<'a>(
    files: impl Iterator<Item = &'a SourceFile> + Clone,
) -> Option<BTreeSet<usize>> {
    let sys = Path::new("/sys");
    if nodes(sys).len() < 2 {
        return None;
    }
    let mut found = None;
    for file in files.clone() {
        let device = file.buffered()?.metadata().ok()?.dev();
        let node = device_node(sys, libc::major(device), libc::minor(device))?;
        if *found.get_or_insert(node) != node {
            return None;
        }
    }
    let whole: u64 = files.clone().map(SourceFile::len).sum();
    let cached: u64 = files.filter_map(|file| file.resident_bytes().ok()).sum();
    if cached > whole / 2 {
        return None;
    }
    processors(sys, found?)
}

/// Keeps the calling thread on some processors until it is dropped.
#[derive(Debug)]
pub(crate) struct Bound {
    before: BTreeSet<usize>,
}

impl Bound {
    /// `None` when the thread may not run on any of them, or the system refuses.
    pub(crate) fn to(processors: &BTreeSet<usize>) -> Option<Self> {
        let before = sys::affinity().ok()?;
        let both: BTreeSet<_> = before.intersection(processors).copied().collect();
        if both.is_empty() || both == before {
            return None;
        }
        sys::set_affinity(&both).ok()?;
        Some(Self { before })
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        // Where it was allowed to run is where it is allowed to run.
        let _ = sys::set_affinity(&self.before);
    }
}

/// The numbers of the nodes that are online.
fn nodes(sys: &Path) -> BTreeSet<usize> {
    let list = fs::read_to_string(sys.join("devices/system/node/online"));
    list.ok().and_then(|list| parse_list(&list)).unwrap_or_default()
}

fn processors(sys: &Path, node: usize) -> Option<BTreeSet<usize>> {
    let list = sys.join(format!("devices/system/node/node{node}/cpulist"));
    parse_list(&fs::read_to_string(list).ok()?).filter(|cpus| !cpus.is_empty())
}

/// The node of a block device: its own, or the one that all devices below it (of a RAID or a
/// volume) share.
fn device_node(sys: &Path, major: u32, minor: u32) -> Option<usize> {
    node_of(sys, &fs::canonicalize(sys.join(format!("dev/block/{major}:{minor}"))).ok()?, 0)
}

fn node_of(sys: &Path, device: &Path, depth: u32) -> Option<usize> {
    /// Volumes on RAIDs on partitions; deeper is a loop.
    const DEEP: u32 = 8;
    let below: Vec<PathBuf> = fs::read_dir(device.join("slaves"))
        .map(|entries| entries.filter_map(|e| fs::canonicalize(e.ok()?.path()).ok()).collect())
        .unwrap_or_default();
    if !below.is_empty() && depth < DEEP {
        let mut nodes = below.iter().map(|device| node_of(sys, device, depth + 1));
        let first = nodes.next()??;
        return nodes.all(|node| node == Some(first)).then_some(first);
    }
    // A disk is a child of its controller, a partition one of its disk. -1 is "no node".
    let own = device.ancestors().take_while(|above| *above != sys).find_map(|above| {
        let node = fs::read_to_string(above.join("numa_node")).ok()?;
        node.trim().parse::<i64>().ok()
    });
    usize::try_from(own?).ok()
}

/// Parses lists such as `0-3,8,10-11` (see "List format" in `cpuset(7)`).
fn parse_list(list: &str) -> Option<BTreeSet<usize>> {
    /// More processors than any kernel supports: a list that says so is not one.
    const MOST: usize = 1 << 16;
    let mut all = BTreeSet::new();
    for part in list.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if first > last || last >= MOST {
            return None;
        }
        all.extend(first..=last);
    }
    Some(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn set(numbers: &[usize]) -> BTreeSet<usize> {
        numbers.iter().copied().collect()
    }

    #[test]
    fn lists_of_processors_are_understood() {
        assert_eq!(parse_list("0-3,8,10-11\n"), Some(set(&[0, 1, 2, 3, 8, 10, 11])));
        assert_eq!(parse_list("0\n"), Some(set(&[0])));
        assert_eq!(parse_list("\n"), Some(set(&[])));
        for bad in ["a", "3-1", "1-", "-1", "0-99999999999", "0-99999999"] {
            assert_eq!(parse_list(bad), None, "{bad}");
        }
    }

    /// The part of a machine's sysfs that is looked at: two nodes, an NVMe disk with a partition on
    /// each, a RAID over both and a volume on the second, a virtual disk on none.
    fn fixture(root: &Path) {
        let write = |path: &str, text: &str| {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("devices/system/node/online", "0-1\n");
        write("devices/system/node/node0/cpulist", "0-3\n");
        write("devices/system/node/node1/cpulist", "4-7\n");
        fs::create_dir_all(root.join("dev/block")).unwrap();
        let disk = |number: &str, path: &str, slaves: &[&str]| {
            let path = root.join("devices").join(path);
            fs::create_dir_all(path.join("slaves")).unwrap();
            symlink(&path, root.join("dev/block").join(number)).unwrap();
            for (i, slave) in slaves.iter().enumerate() {
                let slave = root.join("devices").join(slave);
                symlink(slave, path.join("slaves").join(i.to_string())).unwrap();
            }
        };
        let (a, b) = ("pci0/01:00.0/nvme/nvme0/nvme0n1", "pci1/81:00.0/nvme/nvme1/nvme1n1");
        let (a1, b1) = (format!("{a}/nvme0n1p1"), format!("{b}/nvme1n1p1"));
        disk("259:0", a, &[]);
        disk("259:1", &a1, &[]);
        disk("259:2", b, &[]);
        disk("259:3", &b1, &[]);
        disk("9:0", "virtual/block/md0", &[&a1, &b1]);
        disk("253:0", "virtual/block/dm-0", &[&b1, b]);
        disk("253:1", "virtual/block/dm-1", &["virtual/block/dm-1"]);
        disk("254:0", "pci0/virtio1/block/vda", &[]);
        write("devices/pci0/01:00.0/numa_node", "0\n");
        write("devices/pci1/81:00.0/numa_node", "1\n");
        write("devices/pci0/virtio1/numa_node", "-1\n");
    }

    #[test]
    fn disks_partitions_and_volumes_lead_to_their_node() {
        let folder = tempfile::tempdir().unwrap();
        let sys = fs::canonicalize(folder.path()).unwrap();
        assert!(nodes(&sys).is_empty());
        fixture(&sys);
        assert_eq!(nodes(&sys), set(&[0, 1]));
        assert_eq!(processors(&sys, 1), Some(set(&[4, 5, 6, 7])));
        assert_eq!(processors(&sys, 2), None);
        let node = |major, minor| device_node(&sys, major, minor);
        assert_eq!([node(259, 0), node(259, 1)], [Some(0); 2]);
        assert_eq!([node(259, 2), node(259, 3)], [Some(1); 2]);
        assert_eq!(node(9, 0), None, "its parts are on two nodes");
        assert_eq!(node(253, 0), Some(1));
        assert_eq!(node(253, 1), None, "a loop");
        assert_eq!([node(254, 0), node(7, 7)], [None; 2]);
    }

    #[test]
    fn a_thread_is_bound_for_a_while() {
        let before = sys::affinity().unwrap();
        let Some(first) = before.first().copied() else { panic!("no processor") };
        let bound = Bound::to(&set(&[first]));
        if before.len() > 1 {
            assert!(bound.is_some());
            assert_eq!(sys::affinity().unwrap(), set(&[first]));
        }
        drop(bound);
        assert_eq!(sys::affinity().unwrap(), before);
        assert!(Bound::to(&set(&[])).is_none());
    }
}

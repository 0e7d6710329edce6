//! How much host memory this process can still take before the system refuses it or ends it.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use crate::kept;
use crate::mount::unescaped;

/// What bounds the memory of this process.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum MemoryLimit {
    /// Memory and swap of the machine (`MemAvailable` and `SwapFree` of `/proc/meminfo`).
    Machine,
    /// A control group, as containers and services have them: the file of the limit. Beyond a
    /// `memory.high` the kernel ends nobody, but slows all of the group down until it hardly moves.
    ControlGroup(PathBuf),
    /// The address space of the process (`RLIMIT_AS`).
    AddressSpace,
}

impl fmt::Display for MemoryLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Machine => f.write_str("memory of the machine"),
            Self::ControlGroup(path) => write!(f, "limit of a control group, {}", path.display()),
            Self::AddressSpace => f.write_str("limit of the address space, RLIMIT_AS"),
        }
    }
}

/// Host memory that this process can still take.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct AvailableMemory {
    /// Bytes, those that the process [keeps](crate::kept_bytes) included.
    pub bytes: u64,
    /// The limit that leaves the least.
    pub limit: MemoryLimit,
}

impl AvailableMemory {
    /// What the system tells now, and what the process keeps; `None` where the system tells nothing.
    pub fn now() -> Option<Self> {
        let kept = kept::kept_bytes();
        least(Path::new("/")).map(|least| Self { bytes: least.bytes.saturating_add(kept), ..least })
    }
}

/// There is less host memory than something needs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{needed} bytes of host memory are needed and {available} are left: {limit}")]
#[non_exhaustive]
pub struct Shortage {
    /// Bytes needed.
    pub needed: u64,
    /// Bytes left.
    pub available: u64,
    /// The limit that leaves the least.
    pub limit: MemoryLimit,
}

impl Shortage {
    /// `needed` bytes, where `available` says what is left.
    pub fn new(needed: u64, available: AvailableMemory) -> Self {
        Self { needed, available: available.bytes, limit: available.limit }
    }
}

/// Refuses, if `check` says so, to fill `needed` bytes of host memory where there are fewer. Memory that the
/// process [keeps](crate::kept_bytes) counts; unless it `reuses` that, as much is given back as is missing
/// otherwise.
///
/// # Errors
///
/// [`Shortage`].
pub fn check(check: bool, needed: u64, reuses: bool) -> Result<(), Shortage> {
    // The system is asked only for who wants to know: small loads into memory that exists come often.
    if !check {
        return Ok(());
    }
    let kept = kept::kept_bytes();
    let Some(available) = AvailableMemory::now() else { return Ok(()) };
    if available.bytes < needed {
        return Err(Shortage::new(needed, available));
    }
    if !reuses {
        kept::release(needed.saturating_sub(available.bytes.saturating_sub(kept)));
    }
    Ok(())
}

/// The limit that leaves the least, of those that the files under `root` tell.
fn least(root: &Path) -> Option<AvailableMemory> {
    let read = |path: &str| fs::read_to_string(root.join(path)).unwrap_or_default();
    let machine = machine(&read("proc/meminfo"));
    let machine = machine.map(|bytes| AvailableMemory { bytes, limit: MemoryLimit::Machine });
    let address_space = address_space(&read("proc/self/limits"), &read("proc/self/status"));
    let address_space =
        address_space.map(|bytes| AvailableMemory { bytes, limit: MemoryLimit::AddressSpace });
    let mut least = machine.into_iter().chain(address_space).min_by_key(|left| left.bytes);
    for hierarchy in hierarchies(&read("proc/self/cgroup"), &read("proc/self/mountinfo")) {
        let up = hierarchy.group.ancestors().take_while(|path| path.starts_with(&hierarchy.top));
        for path in up {
            let most = least.as_ref().map_or(u64::MAX, |least| least.bytes);
            least = left_of_group(root, path, hierarchy.version, most).or(least);
        }
    }
    least
}

/// The number of a line `NAME number kB`, in bytes.
fn kib(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// What `/proc/meminfo` says can be had without ending a program, swap included.
fn machine(meminfo: &str) -> Option<u64> {
    let swap = kib(meminfo, "SwapFree").unwrap_or(0);
    kib(meminfo, "MemAvailable").map(|available| available.saturating_add(swap))
}

/// What the soft limit in `/proc/self/limits` leaves of the address space, of which
/// `/proc/self/status` tells the part in use.
fn address_space(limits: &str, status: &str) -> Option<u64> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max address space"))?;
    let limit: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(limit.saturating_sub(kib(status, "VmSize")?))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

/// Where the process is in a tree of control groups that count memory.
#[derive(Debug, PartialEq, Eq)]
struct Hierarchy {
    version: Version,
    /// The folder of the process's group.
    group: PathBuf,
    /// The highest folder of the tree that can be seen.
    top: PathBuf,
}

/// The trees of `/proc/self/mountinfo` that count memory, and the place in them that
/// `/proc/self/cgroup` tells (`cgroups(7)`, `proc_pid_mountinfo(5)`).
fn hierarchies(cgroup: &str, mountinfo: &str) -> Vec<Hierarchy> {
    let place = |version: Version| {
        cgroup.lines().find_map(|line| {
            let (_, rest) = line.split_once(':')?;
            let (controllers, path) = rest.split_once(':')?;
            match version {
                Version::V1 => controllers.split(',').any(|name| name == "memory"),
                Version::V2 => controllers.is_empty(),
            }
            .then_some(path)
        })
    };
    let mounted = |line: &str| -> Option<Hierarchy> {
        let (mount, kind) = line.split_once(" - ")?;
        let mut mount = mount.split(' ').skip(3);
        let mut path = || Some(unescaped(mount.next()?.as_bytes()));
        let (top, at) = (path()?, path()?);
        let mut kind = kind.split(' ');
        let version = match kind.next()? {
            "cgroup2" => Version::V2,
            "cgroup" if kind.nth(1)?.split(',').any(|option| option == "memory") => Version::V1,
            _ => return None,
        };
        // A group outside of what is mounted here is not visible; what is mounted is the limit then.
        let below = Path::new(place(version)?).strip_prefix(top).unwrap_or(Path::new(""));
        let inside = below.components().all(|part| matches!(part, std::path::Component::Normal(_)));
        let group = if inside { at.join(below) } else { at.clone() };
        Some(Hierarchy { version, group, top: at })
    };
    mountinfo.lines().filter_map(mounted).collect()
}

/// What a group has left: its limit, less what is in use and cannot be taken back. `None` without a
/// limit, or where that is not less than `most`.
fn left_of_group(
    root: &Path,
    group: &Path,
    version: Version,
    most: u64,
) -> Option<AvailableMemory> {
    let folder = root.join(group.strip_prefix("/").unwrap_or(group));
    let read = |name: &str| fs::read_to_string(folder.join(name)).ok();
    let (limits, usage, fields) = match version {
        Version::V1 => (
            &["memory.limit_in_bytes"][..],
            "memory.usage_in_bytes",
            &["total_inactive_file", "total_active_file"][..],
        ),
        Version::V2 => (
            &["memory.max", "memory.high"][..],
            "memory.current",
            &["inactive_file", "active_file", "slab_reclaimable"][..],
        ),
    };
    // `max` is no number.
    let number = |name: &&str| Some((read(name)?.trim().parse::<u64>().ok()?, group.join(name)));
    let (limit, file) =
        limits.iter().filter_map(number).min().filter(|(limit, _)| *limit < most)?;
    let usage: u64 = read(usage)?.trim().parse().ok()?;
    // The system takes a millisecond to add up what could be taken back.
    if limit.saturating_sub(usage) >= most {
        return None;
    }
    let stat = read("memory.stat").unwrap_or_default();
    let reclaimable = stat.lines().fold(0u64, |sum, line| {
        let field = line.split_once(' ').filter(|(name, _)| fields.contains(name));
        let bytes = field.and_then(|(_, bytes)| bytes.trim().parse().ok()).unwrap_or(0);
        sum.saturating_add(bytes)
    });
    let bytes = limit.saturating_sub(usage.saturating_sub(reclaimable));
    let limit = MemoryLimit::ControlGroup(file);
    (bytes < most).then_some(AvailableMemory { bytes, limit })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMINFO: &str = "MemTotal: 16000000 kB\nMemAvailable:    8000000 kB\nSwapFree: 0 kB\n";

    /// A system whose files are those given.
    fn system(name: &str, files: &[(&str, &str)]) -> PathBuf {
        let root =
            std::env::temp_dir().join(format!("fst-available-{}-{name}", std::process::id()));
        for (path, text) in files {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    fn least_of(name: &str, files: &[(&str, &str)]) -> Option<(u64, MemoryLimit)> {
        let root = system(name, files);
        let least = least(&root).map(|least| (least.bytes, least.limit));
        fs::remove_dir_all(&root).unwrap();
        least
    }

    #[test]
    fn without_groups_the_machine_counts() {
        let files = [("proc/meminfo", MEMINFO)];
        assert_eq!(least_of("machine", &files), Some((8_000_000 << 10, MemoryLimit::Machine)));
        assert_eq!(least(Path::new("/nowhere")), None);
    }

    #[test]
    fn the_tightest_group_up_a_v2_tree_counts_less_its_reclaimable_pages() {
        let files = [
            ("proc/meminfo", MEMINFO),
            ("proc/self/cgroup", "0::/a/b\n"),
            ("proc/self/mountinfo", "30 24 0:26 / /cg\\040x rw shared:9 - cgroup2 cgroup2 rw\n"),
            ("cg x/a/memory.max", "1000000\n"),
            ("cg x/a/memory.current", "900000\n"),
            ("cg x/a/memory.stat", "anon 1\ninactive_file 300000\nactive_file 100000\n"),
            ("cg x/a/b/memory.max", "max\n"),
            ("cg x/a/b/memory.current", "800000\n"),
        ];
        let limit = MemoryLimit::ControlGroup("/cg x/a/memory.max".into());
        assert_eq!(least_of("v2", &files), Some((500_000, limit)));
        // The kernel holds a group up at `memory.high`.
        for (group, high, left, least) in [
            ("a", "700000\n", 200_000, "/cg x/a/memory.high"),
            ("a/b", "900000\n", 100_000, "/cg x/a/b/memory.high"),
            ("a/b", "max\n", 500_000, "/cg x/a/memory.max"),
        ] {
            let file = format!("cg x/{group}/memory.high");
            let files = [&files[..], &[(&file, high)]].concat();
            let limit = MemoryLimit::ControlGroup(least.into());
            assert_eq!(least_of("v2-high", &files), Some((left, limit)), "{file}");
        }
    }

    #[test]
    fn a_v1_group_counts_also_where_only_a_part_of_the_tree_is_mounted() {
        let mount = |root: &str| {
            format!(
                "33 32 0:29 {root} /cg/cpu rw - cgroup cgroup rw,cpu\n\
                 34 32 0:30 {root} /cg/memory rw - cgroup cgroup rw,memory\n"
            )
        };
        let limits = |at: &str| {
            [
                (format!("{at}/memory.limit_in_bytes"), "1000000\n"),
                (format!("{at}/memory.usage_in_bytes"), "900000\n"),
                (format!("{at}/memory.stat"), "inactive_file 1\ntotal_inactive_file 100000\n"),
            ]
        };
        // The whole tree; a container's part of it; a part that the group is not in.
        for (name, root, at) in [
            ("whole", "/", "cg/memory/docker/x"),
            ("part", "/docker/x", "cg/memory"),
            ("out", "/y", "cg/memory"),
        ] {
            let (mount, limits) = (mount(root), limits(at));
            let mut files = vec![
                ("proc/self/cgroup", "5:cpu:/docker/x\n4:memory:/docker/x\n"),
                ("proc/self/mountinfo", &*mount),
            ];
            files.extend(limits.iter().map(|(path, text)| (&**path, *text)));
            let limit = Path::new("/").join(at).join("memory.limit_in_bytes");
            let limit = MemoryLimit::ControlGroup(limit);
            assert_eq!(least_of(name, &files), Some((200_000, limit)), "{name}");
        }
    }

    #[test]
    fn the_limit_of_the_address_space_counts() {
        let limits =
            |soft: &str| format!("Limit  Soft\nMax address space   {soft}  unlimited  bytes\n");
        for (soft, left) in
            [("3000000", Some(3_000_000 - 1024)), ("1000", Some(0)), ("unlimited", None)]
        {
            let left = left.map(|left| (left, MemoryLimit::AddressSpace));
            let limits = limits(soft);
            let files =
                [("proc/self/limits", &*limits), ("proc/self/status", "VmSize:\t   1 kB\n")];
            assert_eq!(least_of("as", &files), left);
        }
    }
}

//! Rank, world size and meeting point, from the environment that launchers set.

use crate::error::GroupError;

/// What `torchrun` and most launchers tell a process by `RANK`, `WORLD_SIZE`, `LOCAL_RANK`,
/// `MASTER_ADDR` and `MASTER_PORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LaunchEnv {
    /// This process's rank.
    pub rank: u32,
    /// How many processes there are.
    pub world: u32,
    /// The rank among the processes of this machine, which chooses the device; `RANK` where
    /// `LOCAL_RANK` is not set.
    pub local_rank: u32,
    /// Host name or address of rank 0.
    pub address: String,
    /// The port at which rank 0 is met: `FST_MASTER_PORT` if set, else `MASTER_PORT`, or the one after
    /// it where `TORCHELASTIC_USE_AGENT_STORE` says that torchrun itself listens there.
    pub port: u16,
    /// The name of the job, by which its ranks know each other: `FST_JOB_ID` if set, else
    /// `TORCHELASTIC_RUN_ID`, else empty. The same for all ranks; those of jobs of other names that meet
    /// at the same port, or come there too late or too early, are not taken for this job's.
    pub job: String,
}

impl LaunchEnv {
    /// What launchers would tell this rank of a job without a name.
    #[must_use]
    pub fn new(rank: u32, world: u32, address: impl Into<String>, port: u16) -> Self {
        let (local_rank, address, job) = (rank, address.into(), String::new());
        Self { rank, world, local_rank, address, port, job }
    }

    /// Reads the environment.
    ///
    /// # Errors
    /// A variable is missing or not a number, or the rank is not below the world size.
    pub fn from_env() -> Result<Self, GroupError> {
        Self::from_lookup(|name| std::env::var(name).ok())
    }

    fn from_lookup(lookup: impl Fn(&str) -> Option<String>) -> Result<Self, GroupError> {
        let text = |variable: &'static str| {
            lookup(variable).ok_or(GroupError::Environment { variable, value: None })
        };
        let number = |variable: &'static str| -> Result<u32, GroupError> {
            let value = text(variable)?;
            let parsed = value.parse();
            parsed.map_err(|_| GroupError::Environment { variable, value: Some(value) })
        };
        let (rank, world) = (number("RANK")?, number("WORLD_SIZE")?);
        if rank >= world {
            return Err(GroupError::Environment {
                variable: "RANK",
                value: Some(rank.to_string()),
            });
        }
        let local_rank = match lookup("LOCAL_RANK") {
            Some(_) => number("LOCAL_RANK")?,
            None => rank,
        };
        let (variable, shift) = match lookup("FST_MASTER_PORT") {
            Some(_) => ("FST_MASTER_PORT", 0),
            None => {
                let taken = lookup("TORCHELASTIC_USE_AGENT_STORE");
                ("MASTER_PORT", u32::from(taken.is_some_and(|value| value == "True")))
            }
        };
        let port = u16::try_from(number(variable)?.saturating_add(shift));
        let port =
            port.map_err(|_| GroupError::Environment { variable, value: lookup(variable) })?;
        let job =
            lookup("FST_JOB_ID").or_else(|| lookup("TORCHELASTIC_RUN_ID")).unwrap_or_default();
        Ok(Self { local_rank, job, ..Self::new(rank, world, text("MASTER_ADDR")?, port) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(vars: &[(&str, &str)]) -> Result<LaunchEnv, String> {
        let find = |name: &str| vars.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned());
        LaunchEnv::from_lookup(find).map_err(|error| error.to_string())
    }

    #[test]
    fn variables_are_read_and_named_when_wrong() {
        let all = [("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "h"), ("MASTER_PORT", "9")];
        let env = read(&all).unwrap();
        assert_eq!((env.rank, env.world, env.local_rank, env.port), (1, 2, 1, 9));
        let with = |extra| read(&[&[extra], &all[..]].concat());
        assert_eq!(with(("LOCAL_RANK", "0")).unwrap().local_rank, 0);
        assert_eq!(with(("TORCHELASTIC_USE_AGENT_STORE", "True")).unwrap().port, 10);
        assert_eq!(with(("FST_MASTER_PORT", "77")).unwrap().port, 77);
        assert_eq!(env.job, "");
        assert_eq!(with(("TORCHELASTIC_RUN_ID", "r")).unwrap().job, "r");
        let both = [("TORCHELASTIC_RUN_ID", "r"), ("FST_JOB_ID", "j")];
        assert_eq!(read(&[&both[..], &all[..]].concat()).unwrap().job, "j");
        assert_eq!(read(&all[1..]).unwrap_err(), "RANK is not set");
        let many = with(("RANK", "many")).unwrap_err();
        assert_eq!(many, "RANK is \"many\"");
        assert_eq!(with(("RANK", "2")).unwrap_err(), "RANK is \"2\"");
    }
}

//! `TcpControl` between processes, one of which is killed: this program starts itself, once a rank.

#![allow(clippy::unwrap_used, clippy::panic)]

mod port;

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use fst_dist::group::{Control, LaunchEnv, TcpControl};
use port::Port;

const WORLD: u32 = 3;

/// Far beyond what the test allows: what ends the ranks is the loss of the connection.
const DEADLINE: Duration = Duration::from_secs(600);

fn main() -> ExitCode {
    if std::env::args().any(|arg| arg == "--rank") {
        return act();
    }
    // `cargo test NAME` and `-- --list` address the tests of other files.
    if std::env::args().any(|arg| arg == "--list") {
        return ExitCode::SUCCESS;
    }
    for killed in 0..WORLD {
        // Waiting in a gathering that the others do not come to, and in the midst of many.
        for scene in ["wait", "busy"] {
            let port = Port::new();
            let mut ranks = launch(scene, killed, port.number());
            // All have met.
            for rank in &mut ranks {
                let mut line = String::new();
                BufReader::with_capacity(1, rank.stdout.as_mut().unwrap())
                    .read_line(&mut line)
                    .unwrap();
                assert_eq!(line, "met\n");
            }
            std::thread::sleep(Duration::from_millis(100));
            let start = Instant::now();
            // SIGKILL.
            ranks[killed as usize].kill().unwrap();
            for (rank, mut child) in (0u32..).zip(ranks) {
                while child.try_wait().unwrap().is_none() {
                    if start.elapsed() > Duration::from_secs(60) {
                        child.kill().unwrap();
                        panic!("{scene}: rank {rank} hangs after rank {killed} was killed");
                    }
                    std::thread::sleep(Duration::from_millis(2));
                }
                let mut said = String::new();
                child.stdout.as_mut().unwrap().read_to_string(&mut said).unwrap();
                let lost = format!("rank {killed} is lost: ");
                assert!(rank == killed || said.starts_with(&lost), "{scene}: {rank} says {said}");
            }
            println!("rank {killed} killed, {scene} ... ok");
        }
    }
    ExitCode::SUCCESS
}

/// Starts every rank as torchrun would.
fn launch(scene: &str, killed: u32, port: u16) -> Vec<Child> {
    let start = |rank: u32| {
        Command::new(std::env::current_exe().unwrap())
            .args(["--rank", scene, &killed.to_string()])
            .env("RANK", rank.to_string())
            .env("WORLD_SIZE", WORLD.to_string())
            .env("MASTER_ADDR", "127.0.0.1")
            .env("FST_MASTER_PORT", port.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap()
    };
    (0..WORLD).map(start).collect()
}

/// What one rank does.
fn act() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    let [_, _, scene, killed] = &args[..] else { panic!("{args:?}") };
    let control = TcpControl::from_env(&LaunchEnv::from_env().unwrap(), DEADLINE).unwrap();
    println!("met");
    if scene == "wait" && control.rank().to_string() == *killed {
        std::thread::sleep(DEADLINE);
    }
    loop {
        if let Err(error) = control.gather_messages(&[7; 10_000]) {
            println!("{error}");
            return ExitCode::FAILURE;
        }
    }
}

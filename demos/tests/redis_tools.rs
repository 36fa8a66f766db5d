//! Real `redis-benchmark` and `redis-cli`, as Debian ships them, against `baton-kv --standalone`.
//!
//! They come from the lab's tree: `$BATON_LAB_TREE`, or the one that `cargo demo lab` made. They are started by the tree's own
//! loader with the tree's libraries, so that neither root nor a package on this host is needed.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

#[path = "../../tests/support/lab_tree.rs"]
mod lab_tree;

use lab_tree::lab_tree;

struct Server {
    process: Child,
    port: String,
}

impl Server {
    fn start() -> Self {
        let mut process = Command::new(env!("CARGO_BIN_EXE_baton-kv"))
            .args(["--standalone", "--listen", "127.0.0.1:0"])
            .stdout(Stdio::piped())
            .spawn()
            .expect("baton-kv starts");
        let mut line = String::new();
        BufReader::new(process.stdout.take().expect("piped")).read_line(&mut line).expect("it says where it listens");
        let port = line.trim().rsplit(':').next().expect("an address").to_owned();
        assert!(port.parse::<u16>().is_ok(), "{line:?}");
        Self { process, port }
    }

    /// Runs a program of the tree against this server; its output.
    fn run(&self, program: &str, arguments: &[&str]) -> String {
        let tree = lab_tree();
        let output = Command::new(tree.join("usr/lib64/ld-linux-x86-64.so.2"))
            .arg("--library-path")
            .arg(tree.join("usr/lib/x86_64-linux-gnu"))
            .arg(tree.join("usr/bin").join(program))
            .args(["-h", "127.0.0.1", "-p", &self.port])
            .args(arguments)
            .output()
            .expect("the tree's loader runs");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{program} {arguments:?}: {}{text}", String::from_utf8_lossy(&output.stderr));
        text
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn redis_benchmark_is_content() {
    let server = Server::start();
    let tests = "ping,set,get,incr,lpush,rpush,lpop,rpop,sadd,spop,lrange_100,mset";
    for pipeline in ["1", "16"] {
        let told = server.run("redis-benchmark", &["-t", tests, "-n", "2000", "-c", "20", "-P", pipeline, "--csv"]);
        let lines: Vec<&str> = told.lines().filter(|line| line.starts_with('"')).collect();
        for test in ["SET", "GET", "INCR", "LPUSH", "LPOP", "SADD", "MSET (10 keys)"] {
            assert!(lines.iter().any(|line| line.starts_with(&format!("\"{test}\","))), "{test}: {told}");
        }
        assert!(!told.contains("ERR"), "{told}");
    }
}

#[test]
fn redis_cli_is_content() {
    let server = Server::start();
    let cli = |line: &str| server.run("redis-cli", &line.split(' ').collect::<Vec<_>>()).trim().to_owned();
    assert_eq!(cli("PING"), "PONG");
    assert_eq!(cli("SET greeting hello"), "OK");
    assert_eq!(cli("GET greeting"), "hello");
    assert_eq!(cli("INCR n"), "1");
    assert_eq!(cli("LPUSH l a b"), "2");
    assert_eq!(cli("LRANGE l 0 -1"), "b\na");
    assert_eq!(cli("SADD s x"), "1");
    assert_eq!(cli("DBSIZE"), "4");
    assert_eq!(cli("NONSENSE"), "ERR unknown command `NONSENSE`, with args beginning with:");
    assert!(cli("INFO").contains("server_name:baton-kv"));
    // RESP3 is refused in redis 5's words, and the client goes on in RESP2.
    assert!(cli("-3 PING").ends_with("PONG"));
}

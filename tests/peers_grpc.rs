//! gRPC through the balancer: grpcio and @grpc/grpc-js on both sides, with gRPC's own interoperability cases. The test
//! suite's own build does not need them; `target/python` and `target/node` hold them, see `.ci/run`.

#[path = "common/process.rs"]
mod process;
#[path = "common/servers.rs"]
mod servers;
#[path = "common/wait.rs"]
mod wait;

use std::process::{Command, Output};

use process::{Folder, Process, free_port};
use servers::listening;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

fn at(path: &str) -> String {
    format!("{ROOT}/{path}")
}

/// A balancer in front of backends that speak HTTP/2, with a door in the clear and one with TLS.
struct Stage {
    _folder: Folder,
    _lb: Process,
    plain: u16,
    https: u16,
    certificate: String,
}

impl Stage {
    fn over(backends: &[u16]) -> Stage {
        let folder = Folder::new("peers-grpc");
        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(["a.example".to_owned()]).unwrap();
        let certificate = folder.write("own.pem", params.self_signed(&key).unwrap().pem());
        let key = folder.write("own.key", key.serialize_pem());
        let [plain, https, control, admin] = [0; 4].map(|_| free_port());
        let list: Vec<String> = backends
            .iter()
            .map(|port| format!("{{ address = \"127.0.0.1:{port}\", http = 2 }}"))
            .collect();
        let settings = format!(
            "workers = 1\n[listen]\ntcp = \"off\"\nudp = \"off\"\napi = \"127.0.0.1:{plain}\"\n\
             api_tls = \"127.0.0.1:{https}\"\ncontrol = \"127.0.0.1:{control}\"\n\
             admin = \"127.0.0.1:{admin}\"\n[[tls.certificate]]\ncertificate = \"{certificate}\"\n\
             key = \"{key}\"\n[service.calls]\nprotocol = \"api\"\npaths = [\"/test\"]\nbackends = [{}]\n",
            list.join(", ")
        );
        let file = folder.write("lb.toml", settings);
        let lb = Process::start(env!("CARGO_BIN_EXE_lb"), &["serve", "--config", &file]);
        [plain, https].into_iter().for_each(listening);
        Stage { _folder: folder, _lb: lb, plain, https, certificate }
    }
}

fn python(script: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new("python3");
    command.env("PYTHONPATH", at("target/python"));
    command.arg(at(script)).args(arguments);
    command
}

fn node(script: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new("node");
    command.env("NODE_PATH", at("target/node/node_modules"));
    command.arg(at(script)).args(arguments);
    command
}

fn served(mut command: Command, ports: &[u16]) -> Process {
    let server = Process(command.spawn().unwrap());
    ports.iter().copied().for_each(listening);
    server
}

fn passes(mut command: Command) {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let [said, errors] = [stdout, stderr].map(|it| String::from_utf8_lossy(&it).into_owned());
    assert!(status.success(), "{said}{errors}");
    assert!(said.lines().count() > 7 && said.lines().all(|line| line.starts_with("ok ")), "{said}");
}

#[test]
#[ignore = "needs grpcio and @grpc/grpc-js"]
fn calls_of_every_kind_pass_with_their_metadata_and_are_dealt_out_one_by_one() {
    let ports = [0; 4].map(|_| free_port());
    let names = ports.map(|port| port.to_string());
    let arguments = names.each_ref().map(String::as_str);
    let _server = served(python("tests/peers_grpc/server.py", &arguments), &ports);
    let stage = Stage::over(&ports);
    passes(python("tests/peers_grpc/client.py", &[&format!("127.0.0.1:{}", stage.plain)]));
    let secured = format!("127.0.0.1:{}", stage.https);
    passes(python("tests/peers_grpc/client.py", &[&secured, &stage.certificate]));
    passes(node("tests/peers_grpc/client.js", &[&format!("127.0.0.1:{}", stage.plain)]));
}

#[test]
#[ignore = "needs @grpc/grpc-js"]
fn a_server_of_another_making_is_called_as_well() {
    let port = free_port();
    let _server = served(node("tests/peers_grpc/server.js", &[&port.to_string()]), &[port]);
    let stage = Stage::over(&[port]);
    passes(node("tests/peers_grpc/client.js", &[&format!("127.0.0.1:{}", stage.plain)]));
}

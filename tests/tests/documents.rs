//! What the documents say can be done: configurations are read by the programs that they are for,
//! commands by the command's own parser. Nothing is started.
//!
//! Used by whoever changes a key or an option. Not here: whether what the documents say is true;
//! the commands beside their claims show that.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use lifeboat_tests::rig::private::built;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn document(name: &str) -> String {
    fs::read_to_string(root().join(name)).unwrap()
}

/// The ```toml blocks of a document.
fn blocks(text: &str) -> Vec<&str> {
    text.split("```toml\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect()
}

/// Everything written as a `lifeboat` command: lines of indented blocks, and what stands in
/// backquotes.
fn commands(text: &str) -> Vec<Vec<String>> {
    let indented = text.lines().filter_map(|line| line.strip_prefix("    "));
    let quoted = text.split('`').skip(1).step_by(2);
    let commands = indented.chain(quoted).map(|command| {
        let command = command.split("  #").next().unwrap();
        command.split_once("--exec ").map_or(command, |(_, command)| command)
    });
    let words = commands.map(|command| command.split_whitespace().map(str::to_owned).collect());
    words.filter(|words: &Vec<String>| words.len() > 1 && words[0] == "lifeboat").collect()
}

/// What a program said to a file of this text.
fn checked(program_name: &str, arguments: &[&str], text: &str) -> String {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), text).unwrap();
    let mut command = Command::new(built(program_name).unwrap());
    let output = command.args(arguments).arg("--config").arg(file.path()).output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    format!("{}: {}", output.status, String::from_utf8_lossy(&said))
}

/// Makes the certificates that the document makes, below `folder`; where the controller's are.
fn certificates(text: &str, folder: &Path) -> String {
    let made = commands(text).into_iter().find(|words| words[1..3] == ["certs", "init"]).unwrap();
    let mut command = Command::new(built("lifeboat").unwrap());
    assert!(command.current_dir(folder).args(&made[1..]).output().unwrap().status.success());
    folder.join(&made[3]).join("controller-c1").display().to_string()
}

#[test]
fn the_operators_configurations_are_read_by_their_programs() {
    let text = document("docs/operating.md");
    let [agent, vm, controller] = blocks(&text)[..] else { panic!("three configurations") };
    let folder = tempfile::tempdir().unwrap();
    let certificates = certificates(&text, folder.path());
    let controller = controller.replace("/etc/lifeboat/tls", &certificates);
    for (said, wanted) in [
        (checked("lifeboat-agent", &["--check"], agent), "no errors"),
        (checked("lifeboat", &["controller", "--check"], &controller), "exit status: 0"),
    ] {
        assert!(said.contains(wanted), "{said}");
    }
    let definition = lifeboat_agent::vms::files::parse(Path::new("web-1.toml"), vm).unwrap();
    assert_eq!(definition.disks.len(), 2);
}

#[test]
fn every_command_of_the_documents_is_one() {
    let mut tried = 0;
    for name in ["docs/operating.md", "README.md", "lab/README.md"] {
        for words in commands(&document(name)) {
            // Asked for help after all else, the parser reads what stands before, and nothing runs.
            let mut command = Command::new(built("lifeboat").unwrap());
            let output = command.args(&words[1..]).arg("--help").output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{name}: {}: {said}", words.join(" "));
            tried += 1;
        }
    }
    assert!(tried > 15, "only {tried} commands were found");
}

#[test]
fn an_option_that_does_not_exist_would_be_noticed() {
    let words = commands("    lifeboat plan h1 --no-such-option\n");
    let output =
        Command::new(built("lifeboat").unwrap()).args(&words[0][1..]).arg("--help").output();
    assert!(!output.unwrap().status.success());
}

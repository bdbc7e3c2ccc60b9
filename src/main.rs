//! The command-line tool. `handmill help` says what it does; the library does it.

mod cli;

fn main() -> std::process::ExitCode {
    cli::main()
}

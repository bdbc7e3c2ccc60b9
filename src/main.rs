//! The command-line tool. `handmill help` says what it does; the library does it.

mod cli;

fn main() -> std::process::ExitCode {
    handmill::device::cpu::work_on_this_thread();
    cli::main()
}

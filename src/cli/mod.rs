//! The command line: one file per command, each with its arguments, their help and checks, and the call they lead to.

mod band;
mod bench;
mod bench_tables;
mod convert;
mod data;
mod device;
mod eval;
mod generate;
mod info;
mod init;
mod outputs;
mod parity;
mod parse;
mod plot;
mod report;
mod resume;
mod sweep;
mod sweep_file;
mod tokenize;
mod train;
mod train_options;

use crate::error::{Error, Result};
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use std::ffi::OsString;

const AFTER_HELP: &str = "\
Examples:
  bandtrain                                   train a small model on the built-in toy corpus
  bandtrain -i train.bin -j val.bin -w 1024   train the experiment's model, FC1 banded at 43.8 %
  bandtrain generate -e model.safetensors -n 100
'bandtrain train --help' shows how to start, interrupt, resume, plot and export a long run;
'bandtrain COMMAND --help' explains a command.";

/// Trains, evaluates and samples GPT-2 language models whose MLP layers are banded.
///
/// Without a command it trains (as 'bandtrain train' does); without data it trains on a built-in toy corpus.
#[derive(Parser)]
#[command(name = "bandtrain", version = crate::VERSION, after_help = AFTER_HELP, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    train: train_options::TrainOptions,
}

#[derive(Subcommand)]
enum Command {
    Train(Box<train_options::TrainOptions>),
    Generate(generate::GenerateArgs),
    Eval(eval::EvalArgs),
    Init(init::InitArgs),
    Tokenize(tokenize::TokenizeArgs),
    Data(data::DataArgs),
    Convert(convert::ConvertArgs),
    Bench(bench::BenchArgs),
    Parity(parity::ParityArgs),
    Band(band::BandArgs),
    Info(info::InfoArgs),
    Plot(plot::PlotArgs),
    Sweep(sweep::SweepArgs),
    Report(report::ReportArgs),
}

/// Parses and runs a command line, the program's name first.
///
/// # Errors
/// Whatever the command met; a malformed command line is an [`Error::Usage`] of one sentence.
pub fn run(args: impl IntoIterator<Item = OsString>) -> Result<()> {
    let matches = match Cli::command().try_get_matches_from(args) {
        Ok(matches) => matches,
        Err(error) if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => {
            return crate::output::write(format_args!("{}", error.render()));
        }
        Err(error) => return Err(Error::Usage(sentence(&error))),
    };
    let cli = Cli::from_arg_matches(&matches).map_err(|error| Error::Usage(sentence(&error)))?;
    match cli.command {
        None => train::run(cli.train),
        Some(Command::Train(options)) => train::run(*options),
        Some(Command::Generate(args)) => generate::run(args),
        Some(Command::Eval(args)) => eval::run(args),
        Some(Command::Init(args)) => init::run(args),
        Some(Command::Tokenize(args)) => tokenize::run(args),
        Some(Command::Data(args)) => data::run(args),
        Some(Command::Convert(args)) => convert::run(args),
        Some(Command::Bench(args)) => bench::run(args),
        Some(Command::Parity(args)) => parity::run(args),
        Some(Command::Band(args)) => band::run(args),
        Some(Command::Info(args)) => info::run(args),
        Some(Command::Plot(args)) => plot::run(args),
        Some(Command::Sweep(args)) => sweep::run(args),
        Some(Command::Report(args)) => report::run(args),
    }
}

/// One sentence of clap's page on a mistake: what is wrong, the nearest right thing, and where help is.
fn sentence(error: &clap::Error) -> String {
    if let (ErrorKind::ArgumentConflict, Some(ContextValue::String(word))) =
        (error.kind(), error.get(ContextKind::InvalidSubcommand))
    {
        return stray(word);
    }
    let page = error.render().to_string();
    let paragraphs = page.split("\n\n").map(|paragraph| paragraph.split_whitespace().collect::<Vec<_>>().join(" "));
    let mut parts: Vec<String> = paragraphs
        .filter(|text| !text.is_empty() && !text.starts_with("Usage:") && !text.starts_with("For more information"))
        .map(|text| text.trim_start_matches("error: ").trim_start_matches("tip: ").to_string())
        .collect();
    parts.push("--help lists what there is".to_string());
    parts.join("; ")
}

/// The sentence for a word that stands behind training's options.
fn stray(word: &str) -> String {
    match Cli::command().find_subcommand(word) {
        Some(_) => format!("the command {word} must come before its options: bandtrain {word} ..."),
        None => format!(
            "'{word}' belongs to no option; put globs in quotes, as in -i 'data/*.bin', and --help lists what there is"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_has_an_example() {
        for command in Cli::command().get_subcommands().filter(|command| command.get_name() != "help") {
            let help = command.clone().render_long_help().to_string();
            assert!(help.contains("Example"), "{} shows no example", command.get_name());
        }
    }

    #[test]
    fn mistakes_become_one_sentence() {
        let error = run(["bandtrain", "--stepz", "3"].map(OsString::from)).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        let text = error.to_string();
        assert!(text.contains("'--stepz'") && text.contains("'--steps'") && !text.contains('\n'), "{text}");
    }
}

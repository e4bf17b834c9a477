//! A manual page out of a command's own help, so that the two cannot differ. Pure.

use std::io;

use clap::Command;
use clap_mangen::Man;

/// Writes the page of one command (built: its names are complete); `see` is its SEE ALSO.
///
/// The text after the help is taken apart: `Examples:` and `Exit status:` are sections of their own.
///
/// # Errors  never: it is written to memory
pub fn page(command: &Command, section: &str, see: &[String]) -> io::Result<Vec<u8>> {
    let name = command.get_display_name().unwrap_or(command.get_name());
    let source = concat!("Lunar ", env!("CARGO_PKG_VERSION"));
    let man = Man::new(command.clone())
        .title(name)
        .section(section)
        .source(source)
        .manual("Lunar");
    let mut out = Vec::new();
    man.render_title(&mut out)?;
    man.render_name_section(&mut out)?;
    man.render_synopsis_section(&mut out)?;
    man.render_description_section(&mut out)?;
    man.render_options_section(&mut out)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut out)?;
    }
    let after = command.get_after_help().map(ToString::to_string);
    for block in after.unwrap_or_default().split("\n\n") {
        out.extend(self::section(block).into_bytes());
    }
    if !see.is_empty() {
        out.extend(format!(".SH \"SEE ALSO\"\n{}\n", escape(&see.join(", "))).into_bytes());
    }
    Ok(out)
}

/// A block of the text after the help, as a section.
fn section(block: &str) -> String {
    if let Some(lines) = block.strip_prefix("Examples:\n") {
        let lines: String = lines
            .lines()
            .map(|line| escape(line.trim()) + "\n")
            .collect();
        return format!(".SH EXAMPLES\n.nf\n{lines}.fi\n");
    }
    match block.strip_prefix("Exit status: ") {
        Some(text) => format!(
            ".SH \"EXIT STATUS\"\n{}\n",
            escape(&text.replace('\n', " "))
        ),
        None if block.is_empty() => String::new(),
        None => format!(".SH NOTES\n{}\n", escape(block)),
    }
}

/// Keeps roff from reading a text as its own: backslashes, dashes, a point or quote that begins a line.
fn escape(text: &str) -> String {
    let text = text.replace('\\', "\\e").replace('-', "\\-");
    let guard = |line: &str| match line.chars().next() {
        Some('.' | '\'') => format!("\\&{line}"),
        _ => line.to_string(),
    };
    text.lines().map(guard).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_has_sections_and_escapes() {
        let mut command = Command::new("x").about("Does x").after_help(
            "Examples:\n  x --dry-run\n  .profile is no macro\n\nExit status: 0 ok,\n1 failed.",
        );
        command.build();
        let text = String::from_utf8(page(&command, "8", &["y(1)".into()]).unwrap()).unwrap();
        for part in [
            ".TH x 8",
            ".SH EXAMPLES\n.nf\nx \\-\\-dry\\-run\n\\&.profile is no macro\n.fi\n",
            ".SH \"EXIT STATUS\"\n0 ok, 1 failed.\n",
            ".SH \"SEE ALSO\"\ny(1)\n",
        ] {
            assert!(text.contains(part), "{part}\n{text}");
        }
    }
}

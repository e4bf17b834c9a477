//! Names of groups and LUs, and lists of arguments. Pure.

use lunar_api::{ApiError, ErrorKind};

/// Longest name: 63 bytes, as `[a-z0-9][a-z0-9._-]{0,62}`.
pub const NAME_MAX: usize = 63;
/// Most numbers that one range may name.
pub const RANGE_MAX: u32 = 4096;

/// Checks a new name of a group or LU.
///
/// # Errors  `Usage` if it is not `[a-z0-9][a-z0-9._-]{0,62}`, or reads as a number or a range
pub fn check_name(name: &str) -> Result<(), ApiError> {
    let shown: String = name.chars().take(80).collect();
    let bad = |why: &str| {
        Err(
            ApiError::new(ErrorKind::Usage, format!("`{shown}` cannot be a name"))
                .because(why)
                .hint("a name such as data1: a-z, 0-9, `.`, `_`, `-`, at most 63 bytes"),
        )
    };
    let plain = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
    if name.is_empty() {
        return bad("it is empty");
    }
    if name.len() > NAME_MAX {
        return bad("it is longer than 63 bytes");
    }
    if !plain(name.as_bytes()[0]) {
        return bad("it must begin with a-z or 0-9");
    }
    if !name.bytes().all(|c| plain(c) || b"._-".contains(&c)) {
        return bad("only a-z, 0-9, `.`, `_` and `-` are allowed");
    }
    if name.bytes().all(|c| c.is_ascii_digit()) {
        return bad("it is all digits and would read as a number");
    }
    let digits = |part: &str| !part.is_empty() && part.bytes().all(|c| c.is_ascii_digit());
    if name
        .split_once('-')
        .is_some_and(|(a, b)| digits(a) && digits(b))
    {
        return bad("it would read as a range of numbers");
    }
    Ok(())
}

/// Takes lists and ranges apart: `["1-3", "5,/dev/x"]` is `["1", "2", "3", "5", "/dev/x"]`.
///
/// A path with a comma in it is named by its disk's number.
///
/// # Errors  `Usage` for an empty word, a range that runs backwards or names more than [`RANGE_MAX`]
pub fn expand(args: &[String]) -> Result<Vec<String>, ApiError> {
    let mut out = Vec::new();
    for arg in args {
        for word in arg.split(',').map(str::trim) {
            if word.is_empty() {
                return Err(
                    ApiError::new(ErrorKind::Usage, format!("`{arg}` is no list"))
                        .because("a word of it is empty")
                        .hint("a list such as 1,3 or 1-4"),
                );
            }
            match range(word)? {
                Some((first, last)) => out.extend((first..=last).map(|n| n.to_string())),
                None => out.push(word.to_string()),
            }
        }
    }
    if out.is_empty() {
        return Err(ApiError::new(ErrorKind::Usage, "nothing is named").hint("a list such as 1,3"));
    }
    Ok(out)
}

fn range(word: &str) -> Result<Option<(u32, u32)>, ApiError> {
    let Some((first, last)) = word.split_once('-') else {
        return Ok(None);
    };
    let (Ok(first), Ok(last)) = (first.parse::<u32>(), last.parse::<u32>()) else {
        return Ok(None);
    };
    if first > last || last - first >= RANGE_MAX {
        let why = format!("a range runs upwards and names at most {RANGE_MAX}");
        let error = ApiError::new(ErrorKind::Usage, format!("`{word}` is no range"));
        return Err(error.because(why).hint("a range such as 1-4"));
    }
    Ok(Some((first, last)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn check_name_table() {
        for good in ["a", "vol", "0a", "a.b_c-d", "1-4-5", "1-", &"a".repeat(63)] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        let long = "a".repeat(64);
        for bad in [
            "", "12", "1-4", "A", "-a", ".a", "a/b", "a b", "ä", "a\0", &long, "..",
        ] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn expand_ranges_lists_and_paths() {
        let args: Vec<String> = ["1-3", "5,/dev/a-1", "/dev/a-b,c", "x-y"]
            .map(String::from)
            .into();
        let out = expand(&args).unwrap();
        assert_eq!(
            out,
            ["1", "2", "3", "5", "/dev/a-1", "/dev/a-b", "c", "x-y"]
        );
    }

    #[test]
    fn expand_refuses_what_is_no_list() {
        for bad in ["4-1", "1-4294967295", "", "1,", ",", "1,,2"] {
            assert!(expand(&[bad.to_string()]).is_err(), "{bad}");
        }
    }
}

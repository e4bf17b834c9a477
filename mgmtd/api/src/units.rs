//! Sizes as people write them. On the wire and in JSON every size is a plain number of bytes.

/// One KiB, in bytes.
pub const KIB: u64 = 1 << 10;
/// One MiB, in bytes.
pub const MIB: u64 = 1 << 20;
/// One GiB, in bytes.
pub const GIB: u64 = 1 << 30;
/// One TiB, in bytes.
pub const TIB: u64 = 1 << 40;
/// The address unit towards the kernel, in bytes.
pub const SECTOR: u64 = 512;

/// Why a text is not a size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a size: write a number and B, KiB, MiB, GiB, TiB (or K, M, G, T)")]
pub struct SizeError {
    text: String,
}

/// Reads `10GiB`, `64K`, `512B` or a plain number of bytes.
///
/// # Units   binary: K, KB and KiB are all 1024
/// # Errors  anything else, and what does not fit 64 bits
pub fn parse_size(text: &str) -> Result<u64, SizeError> {
    let bad = || SizeError {
        text: text.chars().take(64).collect(),
    };
    let text_ = text.trim();
    let split = text_
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text_.len());
    let (number, unit) = text_.split_at(split);
    let number: u64 = number.parse().map_err(|_| bad())?;
    let factor = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kb" | "kib" => KIB,
        "m" | "mb" | "mib" => MIB,
        "g" | "gb" | "gib" => GIB,
        "t" | "tb" | "tib" => TIB,
        _ => return Err(bad()),
    };
    number.checked_mul(factor).ok_or_else(bad)
}

/// Writes a size with the largest unit that leaves it readable: `64 KiB`, `1.5 GiB`.
pub fn format_size(bytes: u64) -> String {
    for (factor, unit) in [(TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")] {
        if bytes >= factor {
            if bytes.is_multiple_of(factor) {
                return format!("{} {unit}", bytes / factor);
            }
            let tenths = u128::from(bytes) * 10 / u128::from(factor);
            return format!("{}.{} {unit}", tenths / 10, tenths % 10);
        }
    }
    format!("{bytes} B")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_size_knows_the_units() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("64K", 65536),
            ("64 KiB", 65536),
            ("10GiB", 10 * GIB),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn parse_size_refuses_what_is_none() {
        for text in [
            "",
            "K",
            "-1",
            "1.5G",
            "1X",
            "99999999999T",
            "18446744073709551616",
        ] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn format_size_is_short() {
        for (bytes, text) in [(0, "0 B"), (65536, "64 KiB"), (3 * GIB / 2, "1.5 GiB")] {
            assert_eq!(format_size(bytes), text);
        }
    }
}

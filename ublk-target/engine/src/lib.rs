//! Placeholder head, written with the first module.

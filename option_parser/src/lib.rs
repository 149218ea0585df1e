//! The key=value text that every command-line option uses.

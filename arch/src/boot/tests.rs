//! Payloads good and bad.

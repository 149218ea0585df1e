//! Versioned saved state: schemas, sections and the envelope they travel in.

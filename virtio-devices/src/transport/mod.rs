//! What a virtio device sits behind: where its registers are, and how its notifications and interrupts travel.

#[cfg(any(test, feature = "mmio"))]
pub mod mmio;
pub mod pci;

/// An error and its causes in one line.
struct ErrorChain<'a>(&'a dyn std::error::Error);

impl std::fmt::Display for ErrorChain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        Ok(())
    }
}

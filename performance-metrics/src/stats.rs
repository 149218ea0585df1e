//! What many samples come to.

use serde::Serialize;

/// Samples in short.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// The least.
    pub least: f64,
    /// The middle one; between two, halfway.
    pub median: f64,
    /// The most.
    pub most: f64,
}

impl Summary {
    /// Of samples in any order; none of none.
    pub fn of(samples: &[f64]) -> Option<Self> {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (&least, &most) = (sorted.first()?, sorted.last()?);
        let half = sorted.len() / 2;
        let median = if sorted.len().is_multiple_of(2) {
            f64::midpoint(sorted[half - 1], sorted[half])
        } else {
            sorted[half]
        };
        Some(Self {
            least,
            median,
            most,
        })
    }

    /// From least to most, as a part of the median.
    pub fn spread(&self) -> f64 {
        if self.median == 0.0 {
            0.0
        } else {
            (self.most - self.least) / self.median
        }
    }
}

/// The ratios of two series, turn by turn. A turn that one of them missed counts for nothing.
pub fn ratios(of: &[Option<f64>], to: &[Option<f64>]) -> Option<Summary> {
    let ratios: Vec<f64> = of
        .iter()
        .zip(to)
        .filter_map(|(of, to)| Some((*of)? / (*to).filter(|to| *to != 0.0)?))
        .collect();
    Summary::of(&ratios)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_and_spread() {
        assert_eq!(Summary::of(&[]), None);
        let odd = Summary::of(&[3.0, 1.0, 2.0]).unwrap();
        assert_eq!((odd.least, odd.median, odd.most), (1.0, 2.0, 3.0));
        assert_eq!(odd.spread(), 1.0);
        assert_eq!(Summary::of(&[4.0, 1.0, 2.0, 3.0]).unwrap().median, 2.5);
    }

    #[test]
    fn ratios_go_by_turns() {
        // All turns agree, though the medians of both series are of different turns.
        let of = [Some(2.0), Some(20.0), None, Some(6.0), Some(1.0)];
        let to = [Some(1.0), Some(10.0), Some(5.0), Some(3.0), Some(0.0)];
        let ratio = ratios(&of, &to).unwrap();
        assert_eq!((ratio.least, ratio.median, ratio.most), (2.0, 2.0, 2.0));
        assert_eq!(ratios(&[None], &[Some(1.0)]), None);
    }
}

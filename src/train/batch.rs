//! Rows of a data set side by side, as one pass over the model takes them.
//!
//! Documents follow each other without padding: each token sees those of its own document up to itself, and positions
//! begin at 0 in every document. So what a document's loss and gradients are does not depend on what it is packed with.

use super::data::MASKED;

/// The target of a token that predicts nothing.
pub const NONE: u32 = u32::MAX;

/// The tokens of one pass.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// Tokens.
    pub ids: Vec<u32>,
    /// Where each stands in its document.
    pub positions: Vec<u32>,
    /// The rows that each sees: from its document's first up to itself.
    pub spans: Vec<[u32; 2]>,
    /// The token that each is to predict, or [`NONE`].
    pub targets: Vec<u32>,
}

impl Batch {
    /// Appends a document: its tokens, and for each token its label.
    pub fn push(&mut self, ids: &[u32], labels: &[i32]) {
        let begin = self.ids.len() as u32;
        self.ids.extend(ids);
        for i in 0..ids.len() as u32 {
            self.positions.push(i);
            self.spans.push([begin, begin + i + 1]);
            let label = labels.get(i as usize + 1).copied().unwrap_or(MASKED);
            self.targets.push(u32::try_from(label).unwrap_or(NONE));
        }
    }

    /// How many tokens are to predict something.
    pub fn predicted(&self) -> usize {
        self.targets.iter().filter(|&&target| target != NONE).count()
    }

    /// How many tokens.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// True when there is none.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_do_not_see_each_other() {
        let mut batch = Batch::default();
        batch.push(&[5, 6, 7], &[MASKED, MASKED, 7]);
        batch.push(&[8, 9], &[8, 9]);
        assert_eq!(batch.positions, [0, 1, 2, 0, 1]);
        assert_eq!(batch.spans, [[0, 1], [0, 2], [0, 3], [3, 4], [3, 5]]);
        assert_eq!(batch.targets, [NONE, 7, NONE, 9, NONE]);
        assert_eq!(batch.predicted(), 2);
    }
}

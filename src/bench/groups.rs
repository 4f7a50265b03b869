//! The kernels of a step, gathered into what a reader asks about.

use crate::backend::{OpTime, Part};
use serde::Serialize;

/// A group of a step's operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Group {
    /// FC1 and FC2, dense or banded, with GELU.
    MlpProducts,
    /// Queries, keys and values, and the projection behind the attention.
    AttentionProducts,
    /// Scores, softmax and values.
    Attention,
    /// LayerNorm with the residual additions.
    LayerNorm,
    /// Logits, cross-entropy and their gradients.
    HeadAndLoss,
    /// Gradient norm and AdamW.
    Optimizer,
    /// Embeddings, and whatever else there is.
    Other,
}

impl Group {
    /// All, in the order of a table.
    pub const ALL: [Group; 7] = [
        Group::MlpProducts,
        Group::AttentionProducts,
        Group::Attention,
        Group::LayerNorm,
        Group::HeadAndLoss,
        Group::Optimizer,
        Group::Other,
    ];

    /// Its name in a table.
    pub fn name(self) -> &'static str {
        match self {
            Group::MlpProducts => "MLP products",
            Group::AttentionProducts => "attention products",
            Group::Attention => "attention",
            Group::LayerNorm => "LayerNorm",
            Group::HeadAndLoss => "head + loss",
            Group::Optimizer => "optimizer",
            Group::Other => "other",
        }
    }

    /// The group of an operation that ran for a part of the model.
    fn of(op: &str, part: Part) -> Self {
        let begins = |starts: &[&str]| starts.iter().any(|start| op.starts_with(start));
        match part {
            _ if begins(&["band_"]) => Group::MlpProducts,
            Part::Mlp if begins(&["linear_"]) => Group::MlpProducts,
            Part::Attention if begins(&["linear_"]) => Group::AttentionProducts,
            _ if begins(&["attention_"]) => Group::Attention,
            _ if begins(&["layernorm_", "residual_layernorm_"]) => Group::LayerNorm,
            _ if begins(&["loss_", "head_"]) => Group::HeadAndLoss,
            _ if begins(&["adamw_", "grad_norm"]) => Group::Optimizer,
            _ => Group::Other,
        }
    }
}

/// What a group takes in a step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct GroupTime {
    /// Which.
    pub group: Group,
    /// All its kernels together.
    pub milliseconds: f64,
    /// Its share of all kernels' time.
    pub share: f64,
}

/// What each group takes, in the order of [`Group::ALL`].
pub(super) fn group_times(ops: &[OpTime]) -> Vec<GroupTime> {
    let all: f64 = ops.iter().map(|op| op.seconds).sum();
    let time = |group| {
        let seconds: f64 = ops.iter().filter(|op| Group::of(op.op, op.part) == group).map(|op| op.seconds).sum();
        GroupTime { group, milliseconds: 1e3 * seconds, share: if all > 0.0 { seconds / all } else { 0.0 } }
    };
    Group::ALL.into_iter().map(time).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_operation_belongs_to_the_part_it_ran_for() {
        assert_eq!(Group::of("linear_forward", Part::Mlp), Group::MlpProducts);
        assert_eq!(Group::of("linear_backward_weight", Part::Attention), Group::AttentionProducts);
        assert_eq!(Group::of("linear_forward", Part::Model), Group::Other);
        assert_eq!(Group::of("band_outer", Part::Model), Group::MlpProducts);
        let model = |op| Group::of(op, Part::Model);
        assert_eq!(
            (model("attention_backward"), model("residual_layernorm_forward")),
            (Group::Attention, Group::LayerNorm)
        );
        assert_eq!((model("loss_sum"), model("head_logits")), (Group::HeadAndLoss, Group::HeadAndLoss));
        assert_eq!((model("grad_norm"), model("embed_backward")), (Group::Optimizer, Group::Other));
    }

    #[test]
    fn groups_share_the_whole_time() {
        let op = |op, part, seconds| OpTime { op, part, kernel: String::new(), count: 1, seconds };
        let ops = [
            op("linear_forward", Part::Mlp, 0.002),
            op("band_expand", Part::Mlp, 0.001),
            op("linear_forward", Part::Attention, 0.001),
            op("adamw_step", Part::Model, 0.004),
        ];
        let times = group_times(&ops);
        assert_eq!(times.iter().map(|time| time.group).collect::<Vec<_>>(), Group::ALL);
        assert!((times[0].milliseconds - 3.0).abs() < 1e-9 && (times[0].share - 0.375).abs() < 1e-9);
        assert!((times.iter().map(|time| time.share).sum::<f64>() - 1.0).abs() < 1e-9);
        assert!(group_times(&[]).iter().all(|time| time.share == 0.0));
    }
}

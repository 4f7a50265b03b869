//! Which ending of a question a model expects: HellaSwag as llm.c scores it.

use crate::backend::Backend;
use crate::data::hellaswag::{ENDINGS, Question};
use crate::error::{Error, Result};
use crate::model::{Activations, Model};

/// What a model got right.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Score {
    /// Questions asked.
    pub questions: usize,
    /// Those whose right ending has the lowest mean loss: llm.c's accuracy, elsewhere called normalised.
    pub correct: usize,
    /// Those whose right ending has the lowest sum of losses: the likeliest one, which favours short endings.
    pub correct_by_sum: usize,
}

/// Asks `questions`, which fit the model, `at_once` of them in one batch. `progress` is told the questions done and may stop the
/// work.
///
/// Each ending is a row of its own behind the context; only the losses of its own tokens count. Rows are padded to the
/// longest of all: attention is causal, so what follows an ending changes nothing.
///
/// # Errors
/// A model whose losses are not finite; the device fails; whatever `progress` returns.
pub fn score<B: Backend>(
    model: &mut Model<B>,
    questions: &[Question],
    at_once: usize,
    mut progress: impl FnMut(usize) -> Result<()>,
) -> Result<Score> {
    let tokens = questions.iter().map(Question::positions).max().unwrap_or(1);
    let mut acts = Activations::new(model, ENDINGS * at_once, tokens, false)?;
    let mut score = Score::default();
    for batch in questions.chunks(at_once) {
        let (inputs, targets) = rows(batch, acts.dims().rows(), tokens);
        model.upload_batch(&mut acts, &inputs, &targets)?;
        let losses = model.losses(&mut acts)?;
        for (question, losses) in batch.iter().zip(losses.chunks(ENDINGS * tokens)) {
            let sums = ending_losses(question, losses, tokens)?;
            let means = std::array::from_fn(|ending| sums[ending] / question.endings[ending].len() as f64);
            score.correct += usize::from(lowest(means) == question.label);
            score.correct_by_sum += usize::from(lowest(sums) == question.label);
        }
        score.questions += batch.len();
        progress(score.questions)?;
    }
    Ok(score)
}

/// The inputs and targets of a batch: four rows of `tokens` for each question, zeros where there is nothing.
fn rows(questions: &[Question], rows: usize, tokens: usize) -> (Vec<u32>, Vec<u32>) {
    let (mut inputs, mut targets) = (vec![0; rows], vec![0; rows]);
    let endings = questions.iter().flat_map(|question| question.endings.iter().map(move |ending| (question, ending)));
    let places = inputs.chunks_mut(tokens).zip(targets.chunks_mut(tokens));
    for ((question, ending), (inputs, targets)) in endings.zip(places) {
        let text = || question.context.iter().chain(ending).map(|&token| u32::from(token));
        inputs.iter_mut().zip(text()).for_each(|(input, token)| *input = token);
        targets.iter_mut().zip(text().skip(1)).for_each(|(target, token)| *target = token);
    }
    (inputs, targets)
}

/// The sum of each ending's losses: of the rows from the context's last token on, which predict its tokens.
fn ending_losses(question: &Question, losses: &[f32], tokens: usize) -> Result<[f64; ENDINGS]> {
    let first = question.context.len() - 1;
    let sum = |ending: usize| -> f64 {
        losses[ending * tokens + first..][..question.endings[ending].len()].iter().map(|&loss| f64::from(loss)).sum()
    };
    let sums = std::array::from_fn(sum);
    match sums.iter().find(|sum| !sum.is_finite()) {
        None => Ok(sums),
        Some(sum) => {
            Err(Error::usage(format!("the model's loss is {sum}: it has diverged; go back to an earlier checkpoint")))
        }
    }
}

/// The first of the lowest.
fn lowest(losses: [f64; ENDINGS]) -> usize {
    (1..ENDINGS).fold(0, |best, ending| if losses[ending] < losses[best] { ending } else { best })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Cpu;
    use crate::config::preset;
    use crate::weights::Weights;

    fn questions() -> Vec<Question> {
        let run =
            |seed: usize, len: usize| (0..len).map(|k| ((seed * 91 + k * k * 13) % 257) as u16).collect::<Vec<_>>();
        let question = |k: usize| Question {
            label: k % ENDINGS,
            context: run(k, 1 + k % 5),
            endings: std::array::from_fn(|ending| run(7 * k + ending, 1 + (k + 3 * ending) % 6)),
        };
        (0..13).map(question).collect()
    }

    /// The mean and the sum of an ending's losses from the logits of that one row, in double precision.
    fn by_logits(model: &mut Model<Cpu>, question: &Question, ending: usize) -> (f64, f64) {
        let ending = &question.endings[ending];
        let text: Vec<u32> = question.context.iter().chain(ending).map(|&token| token.into()).collect();
        let mut acts = Activations::new(model, 1, text.len(), false).unwrap();
        let logits = model.logits(&mut acts, &text).unwrap();
        let loss = |place: usize| {
            let row: Vec<f64> = logits[(place - 1) * 257..place * 257].iter().map(|&logit| logit.into()).collect();
            row.iter().map(|logit| logit.exp()).sum::<f64>().ln() - row[text[place] as usize]
        };
        let sum: f64 = (question.context.len()..text.len()).map(loss).sum();
        (sum / ending.len() as f64, sum)
    }

    #[test]
    fn a_score_is_that_of_each_ending_by_itself() {
        let mut weights = Weights::init(&preset("toy").unwrap().model, 3).unwrap();
        weights.values_mut().iter_mut().for_each(|weight| *weight *= 4.0);
        let mut model = Model::new(Cpu::new(), &weights).unwrap();
        let questions = questions();
        let mut expected = Score { questions: questions.len(), ..Score::default() };
        for question in &questions {
            let losses: [_; ENDINGS] = std::array::from_fn(|ending| by_logits(&mut model, question, ending));
            expected.correct += usize::from(lowest(losses.map(|(mean, _)| mean)) == question.label);
            expected.correct_by_sum += usize::from(lowest(losses.map(|(_, sum)| sum)) == question.label);
        }
        for at_once in [1, 4, 13, 20] {
            let mut last = 0;
            let progress = |done| {
                last = done;
                Ok(())
            };
            assert_eq!(score(&mut model, &questions, at_once, progress).unwrap(), expected);
            assert_eq!(last, 13);
        }
        assert!(
            expected.correct > 0 && expected.correct < 13 && expected.correct != expected.correct_by_sum,
            "{expected:?}"
        );
    }

    #[test]
    fn of_equal_endings_the_first_counts() {
        assert_eq!(lowest([1.0, 1.0, 1.0, 1.0]), 0);
        assert_eq!(lowest([2.0, 1.0, 3.0, 1.0]), 1);
    }
}

//! What a sweep varies: patterns of the MLP's connections, how many are kept, in which layers, learning rates and seeds.

use crate::band::Band;
use crate::bandwidths::{Bandwidths, Connections};
use crate::blocks::{BlockPattern, Density, Start};
use crate::config::GptConfig;
use crate::error::{Error, Result};
use crate::shapes::{Param, ParamTable};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fmt;

/// No grid is larger: an honest one is far below, a slip of the keyboard far above.
const MOST_RUNS: usize = 10_000;
/// Characters of a bandwidth in a run's name.
const MOST_IN_NAME: usize = 60;
/// Narrower MLPs have a multiple of this width where the model's channels have, for the sake of tensor cores.
const WIDTH_ALIGN: usize = 8;

/// Which connections an MLP keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pattern {
    /// All of them.
    Dense,
    /// A diagonal band ([`Band`]).
    Band,
    /// Random blocks of a density ([`BlockPattern::Random`]), by the run's seed.
    Random,
    /// Strided blocks of a density ([`BlockPattern::Strided`]).
    Strided,
    /// Blocks of a density that the training exchanges ([`BlockPattern::Learned`]), from random ones by the run's seed.
    Learned,
    /// The same from a diagonal band of blocks.
    LearnedBand,
    /// All of a narrower MLP's, whose weights are as many as those of the band of this amount in these layers.
    SmallDense,
}

impl Pattern {
    /// Its name in files.
    pub fn name(self) -> &'static str {
        match self {
            Pattern::Dense => "dense",
            Pattern::Band => "band",
            Pattern::Random => "random",
            Pattern::Strided => "strided",
            Pattern::Learned => "learned",
            Pattern::LearnedBand => "learned-band",
            Pattern::SmallDense => "small-dense",
        }
    }

    /// Whether it is cut to a bandwidth or a density; all but dense ones are.
    fn is_cut(self) -> bool {
        self != Pattern::Dense
    }

    /// Whether it keeps blocks, which have no bandwidth.
    fn has_blocks(self) -> bool {
        matches!(self, Pattern::Random | Pattern::Strided) || self.is_learned()
    }

    /// Whether the training exchanges its blocks.
    pub fn is_learned(self) -> bool {
        matches!(self, Pattern::Learned | Pattern::LearnedBand)
    }
}

/// The layers of an MLP that a pattern cuts; the other one stays dense.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Layers {
    /// FC1, C -> W.
    Fc1,
    /// FC2, W -> C.
    Fc2,
    /// Both.
    Both,
}

impl Layers {
    /// Its name in files.
    pub fn name(self) -> &'static str {
        match self {
            Layers::Fc1 => "fc1",
            Layers::Fc2 => "fc2",
            Layers::Both => "both",
        }
    }

    /// A value for FC1 and one for FC2: `cut` where this cuts, else `dense`.
    fn of<T: Clone>(self, cut: T, dense: T) -> (T, T) {
        match self {
            Layers::Fc1 => (cut, dense),
            Layers::Fc2 => (dense, cut),
            Layers::Both => (cut.clone(), cut),
        }
    }
}

/// How much of a layer is kept.
#[allow(clippy::large_enum_variant)] // a grid has few of them
#[derive(Debug, Clone, PartialEq)]
pub enum Amount {
    /// Bandwidths in wide elements.
    Bandwidth(Bandwidths),
    /// A share of the connections, above 0 and below 1: the bandwidth, or the blocks, that come nearest to it.
    Density(f64),
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Amount::Bandwidth(bandwidths) => {
                let text = bandwidths.to_string();
                // A folder's name has an end; a long list goes by its checksum.
                match text.len() > MOST_IN_NAME {
                    true => write!(f, "list-{:08x}", crc32c::crc32c(text.as_bytes())),
                    false => f.write_str(&text),
                }
            }
            Amount::Density(density) => write!(f, "density{density}"),
        }
    }
}

/// One grid as a sweep's file tells it: the product of its lists.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Grid {
    /// Patterns; at least one.
    pub pattern: Vec<Pattern>,
    /// Bandwidths of the patterns that are cut: numbers, ramps or lists over the depth. Either these or densities.
    pub bandwidth: Vec<Bandwidths>,
    /// Densities of the patterns that are cut.
    pub density: Vec<f64>,
    /// The layers that are cut.
    pub layers: Vec<Layers>,
    /// Steps between exchanges of learned blocks; none takes the training's own, here and below.
    pub learn_every: Vec<u64>,
    /// Shares of learned blocks exchanged at first.
    pub learn_fraction: Vec<f64>,
    /// Steps from which learned blocks stay.
    pub learn_until: Vec<u64>,
    /// Learning rates; none takes the training's own.
    pub learning_rate: Vec<f64>,
    /// Seeds; none takes the training's default.
    pub seed: Vec<u64>,
}

/// One point of a grid: what a run varies.
#[derive(Debug, Clone, PartialEq)]
pub struct Point {
    /// Which connections are kept.
    pub pattern: Pattern,
    /// How many, in which layers; `None` when dense.
    pub cut: Option<(Layers, Amount)>,
    /// How blocks are learned.
    pub learn: Learn,
    /// The learning rate, where the grid gives one.
    pub learning_rate: Option<f64>,
    /// The seed of weights, batch order and samples.
    pub seed: u64,
}

/// How blocks are learned, where the grid says so ([`crate::learn::LearnRule`]).
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Learn {
    /// Steps between exchanges.
    pub every: Option<u64>,
    /// The share exchanged at first.
    pub fraction: Option<f64>,
    /// The step from which blocks stay.
    pub until: Option<u64>,
}

impl fmt::Display for Learn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Learn { every, fraction, until } = self;
        every.map_or(Ok(()), |every| write!(f, "-every{every}"))?;
        fraction.map_or(Ok(()), |fraction| write!(f, "-fraction{fraction}"))?;
        until.map_or(Ok(()), |until| write!(f, "-until{until}"))
    }
}

/// The seed of a training that names none.
pub const DEFAULT_SEED: u64 = 42;

impl Grid {
    /// The grid's points, in the order of its lists; the seeds vary fastest.
    ///
    /// # Errors
    /// A sentence on the first list that is missing, empty where it must not be, or holds what makes no sense.
    pub fn points(&self) -> std::result::Result<Vec<Point>, String> {
        self.check()?;
        let amounts: Vec<Amount> = match self.bandwidth.is_empty() {
            false => self.bandwidth.iter().map(|&bandwidth| Amount::Bandwidth(bandwidth)).collect(),
            true => self.density.iter().map(|&density| Amount::Density(density)).collect(),
        };
        let rates = each_or_none(&self.learning_rate);
        let seeds = if self.seed.is_empty() { &[DEFAULT_SEED] } else { self.seed.as_slice() };
        let mut points = Vec::new();
        for &pattern in &self.pattern {
            let cuts: Vec<_> = match pattern.is_cut() {
                false => vec![None],
                true => {
                    let product = |&layers: &Layers| amounts.iter().map(move |amount| Some((layers, amount.clone())));
                    self.layers.iter().flat_map(product).collect()
                }
            };
            let learns = if pattern.is_learned() { self.learns() } else { vec![Learn::default()] };
            let counts = [cuts.len(), learns.len(), rates.len(), seeds.len()];
            if counts.into_iter().fold(1, usize::saturating_mul).saturating_add(points.len()) > MOST_RUNS {
                return Err(format!("it has more than {MOST_RUNS} runs; shorten its lists"));
            }
            let variants = cuts.iter().flat_map(|cut| learns.iter().map(move |&learn| (cut, learn)));
            for ((cut, learn), learning_rate) in variants.flat_map(|one| rates.iter().map(move |&rate| (one, rate))) {
                let point = |&seed: &u64| Point { pattern, cut: cut.clone(), learn, learning_rate, seed };
                points.extend(seeds.iter().map(point));
            }
        }
        Ok(points)
    }

    /// Every way of learning that the lists hold.
    fn learns(&self) -> Vec<Learn> {
        let mut learns = Vec::new();
        for &every in &each_or_none(&self.learn_every) {
            for &fraction in &each_or_none(&self.learn_fraction) {
                let learn = |until| Learn { every, fraction, until };
                learns.extend(each_or_none(&self.learn_until).into_iter().map(learn));
            }
        }
        learns
    }

    fn check(&self) -> std::result::Result<(), String> {
        let cut = self.pattern.iter().any(|pattern| pattern.is_cut());
        let amounts = [("bandwidth", self.bandwidth.len()), ("density", self.density.len())];
        let names = |kind: &str| format!("give {kind} = [...]");
        if self.pattern.is_empty() {
            return Err("it lacks its patterns; give pattern = [\"dense\", \"band\"] or one of them".to_string());
        }
        match amounts {
            [(_, 0), (_, 0)] if cut => return Err(format!("it cuts layers, but not to what; {}", names("bandwidth"))),
            [(_, 1..), (_, 1..)] => return Err("it gives bandwidth and density; leave one of them out".to_string()),
            _ => {}
        }
        if cut && self.layers.is_empty() {
            return Err(
                "it cuts layers, but not which; give layers = [\"fc1\", \"fc2\", \"both\"] or one of them".into()
            );
        }
        if !cut && (amounts.iter().any(|(_, len)| *len > 0) || !self.layers.is_empty()) {
            return Err("it cuts nothing, so that bandwidth, density and layers mean nothing; leave them out".into());
        }
        let blocks = self.pattern.iter().find(|pattern| pattern.has_blocks());
        if let Some(pattern) = blocks.filter(|_| !self.bandwidth.is_empty()) {
            return Err(format!(
                "the pattern {} has no bandwidth; give density = [0.438] instead, for all patterns of the grid",
                pattern.name()
            ));
        }
        if self.bandwidth.iter().any(|bandwidths| bandwidths.has_patterns()) {
            return Err("bandwidth holds a pattern; list it under pattern, with density = [...], instead".into());
        }
        if self.bandwidth.iter().any(|bandwidths| bandwidths.is_dense()) {
            return Err("bandwidth holds 0, which means dense; list \"dense\" under pattern instead".into());
        }
        if let Some(density) = self.density.iter().find(|density| !(**density > 0.0 && **density < 1.0)) {
            return Err(format!("density holds {density}, but it must lie between 0 and 1"));
        }
        self.check_learning()?;
        if let Some(rate) = self.learning_rate.iter().find(|rate| !(rate.is_finite() && **rate > 0.0)) {
            return Err(format!("learning-rate holds {rate}, but it must be above 0"));
        }
        if let Some(seed) = self.seed.iter().find(|seed| **seed > u64::from(u32::MAX)) {
            return Err(format!("seed holds {seed}, but it must be at most {}", u32::MAX));
        }
        self.check_repetitions()
    }

    fn check_learning(&self) -> std::result::Result<(), String> {
        let lists = [
            ("learn-every", self.learn_every.len()),
            ("learn-fraction", self.learn_fraction.len()),
            ("learn-until", self.learn_until.len()),
        ];
        let learns = self.pattern.iter().any(|pattern| pattern.is_learned());
        if let Some((key, _)) = lists.into_iter().find(|(_, len)| *len > 0 && !learns) {
            return Err(format!(
                "{key} is for the patterns learned and learned-band; list one of them, or leave it out"
            ));
        }
        if let Some(fraction) = self.learn_fraction.iter().find(|fraction| !(0.0..1.0).contains(*fraction)) {
            return Err(format!("learn-fraction holds {fraction}, but it must be at least 0 and below 1"));
        }
        Ok(())
    }

    fn check_repetitions(&self) -> std::result::Result<(), String> {
        let texts = |values: &[f64]| values.iter().map(f64::to_string).collect();
        let steps = |values: &[u64]| values.iter().map(u64::to_string).collect();
        let lists: [(&str, Vec<String>); 9] = [
            ("pattern", self.pattern.iter().map(|pattern| pattern.name().to_string()).collect()),
            ("bandwidth", self.bandwidth.iter().map(Bandwidths::to_string).collect()),
            ("density", texts(&self.density)),
            ("layers", self.layers.iter().map(|layers| layers.name().to_string()).collect()),
            ("learn-every", steps(&self.learn_every)),
            ("learn-fraction", texts(&self.learn_fraction)),
            ("learn-until", steps(&self.learn_until)),
            ("learning-rate", texts(&self.learning_rate)),
            ("seed", steps(&self.seed)),
        ];
        for (key, values) in lists {
            let mut seen = BTreeSet::new();
            if let Some(twice) = values.iter().find(|value| !seen.insert(value.as_str())) {
                return Err(format!("{key} holds {twice} twice"));
            }
        }
        Ok(())
    }
}

impl Point {
    /// What it has in common with the runs of other seeds: `band-fc1-1024`, with `-lr1e-3` where the grid varies that.
    pub fn group(&self) -> String {
        let mut name = self.pattern.name().to_string();
        if let Some((layers, amount)) = &self.cut {
            name = format!("{name}-{}-{amount}{}", layers.name(), self.learn);
        }
        match self.learning_rate {
            Some(rate) => format!("{name}-lr{rate:e}"),
            None => name,
        }
    }

    /// The run's name, its folder's too: the group's with `-s42`.
    pub fn name(&self) -> String {
        format!("{}-s{}", self.group(), self.seed)
    }

    /// The blocks of a density: random ones by the run's seed, so that seeds tell how much depends on the lot.
    fn blocks(&self, share: f64) -> Result<Connections> {
        let density = Density::new(share).ok_or_else(|| {
            Error::usage(format!("a density must lie between 0 and 1 in millionths, but it is {share}"))
        })?;
        let pattern = match self.pattern {
            Pattern::Random => BlockPattern::Random { density, seed: self.seed as u32 },
            Pattern::Learned => BlockPattern::Learned { density, start: Start::Random(self.seed as u32) },
            Pattern::LearnedBand => BlockPattern::Learned { density, start: Start::Band },
            _ => BlockPattern::Strided { density },
        };
        Ok(Connections::Pattern(pattern))
    }

    /// The model's sizes, from those of the dense model.
    ///
    /// # Errors
    /// [`Error::Usage`] when the pattern does not fit the sizes.
    pub fn config(&self, dense: &GptConfig) -> Result<GptConfig> {
        let dense = GptConfig { fc1_bandwidth: Bandwidths::DENSE, fc2_bandwidth: Bandwidths::DENSE, ..*dense };
        let Some((layers, amount)) = &self.cut else { return Ok(dense) };
        let (narrow, wide) = (dense.channels, dense.mlp_width());
        let bandwidths = match *amount {
            Amount::Bandwidth(bandwidths) => bandwidths,
            Amount::Density(density) if self.pattern.has_blocks() => self.blocks(density)?.into(),
            Amount::Density(density) => Band::bandwidth_of_density(narrow, wide, density)?.into(),
        };
        let (fc1_bandwidth, fc2_bandwidth) = layers.of(bandwidths, Bandwidths::DENSE);
        let banded = GptConfig { fc1_bandwidth, fc2_bandwidth, ..dense };
        let (kept, all) = (mlp_weights(&banded)?, mlp_weights(&dense)?);
        if kept == all {
            let advice = match self.pattern.has_blocks() {
                true => "a smaller density".to_string(),
                false => format!("one below {}", 2 * wide),
            };
            return Err(Error::usage(format!(
                "{} cuts nothing of a layer of {narrow} x {wide}; choose {advice} or the pattern dense",
                bandwidths.title()
            )));
        }
        match self.pattern {
            Pattern::Dense => Ok(dense),
            Pattern::SmallDense => Ok(dense.with_mlp_width(width_of(&dense, kept))),
            Pattern::Band | Pattern::Random | Pattern::Strided | Pattern::Learned | Pattern::LearnedBand => Ok(banded),
        }
    }
}

/// Each value of a list, or nothing where it is empty.
fn each_or_none<T: Copy>(values: &[T]) -> Vec<Option<T>> {
    match values {
        [] => vec![None],
        values => values.iter().copied().map(Some).collect(),
    }
}

/// Weights of FC1 and FC2 in all layers.
fn mlp_weights(config: &GptConfig) -> Result<usize> {
    let table = ParamTable::new(config)?;
    Ok(table.weights(config, Param::Fcw) + table.weights(config, Param::Fcprojw))
}

/// The width of the dense MLPs whose weights come nearest to `kept` in all layers.
fn width_of(dense: &GptConfig, kept: usize) -> usize {
    let of_width = 2 * dense.channels * dense.num_layers;
    let step = if dense.channels.is_multiple_of(WIDTH_ALIGN) { WIDTH_ALIGN } else { 1 };
    let steps = (kept + of_width * step / 2) / (of_width * step);
    (steps * step).max(step)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::preset;

    fn points(text: &str) -> Vec<Point> {
        toml::from_str::<Grid>(text).unwrap().points().unwrap()
    }

    #[test]
    fn a_grid_is_the_product_of_its_lists() {
        let text = "pattern = ['dense', 'band', 'small-dense']\nbandwidth = [1024, '1024..256']\nlayers = ['fc1', 'both']\n\
                    seed = [1, 2]\nlearning-rate = [3e-4]";
        let names: Vec<String> = points(text).iter().map(Point::name).collect();
        assert_eq!(names.len(), 2 * (1 + 4 + 4));
        assert_eq!([names[0].as_str(), &names[1]], ["dense-lr3e-4-s1", "dense-lr3e-4-s2"]);
        assert_eq!(names[5], "band-fc1-1024..256-lr3e-4-s2");
        assert_eq!(names[17], "small-dense-both-1024..256-lr3e-4-s2");
        let text = format!("pattern = ['band']\nlayers = ['fc2']\nbandwidth = ['{}']", vec!["100"; 64].join(","));
        assert_eq!(points(&text)[0].name().len(), "band-fc2-list-01234567-s42".len());
    }

    #[test]
    fn a_small_dense_mlp_has_as_many_weights_as_the_band() {
        let model = preset("tinystories-51m").unwrap().model;
        let text = "pattern = ['band', 'small-dense']\nbandwidth = [1024, 512, 256, '1024..256']\nlayers = ['fc1', 'fc2', 'both']";
        let points = points(text);
        let (bands, small) = points.split_at(points.len() / 2);
        for (band, small) in bands.iter().zip(small) {
            assert_eq!(band.cut, small.cut);
            let [band, small] = [band, small].map(|point| point.config(&model).unwrap());
            let [kept, weights] = [&band, &small].map(|config| mlp_weights(config).unwrap() as f64);
            assert!((weights / kept - 1.0).abs() < 0.01, "{weights} {kept}");
            assert_eq!(small.mlp_width() % 8, 0);
        }
        assert_eq!(small[0].config(&model).unwrap().mlp_width, Some(1472));
    }

    #[test]
    fn patterns_of_blocks_go_by_density_and_by_the_runs_seed() {
        let model = preset("tinystories-51m").unwrap().model;
        let points = points("pattern = ['random', 'strided']\ndensity = [0.4379]\nlayers = ['fc2']\nseed = [1, 2]");
        let names: Vec<String> = points.iter().map(Point::name).collect();
        assert_eq!(names[1], "random-fc2-density0.4379-s2");
        let fc2 = |point: &Point| point.config(&model).unwrap().fc2_bandwidth.to_string();
        let expected = ["random:0.4379:1", "random:0.4379:2", "strided:0.4379", "strided:0.4379"];
        assert_eq!(points.iter().map(fc2).collect::<Vec<_>>(), expected);
        for (text, words) in [
            (
                "pattern = ['random']\nbandwidth = [64]\nlayers = ['fc1']",
                "the pattern random has no bandwidth; give density",
            ),
            ("pattern = ['band']\nbandwidth = ['8,random:0.5']\nlayers = ['fc1']", "list it under pattern"),
        ] {
            let what = toml::from_str::<Grid>(text).unwrap().points().unwrap_err();
            assert!(what.contains(words), "{what}");
        }
    }

    #[test]
    fn learned_blocks_have_axes_of_their_own() {
        let model = preset("tinystories-51m").unwrap().model;
        let text = "pattern = ['band', 'learned', 'learned-band']\ndensity = [0.5]\nlayers = ['fc1']\nseed = [7]\n\
                    learn-every = [50, 100]\nlearn-fraction = [0.2]";
        let points = points(text);
        let names: Vec<String> = points.iter().map(Point::name).collect();
        let expected = [
            "band-fc1-density0.5-s7",
            "learned-fc1-density0.5-every50-fraction0.2-s7",
            "learned-fc1-density0.5-every100-fraction0.2-s7",
        ];
        assert_eq!((names.len(), &names[..3]), (5, expected.map(String::from).as_slice()));
        assert_eq!(points[1].learn, Learn { every: Some(50), fraction: Some(0.2), until: None });
        let fc1 = |point: &Point| point.config(&model).unwrap().fc1_bandwidth.to_string();
        assert_eq!([fc1(&points[1]), fc1(&points[4])], ["learned:0.5:7", "learned:0.5:band"]);
        for (old, new, words) in [
            ("'learned', 'learned-band'", "'random'", "learn-every is for the patterns learned and learned-band"),
            ("0.2", "1.0", "learn-fraction holds 1, but it must be at least 0 and below 1"),
            ("[50, 100]", "[50, 50]", "learn-every holds 50 twice"),
        ] {
            let what = toml::from_str::<Grid>(&text.replace(old, new)).unwrap().points().unwrap_err();
            assert!(what.contains(words), "{what}");
        }
    }

    #[test]
    fn a_density_is_kept_as_nearly_as_bandwidths_allow() {
        let model = preset("tinystories-51m").unwrap().model;
        let config = points("pattern = ['band']\ndensity = [0.4379]\nlayers = ['fc1']")[0].config(&model).unwrap();
        assert_eq!((config.fc1_bandwidth, config.fc2_bandwidth), (1024.into(), 0.into()));
    }
}

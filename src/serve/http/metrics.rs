//! `GET /metrics`: what a server did, in Prometheus' text. Names and meanings are vLLM's where it has them, so that a board
//! made for it shows this server too; the rest begins with `handmill_`.
//!
//! Labels are names that the server was started with, or that an administrator gave: no text of a request becomes one.

use std::sync::{Mutex, PoisonError};

use prometheus::{
    CounterVec, Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    Opts, Registry, TextEncoder,
};

use crate::serve::canary::{Canary, Rollback};
use crate::serve::job::Stats;

/// Seconds to the first token, as vLLM cuts them.
const FIRST: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];
/// Seconds a token.
const TOKEN: [f64; 19] =
    [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0];
/// Seconds a request.
const REQUEST: [f64; 21] = [
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
];
/// Tokens.
const TOKENS: [f64; 12] = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0];
/// Cosines.
const SCORES: [f64; 12] = [0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0];

/// All that is counted.
pub struct Metrics {
    registry: Registry,
    running: IntGauge,
    waiting: IntGauge,
    cache: Gauge,
    cache_tokens: IntGauge,
    prompt_tokens: IntCounter,
    generation_tokens: IntCounter,
    success: IntCounterVec,
    first: Histogram,
    between: Histogram,
    per_token: Histogram,
    whole: Histogram,
    queue: Histogram,
    prefill: Histogram,
    decode: Histogram,
    request_prompt: Histogram,
    request_generation: Histogram,
    passes: IntCounter,
    requests: IntCounterVec,
    scores: HistogramVec,
    /// Questions that no passage answers, by index.
    pub refusals: IntCounterVec,
    arm_requests: IntCounterVec,
    arm_seconds: CounterVec,
    arm_feedback: IntCounterVec,
    arm_weight: GaugeVec,
    rollbacks: IntCounterVec,
    /// How far the questions are from the reference, by statistic.
    pub drift: GaugeVec,
    captured: IntCounterVec,
    /// What the engine counts is brought here by one reader at a time.
    reading: Mutex<()>,
}

/// What a finished answer took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Took {
    /// From the request to its first token.
    pub first: Option<f64>,
    /// From the request to its end.
    pub whole: f64,
    /// It waited.
    pub queue: f64,
    /// Its prompt was read.
    pub prefill: f64,
    /// From the first token to the last.
    pub decode: f64,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// New tokens.
    pub new_tokens: usize,
}

impl Metrics {
    /// Counts that stand at zero, of a model.
    pub fn new(model: &str) -> Metrics {
        let registry = Registry::new();
        let opts = |name: &str, help: &str| Opts::new(name, help);
        let mine = |name: &str, help: &str| Opts::new(name, help).const_label("model_name", model);
        let histogram = |name: &str, help: &str, buckets: &[f64]| {
            let opts = HistogramOpts::new(name, help).const_label("model_name", model).buckets(buckets.to_vec());
            add(&registry, Histogram::with_opts(opts))
        };
        let counters = |opts: Opts, labels: &[&str]| add(&registry, IntCounterVec::new(opts, labels));
        let seconds = |name: &str, help: &str| histogram(name, help, &REQUEST);
        let gauge = |name, help| add(&registry, IntGauge::with_opts(mine(name, help)));
        let counter = |name, help| add(&registry, IntCounter::with_opts(mine(name, help)));
        Metrics {
            running: gauge("vllm:num_requests_running", "Requests in passes of the model."),
            waiting: gauge("vllm:num_requests_waiting", "Requests that wait to be worked on."),
            cache: add(
                &registry,
                Gauge::with_opts(mine("vllm:kv_cache_usage_perc", "Share of the caches in use. 1 means all of it.")),
            ),
            cache_tokens: gauge("handmill_cache_tokens", "Tokens that the caches hold at most: --cache-tokens."),
            prompt_tokens: counter("vllm:prompt_tokens_total", "Tokens of prompts that were read."),
            generation_tokens: counter("vllm:generation_tokens_total", "Tokens that were made."),
            success: counters(
                mine("vllm:request_success_total", "Requests that ended, by how: stop, length, abort or error."),
                &["finished_reason"],
            ),
            first: histogram("vllm:time_to_first_token_seconds", "From a request to its first token.", &FIRST),
            between: histogram("vllm:inter_token_latency_seconds", "From one token of a request to the next.", &TOKEN),
            per_token: histogram(
                "vllm:time_per_output_token_seconds",
                "Mean of a request's times between tokens.",
                &TOKEN,
            ),
            whole: seconds("vllm:e2e_request_latency_seconds", "From a request to the end of its answer."),
            queue: seconds("vllm:request_queue_time_seconds", "Time that a request waited."),
            prefill: seconds("vllm:request_prefill_time_seconds", "Time that a request's prompt took."),
            decode: seconds("vllm:request_decode_time_seconds", "From a request's first token to its last."),
            request_prompt: histogram("vllm:request_prompt_tokens", "Tokens of a request's prompt.", &TOKENS),
            request_generation: histogram("vllm:request_generation_tokens", "New tokens of a request.", &TOKENS),
            passes: counter("handmill_passes_total", "Passes of the model."),
            requests: counters(
                opts("handmill_http_requests_total", "Requests, by their route and the class of their status."),
                &["route", "status"],
            ),
            scores: {
                let opts =
                    HistogramOpts::new("handmill_retrieval_score", "Cosine of the best passage with a question.");
                add(&registry, HistogramVec::new(opts.buckets(SCORES.to_vec()), &["index"]))
            },
            refusals: counters(
                opts("handmill_retrieval_refusals_total", "Questions that no passage answers: no model was asked."),
                &["index"],
            ),
            arm_requests: counters(
                opts("handmill_arm_requests_total", "Answers of an alias' arm: ok, failed, shadow or shadow_failed."),
                &["alias", "arm", "outcome"],
            ),
            arm_seconds: add(
                &registry,
                CounterVec::new(
                    opts("handmill_arm_seconds_total", "Seconds that the answers of an alias' arm took together."),
                    &["alias", "arm"],
                ),
            ),
            arm_feedback: counters(
                opts("handmill_arm_feedback_total", "Ratings of an alias' arm: up or down."),
                &["alias", "arm", "rating"],
            ),
            arm_weight: add(
                &registry,
                GaugeVec::new(
                    opts("handmill_arm_weight", "Weight of an alias' arm; 0: rolled back."),
                    &["alias", "arm"],
                ),
            ),
            rollbacks: counters(
                opts("handmill_rollbacks_total", "Arms that were rolled back, by the bound they broke."),
                &["alias", "arm", "bound"],
            ),
            drift: add(
                &registry,
                GaugeVec::new(
                    opts("handmill_question_drift", "How far the questions are from the reference, by statistic."),
                    &["statistic"],
                ),
            ),
            captured: counters(opts("handmill_captured_total", "Lines of the log: written, or failed."), &["outcome"]),
            registry,
            reading: Mutex::default(),
        }
    }

    /// A request came to its end, one way or another.
    pub fn ended(&self, reason: &str) {
        self.success.with_label_values(&[reason]).inc();
    }

    /// A request was answered by this route with this status.
    pub fn answered(&self, route: &str, status: u16) {
        let class = ["1xx", "2xx", "3xx", "4xx", "5xx"][(status as usize / 100).clamp(1, 5) - 1];
        self.requests.with_label_values(&[route, class]).inc();
    }

    /// Seconds between two tokens.
    pub fn between(&self, seconds: f64) {
        self.between.observe(seconds);
    }

    /// What a finished answer took.
    pub fn took(&self, took: &Took) {
        took.first.iter().for_each(|&first| self.first.observe(first));
        self.whole.observe(took.whole);
        self.queue.observe(took.queue);
        self.prefill.observe(took.prefill);
        self.decode.observe(took.decode);
        self.request_prompt.observe(took.prompt_tokens as f64);
        self.request_generation.observe(took.new_tokens as f64);
        if took.new_tokens > 1 {
            self.per_token.observe(took.decode / (took.new_tokens - 1) as f64);
        }
    }

    /// The best score for a question.
    pub fn scored(&self, index: &str, best: f32) {
        self.scores.with_label_values(&[index]).observe(f64::from(best));
    }

    /// An arm's answer.
    pub fn arm(&self, alias: &str, arm: &str, outcome: &str, seconds: f64) {
        self.arm_requests.with_label_values(&[alias, arm, outcome]).inc();
        self.arm_seconds.with_label_values(&[alias, arm]).inc_by(seconds.max(0.0));
    }

    /// An arm's rating.
    pub fn rated(&self, alias: &str, arm: &str, rating: i64) {
        let word = if rating > 0 { "up" } else { "down" };
        self.arm_feedback.with_label_values(&[alias, arm, word]).inc();
    }

    /// An arm was rolled back.
    pub fn rolled_back(&self, event: &Rollback) {
        self.rollbacks.with_label_values(&[&event.alias, &event.arm, &event.bound]).inc();
    }

    /// A line of the log.
    pub fn captured(&self, ok: bool) {
        self.captured.with_label_values(&[if ok { "written" } else { "failed" }]).inc();
    }

    /// All of it as text.
    pub fn text(&self, stats: &Stats, canary: &Canary) -> String {
        let _reading = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        self.running.set(stats.running as i64);
        self.waiting.set(stats.waiting as i64);
        self.cache.set(stats.cached_tokens as f64 / stats.cache_tokens.max(1) as f64);
        self.cache_tokens.set(stats.cache_tokens as i64);
        for (counter, now) in [
            (&self.prompt_tokens, stats.prompt_tokens),
            (&self.generation_tokens, stats.new_tokens),
            (&self.passes, stats.passes),
        ] {
            counter.inc_by(now.saturating_sub(counter.get()));
        }
        for (alias, arm, weight) in canary.weights() {
            self.arm_weight.with_label_values(&[&alias, &arm]).set(weight);
        }
        let mut text = Vec::new();
        let encoded = TextEncoder::new().encode(&self.registry.gather(), &mut text);
        encoded.map(|()| String::from_utf8_lossy(&text).into_owned()).unwrap_or_else(|error| {
            log::error!("metrics: {error}");
            String::new()
        })
    }
}

/// Puts a metric into the registry. Names are constants, so a fault is this file's.
fn add<M: prometheus::core::Collector + Clone + 'static>(registry: &Registry, metric: prometheus::Result<M>) -> M {
    let metric = metric.expect("the metric's name and labels are well formed");
    registry.register(Box::new(metric.clone())).expect("the metric's name is taken once");
    metric
}

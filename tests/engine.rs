//! The engine: many texts, many adapters, one pass; each answer the same as alone.

#[path = "engine/faulty.rs"]
mod faulty;
#[path = "models/reference.rs"]
#[allow(dead_code)] // tests/models' own
mod reference;
#[path = "support/tiny_chat.rs"]
mod tiny_chat;
#[path = "models/tiny.rs"]
#[allow(dead_code)] // tests/models' own
mod tiny_models;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use handmill::device::{cpu::Cpu, invariant::invariant, Device};
use handmill::model::adapter::{Adapter, LoraConfig};
use handmill::model::checkpoint::Checkpoint;
use handmill::model::generate::{Ending, GenerateOptions, LanguageModel};
use handmill::model::sampler::SamplerSettings;
use handmill::model::weights::LoadOptions;
use handmill::serve::engine::{Engine, Options};
use handmill::serve::job::{Event, Job, Refused, Token};
use handmill::train::parameters;
use handmill::verify::normal;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::sync::mpsc::{unbounded_channel, UnboundedReceiver};

/// Long enough for anything here.
const LONG: Duration = Duration::from_secs(60);

fn device() -> Arc<dyn Device> {
    invariant(Arc::new(Cpu::new()))
}

fn open(path: &Path) -> LanguageModel {
    LanguageModel::open(path, device(), &LoadOptions::default()).unwrap()
}

fn engine(dir: &Path, max_running: usize, prefill_chunk: usize) -> Engine {
    let options = Options { max_running, prefill_chunk, cache_tokens: 1200, max_waiting: 100, ..Options::default() };
    Engine::start(open(dir), options).unwrap()
}

/// Writes an adapter whose effect is plain to see.
fn write_adapter(model: &Path, name: &str, r: usize, targets: &[&'static str], seed: u64) -> PathBuf {
    let config =
        LoraConfig { r, alpha: 2.0 * r as f64, rslora: false, dropout: 0.0, targets: targets.to_vec(), base: None };
    let mut adapter: Adapter = parameters::fresh(&Checkpoint::open(model).unwrap().config, config, seed);
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    for value in adapter.modules.iter_mut().flat_map(|module| &mut module.b) {
        *value = 0.2 * normal(&mut rng) as f32;
    }
    let dir = model.join(name);
    adapter.save(&dir).unwrap();
    dir
}

/// A tiny model and three adapters of other ranks and modules.
fn fixture() -> (tempfile::TempDir, Vec<(&'static str, PathBuf)>) {
    let dir = tempfile::tempdir().unwrap();
    tiny_chat::write_tiny(dir.path());
    let all = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
    let adapters = vec![
        ("all", write_adapter(dir.path(), "all", 3, &all, 1)),
        ("attention", write_adapter(dir.path(), "attention", 8, &["q_proj", "v_proj"], 2)),
        ("ffn", write_adapter(dir.path(), "ffn", 17, &["gate_proj", "down_proj"], 3)),
    ];
    (dir, adapters)
}

/// What a test asks, to be asked again.
#[derive(Clone)]
struct Ask {
    prompt: Vec<u32>,
    adapter: Option<String>,
    sampler: SamplerSettings,
    max_tokens: usize,
    logprobs: Option<usize>,
    echo: bool,
    deadline: Option<Instant>,
}

impl Ask {
    fn new(prompt: &[u32], max_tokens: usize) -> Ask {
        Ask {
            prompt: prompt.to_vec(),
            adapter: None,
            sampler: SamplerSettings::default(),
            max_tokens,
            logprobs: None,
            echo: false,
            deadline: None,
        }
    }

    fn with(mut self, adapter: &str) -> Ask {
        self.adapter = Some(adapter.into());
        self
    }

    fn random(rng: &mut ChaCha8Rng, adapters: &[(&str, PathBuf)]) -> Ask {
        let prompt: Vec<u32> = (0..rng.random_range(1..70)).map(|_| rng.random_range(0..100)).collect();
        let temperature = [0.0, 0.7, 1.5][rng.random_range(0..3)];
        let sampler = SamplerSettings { temperature, top_k: 40, top_p: 0.95, min_p: 0.0, seed: rng.random() };
        Ask {
            adapter: adapters.get(rng.random_range(0..adapters.len() + 1)).map(|(name, _)| name.to_string()),
            sampler,
            logprobs: [None, Some(0), Some(4)][rng.random_range(0..3)],
            echo: rng.random_range(0..3) == 0,
            ..Ask::new(&prompt, rng.random_range(0..25))
        }
    }

    fn submit(&self, engine: &Engine) -> Result<UnboundedReceiver<Event>, Refused> {
        let (events, listener) = unbounded_channel();
        engine.submit(Job {
            prompt: self.prompt.clone(),
            adapter: self.adapter.clone(),
            sampler: self.sampler,
            max_tokens: self.max_tokens,
            stop: vec![0, 17],
            logprobs: self.logprobs,
            echo: self.echo,
            deadline: self.deadline,
            events,
        })?;
        Ok(listener)
    }

    fn answer(&self, engine: &Engine) -> Answer {
        hear(self.submit(engine).unwrap())
    }
}

/// What a job came to, times left out.
#[derive(Debug, PartialEq)]
struct Answer {
    prompt: Option<Vec<Token>>,
    tokens: Vec<Token>,
    ending: Ending,
}

/// All events of a job that is to succeed, checked for their order.
fn hear(mut listener: UnboundedReceiver<Event>) -> Answer {
    let (mut prompt, mut tokens) = (None, Vec::new());
    loop {
        match listener.blocking_recv().expect("an end before the channel's") {
            Event::Prompt(all) => {
                assert!(prompt.is_none() && tokens.is_empty());
                prompt = Some(all);
            }
            Event::Token(token) => tokens.push(token),
            Event::Done(done) => {
                assert_eq!(done.new_tokens, tokens.len());
                assert!(listener.blocking_recv().is_none(), "nothing after the end");
                return Answer { prompt, tokens, ending: done.ending };
            }
            Event::Failed(what) => panic!("{what}"),
        }
    }
}

/// Waits until nothing runs or waits.
fn settle(engine: &Engine) {
    let begun = Instant::now();
    while engine.stats().running + engine.stats().waiting > 0 {
        assert!(begun.elapsed() < LONG, "still at work: {:?}", engine.stats());
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(engine.stats().cached_tokens, 0);
}

#[test]
fn answers_are_those_of_each_job_alone() {
    let (dir, adapters) = fixture();
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let asks: Vec<Ask> = (0..60).map(|_| Ask::random(&mut rng, &adapters)).collect();
    let alone = engine(dir.path(), 1, 64);
    let crowd = engine(dir.path(), 7, 9);
    for engine in [&alone, &crowd] {
        // In another order, so into other slots.
        let mut order: Vec<usize> = (0..adapters.len()).collect();
        if std::ptr::eq(engine, &crowd) {
            order.reverse();
        }
        order.iter().for_each(|&i| {
            engine.load_adapter(adapters[i].0, &adapters[i].1).unwrap();
        });
    }
    let expected: Vec<Answer> = asks.iter().map(|ask| ask.answer(&alone)).collect();
    assert!(expected.iter().any(|answer| matches!(answer.ending, Ending::Stop(_))), "a stop is met");

    let mut heard = Vec::new();
    for (i, ask) in asks.iter().enumerate() {
        heard.push((i, ask.submit(&crowd).unwrap()));
        if rng.random_range(0..3) == 0 {
            // One that is given up: at once, or after its first event.
            let mut listener = asks[rng.random_range(0..asks.len())].submit(&crowd).unwrap();
            if rng.random() {
                listener.blocking_recv();
            }
        }
    }
    for (i, listener) in heard {
        assert_eq!(hear(listener), expected[i], "job {i}");
    }
    settle(&crowd);
}

#[test]
fn answers_are_those_of_generate() {
    let (dir, adapters) = fixture();
    let engine = engine(dir.path(), 4, 5);
    let prompt: Vec<u32> = (3..40).collect();
    let mut waiting = Vec::new();
    for (name, path) in &adapters {
        engine.load_adapter(name, path).unwrap();
        waiting.push(Ask { logprobs: Some(0), ..Ask::new(&prompt, 20).with(name) }.submit(&engine).unwrap());
    }
    waiting.push(Ask { logprobs: Some(0), ..Ask::new(&prompt, 20) }.submit(&engine).unwrap());
    for (i, listener) in waiting.into_iter().enumerate() {
        let mut model = open(dir.path());
        if let Some((_, path)) = adapters.get(i) {
            model.llama.attach(&Adapter::open(path).unwrap()).unwrap();
        }
        let options = GenerateOptions { sampler: SamplerSettings::default(), max_tokens: 20, stop: vec![0, 17] };
        let mut session = model.session(prompt.len(), 20).unwrap();
        let mut logits = Vec::new();
        let mut keep = |id: u32, row: &[f32]| {
            let sum: f64 = row.iter().map(|&l| (l as f64).exp()).sum::<f64>().ln();
            logits.push(row[id as usize] as f64 - sum);
            std::ops::ControlFlow::Continue(())
        };
        let generated = model.generate(&mut session, &prompt, &options, &mut keep).unwrap();
        let answer = hear(listener);
        assert_eq!(answer.tokens.iter().map(|token| token.id).collect::<Vec<_>>(), generated.ids);
        for (token, expected) in answer.tokens.iter().zip(&logits) {
            // The sum of exponentials is taken in another order here.
            assert!((token.logprob.unwrap() as f64 - expected).abs() < 1e-6, "{token:?} {expected}");
        }
    }
}

#[test]
fn a_job_keeps_its_adapter() {
    let (dir, adapters) = fixture();
    let engine = engine(dir.path(), 3, 16);
    let ask = Ask::new(&[5, 6, 7], 120).with("x");
    let mut answers = Vec::new();
    for (_, path) in &adapters[..2] {
        engine.load_adapter("x", path).unwrap();
        answers.push(Ask::answer(&ask, &engine));
    }
    assert_ne!(answers[0], answers[1]);

    // Those that run and those that wait when the name moves on, or goes.
    engine.load_adapter("x", &adapters[0].1).unwrap();
    let old: Vec<_> = (0..6).map(|_| ask.submit(&engine).unwrap()).collect();
    engine.load_adapter("x", &adapters[1].1).unwrap();
    let new = ask.submit(&engine).unwrap();
    assert_eq!(engine.adapters().len(), 1);
    engine.unload_adapter("x").unwrap();
    assert!(engine.adapters().is_empty());
    assert_eq!(ask.submit(&engine).err(), Some(Refused::UnknownAdapter("x".into())));
    assert!(engine.unload_adapter("x").is_err());
    old.into_iter().for_each(|listener| assert_eq!(hear(listener), answers[0]));
    assert_eq!(hear(new), answers[1]);
    settle(&engine);
}

#[test]
fn what_cannot_be_done_is_refused() {
    let (dir, _) = fixture();
    let engine = engine(dir.path(), 1, 16);
    assert_eq!(engine.text().context(), 1024);
    let refused = |ask: &Ask| ask.submit(&engine).err().unwrap();
    assert!(matches!(refused(&Ask::new(&[], 3)), Refused::Invalid(_)));
    assert!(matches!(refused(&Ask::new(&[100], 3)), Refused::Invalid(_)));
    let wild = SamplerSettings { temperature: f32::NAN, ..SamplerSettings::default() };
    assert!(matches!(refused(&Ask { sampler: wild, ..Ask::new(&[1], 3) }), Refused::Invalid(_)));
    let too_long = Refused::TooLong { prompt: 1000, max_tokens: 25, room: 1024 };
    assert_eq!(refused(&Ask::new(&[1; 1000], 25)), too_long);
    assert!(matches!(refused(&Ask::new(&[1], usize::MAX)), Refused::TooLong { .. }));
    assert_eq!(refused(&Ask::new(&[1], 1).with("none")), Refused::UnknownAdapter("none".into()));
    let said = engine.load_adapter("none", dir.path()).unwrap_err().to_string();
    assert!(said.contains("adapter_config.json"), "{said}");

    // The longest that fits, and a queue that fills behind it.
    let mut long: Vec<_> = vec![Ask::new(&[1; 24], 1000).submit(&engine).unwrap()];
    let full = loop {
        match Ask::new(&[1; 24], 1000).submit(&engine) {
            Ok(listener) => long.push(listener),
            Err(refused) => break refused,
        }
    };
    assert_eq!(full, Refused::Full { waiting: 100 });
    assert!((100..=102).contains(&long.len()));
    drop(long);
    settle(&engine);
    Ask::new(&[1], 3).answer(&engine);
}

#[test]
fn time_runs_out() {
    let (dir, _) = fixture();
    let engine = engine(dir.path(), 1, 16);
    let by = |milliseconds| Some(Instant::now() + Duration::from_millis(milliseconds));
    let runs = Ask { deadline: by(60), ..Ask::new(&[1; 24], 1000) }.submit(&engine).unwrap();
    let waits = Ask { deadline: by(30), ..Ask::new(&[1; 24], 1000) }.submit(&engine).unwrap();
    for listener in [runs, waits] {
        // A stop token may end it before.
        let answer = hear(listener);
        assert!(answer.ending == Ending::Caller || matches!(answer.ending, Ending::Stop(_)), "{:?}", answer.ending);
        assert!(answer.tokens.len() < 1000);
    }
    settle(&engine);
}

#[test]
fn a_drained_engine_ends_what_it_began() {
    let (dir, _) = fixture();
    let engine = engine(dir.path(), 2, 16);
    let waiting: Vec<_> = (0..6).map(|i| Ask::new(&[1 + i; 9], 40).submit(&engine).unwrap()).collect();
    assert!(engine.drain(LONG));
    assert_eq!(Ask::new(&[1], 1).submit(&engine).err(), Some(Refused::Draining));
    waiting.into_iter().for_each(|listener| drop(hear(listener)));
}

#[test]
fn the_last_handle_ends_the_rest() {
    let (dir, _) = fixture();
    let engine = engine(dir.path(), 1, 16);
    let mut listeners: Vec<_> = (0..3).map(|_| Ask::new(&[1; 24], 1000).submit(&engine).unwrap()).collect();
    assert!(!engine.drain(Duration::ZERO));
    drop(engine);
    for listener in &mut listeners {
        let last = std::iter::from_fn(|| listener.blocking_recv()).last();
        assert!(matches!(last, Some(Event::Failed(_) | Event::Done(_))), "{last:?}");
    }
}

#[test]
fn a_device_that_fails_ends_a_pass_and_no_more() {
    let (dir, adapters) = fixture();
    let (device, fail) = faulty::faulty(device());
    let model = LanguageModel::open(dir.path(), device, &LoadOptions::default()).unwrap();
    let engine = Engine::start(model, Options { cache_tokens: 500, ..Options::default() }).unwrap();
    let ask = Ask::new(&[1, 2, 3], 12);
    let expected = ask.answer(&engine);
    for kind in [faulty::ERROR, faulty::PANIC] {
        fail.store(kind, std::sync::atomic::Ordering::SeqCst);
        let mut listener = ask.submit(&engine).unwrap();
        let last = std::iter::from_fn(|| listener.blocking_recv()).last();
        let Some(Event::Failed(said)) = last else { panic!("{last:?}") };
        assert!(said.contains("the device failed") && said.contains("on purpose"), "{said}");
        settle(&engine);
        assert_eq!(ask.answer(&engine), expected);
    }
    // While an adapter is loaded: the load fails, the engine goes on.
    fail.store(faulty::ALLOC, std::sync::atomic::Ordering::SeqCst);
    engine.load_adapter("x", &adapters[0].1).unwrap_err();
    assert!(engine.adapters().is_empty());
    engine.load_adapter("x", &adapters[0].1).unwrap();
    assert_ne!(ask.clone().with("x").answer(&engine), expected);
    assert_eq!(ask.answer(&engine), expected);
}

#[test]
fn a_real_model_answers_as_alone() {
    let folder = std::env::var_os("HANDMILL_MODELS").map(PathBuf::from).unwrap_or_else(|| {
        let cache = std::env::var_os("XDG_CACHE_HOME").filter(|path| !path.is_empty()).map(PathBuf::from);
        let home = || PathBuf::from(std::env::var_os("HOME").expect("HOME is set"));
        cache.unwrap_or_else(|| home().join(".cache")).join("handmill/models")
    });
    let path = folder.join("smollm2/SmolLM2-135M-Instruct.Q4_1.gguf");
    assert!(path.exists(), "{} is missing: run tools/fetch_models, or set HANDMILL_MODELS", path.display());
    let model = open(&path);
    let prompts = ["The capital of France is", "Gravity is", "1 2 3 4 5 6 7 8 9 10 11 12 13 14", "Once upon a time"];
    let prompts: Vec<Vec<u32>> = prompts.iter().map(|text| model.prompt_ids(text).unwrap()).collect();
    let greedy = GenerateOptions { sampler: SamplerSettings::default(), max_tokens: 8, stop: vec![0, 17] };
    let mut expected = Vec::new();
    for prompt in &prompts {
        let mut session = model.session(prompt.len(), 8).unwrap();
        let go_on = &mut |_: u32, _: &[f32]| std::ops::ControlFlow::Continue(());
        expected.push(model.generate(&mut session, prompt, &greedy, go_on).unwrap().ids);
    }
    let options = Options { cache_tokens: 256, prefill_chunk: 6, ..Options::default() };
    let engine = Engine::start(model, options).unwrap();
    let listeners: Vec<_> = prompts.iter().map(|prompt| Ask::new(prompt, 8).submit(&engine).unwrap()).collect();
    for (listener, expected) in listeners.into_iter().zip(expected) {
        assert_eq!(hear(listener).tokens.iter().map(|token| token.id).collect::<Vec<_>>(), expected);
    }
}

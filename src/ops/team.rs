//! Threads that wait awake for the next piece of work. A token is some 200 matrices, each a few dozen microseconds on two
//! cores; a pool whose threads go to sleep between them loses a third of that to waking them. These spin for
//! [`AWAKE`] after their last work, then park.
//!
//! ```text
//! caller:   job := body; next := 0; state := (epoch + 1, open, 0 inside)
//!           take parts 0.. from `next` until none is left;  close;  wait until nobody is inside
//! worker:   on a new open epoch:  enter (count + 1, only while open);  take parts;  leave (count − 1)
//! ```
//!
//! A worker that comes late finds the door closed and misses nothing, so a thread the system has set aside never holds
//! up the others once all parts are done.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::*};
use std::sync::{Mutex, OnceLock};
use std::thread::Thread;
use std::time::{Duration, Instant};

/// How long a worker spins for more work: longer than anything one thread does alone between two matrices of a token.
const AWAKE: Duration = Duration::from_micros(200);
/// The door's bit in [`Team::state`]; below it the count of workers inside, above it the epoch.
const OPEN: u64 = 1 << 31;
const INSIDE: u64 = OPEN - 1;

/// What a caller wants done: `body(part)` for each part.
type Body<'a> = &'a (dyn Fn(usize) + Sync);

struct Team {
    workers: Vec<Worker>,
    /// Epoch << 32 | OPEN | workers inside.
    state: AtomicU64,
    next: AtomicUsize,
    /// Written by the caller while the door is closed and nobody inside, read by workers inside.
    job: UnsafeCell<(usize, Body<'static>)>,
    /// The first panic of a part.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// One caller at a time.
    caller: Mutex<()>,
}

struct Worker {
    thread: OnceLock<Thread>,
    parked: AtomicBool,
}

// SAFETY: `job` is written only by the caller that holds `caller`, while the state says closed and nobody inside; it is
// read only between entering and leaving, which the state orders after the write (release store, acquiring exchange).
unsafe impl Sync for Team {}

/// Calls `body(part)` for every part below `parts`, on this thread and the team's, each part once and in no order.
/// Inside a part, or beside another caller, it runs on this thread alone. Panics of parts reach the caller.
pub fn run(parts: usize, body: Body<'_>) {
    let team = team();
    let caller = if parts > 1 && !team.workers.is_empty() { team.caller.try_lock().ok() } else { None };
    if caller.is_none() {
        return (0..parts).for_each(body);
    }
    // SAFETY: only the lifetime changes. The reference is used between here and the wait below, which this function
    // does not leave before: `take_parts` catches panics.
    let lasting = unsafe { std::mem::transmute::<Body<'_>, Body<'static>>(body) };
    // SAFETY: `caller` is held, the door is closed and nobody is inside: see the last lines of the call before.
    unsafe { *team.job.get() = (parts, lasting) };
    team.next.store(0, Relaxed);
    let epoch = (team.state.load(Relaxed) >> 32) + 1;
    team.state.store(epoch << 32 | OPEN, SeqCst);
    for worker in &team.workers {
        if worker.parked.swap(false, SeqCst) {
            worker.thread.get().expect("set before it first parks").unpark();
        }
    }
    team.take_parts(parts, body);
    team.state.fetch_and(!OPEN, AcqRel);
    let mut spins = 0u32;
    while team.state.load(Acquire) & INSIDE != 0 {
        // On a machine with other work, whoever is inside may be waiting for this core.
        spins += 1;
        if spins.is_multiple_of(4096) {
            std::thread::yield_now()
        } else {
            std::hint::spin_loop()
        }
    }
    let panic = team.panic.lock().unwrap_or_else(|e| e.into_inner()).take();
    drop(caller);
    if let Some(panic) = panic {
        resume_unwind(panic);
    }
}

impl Team {
    fn take_parts(&self, parts: usize, body: Body<'_>) {
        let taken = catch_unwind(AssertUnwindSafe(|| loop {
            let part = self.next.fetch_add(1, Relaxed);
            if part >= parts {
                break;
            }
            body(part);
        }));
        if let Err(panic) = taken {
            self.panic.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(panic);
        }
    }

    /// A worker's life.
    fn work(&self, worker: &Worker) {
        let _ = worker.thread.set(std::thread::current());
        let mut done = 0;
        let mut idle_since = Instant::now();
        loop {
            let state = self.state.load(Acquire);
            if state & OPEN != 0 && state >> 32 != done {
                if self.state.compare_exchange(state, state + 1, AcqRel, Relaxed).is_ok() {
                    // SAFETY: inside, so the caller waits and the job stays as it was written.
                    let (parts, body) = unsafe { *self.job.get() };
                    self.take_parts(parts, body);
                    self.state.fetch_sub(1, Release);
                    done = state >> 32;
                    idle_since = Instant::now();
                }
                continue;
            }
            if idle_since.elapsed() < AWAKE {
                (0..32).for_each(|_| std::hint::spin_loop());
                continue;
            }
            // Says it parks, then looks once more: a caller either sees the flag or is seen.
            worker.parked.store(true, SeqCst);
            let state = self.state.load(SeqCst);
            if state & OPEN == 0 || state >> 32 == done {
                std::thread::park();
            }
            worker.parked.store(false, SeqCst);
            idle_since = Instant::now();
        }
    }
}

/// The one team of the process: as many threads as rayon has, less the caller.
fn team() -> &'static Team {
    static TEAM: OnceLock<Team> = OnceLock::new();
    static STARTED: OnceLock<()> = OnceLock::new();
    let team = TEAM.get_or_init(|| Team {
        workers: (1..rayon::current_num_threads())
            .map(|_| Worker { thread: OnceLock::new(), parked: AtomicBool::new(false) })
            .collect(),
        state: AtomicU64::new(0),
        next: AtomicUsize::new(0),
        job: UnsafeCell::new((0, &|_| ())),
        panic: Mutex::new(None),
        caller: Mutex::new(()),
    });
    STARTED.get_or_init(|| {
        for worker in &team.workers {
            // A worker that cannot be started is one that never enters: the caller does its parts.
            if let Err(error) = std::thread::Builder::new().name("handmill".into()).spawn(|| team.work(worker)) {
                log::warn!("a thread could not be started, work goes on with fewer: {error}");
            }
        }
    });
    team
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_is_done_once_whoever_calls() {
        std::thread::scope(|scope| {
            for caller in 0..3 {
                scope.spawn(move || {
                    for round in 0..2000 {
                        let parts = (round + caller) % 9;
                        let counts: Vec<AtomicUsize> = (0..parts).map(|_| AtomicUsize::new(0)).collect();
                        run(parts, &|part| {
                            counts[part].fetch_add(1, Relaxed);
                        });
                        assert!(counts.iter().all(|count| count.load(Relaxed) == 1), "{parts} parts");
                    }
                });
            }
        });
    }

    #[test]
    fn workers_wake_from_their_sleep() {
        for _ in 0..5 {
            std::thread::sleep(AWAKE * 3);
            let sum = AtomicUsize::new(0);
            run(100, &|part| {
                sum.fetch_add(part, Relaxed);
            });
            assert_eq!(sum.into_inner(), 4950);
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_leaves_the_team_whole() {
        let result = catch_unwind(|| run(8, &|part| assert_ne!(part, 5, "part five")));
        assert!(result.is_err());
        let done = AtomicUsize::new(0);
        run(8, &|_| {
            run(3, &|_| {
                done.fetch_add(1, Relaxed);
            })
        });
        assert_eq!(done.into_inner(), 24, "parts within parts");
    }
}

//! What wgpu reports through callbacks, kept until the call that caused it can return it.

use crate::device::Error;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What went wrong since [`Faults::take`] was last called.
#[derive(Default)]
pub(super) struct Faults {
    /// The first error, as later ones tend to follow from it.
    first: Mutex<Option<wgpu::Error>>,
    /// Why the device is gone, if it is.
    lost: Mutex<Option<String>>,
}

/// A lock whose holder cannot leave a broken structure behind.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Faults {
    /// The errors of `device`, from now on: none of them panics.
    pub fn watch(device: &wgpu::Device) -> Arc<Faults> {
        let faults = Arc::new(Faults::default());
        let target = faults.clone();
        device.on_uncaptured_error(Arc::new(move |error| {
            log::debug!("wgpu: {error}");
            lock(&target.first).get_or_insert(error);
        }));
        let target = faults.clone();
        // From then on wgpu takes every call and does nothing: only this tells.
        device.set_device_lost_callback(move |reason, message| {
            let why =
                if message.is_empty() { format!("{reason:?}") } else { message.trim_end_matches('.').to_string() };
            lock(&target.lost).get_or_insert(why);
        });
        faults
    }

    /// The first error since the last call, as what `what`, such as a kernel's stem, could not do.
    pub fn take(&self, device: &str, what: &str) -> Result<(), Error> {
        if let Some(message) = &*lock(&self.lost) {
            let reason =
                format!("the device was lost ({message}): its driver may have reset it; start again, with less work");
            return Err(Error::Unavailable { device: device.into(), reason });
        }
        match lock(&self.first).take() {
            None => Ok(()),
            Some(wgpu::Error::OutOfMemory { .. }) => {
                let reason = "out of device memory: take a smaller model, context or batch".to_string();
                Err(Error::Invalid { what: what.into(), reason })
            }
            Some(error) => Err(Error::Invalid { what: what.into(), reason: sentence(&error) }),
        }
    }

    /// The first error since the last call was for want of memory; it counts as seen.
    pub fn take_out_of_memory(&self) -> bool {
        let mut first = lock(&self.first);
        let out_of_memory = matches!(*first, Some(wgpu::Error::OutOfMemory { .. }));
        if out_of_memory {
            *first = None;
        }
        out_of_memory
    }
}

/// A report of several lines as one.
fn sentence(error: &wgpu::Error) -> String {
    let text = error.to_string();
    text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ")
}

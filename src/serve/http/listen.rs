//! Connections, and the way down: what runs is finished, what comes is told to go elsewhere.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{watch, OwnedSemaphorePermit, Semaphore};

use super::paced::Paced;
use super::routes::router;
use super::Server;

/// Bytes of a request's head.
const HEAD_BYTES: usize = 64 << 10;
/// How long answers that are made may take to be read, once the server goes down.
const LAST_BYTES: Duration = Duration::from_secs(2);
/// How often the end of work is looked for.
const LOOK: Duration = Duration::from_millis(10);

/// Serves until `stop` is done, then drains: requests that are being answered come to their end, new ones are refused,
/// `/health` says so.
pub async fn serve(
    server: Arc<Server>,
    listener: TcpListener,
    stop: impl std::future::Future<Output = ()>,
) -> io::Result<()> {
    let (close, closing) = watch::channel(false);
    let places = Arc::new(Semaphore::new(server.limits.connections));
    let mut accepting = Box::pin(accept(server.clone(), listener, places.clone(), closing));
    tokio::select! {
        result = &mut accepting => return result,
        () = stop => {}
    }
    server.draining.store(true, Ordering::SeqCst);
    log::info!("going down: {} requests are being answered", server.active.load(Ordering::SeqCst));
    let late = Instant::now() + server.limits.timeout + LAST_BYTES;
    let idle = async {
        while server.active.load(Ordering::SeqCst) > 0 && Instant::now() < late {
            tokio::time::sleep(LOOK).await;
        }
    };
    tokio::select! {
        result = &mut accepting => return result,
        () = idle => {}
    }
    close.send_replace(true);
    drop(accepting); // with the place that it keeps for the next connection
    let late = Instant::now() + LAST_BYTES;
    while places.available_permits() < server.limits.connections && Instant::now() < late {
        tokio::time::sleep(LOOK).await;
    }
    let engine = server.clone();
    let _ = tokio::task::spawn_blocking(move || engine.engine.drain(LAST_BYTES)).await; // a panic there was told already
    Ok(())
}

async fn accept(
    server: Arc<Server>,
    listener: TcpListener,
    places: Arc<Semaphore>,
    closing: watch::Receiver<bool>,
) -> io::Result<()> {
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return Ok(()) };
        match listener.accept().await {
            Ok((stream, _)) => drop(tokio::spawn(connection(server.clone(), stream, place, closing.clone()))),
            // The client left already, or there are no more descriptors for now: the next one may fare better.
            Err(error) => {
                log::warn!("a connection failed: {error}");
                tokio::time::sleep(LOOK).await;
            }
        }
    }
}

async fn connection(
    server: Arc<Server>,
    stream: TcpStream,
    _place: OwnedSemaphorePermit,
    mut closing: watch::Receiver<bool>,
) {
    let _ = stream.set_nodelay(true); // tokens are small and none should wait for the next
    let patience = server.limits.client;
    let stream = TokioIo::new(Paced::new(stream, patience));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        // Of the whole head, however its bytes drip, and of a connection that lies idle.
        .header_read_timeout(patience)
        .max_buf_size(HEAD_BYTES)
        .serve_connection(stream, TowerToHyperService::new(router(server)));
    tokio::pin!(connection);
    let result = tokio::select! {
        result = connection.as_mut() => result,
        _ = async { closing.wait_for(|closing| *closing).await.is_ok() } => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        log::debug!("a connection ended: {error}"); // a client that left, or what is no HTTP
    }
}

//! `/metrics` for Prometheus: a small HTTP listener on the loopback address, beside gRPC.
//!
//! Started by the daemon. It says what `lifeboat top` and `lifeboat status` say, in the text format
//! (`text`). It reads and changes nothing, and it asks nobody who they are: therefore it listens on
//! the machine itself only (`config::MetricsListen`). An address that is taken is no reason for a
//! controller not to start: it says so and tries again. Deliberately not here: TLS, any other path.

mod text;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::service::Service;
use crate::tasks;

/// Between two tries to listen.
const AGAIN: Duration = Duration::from_secs(10);
/// Most readers at a time: whoever comes then waits.
const READERS: usize = 16;
/// For a request's head; and, from the first byte to the last, for all of a connection.
const HEAD_WITHIN: Duration = Duration::from_secs(5);
const ALL_WITHIN: Duration = Duration::from_secs(60);

/// Serves metrics at `address`, for ever.
pub async fn serve(service: Arc<Service>, address: SocketAddr) {
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => accept(&service, listener).await,
            Err(error) => tracing::warn!(
                %address, %error,
                "metrics are not served; set controller.metrics_listen to another address or `off`"
            ),
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// Returns when the listener breaks.
async fn accept(service: &Arc<Service>, listener: TcpListener) {
    let room = Arc::new(Semaphore::new(READERS));
    tracing::info!(address = ?listener.local_addr().ok(), "serving metrics");
    loop {
        // The semaphore is never closed.
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else { return };
        let Ok((stream, _)) = listener.accept().await else { return };
        let service = Arc::clone(service);
        tasks::spawn(async move {
            let answer = service_fn(move |request| answer(Arc::clone(&service), request));
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_WITHIN)
                .max_buf_size(16 << 10)
                .serve_connection(TokioIo::new(stream), answer);
            // A reader that breaks off is its own affair.
            let _ = tokio::time::timeout(ALL_WITHIN, connection).await;
            drop(permit);
        });
    }
}

async fn answer(
    service: Arc<Service>,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    if request.uri().path() != "/metrics" {
        return Ok(refusal(StatusCode::NOT_FOUND, "there is only /metrics\n"));
    }
    if request.method() != Method::GET && request.method() != Method::HEAD {
        let mut refused = refusal(StatusCode::METHOD_NOT_ALLOWED, "metrics are only read\n");
        refused.headers_mut().insert(ALLOW, hyper::header::HeaderValue::from_static("GET, HEAD"));
        return Ok(refused);
    }
    let links = service.links().await;
    let switches = service.switches().await;
    // Without an id there is no id that could be unknown.
    let status = service.status("").await.unwrap_or_default();
    let text = text::metrics(&links, &switches, &status);
    let mut response = Response::new(Full::from(text));
    let kind = hyper::header::HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    Ok(response)
}

fn refusal(status: StatusCode, text: &'static str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = status;
    response
}
